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
# Posterior sd, our choice. No farther from where they were worked out do curvature and fine nodes hold; and
# where what fine nodes add is known no better than _VAGUE from some rows, all get more nodes.
_FAR, _VAGUE = 0.3, 0.1

Derivatives = tuple[Tensor, Tensor, Tensor]
Gradient = Callable[[Tensor, Iterable[Batch], int], Tensor]


@dataclass(frozen=True)
class Newton:
    """What the Newton finish found.

    Args:
        loc: mode of the globals' posterior on the unbounded scale, (D,).
        covariance: inverse of the negative Hessian there, (D, D).
        step_sd: size of the last step, in posterior sd, the largest of the coordinates.
        steps: steps taken before it.
        nodes: Gauss-Hermite nodes per local dimension at the end.
        node_error_sd: by how much going from coarse to fine nodes moves the mode, in posterior sd; what the
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
        gradient: log marginal and its gradient at a point, (chunk, 1 + D), of batches of rows on so many
            nodes; worked out here if None.
        fine: correct the coarse answer by the fine nodes.
        max_steps: Newton steps at most.
        tolerance: a step shorter than this, in posterior sd of each coordinate, is the last; with fine nodes
            one of .3, where curvature and fine nodes have just been worked out.

    Raises:
        Unsupported: the guide's noise cannot be laid out, or no joint normal holds all globals.
    """
    module, plan = global_module(bound), layout(bound, bound.example)
    if module is None or plan.refusal is not None:
        absent = "no full-rank joint normal holds all globals (scivi.models.guides.global_normal)"
        raise Unsupported(f"the Newton finish cannot be had: {plan.refusal or absent}.")
    hill = _Hill(bound, module, plan, rows, gradient)
    finest = fine_nodes(per_dim) if fine and 0 < plan.dims <= GRID_DIMS else 0  # random ones are no finer
    return _climb(hill, per_dim, finest, max_steps, tolerance)


@dataclass(frozen=True)
class _View:
    """Of the log posterior near ``theta``: the normal's covariance, and what fine nodes add, with its slope.

    ``vague`` is the standard error of where they put the mode, in posterior sd.
    """

    theta: Tensor
    covariance: Tensor
    added: Tensor
    tilt: Tensor
    vague: float

    @property
    def correction(self) -> float:
        """By how much fine nodes move the mode, in posterior sd."""
        return float((self.covariance @ self.tilt / self.covariance.diagonal().sqrt()).abs().max())


