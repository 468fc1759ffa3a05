"""Reaction networks as plain values: names, numbers and formulas in text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any

from domains.kinetics import formulas
from scivi.errors import DataError, TemplateError, listed

Value = float | str  # a number or a formula

_ARROW = re.compile(r"\s*(<->|<=>|->|=>)\s*")
_TERM = re.compile(r"\s*(\d+(?:\.\d+)?)?\s*\*?\s*([A-Za-z_]\w*)\s*", re.ASCII)
_NOTHING = {"", "0", "∅"}


@dataclass(frozen=True, slots=True)
class Reaction:
    """What changes by one event, and how many events there are.

    Args:
        name: of the reaction.
        change: net change of the amount of each species by one event.
        rate: events per time, a formula of species, parameters, assignments and ``time``. It is an amount per
            time, also where species are concentrations; with volumes of 1 the two are the same.
    """

    name: str
    change: Mapping[str, float]
    rate: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "change", MappingProxyType(dict(self.change)))


@dataclass(frozen=True, slots=True)
class Network:
    """A reaction network, d[X]/dt = sum over reactions of change of X * rate / volume of X.

    A state that follows an equation of its own is a "reaction" that changes it alone, by 1.

    Args:
        species: names of the states.
        reactions: what changes them.
        parameters: number of each, or a formula of other parameters and of initial values of species.
        initial: value of each species at time 0, a number or such a formula.
        assignments: formulas that hold at any time, by name.
        volumes: of the compartment that a species is a concentration in, a number or the name of a parameter;
            1 for those that are not here.
        signed: species that may be negative, for they are no amounts.
        held: parameters that are amounts which no reaction changes.
        name: of the network.
    """

    species: tuple[str, ...]
    reactions: tuple[Reaction, ...]
    parameters: Mapping[str, Value]
    initial: Mapping[str, Value]
    assignments: Mapping[str, str] = field(default_factory=dict)
    volumes: Mapping[str, Value] = field(default_factory=dict)
    signed: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    name: str = "network"

    def __post_init__(self) -> None:
        for each in ("species", "reactions", "signed", "held"):
            object.__setattr__(self, each, tuple(getattr(self, each)))
        for each in ("parameters", "initial", "assignments", "volumes"):
            object.__setattr__(self, each, MappingProxyType(dict(getattr(self, each))))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return plain(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Network:
        """From what ``to_dict`` gave, or JSON made of it.

        Raises:
            TemplateError: listing entries that no network has, or that are missing.
        """
        faults = missing_or_unknown(cls, table)
        faults += [
            f"reaction {k + 1}: {fault}"
            for k, each in enumerate(entries_of(table, "reactions", faults))
            for fault in (*missing_or_unknown(Reaction, each), *no_tables(each, ("change",)))
        ]
        faults += no_tables(table, ("parameters", "initial", "assignments", "volumes"))
        if faults:
            raise TemplateError(listed("the network cannot be read:", faults))
        return cls(**{**table, "reactions": tuple(Reaction(**each) for each in table["reactions"])})

    def faults(self) -> list[str]:
        """What cannot be right in it."""
        kinds = {"species": self.species, "parameter": self.parameters, "assignment": self.assignments}
        faults = _faults_of_names(kinds)
        static = {*self.parameters, *self.species, *self.assignments}
        for name, formula in (*self.parameters.items(), *self.initial.items()):
            faults += _faults_of(f'the value of "{name}"', formula, static)
        for name, formula in self.assignments.items():
            faults += _faults_of(f'the assignment of "{name}"', formula, static | {"time"})
        for reaction in self.reactions:
            where = f'the rate of "{reaction.name}"'
            faults += _faults_of(where, reaction.rate, static | {"time"})
            unknown = [name for name in reaction.change if name not in self.species]
            faults += [f'"{reaction.name}" changes "{name}", which is no species' for name in unknown]
            faults += [
                f'"{reaction.name}" changes "{name}" by {by!r}, which is no finite number'
                for name, by in reaction.change.items()
                if not is_number(by)
            ]
        if not self.species:
            faults.append("there are no species")
        faults += [f'species "{s}" has no initial value' for s in self.species if s not in self.initial]
        faults += [
            f'there is an initial value of "{name}", which is no species'
            for name in self.initial
            if name not in self.species
        ]
        amounts = {s: self.initial[s] for s in self.species if s in self.initial and s not in self.signed}
        amounts |= {name: self.parameters[name] for name in self.held if name in self.parameters}
        faults += [
            f'the initial value of "{name}" is {value:g}; it cannot be negative'
            for name, value in amounts.items()
            if not isinstance(value, str) and is_number(value) and value < 0
        ]
        for name, volume in self.volumes.items():
            if isinstance(volume, str) and volume not in self.parameters:
                faults.append(f'the volume of "{name}" is "{volume}", which is no parameter')
            value = self.parameters.get(volume, 1.0) if isinstance(volume, str) else volume
            if not isinstance(value, str) and not (is_number(value) and value > 0):
                told = f"{value:g}" if is_number(value) else repr(value)
                faults.append(f'the volume of "{name}" is {told}; it must be above 0')
        return faults or self._circles()

    def _circles(self) -> list[str]:
        everything = {**self.parameters, **self.initial, **self.assignments}
        value = formulas.within({name: formulas.read(text) for name, text in everything.items()}, {})
        try:
            for name in everything:
                value(name)
        except DataError as error:
            return [str(error)]
        return []


def network(
    reactions: Mapping[str, Value | tuple[Value, Value]],
    *,
    initial: Mapping[str, Value],
    parameters: Mapping[str, float] | None = None,
    assignments: Mapping[str, str] | None = None,
    name: str = "network",
) -> Network:
    """A network from reactions as one writes them, with volumes of 1.

    A reaction is "A + B -> C", "2 A -> B", "0 -> A" or "A -> 0"; "A + B <-> C" is two, and takes two rates.
    A rate is one of:

    - a number, or a formula without species: the rate coefficient of mass action. "2 A -> B" at "k" has k A^2
      events per time, each of which takes two A and makes one B.
    - a formula that names a species, such as "V * A / (K + A)": the rate itself.

    Args:
        reactions: the rate of each.
        initial: value of each species at time 0, a number or a formula of parameters.
        parameters: a number for each name that formulas use.
        assignments: formulas that hold at any time, by name; they may use ``time``.
        name: of the network.

    Raises:
        TemplateError: listing all that is wrong.

    Example:
        >>> binding = network({"A + B <-> C": ("on", "off")}, initial={"A": 1, "B": 1, "C": 0},
        ...                   parameters={"on": 2.0, "off": 0.1})
        >>> [reaction.rate for reaction in binding.reactions]
        ['on * A * B', 'off * C']
    """
    faults: list[str] = []
    read = {arrow: [*_one_way(arrow, rate, faults)] for arrow, rate in reactions.items()}
    parts = [part for found in read.values() for part in found]
    species = tuple(dict.fromkeys(s for _, left, right, _ in parts for s in (*left, *right)))
    made = []
    for arrow, left, right, rate in parts:
        change = {s: right.get(s, 0) - left.get(s, 0) for s in (*left, *right)}
        change = {s: by for s, by in change.items() if by}
        made.append(Reaction(arrow, change, _rate_text(arrow, left, rate, species, faults)))
    found = Network(species, tuple(made), parameters or {}, initial, assignments or {}, name=name)
    # a name that only a reaction which cannot be read has is no further fault
    unread = " ".join(str(arrow) for arrow, found_in in read.items() if not found_in)
    besides = {
        f'there is an initial value of "{name}", which is no species'
        for name in re.findall(r"[A-Za-z_]\w*", unread, re.ASCII)
    }
    besides |= {"there are no species"} if unread else set()
    faults += [each for each in found.faults() if each not in besides]
    if faults:
        raise TemplateError(listed("the network cannot be used:", dict.fromkeys(faults)))
    return found


def plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists, however deep."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, tuple) else value


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no text that says one."""
    return isinstance(value, Real) and math.isfinite(value)


