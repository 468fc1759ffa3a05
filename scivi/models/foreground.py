"""Counts of a marker that a cell carries, or only seems to carry because of what floats about it."""

from __future__ import annotations

import math
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from scivi.models.counts import log_negative_binomial

NODES = 11  # of Gauss and Hermite, placed where the integrand lies: .007 nats where p > e^-15 (tests)
_GRID, _REACH = 33, 5.0  # points of t's posterior, and how many sd they reach (our choice)


class ScatteredCounts(TorchDistribution):
    """A count whose mean scatters from one to the next.

        t ~ Normal(0, 1),  n ~ NB(exp(log_mean + scatter t), dispersion)

    t is integrated out by a Gauss-Hermite rule about the place and width that a normal approximation in the
    log mean gives the integrand.

    Args:
        log_mean: at t = 0, any real.
        scatter: sd of the log mean, >= 0.
        dispersion: inverse dispersion theta > 0 of the negative binomial, variance mean + mean**2 / theta.

    References:
        Liu and Pierce 1994, Biometrika 81, 624, doi:10.1093/biomet/81.3.624, for the placing of nodes.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "log_mean": constraints.real,
        "scatter": constraints.nonnegative,
        "dispersion": constraints.positive,
    }
    support: ClassVar[constraints.Constraint] = constraints.nonnegative_integer

    def __init__(
        self, log_mean: Tensor, scatter: Tensor, dispersion: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.log_mean, self.scatter, self.dispersion = log_mean, scatter, dispersion
        shape = torch.broadcast_shapes(log_mean.shape, scatter.shape, dispersion.shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> ScatteredCounts:
        """The same distribution over a larger batch."""
        log_mean = self.log_mean.expand(batch_shape)
        return ScatteredCounts(log_mean, self.scatter, self.dispersion, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Expected count, (*batch)."""
        return (self.log_mean + self.scatter.square() / 2).exp().expand(self.batch_shape)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts (*sample, *batch)."""
        with torch.no_grad():
            log_mean = self.log_mean.expand(self._extended_shape(torch.Size(sample_shape)))
            mean = (log_mean + self.scatter * torch.randn_like(log_mean)).exp()
            theta = self.dispersion.expand(mean.shape).contiguous()
            return torch.poisson(torch._standard_gamma(theta) / theta * mean)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        level, log_weight = self._levels(value)
        relative = torch.logsumexp(log_weight + self._relative(value, level), -1)
        return relative + log_negative_binomial(value, self.log_mean.exp(), self.dispersion)

    def expected(self, value: Tensor) -> Tensor:
        """E[exp(log_mean + scatter t) | n], (*batch)."""
        level, log_weight = self._levels(value)
        return (torch.softmax(log_weight + self._relative(value, level), -1) * level.exp()).sum(-1)

    @torch.no_grad()
    def draw(self, value: Tensor) -> Tensor:
        """A draw of scatter t given the count, by the inverse of its distribution function, (*batch)."""
        centre, width = self._place(value)
        x = torch.linspace(-_REACH, _REACH, _GRID, dtype=centre.dtype, device=centre.device)
        t = centre.unsqueeze(-1) + width.unsqueeze(-1) * x
        log_density = self._relative(value, self._level(t)) - 0.5 * t.square()
        density = (log_density - log_density.amax(-1, keepdim=True)).exp()
        mass = torch.nn.functional.pad(torch.cumulative_trapezoid(density, dim=-1), (1, 0))
        mass = mass / mass[..., -1:]
        u = torch.rand_like(mass[..., :1])
        right = torch.searchsorted(mass, u).clamp(1, _GRID - 1)
        (low, t_low, d_low), (high, t_high, d_high) = (
            [x.gather(-1, at) for x in (mass, t, density)] for at in (right - 1, right)
        )
        share = ((u - low) / (high - low).clamp_min(torch.finfo(u.dtype).tiny)).clamp(0.0, 1.0)
        # of a density that is linear between the points
        root = (d_low.square() + share * (d_high.square() - d_low.square())).sqrt()
        share = share * (d_low + d_high) / (d_low + root).clamp_min(torch.finfo(u.dtype).tiny)
        return self.scatter * (t_low + share * (t_high - t_low)).squeeze(-1)

    def _level(self, t: Tensor) -> Tensor:
        """Log mean at t (*batch, node)."""
        return self.log_mean.unsqueeze(-1) + self.scatter.unsqueeze(-1) * t

    def _relative(self, value: Tensor, level: Tensor) -> Tensor:
        """Log density of a count at log means ``level`` (*batch, node) less that at ``log_mean``."""
        n, theta, start = (x.unsqueeze(-1) for x in (value, self.dispersion, self.log_mean))
        log_theta = theta.log()
        rise = torch.logaddexp(level, log_theta) - torch.logaddexp(start, log_theta)
        return n * (level - start) - (n + theta) * rise

    @torch.no_grad()
    def _place(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and width of t given a count, as if log(n + 1/2) were normal about the log mean."""
        about = value + 0.5
        precision = 1 / (1 / about + 1 / self.dispersion)
        width = (1 + self.scatter.square() * precision).rsqrt()
        return self.scatter * precision * (about.log() - self.log_mean) * width.square(), width

    def _levels(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log means at the nodes, and the nodes' log weights under t ~ Normal(0, 1), (*batch, node)."""
        centre, width = self._place(value)
        x, log_w = (torch.tensor(part, dtype=centre.dtype, device=centre.device) for part in _rule())
        t = centre.unsqueeze(-1) + width.unsqueeze(-1) * x
        return self._level(t), log_w + width.log().unsqueeze(-1) + 0.5 * (x.square() - t.square())


@cache
def _rule() -> tuple[list[float], list[float]]:
    """Nodes and log weights for the mean under a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(NODES)
    return x.tolist(), (np.log(w) - 0.5 * math.log(2 * math.pi)).tolist()


class ForegroundBackground(TorchDistribution):
    """A count from a background that scatters, or from a foreground that stands a factor above it.

        v ~ Bernoulli(sigmoid(logits))
        n ~ ScatteredCounts(log_background + v log_fold, scatter, dispersion of the one or the other)

    v is summed out.

    Args:
        log_background: log of the background's median mean, any real.
        scatter: sd of the log background about it, >= 0.
        log_fold: log ratio of foreground to background, any real.
        logits: log odds of the foreground before the count is seen.
        background_dispersion, foreground_dispersion: inverse dispersions > 0.

    References:
        Gayoso et al. 2021, Nature Methods 18, 272, doi:10.1038/s41592-020-01050-x, for the two components.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real}
    support: ClassVar[constraints.Constraint] = constraints.nonnegative_integer

    def __init__(
        self,
        log_background: Tensor,
        scatter: Tensor,
        log_fold: Tensor,
        logits: Tensor,
        background_dispersion: Tensor,
        foreground_dispersion: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.background = ScatteredCounts(
            log_background, scatter, background_dispersion, validate_args=validate_args
        )
        self.foreground = ScatteredCounts(
            log_background + log_fold, scatter, foreground_dispersion, validate_args=validate_args
        )
        self.logits = logits
        parts = (self.background.batch_shape, self.foreground.batch_shape, logits.shape)
        super().__init__(torch.broadcast_shapes(*parts), validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> ForegroundBackground:
        """The same distribution over a larger batch."""
        background = self.background
        return ForegroundBackground(
            background.log_mean.expand(batch_shape),
            background.scatter,
            self.foreground.log_mean - background.log_mean,
            self.logits,
            background.dispersion,
            self.foreground.dispersion,
            validate_args=False,
        )

    @property
    def mean(self) -> Tensor:
        """Expected count, (*batch)."""
        present = self.logits.sigmoid()
        return (present * self.foreground.mean + (1 - present) * self.background.mean).expand(
            self.batch_shape
        )

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Counts (*sample, *batch)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            present = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
            kinds = [kind.expand(shape).sample() for kind in (self.foreground, self.background)]
            return torch.where(present < self.logits.sigmoid(), *kinds)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        return torch.logaddexp(*self.joint(value))

    def joint(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Log of p(n, v = 0) and of p(n, v = 1), each (*batch)."""
        return (
            logsigmoid(-self.logits) + self.background.log_prob(value),
            logsigmoid(self.logits) + self.foreground.log_prob(value),
        )

    def foreground_prob(self, value: Tensor) -> Tensor:
        """P(v = 1 | n), (*batch)."""
        background, foreground = self.joint(value)
        return torch.sigmoid(foreground - background)

    def draw_log_background(self, value: Tensor, foreground_prob: Tensor) -> Tensor:
        """A draw of the log background given the count, v drawn too, (*batch)."""
        present = torch.rand_like(foreground_prob) < foreground_prob
        kinds = (self.foreground, self.background)
        log_mean, dispersion = (
            torch.where(present, *(getattr(kind, name) for kind in kinds))
            for name in ("log_mean", "dispersion")
        )
        chosen = ScatteredCounts(log_mean, self.background.scatter, dispersion, validate_args=False)
        return self.background.log_mean + chosen.draw(value)
