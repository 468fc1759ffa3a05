"""The densities that Pyro lacks."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch import TransformedDistribution  # type: ignore[attr-defined]
from torch import Tensor
from torch.distributions import AffineTransform, constraints

# Background counts summed first: mean + 10 sd, and as many beyond as the last, geometric part of the tail
# takes to fall by 36 nats (float64's epsilon); more only for counts that are far too high for their rate.
_EXTRA_SD, _EXTRA_NATS = 10.0, 36.0


class Moved(TransformedDistribution):
    """A distribution on an interval or a half line, moved and stretched; its support is known.

    (Torch takes the support of an affine map to be the whole line.)

    Args:
        base: with support an interval, or the positive numbers.
        loc: added after.
        scale: multiplied before, > 0.
    """

    def __init__(self, base: TorchDistribution, loc: float, scale: float) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(base, [AffineTransform(loc, scale)], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The base's, moved."""
        own = self.base_dist.support
        if isinstance(own, constraints.interval):
            return constraints.interval(
                self.loc + self.scale * own.lower_bound, self.loc + self.scale * own.upper_bound
            )
        return constraints.greater_than(self.loc + self.scale * own.lower_bound)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Moved:
        """The same distribution over a larger batch."""
        return Moved(self.base_dist.expand(batch_shape), self.loc, self.scale)


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
        most = int(value.detach().max()) if self.most is None else self.most
        terms = self._terms(most)
        # What does not depend on the rate is worked out in double: it is the difference of numbers of size
        # n log n. The rate comes in relative to the count, so that what is left is small where it matters.
        k = torch.arange(terms, dtype=torch.float64, device=self.rate.device)
        count, shape, inverse_scale = (
            x.double().unsqueeze(-1) for x in (value, self.shape_, self.inverse_scale)
        )
        weights = _log_weights(k, count, shape, inverse_scale).masked_fill(k > count, -torch.inf)
        log_ratio = (self.rate / value.clamp_min(1)).log()
        weights, source = weights.to(log_ratio.dtype), (count - k).to(log_ratio.dtype)
        total = torch.logsumexp(weights + source * log_ratio.unsqueeze(-1), -1)
        if terms <= most:
            total = self._with_rest(total, value, terms)
        return total + (value - self.rate)

    def _terms(self, most: int) -> int:
        """Terms that matter unless a count lies far above its rate: never more than the largest allows."""
        with torch.no_grad():
            mean = self.shape_ / self.inverse_scale
            spread = (mean * (1 + 1 / self.inverse_scale)).sqrt()
            tail = _EXTRA_NATS / torch.log1p(self.inverse_scale)
            return 1 + min(most, int((mean + _EXTRA_SD * spread + tail).max()))

    def _with_rest(self, total: Tensor, value: Tensor, terms: int) -> Tensor:
        """Add the terms from ``terms`` on to those sums that they matter to.

        Where the source is much fainter than the count, most of the count must be background, however
        improbable that is a priori. The ratio of neighbouring terms falls with k, so the terms have one mode:
        a window about it holds all but e^-36 of the rest.
        """
        parameters = [x.double() for x in (value, self.rate, self.shape_, self.inverse_scale)]
        with torch.no_grad():
            count, rate, shape, inverse_scale = parameters
            first = torch.full_like(count, terms)
            step = (first + shape) / (first + 1) * (count - first) / (1 + inverse_scale) / rate
            left = _log_weights(first, count, shape, inverse_scale)
            left = left + (count - first) * (rate / count.clamp_min(1)).log()
            left = left - torch.log1p(-step.clamp(0.0, 0.5))  # bound of a sum that falls at least so fast
            small = total + math.log(torch.finfo(total.dtype).eps)
            matter = (count >= first) & ((step > 0.5) | (left > small))
            if not bool(matter.any()):
                return total
        count, rate, shape, inverse_scale = (x.expand(total.shape)[matter].unsqueeze(-1) for x in parameters)
        with torch.no_grad():
            k = _window(count, rate, shape, inverse_scale, terms)
            outside = (k < terms) | (k > count)
            k = k.clamp_min(0.0)
        rest = _log_weights(k, count, shape, inverse_scale) + (count - k) * (rate / count).log()
        rest = torch.logsumexp(rest.masked_fill(outside, -torch.inf), -1).to(total.dtype)
        return total.masked_scatter(matter, torch.logaddexp(total[matter], rest))


def _log_weights(k: Tensor, count: Tensor, shape: Tensor, inverse_scale: Tensor) -> Tensor:
    """Log of the k-th term of the sum, less (n - k) log(rate / n) + n - rate."""
    source = (count - k).clamp_min(0.0)
    return (
        torch.lgamma(k + shape)
        - torch.lgamma(k + 1)
        - torch.lgamma(shape)
        - shape * torch.log1p(1 / inverse_scale)
        - k * torch.log1p(inverse_scale)
        + source * count.clamp_min(1.0).log()
        - torch.lgamma(source + 1)
        - count
    )


def _window(count: Tensor, rate: Tensor, shape: Tensor, inverse_scale: Tensor, least: int) -> Tensor:
    """Whole numbers about the largest term with k >= least (*batch, window).

    Neighbouring terms are equal where (k + shape)(n - k) = (k + 1)(1 + inverse_scale) rate. About there n - k
    is as good as Poisson: ten sd and forty more to either side leave out less than e^-36.
    """
    odds = (1 + inverse_scale) * rate
    sum_of_roots = count - shape - odds
    root = (sum_of_roots.square() - 4 * (odds - shape * count)).clamp_min(0.0).sqrt()
    mode = torch.minimum(((sum_of_roots + root) / 2).round().clamp_min(least), count)
    half = int((10 * (count - mode + 1).sqrt()).max()) + 40
    return mode + torch.arange(-half, half + 1, dtype=mode.dtype, device=mode.device)
