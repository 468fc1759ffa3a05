"""A PEtab problem as functions of batches: from estimated parameters to simulations and their likelihood.

values (*draw, estimated) -> p, y0 of every condition -> [solve] -> y (*draw, condition, moment, state)
-> mean, sd (*draw, condition, moment, observable) -> log likelihood, the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import sympy
import torch
from sympy import Expr
from torch import Tensor
from torch.distributions import constraints

from domains.kinetics import formulas, rates, tensors
from domains.kinetics.formulas import symbol
from domains.kinetics.networks import Network
from domains.kinetics.petab_problems import Problem
from scivi.errors import DataError, Unsupported, listed
from scivi.inputs.fields import Field
from scivi.ode.system import System

# Mean on a log scale, of one that is not above 0 (our choice: as unlikely as can be, and no NaN).
_LEAST = 1e-300


def fields(
    problem: Problem, row: str, support: constraints.Constraint = constraints.real
) -> dict[str, Field]:
    """The fields of a table of measurements.

    Args:
        problem: whether its measurements have numbers of their own.
        row: the dim that measurements of one solution share: "condition", "experiment".
        support: of what is measured.
    """
    times = (row, "moment")
    found = {
        "measured": Field((*times, "observable"), "observed", support, doc="NaN where nothing was"),
        "time": Field(times, support=constraints.nonnegative, doc="in order"),
        "at_rest": Field(times, doc="1 where the steady state was measured, whatever the time", default=0.0),
    }
    if problem.n_slots:
        found["override"] = Field((*times, "observable", "slot"), doc="numbers of a measurement's own")
    return found


class Settings(NamedTuple):
    """What the conditions are simulated with.

    Args:
        p: parameters of the system (*draw, condition, parameter).
        y0: initial states (*draw, condition, state).
        context: what observables read besides (*draw, condition, quantity).
    """

    p: Tensor
    y0: Tensor
    context: Tensor


@dataclass(frozen=True, slots=True)
class Experiments:
    """A problem made ready.

    Args:
        problem: of which it was made.
        system: of the network, with parameters of its own making.
        settings: values of the estimated parameters on the linear scale (*draw, estimated) -> ``Settings``.
        before: the same for the equilibration before, where a condition has one.
        equilibrated: whether a condition has one (condition,).
        carried: states that it hands on to the simulation, which others begin anew (condition, state).
        stops: times at which a rate jumps (condition, stop).
        totals: weights of states in the totals that no reaction changes (condition, total, state); NaN where
            the size of a compartment is estimated.
        observed: (time, y, context, values, override) -> mean and scale of the noise, as ``observed`` says.
    """

    problem: Problem
    system: System
    settings: Callable[[Tensor], Settings]
    before: Callable[[Tensor], Settings]
    equilibrated: np.ndarray
    carried: np.ndarray
    stops: np.ndarray
    totals: np.ndarray
    observed: Callable[..., tuple[Tensor, Tensor]]


def prepare(problem: Problem) -> Experiments:
    """Make a problem ready; this is where formulas are differentiated and takes a second or so.

    Raises:
        DataError: listing all faults of the problem, or what a condition makes infinite.
        Unsupported: listing jumps in time that are estimated or not understood, and compartments whose size
            changes between equilibration and simulation.
    """
    if faults := problem.faults():
        raise DataError(listed(f'the problem "{problem.name}" cannot be used:', faults))
    now, before = [], []
    for name, then in problem.rows:
        before.append(_situation(problem, then, None) if then else None)
        now.append(_situation(problem, name, before[-1]))
    everything = [each for each in (*now, *before) if each is not None]
    fixed = _constants(problem.network, everything)
    network = replace(problem.network, parameters={**problem.network.parameters, **fixed})
    moving = [name for name in network.parameters if name not in fixed]
    system, coefficients = rates.rates_in(network, moving)
    context, read = _observing(problem, network, moving)
    wanted = (coefficients, [symbol(s) for s in network.species], [symbol(name) for name in context])
    carried = np.array(
        [
            [bool(then) and s not in problem.conditions[name] for s in network.species]
            for name, then in problem.rows
        ]
    )
    _refuse_changed_volumes(problem, now, before)
    return Experiments(
        problem,
        system,
        _settings(problem, now, wanted),
        _settings(problem, [b or n for n, b in zip(now, before, strict=True)], wanted),
        np.array([bool(then) for _, then in problem.rows]),
        carried,
        _stops(problem, network, moving, now),
        _totals(problem.network, now),
        read,
    )


def unscaled(problem: Problem, scaled: Tensor) -> Tensor:
    """Estimated parameters on the linear scale, from those on their own (*draw, estimated)."""
    columns = [
        {"lin": lambda x: x, "log": torch.exp, "log10": lambda x: torch.pow(10.0, x)}[each.scale](x)
        for each, x in zip(problem.estimated, scaled.unbind(-1), strict=True)
    ]
    return tensors.stack(columns, scaled[..., 0]) if columns else scaled


def log_likelihood(problem: Problem, measured: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """Log density of each measurement m, t(m) - t(mean) ~ noise of scale sd, with t the transformation.

    On a log scale too it is the density of the measurement itself, with the factor 1 / m or 1 / (m ln 10).

    Args:
        problem: whose observables say transformation and distribution.
        measured: m (condition, moment, observable), NaN where nothing was measured.
        mean: (*draw, condition, moment, observable).
        sd: of the same shape.

    Returns:
        Of the same shape; 0 where nothing was measured.
    """
    seen = ~torch.isnan(measured)
    kinds = problem.observables
    base = mean.new_tensor([math.log(10.0) if o.transformation == "log10" else 1.0 for o in kinds])
    is_log = torch.tensor([o.is_log for o in kinds], device=mean.device)
    is_laplace = torch.tensor([o.distribution == "laplace" for o in kinds], device=mean.device)
    m, mu, scale = (torch.where(seen, x, 1.0) for x in (measured, mean, sd))
    log_m = torch.where(is_log, m, 1.0).log()
    log_mu = torch.where(is_log, mu, 1.0).clamp_min(_LEAST).log()
    residual = torch.where(is_log, (log_mu - log_m) / base, mu - m) / scale
    normal = -0.5 * residual.square() - 0.5 * math.log(2 * math.pi)
    laplace = -residual.abs() - math.log(2.0)
    jacobian = torch.where(is_log, log_m + base.log(), 0.0)
    density = torch.where(is_laplace, laplace, normal) - scale.log() - jacobian
    return torch.where(seen, density, 0.0)


def _situation(problem: Problem, condition: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """Parameters and initial values under a condition, as expressions of the estimated parameters.

    Amounts that no reaction changes stay as they were in the equilibration before, unless they are set.
    """
    net, sets = problem.network, problem.conditions[condition]
    table = {
        each.name: symbol(each.name) if each.is_estimated else formulas.number(each.nominal or 0.0)
        for each in problem.parameters
    }
    fixed: dict[str, Any] = {"time": sympy.Integer(0)}
    fixed |= {name: table[name] for name in net.parameters if name in table}
    fixed |= {} if before is None else {name: before[name] for name in net.held}
    named: dict[str, Any] = {}
    for name, value in sets.items():
        fixed.pop(name, None)
        if not isinstance(value, str):
            fixed[name] = formulas.number(value)
        elif value in table:
            fixed[name] = table[value]
        elif value != name:
            named[name] = symbol(value)
    everything = {**net.parameters, **net.initial, **net.assignments}
    read = {name: formulas.read(text) for name, text in everything.items()}
    value = formulas.within({**read, **named}, fixed)
    found = {name: value(name) for name in (*net.parameters, *net.species)}
    broken = [name for name, each in found.items() if not formulas.is_finite(each)]
    if broken:
        raise DataError(f'under the condition "{condition}" values are not finite: {", ".join(broken)}.')
    return found


def _constants(network: Network, situations: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Parameters that are one and the same number in all situations."""
    found = {name: {each[name] for each in situations} for name in network.parameters}
    return {
        k: float(next(iter(v))) for k, v in found.items() if len(v) == 1 and not next(iter(v)).free_symbols
    }


