"""Integration from observation to observation with a step size of its own for every entry of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from scivi.ode.rodas import N_STAGES, ORDER, Step, Weights, outcome, stages, weights, within
from scivi.ode.system import System

SAFETY, LEAST_FACTOR, MOST_FACTOR = 0.9, 0.1, 6.0  # of a step size (Hairer and Wanner 1996, IV.8, ours wider)
PROPORTIONAL, INTEGRAL = 0.7, 0.4  # of the controller, over the order (Hairer and Wanner 1996, IV.2)
LEAST_ERROR = 1e-4  # that the controller remembers, so that one lucky step is not trusted (the same)
WORST_ERROR = 1e30  # of a step to what is no number
CHECKED_EVERY = 8  # steps, on a device that one should not wait for (our choice)
ENTRIES_AT_ONCE = 2**14  # of states, whose steps are kept and then put in order: some 220 MB in 100 steps


class Reason(IntEnum):
    """How an entry ended."""

    SOLVED = 0
    MAX_STEPS = 1
    STEP_TOO_SMALL = 2
    NOT_FINITE = 3
    NOT_AT_REST = 4


SENTENCES = {
    Reason.SOLVED: "reached its last time",
    Reason.MAX_STEPS: "took more steps than max_steps",
    Reason.STEP_TOO_SMALL: "needed a step too small for its time; a looser rtol or atol may help",
    Reason.NOT_FINITE: "became infinite or not a number",
    Reason.NOT_AT_REST: "came to no steady state",
}


_Taken = tuple[Tensor, Step, Tensor, Tensor]  # who, the step of length 0 if in vain, its stages, its end


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a step may be wrong by, atol + rtol |y|, and how many steps there may be."""

    rtol: float
    atol: Tensor  # (state,) or ()
    max_steps: int


@dataclass(frozen=True, slots=True)
class Path:
    """The accepted steps of a batch.

    Args:
        steps: (step, B) each; the entries of those that an entry did not need have length 0.
        u: their stages (stage, step, B, state).
        count: steps of each entry (B,).
        place: of each observation, the step that holds it (B, time).
        share: how far into that step it is (B, time).
        values: states at the observations (B, time, state), NaN where an entry did not come.
        reason: how each entry ended (B,).
        rejected: steps that were tried in vain (B,).
    """

    steps: Step
    u: Tensor
    count: Tensor
    place: Tensor
    share: Tensor
    values: Tensor
    reason: Tensor
    rejected: Tensor

    def rows(self, some: slice) -> Path:
        """The path of some entries."""
        steps = self.steps
        end = None if steps.end is None else steps.end[:, some]
        taken = Step(steps.t[:, some], steps.y[:, some], steps.h[:, some], end)
        rest = (self.count, self.place, self.share, self.values, self.reason, self.rejected)
        return Path(taken, self.u[:, :, some], *(x[some] for x in rest))


@torch.no_grad()
def integrate(
    system: System,
    p: Tensor,
    y0: Tensor,
    times: Tensor,
    start: Tensor,
    stops: Tensor | None,
    tolerance: Tolerance,
) -> Path:
    """Solve to the last of each entry's times.

    Args:
        system: what to solve.
        p: parameters (B, parameter).
        y0: states at the start (B, state).
        times: of observation, in order (B, time).
        start: (B,).
        stops: times at which f may jump, in order (B, stop); no step passes one.
        tolerance: what a step may be wrong by.
    """
    by, size = weights(y0), len(y0)
    ids, t, y, last = torch.arange(size, device=y0.device), start.clone(), y0, times[:, -1]
    h, remembered = _first(system, t, y, p, last, tolerance), torch.full_like(t, LEAST_ERROR)
    reason = torch.where(t < last, int(Reason.MAX_STEPS), int(Reason.SOLVED))
    rejected = torch.zeros(size, dtype=torch.long, device=y0.device)
    taken: list[_Taken] = []
    waits = y0.device.type != "cpu"
    for number in range(tolerance.max_steps):
        target, end = last, None
        if stops is not None:
            target = torch.minimum(last, _next_stop(stops, t))
            end = torch.nextafter(target, torch.full_like(target, -torch.inf))
        left = target - t
        arrives = h >= left * (1 - 1e-12)
        step = Step(t, y, torch.where(arrives, left, h), end)
        u, _ = stages(system, step, p, by)
        moved = y + (by.out[:1] @ u.flatten(1)).view_as(y)
        error = _error(u[-1], y, moved, tolerance)
        accepted = error <= 1.0
        t = torch.where(accepted, torch.where(arrives, target, t + step.h), t)
        y = torch.where(accepted.unsqueeze(-1), moved, y)
        taken.append((ids, replace(step, h=step.h * accepted), u, t))
        ahead = step.h * _factor(error, remembered)
        if stops is not None:  # a step shortened to a stop says little: what was wanted before is kept
            ahead = torch.where(arrives & accepted, torch.maximum(ahead, h), ahead)
        h, remembered = ahead, torch.where(accepted, error.clamp_min(LEAST_ERROR), remembered)
        if not waits and not bool((arrives | (t == step.t)).any()):  # all have moved on, and none has come
            continue
        rejected.index_add_(0, ids, (~accepted).long())
        moving = left > 0
        solved = moving & arrives & accepted & (target >= last)
        stuck = moving & ~arrives & (step.t + step.h == step.t)
        code = torch.where(error < WORST_ERROR, int(Reason.STEP_TOO_SMALL), int(Reason.NOT_FINITE))
        code = torch.where(solved, int(Reason.SOLVED), code)
        reason.index_copy_(0, ids, torch.where(solved | stuck, code, reason[ids]))
        last = torch.where(solved | stuck, t, last)  # it stands still from now on
        if waits and (number + 1) % CHECKED_EVERY:
            continue
        going = torch.nonzero(t < last).squeeze(-1)
        if len(going) == 0:
            break
        if 4 * len(going) < 3 * len(t) or (len(t) <= 8 and len(going) < len(t)):
            ids, t, y, p, last, h, remembered = (x[going] for x in (ids, t, y, p, last, h, remembered))
            stops = None if stops is None else stops[going]
    return _gathered(taken, by, y0, times, start, reason, rejected)


