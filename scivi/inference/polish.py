"""A population of few rows is finished by adaptive importance sampling on its marginal.

Where rows are few the globals' posterior is skewed: neither the normal at its mode nor the one that the ELBO
prefers has its mean and its spread. Here the normal is moved to the weighted moments of all draws so far,
each round weighed by the mixture of the Student-t distributions that they were drawn from (AMIS, Cornuet,
Marin, Mira and Robert 2012, Scand. J. Stat. 39, 798, doi:10.1111/j.1467-9469.2011.00756.x). It costs some
hundred evaluations of the full marginal, or thousands where training has ended far from it, so it is for few
rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from pyro import poutine
from pyro.distributions import MultivariateStudentT
from torch import Tensor

from scivi.errors import Unsupported
from scivi.inference import marginal
from scivi.inference.capture import captured, largest_of, stacked
from scivi.inference.gather import ENTRIES_AT_ONCE
from scivi.inference.importance import truncated
from scivi.inference.newton import Rows
from scivi.inference.potential import NUMBERS_AT_ONCE
from scivi.inference.scores import particle_plate, placed
from scivi.inference.stepper import CLOSE, Form, kind
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound

# Degrees of freedom of the proposals: tails heavier than the target's keep weights bounded (our choice).
FREEDOM = 6.0
ENOUGH = 200.0  # effective draws: a mean is known to .07 of its sd (our choice)
PRIORS_AT_ONCE = 16  # points (our choice: a few calls a round, and little memory)


@dataclass(frozen=True)
class Polished:
    """What the polish found.

    Args:
        loc: posterior mean on the unbounded scale, (D,).
        covariance: (D, D), the weighted one shrunk towards the starting one as its effective size asks for.
        ess: effective size of all draws.
        log_weight: of each draw, from which ``analysis`` tells whether they can be believed.
        points: the draws, (draw, D).
    """

    loc: Tensor
    covariance: Tensor
    ess: float
    log_weight: tuple[float, ...]
    points: Tensor


def polish(
    bound: Bound, rows: Rows, per_dim: int, *, rounds: tuple[int, int] = (4, 20), draws: int = 160
) -> Polished:
    """Mean and covariance of the globals' posterior, starting from the trained normal.

    Args:
        bound: a trained pair; its joint normal is not changed.
        rows: of the data.
        per_dim: Gauss-Hermite nodes per local dimension.
        rounds: of adaptation, at least and at most; in between it ends with ``ENOUGH`` effective draws.
        draws: in each round, from torch's random stream.

    Raises:
        Unsupported: the guide's noise cannot be laid out, or no joint normal holds all globals.
    """
    module, plan = marginal.global_module(bound), marginal.layout(bound, bound.example)
    if module is None or plan.refusal is not None:
        raise Unsupported(
            f"the population cannot be polished: {plan.refusal or 'no joint normal holds all globals'}."
        )
    with torch.no_grad():
        loc, tril = module.loc.detach().double(), module.scale_tril.double()
        starting, dims = tril @ tril.mT, len(loc)
        posteriors = _posteriors(bound, module, rows, plan, per_dim)
        points, density, proposals = torch.empty(0, dims).double(), torch.empty(0).double(), []
        mean, covariance, ess = loc, starting, 0.0
        for taken in range(rounds[1]):
            if taken >= rounds[0] and ess >= ENOUGH:
                break
            proposal = MultivariateStudentT(mean.new_tensor(FREEDOM), mean, torch.linalg.cholesky(covariance))
            new = proposal.sample(torch.Size([draws]))
            points, proposals = torch.cat([points, new]), [*proposals, proposal]
            density = torch.cat([density, posteriors(new.to(module.loc))])
            mixed = torch.logsumexp(torch.stack([p.log_prob(points) for p in proposals]), 0)
            log_weight = density - (mixed - math.log(len(proposals)))
            weight = truncated(log_weight)
            ess = float(1 / weight.square().sum())
            mean = weight @ points
            away = points - mean
            # As many effective draws as a covariance has numbers: a half.
            share = ess / (ess + 0.5 * dims * dims)
            covariance = share * (away.mT * weight) @ away + (1 - share) * starting
        told = tuple(round(w, 4) for w in (log_weight - log_weight.max()).clamp_min(-100.0).tolist())
    return Polished(mean.to(module.loc), covariance.to(module.loc), ess, told, points)


def _posteriors(
    bound: Bound, module: marginal.JointNormalGuide, rows: Rows, plan: marginal.Layout, per_dim: int
) -> Callable[[Tensor], Tensor]:
    """Log posterior density of globals (point, D), up to a constant, with every row integrated, (point,).

    Many points at once where rows have no latents and are few, or where the sum over rows can be captured.
    """
    batches = list(rows.all(per_dim))
    entries = sum(v.numel() for b in batches for v in b.values.values())
    if not plan.sites and entries < ENTRIES_AT_ONCE:
        blocks = ENTRIES_AT_ONCE // entries
        return lambda theta: torch.cat(
            [marginal.log_joint(bound, module, some, batches) for some in theta.split(blocks)]
        )

    sums = [_sum(bound, module, batch, plan, per_dim) for batch in batches]

    def posteriors(theta: Tensor) -> Tensor:
        prior = torch.cat([_log_priors(bound, module, some) for some in theta.split(PRIORS_AT_ONCE)])
        return prior + torch.stack([of_rows(theta) for of_rows in sums]).sum(0)

    return posteriors


def _sum(
    bound: Bound, module: marginal.JointNormalGuide, batch: Batch, plan: marginal.Layout, per_dim: int
) -> Callable[[Tensor], Tensor]:
    """The log marginal of some rows at many points (point, D), (point,).

    Captured, stacked and kept by the template for further fits, if that gives the same; else point by point.
    """

    def one_by_one(points: Tensor) -> Tensor:
        return torch.stack(
            [marginal.log_marginal(bound, module, at, batch, plan, per_dim) for at in points]
        ).double()

    form, memo, at = Form(batch, batch.index), bound.template.memo, module.loc.detach()
    held = {**dict(bound.nets.named_parameters()), **dict(bound.nets.named_buffers())}
    given = [*(value.detach() for value in held.values()), *form.tensors]

    def function(point: Tensor, *tensors: Tensor) -> tuple[Tensor]:
        filled, index = form.filled(tensors[len(held) :])
        own = dict(zip(held, tensors[: len(held)], strict=True))
        rows = replace(filled, index=index)
        run = partial(marginal.log_marginal, bound, module, point, rows, plan, per_dim)
        return (bound.holding(own, run).double(),)

    key = ("sum", per_dim, plan, form.key, *(kind(t) for t in given))
    if key not in memo:
        try:
            graph = captured(function, [at, *given], owned=given[: len(held)])
        except Unsupported:
            return one_by_one
        memo[key] = stacked(graph, [False, *[True] * len(given)]), largest_of(graph)
    many, largest = memo[key]

    def in_blocks(points: Tensor) -> Tensor:
        blocks = points.split(max(1, NUMBERS_AT_ONCE // largest))
        return torch.cat([many(some, *given)[0] for some in blocks])

    tried = at + 0.1 * torch.arange(2)[:, None].to(at)  # where it was captured, and another point
    same = torch.allclose(in_blocks(tried), one_by_one(tried), rtol=CLOSE[at.dtype], equal_nan=True)
    return in_blocks if same else one_by_one


def _log_priors(bound: Bound, module: marginal.JointNormalGuide, theta: Tensor) -> Tensor:
    """``marginal.log_prior`` of several points (point, D), all at once, (point,)."""
    n, nesting = len(theta), bound.nesting
    with particle_plate(n, nesting):
        with placed({module.name: theta.reshape(n, *[1] * nesting, -1)}):
            guide = poutine.trace(bound.guide).get_trace(bound.example)
            population = poutine.trace(module).get_trace(bound.example)
        model = marginal.run_model(bound, bound.example, marginal.latent_values(guide))
    total = torch.zeros(n).double().to(theta.device)
    return marginal.with_globals(total, bound, module, model, population)
