"""The densities that Pyro lacks."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

_EXTRA_SD, _EXTRA = 10.0, 20.0  # background counts summed: mean + 10 sd + 20; what is left out is below float64's epsilon


class PoissonOverBackground(TorchDistribution):
    """Counts of a source over a gamma-distributed background, the background summed out exactly.

        n ~ Poisson(rate + b),  b ~ Gamma(shape, inverse_scale)
        p(n) = sum_k NegBin(k; shape, inverse_scale) Poisson(n - k; rate),  k = 0 .. n

    With a flat prior on b >= 0 and ``m`` counts in a background aperture 1/alpha times as large, shape = m + 1 and
    inverse_scale = 1/alpha (Primini and Kashyap 2014, ApJ 796, 24, section 2; Loredo 1992).

    Args:
        rate: expected source counts, > 0.
        shape: of the background's gamma, > 0.
        inverse_scale: of it, > 0.
        most: largest count that will be scored, to size the sum; None reads it off the values (a wait on the device).
    """

    arg_constraints = {
        "rate": constraints.positive,
        "shape_": constraints.positive,
        "inverse_scale": constraints.positive,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self, rate: Tensor, shape: Tensor, inverse_scale: Tensor, *, most: int | None = None, validate_args: bool | None = None
    ) -> None:
        self.rate, self.shape_, self.inverse_scale = broadcast_all(rate, shape, inverse_scale)
        self.most = most
        super().__init__(self.rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> PoissonOverBackground:
        """The same distribution over a larger batch."""
        parts = (x.expand(batch_shape) for x in (self.rate, self.shape_, self.inverse_scale))
        return PoissonOverBackground(*parts, most=self.most, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count."""
        return self.rate + self.shape_ / self.inverse_scale

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts, drawn with their background."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            background = torch._standard_gamma(self.shape_.expand(shape)) / self.inverse_scale
            return torch.poisson(self.rate.expand(shape) + background)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        k = torch.arange(self._terms(value), dtype=self.rate.dtype, device=self.rate.device)
        count = value.unsqueeze(-1)
        shape, inverse_scale = self.shape_.unsqueeze(-1), self.inverse_scale.unsqueeze(-1)
        left = (count - k).clamp_min(0.0)
        background = (
            torch.lgamma(k + shape)
            - torch.lgamma(k + 1)
            - torch.lgamma(shape)
            - shape * torch.log1p(1 / inverse_scale)
            - k * torch.log1p(inverse_scale)
        )
        rate = self.rate.unsqueeze(-1)
        terms = background + left * torch.log(rate) - rate - torch.lgamma(left + 1)
        return torch.logsumexp(terms.masked_fill(k > count, -torch.inf), -1)

    def _terms(self, value: Tensor) -> int:
        """Terms that matter: never more than the largest count allows."""
        with torch.no_grad():
            most = int(value.max()) if self.most is None else self.most
            mean = self.shape_ / self.inverse_scale
            spread = (mean * (1 + 1 / self.inverse_scale)).sqrt()
            return 1 + min(most, int((mean + _EXTRA_SD * spread).max() + _EXTRA))
