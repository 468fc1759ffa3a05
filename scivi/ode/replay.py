"""Derivatives of a solution by playing its steps again: exact for the steps that were taken.

The step sizes are held. For small systems all steps' transition matrices are found at once and chained
(``_at_once``); for large ones the adjoint goes back step by step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from scivi.ode.path import Path
from scivi.ode.rodas import GAMMA, N_STAGES, Step, Weights, solved, stages, weights, within
from scivi.ode.system import System

AT_ONCE = 8000  # entries of one step's matrices, B n^2, up to which all steps are done at once (our choice)
NUMBERS = 2**24  # that may be held of all steps' matrices: 128 MB (our choice)


@torch.no_grad()
def gradient(system: System, p: Tensor, path: Path, values: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to p (B, parameter) and the states at the start (B, state).

    Args:
        system: what was solved.
        p: parameters (B, parameter).
        path: of the solution.
        values: gradient with respect to the solution at the observations (B, time, state).
    """
    size, n = p.shape[0], values.shape[-1]
    if size * n * n > AT_ONCE:
        return _step_by_step(system, p, path, values)
    steps = path.steps.h.shape[0]
    chunk = max(1, NUMBERS // (4 * N_STAGES * steps * n * n))
    if chunk >= size:
        return _at_once(system, p, path, values)
    parts = []
    for begin in range(0, size, chunk):
        rows = slice(begin, begin + chunk)
        parts.append(_at_once(system, p[rows], path.rows(rows), values[rows]))
    of_p, of_y = zip(*parts, strict=True)
    return torch.cat(of_p), torch.cat(of_y)


def _spread(path: Path, values: Tensor) -> Tensor:
    """What the observations ask of each step: gradients of (y, made, k_1, k_2, k_3), (5, step, B, state)."""
    steps, size, n = path.steps.y.shape
    to = (path.place * size + torch.arange(size, device=values.device).unsqueeze(-1)).flatten()
    asked = (within(path.share).unsqueeze(-1) * values).flatten(1, 2)
    return values.new_zeros(5, steps * size, n).index_add_(1, to, asked).view(5, steps, size, n)


def _step_by_step(system: System, p: Tensor, path: Path, values: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint from the last step to the first; entries of many steps come first, the others join."""
    by, steps = weights(values), path.steps
    order = torch.argsort(path.count, descending=True)
    asked = _spread(path, values)[:, :, order]
    p, begin, h, y = p[order], steps.t[:, order], steps.h[:, order], steps.y[:, order]
    end = None if steps.end is None else steps.end[:, order]
    taking = (path.count[order].unsqueeze(0) > torch.arange(len(h), device=h.device).unsqueeze(-1)).sum(1)
    of_p, of_y = torch.zeros_like(p), values.new_zeros(y.shape[1:])
    for s, m in reversed(list(enumerate(taking.tolist()))):
        step = Step(begin[s, :m], y[s, :m], h[s, :m], None if end is None else end[s, :m])
        u, lu = stages(system, step, p[:m], by)
        made = torch.cat([(asked[1, s, :m] + of_y[:m]).unsqueeze(0), asked[2:, s, :m]])
        here, there = _pulled(system, step, p[:m], u, lu, made, by)
        of_y[:m] += here + asked[0, s, :m]
        of_p[:m] += there
    untaken = path.count[order] == 0  # observed where it starts
    of_y = torch.where(untaken.unsqueeze(-1), asked[0, 0], of_y)
    back = torch.argsort(order)
    return of_p[back], of_y[back]


def _pulled(
    system: System,
    step: Step,
    p: Tensor,
    u: Tensor,
    lu: tuple[Tensor, Tensor],
    made: Tensor,
    by: Weights,
) -> tuple[Tensor, Tensor]:
    """From gradients of a step's outcome (4, B, state) to those of its y, beyond y itself, and of p."""
    to_u = (by.out.T @ made.flatten(1)).view(N_STAGES, *step.y.shape)
    of_y, of_p, long = torch.zeros_like(step.y), torch.zeros_like(p), (GAMMA * step.h).unsqueeze(-1)
    for i in reversed(range(N_STAGES)):
        there = step.y
        if i:
            there = step.y + (by.into[i - 1][:1] @ u[:i].flatten(1)).view_as(step.y)
        v = solved(lu, to_u[i], transposed=True)
        to_there, to_y, to_p = system.pull(
            step.t, step.y, p, step.at(i), there, step.moved(i), u[i], long * v
        )
        of_y += to_there + to_y
        of_p += to_p
        if i:
            both = torch.stack([to_there.flatten(), v.flatten()])
            to_u[:i] += (by.into[i - 1].T @ both).view(i, *step.y.shape)
    return of_y, of_p


def _all(path: Path, p: Tensor) -> tuple[Step, Tensor]:
    """All steps of all entries as one batch, and their parameters."""
    steps = path.steps
    end = None if steps.end is None else steps.end.flatten()
    many = p.expand(len(steps.h), *p.shape).flatten(0, 1)
    return Step(steps.t.flatten(), steps.y.flatten(0, 1), steps.h.flatten(), end), many


def _moved(
    system: System,
    step: Step,
    p: Tensor,
    u: Tensor,
    lu: tuple[Tensor, Tensor],
    of_y: Tensor,
    of_p: Tensor | None,
    by: Weights,
) -> Tensor:
    """How a step's outcome moves with directions, (4, B, state, direction).

    Args:
        system: what was solved.
        step: the steps.
        p: their parameters.
        u: their stages.
        lu: their factors.
        of_y: how y moves (B, state, direction).
        of_p: how v . [f + (change of f along the stage)] moves with p by itself, for each stage and every
            unit v, (stage, B, state, direction); None if p stays.
        by: the coefficients.
    """
    long, moves = (GAMMA * step.h)[:, None, None], []
    for i in range(N_STAGES):
        there, to_there, carried = step.y, of_y, None
        if i:
            there = step.y + (by.into[i - 1][:1] @ u[:i].flatten(1)).view_as(step.y)
            both = by.into[i - 1] @ torch.stack(moves).flatten(1)
            to_y, carried = both.view(2, *of_y.shape)
            to_there = of_y + to_y
        right = system.jacobian(step.at(i), there, p) @ to_there
        right = right + system.curvature(step.t, step.y, p, step.moved(i), u[i]) @ of_y
        if of_p is not None:
            right = right + of_p[i]
        right = long * right
        moves.append(torch.linalg.lu_solve(*lu, right if carried is None else right + carried))
    return (by.out @ torch.stack(moves).flatten(1)).view(4, *of_y.shape)


def _at_once(system: System, p: Tensor, path: Path, values: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint by transition matrices of all steps: a short scan between two passes over all steps."""
    by, (steps, size, n) = weights(values), path.steps.y.shape
    step, many = _all(path, p)
    u, lu = stages(system, step, many, by)
    unit = torch.eye(n, dtype=p.dtype, device=p.device).expand(steps * size, n, n)
    moves = _moved(system, step, many, u, lu, unit, None, by)
    asked = _spread(path, values)
    inner = torch.einsum("ksij,ksi->sj", moves[1:], asked[2:].flatten(1, 2)).view(steps, size, n) + asked[0]
    back = moves[0].mT.reshape(steps, size, n, n)
    of_y, ahead = values.new_zeros(size, n), values.new_empty(steps, size, n)
    for s in reversed(range(steps)):
        ahead[s] = asked[1, s] + of_y
        of_y = of_y + (back[s] @ ahead[s].unsqueeze(-1)).squeeze(-1) + inner[s]
    made = torch.cat([ahead.unsqueeze(0), asked[2:]]).flatten(1, 2)
    _, of_p = _pulled(system, step, many, u, lu, made, by)
    return of_p.view(steps, size, -1).sum(0), of_y


@torch.no_grad()
def sensitivities(system: System, p: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """Derivatives of the solution at the observations, with respect to p and to the states at the start.

    Returns:
        (B, time, state, parameter) and (B, time, state, state).
    """
    by, (steps, size, n) = weights(p), path.steps.y.shape
    step, many = _all(path, p)
    u, lu = stages(system, step, many, by)
    n_p = p.shape[1]
    own = torch.stack(
        [torch.stack(list(_of_parameters(system, step, many, u[i], i, by, u)), 1) for i in range(N_STAGES)]
    )
    unit = torch.eye(n, dtype=p.dtype, device=p.device).expand(steps * size, n, n)
    of_y = _moved(system, step, many, u, lu, unit, None, by).view(4, steps, size, n, n)
    still = p.new_zeros(steps * size, n, n_p)
    of_p = _moved(system, step, many, u, lu, still, own, by).view(4, steps, size, n, n_p)
    state = torch.cat([p.new_zeros(size, n, n_p), unit[:size]], -1)
    states, outcomes = [], []
    for s in range(steps):
        made = of_y[:, s] @ state
        made[..., :n_p] += of_p[:, s]
        states.append(state)
        outcomes.append(made)
        state = state + made[0]
    who = torch.arange(size, device=p.device).unsqueeze(-1)
    parts = torch.cat([torch.stack(states).unsqueeze(0), torch.stack(outcomes, 1)])[:, path.place, who]
    found = (within(path.share)[..., None, None] * parts).sum(0)
    return found[..., :n_p], found[..., n_p:]


def _of_parameters(
    system: System, step: Step, p: Tensor, ui: Tensor, i: int, by: Weights, u: Tensor
) -> Iterator[Tensor]:
    """How each state's part of a stage's right-hand side moves with p, (B, parameter) each."""
    there = step.y if i == 0 else step.y + (by.into[i - 1][:1] @ u[:i].flatten(1)).view_as(step.y)
    for k in range(step.y.shape[-1]):
        v = torch.zeros_like(step.y)
        v[:, k] = 1.0
        yield system.pull(step.t, step.y, p, step.at(i), there, step.moved(i), ui, v)[2]
