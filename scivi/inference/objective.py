"""A bound pair and a batch become one scalar to minimise, and its parts by site.

All estimators bound (or estimate) the same log evidence. They return nats per row of the first row dim, so
that learning rate and clipping mean the same for ten rows and for ten million.

Pyro's ``RenyiELBO`` with alpha = 0 also calls itself importance-weighted, but weighs whole minibatches: one
weight for all rows of a batch, so its bound loosens as the batch grows. Here each row has its own weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.enum import config_enumerate
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from scivi.errors import PlanError, Unsupported
from scivi.inference import marginal
from scivi.inference.discrete import summed_out
from scivi.inference.plan import Plan
from scivi.inference.scores import (
    Placed,
    Scores,
    by_particle,
    by_row,
    local_guide_sites,
    log_prob,
    particle_plate,
    row_scale,
    run_pair,
    score,
)
from scivi.inputs.batches import Batch, some_field
from scivi.models.binding import Bound, seeded
from scivi.models.sites import plates_of, sample_sites


@dataclass(frozen=True)
class Value:
    """One evaluation of the objective.

    Args:
        loss: scalar whose gradient is followed, nats per row.
        objective: the negative bound itself, nats per row, detached; differs from ``loss`` only by
            score-function terms and by the guide's own bound in "marginal".
        parts: share of each site in the bound, nats per row, detached; their sum is minus the objective (at
            beta 1).
    """

    loss: Tensor
    objective: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """A bound pair and what its estimator needs to know, ready to be evaluated batch by batch.

    Args:
        bound: the pair.
        plan: particles and nodes are read.
        estimator: as ``prepare`` resolved it.
        layout: of the guide's noise, for "marginal".
    """

    bound: Bound
    plan: Plan
    estimator: str
    layout: marginal.Layout

    def evaluate(self, batch: Batch, beta: float | Tensor = 1.0) -> Value:
        """The objective on a batch, the KL part weighed by ``beta``."""
        bound, plan = self.bound, self.plan
        n = batch.sizes[bound.template.row_dims[0]]
        if self.estimator == "iwae":
            return _importance_weighted(bound, batch, plan.particles, n, beta)
        if self.estimator == "enumerate":
            return _enumerated(bound, batch, plan.particles, n, beta)
        if self.estimator == "marginal":
            loss, value, parts = marginal.objective(bound, batch, self.layout, plan.nodes, beta)
            return Value(loss / n, -value.detach() / n, {k: v.detach() / n for k, v in parts.items()})
        scores = score(bound, run_pair(bound, batch, particles=plan.particles))
        latent, observed = scores.latent_parts(), scores.observed_parts()
        surrogate = _score_function(scores, bound, batch, plan.particles)
        if self.estimator == "analytic":
            latent = {**latent, **_closed_form(scores)}
        if self.estimator == "stl":
            latent = _sticking(bound, batch, scores, latent, plan.particles)
        return _value(observed, latent, n, beta, surrogate)


def prepare(bound: Bound, batch: Batch, plan: Plan) -> Objective:
    """Settle the estimator for a pair.

    "auto" takes "marginal" where it can be had, "enumerate" if the guide leaves out discrete latents, else
    "trace".

    Args:
        bound: the pair.
        batch: any rows of its data.
        plan: whose estimator is meant.

    Raises:
        Unsupported: "marginal" was asked for and cannot be had, with the reason.
    """
    if plan.estimator not in ("auto", "marginal"):
        return Objective(bound, plan, plan.estimator, marginal.Layout())
    some = some_field(batch)
    with seeded(0, some.device), torch.no_grad():  # a look at the guide leaves the random stream as it was
        found = marginal.layout(bound, batch)
        given = poutine.trace(bound.guide).get_trace(batch).nodes.keys()
    if found.refusal is None:
        return Objective(bound, plan, "marginal", found)
    if plan.estimator == "marginal":
        raise Unsupported(f'estimator="marginal" cannot be used: {found.refusal}. Use "trace" or "iwae".')
    discrete = {s.name for s in bound.sites if s.discrete} - given
    return Objective(bound, plan, "enumerate" if discrete else "trace", found)


def _value(
    observed: dict[str, Tensor],
    latent: dict[str, Tensor],
    n: int,
    beta: float | Tensor,
    surrogate: Tensor | float = 0.0,
) -> Value:
    parts = {name: torch.as_tensor(v).mean() / n for name, v in {**observed, **latent}.items()}
    likelihood = sum((parts[k] for k in observed), start=torch.zeros(()))
    bound = likelihood + beta * sum((parts[k] for k in latent), start=torch.zeros(()))
    loss = -bound - torch.as_tensor(surrogate) / n
    return Value(loss, -bound.detach(), {k: v.detach() for k, v in parts.items()})


def _score_function(scores: Scores, bound: Bound, batch: Batch, particles: int) -> Tensor | float:
    """Zero in value; its gradient is the score-function term of guide sites without a pathwise derivative.

    A local site is weighed by its own row's terms only. The control variate is the mean of the other
    particles (Kool, van Hoof and Welling 2019), so that two particles at least are wanted.
    """
    sites = {
        n: scores.pair.guide.nodes[n]
        for n in scores.guide
        if not scores.pair.guide.nodes[n]["fn"].has_rsample and n in scores.model
    }
    if not sites:
        return 0.0
    if particles < 2:
        raise PlanError(
            f"the guide's sites {sorted(sites)} have no pathwise derivative and need the score-function "
            f"gradient, whose control variate is made of other particles: use Plan(particles=2) or more, or "
            f'estimator="enumerate".'
        )
    total = sum([*scores.observed_parts().values(), *scores.latent_parts().values()]).detach()  # type: ignore[union-attr]
    out: Tensor | float = 0.0
    for name, site in sites.items():
        density, row_dim = log_prob(site, scaled=False), scores.row_of[name]
        if row_dim is None:
            out = out + (by_particle(density, bound.nesting) * _centred(total)).mean()
            continue
        scale = row_scale(batch, row_dim)
        cost = scores.local_rows("model", row_dim, scale) - scores.local_rows("guide", row_dim, scale)
        rows = by_row(density, bound.nesting, plates_of(site)[row_dim])
        out = out + scale * (rows * _centred(torch.as_tensor(cost).detach())).sum(-1).mean()
    return out - torch.as_tensor(out).detach()


def _centred(cost: Tensor) -> Tensor:
    """Cost less the mean of the other particles' costs."""
    n = cost.shape[0]
    return (cost - cost.mean(0, keepdim=True)) * n / (n - 1)


