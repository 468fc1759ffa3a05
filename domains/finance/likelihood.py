"""Likelihood of stochastic volatility: returns given parameters, with the path of log variance summed out.

The sum is good to some hundredths of a nat over thousands of days (``scivi.models.paths``; the tests hold it
against a grid and a particle filter). Parameters of many draws are summed together: quadratics are found
once, at the draws' mean, and polished at each draw where tails are heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from domains.finance import shocks
from scivi.models.chains import Autoregressive, GaussianChain
from scivi.models.paths import Accuracy, Link, Quadratics, log_sum, quadratics, settled

# Either leaves some hundredths of a nat of 2000 days of the S&P 500; heavy tails take more for that.
LIGHT, HEAVY = Accuracy(nodes=7, terms=4), Accuracy(nodes=9, terms=6)
WILD = Accuracy(nodes=15, terms=8)  # of draws far from the others: .3 nats at most, of 500 draws and 600 days
_POLISH, _MORE = 2, 8  # half steps from quadratics found elsewhere to a draw's own; more for the wild ones,
_SETTLED = 0.2  # sd: whose paths the last of the first still moves by more
_AT_ONCE = 2**20  # entries, nodes x draws x series x days, of a tensor (our choice: 4 MB)


def _pieces(draws: int, size: int) -> list[slice]:
    """All draws, as many together as may be held, each with so many entries."""
    together = max(1, _AT_ONCE // size)
    return [slice(start, start + together) for start in range(0, draws, together)]


@dataclass(frozen=True)
class Story:
    """Parameters of some series, (*, series) each; None where the model has none."""

    mu: Tensor
    phi: Tensor
    sigma: Tensor
    nu: Tensor | None = None
    nu_upper: Tensor | None = None
    rho: Tensor | None = None
    drift: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Those that there are."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def mapped(self, of: Any) -> Story:
        """The same story with a function taken of each parameter."""
        return Story(**{name: of(value) for name, value in self.parts().items()})

    def path(self, days: int) -> Autoregressive:
        """Prior of the log variance from the first day to the one after the last."""
        return Autoregressive(self.mu, self.phi, self.sigma, days + 1, validate_args=False)

    def placed(self, now: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor, Story]:
        """A day's place and scale given its two log variances, and the parameters in the same dims."""
        p, scale = self.mapped(lambda value: value.unsqueeze(-1)), (0.5 * now).exp()
        loc = 0.0 if p.drift is None else p.drift
        if p.rho is None:
            return loc + 0 * now, scale, p
        eta = (ahead - p.mu - p.phi * (now - p.mu)) / p.sigma
        return loc + scale * p.rho * eta, scale * (1 - p.rho.square()).sqrt(), p

    def link(self, y: Tensor, present: Tensor | None = None) -> Link:
        """Log density of each day's return (*, series, day) given its two log variances."""
        p = self.mapped(lambda value: value.unsqueeze(-1))
        excess = y if p.drift is None else y - p.drift

        def of(now: Tensor, ahead: Tensor) -> Tensor:
            e, volume = excess * (-0.5 * now).exp(), -0.5 * now
            if p.rho is not None:  # what costs most comes last: there are many more of ahead than of now
                rest = (1 - p.rho.square()).sqrt()
                slope = p.rho / (rest * p.sigma)
                e = e / rest + slope * (p.mu + p.phi * (now - p.mu)) - slope * ahead
                volume = volume - rest.log()
            value = shocks.log_density(e, p.nu, p.nu_upper) + volume
            return value if present is None else torch.where(present, value, 0.0)

        return of

    def returns(self, h: Tensor, probability: Tensor | None = None) -> Tensor:
        """Returns along paths (*, series, day + 1), drawn; or those of given probabilities of lower ones."""
        loc, scale, p = self.placed(h[..., :-1], h[..., 1:])
        if probability is None:
            return loc + scale * shocks.sample(loc.shape, loc, p.nu, p.nu_upper)
        return loc + scale * shocks.quantile(probability, p.nu, p.nu_upper)

    @property
    def accuracy(self) -> Accuracy:
        """How finely the path is summed out."""
        return LIGHT if self.nu is None else HEAVY

    def near(self, y: Tensor, present: Tensor | None, start: Quadratics | None = None) -> Quadratics:
        """Quadratics for series y (series, day), at the mean of all draws of each parameter."""

        def centre(value: Tensor) -> Tensor:
            value = value.detach().expand(torch.broadcast_shapes(value.shape, y.shape[:-1]))
            return value.flatten(0, -y.dim()).mean(0) if value.dim() >= y.dim() else value

        here = self.mapped(centre)
        path, link = here.path(y.shape[-1]), here.link(y, present)
        return quadratics(path, link, self.rho is not None, self.accuracy, start)

    def log_likelihood(
        self, y: Tensor, present: Tensor | None, near: Quadratics, wild: bool = False
    ) -> Tensor:
        """Log density of series y with the path summed out, (*, series).

        Args:
            y: (series, day).
            present: True where a return is there, likewise; None if all are.
            near: quadratics found at these parameters or others.
            wild: whether these parameters are far from those.
        """
        accuracy, polish = (WILD, _MORE) if wild else (self.accuracy, _POLISH)
        shape = torch.broadcast_shapes(*(v.shape for v in self.parts().values()), y.shape[:-1])
        lead = math.prod(shape[: len(shape) - y.dim() + 1])
        flat = self.mapped(lambda v: v.expand(shape).reshape(lead, *shape[len(shape) - y.dim() + 1 :]))
        coupled, heavy = self.rho is not None, self.nu is not None
        found, unsettled = [], []
        for rows in _pieces(lead, accuracy.fit ** (1 + coupled) * y.numel()):
            some, own = flat.mapped(lambda v, rows=rows: v[rows]), near
            if heavy:  # far from where they were found, quadratics of a heavy tail serve badly
                polished = replace(accuracy, steps=polish, full=0)
                own, moved = settled(some.path(y.shape[-1]), some.link(y, present), coupled, polished, near)
                unsettled.append(~(moved < _SETTLED).flatten(1).all(-1))
            for few in _pieces(len(some.mu), accuracy.nodes ** (1 + coupled) * y.numel()):
                story = some.mapped(lambda v, few=few: v[few])
                closest = Quadratics(*(part[few] for part in own)) if heavy else own
                path, link = story.path(y.shape[-1]), story.link(y, present)
                found.append(log_sum(path, link, closest, coupled, accuracy)[0])
        value = torch.cat(found)
        if heavy and not wild and bool((again := torch.cat(unsettled)).any()):
            better = flat.mapped(lambda v: v[again]).log_likelihood(y, present, near, wild=True)
            value = value.index_put((again,), better)
        return value.reshape(shape)

    def smoothed(self, y: Tensor, present: Tensor | None) -> GaussianChain:
        """The chain near to the posterior of the path, given series y (series, day)."""
        return self.near(y, present).posterior(self.path(y.shape[-1]))


