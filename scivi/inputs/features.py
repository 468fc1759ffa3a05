"""A few numbers of every row, and of a random sample of a fit's rows: what a later table is compared with.

A field with few entries a row is told entry by entry, a wide one (genes, days) by summaries and means of
neighbouring entries. Of more than eight entries there are also the places along a few principal directions,
and how far a row lies off them. Directions are learnt from rows of their own, which are not kept: seen along
directions that were made to fit them, rows spread more than new ones do, and every comparison with new rows
would find a difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np

from scivi.inputs.batches import Batch
from scivi.inputs.fields import Field

FEW = 32  # entries a row of a field that are told one by one (our choice)
KEPT = 2000  # rows of a fit that are kept: a share is known to .011, a KS distance to .03 (our choice)
LEARNT_FROM = 500  # rows more that directions are learnt from, at most a quarter (our choice)
FEWEST = 20  # such rows from which directions are learnt; of fewer there are none (our choice)
DIRECTIONS = 8  # of a field with more entries a row (our choice)
PARTS = 16  # of neighbouring entries of a wide field, whose means are features (our choice)
MOST_NUMBERS = 2**23  # of sampled rows held while a fit ends: 32 MB as float32 (our choice)
FEWEST_ROWS = 64  # sampled however wide they are
_BLOCK = 2**20  # numbers that are worked on at a time (our choice)
_SUMMARIES = ("mean", "sd", "smallest", "largest", "zeros")


@dataclass(frozen=True)
class Basis:
    """Principal directions of a field, of s = sign(x) log(1 + |x|), standardised entry by entry.

    Args:
        mean, scale: of s, (entry,).
        directions: (entry, direction), orthonormal, the widest first.
    """

    mean: np.ndarray
    scale: np.ndarray
    directions: np.ndarray

    def standardised(self, rows: np.ndarray) -> np.ndarray:
        """Rows (row, entry) in sd from the mean; missing entries count as it.

        Of rows with another number of entries, infinity.
        """
        if rows.shape[1] != len(self.mean):
            return np.full((len(rows), len(self.mean)), np.inf)
        return np.nan_to_num((_signed_log(rows) - self.mean) / self.scale)

    def places(self, z: np.ndarray) -> np.ndarray:
        """Places along the directions, and the rms of what lies off them, (row, direction + 1)."""
        if np.isinf(z).any():
            return np.full((len(z), self.directions.shape[1] + 1), np.inf)
        along = z @ self.directions
        off = (z**2).sum(1) - (along**2).sum(1)
        found = np.column_stack([along, np.sqrt(off.clip(0) / len(self.mean))])
        return found.round(6)  # equal rows are equal in whatever company they were worked out


@dataclass(frozen=True)
class Features:
    """Features of the rows that a fit has kept, and how those of other rows are worked out.

    Args:
        names: of the features, such as "n_on[soft]", "counts: mean", "counts: direction 2".
        values: of the kept rows, (row, feature), float32; NaN where missing.
        constants: numbers of the fields without rows, by name; of long ones a hash.
        bases: by field with many entries a row.
    """

    names: tuple[str, ...]
    values: np.ndarray
    constants: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    bases: Mapping[str, Basis] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, batch: Batch, fields: Mapping[str, Field], coords: Mapping[str, Any]) -> np.ndarray:
        """Those of the rows of a batch, (row, feature) float32; NaN if missing, infinite if not there.

        Args:
            batch: of any rows.
            fields: those that are looked at, as when the features were made.
            coords: labels by dim.
        """
        row = batch.rows[0]
        entries = {n: entries_of(batch, n, f.dims, row) for n, f in fields.items() if row in f.dims}
        wide = {name for name in entries if f"{name}: mean" in self.names}
        columns = _columns(entries, fields, wide, row, coords, self.bases)
        absent = np.full(batch.n_rows(row), np.inf)  # a missing entry is another thing
        return np.stack([columns.get(n, absent) for n in self.names], 1).astype(np.float32)


class Sample:
    """Rows of a table chosen at random, taken up while its chunks pass by.

    Args:
        fields: those that are looked at; with rows, along the first row dim.
        row: that dim.
        sizes: of every dim.
        seed: of the choice.
    """

    def __init__(self, fields: Mapping[str, Field], row: str, sizes: Mapping[str, int], seed: int) -> None:
        self.fields, self.row = fields, row
        widths = [math.prod(sizes[d] for d in f.dims if d != row) for f in fields.values() if row in f.dims]
        most = max(FEWEST_ROWS, min(KEPT + LEARNT_FROM, MOST_NUMBERS // max(1, sum(widths))))
        n = sizes[row]
        self.chosen = np.random.default_rng(seed).choice(n, min(n, most), replace=False)  # in random order
        self._places: list[np.ndarray] = []
        self._rows: dict[str, list[np.ndarray]] = {}
        self._last: Batch | None = None

    def add(self, batch: Batch) -> None:
        """Take up those of its rows that were chosen."""
        own = batch.index.get(self.row)
        places = np.arange(batch.n_rows(self.row)) if own is None else own.cpu().numpy()
        wanted = np.flatnonzero(np.isin(places, self.chosen, assume_unique=True))
        self._places.append(places[wanted])
        self._last = batch
        for name, f in self.fields.items():
            if self.row in f.dims:
                # a copy, so that the chunk itself is not kept
                kept = entries_of(batch, name, f.dims, self.row, wanted)
                self._rows.setdefault(name, []).append(kept)

    def features(self, coords: Mapping[str, Any]) -> Features:
        """What is remembered of them, once all chunks have passed in order.

        Args:
            coords: labels by dim.
        """
        assert self._last is not None
        order = np.searchsorted(np.concatenate(self._places), self.chosen)
        entries = {name: np.concatenate(parts)[order] for name, parts in self._rows.items()}
        wide = {name for name, own in entries.items() if own.shape[1] > FEW}
        many = [name for name, own in entries.items() if own.shape[1] > DIRECTIONS]
        first = min(LEARNT_FROM, len(order) // 4) if many else 0
        first = first if first >= FEWEST else 0
        bases = {name: _learnt(entries[name][:first]) for name in many} if first else {}
        step = max(1, _BLOCK // max(1, sum(own.shape[1] for own in entries.values())))
        blocks = []
        for start in range(first, min(len(order), first + KEPT), step):
            stop = min(start + step, first + KEPT)
            some = {name: own[start:stop] for name, own in entries.items()}
            blocks.append(_columns(some, self.fields, wide, self.row, coords, bases))
        names = tuple(blocks[0])
        values = np.concatenate([np.stack(list(found.values()), 1).astype(np.float32) for found in blocks])
        return Features(names, values, constants_of(self._last, self.fields, coords), bases)


def entries_of(
    batch: Batch, name: str, dims: Sequence[str], row: str, wanted: np.ndarray | None = None
) -> np.ndarray:
    """Entries of a field, (row, entry), of some rows or all; missing ones NaN."""
    axis, mask = dims.index(row), batch.observed_mask.get(name)

    def rows(tensor: Any) -> np.ndarray:
        array = np.moveaxis(tensor.cpu().numpy(), axis, 0)
        array = array if wanted is None else array[wanted]
        return array.reshape(len(array), math.prod(array.shape[1:]))

    values = rows(batch.values[name])
    return values if mask is None else np.where(rows(mask), values, np.nan)


def constants_of(batch: Batch, fields: Mapping[str, Field], coords: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of the fields without rows, entry by entry; of long ones, a number made of all entries."""
    found: dict[str, float] = {}
    for name, f in fields.items():
        if set(f.dims) & set(batch.rows):
            continue
        mask, values = batch.observed_mask.get(name), batch.values[name].cpu().double().numpy()
        values = (values if mask is None else np.where(mask.cpu().numpy(), values, np.nan)).ravel()
        if values.size > FEW:
            digest = hashlib.sha256(values.astype("<f8").tobytes()).digest()
            found[f"{name}: hash"] = float(int.from_bytes(digest[:6], "little"))  # float64 holds 53 bits
        else:
            found |= dict(zip(_labels(name, f, None, coords), values.tolist(), strict=True))
    return found


