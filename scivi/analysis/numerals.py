"""Numbers and names as a reader of the page wants them, as text of HTML."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import numpy as np

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any, *, aligned: bool = False) -> str:
    """A number as a reader wants it: four digits, thousands grouped, powers of ten, a dash for none.

    Args:
        value: a number, or text, which is escaped.
        aligned: keep zeros at the end, as in a column.
    """
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (str, np.str_)):
        return escape(str(value))
    value = float(value)
    if not np.isfinite(value):
        return "∞" if value == np.inf else "−∞" if value == -np.inf else "–"
    size = abs(value)
    if value == int(value) and size < 1e9:
        return f"{int(value):,}".replace("-", "−")
    if not 1e-3 <= size < 1e6:
        return _power(value, 2)
    places = max(0, (2 if size < 1 else 3) - int(np.floor(np.log10(size))))
    told = f"{value:,.{places}f}".replace("-", "−")
    return told if aligned or "." not in told else told.rstrip("0").rstrip(".")


def measured(mean: float, sd: float, *others: float) -> list[str]:
    """A mean, its sd and numbers beside them, to two digits of the sd: what lies below it is noise."""
    numbers = (mean, sd, *others)
    if not (np.isfinite(numbers).all() and sd > 0):
        return [number(v) for v in numbers]
    last = int(np.floor(np.log10(sd))) - 1  # place of the last digit that is told, as a power of ten
    if -6 <= last and max(map(abs, numbers)) < 1e6:
        return [f"{v:,.{max(0, -last)}f}".replace("-", "−") for v in numbers]
    return [_power(v, min(6, max(1, int(np.floor(np.log10(abs(v)))) - last))) if v else "0" for v in numbers]


def _power(value: float, digits: int) -> str:
    """A number with a power of ten, written out."""
    front, _, power = f"{value:.{digits}e}".partition("e")
    return f"{front}×10{str(int(power)).translate(_RAISED)}".replace("-", "−")


def breakable(name: str) -> str:
    """A long name with places where a narrow column may break it."""
    return re.sub(r"([\[_:]|, )", r"\1<wbr>", escape(name))
