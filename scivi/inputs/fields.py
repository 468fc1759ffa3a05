"""What a template needs of a table: names, dims, support, unit; and the check of a table against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.distributions import constraints

from scivi.errors import TemplateError, listed

_WHOLE = (constraints.integer_interval, type(constraints.nonnegative_integer))
_SHOWN, _FEW = 20, 4  # labels that a message lists, and words that are none of them
# what a ``Batch`` has besides its fields
RESERVED = (
    *("values", "observed_mask", "sizes", "rows", "index", "predicting"),
    *("plate", "observe", "n_rows", "predict"),
)


@dataclass(frozen=True, slots=True)
class Field:
    """One column (or matrix) of the table that a template reads.

    Args:
        dims: names of its dimensions, in the order in which the model sees them.
        role: "observed" if the model scores it, "given" if the model conditions on it.
        support: the torch constraint that its entries obey.
        unit: physical unit, "1" if none.
        doc: one sentence of what it is.
        default: value of a given field that the table may leave out; None if it must be there.
        labels: the words that its entries may be, if they are words: text, categories, or whole numbers so
            written. The model sees their places (0, 1, ...).
        at_most: name of another field with the same dims, above which no entry of this one may be.
        gaps: whether entries of an observed field may be missing.
    """

    dims: tuple[str, ...]
    role: Literal["observed", "given"] = "given"
    support: constraints.Constraint = constraints.real
    unit: str = "1"
    doc: str = ""
    default: float | str | None = None
    labels: tuple[str, ...] = ()
    at_most: str = ""
    gaps: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", (self.dims,) if isinstance(self.dims, str) else tuple(self.dims))
        object.__setattr__(self, "labels", tuple(self.labels))
        faults = self._faults_of_labels()
        if self.labels and not faults:
            object.__setattr__(self, "support", constraints.nonnegative_integer)
            if isinstance(self.default, str):
                object.__setattr__(self, "default", float(self.labels.index(self.default)))
        if self.role not in ("observed", "given"):
            faults.append(f'role is {self.role!r}; it must be "observed" or "given"')
        if len(set(self.dims)) < len(self.dims):
            faults.append(f"dims {self.dims} name a dimension twice")
        if self.default is not None and self.role == "observed":
            faults.append("an observed field has no default: leave entries missing instead")
        if faults:
            raise TemplateError(listed("Field(...) cannot be used:", faults))

    def _faults_of_labels(self) -> list[str]:
        if not self.labels:
            text = isinstance(self.default, str)
            return [f"default is {self.default!r}; only a field with labels has one in words"] if text else []
        faults = []
        if len({word for word in self.labels if isinstance(word, str) and word}) < len(self.labels):
            faults.append(f"labels are {self.labels}; they must be different words")
        if self.support not in (constraints.real, constraints.nonnegative_integer) or self.at_most:
            faults.append(
                "it has labels, which are their own support and have no order: leave support and at_most"
            )
        if self.default is not None and self.default not in (*self.labels, *range(len(self.labels))):
            faults.append(f"default is {self.default!r}; it must be {self.expected}, or the place of one")
        return faults

    @property
    def is_count(self) -> bool:
        """Whether the entries are whole numbers."""
        return bool(getattr(self.support, "is_discrete", False))

    @property
    def feasible(self) -> float:
        """A value inside the support: stands in for missing entries, which are masked out."""
        lower, upper = getattr(self.support, "lower_bound", None), getattr(self.support, "upper_bound", None)
        if lower is None:
            return 0.0 if upper is None else float(upper) - 1.0
        if self.is_count and (self.labels or self.at_most):  # a place in any case; no count is less
            return float(lower)
        value = float(lower) + (1.0 if upper is None else 0.5 * (float(upper) - float(lower)))
        return float(np.floor(value)) if self.is_count else value

    @property
    def assumed(self) -> float:
        """What every entry is where nothing is known: the default, or else a feasible value."""
        return self.feasible if self.default is None else float(self.default)

    @property
    def expected(self) -> str:
        """What its entries must be, for messages: "numbers > 0", "one of CG, CHG, CHH"."""
        return f"one of {_some(self.labels)}" if self.labels else describe_support(self.support)

    def as_stored(self, values: np.ndarray) -> np.ndarray:
        """Entries as a table holds them: the labels at these places (none where missing), or the numbers."""
        if not self.labels:
            return values
        return np.array([*self.labels, ""])[np.nan_to_num(values, nan=-1).astype(np.int64)]


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_SHOWN]) + (", ..." if len(labels) > _SHOWN else "")


def as_word(entry: Any) -> str:
    """An entry of a column of words as text: bytes decoded, whole numbers without a point."""
    if isinstance(entry, bytes):
        return entry.decode(errors="replace")
    return str(int(entry) if isinstance(entry, float | np.floating) and entry.is_integer() else entry)


def describe_support(support: constraints.Constraint) -> str:
    """The support in words, for messages: "whole numbers >= 0", "numbers > 0"."""
    if isinstance(support, type(constraints.boolean)):
        return "0 or 1"
    kind = "whole numbers" if getattr(support, "is_discrete", False) else "numbers"
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if lower is not None and upper is not None:
        return f"{kind} between {lower:g} and {upper:g}"
    if lower is not None:
        sign = ">" if isinstance(support, type(constraints.positive)) else ">="
        return f"{kind} {sign} {lower:g}"
    if upper is not None:
        return f"{kind} < {upper:g}"
    return f"finite {kind}"


def outside_support(values: np.ndarray, field: Field) -> np.ndarray:
    """Boolean array, True where an entry that is present breaks the field's support.

    Missing entries (NaN) are allowed in observed fields that may have gaps, and never reported for those.
    """
    if values.dtype.kind in "biu" and isinstance(field.support, _WHOLE) and values.size:
        low, high = field.support.lower_bound, getattr(field.support, "upper_bound", np.inf)
        if low <= values.min() and values.max() <= high:
            return np.zeros(values.shape, bool)
    values = np.asarray(values, dtype=np.float64)
    missing = np.isnan(values)
    inside = field.support.check(torch.from_numpy(np.where(missing, field.feasible, values))).numpy()
    inside = inside.reshape(inside.shape + (1,) * (values.ndim - inside.ndim))  # supports of whole vectors
    bad = ~(inside & np.isfinite(values)) & ~missing
    return bad if field.role == "observed" and field.gaps else bad | missing


def check_fields(fields: Mapping[str, Field]) -> list[str]:
    """Faults of a set of fields: reserved or unusable names, nothing observed."""
    faults = [f'field "{name}" has a reserved name; choose another' for name in fields if name in RESERVED]
    faults += [f'field "{name}" is not a Python name' for name in fields if not name.isidentifier()]
    faults += [
        f'"{name}" is {type(f).__name__}, not a Field'
        for name, f in fields.items()
        if not isinstance(f, Field)
    ]
    known = {name: f for name, f in fields.items() if isinstance(f, Field)}
    faults += [
        f'field "{name}" has the name of one of its dims, where labels stand; choose another'
        for name, f in known.items()
        if name in f.dims and len(f.dims) > 1
    ]
    for name, f in known.items():
        most = known.get(f.at_most)
        if f.at_most and (most is None or most.dims != f.dims):
            why = "which is no field" if most is None else f"which has dims {most.dims} and not {f.dims}"
            faults.append(f'field "{name}" is at most "{f.at_most}", {why}')
    if not any(f.role == "observed" for f in known.values()):
        faults.append('no field has role="observed": there would be nothing to learn from')
    return faults


class Tally:
    """Unusable entries of one field, counted over the chunks in which it is read.

    Args:
        name: the field's name.
        field: what is expected of it.
        dims: dims of the chunks; those of the field unless some are left out.
    """

    def __init__(self, name: str, field: Field, dims: tuple[str, ...] | None = None) -> None:
        self.name, self.field, self.dims = name, field, field.dims if dims is None else dims
        self.entries = self.outside = self.missing = self.above = 0
        self.wrapped = self.fractional = self.negative = False
        self.first: dict[str, str] = {}
        self.strange: list[str] = []

    def add(
        self,
        values: np.ndarray,
        start: Sequence[int] = (),
        *,
        most: np.ndarray | None = None,
        said: Callable[[], np.ndarray] | None = None,
    ) -> None:
        """Count a chunk.

        Args:
            values: its entries.
            start: place of the first; zeros if left out.
            most: entries of the field that bounds this one.
            said: reads the words that stand where this field has the places of labels.
        """
        self.entries += values.size
        start = start or (0,) * values.ndim
        if most is not None and (above := values > most).any():
            self.above += int(above.sum())
            place = tuple(np.argwhere(above)[0])
            pair = " > ".join(f"{x[place]}".removesuffix(".0") for x in (values, most))
            self._note("above", pair, place, start)
        bad = outside_support(values, self.field)
        if not bad.any():
            return
        missing = np.isnan(values) & bad if values.dtype.kind == "f" else np.zeros_like(bad)
        outside = bad & ~missing
        self.missing += int(missing.sum())
        self.outside += int(outside.sum())
        if outside.any() and not self.field.labels:
            narrow = values.dtype.kind == "i" and values.dtype.itemsize <= 2
            off = values[outside]
            lowest = off.min()
            self.negative |= bool(lowest < 0)
            if self.field.is_count:
                self.fractional |= bool((off != np.floor(off)).any())
                self.wrapped |= bool(lowest < 0 and (narrow or lowest == np.iinfo(np.int16).min))
        if missing.any():
            self._note("missing", "", tuple(np.argwhere(missing)[0]), start)
        if outside.any():
            place = tuple(np.argwhere(outside)[0])
            words = [] if said is None else [f'"{as_word(entry)}"' for entry in said()[outside]]
            self.strange = list(dict.fromkeys([*self.strange, *words]))[:_FEW]
            self._note("outside", words[0] if words else f"{values[place]}", place, start)

    def _note(self, kind: str, what: str, place: Sequence[int], start: Sequence[int]) -> None:
        at = ", ".join(f"{d}={i + s}" for d, i, s in zip(self.dims, place, start, strict=True))
        self.first.setdefault(kind, " ".join([*([what] if what else []), *([f"at {at}"] if at else [])]))

    def _hint(self) -> str:
        """What entries off the support most likely are, and what to do."""
        if self.wrapped:
            return " Negative 16-bit counts come from wrap-around: store the counts in a wider integer type."
        if self.fractional:
            return " Give counts as they were counted: not normalised, not in logs, with nothing subtracted."
        if self.negative and self.field.role == "observed" and self.field.gaps:
            return " If a negative number stands for what was not measured, make it NaN."
        return ""

    def faults(self) -> list[str]:
        """At most one line for each kind of fault, with count and first place."""
        faults, of = [], f"of {self.entries} entries are"
        if self.outside:
            known = self.field.labels
            what = f"none of {_some(known)}" if known else f"not {self.field.expected}"
            hint = self._hint()
            if others := ", ".join(self.strange[1:]):
                hint = f" Others are {others}."
            faults.append(
                f'field "{self.name}": {self.outside} {of} {what}; '
                f"the first is {self.first['outside']}.{hint}"
            )
        if self.missing:
            what = f'field "{self.name}": {self.missing} {of} missing; the first {self.first["missing"]}.'
            why = "A given field" if self.field.role == "given" else "This field"
            faults.append(f"{what} {why} may not have missing entries.")
        if self.above:
            what = f'field "{self.name}": {self.above} {of} above field "{self.field.at_most}"'
            faults.append(f"{what}; the first is {self.first['above']}.")
        return faults
