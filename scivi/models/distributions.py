"""The densities that Pyro lacks."""

from __future__ import annotations

from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

# Background counts summed: mean + 10 sd, and as many beyond as the last, geometric part of the tail takes to
# fall by 36 nats; what is left out is below float64's epsilon.
_EXTRA_SD, _EXTRA_NATS = 10.0, 36.0


class PoissonOverBackground(TorchDistribution):
    """Counts of a source over a gamma-distributed background, the background summed out exactly.

        n ~ Poisson(rate + b),  b ~ Gamma(shape, inverse_scale)
        p(n) = sum_k NegBin(k; shape, inverse_scale) Poisson(n - k; rate),  k = 0 .. n

    With a flat prior on b >= 0 and ``m`` counts in a background aperture 1/alpha times as large, shape =
    m + 1 and inverse_scale = 1/alpha (Primini and Kashyap 2014, ApJ 796, 24, section 2; Loredo 1992).

    Args:
        rate: expected source counts, > 0.
        shape: of the background's gamma, > 0.
        inverse_scale: of it, > 0.
        most: largest count that will be scored, to size the sum; None reads it off the values (a wait on the
            device).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "rate": constraints.positive,
        "shape_": constraints.positive,
        "inverse_scale": constraints.positive,
    }
    support: ClassVar[constraints.Constraint] = constraints.nonnegative_integer

    def __init__(
        self,
        rate: Tensor,
        shape: Tensor,
        inverse_scale: Tensor,
        *,
        most: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        # Not broadcast against each other: the sum's weights are then made once, and not for every rate.
        self.rate, self.shape_, self.inverse_scale, self.most = rate, shape, inverse_scale, most
        batch_shape = torch.broadcast_shapes(rate.shape, shape.shape, inverse_scale.shape)
        super().__init__(batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> PoissonOverBackground:
        """The same distribution over a larger batch."""
        rate = self.rate.expand(batch_shape)
        return PoissonOverBackground(
            rate, self.shape_, self.inverse_scale, most=self.most, validate_args=False
        )

    @property
    def mean(self) -> Tensor:
        """Expected count."""
        return self.rate + self.shape_ / self.inverse_scale

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts, drawn with their background."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            background = torch._standard_gamma(self.shape_.expand(shape).contiguous()) / self.inverse_scale
            return torch.poisson(self.rate.expand(shape) + background)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        k = torch.arange(self._terms(value), dtype=self.rate.dtype, device=self.rate.device)
        count, shape, inverse_scale = (x.unsqueeze(-1) for x in (value, self.shape_, self.inverse_scale))
        weights = (
            torch.lgamma(k + shape)
            - torch.lgamma(k + 1)
            - torch.lgamma(shape)
            - shape * torch.log1p(1 / inverse_scale)
            - k * torch.log1p(inverse_scale)
            - torch.lgamma((count - k).clamp_min(0.0) + 1)
        ).masked_fill(k > count, -torch.inf)
        log_rate = self.rate.log()
        return torch.logsumexp(weights - k * log_rate.unsqueeze(-1), -1) + value * log_rate - self.rate

    def _terms(self, value: Tensor) -> int:
        """Terms that matter: never more than the largest count allows."""
        with torch.no_grad():
            most = int(value.max()) if self.most is None else self.most
            mean = self.shape_ / self.inverse_scale
            spread = (mean * (1 + 1 / self.inverse_scale)).sqrt()
            tail = _EXTRA_NATS / torch.log1p(self.inverse_scale)
            return 1 + min(most, int((mean + _EXTRA_SD * spread + tail).max()))
