"""Tables of PEtab as rows of text, each of which knows where it stands."""

from __future__ import annotations

import csv
import os
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
    if not files:
        faults.append(f"there is no {kind} table")
    for name in files:
        try:
            with open(os.path.join(folder, name), encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t")
                columns = [each.strip() for each in reader.fieldnames or ()]
                missing = [each for each in NEEDED[kind] if each not in columns]
                faults += [f'{name} has no column "{each}"' for each in missing]
                for line, cells in enumerate(reader, 2):
                    row = {str(k).strip(): (v or "").strip() for k, v in cells.items() if k is not None}
                    if any(row.values()):
                        found.append({**row, "": f"{name}, line {line}"})
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            faults.append(f"{name} cannot be read: {error}")
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
