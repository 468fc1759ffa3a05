"""Solve batches of ordinary differential equations, stiff or not, and differentiate the solutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scivi.errors import DataError, Unsupported, listed
from scivi.ode import replay
from scivi.ode.path import ENTRIES_AT_ONCE, SENTENCES, Path, Reason, Tolerance, again, integrate
from scivi.ode.system import System

Method = Literal["auto", "rodas5p", "dopri5", "dopri8"]
# |eigenvalue| x time beyond which stability and not accuracy sets the explicit step (our choice).
STIFF = 100.0
DIFFERENCE = 1e-4  # of a parameter or state, for second derivatives (our choice)
# Entries solved to see how stiff they are, how well, and in how many steps at most (our choice).
PILOTS, PILOT_RTOL, PILOT_STEPS = 4, 1e-3, 500


@dataclass(frozen=True, slots=True)
class Solution:
    """States of a batch at its times, and which entries failed.

    Args:
        values: (B, time, state); NaN at the times that an entry did not come to.
        ok: whether an entry came to its last time (B,).
        reason: a ``Reason`` for each entry (B,).
        n_steps: accepted steps (B,).
        n_rejected: steps tried in vain (B,).
        method: by which it was solved.
    """

    values: Tensor
    ok: Tensor
    reason: Tensor
    n_steps: Tensor
    n_rejected: Tensor
    method: str

    def failures(self) -> dict[str, int]:
        """How many entries failed, by what happened to them."""
        codes, counts = torch.unique(self.reason, return_counts=True)
        return {
            SENTENCES[Reason(code)]: count
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
            if code != Reason.SOLVED
        }


def solve(
    system: System,
    p: Tensor,
    y0: Tensor,
    times: Tensor,
    *,
    start: Tensor | float = 0.0,
    stops: Tensor | Sequence[float] | None = None,
    rtol: float = 1e-6,
    atol: Tensor | float = 1e-10,
    max_steps: int = 2000,
    method: Method = "auto",
) -> Solution:
    """Solve dy/dt = f(t, y, p) for each entry of a batch, with steps of its own size.

    Gradients of ``values`` with respect to p and y0 are those of the steps that were taken, which are played
    again backwards. A failed entry is a result: its ``ok`` is False, and the others are what they would be
    alone.

    Args:
        system: what to solve.
        p: parameters (B, parameter), float64.
        y0: states at the start, (B, state) or (state,).
        times: at which the states are wanted, in order, (B, time) or (time,).
        start: (B,) or one for all.
        stops: times at which f jumps, (B, stop) or (stop,). Steps end there, and f is asked for what holds
            before until then.
        rtol: what a step may be wrong by is atol + rtol |y|, root mean square over the states.
        atol: one for all states or (state,): a state of 1e-8 is known to nothing with an atol of 1e-6.
        max_steps: of one entry.
        method: "rodas5p" for stiff equations; "dopri5", "dopri8" for others, by torchdiffeq, with one step
            size for the whole batch and gradients through its steps; "auto" finds out from a few entries,
            which costs a rough solution of these: see ``stiffness``.

    Raises:
        DataError: listing shapes that do not fit, times out of order, or numbers that are not finite.
    """
    p, y0, times, begin, jumps, tolerance = _arguments(
        system, p, y0, times, start, stops, rtol, atol, max_steps
    )
    if method == "auto":
        stiff = stiffness(system, p, y0, times, start=begin, stops=jumps, atol=atol) > STIFF
        method = "rodas5p" if stiff else "dopri5"
    if method in ("dopri5", "dopri8"):
        found = _explicit(system, p, y0, times, begin, jumps, tolerance, method)
        if found is not None:
            return found
        method = "rodas5p"
    if method != "rodas5p":
        raise Unsupported(f'there is no method "{method}"; there are rodas5p, dopri5, dopri8 and auto.')
    found = _Replayed.apply(p, y0, times, begin, jumps, system, tolerance)
    values, reason, n_steps, n_rejected = found  # type: ignore[misc]
    return Solution(values, reason == Reason.SOLVED, reason, n_steps, n_rejected, method)


@torch.no_grad()
def stiffness(
    system: System,
    p: Tensor,
    y0: Tensor,
    times: Tensor,
    *,
    start: Tensor | float = 0.0,
    stops: Tensor | Sequence[float] | None = None,
    atol: Tensor | float = 1e-10,
) -> float:
    """The largest |eigenvalue of the Jacobian| x time of a solution, over a few entries of the batch.

    An explicit method needs about a third as many steps to stay stable. NaN counts as infinite.
    """
    p, y0, times, begin, jumps, tolerance = _arguments(
        system, p, y0, times, start, stops, PILOT_RTOL, atol, PILOT_STEPS
    )
    some = torch.linspace(0, len(p) - 1, min(PILOTS, len(p)), device=p.device).round().long()
    jumps = None if jumps is None else jumps[some]
    path = integrate(system, p[some], y0[some], times[some], begin[some], jumps, tolerance)
    if not bool((path.reason == Reason.SOLVED).all()):
        return float("inf")
    steps = path.steps
    many = p[some].expand(len(steps.h), -1, -1)
    slopes = system.jacobian(steps.t.flatten(), steps.y.flatten(0, 1), many.flatten(0, 1))
    speed = torch.linalg.eigvals(slopes).abs().amax(-1).view_as(steps.h)
    return float((speed * (times[some, -1] - begin[some])).max())


def sensitivities(
    system: System,
    p: Tensor,
    y0: Tensor,
    times: Tensor,
    *,
    start: Tensor | float = 0.0,
    stops: Tensor | Sequence[float] | None = None,
    rtol: float = 1e-6,
    atol: Tensor | float = 1e-10,
    max_steps: int = 2000,
) -> tuple[Solution, Tensor, Tensor]:
    """The solution by "rodas5p", and its derivatives forward: for Fisher information.

    Returns:
        The solution; dy/dp (B, time, state, parameter); dy/dy0 (B, time, state, state).
    """
    p, y0, times, begin, jumps, tolerance = _arguments(
        system, p, y0, times, start, stops, rtol, atol, max_steps
    )
    with torch.no_grad():
        path = integrate(system, p, y0, times, begin, jumps, tolerance)
    of_p, of_y0 = replay.sensitivities(system, p, path)
    ok = path.reason == Reason.SOLVED
    found = Solution(path.values, ok, path.reason, path.count, path.rejected, "rodas5p")
    return found, of_p, of_y0


class _Replayed(torch.autograd.Function):
    """The solution as a function of p and y0, in pieces of the batch that fit memory."""

    @staticmethod
    def forward(
        ctx: Any,
        p: Tensor,
        y0: Tensor,
        times: Tensor,
        begin: Tensor,
        jumps: Tensor | None,
        system: System,
        tolerance: Tolerance,
    ) -> tuple[Tensor, ...]:
        size = max(1, ENTRIES_AT_ONCE // y0.shape[-1])
        pieces = [slice(first, first + size) for first in range(0, len(p), size)]
        paths = []
        for rows in pieces:
            stops = None if jumps is None else jumps[rows]
            paths.append(integrate(system, p[rows], y0[rows], times[rows], begin[rows], stops, tolerance))
        ctx.save_for_backward(p, y0)
        ctx.system, ctx.pieces, ctx.paths = system, pieces, paths
        told = [torch.cat(x) for x in zip(*((t.reason, t.count, t.rejected) for t in paths), strict=True)]
        ctx.mark_non_differentiable(*told)
        return torch.cat([path.values for path in paths]), *told

    @staticmethod
    def backward(ctx: Any, values: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        of_p, of_y0 = _Pulled.apply(values, *ctx.saved_tensors, ctx.system, ctx.pieces, ctx.paths)  # type: ignore[misc]
        return of_p, of_y0, None, None, None, None, None


class _Pulled(torch.autograd.Function):
    """The gradient of a solution as a function of what is asked of its values, of p and of y0.

    Its own derivative, for Newton's method, is the change of the solution and of its gradient along the
    direction asked for: central differences over the same steps, good to some seven digits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        p: Tensor,
        y0: Tensor,
        system: System,
        pieces: list[slice],
        paths: list[Path],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, p, y0)
        ctx.system, ctx.pieces, ctx.paths = system, pieces, paths
        both = zip(pieces, paths, strict=True)
        found = [replay.gradient(system, p[rows], path, values[rows]) for rows, path in both]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_p: Tensor, of_y0: Tensor) -> tuple[Tensor | None, ...]:
        values, p, y0 = ctx.saved_tensors
        parts = []
        for rows, path in zip(ctx.pieces, ctx.paths, strict=True):
            here, along = (p[rows], y0[rows]), (of_p[rows], of_y0[rows])
            size = torch.cat([_relative(d, x) for d, x in zip(along, here, strict=True)], 1).amax(1)
            e = (DIFFERENCE / size.clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1.0).unsqueeze(-1)
            sides = []
            for sign in (1.0, -1.0):
                moved = [x + sign * e * d for x, d in zip(here, along, strict=True)]
                found = again(ctx.system, moved[0], moved[1], path)
                sides.append((found.values, *replay.gradient(ctx.system, moved[0], found, values[rows])))
            (up, *ups), (down, *downs) = sides
            still = torch.isnan(path.values)
            change = torch.where(still, 0.0, (up - down) / (2 * e.unsqueeze(-1)))
            parts.append((change, *((a - b) / (2 * e) for a, b in zip(ups, downs, strict=True))))
        return *(torch.cat(x) for x in zip(*parts, strict=True)), None, None, None