def missing_or_unknown(cls: Any, table: Any) -> list[str]:
    """What a table of plain values lacks to be one of a class, and has too much."""
    if not isinstance(table, Mapping):
        return [f"it is {table!r}, and no table of what a {cls.__name__.lower()} has"]
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    return [
        *(f'"{name}" is missing' for name, is_needed in known.items() if is_needed and name not in table),
        *(f'there is no "{name}" in a {cls.__name__.lower()}' for name in table if name not in known),
    ]


def no_tables(table: Any, keys: Iterable[str]) -> list[str]:
    """Entries of a table of plain values that should be tables and are not."""
    found = table if isinstance(table, Mapping) else {}
    return [
        f'"{key}" is {found[key]!r}, and no table'
        for key in keys
        if key in found and not isinstance(found[key], Mapping)
    ]


def entries_of(table: Any, key: str, faults: list[str]) -> Sequence[Any]:
    """A list in a table of plain values; none, and a fault, if it is something else."""
    found = table.get(key, ()) if isinstance(table, Mapping) else ()
    if isinstance(found, Sequence) and not isinstance(found, str):
        return found
    faults.append(f'"{key}" is {found!r}, and no list')
    return ()


def _one_way(
    arrow: Any, rate: Any, faults: list[str]
) -> Iterable[tuple[str, dict[str, float], dict[str, float], Any]]:
    """Both directions of a reaction, each with its name, reactants, products and rate."""
    left, sign, right = [*_ARROW.split(arrow if isinstance(arrow, str) else ""), "", ""][:3]
    both, pair = sign in {"<->", "<=>"}, not isinstance(rate, str) and isinstance(rate, Sequence)
    if not sign or len(_ARROW.findall(arrow)) > 1:
        faults.append(f'"{arrow}" is no reaction; write one like "A + B -> C"')
    elif both != pair or (pair and len(rate) != 2):
        faults.append(f'"{arrow}" needs {"two rates, forth and back" if both else "one rate"}')
    else:
        here, there = _terms(left, arrow, faults), _terms(right, arrow, faults)
        yield f"{left} -> {right}".strip(), here, there, rate[0] if both else rate
        if both:
            yield f"{right} -> {left}".strip(), there, here, rate[1]


