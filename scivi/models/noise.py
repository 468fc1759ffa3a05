"""A distribution as a smooth map of standard normal noise: its value and density at given noise."""

from __future__ import annotations

from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor

_HALF_LOG_2PI = 0.9189385332046727


def noise_shape(fn: Any) -> tuple[int, ...] | None:
    """Event shape of the standard normal noise that one draw of ``fn`` is a smooth map of.

    None if it is no such map.
    """
    if isinstance(fn, torch.distributions.Normal | torch.distributions.MultivariateNormal):
        return tuple(fn.event_shape)
    if isinstance(fn, torch.distributions.Independent):
        inner = noise_shape(fn.base_dist)
        return None if inner is None else (*fn.event_shape[: fn.reinterpreted_batch_ndims], *inner)
    if isinstance(fn, torch.distributions.TransformedDistribution | dist.MaskedDistribution):
        return noise_shape(fn.base_dist)
    return None


def put(fn: Any, noise: Tensor) -> Tensor:
    """Value of ``fn`` at given standard normal noise, as ``rsample`` would compute it.

    Arguments as ``push`` has them.
    """
    if isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        return put(fn.base_dist, noise)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value = put(fn.base_dist, noise)
        for transform in fn.transforms:
            value = transform(value)
        return cast(Tensor, value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return fn.loc + fn.scale * noise


def push(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Value of ``fn`` at given standard normal noise, and its log density there.

    The value is as ``rsample`` would compute it. No transform is inverted: the density comes from the noise
    and the slopes on the way.

    Args:
        fn: a normal, possibly multivariate, possibly transformed (``noise_shape`` is not None).
        noise: (*lead, *fn.batch_shape, *noise_shape), or broadcastable to it.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return push(fn.base_dist, noise)
    if isinstance(fn, torch.distributions.Independent):
        value, density = push(fn.base_dist, noise)
        return value, _sum_right(density, fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value, density = push(fn.base_dist, noise)
        path: list[Any] = [value]
        for transform in fn.transforms:
            path.append(transform(path[-1]))
        event_dim, slopes = len(fn.event_shape), 0.0
        for transform, x, y in zip(reversed(fn.transforms), path[-2::-1], path[::-1], strict=False):
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
            slopes = slopes + _sum_right(
                transform.log_abs_det_jacobian(x, y), event_dim - transform.domain.event_dim
            )
        return path[-1], _sum_right(density, event_dim - len(fn.base_dist.event_shape)) - slopes
    squares = -0.5 * noise * noise - _HALF_LOG_2PI
    value = put(fn, noise)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return value, squares.sum(-1) - fn.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return value, squares - fn.scale.log()


def _sum_right(value: Tensor, dims: int) -> Tensor:
    return value.flatten(-dims).sum(-1) if dims > 0 else value
