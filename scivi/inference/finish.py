"""The globals of a fit on the marginal of its rows: before the first step, and after the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from scivi.inference import marginal
from scivi.inference.newton import Rows, newton_finish
from scivi.inference.objective import prepare
from scivi.inference.passes import Passes
from scivi.inference.plan import Plan
from scivi.inference.polish import polish
from scivi.inference.population import weigh_globals
from scivi.inference.state import State
from scivi.inputs.batches import Batch, read_batch, some_field
from scivi.models.binding import Bound

THERE_SD, NEAR_SD = 0.3, 5.0  # posterior sd: last step of a start at the mode, of one near it (our choice)
START_ROWS = 1024  # rows of the Newton start (our choice: some percent in the globals, .2 s)
FEW_ROWS = 512  # rows up to which the population's posterior may be far from normal (our choice)
FINISH_ROWS = 2**13  # rows for curvature and fine nodes (our choice: 1 % in the globals' sd)
FINISH_NODES = 2**15  # rows x nodes of the curvature, where nodes are few (our choice, likewise)
MOST_FINE_NODES = 2**22  # rows x fine nodes of the finish (our choice: a second, 100 MB at a time)
NODES_AT_A_TIME = 2**18  # rows x nodes held at once
FEWEST_NODES = 8  # as which fewer count: a row has numbers of its own
WEIGHED_DRAWS = 100  # of the globals' normal (our choice: seconds)
WEIGHED_NODES = 2**24  # rows x nodes x these draws


def start_globals(state: State, source: Any, plan: Plan) -> None:
    """Put the globals near the mode for some rows, before the first step; leaves them alone if that fails.

    It fails, for one, where an untrained guide puts nodes so badly that the marginal is rough.
    """
    bound = state.bound
    module = marginal.global_module(bound)
    if module is None:
        return
    some = _spread_rows(source, bound, START_ROWS, marginal.layout(bound, bound.example).dims)
    rows = Rows(some, some, 1.0)
    try:
        found = newton_finish(bound, rows, plan.nodes, fine=False, max_steps=40, tolerance=THERE_SD)
    except torch.linalg.LinAlgError:  # a marginal not smooth at the prior's centre is trained from there
        return
    if not bool(torch.isfinite(found.loc).all() and torch.isfinite(found.covariance).all()):
        return
    if found.step_sd < THERE_SD:
        module.set(found.loc, found.covariance)
        state.finish["start"] = {"steps": found.steps, "step_sd": found.step_sd}
    elif found.step_sd < NEAR_SD:  # nodes of an untrained guide leave the way rough to its end
        with torch.no_grad():
            module.loc.copy_(found.loc)


def globals_alone(bound: Bound) -> bool:
    """Whether there is nothing to learn but the joint normal that the finish sets."""
    module = marginal.global_module(bound)
    own = set() if module is None else set(module.parameters())
    return bool(own) and all(p in own for p in bound.nets.parameters())


def _spread_rows(source: Any, bound: Bound, most: int, dims: int) -> Callable[[int], Iterator[Batch]]:
    """Passes over evenly spread rows, at most so many, in chunks that suit the number of nodes."""
    template, some = bound.template, some_field(bound.example)
    first = template.row_dims[0]
    n = source.sizes[first]
    count = min(most, n)

    def passes(per_dim: int) -> Iterator[Batch]:
        at_a_time = max(64, NODES_AT_A_TIME // max(FEWEST_NODES, marginal.n_nodes(dims, per_dim)))
        size = count // math.ceil(count / at_a_time)  # equal chunks, and a few rows left over
        for start in range(0, count, size):
            places = np.arange(start, min(count, start + size))
            index = {first: places if count == n else places * (n - 1) // max(1, count - 1)}
            yield read_batch(source, template.fields, template.row_dims, index, some)

    return passes


def finish_globals(state: State, source: Any, plan: Plan) -> None:
    """Finish the globals on the full marginal, where estimator and guide allow it.

    Many rows make their posterior normal: Newton finds its mode and covariance. Of few rows it is skewed, and
    an evaluation is cheap: adaptive importance sampling finds its mean and covariance.
    """
    bound = state.bound
    with state.sampling(), torch.no_grad():
        module = marginal.global_module(bound)
        if not plan.newton or module is None:
            return
        objective = prepare(bound, bound.example, plan)
        if objective.estimator != "marginal":
            return
    n = source.sizes[bound.template.row_dims[0]]
    rows = _rows_of(bound, source, plan, objective.layout.dims)
    with state.sampling():
        if n <= FEW_ROWS:
            found = polish(bound, rows, plan.nodes)
            told: dict[str, Any] = {"method": "importance sampling", "draws": len(found.points)}
            told |= {"ess": found.ess, "log_weight": list(found.log_weight), "points": found.points.tolist()}
        else:
            dims = marginal.layout(bound, bound.example).dims
            work = n * marginal.n_nodes(dims, marginal.summing_nodes(dims, plan.nodes))
            gradient = Passes(bound, module, plan, work)
            found = newton_finish(bound, rows, plan.nodes, gradient=gradient)
            told = {"method": "newton", "steps": found.steps, "step_sd": found.step_sd, "nodes": found.nodes}
            told |= {"node_error_sd": found.node_error_sd, "log_evidence": found.log_evidence}
    moved = (found.loc - module.loc.detach()) / found.covariance.diagonal().sqrt()
    module.set(found.loc, found.covariance)
    if "log_weight" not in told:
        with state.sampling(), torch.no_grad():
            theta = module.distribution().sample((WEIGHED_DRAWS,))
            weight = weigh_globals(bound, source, theta, WEIGHED_NODES)
        told |= {} if weight is None else {"log_weight": weight.tolist()}
    state.finish |= {**told, "moved_sd": float(moved.abs().max())}


def _rows_of(bound: Bound, source: Any, plan: Plan, dims: int) -> Rows:
    """Passes over all rows, and over as many as curvature and fine nodes are worth."""
    n = source.sizes[bound.template.row_dims[0]]
    coarse = marginal.n_nodes(dims, marginal.summing_nodes(dims, plan.nodes))
    most = MOST_FINE_NODES // marginal.n_nodes(dims, marginal.fine_nodes(plan.nodes))
    some = min(n, max(1, most), max(FINISH_ROWS, FINISH_NODES // coarse))
    return Rows(_spread_rows(source, bound, n, dims), _spread_rows(source, bound, some, dims), n / some)
