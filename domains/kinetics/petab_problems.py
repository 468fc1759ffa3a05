"""What a PEtab problem says besides its measurements: a network, its conditions, observables and parameters.

References:
    Schmiester et al. 2021, PEtab -- Interoperable specification of parameter estimation problems in systems
    biology, PLoS Comput. Biol. 17, e1008646; PEtab data format specification 1.0, petab.readthedocs.io.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from domains.kinetics import formulas
from domains.kinetics.networks import Network, Value, missing_or_unknown
from scivi.errors import DataError, TemplateError, listed

SCALES = ("lin", "log", "log10")
DISTRIBUTIONS = ("normal", "laplace")
PRIORS = {
    **dict.fromkeys(("uniform", "normal", "laplace", "logNormal", "logLaplace"), 2),
    **dict.fromkeys(("parameterScaleUniform", "parameterScaleNormal", "parameterScaleLaplace"), 2),
}


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

    def faults(self) -> list[str]:
        """What cannot be right in it."""
        found, low, high = [], self.lower, self.upper
        if self.scale not in SCALES:
            found.append(f"its scale is {self.scale!r}; it must be one of {', '.join(SCALES)}")
        if not self.is_estimated and (self.nominal is None or not math.isfinite(self.nominal)):
            found.append("it is not estimated, and has no nominal value")
        if self.is_estimated and (low is None or high is None or not low < high):
            found.append(f"its bounds are {low} and {high}; the lower must be below the upper")
        elif self.is_estimated and low is not None and self.scale != "lin" and low <= 0:
            found.append(f"its lower bound is {low:g}; on the scale {self.scale} it must be above 0")
        if self.prior and self.prior not in PRIORS:
            found.append(f"its prior is {self.prior!r}; it must be one of {', '.join(PRIORS)}")
        elif self.prior and self.prior_parameters and len(self.prior_parameters) != PRIORS[self.prior]:
            found.append(f"its prior {self.prior!r} needs two parameters, not {len(self.prior_parameters)}")
        return [f'parameter "{self.name}": {fault}' for fault in found]


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
        object.__setattr__(self, "rows", tuple((now, before) for now, before in self.rows))
        plain = {name: MappingProxyType(dict(sets)) for name, sets in self.conditions.items()}
        object.__setattr__(self, "conditions", MappingProxyType(plain))

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
        return {
            "network": self.network.to_dict(),
            "parameters": [_plain(asdict(each)) for each in self.parameters],
            "observables": [_plain(asdict(each)) for each in self.observables],
            "conditions": {name: dict(sets) for name, sets in self.conditions.items()},
            "rows": [list(row) for row in self.rows],
            "name": self.name,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Problem:
        """From what ``to_dict`` gave, or JSON made of it.

        Raises:
            TemplateError: listing entries that no problem has, or that are missing.
        """
        faults = missing_or_unknown(cls, table, [f.name for f in fields(cls) if f.name != "name"])
        for key, kind, needed in (
            ("parameters", Parameter, ("name",)),
            ("observables", Observable, ("name", "formula", "noise")),
        ):
            for k, each in enumerate(table.get(key, ())):
                faults += [f"{key}, {k + 1}: {fault}" for fault in missing_or_unknown(kind, each, needed)]
        if faults:
            raise TemplateError(listed("the problem cannot be read:", faults))
        return cls(
            network=Network.from_dict(table["network"]),
            parameters=tuple(Parameter(**each) for each in table["parameters"]),
            observables=tuple(Observable(**each) for each in table["observables"]),
            conditions=table["conditions"],
            rows=tuple((now, before) for now, before in table["rows"]),
            name=table.get("name", "problem"),
        )

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
        return list(dict.fromkeys(found))


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
    if np.isinf(measured).any():
        found.append(f"{int(np.isinf(measured).sum())} measurements are infinite")
    for k, each in enumerate(problem.observables):
        low = int((measured[..., k] <= 0).sum())
        if low and each.transformation != "lin":
            found.append(f'observable "{each.name}": {low} measurements are not above 0, on a log scale')
    return found


def at_nominal(problem: Problem) -> np.ndarray:
    """Nominal values of the estimated parameters, on the linear scale.

    Raises:
        DataError: listing those that have none.
    """
    lacking = [each.name for each in problem.estimated if each.nominal is None]
    if lacking:
        raise DataError(f"there is no nominal value of {', '.join(lacking)}.")
    return np.array([each.nominal for each in problem.estimated], float)


def with_fixed(problem: Problem, values: Mapping[str, float]) -> Problem:
    """A problem in which some parameters are not estimated but have these values."""
    unknown = sorted({*values} - {each.name for each in problem.parameters})
    if unknown:
        raise DataError(f"there is no parameter {', '.join(unknown)} in the problem.")
    parameters = tuple(
        replace(each, nominal=float(values[each.name]), is_estimated=False) if each.name in values else each
        for each in problem.parameters
    )
    return replace(problem, parameters=parameters)


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in table.items()}


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
        elif not math.isfinite(value) or (name in amounts and value < 0):
            yield f'"{name}" is {value:g}; it must be finite' + (" and >= 0" if name in amounts else "")


def _faults_of_observable(each: Observable, known: set[str]) -> Iterable[str]:
    if each.transformation not in SCALES:
        yield f"its transformation is {each.transformation!r}; it must be one of {', '.join(SCALES)}"
    if each.distribution not in DISTRIBUTIONS:
        yield f"its noise is {each.distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}"
    for what, formula in (("formula", each.formula), ("noise", each.noise)):
        try:
            unknown = sorted(formulas.names(formula) - known - {*each.slots})
        except DataError as error:
            yield f"{what}: {error}"
            continue
        yield from (f'its {what} uses "{name}", which nothing defines' for name in unknown)
