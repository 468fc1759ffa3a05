"""Many data sets of one shape in one table: opened, checked one by one, and as stacked tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scivi.errors import DataError, listed
from scivi.inference.opening import begin, device_of, open_data
from scivi.inference.plan import Plan
from scivi.inference.state import State
from scivi.inference.stepper import Form
from scivi.inputs.batches import Batch, make_batch
from scivi.inputs.columns import Column, Index, Table, from_array
from scivi.inputs.fields import Field
from scivi.inputs.matching import Matching
from scivi.inputs.sources import TableSource, as_table, open_source
from scivi.models.template import Template

SHOWN = 20  # faults that a message lists


@dataclass(frozen=True, eq=False)
class DataSets:
    """Data sets of one shape along a dim that the template does not know.

    Args:
        template: whose fields they are.
        over: that dim.
        source: of all of them; the fields that differ have ``over`` as their first dim.
        whole: all of them as tensors.
    """

    template: Template
    over: str
    source: TableSource
    whole: Batch

    def __len__(self) -> int:
        return self.source.sizes[self.over]

    @cached_property
    def labels(self) -> np.ndarray:
        """Of the data sets."""
        return np.asarray(self.source.coords[self.over])

    @property
    def sizes(self) -> dict[str, int]:
        """Of every dim of one data set."""
        return {d: n for d, n in self.source.sizes.items() if d != self.over}

    def has(self, name: str) -> bool:
        """Whether a field differs between data sets."""
        return self.over in self.source.fields[name].dims

    @cached_property
    def form(self) -> Form:
        """The first data set, as arguments of a captured function."""
        values, masks = (
            {name: t[0] if self.has(name) else t for name, t in named.items()}
            for named in (self.whole.values, self.whole.observed_mask)
        )
        return Form(Batch(values, masks, self.sizes, self.template.row_dims), {})

    @cached_property
    def shared(self) -> tuple[bool, ...]:
        """By tensor of ``form``, whether all data sets have it in common."""
        return tuple(not self.has(n) for n in [*self.whole.values, *self.whole.observed_mask])

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of ``form`` for all data sets."""
        return (*self.whole.values.values(), *self.whole.observed_mask.values())

    def at(self, places: Tensor) -> list[Tensor]:
        """The tensors of some data sets, stacked; what all have in common as it is."""
        places = places.to(self.tensors[0].device)
        pairs = zip(self.tensors, self.shared, strict=True)
        return [t if common else t.index_select(0, places) for t, common in pairs]

    def table(self, place: int) -> Table:
        """One data set."""
        return _one(self.source, self.over, place)

    def begin(self, place: int, plan: Plan) -> State:
        """The state of a fit to one data set."""
        return begin(self.template, open_data(self.template, self.table(place)), plan)


def open_sets(template: Template, data: Any, over: str, plan: Plan) -> DataSets:
    """All data sets, checked."""
    known = {d for f in template.fields.values() for d in f.dims} | {"chain", "draw"}
    if over in known | set(template.sizes):
        raise DataError(f'"{over}" is a dim of template "{template.name}" itself; many fits need one more.')
    observed = template.observed
    table = as_table(data, observed[0] if len(observed) == 1 else None)
    if table.lines:
        raise DataError(
            f"a {table.what} has no dim {over!r} besides its rows; turn a long one, with columns of labels, "
            f"into a Dataset: scivi.inputs.sources.from_table(data, ({over!r}, ...))."
        )
    fields = {name: _widened(name, f, table, over) for name, f in template.fields.items()}
    if not any(over in f.dims for f in fields.values()):
        dims = sorted({d for c in table.columns.values() for d in c.dims if d not in table.loose})
        raise DataError(
            f'no field of "{template.name}" has the dim "{over}" in these data; they have {dims}.'
        )
    try:
        source = open_source(table, fields, (over,), name=template.name, sizes=template.sizes, distinct=True)
    except DataError as error:
        raise _by_label(template, table, fields, over) or error from None
    if template.validate is not None or template.distinct:
        if (error := _by_label(template, table, fields, over)) is not None:
            raise error
    device, dtype = device_of(plan), getattr(torch, plan.dtype)
    whole = make_batch(source.read({}), fields, source.sizes, (over,), {}, device, dtype)
    return DataSets(template, over, source, whole)


def _widened(name: str, declared: Field, table: Table, over: str) -> Field:
    """A field with the dim of the data sets in front, if its column has it."""
    column = table.columns.get(name)
    if column is None:
        return declared
    unnamed = all(d in table.loose for d in column.dims) and len(column.dims) == len(declared.dims) + 1
    return replace(declared, dims=(over, *declared.dims)) if over in column.dims or unnamed else declared


def _by_label(template: Template, table: Table, fields: Mapping[str, Field], over: str) -> DataError | None:
    """What is wrong with each data set by itself; None if that cannot be asked, or nothing is."""
    matching = Matching(table, dict(fields), (over,))
    columns = matching.columns()
    sizes = matching.sizes_of(columns, template.sizes)
    if matching.faults or over not in sizes:
        return None
    coords = {d: of.get([None]) for d, of in matching.labels().items() if d in sizes}
    labels = coords.setdefault(over, np.arange(sizes[over]))
    source = TableSource(fields, columns, sizes, coords)
    faults = []
    for place, label in enumerate(labels):
        try:
            open_data(template, _one(source, over, place))
        except DataError as error:
            lines = str(error).split("\n")[1:]
            faults += [f'{over} "{label}": {line.removeprefix("  - ")}' for line in lines]
    if not faults:
        return None
    return DataError(listed(f'the data cannot be used with template "{template.name}":', faults, SHOWN))


def _one(source: TableSource, over: str, place: int) -> Table:
    """One data set as a table, without the dim of the data sets."""
    labels = {d: from_array(of, (d,)) for d, of in source.coords.items() if d != over}
    return Table({n: _picked(c, over, place) for n, c in source.columns.items()}, labels, what="data set")


def _picked(column: Column, over: str, place: int) -> Column:
    read = column.said or column.get
    if over not in column.dims:
        return from_array(read([None] * len(column.dims)), column.dims)
    axis = column.dims.index(over)

    def get(index: Index) -> np.ndarray:
        return np.take(read([*index[:axis], np.array([place]), *index[axis:]]), 0, axis)

    dims = column.dims[:axis] + column.dims[axis + 1 :]
    shape = column.shape[:axis] + column.shape[axis + 1 :]
    return Column(dims, shape, column.dtype if column.said is None else np.dtype(object), get)
