"""What a PEtab problem says besides its measurements: a network, its conditions, observables and parameters.

References:
    Schmiester et al. 2021, PEtab -- Interoperable specification of parameter estimation problems in systems
    biology, PLoS Comput. Biol. 17, e1008646; PEtab data format specification 1.0, petab.readthedocs.io.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np

from domains.kinetics import formulas
from domains.kinetics.networks import (
    Network,
    Value,
    entries_of,
    is_number,
    missing_or_unknown,
    no_tables,
    plain,
)
from scivi.errors import DataError, TemplateError, listed

SCALES = ("lin", "log", "log10")
DISTRIBUTIONS = ("normal", "laplace")
PRIORS = (  # each has two parameters
    *("uniform", "normal", "laplace", "logNormal", "logLaplace"),
    *("parameterScaleUniform", "parameterScaleNormal", "parameterScaleLaplace"),
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A row of the parameter table.

    Args:
        name: of the parameter.
        scale: on which it is estimated: "lin", "log" or "log10".
        lower: bound, on the linear scale; None if there is none.
        upper: bound.
        nominal: value, on the linear scale.
        is_estimated: whether it is; else it keeps the nominal value.
        prior: type of the objective's prior, in PEtab's words; "" if there is none.
        prior_parameters: of that prior.
    """

    name: str
    scale: str = "lin"
    lower: float | None = None
    upper: float | None = None
    nominal: float | None = None
    is_estimated: bool = True
    prior: str = ""
    prior_parameters: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prior_parameters", tuple(self.prior_parameters))

    @property
    def label(self) -> str:
        """Its name, with its scale."""
        return self.name if self.scale == "lin" else f"{self.scale} {self.name}"

    def faults(self) -> list[str]:
        """What cannot be right in it."""
        found, low, high = [], self.lower, self.upper
        if self.scale not in SCALES:
            found.append(f"its scale is {self.scale!r}; it must be one of {', '.join(SCALES)}")
        if not self.is_estimated and self.nominal is None:
            found.append("it is not estimated, and has no nominal value")
        elif self.nominal is not None and not is_number(self.nominal):
            found.append(f"its nominal value is {self.nominal!r}; it must be a finite number")
        bounded = is_number(low) and is_number(high) and low < high  # type: ignore[operator]
        if self.is_estimated and not bounded:
            found.append(f"its bounds are {low} and {high}; the lower must be below the upper, both finite")
        elif self.is_estimated and low is not None and self.scale in ("log", "log10") and low <= 0:
            found.append(f"its lower bound is {low:g}; on the scale {self.scale} it must be above 0")
        elif self.is_estimated and self.prior in PRIORS:
            found += self._faults_of_prior()
        if self.prior and self.prior not in PRIORS:
            found.append(f"its prior is {self.prior!r}; it must be one of {', '.join(PRIORS)}")
        return [f'parameter "{self.name}": {fault}' for fault in found]

    def _faults_of_prior(self) -> list[str]:
        """What cannot be right in it, where the bounds are."""
        found, numbers, kind = [], self.prior_parameters, self.prior.removeprefix("parameterScale")
        low, high = float(self.lower or 0.0), float(self.upper or 0.0)
        if kind.startswith("log") and low < 0:
            found.append(f"its lower bound is {low:g}; the prior {self.prior!r} has nothing below 0")
        if not numbers:
            return found
        told = f"its prior {self.prior!r} has {'; '.join(map(str, numbers))}"
        if len(numbers) != 2:
            return [*found, f"its prior {self.prior!r} needs two parameters, not {len(numbers)}"]
        if not all(map(is_number, numbers)):
            return [*found, f"{told}, which are no finite numbers"]
        first, second = numbers
        if kind.lower() != "uniform" and second <= 0:
            found.append(f"{told}; its scale must be above 0")
        elif kind.lower() == "uniform":
            if self.prior != "uniform" and self.scale != "lin":
                low, high = (
                    math.log(x) / (1.0 if self.scale == "log" else math.log(10)) for x in (low, high)
                )
            if not max(first, low) < min(second, high):
                found.append(f"{told}; between these and its bounds nothing is left")
        return found


@dataclass(frozen=True, slots=True)
class Observable:
    """A quantity that was measured, with the noise that it was measured with.

    Args:
        name: of the observable.
        formula: of species, parameters, assignments, ``time`` and the slots.
        noise: formula of the noise's scale: the standard deviation, or the scale of a Laplace distribution.
        transformation: on which the noise is added: "lin", "log" or "log10".
        distribution: of the noise, "normal" or "laplace".
        slots: names in the formulas that are numbers of a measurement's own.
    """

    name: str
    formula: str
    noise: str
    transformation: str = "lin"
    distribution: str = "normal"
    slots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(self.slots))

    @property
    def is_log(self) -> bool:
        """Whether the noise is added on a log scale."""
        return self.transformation != "lin"


