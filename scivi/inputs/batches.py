"""Rows become a ``Batch`` on a device, the one maker of plates over rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from torch import Tensor

from scivi.errors import TemplateError
from scivi.inputs.fields import Field


class Source(Protocol):
    """Where rows are read from (``scivi.inputs.sources`` has the ones we offer)."""

    sizes: Mapping[str, int]
    nbytes: int

    def read(self, index: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fields by name, restricted to ``index`` along the row dims that it names."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some rows of a table, as tensors, with what the model needs to weigh them.

    Fields are attributes: ``batch.counts`` has the dims that the field declares, in that order.

    Args:
        values: entries by field; missing ones replaced by a feasible value.
        observed_mask: by observed field with missing entries, True where an entry is present.
        sizes: size of every dim in the full data.
        rows: the dims that may be minibatched.
        index: by row dim, the rows in this batch; absent for a row dim that is whole.
        predicting: whether observed sites are sampled instead of scored.
    """

    values: Mapping[str, Tensor]
    observed_mask: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    rows: tuple[str, ...]
    index: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    predicting: bool = False

    def __getattr__(self, name: str) -> Tensor:
        try:
            return object.__getattribute__(self, "values")[name]
        except KeyError:
            raise AttributeError(f'the batch has no field "{name}"; it has {sorted(self.values)}') from None

    def plate(self, name: str, dim: int | None = None) -> pyro.plate:
        """A pyro plate over a dim of the data.

        Over a row dim it subsamples and scales by N / rows in the batch.

        Args:
            name: the dim.
            dim: its place, counted from the right (-1, -2, ...); None for the next free one.

        Raises:
            TemplateError: no field has the dim, and the template's ``sizes`` does not list it.
        """
        if name not in self.sizes:
            raise TemplateError(
                f'there is no dim "{name}" to make a plate of; the data have {sorted(self.sizes)}. '
                f'Give its size in Template(sizes={{"{name}": ...}}).'
            )
        index = self.index.get(name)
        if index is None:
            index = torch.arange(self.sizes[name], device=some_field(self).device)
        # a plate's own site stays out of traces, so that it can be entered again
        with poutine.block(hide=[name]):
            return pyro.plate(name, self.sizes[name], subsample=index, dim=dim)

    def observe(self, name: str, distribution: Any) -> Tensor:
        """A sample site given the data: missing entries are masked out, and it is free when predicting.

        Of an event that does not factorise (not made by ``to_event``), one missing entry masks the whole,
        unless the distribution has a method ``present(mask)`` that gives the distribution of the rest.
        """
        if self.predicting:
            return pyro.sample(name, distribution)
        mask = self.observed_mask.get(name)
        if mask is not None:
            if hasattr(distribution, "present"):
                distribution = distribution.present(mask)
            elif isinstance(distribution, Independent):
                distribution = distribution.base_dist.mask(mask).to_event(
                    distribution.reinterpreted_batch_ndims
                )
            else:
                event = distribution.event_dim
                distribution = distribution.mask(mask.flatten(-event).all(-1) if event else mask)
        return pyro.sample(name, distribution, obs=self.values[name])

    def n_rows(self, name: str | None = None) -> int:
        """Rows of this batch along a row dim (the first one by default)."""
        name = name or self.rows[0]
        return len(self.index[name]) if name in self.index else self.sizes[name]

    def predict(self) -> Batch:
        """The same rows, observed sites free."""
        return replace(self, predicting=True)


def some_field(batch: Batch) -> Tensor:
    """A field: its dtype and device are those of all."""
    return next(iter(batch.values.values()))


def make_batch(
    arrays: Mapping[str, np.ndarray],
    fields: Mapping[str, Field],
    sizes: Mapping[str, int],
    rows: tuple[str, ...],
    index: Mapping[str, np.ndarray],
    device: torch.device,
    dtype: torch.dtype,
    gaps: Collection[str] = (),
) -> Batch:
    """A ``Batch`` from arrays as a source reads them; fields in ``gaps`` have a mask in any case."""
    values, masks = {}, {}
    for name, f in fields.items():
        array = arrays[name]
        tensor = torch.as_tensor(np.asarray(array, order="C"), device=device).to(dtype)
        if f.role == "observed" and array.dtype.kind == "f":
            missing = tensor.isnan()
            if name in gaps or bool(missing.any()):
                masks[name] = ~missing
                tensor = torch.where(missing, torch.full_like(tensor, f.feasible), tensor)
        values[name] = tensor
    places = {k: torch.as_tensor(v, device=device) for k, v in index.items()}
    return Batch(values, masks, dict(sizes), rows, places)


def read_batch(
    source: Source,
    fields: Mapping[str, Field],
    rows: tuple[str, ...],
    index: Mapping[str, np.ndarray],
    like: Tensor,
) -> Batch:
    """Some rows of a source as a ``Batch`` on the device, and in the dtype, of a tensor."""
    return make_batch(source.read(index), fields, source.sizes, rows, index, like.device, like.dtype)


def take(batch: Batch, index: Mapping[str, Tensor], fields: Mapping[str, Field]) -> Batch:
    """The rows ``index`` of a batch that holds them at those places."""

    def picked(name: str, tensor: Tensor) -> Tensor:
        for axis, dim in enumerate(fields[name].dims):
            if dim in index:
                tensor = tensor.index_select(axis, index[dim])
        return tensor

    values = {name: picked(name, tensor) for name, tensor in batch.values.items()}
    masks = {name: picked(name, tensor) for name, tensor in batch.observed_mask.items()}
    return replace(batch, values=values, observed_mask=masks, index=dict(index))


def chunks(
    source: Source,
    fields: Mapping[str, Field],
    rows: tuple[str, ...],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Batch]:
    """All rows once, in order, ``size`` at a time along the first row dim; a lone chunk carries no index."""
    n = source.sizes[rows[0]]
    for start in range(0, n, size):
        index = {} if size >= n else {rows[0]: np.arange(start, min(n, start + size))}
        yield make_batch(source.read(index), fields, source.sizes, rows, index, device, dtype)
