"""Overdispersed counts: the negative binomial by its mean, and the mixture of two that proteins need.

The log density is a sum of terms of one sign, so that it keeps its digits from theta = 1e-3 to 1e6, in
float32 too, where differences of log gammas lose them. It needs no special function: in training, with
thousands of genes by hundreds of cells, ``lgamma`` and its derivative take most of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.functional import logsigmoid

_LEAST = 1e-20  # mean and inverse dispersion are held above it: a softmax may underflow (our choice)
_SERIES_FROM, _SERIES_TO = -0.36, 0.56  # where a series replaces t - log(1 + t) (our choice: 5 and 12 terms)
_SERIES_TERMS = {torch.float32: 5, torch.float64: 12}

# Stirling's error S(z) = ln Gamma(z) - (z - 1/2) ln z + z - ln(2 pi) / 2 for z >= 1 as a polynomial in 1 / z
# without constant term, interpolated at Chebyshev nodes in 60 digits. The asymptotic series (1/12, 0, -1/360,
# 0, 1/1260, ...; Abramowitz and Stegun 6.1.41) is no use near 1. Relative errors of S and of its derivative
# are 1e-9 and 2e-7 in float32, 4e-15 and 6e-14 in float64; the test takes both from mpmath.
_STIRLING = {
    torch.float32: (
        0.08333333338325287,
        -9.800824726362089e-09,
        -0.00277748517696848,
        -2.958742011706789e-06,
        0.0008039753321501756,
        1.799586494975537e-05,
        -0.0008541048721204017,
        0.000863197269370728,
        -0.0003967248649330736,
        7.424847863206798e-05,
    ),
    torch.float64: (
        0.08333333333333301,
        2.5464767609366803e-13,
        -0.002777777812155881,
        1.8640376562671006e-09,
        0.0007935967355686511,
        9.678246545163063e-07,
        -0.0006068752399377203,
        9.907796113393828e-05,
        0.00022455037063062955,
        0.0028607936837897045,
        -0.011783199613150023,
        0.024691861209907108,
        -0.03513607951404256,
        0.03675319604574694,
        -0.028904190938583593,
        0.01700847603094659,
        -0.007292230757298372,
        0.0021559398579538095,
        -0.0003933679707574982,
        3.339372329568171e-05,
    ),
}


class NegativeBinomialMean(TorchDistribution):
    """Counts with a given mean and variance mean + mean**2 / theta.

        p(n) = Gamma(n + theta) / (Gamma(theta) n!) (theta / (theta + mean))**theta (mean / (theta + mean))**n

    Args:
        mean: > 0.
        inverse_dispersion: theta > 0, for instance one of each gene; the smaller, the more they scatter.

    Notes:
        The density of count n >= 1 follows the saddle-point form of Loader, with which nothing cancels.
        Relative errors in float32 are below 2e-6, in float64 below 1e-12, for counts up to 1e5; those of the
        slope by theta are relative to its two parts, which cancel where it is near zero. Mean and inverse
        dispersion are held above 1e-20. Made for compiled steps, where it takes a quarter of the time of log
        gammas; in an eager step of half a million entries it takes somewhat longer than these.

    References:
        Loader 2000, Fast and accurate computation of binomial probabilities, section 3.
        Lopez et al. 2018, Nature Methods 15, 1053, doi:10.1038/s41592-018-0229-2, for the two parameters.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "mean_": constraints.positive,
        "inverse_dispersion": constraints.positive,
    }
    support: ClassVar[constraints.Constraint] = constraints.nonnegative_integer

    def __init__(
        self, mean: Tensor, inverse_dispersion: Tensor, *, validate_args: bool | None = None
    ) -> None:
        # Not broadcast against each other: what depends on the inverse dispersion alone is worked out once.
        self.mean_, self.inverse_dispersion = mean, inverse_dispersion
        shape = torch.broadcast_shapes(mean.shape, inverse_dispersion.shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> NegativeBinomialMean:
        """The same distribution over a larger batch."""
        mean = self.mean_.expand(batch_shape)
        return NegativeBinomialMean(mean, self.inverse_dispersion, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count, (*batch)."""
        return self.mean_.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of the count, (*batch)."""
        return self.mean * (1 + self.mean / self.inverse_dispersion)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts (*sample, *batch): Poisson with a gamma-distributed rate."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            theta = self.inverse_dispersion.expand(shape).contiguous()
            return torch.poisson(torch._standard_gamma(theta) / theta * self.mean_)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        return log_negative_binomial(value, self.mean_, self.inverse_dispersion)


class NegativeBinomialMixture(TorchDistribution):
    """Counts of a background or of a foreground, both negative binomial with one inverse dispersion.

        p(n) = sigmoid(logits) NB(n; background, theta) + (1 - sigmoid(logits)) NB(n; foreground, theta)

    Args:
        background, foreground: means, > 0.
        inverse_dispersion: theta > 0.
        logits: log odds of the background, any real.

    References:
        Gayoso et al. 2021, Nature Methods 18, 272, doi:10.1038/s41592-020-01050-x, proteins of totalVI.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "background": constraints.positive,
        "foreground": constraints.positive,
        "inverse_dispersion": constraints.positive,
        "logits": constraints.real,
    }
    support: ClassVar[constraints.Constraint] = constraints.nonnegative_integer

    def __init__(
        self,
        background: Tensor,
        foreground: Tensor,
        inverse_dispersion: Tensor,
        logits: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.background, self.foreground = background, foreground
        self.inverse_dispersion, self.logits = inverse_dispersion, logits
        shapes = (x.shape for x in (background, foreground, inverse_dispersion, logits))
        super().__init__(torch.broadcast_shapes(*shapes), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> NegativeBinomialMixture:
        """The same distribution over a larger batch."""
        low, high = self.background.expand(batch_shape), self.foreground.expand(batch_shape)
        return NegativeBinomialMixture(low, high, self.inverse_dispersion, self.logits, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count, (*batch)."""
        of_background = self.logits.sigmoid()
        mean = of_background * self.background + (1 - of_background) * self.foreground
        return mean.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of the count, (*batch)."""
        p, theta = self.logits.sigmoid(), self.inverse_dispersion
        low, high = self.background, self.foreground
        within = p * low * (1 + low / theta) + (1 - p) * high * (1 + high / theta)
        return within + p * (1 - p) * (high - low).square()

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts (*sample, *batch)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            theta = self.inverse_dispersion.expand(shape).contiguous()
            is_background = torch.rand(shape, dtype=theta.dtype, device=theta.device) < self.logits.sigmoid()
            mean = torch.where(is_background, self.background, self.foreground)
            return torch.poisson(torch._standard_gamma(theta) / theta * mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.logaddexp(
            logsigmoid(self.logits) + log_negative_binomial(value, self.background, self.inverse_dispersion),
            logsigmoid(-self.logits) + log_negative_binomial(value, self.foreground, self.inverse_dispersion),
        )


def log_negative_binomial(count: Tensor, mean: Tensor, inverse_dispersion: Tensor) -> Tensor:
    """Log probability of a count, normalised; the three broadcast.

    Args:
        count: whole numbers >= 0; no gradient flows to it.
        mean: > 0.
        inverse_dispersion: > 0.
    """
    return _LogDensity.apply(count.to(mean.dtype), mean, inverse_dispersion)  # type: ignore[return-value]


class _LogDensity(torch.autograd.Function):
    """The density and its slopes, each by a formula in which nothing cancels; n is the count, m the mean.

        u = (n - m) / (theta + m),  v = -theta u / n,  excess(t) = t - log(1 + t) >= 0
        -log p(n) = n excess(v) + theta excess(u) + log(2 pi n (1 + n / theta)) / 2
                    + S(n) + S(theta) - S(n + theta)                                      for n >= 1
        -log p(0) = theta excess(u) - theta u = theta log(1 + m / theta)
        d log p / d m = theta / (theta + m) (n - m) / m
        d log p / d theta = -excess(u) + n / (2 theta (n + theta)) + S'(n + theta) - S'(theta),
                            for n = 0 the first term alone

    Slopes are worked out anew from the arguments, so that they have slopes of their own.
    """

    @staticmethod
    def forward(count: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
        mean, theta = mean.clamp_min(_LEAST), theta.clamp_min(_LEAST)
        own = theta, 1 / theta, _error_of_any(theta)
        if _densely(count):
            found, zero = _log_density(count, mean, *own)
            return torch.where(count > 0, found, zero)
        zero = (torch.log1p(mean / theta) * -theta).expand(
            torch.broadcast_shapes(count.shape, mean.shape, theta.shape)
        )
        return _placed(zero, count, lambda *of: _log_density(*of)[0], mean, *own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        count, mean, theta = ctx.saved_tensors
        shapes = mean.shape, theta.shape
        mean, theta = mean.clamp_min(_LEAST), theta.clamp_min(_LEAST)
        inverse, apart = 1 / (theta + mean), count - mean
        by_mean = by_theta = None
        if ctx.needs_input_grad[1]:
            by_mean = (slope * (theta * inverse * (apart / mean))).sum_to_size(shapes[0])
        if ctx.needs_input_grad[2]:
            first = -_excess(apart * inverse, (theta + count) * inverse)
            own = theta, 1 / theta, _error_slope_of_any(theta)
            if _densely(count):
                found = torch.where(count > 0, first + _theta_slope(count.clamp_min(1.0), *own), first)
            else:
                found = _placed(first, count, lambda n, f, *of: f + _theta_slope(n, *of), first, *own)
            by_theta = (slope * found).sum_to_size(shapes[1])
        return None, by_mean, by_theta


def _log_density(
    count: Tensor, mean: Tensor, theta: Tensor, per_theta: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Log density of counts n >= 1, and of counts of 0; each holds where the other does not."""
    n = count.clamp_min(1.0)
    inverse, per_n = 1 / (theta + mean), 1 / n
    u, ratio = (count - mean) * inverse, (theta + count) * inverse
    spread = theta * _excess(u, ratio)
    own = n * _excess(-theta * u * per_n, mean * ratio * per_n)
    rest = error + _error(per_n) - _error(1 / (theta + n))
    return -spread - own - rest - 0.5 * (2 * math.pi * n * (1 + n * per_theta)).log(), theta * u - spread


def _theta_slope(n: Tensor, theta: Tensor, per_theta: Tensor, error_slope: Tensor) -> Tensor:
    """Slope of the log density by theta of counts n >= 1, but for its first term."""
    per_total = 1 / (theta + n)
    return 0.5 * n * per_theta * per_total + _error_slope(per_total) - error_slope


def _densely(count: Tensor) -> bool:
    """Whether to work on all entries instead of picking out those with a count.

    What is recorded must not depend on values; and on a device it is a wait to know how many there are.
    """
    recorded = get_proxy_mode() is not None or torch.compiler.is_compiling()
    return recorded or count.device.type != "cpu"


def _placed(zero: Tensor, count: Tensor, seen: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """``zero`` where the count is 0, else ``seen`` of it and of what else belongs to the entry."""
    at = (count > 0).expand(zero.shape).nonzero(as_tuple=True)
    return zero.index_put(at, seen(*(x.expand(zero.shape)[at] for x in (count, *of))))


def _excess(t: Tensor, one_plus_t: Tensor) -> Tensor:
    """The excess of t over log(1 + t); for small t by log(1 + t) = 2 (r + r^3 / 3 + ...), r = t / (2 + t)."""
    r = t / (2 + t)
    square = r * r
    terms = [-2 / (2 * k + 3) for k in range(_SERIES_TERMS.get(t.dtype, 5))]
    series = _polynomial(terms, square)
    if torch.is_grad_enabled():
        series, direct = r * (t + square * series), t - one_plus_t.log()
    else:
        series, direct = series.mul_(square).add_(t).mul_(r), one_plus_t.log().neg_().add_(t)
    return torch.where((t > _SERIES_FROM) & (t < _SERIES_TO), series, direct)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule, lowest power first."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        # in place, where nothing is differentiated: each new tensor costs as much as what is written to it
        total = total * x + c if torch.is_grad_enabled() else total.mul_(x).add_(c)
    return total


def _coefficients(dtype: torch.dtype) -> tuple[float, ...]:
    return _STIRLING.get(dtype, _STIRLING[torch.float32])


def _error(x: Tensor) -> Tensor:
    """Stirling's error at 1 / x, for x in (0, 1]."""
    return x * _polynomial(_coefficients(x.dtype), x)


def _error_slope(x: Tensor) -> Tensor:
    """Its derivative by 1 / x."""
    slopes = [-(k + 1) * c for k, c in enumerate(_coefficients(x.dtype))]
    return x * x * _polynomial(slopes, x)


def _error_of_any(z: Tensor) -> Tensor:
    """Stirling's error of z > 0: under 1 from that of z + 1."""
    below = _error(1 / (z + 1)) + (z + 0.5) * torch.log1p(1 / z) - 1
    return torch.where(z < 1, below, _error(1 / z.clamp_min(1.0)))


def _error_slope_of_any(z: Tensor) -> Tensor:
    below = _error_slope(1 / (z + 1)) + torch.log1p(1 / z) - 0.5 * (1 / z + 1 / (z + 1))
    return torch.where(z < 1, below, _error_slope(1 / z.clamp_min(1.0)))


def log_rising(start: Tensor, n: Tensor, most: int) -> Tensor:
    """Log of start (start + 1) ... (start + n - 1) = ln Gamma(start + n) - ln Gamma(start), for whole n.

    Beta-binomial and Dirichlet-multinomial densities are sums of it. It is looked up in a table of sums of
    logarithms, so that no special function is needed, nothing cancels, and its derivatives of any order are
    looked up too.

    Args:
        start: > 0, (*, groups), or (*, 1) if the groups share it; a table is made of each.
        n: whole numbers in 0 .. ``most``, of integer type, (groups, entries).
        most: the largest of them.

    Returns:
        (*, groups, entries) in the dtype of ``start``; float64 is wanted where counts are large.
    """
    return _LogRising.apply(start, n, most, 0)


class _LogRising(torch.autograd.Function):
    """``log_rising`` differentiated ``order`` times; its derivative is the next order, looked up likewise."""

    @staticmethod
    def forward(start: Tensor, n: Tensor, most: int, order: int) -> Tensor:
        terms = start.unsqueeze(-1) + torch.arange(most, dtype=start.dtype, device=start.device)
        if order == 0:
            terms = terms.log()
        else:
            terms = (-1) ** (order - 1) * math.factorial(order - 1) * terms.pow(-order)
        table = torch.nn.functional.pad(terms.cumsum(-1), (1, 0))
        lead = (*start.shape[:-1], len(n))
        return torch.gather(table.expand(*lead, most + 1), -1, n.expand(*lead, n.shape[-1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        start, n, ctx.most, ctx.order = inputs
        ctx.save_for_backward(start, n)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        start, n = ctx.saved_tensors
        slope = slopes[0] * _LogRising.apply(start, n, ctx.most, ctx.order + 1)
        return slope.sum(-1).sum_to_size(start.shape), None, None, None
