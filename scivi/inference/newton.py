"""Mode and covariance of a few globals by Newton's method on the marginal of all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scivi.errors import Unsupported
from scivi.inference.marginal import (
    GRID_DIMS,
    Layout,
    fine_nodes,
    global_module,
    layout,
    log_marginal,
    log_prior,
    summing_nodes,
)
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound
from scivi.models.guides import JointNormalGuide

# A step's reach on the unbounded scale, where 1 is a factor of e for a positive global (our choice).
_FARTHEST = 2.0
_STALE = 0.3  # posterior sd; after a longer step the curvature is worked out anew (our choice)
_COARSE = 0.3  # posterior sd; where fine nodes correct by more, all rows get more nodes (our choice)
_ROUGH, _MOST_ROUNDS = 0.5, 4  # posterior sd; beyond it fine nodes correct again, so often (our choice)

Derivatives = tuple[Tensor, Tensor, Tensor]
Gradient = Callable[[Tensor, Callable[[int], Iterable[Batch]], int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Newton:
    """What the Newton finish found.

    Args:
        loc: mode of the globals' posterior on the unbounded scale, (D,).
        covariance: inverse of the negative Hessian there, (D, D).
        step_sd: size of the last step on coarse nodes, in posterior sd, the largest of the coordinates.
        steps: steps taken before it.
        nodes: Gauss-Hermite nodes per local dimension at the end.
        node_error_sd: by how much going from coarse to fine nodes moved the mode, in posterior sd; what the
            fine ones leave is far smaller.
        log_evidence: Laplace estimate of the log evidence, nats.
    """

    loc: Tensor
    covariance: Tensor
    step_sd: float
    steps: int
    nodes: int
    node_error_sd: float
    log_evidence: float


@dataclass(frozen=True)
class Rows:
    """Rows that the Newton finish works on.

    Args:
        all: from nodes per dimension to one pass over all rows, in chunks.
        some: the same over evenly spread rows, on which curvature and fine nodes are worked out.
        weight: rows in all over rows in ``some``.
    """

    all: Callable[[int], Iterable[Batch]]
    some: Callable[[int], Iterable[Batch]]
    weight: float


def newton_finish(
    bound: Bound,
    rows: Rows,
    per_dim: int,
    *,
    gradient: Gradient | None = None,
    fine: bool = True,
    max_steps: int = 12,
    tolerance: float = 0.1,
) -> Newton:
    """Mode and covariance of the globals by Newton's method on the full marginal.

    Gradients on coarse nodes come from all rows; the curvature, and the difference that fine nodes make to
    the gradient, from ``rows.some``, scaled up: both vary little from row to row.

    Args:
        bound: a trained pair; its joint normal is where the search starts, and is not changed.
        rows: of the data.
        per_dim: Gauss-Hermite nodes per local dimension: coarse ones as in training, fine ones twice as many
            and one.
        gradient: log marginal and its gradient at a point, over batches of rows on so many nodes; worked out
            here if None.
        fine: correct the coarse answer by the fine nodes.
        max_steps: Newton steps at most.
        tolerance: stop when no coordinate moved by more, in posterior sd; the next step would be far smaller.

    Raises:
        Unsupported: the guide's noise cannot be laid out, or no joint normal holds all globals.
    """
    module, plan = global_module(bound), layout(bound, bound.example)
    if module is None or plan.refusal is not None:
        absent = "no full-rank joint normal holds all globals (scivi.models.guides.global_normal)"
        raise Unsupported(f"the Newton finish cannot be had: {plan.refusal or absent}.")
    hill = _Hill(bound, module, plan, rows, gradient)
    top = _climb(hill, summing_nodes(plan.dims, per_dim), max_steps, tolerance)
    fine = fine and 0 < plan.dims <= GRID_DIMS  # random nodes are no finer for that
    theta, value, covariance, node_error = _refine(hill, top, per_dim, fine)
    evidence = float(value) + 0.5 * float(torch.logdet(covariance)) + 0.5 * len(theta) * math.log(2 * math.pi)
    loc, covariance = theta.to(module.loc), covariance.to(module.loc)
    nodes = fine_nodes(per_dim) if fine else top.nodes
    return Newton(loc, covariance, top.step_sd, top.taken, nodes, node_error, evidence)


@dataclass(frozen=True)
class _Hill:
    """The log posterior of the globals, every row integrated; ``newton_finish`` says of what."""

    bound: Bound
    module: JointNormalGuide
    plan: Layout
    rows: Rows
    gradient: Gradient | None

    def _marginal(
        self, theta: Tensor, batches: Callable[[int], Iterable[Batch]], n: int, curved: bool
    ) -> Derivatives:
        def of_rows(at: Tensor) -> Iterator[Tensor]:
            return (log_marginal(self.bound, self.module, at, each, self.plan, n) for each in batches(n))

        return differentiate(of_rows, theta, curved, self.module.loc.dtype)

    def _prior(self, theta: Tensor, curved: bool) -> Derivatives:
        def of_globals(at: Tensor) -> Iterator[Tensor]:
            yield log_prior(self.bound, self.module, at, self.bound.example)

        return differentiate(of_globals, theta, curved, self.module.loc.dtype)

    def sloped(
        self, theta: Tensor, batches: Callable[[int], Iterable[Batch]], n: int
    ) -> tuple[Tensor, Tensor]:
        """Log marginal of these rows on so many nodes, and its slope."""
        if self.gradient is not None:
            return self.gradient(theta, batches, n)
        return self._marginal(theta, batches, n, False)[:2]

    def posterior(self, theta: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Log posterior density on so many nodes, unnormalised, and its slope."""
        value, slope = self.sloped(theta, self.rows.all, n)
        prior = self._prior(theta, False)
        return prior[0] + value, prior[1] + slope

    def covariance(self, theta: Tensor, n: int) -> Tensor:
        """Of the normal with the curvature there."""
        bend = self._marginal(theta, self.rows.some, n, True)[2]
        return torch.linalg.inv(_positive(-self.rows.weight * bend - self._prior(theta, True)[2]))


