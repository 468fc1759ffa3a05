"""Steady states of batches, and their gradients by the implicit function theorem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scivi.errors import DataError
from scivi.ode.path import Reason, Tolerance, integrate
from scivi.ode.solve import Solution
from scivi.ode.system import System

HORIZON = 1e12  # as good as for ever, in any unit of time (our choice)
NEWTON_STEPS = 8  # quadratic from so near (our choice)


def steady(
    system: System,
    p: Tensor,
    y0: Tensor,
    totals: Tensor | None = None,
    *,
    horizon: float = HORIZON,
    rtol: float = 1e-6,
    atol: Tensor | float = 1e-10,
    max_steps: int = 2000,
) -> Solution:
    """The state that each entry comes to if it is left alone: f(y, p) = 0 and the totals of y0.

    The equations are solved over a time that is as good as for ever, and what they come to is refined by
    Newton's method. An entry that comes to no rest fails. With gradients in p and y0; these cannot be
    differentiated again.

    Args:
        system: what to solve; f may not depend on time.
        p: parameters (B, parameter), float64.
        y0: states at the start (B, state).
        totals: sums of states that no reaction changes, as weights (total, state) or (B, total, state),
            linearly independent and 0 at the same places; without them the Jacobian must be regular.
        horizon: how long "for ever" is.
        rtol: what a step may be wrong by is atol + rtol |y|, and so may the steady state.
        atol: likewise.
        max_steps: of one entry.

    Returns:
        ``values`` (B, 1, state).

    Raises:
        DataError: f depends on time, or the totals are not independent.
    """
    if system.slope is not None:
        raise DataError("a system whose right-hand side depends on time has no steady state.")
    n = len(system.states)
    kept = (p.new_zeros(0, n) if totals is None else totals.to(p)).expand(len(p), -1, -1)
    if kept.shape[1] and int(torch.linalg.matrix_rank(kept).min()) < kept.shape[1]:
        raise DataError(f"the {kept.shape[1]} totals are not independent of each other.")
    tolerance = Tolerance(rtol, torch.as_tensor(atol, dtype=p.dtype, device=p.device), max_steps)
    values, reason, count, rejected = _Steady.apply(p, y0, kept, system, horizon, tolerance)  # type: ignore[misc]
    return Solution(values, reason == Reason.SOLVED, reason, count, rejected, "rodas5p")


def _replaced_rows(totals: Tensor) -> list[int]:
    """For each total a state whose equation follows from the others: pivots of an elimination."""
    work, rows = totals.clone(), []
    for k in range(len(work)):
        pivot = int(work[k].abs().argmax())
        rows.append(pivot)
        for other in range(len(work)):
            if other != k:
                work[other] = work[other] - work[k] * (work[other, pivot] / work[k, pivot])
    return rows


class _Steady(torch.autograd.Function):
    """The steady state as a function of p and y0."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, y0: Tensor, totals: Tensor, system: System, horizon: float, tolerance: Tolerance
    ) -> tuple[Tensor, ...]:
        times, zero = p.new_full((len(p), 1), horizon), p.new_zeros(len(p))
        path = integrate(system, p, y0, times, zero, None, tolerance)
        came, rows = path.reason == Reason.SOLVED, _replaced_rows(totals[0])
        y = torch.where(came.unsqueeze(-1), path.values[:, 0], y0)
        rested = torch.zeros_like(came)
        for _ in range(NEWTON_STEPS):
            matrix = system.jacobian(zero, y, p)
            right = system.rate(zero, y, p)
            matrix[:, rows], right[:, rows] = totals, (totals @ (y - y0).unsqueeze(-1)).squeeze(-1)
            step = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)
            small = (step.abs() <= tolerance.atol + tolerance.rtol * y.abs()).all(-1)  # NaN is not
            y, rested = torch.where(small.unsqueeze(-1), y - step, y), small
        ok = came & rested
        reason = torch.where(came & ~rested, int(Reason.NOT_AT_REST), path.reason)
        values = torch.where(ok.unsqueeze(-1), y, torch.nan).unsqueeze(1)
        ctx.save_for_backward(p, y, ok, totals)
        ctx.system, ctx.rows = system, rows
        ctx.mark_non_differentiable(reason, path.count, path.rejected)
        return values, reason, path.count, path.rejected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, values: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        p, y, ok, totals = ctx.saved_tensors
        zero, rows = p.new_zeros(len(p)), ctx.rows
        asked = torch.where(ok.unsqueeze(-1), values[:, 0], 0.0)
        matrix = ctx.system.jacobian(zero, y, p)
        matrix[:, rows] = totals
        matrix = torch.where(ok[:, None, None], matrix, torch.eye(y.shape[1], dtype=y.dtype, device=y.device))
        v = torch.linalg.solve(matrix.mT, asked)
        to_totals = v[:, rows]
        v = v.index_fill(1, torch.tensor(rows, dtype=torch.long, device=v.device), 0.0)
        _, of_p = ctx.system.pull(zero, y, p, *(x[None] for x in (zero, y, zero, torch.zeros_like(y), -v)))
        return of_p, (to_totals.unsqueeze(1) @ totals).squeeze(1), None, None, None, None