def _terms(side: str, arrow: str, faults: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    if side.strip() in _NOTHING:
        return found
    for term in side.split("+"):
        match = _TERM.fullmatch(term)
        if match is None:
            faults.append(f'"{arrow}": "{term.strip()}" is no species; write "A" or "2 A"')
        else:
            found[match[2]] = found.get(match[2], 0) + float(match[1] or 1)
    return found


def _rate_text(
    arrow: str, left: Mapping[str, float], rate: Value, species: Sequence[str], faults: list[str]
) -> str:
    if not isinstance(rate, str) and not (is_number(rate) and rate >= 0):
        faults.append(f'"{arrow}": its rate is {rate!r}; it must be a formula, or a number >= 0')
        return "0"
    text = repr(float(rate)) if not isinstance(rate, str) else rate.strip()
    try:
        used = formulas.names(text)
    except DataError:
        return text  # of which ``Network.faults`` tells
    if used & set(species):
        return text
    if any(n != int(n) for n in left.values()):
        faults.append(f'"{arrow}": mass action needs whole numbers of reactants; write the rate out')
    factor = text if re.fullmatch(r"[\w.]+", text) else f"({text})"
    return " * ".join([factor, *(s if n == 1 else f"{s}^{n:g}" for s, n in left.items())])


def _faults_of_names(kinds: Mapping[str, Iterable[str]]) -> list[str]:
    faults, seen = [], dict[str, str]()
    for kind, names in kinds.items():
        for name in names:
            if name in seen:
                faults.append(f'"{name}" is the name of a {seen[name]} and of a {kind}')
            elif name.lower() in formulas.RESERVED or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                faults.append(f'a {kind} cannot be called "{name}"')
            seen[name] = kind
    return faults


def _faults_of(what: str, formula: Value, known: set[str]) -> list[str]:
    if not isinstance(formula, str | Real):
        return [f"{what} is {formula!r}; it must be a number or a formula"]
    try:
        unknown = sorted(formulas.names(formula) - known)
    except DataError as error:
        return [f"{what}: {error}"]
    return [f'{what} uses "{name}", which nothing defines' for name in unknown]
