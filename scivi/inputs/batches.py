"""Rows become a ``Batch`` on a device: seeded order, resumable cursor, the one maker of plates over rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from torch import Tensor

from scivi.errors import PlanError, TemplateError
from scivi.inputs.fields import Field

_FULL_LIMIT = 100_000  # rows: above it a full-batch step is a mistake more often than a wish (our choice)
_BLOCK, _BLOCKS = 1024, 32  # on-disk rows are read in blocks and shuffled 32 blocks at a time (our choice)


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
        with poutine.block(
            hide=[name]
        ):  # a plate's own site stays out of traces, so that it can be entered again
            return pyro.plate(
                name, self.sizes[name], subsample=self.index.get(name, _all_of(self, name)), dim=dim
            )

    def observe(self, name: str, distribution: Any) -> Tensor:
        """A sample site given the data: missing entries are masked out, and it is free when predicting.

        Of an event that does not factorise (not made by ``to_event``), one missing entry masks the whole.
        """
        if self.predicting:
            return pyro.sample(name, distribution)
        mask = self.observed_mask.get(name)
        if mask is not None:
            if isinstance(distribution, Independent):
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


def _all_of(batch: Batch, name: str) -> Tensor:
    device = next(iter(batch.values.values())).device
    return torch.arange(batch.sizes[name], device=device)


def make_batch(
    arrays: Mapping[str, np.ndarray],
    fields: Mapping[str, Field],
    sizes: Mapping[str, int],
    rows: tuple[str, ...],
    index: Mapping[str, np.ndarray],
    device: torch.device,
    dtype: torch.dtype,
) -> Batch:
    """A ``Batch`` from arrays as a source reads them."""
    values, masks = {}, {}
    for name, f in fields.items():
        array = arrays[name]
        tensor = torch.as_tensor(np.ascontiguousarray(array), device=device).to(dtype)
        if f.role == "observed" and array.dtype.kind == "f":
            missing = tensor.isnan()
            if bool(missing.any()):
                masks[name], tensor = (
                    ~missing,
                    torch.where(missing, torch.full_like(tensor, f.feasible), tensor),
                )
        values[name] = tensor
    places = {k: torch.as_tensor(v, device=device) for k, v in index.items()}
    return Batch(values, masks, dict(sizes), rows, places)


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


@dataclass
class Cursor:
    """Where a seeded pass over the rows stands; all that is needed to go on."""

    epoch: int = 0
    group: int = 0
    offset: int = 0


class Order:
    """Seeded order of rows: shuffled within groups of blocks, blocks shuffled, a new order each epoch.

    A group that holds all rows gives a full shuffle. The incomplete batch at the end of an epoch is left out:
    every row has the same chance of that, so the minibatch objective stays unbiased.

    Args:
        n: number of rows.
        seed: of the order; epochs are independent streams of it.
        block: neighbouring rows that stay together on their way from disk.
        blocks: blocks that are shuffled together.
    """

    def __init__(self, n: int, seed: int, block: int, blocks: int) -> None:
        self.n, self.seed, self.block, self.blocks = n, seed, block, blocks
        n_blocks = -(-n // block)
        self.n_groups = -(-n_blocks // blocks)
        self._cache: tuple[int, int, np.ndarray] | None = None

    def group(self, epoch: int, group: int) -> np.ndarray:
        """Rows of one group, shuffled."""
        if self._cache is None or self._cache[:2] != (epoch, group):
            rng = np.random.default_rng([self.seed, epoch])
            blocks, first = rng.permutation(-(-self.n // self.block)), rng.integers(self.n)
            chosen = blocks[group * self.blocks : (group + 1) * self.blocks]
            rows = np.concatenate(
                [np.arange(b * self.block, min(self.n, (b + 1) * self.block)) for b in chosen]
            )
            rows = (rows + first) % self.n  # each row has the same chance of standing in the short last block
            rows = np.random.default_rng([self.seed, epoch, group]).permutation(rows)
            self._cache = (epoch, group, rows)
        return self._cache[2]

    def next(self, size: int, cursor: Cursor) -> list[tuple[tuple[int, int], np.ndarray]]:
        """The next ``size`` rows as pieces ``((epoch, group), places in the group)``; moves the cursor."""
        while True:
            pieces, wanted = [], size
            epoch, group, offset = cursor.epoch, cursor.group, cursor.offset
            while wanted and group < self.n_groups:
                rows = len(self.group(epoch, group))
                got = np.arange(offset, min(rows, offset + wanted))
                if len(got):
                    pieces.append(((epoch, group), got))
                wanted, offset = wanted - len(got), offset + len(got)
                if offset >= rows:
                    group, offset = group + 1, 0
            if not wanted:
                cursor.group, cursor.offset = group, offset
                return pieces
            cursor.epoch, cursor.group, cursor.offset = epoch + 1, 0, 0


class Feed:
    """Minibatches for training, forever, in an order that only the seed decides.

    Data up to ``resident_bytes`` are moved to the device once; larger ones are read a group of blocks at a
    time by a thread that stays one group ahead.

    Args:
        source: where rows are read from.
        fields, rows: of the template.
        rows_per_batch: rows wanted along the first row dim (others take as many, or all they have); None for
            all.
        seed: of the order.
        device, dtype: of the tensors.
        resident_bytes: the most that is kept on the device as a whole.
    """

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, Field],
        rows: tuple[str, ...],
        rows_per_batch: int | None,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        resident_bytes: int = 2**31,
    ) -> None:
        self.source, self.fields, self.rows, self.device, self.dtype = source, fields, rows, device, dtype
        self.sizes = dict(source.sizes)
        if rows_per_batch is None and max(self.sizes[r] for r in rows) > _FULL_LIMIT:
            most = max(self.sizes[r] for r in rows)
            raise PlanError(
                f"rows_per_batch=None would take all of {most} rows at every step; "
                f"give a number (512 is usual)."
            )
        self.rows_per_batch = rows_per_batch
        self.resident = source.nbytes <= resident_bytes
        self.cursors = {row: Cursor() for row in rows}
        self.orders = {}
        for k, row in enumerate(rows):
            n = self.sizes[row]
            whole = self.resident or k > 0
            self.orders[row] = Order(n, seed + 7919 * k, n if whole else _BLOCK, 1 if whole else _BLOCKS)
        self._table = self._read({}) if self.resident else None
        self._pool = None if self.resident else ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}

    def _read(self, index: Mapping[str, np.ndarray]) -> Batch:
        arrays = self.source.read(index)
        return make_batch(arrays, self.fields, self.sizes, self.rows, index, self.device, self.dtype)

    def size_of(self, row: str) -> int | None:
        """Rows of a batch along a row dim; None if all are taken."""
        wanted = self.rows_per_batch
        return None if wanted is None or wanted >= self.sizes[row] else wanted

    def next(self) -> Batch:
        """The next batch."""
        sizes = {row: size for row in self.rows if (size := self.size_of(row)) is not None}
        pieces = {row: self.orders[row].next(size, self.cursors[row]) for row, size in sizes.items()}
        if self._table is not None:
            index = {
                row: torch.as_tensor(self._places(row, got), device=self.device)
                for row, got in pieces.items()
            }
            return take(self._table, index, self.fields) if index else self._table
        first = self.rows[0]
        if first not in pieces:
            return self._read({})
        parts = [self._part(key, places) for key, places in pieces[first]]
        batch = parts[0] if len(parts) == 1 else self._joined(parts)
        rest = {
            r: torch.as_tensor(self._places(r, got), device=self.device)
            for r, got in pieces.items()
            if r != first
        }
        if rest:
            batch = replace(take(batch, rest, self.fields), index={**batch.index, **rest})
        return batch

    def ahead(self, steps: int) -> tuple[Batch, dict[str, Tensor]]:
        """Data of the next ``steps`` batches, without taking their rows where all rows are resident.

        Returns:
            The resident table, and by minibatched row dim the places of the batches' rows, (steps, rows); of
            data that are not resident the next batch itself (``steps`` is 1 then), with its index.
        """
        if self._table is None:
            batch = self.next()
            return batch, {row: places[None] for row, places in batch.index.items()}
        sizes = {row: size for row in self.rows if (size := self.size_of(row)) is not None}
        index: dict[str, Tensor] = {}
        for row, size in sizes.items():
            order, cursor = self.orders[row], self.cursors[row]
            places = [self._places(row, order.next(size, cursor)) for _ in range(steps)]
            index[row] = torch.as_tensor(np.stack(places), device=self.device)
        return self._table, index

    def _places(self, row: str, pieces: list[tuple[tuple[int, int], np.ndarray]]) -> np.ndarray:
        return np.concatenate([self.orders[row].group(*key)[places] for key, places in pieces])

    def _part(self, key: tuple[int, int], places: np.ndarray) -> Batch:
        order, first = self.orders[self.rows[0]], self.rows[0]
        if key not in self._ahead:
            self._ahead = {key: self._submit(key)}
        group = self._ahead[key].result()
        following = (key[0], key[1] + 1) if key[1] + 1 < order.n_groups else (key[0] + 1, 0)
        if following not in self._ahead:
            self._ahead = {key: self._ahead[key], following: self._submit(following)}
        chosen = torch.as_tensor(places, device=self.device)
        return replace(take(group, {first: chosen}, self.fields), index={first: group.index[first][chosen]})

    def _submit(self, key: tuple[int, int]) -> Future[Batch]:
        assert self._pool is not None
        first, order = self.rows[0], Order(*self._order_args())
        return self._pool.submit(lambda: self._read({first: order.group(*key)}))

    def _order_args(self) -> tuple[int, int, int, int]:
        order = self.orders[self.rows[0]]
        return order.n, order.seed, order.block, order.blocks

    def _joined(self, parts: Sequence[Batch]) -> Batch:
        first = self.rows[0]

        def join(name: str, tensors: list[Tensor]) -> Tensor:
            dims = self.fields[name].dims
            return torch.cat(tensors, dims.index(first)) if first in dims else tensors[0]

        values = {n: join(n, [p.values[n] for p in parts]) for n in parts[0].values}
        masked = {n for p in parts for n in p.observed_mask}
        masks = {
            n: join(
                n, [p.observed_mask.get(n, torch.ones_like(p.values[n], dtype=torch.bool)) for p in parts]
            )
            for n in masked
        }
        index = {first: torch.cat([p.index[first] for p in parts])}
        return replace(parts[0], values=values, observed_mask=masks, index=index)

    def state(self) -> dict[str, list[int]]:
        """Cursors as plain numbers."""
        return {row: [c.epoch, c.group, c.offset] for row, c in self.cursors.items()}

    def restore(self, state: Mapping[str, Sequence[int]]) -> None:
        """Go on from cursors that ``state`` gave."""
        self.cursors = {row: Cursor(*map(int, numbers)) for row, numbers in state.items()}

    def close(self) -> None:
        """Stop the reading thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def chunks(
    source: Source,
    fields: Mapping[str, Field],
    rows: tuple[str, ...],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Batch]:
    """All rows once, in order, ``size`` at a time along the first row dim; a lone chunk carries no index."""
    n, first = source.sizes[rows[0]], rows[0]
    for start in range(0, n, size):
        index = {} if size >= n else {first: np.arange(start, min(n, start + size))}
        yield make_batch(source.read(index), fields, source.sizes, rows, index, device, dtype)
