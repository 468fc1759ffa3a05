"""Measurements of a PEtab problem: their kinds, their experiments, and their labelled arrays."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from domains.kinetics import formulas
from domains.kinetics.networks import Value
from domains.kinetics.petab_cells import Row, as_value, is_empty, number
from domains.kinetics.petab_problems import Observable, Problem

_PLACEHOLDER = re.compile(r"\b(observable|noise)Parameter(\d+)_(\w+)\b")

# Observable, the parameters that it names by place, and the places of numbers of a measurement's own.
Kind = tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]]


class Measured(NamedTuple):
    """A measurement: its row and kind by number, and the numbers that it has for itself alone."""

    row: int
    kind: int
    time: float
    value: float
    own: Sequence[float]


def measurements(
    tables: Mapping[str, Sequence[Row]], faults: list[str]
) -> tuple[tuple[Observable, ...], tuple[tuple[str, str], ...], list[Measured]]:
    """Kinds of measurement, rows, and the measurements."""
    table = {row["observableId"]: row for row in tables["observable"]}
    often = Counter(row["observableId"] for row in tables["observable"])
    faults += [f'there are {n} observables "{name}"' for name, n in often.items() if n > 1]
    kinds: dict[Kind, int] = {}
    rows: dict[tuple[str, str], int] = {}
    found = []
    wrong: dict[str, list[str]] = {}  # what is, and where
    for row in tables["measurement"]:
        name, where = row["observableId"], row[""]
        time, value = number(row, "time", faults), number(row, "measurement", faults)
        if name not in table:
            wrong.setdefault(f'there is no observable "{name}"', []).append(where)
        cells = [row[each] for each, x in (("time", time), ("measurement", value)) if x is None]
        if any(not is_empty(each) for each in cells):  # which ``number`` has told
            continue
        if time is None or value is None or not (time >= 0 and math.isfinite(value)):
            faults.append(
                f'{where}: time is "{row["time"]}" and measurement "{row["measurement"]}"; '
                "they must be a time >= 0 and a finite number"
            )
            continue
        if name not in table:
            continue
        if value <= 0 and _transformation(table[name]) != "lin":
            faults.append(
                f'{where}: measurement is {value:g}; on the log scale of "{name}" it must be above 0'
            )
        words, numbers, unplaced = _placed(row, table[name])
        for fault in unplaced:
            wrong.setdefault(fault, []).append(where)
        kind = kinds.setdefault((name, tuple(words.items()), tuple(numbers)), len(kinds))
        before = row.get("preequilibrationConditionId", "")
        pair = (row["simulationConditionId"], "" if is_empty(before) else before)
        found.append(Measured(rows.setdefault(pair, len(rows)), kind, time, value, [*numbers.values()]))
    faults += [
        f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {fault}"
        for fault, places in wrong.items()
    ]
    labels = _labels([*kinds])
    observables = [
        _observable(table[kind[0]], kind, label) for kind, label in zip(kinds, labels, strict=True)
    ]
    return tuple(observables), tuple(rows), found


def _labels(kinds: Sequence[Kind]) -> list[str]:
    """Name each kind of measurement: by its observable, and by the parameters that tell it from others."""
    short = [f"{name}[{', '.join(v for _, v in words)}]" if words else name for name, words, _ in kinds]
    full = [f"{name}{[f'{k}={v}' for k, v in words]}" for name, words, _ in kinds]
    once, often = Counter(name for name, _, _ in kinds), Counter(short)
    return [
        name if once[name] == 1 else a if often[a] == 1 else b
        for (name, _, _), a, b in zip(kinds, short, full, strict=True)
    ]


def _placed(row: Row, observable: Row) -> tuple[Mapping[str, str], Mapping[str, float], list[str]]:
    """Parameters and numbers that a measurement puts in its observable's places, and what is wrong."""
    text = f"{observable['observableFormula']} {observable['noiseFormula']}"
    needed = {(kind, int(k)) for kind, k, of in _PLACEHOLDER.findall(text) if of == row["observableId"]}
    found: dict[str, Value] = {}
    faults = []
    for kind in ("observable", "noise"):
        cell = row.get(f"{kind}Parameters", "")
        given = [] if is_empty(cell) else [each.strip() for each in cell.split(";")]
        count = max((k for of, k in needed if of == kind), default=0)
        if len(given) != count:
            faults.append(f'{kind}Parameters is "{cell}"; "{row["observableId"]}" needs {count}')
            given = (given + ["1"] * count)[:count]
        places = [f"{kind}Parameter{k + 1}_{row['observableId']}" for k in range(count)]
        found |= {place: as_value(each) for place, each in zip(places, given, strict=True)}
    words = {name: value for name, value in found.items() if isinstance(value, str)}
    numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
    faults += [f'"{name}" is not finite' for name, value in numbers.items() if not math.isfinite(value)]
    alone = numbers.get(observable["noiseFormula"], 1.0)
    if alone <= 0:
        faults.append(f'noiseParameters is "{row["noiseParameters"]}"; the scale of noise must be above 0')
    return words, numbers, faults


def _observable(row: Row, kind: Kind, label: str) -> Observable:
    """A kind of measurement: named parameters in the placeholders, numbers left as slots."""
    name, words, slots = kind
    formula = formulas.renamed(row["observableFormula"], dict(words))
    noise = formulas.renamed(row["noiseFormula"], {**dict(words), name: f"({formula})"})
    return Observable(
        label,
        formula,
        noise,
        _transformation(row),
        "normal" if is_empty(row.get("noiseDistribution", "")) else row["noiseDistribution"],
        slots,
    )


def _transformation(row: Row) -> str:
    text = row.get("observableTransformation", "")
    return "lin" if is_empty(text) else text


def dataset(problem: Problem, found: Sequence[Measured]) -> xr.Dataset:
    """Measurements as arrays, as ``petab_tables.read`` says."""
    moments: list[list[float]] = []
    for row in range(len(problem.rows)):
        often = Counter((each.time, each.kind) for each in found if each.row == row)
        most = Counter[float]()
        for (time, _), n in often.items():
            most[time] = max(most[time], n)
        moments.append([time for time in sorted(most) for _ in range(most[time])])
    size = max(map(len, moments))
    time = np.array([each + each[-1:] * (size - len(each)) for each in moments])
    measured = np.full((len(problem.rows), size, len(problem.observables)), np.nan)
    override = np.ones((*measured.shape, problem.n_slots))
    taken = Counter[tuple[int, int, float]]()
    for row, kind, at, value, own in found:
        place = moments[row].index(at) + taken[row, kind, at]
        taken[row, kind, at] += 1
        measured[row, place, kind] = value
        override[row, place, kind, : len(own)] = own
    variables: dict[str, Any] = {"time": (("condition", "moment"), time)}
    variables["measured"] = (("condition", "moment", "observable"), measured)
    if problem.n_slots:
        variables["override"] = (("condition", "moment", "observable", "slot"), override)
    coords = {"condition": list(problem.labels), "observable": [each.name for each in problem.observables]}
    return xr.Dataset(variables, coords)
