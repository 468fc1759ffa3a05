"""Minibatches for training: seeded order, resumable cursor, rows in memory or read ahead."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scivi.errors import PlanError
from scivi.inputs.batches import Batch, Source, make_batch, take
from scivi.inputs.fields import Field
from scivi.inputs.held import Held, kept_nbytes
from scivi.inputs.sources import TableSource

_FULL_LIMIT = 100_000  # rows: above it a full-batch step is a mistake more often than a wish (our choice)
_BLOCK, _BLOCKS = 1024, 32  # on-disk rows are read in blocks and shuffled 32 blocks at a time (our choice)
_GROUP = 2**26  # bytes of blocks that are shuffled together at most, if blocks are whole chunks (our choice)


Piece = tuple[tuple[int, int], np.ndarray]  # (epoch, group), and places in that group


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

    The blocks follow each other in a new order, and the first group begins somewhere in it, within a block:
    so every row has the same chance of every place, though the last block may be short, and blocks stay where
    they are stored.

    Args:
        n: number of rows.
        seed: of the order; epochs are independent streams of it.
        block: neighbouring rows that stay together on their way from disk.
        blocks: blocks that are shuffled together.
    """

    def __init__(self, n: int, seed: int, block: int, blocks: int) -> None:
        self.n, self.seed, self.block, self.blocks = n, seed, block, blocks
        self.n_groups = -(-n // (block * blocks))
        self._cache: tuple[int, int, np.ndarray] | None = None

    def group(self, epoch: int, group: int) -> np.ndarray:
        """Rows of one group, shuffled."""
        if self._cache is None or self._cache[:2] != (epoch, group):
            rng = np.random.default_rng([self.seed, epoch])
            starts = self.block * rng.permutation(-(-self.n // self.block))
            lengths = np.minimum(self.block, self.n - starts)
            ends = np.cumsum(lengths)
            size, first = self.block * self.blocks, rng.integers(self.n)
            places = (np.arange(group * size, min(self.n, (group + 1) * size)) + first) % self.n
            shift = starts - ends + lengths
            rows = places + (shift[np.searchsorted(ends, places, side="right")] if len(ends) > 1 else 0)
            rows = np.random.default_rng([self.seed, epoch, group]).permutation(rows)
            self._cache = (epoch, group, rows)
        return self._cache[2]

    def next(self, size: int, cursor: Cursor) -> list[Piece]:
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
    """Minibatches for training, forever, in a seeded order.

    Data are held in one of three ways:

    - a *table*: all rows as tensors on the device, from which a compiled step takes rows itself. Data up to
      ``resident_bytes``; but only up to ``table_bytes`` if narrow types and CSR would save a quarter, the
      device is the CPU (to another, every batch would have to be moved) and a batch is not all rows;
    - *held*: all rows in narrow types and as CSR, up to ``resident_bytes``; a batch is made when wanted;
    - *streamed*: a group of blocks is held at a time, read by a thread that stays one group ahead. The order
      is then shuffled within groups. Blocks are whole chunks of the source, so that a chunk is read once an
      epoch, or twice where two groups share it; the order depends on how the source is stored.

    Args:
        source: where rows are read from.
        fields, rows: of the template.
        rows_per_batch: rows wanted along the first row dim (others take as many, or all they have); None for
            all.
        seed: of the order.
        device, dtype: of the tensors.
        resident_bytes: the most that is kept of all rows.
        table_bytes: the most that is kept as tensors though it could be narrower (our choice: so little that
            the speed of a compiled step is worth it).
        share: number of this process and of all that share each batch: it gets its share of the rows along
            the first row dim. Order and cursor are those of the whole batches.
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
        table_bytes: int = 2**28,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.source, self.fields, self.rows, self.device, self.dtype = source, fields, rows, device, dtype
        self.sizes = dict(source.sizes)
        longest = max(self.sizes[r] for r in rows)
        if rows_per_batch is None and longest > _FULL_LIMIT:
            raise PlanError(
                f"rows_per_batch=None would take all of {longest} rows at every step; "
                f"give a number (512 is usual)."
            )
        self.rows_per_batch, self.share = rows_per_batch, share
        if (least := self.size_of(rows[0]) or self.sizes[rows[0]]) < share[1]:
            raise PlanError(f"a batch of {least} rows cannot be shared by {share[1]} processes.")
        kept = kept_nbytes(source, rows[0], dtype)
        saves = 4 * kept <= 3 * source.nbytes and device.type == "cpu" and self.size_of(rows[0]) is not None
        most = min(table_bytes, resident_bytes) if saves else resident_bytes
        self.resident = source.nbytes <= most  # as a table
        whole = self.resident or kept <= resident_bytes
        self.cursors = {row: Cursor() for row in rows}
        self.orders = {}
        for k, row in enumerate(rows):
            n, at_once = self.sizes[row], whole or k > 0
            block, blocks = (n, 1) if at_once else self._blocks(row, kept)
            self.orders[row] = Order(n, seed + 7919 * k, block, blocks)
        self._table: Batch | None = None
        if self.resident:
            self._table = make_batch(source.read({}), fields, self.sizes, rows, {}, device, dtype)
        self._held = self._hold(None) if whole and not self.resident else None
        self._pool = None if whole else ThreadPoolExecutor(1, thread_name_prefix="scivi-feed")
        self._ahead: dict[tuple[int, int], Future[Held]] = {}
        self._waited_s = 0.0

    def _blocks(self, row: str, kept: int) -> tuple[int, int]:
        """Rows of a block, whole chunks of the source if that is not too much, and blocks of a group."""
        chunk = self.source.chunk(row) if isinstance(self.source, TableSource) else 1
        block = chunk * -(-_BLOCK // chunk)
        blocks = min(_BLOCKS, _GROUP * self.sizes[row] // max(1, kept * block))
        return (block, blocks) if 4 * blocks >= _BLOCKS else (_BLOCK, _BLOCKS)

    def _hold(self, places: np.ndarray | None) -> Held:
        return Held(self.source, self.fields, self.rows, places, self.device, self.dtype)

    def size_of(self, row: str) -> int | None:
        """Rows of a batch along a row dim; None if all are taken."""
        wanted = self.rows_per_batch
        return None if wanted is None or wanted >= self.sizes[row] else wanted

    def next(self) -> Batch:
        """The next batch."""
        begun = time.perf_counter()
        batch = self._next()
        self._waited_s += time.perf_counter() - begun
        return batch

    def _next(self) -> Batch:
        pieces, first = self._pieces(), self.rows[0]
        if self._table is None and self._held is None and first in pieces:
            rest = {row: self._places(row, got) for row, got in pieces.items() if row != first}
            parts = [self._part(key, places, rest) for key, places in pieces[first]]
            return parts[0] if len(parts) == 1 else self._joined(parts)
        index = self._index(pieces)
        if self._table is None:
            return (self._held or self._hold(None)).batch(index)
        places = {row: torch.as_tensor(rows, device=self.device) for row, rows in index.items()}
        return take(self._table, places, self.fields) if places else self._table

    def ahead(self, steps: int) -> tuple[Batch, dict[str, Tensor]]:
        """Data of the next ``steps`` batches, without taking their rows where all rows are a table.

        Returns:
            The table, and by minibatched row dim the places of the batches' rows, (steps, rows); of data that
            are not ``resident`` the next batch itself (``steps`` is 1 then), with its index.
        """
        if self._table is None:
            batch = self.next()
            return batch, {row: places[None] for row, places in batch.index.items()}
        begun = time.perf_counter()
        each = [self._index(self._pieces()) for _ in range(steps)]
        index = {
            row: torch.as_tensor(np.stack([i[row] for i in each]), device=self.device) for row in each[0]
        }
        self._waited_s += time.perf_counter() - begun
        return self._table, index

    def waited(self) -> float:
        """Seconds that steps have waited for their batches since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _pieces(self) -> dict[str, list[Piece]]:
        """Rows of the next batch by minibatched row dim; along the first, this process's share."""
        sizes = {row: size for row in self.rows if (size := self.size_of(row)) is not None}
        pieces = {row: self.orders[row].next(size, self.cursors[row]) for row, size in sizes.items()}
        first = self.rows[0]
        if self.share[1] > 1 and first in pieces:
            pieces[first] = _cut(pieces[first], *_share(sizes[first], *self.share))
        return pieces

    def _index(self, pieces: Mapping[str, list[Piece]]) -> dict[str, np.ndarray]:
        """Places of the batch's rows by row dim of which it has some only."""
        index = {row: self._places(row, got) for row, got in pieces.items()}
        first = self.rows[0]
        if self.share[1] > 1 and first not in index:
            index = {first: np.arange(*_share(self.sizes[first], *self.share)), **index}
        return index

    def _places(self, row: str, pieces: list[Piece]) -> np.ndarray:
        return np.concatenate([self.orders[row].group(*key)[places] for key, places in pieces])

    def _part(self, key: tuple[int, int], places: np.ndarray, rest: Mapping[str, np.ndarray]) -> Batch:
        first = self.rows[0]
        order = self.orders[first]
        if key not in self._ahead:
            self._ahead = {key: self._submit(key)}
        group = self._ahead[key].result()
        following = (key[0], key[1] + 1) if key[1] + 1 < order.n_groups else (key[0] + 1, 0)
        if following not in self._ahead:
            self._ahead = {key: self._ahead[key], following: self._submit(following)}
        return group.batch({first: places, **rest})

    def _submit(self, key: tuple[int, int]) -> Future[Held]:
        assert self._pool is not None
        shared = self.orders[self.rows[0]]
        order = Order(shared.n, shared.seed, shared.block, shared.blocks)  # the thread's own
        return self._pool.submit(lambda: self._hold(order.group(*key)))

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
        index = {**parts[0].index, first: torch.cat([p.index[first] for p in parts])}
        return replace(parts[0], values=values, observed_mask=masks, index=index)

    @property
    def held_nbytes(self) -> int:
        """Memory of all rows, where they are held as they are, or of the groups that have been read."""
        groups = [future.result() for future in self._ahead.values() if future.done()]
        return sum(held.nbytes for held in [*groups, *([self._held] if self._held else [])])

    @property
    def reading(self) -> bool:
        """Whether the thread is at work."""
        return any(future.running() for future in self._ahead.values())

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


def _share(n: int, rank: int, of: int) -> tuple[int, int]:
    """First and last but one of n rows that a process has."""
    return n * rank // of, n * (rank + 1) // of


def _cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """The pieces of some rows of a batch."""
    cut, at = [], 0
    for key, places in pieces:
        own = places[max(0, start - at) : max(0, stop - at)]
        at += len(places)
        cut += [(key, own)] if len(own) else []
    return cut