def _closed_form(scores: Scores) -> dict[str, Tensor]:
    """-KL(q, p) for each latent where torch knows it, instead of its sampled value."""
    out = {}
    for name in scores.guide:
        guide, model = scores.pair.guide.nodes[name], scores.pair.model.nodes.get(name)
        if model is None or model["is_observed"] or isinstance(guide["fn"], Delta):
            continue  # pyro's divergence of a Delta leaves out the density that it carries
        try:
            divergence = torch.distributions.kl_divergence(cast(Any, guide["fn"]), cast(Any, model["fn"]))
        except NotImplementedError:  # torch has no closed form for this pair of families
            continue
        out[name] = by_particle(-divergence * model["scale"], scores.nesting)
    return out


def _sticking(
    bound: Bound, batch: Batch, scores: Scores, latent: dict[str, Tensor], particles: int
) -> dict[str, Tensor]:
    """Latent parts with the guide's density taken at detached parameters (Roeder, Wu and Duvenaud 2017)."""

    def run() -> poutine.Trace:
        with particle_plate(particles, bound.nesting):
            return poutine.trace(poutine.replay(bound.guide, trace=scores.pair.guide)).get_trace(batch)

    still = bound.frozen(run)
    return {
        name: value
        if name not in scores.guide
        else value + by_particle(scores.guide[name] - log_prob(still.nodes[name]), scores.nesting)
        for name, value in latent.items()
    }


def _importance_weighted(bound: Bound, batch: Batch, particles: int, n: int, beta: float | Tensor) -> Value:
    """Per-row importance-weighted bound: globals drawn once, each row's latents ``particles`` times."""
    local = local_guide_sites(bound, batch)
    if not local:
        raise Unsupported('estimator="iwae" weighs rows, and this guide has no latent per row; use "trace".')
    rough = sorted(name for name, site in local.items() if not site["fn"].has_rsample)
    if rough:
        raise Unsupported(
            f'estimator="iwae": the guide draws {rough} without a pathwise derivative; use "trace".'
        )

    def repeated(name: str, fn: Any) -> Tensor:
        shape = list(fn.batch_shape)
        shape = [1] * (bound.nesting + 1 - len(shape)) + shape
        return fn.expand([particles, *shape[1:]])()

    pair = run_pair(bound, batch, drawn=Placed(local, repeated))
    scores = score(bound, pair)
    parts: dict[str, Tensor] = {"importance_weighted": torch.zeros(())}
    for row_dim in (r for r in bound.template.row_dims if r in scores.row_of.values()):
        scale = row_scale(batch, row_dim)
        weight = scores.local_rows("model", row_dim, scale) - scores.local_rows("guide", row_dim, scale)
        weight = torch.as_tensor(weight).expand(particles, -1)
        rows = torch.logsumexp(weight, 0) - math.log(particles)
        parts["importance_weighted"] = parts["importance_weighted"] + scale * rows.sum()
    observed = {k: v for k, v in scores.observed_parts().items() if scores.row_of[k] is None}
    latent = {k: v for k, v in scores.latent_parts().items() if scores.row_of[k] is None}
    return _value({**parts, **observed}, latent, n, beta)


def _enumerated(bound: Bound, batch: Batch, particles: int, n: int, beta: float | Tensor) -> Value:
    """Discrete latents that the guide leaves out are summed exactly."""
    allowed = {s.name for s in bound.sites if s.discrete}
    template = replace(bound.template, model=config_enumerate(bound.template.model, default="parallel"))
    with EnumMessenger(first_available_dim=-1 - bound.nesting - (particles > 1)):
        pair = run_pair(replace(bound, template=template), batch, particles=particles, allow=allowed)
    rough = sorted(name for name, site in sample_sites(pair.guide) if not site["fn"].has_rsample)
    if rough:
        raise Unsupported(
            f'estimator="enumerate": the guide draws {rough} without a pathwise derivative. Leave them out '
            f'of the guide, or use "trace".'
        )
    summed, observed, latent = summed_out(pair.model), {}, {}
    guide = {name: by_particle(log_prob(site), bound.nesting) for name, site in sample_sites(pair.guide)}
    for name, site in sample_sites(pair.model):
        if name in summed.sites:
            continue
        total = by_particle(log_prob(site), bound.nesting)
        if site["is_observed"]:
            observed[name] = total
        else:
            latent[name] = total - guide.pop(name, 0.0)
    latent |= {name: -value for name, value in guide.items()}
    if summed.terms:
        observed["enumerated"] = summed.scale * torch.stack([t.sum() for t in summed.terms]).sum() / particles
    return _value(observed, latent, n, beta)
