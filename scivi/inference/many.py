"""``fit_many``: one template fitted to thousands of small data sets at once, each fit on its own.

Stars, genes, tickers, wells: a table with one dim more than the template knows holds many data sets of one
shape. Their fits are independent, and are worked out together (``slots``), which is what makes them cheap.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from scivi.errors import DataError, FitError, PlanError, Unsupported
from scivi.inference.capture import captured, stacked
from scivi.inference.discrete import left_out
from scivi.inference.ending import frozen, identity_of
from scivi.inference.gather import arranged, density, log_likelihood, reported, row_weight
from scivi.inference.opening import begin, open_data
from scivi.inference.plan import Plan
from scivi.inference.scores import particle_plate, quiet
from scivi.inference.sets import SHOWN, DataSets, open_sets
from scivi.inference.slots import Course, Slots
from scivi.inference.state import Fit, State, versions
from scivi.inference.trees import (
    IN_NATS,
    SAMPLED,
    Named,
    data_groups,
    dataset,
    labels_of,
    plain_labels,
    tree,
    units_of,
)
from scivi.inputs.batches import Batch
from scivi.models.binding import seeded, stream_seed
from scivi.models.template import Template

ESTIMATORS = ("trace", "analytic", "stl", "iwae")  # those that a batched fit knows
DRAWN_AT_ONCE = 2**22  # fits x draws x entries of a data set (our choice: 16 MB a tensor)
LIKELIHOOD_NUMBERS = 2**25  # of log likelihoods that a tree still holds (our choice: 128 MB)


def fit_many(
    template: Template, data: Any, over: str, plan: Plan | None = None, *, progress: bool = True
) -> Fits:
    """Fit a template to every one of many independent data sets of one shape.

    Each has its own parameters, optimiser, noise, stop and verdict, as if ``train`` had been called for each;
    only the first values of the parameters are common to all. That with which ``fit`` ends, the finish of the
    globals and the look beyond the guide, is left out.

    Args:
        template: what to fit.
        data: xarray, a dict of arrays, or a path of such. Some or all fields have the dim ``over`` besides
            their own; the others are common to all. Data sets of unequal length are filled up with NaN in
            observed fields, and with any valid number in given ones.
        over: the dim whose labels tell the data sets apart.
        plan: of every fit, as for ``fit``. All rows are taken at each step. ``estimator="auto"`` means
            "trace" here; "analytic", "stl" and "iwae" are known too.
        progress: show a progress bar.

    Returns:
        The fits. One that diverged more often than ``plan.restarts`` allows is named in a warning, and keeps
        its last good parameters.

    Raises:
        DataError: listing every fault with the label of its data set.
        PlanError: there are more rows than ``plan.rows_per_batch``.
        Unsupported: the estimator is none of these; the template cannot be captured, or its guide keeps
            something of the data that it was bound to.
        FitError: all diverged.

    Notes:
        Memory grows with the data, the parameters and the history (100 entries by default) of all fits; a
        signal to stop ends the run without result.
    """
    plan = plan or Plan.from_dict(template.plan)
    sets = open_sets(template, data, over, plan)
    plan = _settled(sets, plan)
    state = sets.begin(0, plan)
    _refuse_left_out(state)
    if not (state.learns and plan.steps):
        course = Course.of(len(sets), plan, ())
        course.stopped[:] = "steps" if state.learns else "nothing to learn"
        named = {**dict(state.bound.nets.named_parameters()), **dict(state.bound.nets.named_buffers())}
        course.values = {k: v.detach().expand(len(sets), *v.shape) for k, v in named.items()}
        return Fits(sets, plan, course, state)
    try:
        course = Slots(sets, plan).run(progress, template.name)
    except Unsupported as refusal:
        raise Unsupported(
            f'template "{template.name}" cannot be fitted to many data sets at once: {refusal}. '
            f"Fit them one by one with scivi.fit."
        ) from refusal
    _tell_diverged(sets, course, plan)
    return Fits(sets, plan, course, state)


def _settled(sets: DataSets, plan: Plan) -> Plan:
    """The plan with its estimator settled."""
    first = max(sets.template.row_dims, key=lambda d: sets.sizes[d])
    if plan.rows_per_batch is not None and sets.sizes[first] > plan.rows_per_batch:
        raise PlanError(
            f'each data set has {sets.sizes[first]} entries along "{first}", more than rows_per_batch = '
            f"{plan.rows_per_batch}; many fits take all rows at every step: use Plan(rows_per_batch=None), "
            f"or scivi.fit for each."
        )
    estimator = "trace" if plan.estimator == "auto" else plan.estimator
    if estimator not in ESTIMATORS:
        raise Unsupported(
            f'estimator="{estimator}" is not offered for many fits at once; use one of '
            f"{', '.join(map(repr, ESTIMATORS))}, or scivi.fit for each."
        )
    return replace(plan, estimator=estimator)


def _refuse_left_out(state: State) -> None:
    bound = state.bound
    with seeded(0, state.device), torch.no_grad(), quiet():
        discrete = left_out(bound, poutine.trace(bound.guide).get_trace(bound.example))
    if discrete:
        raise Unsupported(
            f'the guide of "{bound.template.name}" leaves out the discrete latents {discrete}, which many '
            f"fits at once do not sum; use scivi.fit for each."
        )


def _tell_diverged(sets: DataSets, course: Course, plan: Plan) -> None:
    bad = np.flatnonzero(course.stopped == "diverged")
    if not len(bad):
        return
    some = [f'"{sets.labels[k]}" at step {course.restarts[k][-1]}' for k in bad[:SHOWN].tolist()]
    more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    text = (
        f"{len(bad)} of {len(sets)} fits diverged more than {plan.restarts} times: {sets.over} "
        f"{', '.join(some)}{more}. Look at their data, or lower the learning rate (now {plan.lr:g})."
    )
    if len(bad) == len(sets):
        raise FitError(text)
    warnings.warn(text, stacklevel=3)


@dataclass(frozen=True, eq=False)
class Fits(Mapping[Any, Fit]):
    """Finished fits of one template to many data sets, by label.

    ``fits[label]`` is an ordinary ``Fit``, ``len(fits)`` their number, ``draw`` their posteriors.

    Args:
        sets: the data.
        plan: of each fit.
        course: how each went.
        state: of the first, before its first step.
    """

    sets: DataSets
    plan: Plan
    course: Course
    state: State

    @property
    def template(self) -> Template:
        """What was fitted."""
        return self.sets.template

    @property
    def over(self) -> str:
        """The dim whose labels tell the data sets apart."""
        return self.sets.over

    @property
    def labels(self) -> np.ndarray:
        """Of the data sets, in their order."""
        return self.sets.labels

    def __len__(self) -> int:
        return len(self.sets)

    def __iter__(self) -> Any:
        return iter(self.labels.tolist())

    def __repr__(self) -> str:
        kinds, counts = np.unique(self.course.stopped, return_counts=True)
        ends = ", ".join(f"{n} stopped by {kind}" for kind, n in zip(kinds, counts, strict=True))
        return f'{len(self)} fits of "{self.template.name}" over "{self.over}": {ends}'

    @cached_property
    def _places(self) -> dict[Any, int]:
        return {label: k for k, label in enumerate(self.labels.tolist())}

    def __getitem__(self, label: Any) -> Fit:
        """The fit of one data set, which ``draw``, ``predict`` and ``save`` take.

        Raises:
            DataError: there is no such label.
        """
        label = label.item() if isinstance(label, np.generic) else label
        if label not in self._places:
            few = ", ".join(map(repr, self.labels.tolist()[:SHOWN]))
            raise DataError(
                f"there is no {self.over} {label!r}; there are {few}{', ...' * (len(self) > SHOWN)}"
            )
        place, course = self._places[label], self.course
        source = open_data(self.template, self.sets.table(place))
        state = begin(self.template, source, self.plan)
        held = {**dict(state.bound.nets.named_parameters()), **dict(state.bound.nets.named_buffers())}
        with torch.no_grad():
            for name, values in course.values.items():
                held[name].copy_(values[place])
        state.step, state.stopped = int(course.step[place]), str(course.stopped[place])
        state.wall_s, state.engine = course.wall_s / len(self), dict(course.engine)
        state.restarts = [{"step": s, "site": None, "rows": []} for s in course.restarts.get(place, [])]
        entries = course.history[place] if course.columns else np.empty((0, 0))
        told = [dict(zip(course.columns, e, strict=True)) for e in entries.tolist()]
        state.history = [e for e in told if not math.isnan(e["step"])]
        identity = identity_of(self.template, source, self.plan)
        return frozen(state, source, self.plan, identity)

    def draw(self, draws: int = 1000, *, seed: int = 0) -> xr.DataTree:
        """Draw from the posterior of every data set.

        Args:
            draws: from each fit.
            seed: of the draws.

        Returns:
            Groups posterior, log_likelihood (up to 3e7 numbers), observed_data, constant_data, sample_stats
            and history, as of ``scivi.draw``, with the dim of the data sets after chain and draw. In
            sample_stats ``lp`` and ``log_q``, log densities of model and guide, whose difference is each
            fit's log weight, and ``row_log_weight`` where rows have latents of their own. In history also
            ``stopped``, ``steps`` and ``restarts`` of each fit. ``analysis.each`` takes it.

        Notes:
            Memory grows with draws x fits x entries of what is reported.
        """
        dims, entries = _Drawn.of(self, draws), max(1, *(t.numel() for t in self.sets.form.tensors))
        at_once = max(1, DRAWN_AT_ONCE // (draws * entries))
        parts: list[list[np.ndarray]] = []
        device = self.sets.tensors[0].device
        with seeded(stream_seed(seed, "draws"), device), torch.no_grad(), quiet():
            for places in torch.arange(len(self)).split(at_once):
                values = [v[places.to(device)] for v in self.course.values.values()]
                token = torch.zeros(len(places), 1, device=device)
                found = dims.function(token, *values, *self.sets.at(places))
                parts.append([t.cpu().numpy() for t in found])
        joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
        groups: dict[str, dict[str, tuple[tuple[str, ...], np.ndarray]]] = {}
        for (group, name, own), values in zip(dims.names, joined, strict=True):
            values = np.moveaxis(values, 0, 1)[None]  # (chain, draw, over, *dims)
            groups.setdefault(group, {})[name] = ((*SAMPLED, self.over, *own), values)
        return self._tree(groups, draws, seed)

    def _tree(self, sampled: Mapping[str, Named], draws: int, seed: int) -> xr.DataTree:
        sets, template = self.sets, self.template
        fields = {name: sets.source.fields[name] for name in template.told}
        coords = labels_of(template, sets.source, 1, draws)
        groups = {**sampled, **data_groups(fields, sets.source, {})}
        units = units_of(template)
        nats = dict.fromkeys(["lp", "log_q", "row_log_weight", *template.observed], "nat")
        made = {
            group: dataset(named, coords, nats if group in IN_NATS else units, sampled=False)
            for group, named in groups.items()
        }
        provenance = {
            **(identity := identity_of(template, sets.source, self.plan)),
            "data": {**identity["data"], "rows": list(template.row_dims)},
            "plan": self.plan.to_dict(),
            "seed": self.plan.seed,
            "versions": versions(),
            "method": "svi",
            "over": self.over,
            "draws": draws,
            "draw_seed": seed,
            "fit": {"engine": self.course.engine, "wall_s": round(self.course.wall_s, 3)},
        }
        return tree({**made, "history": self.history}, provenance)

    @property
    def history(self) -> xr.Dataset:
        """The objective of every fit as it went, (over, log), NaN after its end; and how each ended."""
        course, over = self.course, self.over
        restarts = np.zeros(len(self), int)
        for fit, steps in course.restarts.items():
            restarts[fit] = len(steps)
        columns = {name: ((over, "log"), course.history[..., k]) for k, name in enumerate(course.columns)}
        ends = {"stopped": (over, course.stopped), "steps": (over, course.step), "restarts": (over, restarts)}
        return xr.Dataset({**columns, **ends}, {over: np.array(plain_labels(self.labels))})


@dataclass(frozen=True)
class _Drawn:
    """Draws of one fit as a captured function, run for many.

    Args:
        function: of a token, learnt values and data, each stacked, to what ``names`` tells.
        names: group, name and dims of each result; draws lead.
    """

    function: Any
    names: Sequence[tuple[str, str, tuple[str, ...]]]

    @classmethod
    def of(cls, fits: Fits, draws: int) -> _Drawn:
        """For some draws of each."""
        sets, bound, template = fits.sets, fits.state.bound, fits.template
        names: list[tuple[str, str, tuple[str, ...]]] = []
        per_fit = sum(math.prod(sets.sizes[d] for d in template.fields[n].dims) for n in template.observed)
        likely = len(fits) * draws * per_fit <= LIKELIHOOD_NUMBERS
        keys = list(fits.course.values)

        def one(token: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
            held, data = dict(zip(keys, arguments, strict=False)), arguments[len(keys) :]
            batch, _ = sets.form.filled(data)
            found = bound.holding(held, lambda: _drawn(fits, batch, draws, likely))
            names[:] = [(group, name, dims) for group, name, dims, _ in found]
            return tuple(value for *_, value in found)

        first = [v[0].clone() for v in fits.course.values.values()]
        token = torch.zeros(1, device=sets.tensors[0].device)
        arguments = [token, *first, *sets.form.tensors]
        with seeded(0, token.device), torch.no_grad(), quiet():
            try:
                graph = captured(one, arguments, owned=list(bound.nets.parameters()))
            except Unsupported as refusal:
                raise Unsupported(
                    f'template "{template.name}" cannot be drawn for many data sets at once: {refusal}. '
                    f"Draw from each by itself: scivi.draw(fits[label], ...)."
                ) from refusal
        return cls(stacked(graph, [*[False] * (1 + len(keys)), *sets.shared]), names)


def _drawn(
    fits: Fits, batch: Batch, draws: int, likely: bool
) -> list[tuple[str, str, tuple[str, ...], Tensor]]:
    """Draws of one fit: group, name, dims and value (draw, *dims) of all that a tree tells of them."""
    bound, template = fits.state.bound, fits.template
    with particle_plate(draws, bound.nesting):
        guide = poutine.trace(bound.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)
    sampled = {"posterior": reported(bound, model, batch, draws)}
    if likely:
        sampled["log_likelihood"] = log_likelihood(template, model, batch, draws)
    found = [(group, name, *own) for group, named in sampled.items() for name, own in named.items()]
    for name, trace in (("lp", model), ("log_q", guide)):
        first, *others = template.row_dims
        total = density(bound, trace, batch, first, rows_only=False)
        for row in others:
            total = total + density(bound, trace, batch, row, rows_only=True)
        found.append(("sample_stats", name, (), arranged(total, draws, [])))
    weight = row_weight(bound, guide, model, batch, draws)
    if weight is not None:
        found.append(("sample_stats", "row_log_weight", template.row_dims[:1], weight))
    return found