@dataclass(frozen=True)
class _Hill:
    """The log posterior of the globals, every row integrated; ``newton_finish`` says of what."""

    bound: Bound
    module: JointNormalGuide
    plan: Layout
    rows: Rows
    gradient: Gradient | None

    def _marginal(self, theta: Tensor, batches: Iterable[Batch], n: int, curved: bool) -> Derivatives:
        def of_rows(at: Tensor) -> Iterator[Tensor]:
            return (log_marginal(self.bound, self.module, at, each, self.plan, n) for each in batches)

        return differentiate(of_rows, theta, curved, self.module.loc.dtype)

    def _prior(self, theta: Tensor, curved: bool) -> Derivatives:
        def of_globals(at: Tensor) -> Iterator[Tensor]:
            yield log_prior(self.bound, self.module, at, self.bound.example)

        return differentiate(of_globals, theta, curved, self.module.loc.dtype)

    def _sloped(self, theta: Tensor, batches: Iterable[Batch], n: int) -> Tensor:
        """Log marginal of these rows on so many nodes and its slope, (chunk, 1 + D)."""
        if self.gradient is not None:
            return self.gradient(theta, batches, n)
        found = [self._marginal(theta, [each], n, False) for each in batches]
        return torch.stack([torch.cat([value.reshape(1), slope]) for value, slope, _ in found])

    def posterior(self, theta: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Log posterior density on so many nodes, unnormalised, and its slope."""
        rows, (value, slope, _) = self._sloped(theta, self.rows.all(n), n).sum(0), self._prior(theta, False)
        return value + rows[0], slope + rows[1:]

    def view(self, theta: Tensor, bent: int, nodes: int, fine: int) -> _View:
        """The curvature on ``bent`` nodes, and what ``fine`` ones (0: none) add to so many."""
        bend = self._marginal(theta, self.rows.some(bent), bent, True)[2]
        covariance = torch.linalg.inv(_positive(-self.rows.weight * bend - self._prior(theta, True)[2]))
        if not fine:
            return _View(theta, covariance, 0.0 * theta[0], torch.zeros_like(theta), 0.0)
        value, slope, error = self._finer(theta, fine, nodes)
        vague = (covariance @ error @ covariance).diagonal() / covariance.diagonal()
        return _View(theta, covariance, value, slope, float(vague.sqrt().max()))

    def _finer(self, theta: Tensor, fine: int, coarse: int) -> Derivatives:
        """What fine nodes add to the log posterior and to its slope, and the latter's error, a covariance.

        How it varies among chunks of the rows tells the error; one chunk alone does not, NaN.
        """
        batches = list(self.rows.some(fine))
        own = self._sloped(theta, batches, fine) - self._sloped(theta, batches, coarse)
        total, n = own.sum(0), len(batches)
        counts = total.new_tensor([each.n_rows() for each in batches])
        away = (own - counts[:, None] / counts.sum() * total)[:, 1:]
        unseen = self.rows.weight * (self.rows.weight - 1)
        if unseen:
            unseen *= n / (n - 1) if n > 1 else math.nan
        return self.rows.weight * total[0], self.rows.weight * total[1:], unseen * away.mT @ away


def _climb(hill: _Hill, per_dim: int, fine: int, max_steps: int, tolerance: float) -> Newton:
    """Newton steps, halved where they overshoot, until the next is small; that one is taken, too.

    All rows have coarse nodes; what fine ones add to the slope is taken for a constant near where it was
    worked out on some. Steps go by slopes alone: values of the marginal also change as its nodes move, and
    slopes are those of nodes that stay.
    """
    theta, few = hill.module.loc.detach().double(), hill.gradient is None
    coarse = nodes = summing_nodes(hill.plan.dims, per_dim)
    here, view = hill.posterior(theta, nodes), hill.view(theta, coarse, nodes, fine)
    covariance, node_error, taken, away = view.covariance, view.correction, 0, 0.0
    while True:
        if nodes < per_dim and not view.vague <= _VAGUE:
            nodes = per_dim
            here, view = hill.posterior(theta, nodes), hill.view(theta, coarse, nodes, fine)
        slope = here[1] + view.tilt
        step = covariance @ slope
        step_sd = float((step / covariance.diagonal().sqrt()).abs().max())
        done = taken == max_steps or step_sd < (_FAR if fine and not away else tolerance)
        if away > _FAR and (done or few):
            view, away = hill.view(theta, coarse, nodes, fine), 0.0
            covariance = view.covariance
            continue
        if done:
            break
        length = min(1.0, float(_FARTHEST / step.abs().max()))
        while True:
            ahead = hill.posterior(theta + length * step, nodes)
            if step @ (ahead[1] + view.tilt) >= -0.5 * step @ slope or length <= 1e-4:  # NaN is neither
                break
            length *= 0.5
        if not few:
            covariance = _secant(covariance, length * step, here[1] - ahead[1])
        theta, here, taken, away = theta + length * step, ahead, taken + 1, away + length * step_sd
    evidence = here[0] + view.added + 0.5 * (step @ slope + torch.logdet(2 * math.pi * covariance))
    dtype = hill.module.loc.dtype
    mode, covariance = (theta + step).to(dtype), covariance.to(dtype)
    return Newton(mode, covariance, step_sd, taken, fine or nodes, node_error, float(evidence))


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
