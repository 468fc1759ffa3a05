"""Modes of a problem's posterior: Newton's method from many starts at once.

At first the prior counts for next to nothing. Where a point is so far off that the measurements are flat
about it, such as rates too slow for anything to happen, it would pull the point to its centre and hold it.

The curvature is that expected of the measurements (Fisher's information, by differences of what is expected
of them) and that of the prior, damped as Levenberg and Marquardt have it. All starts are one batch.

References:
    Raue et al. 2013, PLoS ONE 8, e74335, doi:10.1371/journal.pone.0074335 (many starts; sorted values).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to
from tqdm.auto import tqdm

from domains.kinetics import experiments as ready
from domains.kinetics.priors import ParameterPrior
from domains.kinetics.simulation import FLOOR, Form, Simulated, simulated

DIFFERENCE = 1e-4  # on the unbounded scale, for the curvature alone (our choice)
RTOL, ATOL = 1e-6, 1e-9  # of solutions, at most: their errors must be small beside those differences
FARTHEST = 2.0  # of a step in a coordinate of the unbounded scale (our choice)
SETTLED = 1e-3  # nats that a step must gain to go on (our choice)
MOST_STEPS = 500  # of a solution: what takes more is no mode (our choice)
FLAT = 2.0  # sd of a direction that nothing is known of: a uniform prior's is 1.8 on the unbounded scale
EARLY, EDGE = 1e-3, 7.0  # weight of the prior at first; no point goes farther out on the unbounded scale
WIDEST = 5.0  # draws of the prior this far out are pulled in: the slope there is none


@dataclass(frozen=True, slots=True)
class Modes:
    """Where the starts ended, best first.

    Args:
        theta: parameters on their own scales (start, parameter).
        log_density: log posterior density on the unbounded scale, up to a constant (start,).
        log_likelihood: of the measurements (start,).
        covariance: inverse curvature there on the unbounded scale, no wider than ``FLAT`` in any direction,
            (start, parameter, parameter).
    """

    theta: Tensor
    log_density: Tensor
    log_likelihood: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """The log density of some points on the unbounded scale."""

    form: Form
    table: Mapping[str, Tensor]
    weight: float = 1.0  # of the prior

    @property
    def prior(self) -> ParameterPrior:
        """Of theta."""
        return ParameterPrior(self.form.problem.estimated, self.table["measured"])

    def unbounded(self, theta: Tensor) -> Tensor:
        """From theta to the unbounded scale."""
        return biject_to(self.prior.support).inv(theta)

    def seen(self, x: Tensor) -> Simulated:
        """What is expected at some points."""
        to_theta = biject_to(self.prior.support)
        rest = {name: self.table[name] for name in ("at_rest", "override") if name in self.table}
        return simulated(self.form, to_theta(x), self.table["time"], **rest)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and log likelihood (point,)."""
        found = self.seen(x)
        each = ready.log_likelihood(self.form.problem, self.table["measured"], found.mean, found.sd)
        each = each.sum((-1, -2))
        fit = torch.where(found.ok, each, FLOOR).sum(-1)
        return fit + self.weight * self.plain(x), fit

    def slope(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log density, log likelihood and gradient."""
        at = x.detach().requires_grad_(True)
        value, fit = self.parts(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), fit.detach(), slope

    def curvature(self, x: Tensor) -> Tensor:
        """That of measurements and prior together."""
        data, prior = self.curvatures(x)
        return data + self.weight * prior

    @torch.no_grad()
    def curvatures(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expected information of measurements about x, and the prior's, (point, parameter, parameter)."""
        k, d = x.shape
        moved = x.unsqueeze(1) + DIFFERENCE * torch.cat([torch.eye(d), -torch.eye(d)]).to(x)
        found = self.seen(moved.flatten(0, 1))
        problem, kept = self.form.problem, ~torch.isnan(self.table["measured"])
        is_log = torch.tensor([o.is_log for o in problem.observables])
        base = torch.tensor(
            [10.0 if o.transformation == "log10" else torch.e for o in problem.observables]
        ).log()
        mean = torch.where(is_log, found.mean.clamp_min(1e-300).log() / base, found.mean)
        laplace = torch.tensor([o.distribution == "laplace" for o in problem.observables])

        def differences(values: Tensor) -> Tensor:
            up, down = values.unflatten(0, (k, 2, d)).unbind(1)
            return torch.where(kept, (up - down) / (2 * DIFFERENCE), 0.0).flatten(2)

        sd = torch.where(kept, found.sd.unflatten(0, (k, 2, d)).mean((1, 2)), 1.0).flatten(1).unsqueeze(1)
        of_mean, of_sd = differences(mean) / sd, differences(found.sd.log())
        weight = torch.where(laplace, 0.5, 1.0) ** 0.5  # half the information about the scale
        of_sd = of_sd * (2**0.5 * weight).expand_as(kept).flatten()
        information = of_mean @ of_mean.mT + of_sd @ of_sd.mT
        up, down = self.plain(moved).unflatten(1, (2, d)).unbind(1)
        bend = (2 * self.plain(x).unsqueeze(-1) - up - down) / DIFFERENCE**2
        return information, torch.diag_embed(bend.clamp_min(0.0))

    def plain(self, x: Tensor) -> Tensor:
        """Log density without measurements, (*point)."""
        to_theta = biject_to(self.prior.support)
        theta = to_theta(x)
        volume = to_theta.log_abs_det_jacobian(x, theta)
        return self.prior.log_prob(theta) + volume.reshape(x.shape[:-1])


def target_of(form: Form, table: Mapping[str, Any]) -> Target:
    """The density of a problem given a table, of arrays or of (dims, array)."""
    rows = {name: table[name] for name in ("measured", "time", "at_rest", "override") if name in table}
    arrays = {name: x[1] if isinstance(x, tuple) else x for name, x in rows.items()}
    return Target(form, {name: torch.as_tensor(x, dtype=torch.float64) for name, x in arrays.items()})


def modes(
    form: Form,
    table: Mapping[str, Any],
    *,
    starts: int = 32,
    steps: int = 40,
    seed: int = 0,
    progress: bool = False,
) -> Modes:
    """Climb from draws of the prior, all at once.

    Args:
        form: what is solved, and how.
        table: ``measured``, ``time`` and what else there is, in arrays.
        starts: how many.
        steps: at most, with next to no prior and then again with it.
        seed: of the draws.
        progress: show a progress bar.
    """
    exact = {"rtol": min(form.rtol, RTOL), "atol": min(form.atol, ATOL)}
    target = target_of(replace(form, method="rodas5p", max_steps=MOST_STEPS, **exact), table)
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand((starts, len(form.problem.estimated)), generator=generator, dtype=torch.float64)
    drawn = [each.sample(column) for each, column in zip(target.prior.each, u.unbind(-1), strict=True)]
    x = target.unbounded(torch.stack(drawn, -1)).clamp(-WIDEST, WIDEST)
    with tqdm(total=2 * steps, disable=not progress, desc=f"{form.problem.name}: modes", unit="step") as bar:
        x, _, _ = _climbed(replace(target, weight=EARLY), x, steps, bar)
        x, value, fit = _climbed(target, x, steps, bar)
    order = torch.argsort(torch.where(torch.isfinite(value), value, -torch.inf), descending=True)
    x = x[order]
    flat = torch.eye(x.shape[-1], dtype=x.dtype) / FLAT**2
    covariance = torch.linalg.inv(target.curvature(x) + flat)
    theta = biject_to(target.prior.support)(x)
    return Modes(theta.detach(), value[order], fit[order], covariance)


def _climbed(target: Target, x: Tensor, steps: int, bar: tqdm) -> tuple[Tensor, Tensor, Tensor]:
    """Where some points come to by so many steps at most; log density and log likelihood there."""
    x = x.clone()
    value, fit, slope = target.slope(x)
    damping, going = torch.full_like(value, 1e-2), torch.ones_like(value, dtype=torch.bool)
    for _ in range(steps):
        bar.update()
        at = torch.nonzero(going).squeeze(-1)
        if not len(at):
            continue
        bend = target.curvature(x[at])
        size = bend.diagonal(dim1=-2, dim2=-1).clamp_min(1e-6)
        tried = bend + torch.diag_embed(damping[at].unsqueeze(-1) * size)
        step = torch.linalg.solve_ex(tried, slope[at].unsqueeze(-1))[0].squeeze(-1)
        step = step * (FARTHEST / step.abs().amax(-1, keepdim=True).clamp_min(FARTHEST))
        ahead = torch.where(torch.isfinite(step), x[at] + step, x[at]).clamp(-EDGE, EDGE)
        there, its_fit, its_slope = target.slope(ahead)
        gain = there - value[at]
        better = gain > 0
        x[at] = torch.where(better.unsqueeze(-1), ahead, x[at])
        slope[at] = torch.where(better.unsqueeze(-1), its_slope, slope[at])
        value[at], fit[at] = torch.where(better, there, value[at]), torch.where(better, its_fit, fit[at])
        damping[at] = torch.where(better, damping[at] * 0.2, damping[at] * 5.0).clamp(1e-8, 1e8)
        going[at] = ~((better & (gain < SETTLED)) | (damping[at] >= 1e8))
    return x, value, fit