def _first(system: System, t: Tensor, y: Tensor, p: Tensor, last: Tensor, tolerance: Tolerance) -> Tensor:
    """A first step size: a hundredth of the time in which f would change y by itself."""
    scale = tolerance.atol + tolerance.rtol * y.abs()
    size, speed = ((x / scale).norm(dim=-1) for x in (y, system.rate(t, y, p)))
    span = last - t
    guess = torch.where((size > 1e-5) & (speed > 1e-5), 0.01 * size / speed, 1e-6 * span)
    return torch.minimum(torch.where(torch.isfinite(guess), guess, 1e-6 * span), 0.1 * span)


def _next_stop(stops: Tensor, t: Tensor) -> Tensor:
    ahead = torch.where(stops > t.unsqueeze(-1), stops, torch.full_like(stops, torch.inf))
    return ahead.amin(-1)


def _error(u: Tensor, y: Tensor, moved: Tensor, tolerance: Tolerance) -> Tensor:
    """Root mean square over the states of the error in units of what is allowed, (B,)."""
    allowed = tolerance.atol + tolerance.rtol * torch.maximum(y.abs(), moved.abs())
    error = (u / allowed).square().mean(-1).sqrt()
    return torch.where(error < WORST_ERROR, error, WORST_ERROR)  # NaN is not


def _factor(error: Tensor, remembered: Tensor) -> Tensor:
    """Of the next step size, by proportional and integral control.

    It is below 1 after a step in vain, whose error is above 1, where what is remembered is not.
    """
    wanted = SAFETY * error.pow(-PROPORTIONAL / ORDER) * remembered.pow(INTEGRAL / ORDER)
    return wanted.clamp(LEAST_FACTOR, MOST_FACTOR)


def _gathered(
    taken: list[_Taken],
    by: Weights,
    y0: Tensor,
    times: Tensor,
    start: Tensor,
    reason: Tensor,
    rejected: Tensor,
) -> Path:
    """The accepted steps of each entry one after the other, and the states at the observations."""
    size, n = y0.shape
    count = torch.zeros(size, dtype=torch.long, device=y0.device)
    rows = []
    for ids, step, _, _ in taken:
        kept = step.h > 0
        rows.append((ids[kept], count[ids[kept]], kept))
        count[ids[kept]] += 1
    most = max(1, int(count.max())) if size else 1
    t, y = start.expand(most, size).clone(), y0.expand(most, size, n).clone()  # where f is surely finite
    h, finish = times.new_zeros(most, size), times.new_full((most, size), torch.inf)
    u = y0.new_zeros(N_STAGES, most, size, n)
    ends = None if taken[0][1].end is None else times.new_full((most, size), torch.inf)
    for (_, step, found, until), (who, where, kept) in zip(taken, rows, strict=True):
        t[where, who], h[where, who], y[where, who] = step.t[kept], step.h[kept], step.y[kept]
        u[:, where, who], finish[where, who] = found[:, kept], until[kept]
        if ends is not None and step.end is not None:
            ends[where, who] = step.end[kept]
    place = torch.searchsorted(finish.T.contiguous(), times.contiguous())
    reached = (place < count.unsqueeze(-1)) | (times <= start.unsqueeze(-1))
    place, who = place.clamp_max(most - 1), torch.arange(size, device=y0.device).unsqueeze(-1)
    length = h[place, who]
    share = ((times - t[place, who]) / torch.where(length > 0, length, 1.0)).clamp(0.0, 1.0)
    share = torch.where(reached, share, 0.0)
    values = torch.where(reached.unsqueeze(-1), _values(y, u, place, share, by), torch.nan)
    return Path(Step(t, y, h, ends), u, count, place, share, values, reason, rejected)


def _values(y: Tensor, u: Tensor, place: Tensor, share: Tensor, by: Weights) -> Tensor:
    """States at shares of steps (B, time, state)."""
    who = torch.arange(len(place), device=place.device).unsqueeze(-1)
    parts = torch.cat([y[None, place, who], outcome(u[:, place, who], by)])
    return (within(share).unsqueeze(-1) * parts).sum(0)


@torch.no_grad()
def again(system: System, p: Tensor, y0: Tensor, path: Path) -> Path:
    """The same steps from another start or with other parameters: their sizes are not chosen anew."""
    by, steps = weights(y0), path.steps
    begins, found, y = [], [], y0
    for s in range(len(steps.h)):
        step = Step(steps.t[s], y, steps.h[s], None if steps.end is None else steps.end[s])
        begins.append(y)
        found.append(stages(system, step, p, by)[0])
        y = y + outcome(found[-1], by)[0]
    begun, u = torch.stack(begins), torch.stack(found, 1)
    values = _values(begun, u, path.place, path.share, by)
    values = torch.where(torch.isnan(path.values), torch.nan, values)
    return replace(path, steps=replace(steps, y=begun), u=u, values=values)
