"""Gaussian chains: normals over a path whose precision is tridiagonal, in logarithmic depth and linear work.

    p(x) ~ exp(-x' P x / 2 + s' x),     P tridiagonal, T by T

Every second entry of the path, given its two neighbours, is independent of all the others. It is taken out
(Schur complement), which leaves a chain of half the length, and so on down to one entry: cyclic reduction
(Hockney 1965; Golub and Van Loan 2013, 4.5), the Cholesky factorisation of P in the order of a nested
dissection. It takes log2 T rounds of elementwise operations, where the usual factorisation takes T steps, and
some 2 T operations of each kind, where a prefix scan takes T log2 T. Means, draws, marginal variances and the
covariances of neighbours come out on the way back.

Entries whose data are missing add nothing to P and s: gaps and forecasts follow from the prior.

References:
    Hockney 1965, Journal of the ACM 12, 95, doi:10.1145/321250.321259.
    Rue and Held 2005, Gaussian Markov Random Fields, chapter 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, slots=True)
class _Level:
    """What one round took out: every second entry, given its neighbours.

    Args:
        pivot: precision of those entries, (*, n).
        left, right: links to the neighbours over the pivot, (*, n); the last of ``right`` is 0 if there is
            none.
    """

    pivot: Tensor
    left: Tensor
    right: Tensor


def _meet(kept: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add to the entries kept (*, m) what comes from the entries taken out to their right and left."""
    short = kept.shape[-1] - left.shape[-1]  # 1 if the last entry of the chain is kept
    return kept + pad(left, (0, short)) + pad(right, (1, short - 1))


def _ahead(kept: Tensor, size: int) -> Tensor:
    """The right neighbours, among the entries kept, of those taken out: (*, size), 0 beyond the end."""
    return pad(kept[..., 1:], (0, size - kept.shape[-1] + 1))


def _interleave(kept: Tensor, taken: Tensor) -> Tensor:
    """The chain of both, in their order."""
    total = kept.shape[-1] + taken.shape[-1]
    even = pad(taken, (0, kept.shape[-1] - taken.shape[-1]))
    return torch.stack(torch.broadcast_tensors(kept, even), -1).flatten(-2)[..., :total]


