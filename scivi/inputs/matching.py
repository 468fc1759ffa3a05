"""Which column of a table each field takes, and what its axes are called; every fault on the way."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scivi.inputs.columns import Column, Table, labelled
from scivi.inputs.fields import Field


@dataclass(slots=True)
class Matching:
    """Finds the column of each field and names its axes, noting every fault on the way."""

    table: Table
    fields: dict[str, Field]
    rows: tuple[str, ...]
    faults: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)  # axis of the table -> dim of the template
    lost: set[str] = field(default_factory=set)  # fields whose entries a fault hides
    unsized: set[str] = field(default_factory=set)  # dims whose size is unknown, or two

    def columns(self) -> dict[str, Column]:
        """By field, the column it takes, its axes in the words of the template."""
        known = {d for column in self.table.columns.values() for d in column.dims}
        if self.table.row in known and self.rows[0] not in known:
            self.named[str(self.table.row)] = self.rows[0]
        found = {}
        for name, declared in self.fields.items():
            before = len(self.faults)
            column = self._find(name, declared)
            if column is not None:
                self._take(name, declared, column, found)
            if len(self.faults) > before:
                self.lost.add(name)
        return found

    def _take(self, name: str, declared: Field, column: Column, found: dict[str, Column]) -> None:
        dims = self._dims(name, declared, column)
        if declared.labels:
            column = labelled(column, declared.labels)
        if not column.numeric:
            self.faults.append(
                f'field "{name}" has entries of type {column.dtype}; numbers are needed. '
                f"Turn categories into codes, text into numbers, and times into floats."
            )
        elif dims is not None:
            found[name] = replace(column, dims=dims)
            self._refuse_scan(name, found[name])

    def labels(self) -> dict[str, Column]:
        """By dim of the template, the column of its labels; after ``columns``."""
        return {self.named.get(d, d): column for d, column in self.table.labels.items()}

    def sizes_of(self, columns: Mapping[str, Column], given: Mapping[str, int | str]) -> dict[str, int]:
        """Size of every dim, from the columns and as ``given`` by the template (a number, or another dim)."""
        first = {d: (n, "the template") for d, n in given.items() if not isinstance(n, str)}
        order = list(dict.fromkeys([*(d for f in self.fields.values() for d in f.dims), *given]))
        turned = self._turned(columns)
        for name, column in columns.items():
            for dim, size in zip(column.dims, column.shape, strict=True) if name != turned else ():
                seen = first.setdefault(dim, (int(size), f'field "{name}"'))
                if seen[0] != size:
                    self.unsized.add(dim)
                    self.faults.append(
                        f'dim "{dim}" has {seen[0]} entries in {seen[1]} but {size} in field "{name}".'
                    )
        first |= {d: first[n] for d, n in given.items() if n in first}
        self.faults += [
            f'dim "{d}" is empty: the table has no entries.' for d, (n, _) in first.items() if n == 0
        ]
        unknown = [d for d in order if d not in first]
        self.unsized.update(unknown)
        if not self.faults:
            self.faults += [
                f'nothing in the data has the dim "{d}", so its size is unknown.' for d in unknown
            ]
        return {d: first[d][0] for d in order if d in first}

    def _turned(self, columns: Mapping[str, Column]) -> str | None:
        """The field, if there is one, whose sizes are those of another with its dims, the other way round."""
        shapes = {name: dict(zip(c.dims, c.shape, strict=True)) for name, c in columns.items()}
        for name, own in shapes.items():
            others = [n for n in shapes if n != name and set(shapes[n]) == set(own)]
            if not others or any(shapes[n] != shapes[others[0]] for n in others):
                continue
            other, dims = shapes[others[0]], columns[name].dims
            if own != other and sorted(own.values()) == sorted(other.values()):
                here, there = (" x ".join(str(sizes[d]) for d in dims) for sizes in (own, other))
                self.unsized.update(dims)
                self.faults.append(
                    f'field "{name}" is {here} along {_quoted(dims)}, and field "{others[0]}" is {there}: '
                    f"one of them is transposed. Pass its .T, or DataArrays with named dims."
                )
                return name
        return None

    def can_be_read(self, names: Sequence[str]) -> bool:
        """Whether no fault hides the entries of these fields, or the size of a dim of theirs."""
        dims = {d for n in names for d in self.fields[n].dims}
        return not (self.lost & set(names) or self.unsized & dims)

    def _find(self, name: str, declared: Field) -> Column | None:
        columns = self.table.columns
        if name in columns:
            return columns[name]
        placed = self.table.what == "AnnData"
        places = [place for place in columns if placed and place.partition("/")[2] == name]
        fitting = [p for p in places if len(columns[p].dims) == len(declared.dims)] or places
        if len(fitting) == 1:
            return columns[fitting[0]]
        if fitting:
            self.faults.append(
                f'field "{name}" could be any of {", ".join(fitting)}. '
                f'Say which: from_anndata(adata, {name}="{fitting[0]}").'
            )
        elif declared.default is None:
            self.faults.append(self._missing(name, declared))
        return None

    def _missing(self, name: str, declared: Field) -> str:
        columns = list(self.table.columns)
        kind = f"dims {_quoted(declared.dims)}, {declared.expected}"
        bare = {c.rpartition("/")[2].lower(): c for c in columns}
        near = [bare[n] for n in difflib.get_close_matches(name.lower(), bare, n=2, cutoff=0.6)]
        near = [c for c in near if c not in self.fields]
        shown = ", ".join(columns[:20]) + (", ..." if len(columns) > 20 else "")
        guess = f"The {self.table.what} has {shown or 'no columns'}."
        if near:
            guess = f"Did you mean {' or '.join(map(_name, near))}?"
        if not near and any(c not in self.fields for c in columns) and self.table.what != "AnnData":
            guess += f" If one of them is it, rename it, or say --column {name}=COLUMN."
        if self.table.what == "AnnData":
            place = next((p for p in (*near, "X") if p in columns), "layers/...")
            guess += f' Say where it is: from_anndata(adata, {name}="{place}").'
        return f'field "{name}" is missing ({kind}). {guess}'

    def _dims(self, name: str, declared: Field, column: Column) -> tuple[str, ...] | None:
        """Names of the column's axes in the words of the template, or None with a fault noted."""
        dims = [self.named.get(d, d) for d in column.dims]
        free = [d for d in declared.dims if d not in dims]
        unnamed = [k for k, d in enumerate(dims) if d not in declared.dims and d in self.table.loose]
        if len(unnamed) == len(free):
            for axis, dim in zip(unnamed, free, strict=True):
                dims[axis] = self.named[column.dims[axis]] = dim
        strange = [d for d in dims if d not in declared.dims]
        absent = [d for d in declared.dims if d not in dims]
        repeats = declared.role == "given" and not strange
        if not strange and (not absent or repeats) and len(set(dims)) == len(dims):
            return tuple(dims)
        self.faults.append(self._wrong_dims(name, declared, dims, strange, absent))
        return None

    def _wrong_dims(
        self, name: str, declared: Field, dims: list[str], strange: list[str], absent: list[str]
    ) -> str:
        shown = [d if d not in self.table.loose else "?" for d in dims]
        what = f'field "{name}" has dims {_quoted(shown)}; the template needs {_quoted(declared.dims)}.'
        if self.table.what == "AnnData":
            return f'{what} Name its axes or its place: from_anndata(adata, dims=..., {name}="obsm/...").'
        if self.table.lines:
            lacking = [d for d in declared.dims if d not in self.table.columns]
            add = (
                f" (add the column {_words(lacking)})" if lacking else f": from_table(data, {declared.dims})"
            )
            return f"{what} Pass an xarray Dataset, or a long table{add}."
        if "?" in shown:
            return f"{what} Pass arrays of that shape, or xarray DataArrays with named dims."
        if len(strange) == len(absent) and strange:
            names = ", ".join(f'"{old}": "{new}"' for old, new in zip(strange, absent, strict=True))
            words = " ".join(f"--dim {old}={new}" for old, new in zip(strange, absent, strict=True))
            return f"{what} Rename the dimension: data.rename({{{names}}}), or {words}."
        over = f" Choose one entry along {_quoted(strange)}, or sum over it." if strange else ""
        return f"{what}{over or ' An observed field must have all of them.'}"

    def _refuse_scan(self, name: str, column: Column) -> None:
        if column.scan is not None and column.dims[column.scan] == self.rows[0]:
            self.faults.append(
                f'field "{name}" is compressed across "{self.rows[0]}" on disk: any row of it means reading '
                f"all. Store it compressed along its rows: adata.X = adata.X.tocsr()."
            )


def _name(name: str) -> str:
    return f'"{name}"'


def _words(names: Sequence[str]) -> str:
    return ", ".join(map(_name, names))


def _quoted(dims: Sequence[str]) -> str:
    return f"({_words(dims)}{',' if len(dims) == 1 else ''})"