def _relative(direction: Tensor, x: Tensor) -> Tensor:
    return direction.abs() / torch.where(x == 0, torch.ones_like(x), x.abs())


def _arguments(
    system: System,
    p: Tensor,
    y0: Tensor,
    times: Tensor,
    start: Tensor | float,
    stops: Tensor | Sequence[float] | None,
    rtol: float,
    atol: Tensor | float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tolerance]:
    """Everything as a batch; all that is wrong in one error."""
    faults, size, n = [], len(p) if p.dim() else 0, len(system.states)
    if p.dim() != 2 or p.shape[1] != len(system.parameters):
        faults.append(
            f"p is {tuple(p.shape)}; the system has {len(system.parameters)} parameters: (B, parameter)"
        )
    if p.dtype != torch.float64 or y0.dtype != torch.float64:
        faults.append(f"p is {p.dtype} and y0 {y0.dtype}; stiff equations need float64")
    if y0.shape not in ((n,), (size, n)):
        faults.append(f"y0 is {tuple(y0.shape)}; it needs ({size}, {n}) or ({n},)")
    times = torch.as_tensor(times, dtype=torch.float64, device=p.device)
    begin = torch.as_tensor(start, dtype=torch.float64, device=p.device)
    jumps = None if stops is None else torch.as_tensor(stops, dtype=torch.float64, device=p.device)
    for name, x in (("times", times), ("stops", jumps)):
        if x is None:
            continue
        if x.dim() not in (1, 2) or x.shape[-1] == 0 or (x.dim() == 2 and len(x) != size):
            faults.append(
                f"{name} are {tuple(x.shape)}; they need ({size}, n) or (n,), and one of them at least"
            )
        elif not bool(torch.isfinite(x).all()):
            faults.append(f"some of the {name} are not finite")
        elif bool((x.diff(dim=-1) < 0).any()):
            faults.append(f"the {name} are out of order")
    if begin.shape not in ((), (size,)):
        faults.append(f"start is {tuple(begin.shape)}; it needs ({size},) or one number")
    elif not faults and bool((times[..., 0] < begin).any()):
        faults.append(f"the first of the times, {float(times.min()):.6g}, comes before the start")
    if not (rtol > 0 and bool((torch.as_tensor(atol) > 0).all())):
        faults.append(f"rtol and atol are {rtol} and {atol}; they must be above 0")
    if faults:
        raise DataError(listed("these equations cannot be solved:", faults))
    jumps = None if jumps is None else jumps.expand(size, -1).contiguous()
    times = times.expand(size, -1).contiguous()
    tolerance = Tolerance(rtol, torch.as_tensor(atol, dtype=p.dtype, device=p.device), max_steps)
    return p, y0.expand(size, n), times, begin.expand(size), jumps, tolerance