class Moments(NamedTuple):
    """Of a chain's entries and neighbours.

    Args:
        mean, variance: (*, T).
        covariance: of neighbours, (*, T - 1).
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor


class Elimination:
    """The factorisation of a tridiagonal precision.

    Args:
        diagonal: (*, T).
        off: links of neighbours, (*, T - 1).

    Notes:
        Where the matrix is not positive definite, ``log_determinant`` is NaN.
    """

    def __init__(self, diagonal: Tensor, off: Tensor) -> None:
        self.levels: list[_Level] = []
        logs = []
        while diagonal.shape[-1] > 1:
            kept, pivot = diagonal[..., 0::2], diagonal[..., 1::2]
            left, right = off[..., 0::2], off[..., 1::2]
            right = pad(right, (0, pivot.shape[-1] - right.shape[-1]))
            level = _Level(pivot, left / pivot, right / pivot)
            diagonal = _meet(kept, -left * level.left, -right * level.right)
            off = (-left * level.right)[..., : diagonal.shape[-1] - 1]
            self.levels.append(level)
            logs.append(pivot.log().sum(-1))
        self.last = diagonal
        self.log_determinant = sum(logs, diagonal.log().sum(-1))

    def solve(self, shift: Tensor, noise: Tensor | None = None) -> Tensor:
        """P**-1 shift, (*, T); with standard normal ``noise`` (*, T), a draw around it."""
        shifts = []
        for level in self.levels:
            taken = shift[..., 1::2]
            shifts.append(taken)
            shift = _meet(shift[..., 0::2], -taken * level.left, -taken * level.right)
        noises = []
        if noise is not None:
            for _ in self.levels:
                noises.append(noise[..., 1::2])
                noise = noise[..., 0::2]
        x = shift / self.last
        if noise is not None:
            x = x + noise * self.last.rsqrt()
        for level in reversed(self.levels):
            taken = shifts.pop() / level.pivot
            if noises:
                taken = taken + noises.pop() * level.pivot.rsqrt()
            n = level.pivot.shape[-1]
            taken = taken - level.left * x[..., :n] - level.right * _ahead(x, n)
            x = _interleave(x, taken)
        return x

    def spread(self) -> tuple[Tensor, Tensor]:
        """Variances (*, T), and covariances of neighbours (*, T - 1): the band of the inverse."""
        variance, covariance = self.last.reciprocal(), self.last[..., :0]
        for level in reversed(self.levels):
            n = level.pivot.shape[-1]
            here, there = variance[..., :n], _ahead(variance, n)
            between = pad(covariance, (0, n - covariance.shape[-1]))
            taken = level.pivot.reciprocal() + level.left.square() * here
            taken = taken + level.right.square() * there + 2 * level.left * level.right * between
            back = -(level.left * here + level.right * between)
            on = -(level.left * between + level.right * there)
            covariance = _interleave(back, on)[..., : 2 * n - (1 if variance.shape[-1] == n else 0)]
            variance = _interleave(variance, taken)
        return variance, covariance


def times(diagonal: Tensor, off: Tensor, x: Tensor) -> Tensor:
    """P x of a tridiagonal P, (*, T)."""
    return diagonal * x + pad(off * x[..., 1:], (0, 1)) + pad(off * x[..., :-1], (1, 0))


class GaussianChain(TorchDistribution):
    """A normal over a path, given by its tridiagonal precision P and shift s = P mean.

    Args:
        diagonal: of P, (*, T).
        off: of P, (*, T - 1).
        shift: (*, T).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector  # type: ignore[assignment]
    has_rsample = True

    def __init__(
        self, diagonal: Tensor, off: Tensor, shift: Tensor, validate_args: bool | None = None
    ) -> None:
        self.diagonal, self.off, self.shift = diagonal, off, shift
        batch = torch.broadcast_shapes(diagonal.shape[:-1], off.shape[:-1], shift.shape[:-1])
        super().__init__(batch, diagonal.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> GaussianChain:
        """The same chain over more dims."""
        parts = (self.diagonal, self.off, self.shift)
        return GaussianChain(*(p.expand(*batch_shape, p.shape[-1]) for p in parts), validate_args=False)

    @cached_property
    def elimination(self) -> Elimination:
        """The factorisation of P."""
        return Elimination(self.diagonal, self.off)

    @cached_property
    def mean(self) -> Tensor:  # type: ignore[override]
        """P**-1 s, (*, T)."""
        return self.elimination.solve(self.shift)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """Of each entry, (*, T)."""
        return self.elimination.spread()[0]

    def moments(self) -> Moments:
        """Means, variances, covariances of neighbours."""
        return Moments(self.mean, *self.elimination.spread())

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.diagonal.dtype, device=self.diagonal.device)
        return self.elimination.solve(self.shift, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (*)."""
        x = value - self.mean
        square = (x * times(self.diagonal, self.off, x)).sum(-1)
        return 0.5 * (self.elimination.log_determinant - square - self.event_shape[0] * _LOG_2PI)


class Autoregressive(TorchDistribution):
    """A stationary path x_t = mean + phi (x_(t-1) - mean) + scale e_t, with standard normal e.

    Args:
        mean: (*).
        phi: persistence, between -1 and 1, (*).
        scale: of a step, > 0, (*).
        length: T.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector  # type: ignore[assignment]
    has_rsample = True

    def __init__(
        self, mean: Tensor, phi: Tensor, scale: Tensor, length: int, validate_args: bool | None = None
    ) -> None:
        self.centre, self.phi, self.step_scale = torch.broadcast_tensors(mean, phi, scale)
        super().__init__(self.centre.shape, torch.Size((length,)), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Autoregressive:
        """The same process over more dims."""
        mean, phi, scale = (p.expand(batch_shape) for p in (self.centre, self.phi, self.step_scale))
        return Autoregressive(mean, phi, scale, self.event_shape[0], validate_args=False)

    def precision(self) -> tuple[Tensor, Tensor]:
        """Diagonal (*, T) and links (*, T - 1) of the precision."""
        weight, phi, length = self.step_scale.pow(-2)[..., None], self.phi[..., None], self.event_shape[0]
        inner = (weight * (1 + phi.square())).expand(*self.batch_shape, max(length - 2, 0))
        if length == 1:
            return weight * (1 - phi.square()), weight[..., :0]
        return torch.cat([weight, inner, weight], -1), (-phi * weight).expand(*self.batch_shape, length - 1)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """Everywhere the same, (*, T)."""
        return self.centre[..., None].expand(*self.batch_shape, *self.event_shape)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """Stationary, (*, T)."""
        var = self.step_scale.square() / (1 - self.phi.square())
        return var[..., None].expand(*self.batch_shape, *self.event_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, differentiable."""
        diagonal, off = self.precision()
        chain = GaussianChain(diagonal, off, torch.zeros_like(diagonal))
        return self.centre[..., None] + chain.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (*)."""
        x = value - self.centre[..., None]
        step = (x[..., 1:] - self.phi[..., None] * x[..., :-1]).square().sum(-1)
        left = 1 - self.phi.square()
        square = (step + left * x[..., 0].square()) / self.step_scale.square()
        length = self.event_shape[0]
        return 0.5 * (left.log() - square - length * _LOG_2PI) - length * self.step_scale.log()