def _settings(
    problem: Problem, situations: Sequence[dict[str, Any]], wanted: Sequence[Sequence[Expr]]
) -> Callable[[Tensor], Settings]:
    """The function that works out each different expression once, and hands it to all that have it."""
    flat = [each for group in wanted for each in group]
    distinct: dict[Any, int] = {}
    places = []
    for situation in situations:
        at = {symbol(name): found for name, found in situation.items()}
        here = [each.xreplace(at) for each in flat]
        broken = [str(a) for a, b in zip(flat, here, strict=True) if not formulas.is_finite(b)]
        if broken:
            raise DataError(listed("under some condition these are not finite:", broken))
        places.append([distinct.setdefault(each, len(distinct)) for each in here])
    function = tensors.function(list(distinct), [each.name for each in problem.estimated])
    sizes, shape = [len(group) for group in wanted], (len(situations), len(flat))
    index = tensors.Constants(np.array(places, dtype=np.int64).reshape(-1))

    def settings(values: Tensor) -> Settings:
        found = tensors.stack(function(values.unbind(-1)), values.new_zeros(values.shape[:-1]))
        spread = found.index_select(-1, index.on(values)[0]).unflatten(-1, shape)
        return Settings(*spread.split(sizes, -1))

    return settings


def _observing(
    problem: Problem, network: Network, moving: Sequence[str]
) -> tuple[list[str], Callable[..., tuple[Tensor, Tensor]]]:
    """Names of the context, and the function ``Experiments.observed``."""
    table = {p.name: p for p in problem.parameters if p.name not in network.parameters}
    constant = {name: formulas.read(v) for name, v in network.parameters.items() if name not in moving}
    constant |= {n: formulas.number(p.nominal or 0.0) for n, p in table.items() if not p.is_estimated}
    free = [*moving, *network.species, "time", *(n for n, p in table.items() if p.is_estimated)]
    known = {**constant, **{name: symbol(name) for name in free}}
    value = formulas.within({k: formulas.read(text) for k, text in network.assignments.items()}, known)
    means, noises = [], []
    for k, each in enumerate(problem.observables):
        slots = {symbol(name): symbol(f"slot {k} {s}") for s, name in enumerate(each.slots)}
        for formula, into in ((each.formula, means), (each.noise, noises)):
            found = formulas.read(formula)
            names = {s: value(s.name) for s in found.free_symbols if s not in slots}  # type: ignore[union-attr]
            into.append(found.xreplace({**names, **slots}))
    used = {s.name for each in (*means, *noises) for s in each.free_symbols}
    context = [name for name in moving if name in used]
    estimated = [each.name for each in problem.estimated]
    outer = [name for name in estimated if name not in context]
    own = [(k, s) for k, o in enumerate(problem.observables) for s in range(len(o.slots))]
    slots = [f"slot {k} {s}" for k, s in own]
    function = tensors.function([*means, *noises], ["time", *network.species, *context, *outer, *slots])

    def observed(
        time: Tensor, y: Tensor, context: Tensor, values: Tensor, override: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and scale of the noise, (*draw, condition, moment, observable).

        Args:
            time: (condition, moment).
            y: (*draw, condition, moment, state).
            context: of ``Settings``.
            values: of the estimated parameters, on the linear scale.
            override: (condition, moment, observable, slot).
        """
        if override is None and problem.n_slots:
            raise DataError("the observables need numbers of their own for each measurement: override.")
        columns = [time, *y.unbind(-1), *context.unsqueeze(-2).unbind(-1)]
        columns += [values[..., estimated.index(name), None, None] for name in outer]
        if override is not None:
            columns += [override[..., k, s] for k, s in own]
        mean, sd = tensors.stack(function(columns), y[..., 0]).split(len(problem.observables), -1)
        return mean, sd

    return context, observed


def _stops(
    problem: Problem, network: Network, moving: Sequence[str], situations: Sequence[dict[str, Any]]
) -> np.ndarray:
    times = rates.discontinuities(network, moving)
    faults, found = [], []
    for label, situation in zip(problem.labels, situations, strict=True):
        at = {symbol(name): value for name, value in situation.items()}
        here: list[Any] = [each.xreplace(at) for each in times]
        for formula, value in zip(times, here, strict=True):
            names = ", ".join(sorted(str(s) for s in value.free_symbols))
            if names:
                faults.append(f'rates jump at time {formula}, which depends on {names}, in "{label}"')
        found.append(sorted(float(value) if not value.free_symbols else math.nan for value in here))
    if faults:
        what = "moments at which rates jump cannot be estimated; fix these parameters:"
        raise Unsupported(listed(what, dict.fromkeys(faults)))
    return np.array(found).reshape(len(situations), len(times))


def _totals(network: Network, situations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Weights of amounts times volumes."""
    volumes = [network.volumes.get(s, 1.0) for s in network.species]
    found = [[each[v] if isinstance(v, str) else sympy.Float(v) for v in volumes] for each in situations]
    sizes = [[math.nan if v.free_symbols else float(v) for v in each] for each in found]
    return rates.conserved(network) * np.array(sizes)[:, None]


def _refuse_changed_volumes(
    problem: Problem, now: Sequence[dict[str, Any]], before: Sequence[dict[str, Any] | None]
) -> None:
    sizes = sorted({v for v in problem.network.volumes.values() if isinstance(v, str)})
    changed = [
        f'the size of "{size}" is {then[size]} in "{row[1]}" and {here[size]} in "{row[0]}"'
        for row, here, then in zip(problem.rows, now, before, strict=True)
        if then is not None
        for size in sizes
        if then[size] != here[size]
    ]
    if changed:
        raise Unsupported(listed("compartments cannot change between equilibration and simulation:", changed))
