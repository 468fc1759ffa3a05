"""One check: a number, its limit, what it means in a sentence, and what to do if it failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from scivi.errors import few

Counts = Literal["decides", "care", "note"]

RICHER = (
    'Use a richer guide (guide="auto" where latents are few, or a flow), or the marginal objective with its '
    "Newton finish; or run scivi.nuts on these data and keep its posterior."
)


@dataclass(frozen=True, slots=True)
class Check:
    """One rule applied: a failed one that "decides" forbids trust, one of "care" asks for care."""

    name: str
    value: float
    threshold: float
    ok: bool
    counts: Counts
    sentence: str
    advice: str = ""


def either(
    name: str, value: float, threshold: float, ok: bool, counts: Counts, good: str, bad: str, advice: str = ""
) -> Check:
    """A check with one sentence for passing and another, with advice, for failing."""
    return Check(name, float(value), threshold, bool(ok), counts, good if ok else bad, "" if ok else advice)


def graded(name: str, value: float, care: float, stop: float, good: str, bad: str, advice: str = "") -> Check:
    """A check that asks for care above one limit, and decides above a second; NaN asks for care."""
    return either(name, value, care, value <= care, "decides" if value > stop else "care", good, bad, advice)


def note(name: str, sentence: str, value: float = np.nan) -> Check:
    """Something to know that is neither good nor bad."""
    return Check(name, value, np.nan, True, "note", sentence)


def worst(table: xr.Dataset, key: str, where: str) -> tuple[float, str]:
    """The largest number of a column, and the entry of another column beside it."""
    values = table[key].values.astype(float)
    if not np.isfinite(values).any():
        return float("nan"), ""
    at = int(np.nanargmax(values))
    return float(values[at]), str(table[where].values[at])


def listed(table: xr.Dataset, bad: np.ndarray) -> str:
    """Names of the failed variables, the first few."""
    return few([str(v) for v in table["variable"].values[bad]])
