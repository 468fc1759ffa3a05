"""Sparse matrices as rows: read as CSR, from memory or from disk, in whatever type is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.sparse import csr_array

GAP = 16  # on disk, wanted rows at most this far apart are read in one stretch (our choice)
_PIECE = 2**22  # entries that are read from disk before they take the type wanted (our choice: 16 MB)

Rows = Callable[[np.ndarray | None, np.dtype], csr_array]


@dataclass(frozen=True, slots=True)
class Sparse:
    """A matrix that can be read by rows without making it dense.

    Args:
        shape: rows and columns.
        dtype: as stored.
        nnz: number of entries that are stored.
        rows: the rows wanted, in any order (None for all), as CSR with entries of a type that holds them.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    nnz: int
    rows: Rows

    def chosen(self, rows: np.ndarray | None, columns: np.ndarray | None) -> Sparse:
        """The matrix of some rows and columns (None for all); its share of the entries is a guess."""

        def read(wanted: np.ndarray | None, dtype: np.dtype) -> csr_array:
            places = wanted if rows is None else rows if wanted is None else rows[wanted]
            if columns is None:
                return self.rows(places, dtype)
            # entries of the other columns need not fit the type
            return csr_array(self.rows(places, self.dtype)[:, columns].astype(dtype))

        kept = tuple(n if k is None else len(k) for k, n in zip((rows, columns), self.shape, strict=True))
        nnz = round(self.nnz * kept[0] / max(1, self.shape[0]) * kept[1] / max(1, self.shape[1]))
        return Sparse((kept[0], kept[1]), self.dtype, nnz, read)


def in_memory(matrix: Any) -> Sparse:
    """A scipy matrix. Of a CSR nothing is copied; of any other a CSR is made when first read."""

    @cache
    def by_rows() -> Any:
        return matrix.tocsr()

    def rows(places: np.ndarray | None, dtype: np.dtype) -> csr_array:
        picked = by_rows() if places is None else by_rows()[places]
        return _of_type(csr_array((picked.data, picked.indices, picked.indptr), shape=picked.shape), dtype)

    dtype = np.dtype(matrix.dtype).newbyteorder("=")
    return Sparse((matrix.shape[0], matrix.shape[1]), dtype, int(matrix.nnz), rows)


def on_disk(group: Any, shape: tuple[int, int]) -> Sparse:
    """A CSR matrix as AnnData stores it in HDF5 or zarr; neighbouring rows are read in one stretch."""
    stored = np.dtype(group["data"].dtype).newbyteorder("=")

    def rows(places: np.ndarray | None, dtype: np.dtype) -> csr_array:
        if places is None:
            return _stretches(group, [(0, shape[0])], shape[1], stored, dtype)
        wanted, inverse = np.unique(places, return_inverse=True)
        runs = [r for r in np.split(wanted, np.flatnonzero(np.diff(wanted) > GAP) + 1) if len(r)]
        ends = [(int(r[0]), int(r[-1]) + 1) for r in runs]
        n_read = sum(b - a for a, b in ends)
        gaps = n_read > len(wanted)
        # rows in the gaps come along, and need not fit the type
        matrix = _stretches(group, ends, shape[1], stored, stored if gaps else dtype)
        if gaps:
            before = np.cumsum([0, *(b - a for a, b in ends[:-1])])
            places = np.concatenate([r - e[0] + k for r, e, k in zip(runs, ends, before, strict=True)])
            inverse = places[inverse]
        if len(inverse) < n_read or (inverse != np.arange(len(inverse))).any():
            matrix = csr_array(matrix[inverse])
        return _of_type(matrix, dtype)

    return Sparse(shape, stored, int(group["data"].shape[0]), rows)


def _of_type(matrix: csr_array, dtype: np.dtype) -> csr_array:
    """The same matrix with entries of a type that its sums hold, though not always their terms."""
    if matrix.dtype == dtype:
        return matrix
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return csr_array((matrix.data.astype(dtype), matrix.indices, matrix.indptr), shape=matrix.shape)


def _stretches(
    group: Any, ends: list[tuple[int, int]], n_columns: int, stored: np.dtype, dtype: np.dtype
) -> csr_array:
    """Stretches of neighbouring rows, one below the other; entries take their type piece by piece."""
    pointers = [np.asarray(group["indptr"][a : b + 1], dtype=np.int64) for a, b in ends]
    places = np.cumsum(np.concatenate([np.zeros(1, np.int64), *map(np.diff, pointers)]))
    narrow = max(int(places[-1]), n_columns) <= np.iinfo(np.int32).max
    indices = np.empty(places[-1], np.int32 if narrow else np.int64)
    data, at = np.empty(places[-1], dtype), 0
    for own in pointers:
        for first in range(int(own[0]), int(own[-1]), _PIECE):
            last = min(int(own[-1]), first + _PIECE)
            piece, into = np.asarray(group["data"][first:last]), slice(at, at + last - first)
            data[into], indices[into], at = piece, group["indices"][first:last], into.stop
            if dtype.kind in "iu" and dtype != stored and (data[into] != piece).any():
                # terms of entries that are stored more than once: only their sums fit
                return _of_type(_stretches(group, ends, n_columns, stored, stored), dtype)
    parts = (data, indices, places.astype(indices.dtype))
    return csr_array(parts, shape=(len(places) - 1, n_columns))
