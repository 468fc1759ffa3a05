"""Tables of PEtab as rows of text, each of which knows where it stands."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence

from domains.kinetics.networks import Value

NEEDED = {
    "parameter": ("parameterId", "estimate"),
    "condition": ("conditionId",),
    "observable": ("observableId", "observableFormula", "noiseFormula"),
    "measurement": ("observableId", "simulationConditionId", "measurement", "time"),
}

Row = Mapping[str, str]  # of a table; "" where a cell is empty, and "" -> the place it was read from


def rows_of(folder: str, files: Sequence[str], kind: str, faults: list[str]) -> list[Row]:
    """The rows of all tables of a kind."""
    found: list[Row] = []
    before = len(faults)
    for name in files:
        try:
            with open(os.path.join(folder, name), encoding="utf-8-sig", newline="") as file:
                lines = [[cell.strip() for cell in cells] for cells in csv.reader(file, delimiter="\t")]
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror}")
        except (UnicodeDecodeError, csv.Error) as error:
            faults.append(f"{name} cannot be read: {error}")
        else:
            found += _read(name, lines, kind, faults)
    if not found and len(faults) == before:
        faults.append(f"there is no {kind} table" if not files else f"{', '.join(files)}: there are no rows")
    return found


def _read(name: str, lines: Sequence[Sequence[str]], kind: str, faults: list[str]) -> list[Row]:
    """The rows of one table, if its columns are in order."""
    columns = lines[0] if lines else []
    if len(columns) == 1 and any(sign in columns[0] for sign in ",;"):
        faults.append(f"{name} has one column; columns of PEtab's tables are separated by tabs")
        return []
    wrong = [f'{name} has no column "{each}"' for each in NEEDED[kind] if each not in columns]
    wrong += [f'{name} has {n} columns "{each}"' for each, n in Counter(columns).items() if each and n > 1]
    faults += wrong
    found: list[Row] = []
    for line, cells in enumerate(lines[1:], 2):
        if wrong or not any(cells):
            continue
        where, beyond = f"{name}, line {line}", [each for each in cells[len(columns) :] if each]
        if beyond:
            faults.append(f'{where}: "{beyond[0]}" stands in none of the {len(columns)} columns')
        row = {each: cells[k] if k < len(cells) else "" for k, each in enumerate(columns)}
        empty = [each for each in NEEDED[kind] if each.endswith(("Id", "Formula")) and not row[each]]
        faults += [f"{where}: {each} is empty" for each in empty]
        found.append({**row, "": where})
    return found


def number(row: Row, column: str, faults: list[str]) -> float | None:
    """A number of a table; None if the cell is empty."""
    text = row.get(column, "")
    if is_empty(text):
        return None
    try:
        return float(text)
    except ValueError:
        faults.append(f'{row[""]}: {column} is "{text}", which is no number')
        return None


def is_empty(text: str) -> bool:
    """Whether a cell says nothing."""
    return text.lower() in {"", "nan"}


def as_value(text: str) -> Value:
    """A cell as a number, or as the name that it is."""
    try:
        return float(text)
    except ValueError:
        return text