def _columns(
    entries: Mapping[str, np.ndarray],
    fields: Mapping[str, Field],
    wide: Collection[str],
    row: str,
    coords: Mapping[str, Any],
    bases: Mapping[str, Basis],
) -> dict[str, np.ndarray]:
    """Features by name, (row,) each, from the entries of all fields (row, entry)."""
    found: dict[str, np.ndarray] = {}
    for name, own in entries.items():
        own, declared = own.astype(np.float64), fields[name]
        if name in wide:
            found |= {f"{name}: {word}": column for word, column in zip(_SUMMARIES, _told(own), strict=True)}
        else:
            found |= dict(zip(_labels(name, declared, row, coords), own.T, strict=True))
        if declared.role == "observed" and declared.gaps and own.shape[1]:
            found[f"{name}: missing"] = np.isnan(own).mean(1)
        if name in bases:
            z = bases[name].standardised(own)
            *along, off = bases[name].places(z).T
            found |= {f"{name}: direction {k}": column for k, column in enumerate(along, 1)}
            found[f"{name}: off its directions"] = off
            if name in wide:
                found |= _parts(name, z)
        if most := declared.at_most:
            found[f"{name}: share of {most}"] = _share(own, entries[most].astype(np.float64))
    return found


def _parts(name: str, z: np.ndarray) -> dict[str, np.ndarray]:
    """Means of neighbouring entries by name: what changes in a few of many entries is diluted less."""
    edges = np.linspace(0, z.shape[1], PARTS + 1).astype(int)
    means = np.add.reduceat(z, edges[:-1], axis=1) / np.diff(edges)
    parts = zip(edges[:-1], edges[1:] - 1, means.round(6).T, strict=True)
    return {f"{name}: entries {first} to {last}": mean for first, last, mean in parts}