@dataclass(frozen=True, slots=True)
class Problem:
    """A network under several conditions, and what is seen of it.

    Args:
        network: the reactions.
        parameters: the parameter table.
        observables: the kinds of measurement. Measurements of one observable that name different parameters
            are different kinds.
        conditions: what each sets, by name: parameters, compartments, and initial values of species, to a
            number or to the value of a parameter. What it does not set is as in the network.
        rows: the experiments: names of the condition simulated and of the one equilibrated before, or "".
        name: of the problem.
    """

    network: Network
    parameters: tuple[Parameter, ...]
    observables: tuple[Observable, ...]
    conditions: Mapping[str, Mapping[str, Value]]
    rows: tuple[tuple[str, str], ...]
    name: str = "problem"

    def __post_init__(self) -> None:
        for each in ("parameters", "observables"):
            object.__setattr__(self, each, tuple(getattr(self, each)))
        if wrong := [row for row in self.rows if isinstance(row, str) or len(row) != 2]:
            told = (f'{row!r} is no pair; write (condition, "") or (condition, before)' for row in wrong)
            raise TemplateError(listed("the rows of the problem cannot be read:", told))
        object.__setattr__(self, "rows", tuple((now, before) for now, before in self.rows))
        conditions = {name: MappingProxyType(dict(sets)) for name, sets in self.conditions.items()}
        object.__setattr__(self, "conditions", MappingProxyType(conditions))

    @property
    def estimated(self) -> tuple[Parameter, ...]:
        """The parameters that are estimated, in the order of the table."""
        return tuple(each for each in self.parameters if each.is_estimated)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each row."""
        often = Counter(now for now, _ in self.rows)
        return tuple(f"{now} after {then}" if then and often[now] > 1 else now for now, then in self.rows)

    @property
    def n_slots(self) -> int:
        """Most numbers of its own that a measurement has."""
        return max((len(each.slots) for each in self.observables), default=0)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return plain(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Problem:
        """From what ``to_dict`` gave, or JSON made of it.

        Raises:
            TemplateError: listing entries that no problem has, or that are missing.
        """
        faults = [*missing_or_unknown(cls, table), *no_tables(table, ("conditions",))]
        if not faults:
            faults += [
                f"conditions: {fault}" for fault in no_tables(table["conditions"], table["conditions"])
            ]
        for key, kind in (("parameters", Parameter), ("observables", Observable)):
            for k, each in enumerate(entries_of(table, key, faults)):
                faults += [f"{key}, {k + 1}: {fault}" for fault in missing_or_unknown(kind, each)]
        if faults:
            raise TemplateError(listed("the problem cannot be read:", faults))
        made: dict[str, Any] = {"network": Network.from_dict(table["network"])}
        made["parameters"] = tuple(Parameter(**each) for each in table["parameters"])
        made["observables"] = tuple(Observable(**each) for each in table["observables"])
        return cls(**{**table, **made})

    def faults(self) -> list[str]:
        """What cannot be right in it."""
        net, table = self.network, {each.name for each in self.parameters}
        found = [*net.faults(), *(fault for each in self.parameters for fault in each.faults())]
        several = {"parameter": [p.name for p in self.parameters], "row": self.rows}
        for kind, names in {**several, "observable": [o.name for o in self.observables]}.items():
            found += [f"there are two {kind}s {name}" for name, often in Counter(names).items() if often > 1]
        ruled = sorted(table & {*net.species, *net.assignments})
        found += [f'parameter "{name}" is a species or has a rule in the network' for name in ruled]
        for name, sets in self.conditions.items():
            found += [f'condition "{name}": {fault}' for fault in _faults_of_sets(net, table, sets)]
        unknown = {name for row in self.rows for name in row if name} - {*self.conditions}
        found += [f'there is no condition "{name}"' for name in sorted(unknown)]
        known = table | {*net.species, *net.parameters, *net.assignments, "time"}
        for each in self.observables:
            found += [f'observable "{each.name}": {fault}' for fault in _faults_of_observable(each, known)]
        if not self.rows:
            found.append("nothing is simulated: there are no rows")
        if not self.observables:
            found.append("nothing is measured: there are no observables")
        found = list(dict.fromkeys(found))
        return found or [*_unused(self), *_not_positive(self)]


def faults_of_data(
    problem: Problem, values: Mapping[str, np.ndarray], coords: Mapping[str, Any] | None = None
) -> list[str]:
    """Where a table of measurements contradicts itself or the problem.

    Args:
        problem: without faults.
        values: ``time`` (condition, moment) and ``measured`` (condition, moment, observable), NaN where
            nothing was measured.
        coords: names of conditions and observables, if the table has them.
    """
    time, measured = np.asarray(values["time"], float), np.asarray(values["measured"], float)
    names = {"condition": problem.labels, "observable": tuple(each.name for each in problem.observables)}
    found = []
    for dim, expected in names.items():
        given = tuple(map(str, np.asarray((coords or {}).get(dim, expected)).tolist()))
        if given != expected:
            found.append(f"the {dim}s are {', '.join(given)}; the problem has {', '.join(expected)}")
    shape = (len(problem.rows), time.shape[-1], len(problem.observables))
    if time.shape != shape[:2] or measured.shape != shape:
        return [
            *found,
            f"time is {time.shape} and measured {measured.shape}; they need {shape[:2]} and {shape}",
        ]
    for row, label in enumerate(problem.labels):
        if np.isnan(time[row]).any() or (time[row] < 0).any():
            found.append(f'condition "{label}": times must be numbers >= 0')
        elif (time[row, 1:] < time[row, :-1]).any():
            found.append(f'condition "{label}": the times are out of order')
    return [*found, *faults_of_levels(problem, measured)]


def faults_of_levels(problem: Problem, measured: np.ndarray) -> list[str]:
    """Measurements (..., observable) that cannot be: infinite, or not above 0 on a log scale."""
    infinite = int(np.isinf(measured).sum())
    found = [f"{infinite} measurements are infinite"] if infinite else []
    for k, each in enumerate(problem.observables):
        low = int((measured[..., k] <= 0).sum())
        if low and each.is_log:
            found.append(f'observable "{each.name}": {low} measurements are not above 0, on a log scale')
    return found


def _faults_of_sets(net: Network, table: set[str], sets: Mapping[str, Value]) -> Iterable[str]:
    amounts = ({*net.species} - {*net.signed}) | {*net.held}
    for name, value in sets.items():
        if name in net.assignments:
            yield f'"{name}" has a rule in the network; a condition cannot set it'
        elif name not in net.parameters and name not in net.species:
            yield f'"{name}" is neither a parameter nor a species of the network'
        elif name in table:
            yield f'"{name}" is in the parameter table as well'
        if isinstance(value, str):
            if value not in table and value not in net.parameters:
                yield f'"{name}" is "{value}", which is no parameter'
        elif not is_number(value) or (name in amounts and value < 0):
            told = f"{value:g}" if isinstance(value, Real) else repr(value)
            yield f'"{name}" is {told}; it must be finite' + (" and >= 0" if name in amounts else "")


def _unused(problem: Problem) -> Iterable[str]:
    """Estimated parameters that nothing depends on: most likely their names are not those that were meant."""
    used = {*problem.network.parameters, *(v for sets in problem.conditions.values() for v in sets.values())}
    for each in problem.observables:
        used |= formulas.names(each.formula) | formulas.names(each.noise)
    for each in problem.estimated:
        if each.name not in used:
            yield f'parameter "{each.name}" is estimated, and used nowhere in the network or the observables'


def _not_positive(problem: Problem) -> Iterable[str]:
    """Amounts that begin below 0 and scales of noise that are not above it, whatever is estimated."""
    net, table = problem.network, {each.name: each for each in problem.parameters}
    fixed = {n: formulas.number(float(p.nominal or 0.0)) for n, p in table.items() if not p.is_estimated}
    open_to = {n: formulas.symbol(n) for n, p in table.items() if p.is_estimated}
    text = {**net.parameters, **net.initial, **net.assignments}
    for condition, sets in problem.conditions.items():
        where = f'under the condition "{condition}" the initial value of'
        given = {**fixed, **open_to, "time": formulas.TIME}
        given |= {k: given[v] if v in given else formulas.read(v) for k, v in sets.items()}
        rest = {name: formulas.read(value) for name, value in text.items() if name not in given}
        value = formulas.within(rest, given)
        for name in (*net.species, *net.held):
            if name not in net.signed and (told := _least(value(name), table)):
                yield f'{where} "{name}" {told}; it must be finite and >= 0'
    for each in problem.observables:
        noise = formulas.read(each.noise)
        at = {s: fixed[s.name] for s in noise.free_symbols if s.name in fixed}  # type: ignore[union-attr]
        found: Any = noise.xreplace(at)
        if found == 0:
            yield f'observable "{each.name}": its noise is 0; it must be above 0'
        elif told := _least(found, table):
            yield f'observable "{each.name}": its noise {told}; it must be above 0'


def _least(found: Any, table: Mapping[str, Parameter]) -> str:
    """How an expression is negative: as a number, or at the lower bound of the parameter that it is."""
    if not formulas.is_finite(found):
        return "is no finite real number"
    if found.is_number:
        return f"is {float(found):g}" if float(found) < 0 else ""
    each = table.get(found.name) if found.is_Symbol else None
    below = each is not None and each.is_estimated and each.scale == "lin" and float(each.lower or 0.0) < 0
    return f'may be as low as {each.lower:g}, the lower bound of "{each.name}"' if each and below else ""


def _faults_of_observable(each: Observable, known: set[str]) -> Iterable[str]:
    if each.transformation not in SCALES:
        yield f"its transformation is {each.transformation!r}; it must be one of {', '.join(SCALES)}"
    if each.distribution not in DISTRIBUTIONS:
        yield f"its noise is {each.distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}"
    for what, formula in (("formula", each.formula), ("noise", each.noise)):
        if not isinstance(formula, str | Real):
            yield f"its {what} is {formula!r}; it must be a number or a formula"
            continue
        try:
            unknown = sorted(formulas.names(formula) - known - {*each.slots})
        except DataError as error:
            yield f"{what}: {error}"
            continue
        yield from (f'its {what} uses "{name}", which nothing defines' for name in unknown)
