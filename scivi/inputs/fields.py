"""What a template needs of a table: names, dims, support, unit; and the check of a table against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.distributions import constraints

from scivi.errors import DataError, TemplateError, listed

RESERVED = ("plate", "observe", "sizes", "rows", "index", "values", "observed_mask", "predicting", "to")


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
    """

    dims: tuple[str, ...]
    role: Literal["observed", "given"] = "given"
    support: constraints.Constraint = constraints.real
    unit: str = "1"
    doc: str = ""
    default: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", (self.dims,) if isinstance(self.dims, str) else tuple(self.dims))
        faults = []
        if self.role not in ("observed", "given"):
            faults.append(f'role is {self.role!r}; it must be "observed" or "given"')
        if len(set(self.dims)) < len(self.dims):
            faults.append(f"dims {self.dims} name a dimension twice")
        if self.default is not None and self.role == "observed":
            faults.append("an observed field has no default: leave entries missing instead")
        if faults:
            raise TemplateError(listed("Field(...) cannot be used:", faults))

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
        value = float(lower) + (1.0 if upper is None else 0.5 * (float(upper) - float(lower)))
        return float(np.floor(value)) if self.is_count else value


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

    Missing entries (NaN) are allowed in observed fields only, and are never reported here for those.
    """
    values = np.asarray(values, dtype=np.float64)
    missing = np.isnan(values)
    inside = field.support.check(torch.from_numpy(np.where(missing, field.feasible, values))).numpy()
    inside = inside.reshape(inside.shape + (1,) * (values.ndim - inside.ndim))  # supports of whole vectors
    bad = ~(inside & np.isfinite(values)) & ~missing
    return bad | missing if field.role == "given" else bad


def check_fields(fields: Mapping[str, Field]) -> list[str]:
    """Faults of a set of fields: reserved or unusable names, nothing observed."""
    faults = [f'field "{name}" has a reserved name; choose another' for name in fields if name in RESERVED]
    faults += [f'field "{name}" is not a Python name' for name in fields if not name.isidentifier()]
    faults += [
        f'"{name}" is {type(f).__name__}, not a Field'
        for name, f in fields.items()
        if not isinstance(f, Field)
    ]
    if not any(isinstance(f, Field) and f.role == "observed" for f in fields.values()):
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
        self.entries = self.outside = self.missing = 0
        self.wrapped = False
        self.first: dict[str, str] = {}

    def add(self, values: np.ndarray, start: Sequence[int] = ()) -> None:
        """Count a chunk whose first entry stands at ``start`` (zeros if left out)."""
        bad = outside_support(values, self.field)
        self.entries += bad.size
        if not bad.any():
            return
        missing = np.isnan(values) & bad if values.dtype.kind == "f" else np.zeros_like(bad)
        outside = bad & ~missing
        self.missing += int(missing.sum())
        self.outside += int(outside.sum())
        if self.field.is_count and outside.any():
            narrow = values.dtype.kind == "i" and values.dtype.itemsize <= 2
            lowest = values[outside].min()
            self.wrapped |= bool(lowest < 0 and (narrow or lowest == np.iinfo(np.int16).min))
        for kind, where in (("missing", missing), ("outside", outside)):
            if kind not in self.first and where.any():
                place = np.argwhere(where)[0]
                start = start or (0,) * values.ndim
                at = ", ".join(f"{d}={i + s}" for d, i, s in zip(self.dims, place, start, strict=True))
                words = [f"at {at}"] if at else []
                self.first[kind] = " ".join(
                    words if kind == "missing" else [f"{values[tuple(place)]}", *words]
                )

    def faults(self) -> list[str]:
        """At most one line for each kind of fault, with count and first place."""
        faults, of = [], f"of {self.entries} entries are"
        if self.outside:
            what = f'field "{self.name}": {self.outside} {of} not {describe_support(self.field.support)}'
            hint = " Negative 16-bit counts come from wrap-around: store the counts in a wider integer type."
            faults.append(f"{what}; the first is {self.first['outside']}." + (hint if self.wrapped else ""))
        if self.missing:
            what = f'field "{self.name}": {self.missing} {of} missing; the first {self.first["missing"]}.'
            faults.append(f"{what} A given field may not have missing entries.")
        return faults


def faults_in(name: str, field: Field, values: np.ndarray, first_row: int = 0) -> list[str]:
    """Faults in the entries of one field, at most one line each kind, with count and first place.

    Args:
        name: the field's name.
        field: what is expected of it.
        values: entries, dims as ``field.dims``.
        first_row: number of the first entry along the first dim, for messages on chunks.
    """
    tally = Tally(name, field)
    tally.add(values, (first_row, *(0,) * (values.ndim - 1)) if values.ndim else ())
    return tally.faults()


def raise_faults(faults: list[str], name: str) -> None:
    """Raise one ``DataError`` that lists all faults, if there are any."""
    if faults:
        raise DataError(listed(f'the data cannot be used with template "{name}":', faults))
