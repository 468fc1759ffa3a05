"""Conditions of a problem solved and observed, for many values of its parameters at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from domains.kinetics import experiments as ready
from domains.kinetics.experiments import Experiments
from domains.kinetics.petab_problems import Problem
from scivi.ode import Solution, solve, steady
from scivi.ode.solve import Method

FLOOR = -1e8  # nats of a condition whose solution failed: below whatever is plausible (our choice)


@dataclass(frozen=True, slots=True)
class Form:
    """What is solved, and how.

    Args:
        made: the problem made ready.
        rtol, atol, max_steps, method: of ``scivi.ode.solve``.
    """

    made: Experiments
    rtol: float
    atol: float
    max_steps: int
    method: Method

    @property
    def problem(self) -> Problem:
        """What was made ready."""
        return self.made.problem


class Simulated(NamedTuple):
    """States and what is seen of them.

    Args:
        y: (*draw, condition, moment, state), 1 where the solution failed.
        mean: (*draw, condition, moment, observable).
        sd: likewise.
        ok: whether the solution came through (*draw, condition).
    """

    y: Tensor
    mean: Tensor
    sd: Tensor
    ok: Tensor


def simulated(
    form: Form,
    theta: Tensor,
    time: Tensor,
    *,
    rows: Tensor | None = None,
    at_rest: Tensor | None = None,
    override: Tensor | None = None,
) -> Simulated:
    """Solve and observe the conditions of a problem.

    Args:
        form: what is solved, and how.
        theta: parameters on their own scales (*draw, parameter).
        time: (condition, moment), in order in each row.
        rows: places of these conditions among the problem's; all if None.
        at_rest: 1 where the steady state is meant and not ``time`` (condition, moment).
        override: numbers of measurements' own (condition, moment, observable, slot).
    """
    made, time, values = form.made, time.double(), ready.unscaled(form.problem, theta.double())
    some = torch.arange(len(form.problem.rows), device=theta.device) if rows is None else rows
    now = ready.Settings(*(x.index_select(-2, some) for x in made.settings(values)))
    y0, ok = _begun(form, values, now, some)
    y, came = _solved(form, now.p, y0, time, some)
    ok = ok & came
    if at_rest is not None and bool(at_rest.any()):
        rested = _rested(form, now.p, y0, some)
        ok = ok & rested.ok.view(ok.shape)
        y = torch.where(at_rest.bool().unsqueeze(-1), rested.values.view(*ok.shape, 1, -1), y)
    y = torch.where(ok[..., None, None], y, 1.0)
    mean, sd = made.observed(time, y, now.context, values, None if override is None else override.double())
    return Simulated(y, mean, sd, ok)


def _begun(form: Form, values: Tensor, now: ready.Settings, some: Tensor) -> tuple[Tensor, Tensor]:
    """States at time 0 (*draw, condition, state), and whether they could be found (*draw, condition)."""
    made, ok = form.made, torch.ones(now.y0.shape[:-1], dtype=torch.bool, device=values.device)
    before = torch.as_tensor(made.equilibrated, device=values.device)[some]
    if not bool(before.any()):
        return now.y0, ok
    then = ready.Settings(*(x.index_select(-2, some[before]) for x in made.before(values)))
    found = _rested(form, then.p, then.y0, some[before])
    at = torch.nonzero(before).squeeze(-1)
    ok = ok.index_copy(-1, at, found.ok.view(*ok.shape[:-1], -1))
    rest = torch.where(found.ok[:, None, None], found.values, 1.0).view(*ok.shape[:-1], len(at), -1)
    kept = torch.as_tensor(made.carried, device=values.device)[some[before]]
    return now.y0.index_copy(-2, at, torch.where(kept, rest, now.y0.index_select(-2, at))), ok


def _rested(form: Form, p: Tensor, y0: Tensor, some: Tensor) -> Solution:
    """The steady states that y0 come to, by what no reaction changes in the conditions."""
    totals = torch.as_tensor(form.made.totals, device=p.device)[some]
    each = totals.expand(*y0.shape[:-1], *totals.shape[1:]).reshape(-1, *totals.shape[1:])
    return steady(form.made.system, _flat(p), _flat(y0), each, rtol=form.rtol, atol=form.atol)


def _solved(form: Form, p: Tensor, y0: Tensor, time: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    made, shape = form.made, y0.shape[:-1]
    many = time.expand(*shape, -1).reshape(-1, time.shape[-1])
    stops = None
    if made.stops.size:
        beyond = float(time.max()) + 1.0  # moments that never come
        jumps = np.where(np.isfinite(made.stops), made.stops, beyond)
        each = torch.as_tensor(np.sort(jumps, -1), device=p.device)[some]
        stops = each.expand(*shape, -1).reshape(-1, each.shape[-1])
    found = solve(
        made.system,
        _flat(p),
        _flat(y0),
        many,
        stops=stops,
        rtol=form.rtol,
        atol=form.atol,
        max_steps=form.max_steps,
        method=form.method,
    )
    return found.values.view(*shape, *found.values.shape[1:]), found.ok.view(shape)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