@dataclass(frozen=True)
class _Top:
    """Where a climb on so many nodes ended: the last step's length in sd, and how many were taken."""

    theta: Tensor
    value: Tensor
    slope: Tensor
    covariance: Tensor
    nodes: int
    step_sd: float
    taken: int


def _climb(hill: _Hill, nodes: int, max_steps: int, tolerance: float) -> _Top:
    """Newton steps, halved where they lead down."""
    loc = hill.module.loc
    theta, step_sd, taken, stale = loc.detach().double(), math.inf, 0, False
    (value, slope), covariance = hill.posterior(theta, nodes), hill.covariance(theta, nodes)
    while taken < max_steps:
        step, sd = covariance @ slope, covariance.diagonal().sqrt()
        step_sd = float((step / sd).abs().max())
        if step_sd < tolerance:  # a step this small is taken afterwards, with the fine nodes'
            break
        length = min(1.0, float(_FARTHEST / step.abs().max()))
        enough = value - 10 * abs(float(value)) * torch.finfo(loc.dtype).eps  # less its rounding
        while True:
            ahead = hill.posterior(theta + length * step, nodes)
            if ahead[0] >= enough or length <= 1e-4:  # NaN is not enough
                break
            length *= 0.5
        moved, turned = length * step, slope - ahead[1]
        theta, (value, slope), taken = theta + moved, ahead, taken + 1
        if hill.gradient is not None:
            covariance, stale = _secant(covariance, moved, turned), stale or step_sd > _STALE
        elif step_sd > _STALE:  # few rows, and far to go: a new curvature is cheap
            covariance = hill.covariance(theta, nodes)
    if stale:
        covariance = hill.covariance(theta, nodes)
    return _Top(theta, value, slope, covariance, nodes, step_sd, taken)


def _refine(hill: _Hill, top: _Top, per_dim: int, fine: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """The last steps, with what fine nodes would change: mode, density, covariance, and by how much in sd."""
    rows, coarse = hill.rows, top.nodes
    theta, value, slope, covariance = top.theta, top.value, top.slope, top.covariance
    difference, node_error = torch.zeros_like(slope), math.nan
    for _ in range(_MOST_ROUNDS):
        sd = covariance.diagonal().sqrt()
        if fine:
            (v_fine, s_fine), (v, s) = (
                hill.sloped(theta, rows.some, n) for n in (fine_nodes(per_dim), coarse)
            )
            value, difference = value + rows.weight * (v_fine - v), rows.weight * (s_fine - s)
        correction = float((covariance @ difference / sd).abs().max())
        node_error = correction if fine and math.isnan(node_error) else node_error
        if fine and rows.weight > 1 and coarse < per_dim and correction > _COARSE:
            # so large a difference is not known well enough from some of the rows: let all have more nodes
            coarse = per_dim
            value, slope = hill.posterior(theta, coarse)
            continue
        step = covariance @ (slope + difference)
        theta = theta + step
        if not fine or not float((step / sd).abs().max()) > _ROUGH:
            break
        (value, slope), covariance = hill.posterior(theta, coarse), hill.covariance(theta, top.nodes)
    return theta, value, covariance, node_error


def _secant(covariance: Tensor, step: Tensor, turned: Tensor) -> Tensor:
    """An inverse curvature corrected by how a step turned the slope (Broyden, Fletcher, Goldfarb, Shanno).

    Left alone where the slope did not turn as that of a peak does.
    """
    size = step @ turned
    if not size > 1e-3 * (step @ torch.linalg.solve(covariance, step)):
        return covariance
    keep = torch.eye(len(step), dtype=step.dtype) - torch.outer(step, turned) / size
    return keep @ covariance @ keep.T + torch.outer(step, step) / size


def differentiate(
    parts: Callable[[Tensor], Iterator[Tensor]], theta: Tensor, curved: bool, dtype: torch.dtype
) -> Derivatives:
    """Value, gradient (D,) and, if ``curved``, Hessian (D, D) of a sum at ``theta``, added up in float64."""
    at = theta.detach().to(dtype).requires_grad_(True)
    value, slope, bend = theta.new_zeros(()), torch.zeros_like(theta), theta.new_zeros(len(theta), len(theta))
    for part in parts(at):
        (own,) = torch.autograd.grad(part, at, create_graph=curved)
        value, slope = value + part.detach(), slope + own.detach()
        if curved and own.requires_grad:  # the slope of a flat prior is a constant
            rows = [torch.autograd.grad(own[i], at, retain_graph=True)[0] for i in range(len(theta))]
            bend = bend + torch.stack(rows).detach()
    return value, slope, bend


def _positive(matrix: Tensor) -> Tensor:
    """The matrix if positive definite, else with its eigenvalues made positive (a direction that climbs)."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    floor = values.abs().max() * 1e-8
    return vectors @ torch.diag(values.abs().clamp_min(floor)) @ vectors.T