def _told(own: np.ndarray) -> list[np.ndarray]:
    """Mean, sd, least, greatest and share of zeros of the entries of each row that are there."""
    there = ~np.isnan(own)
    n = there.sum(1)
    some = np.maximum(n, 1)
    mean = np.where(there, own, 0.0).sum(1) / some
    spread = np.where(there, own - mean[:, None], 0.0)
    low = np.where(there, own, np.inf).min(1)
    high = np.where(there, own, -np.inf).max(1)
    sd = np.where(low == high, 0.0, np.sqrt((spread**2).sum(1) / some))
    columns = [mean, sd, low, high, (own == 0).sum(1) / some]
    return [np.where(n > 0, column, np.nan) for column in columns]


def _share(own: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Sum of the entries over the sum of those that bound them, of each row; NaN of nothing."""
    there = ~(np.isnan(own) | np.isnan(most))
    part, whole = (np.where(there, x, 0.0).sum(1) for x in (own, most))
    return np.divide(part, whole, out=np.full(len(own), np.nan), where=whole != 0)


def _labels(name: str, declared: Field, row: str | None, coords: Mapping[str, Any]) -> list[str]:
    """Names of the entries of a field in C order, as ``n_on[soft]``."""
    dims = [d for d in declared.dims if d != row]
    if not dims:
        return [name]
    every = product(*(np.asarray(coords[d]).astype(str).tolist() for d in dims))
    return [f"{name}[{', '.join(parts)}]" for parts in every]


def _learnt(rows: np.ndarray) -> Basis:
    """Principal directions of rows (row, entry)."""
    s = _signed_log(rows.astype(np.float64))
    there = ~np.isnan(s)
    n = np.maximum(there.sum(0), 1)
    mean = np.where(there, s, 0.0).sum(0) / n
    scale = np.sqrt((np.where(there, s - mean, 0.0) ** 2).sum(0) / n)
    scale = np.where(scale > 1e-9 * (1 + np.abs(mean)), scale, 1.0)
    z = np.nan_to_num((s - mean) / scale)
    count = min(DIRECTIONS, *z.shape)
    if z.shape[1] <= len(z):
        directions = np.linalg.eigh(z.T @ z)[1][:, ::-1][:, :count]
    else:  # the smaller of the two products has the same directions, seen from the rows
        size, along = np.linalg.eigh(z @ z.T)
        directions = z.T @ along[:, ::-1][:, :count] / np.sqrt(size[::-1][:count].clip(1e-12))
    most = np.abs(directions).argmax(0)
    directions = directions * np.where(directions[most, np.arange(count)] < 0, -1.0, 1.0)
    return Basis(mean.astype(np.float32), scale.astype(np.float32), directions.astype(np.float32))


def _signed_log(rows: np.ndarray) -> np.ndarray:
    return np.sign(rows) * np.log1p(np.abs(rows))