def _explicit(
    system: System,
    p: Tensor,
    y0: Tensor,
    times: Tensor,
    begin: Tensor,
    jumps: Tensor | None,
    tolerance: Tolerance,
    method: str,
) -> Solution | None:
    """The solution by torchdiffeq; None where it gives up, or where f jumps or starts differ."""
    from torchdiffeq import odeint

    if jumps is not None or bool((begin != begin[0]).any()):
        return None
    grid, place = torch.unique(torch.cat([begin[:1], times.flatten()]), return_inverse=True)
    evaluations = 0

    def rate(t: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return system.rate(t.expand(len(y)), y, p)

    if len(grid) == 1:
        values = y0.unsqueeze(1).expand(-1, times.shape[1], -1)
    else:
        allowed: Any = {"rtol": tolerance.rtol, "atol": tolerance.atol}
        try:
            options = {"max_num_steps": tolerance.max_steps}
            found = odeint(rate, y0, grid, **allowed, method=method, options=options)
        except AssertionError:  # a step too small, or too many of them: what torchdiffeq raises
            return None
        who = torch.arange(len(p), device=p.device).unsqueeze(-1)
        values = found[place[1:].view_as(times), who]  # type: ignore[index]
    if not bool(torch.isfinite(values).all()):
        return None
    stages = {"dopri5": 6, "dopri8": 13}[method]
    told = torch.zeros(len(p), dtype=torch.long, device=p.device)
    return Solution(values, told == 0, told, told + evaluations // stages, told, method)