class Returns(dist.TorchDistribution):
    """Returns of whole series, (*, series) of event (day).

    Args:
        story: the parameters.
        days: how many.
        path: log variance (*, series, day + 1); None to sum it out.
        present: True where a return is there, (series, day); None if all are.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector  # type: ignore[assignment]
    has_rsample = False

    def __init__(
        self, story: Story, days: int, path: Tensor | None = None, present: Tensor | None = None
    ) -> None:
        self.story, self.days, self.path, self.mask_of_days = story, days, path, present
        shape = torch.broadcast_shapes(*(v.shape for v in story.parts().values()))
        if path is not None:
            shape = torch.broadcast_shapes(shape, path.shape[:-1])
        super().__init__(shape, torch.Size((days,)), validate_args=False)

    def present(self, mask: Tensor) -> Returns:
        """The distribution of the days that are there."""
        return Returns(self.story, self.days, self.path, mask)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Returns:
        """The same over more dims."""
        path = None if self.path is None else self.path.expand(*batch_shape, self.days + 1)
        story = self.story.mapped(lambda v: v.expand(batch_shape))
        return Returns(story, self.days, path, self.mask_of_days)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, (*, series)."""
        if self.path is not None:
            link = self.story.link(value, self.mask_of_days)
            return link(self.path[..., :-1], self.path[..., 1:]).sum(-1)
        near = self.story.near(value, self.mask_of_days)
        return self.story.log_likelihood(value, self.mask_of_days, near)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Returns along paths, which are drawn if not given."""
        with torch.no_grad():
            path = self.path
            if path is None:
                shape = self._extended_shape(torch.Size(sample_shape))[:-1]
                path = self.story.path(self.days).expand(shape).rsample()
            return self.story.returns(path)
