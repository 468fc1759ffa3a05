"""Derivatives of a solution by playing its steps again: exact for the steps that were taken.

The step sizes are held. For small systems all steps' transition matrices are found at once and chained
(``_at_once``); for large ones the adjoint goes back step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scivi.ode.path import Path
from scivi.ode.rodas import GAMMA, N_STAGES, Step, Weights, factors, weights, within
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
    u = path.u[:, :, order]
    taking = (path.count[order].unsqueeze(0) > torch.arange(len(h), device=h.device).unsqueeze(-1)).sum(1)
    of_p, of_y = torch.zeros_like(p), values.new_zeros(y.shape[1:])
    for s, m in reversed(list(enumerate(taking.tolist()))):
        step = Step(begin[s, :m], y[s, :m], h[s, :m], None if end is None else end[s, :m])
        made = torch.cat([(asked[1, s, :m] + of_y[:m]).unsqueeze(0), asked[2:, s, :m]])
        here, of_k = _pulled(system, step, p[:m], u[:, s, :m], factors(system, step, p[:m]), made, by)
        of_y[:m] += here + asked[0, s, :m]
        of_p[:m] += of_k
    untaken = path.count[order] == 0  # observed where it starts
    of_y = torch.where(untaken.unsqueeze(-1), asked[0, 0], of_y)
    back = torch.argsort(order)
    return of_p[back], of_y[back]


def _pulled(
    system: System, step: Step, p: Tensor, u: Tensor, lu: tuple[Tensor, Tensor], made: Tensor, by: Weights
) -> tuple[Tensor, Tensor]:
    """From gradients of a step's outcome (4, B, state) to those of its y, beyond y itself, and of p."""
    to_u = (by.out.T @ made.flatten(1)).view_as(u)
    there, at, long = step.there(u, by), step.at(by), (GAMMA * step.h).unsqueeze(-1)
    of_y, values = torch.zeros_like(step.y), torch.empty_like(u)
    both = step.y.new_empty(2, *step.y.shape)  # asked by a stage of where it is, and of those it carries
    for i in reversed(range(N_STAGES)):
        both[1] = torch.linalg.lu_solve(*lu, to_u[i].unsqueeze(-1), adjoint=True).squeeze(-1)
        torch.mul(long, both[1], out=values[i])
        both[0] = system.back(at[i], there[i], p, values[i])
        of_y += both[0]
        if i:
            to_u[:i] += (by.into[i - 1].T @ both.flatten(1)).view(i, *step.y.shape)
    to_y, of_p = system.pull(step.t, step.y, p, at, there, step.moved(by), u, values)
    return of_y + to_y, of_p


def _all(path: Path, p: Tensor) -> tuple[Step, Tensor, Tensor]:
    """All steps of all entries as one batch, their parameters and their stages."""
    steps = path.steps
    end = None if steps.end is None else steps.end.flatten()
    many = p.expand(len(steps.h), *p.shape).flatten(0, 1)
    return Step(steps.t.flatten(), steps.y.flatten(0, 1), steps.h.flatten(), end), many, path.u.flatten(1, 2)


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
    long, n = (GAMMA * step.h)[:, None, None], step.y.shape[-1]
    t, y, p = (x.expand(N_STAGES, *x.shape).flatten(0, 1) for x in (step.t, step.y, p))
    slopes = system.jacobian(step.at(by).flatten(), step.there(u, by).flatten(0, 1), p)
    slopes = slopes.view(N_STAGES, -1, n, n)
    rest = system.curvature(t, y, p, step.moved(by).flatten(), u.flatten(0, 1)).view_as(slopes) @ of_y
    if of_p is not None:
        rest += of_p
    moves = of_y.new_empty(N_STAGES, of_y.numel())
    each = moves.view(N_STAGES, *of_y.shape)
    for i in range(N_STAGES):
        if i == 0:
            each[i] = torch.linalg.lu_solve(*lu, long * (rest[i] + slopes[i] @ of_y))
            continue
        to_y, carried = (by.into[i - 1] @ moves[:i]).view(2, *of_y.shape)
        right = torch.addcmul(carried, long, rest[i] + slopes[i] @ (of_y + to_y))
        each[i] = torch.linalg.lu_solve(*lu, right)
    return (by.out @ moves).view(4, *of_y.shape)


def _at_once(system: System, p: Tensor, path: Path, values: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint by transition matrices of all steps: a short scan between two passes over all steps."""
    by, (steps, size, n) = weights(values), path.steps.y.shape
    step, many, u = _all(path, p)
    lu = factors(system, step, many)
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
    step, many, u = _all(path, p)
    lu, n_p = factors(system, step, many), p.shape[1]
    own = _of_parameters(system, step, many, u, by)
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


def _of_parameters(system: System, step: Step, p: Tensor, u: Tensor, by: Weights) -> Tensor:
    """How each state's part of a stage's right-hand side moves with p, (stage, B, state, parameter)."""
    there, at, moved = step.there(u, by), step.at(by), step.moved(by)
    found = u.new_empty(*u.shape, p.shape[1])
    for i in range(N_STAGES):
        for k in range(u.shape[-1]):
            v = torch.zeros_like(u[:1])
            v[..., k] = 1.0
            one = slice(i, i + 1)
            pulled = system.pull(step.t, step.y, p, at[one], there[one], moved[one], u[one], v)
            found[i, :, k] = pulled[1]
    return found
