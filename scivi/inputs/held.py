"""Rows kept in memory in as few bytes as hold them; a batch is made of them when it is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from scivi.inputs.batches import Batch, Source, make_batch
from scivi.inputs.fields import Field
from scivi.inputs.sources import TableSource


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The same type in numpy's words."""
    return torch.empty(0, dtype=dtype).numpy().dtype


def kept_nbytes(source: Source, row: str, dtype: torch.dtype) -> int:
    """Memory of all rows, ``Held``."""
    if isinstance(source, TableSource):
        return source.kept_nbytes(row, numpy_dtype(dtype))
    return source.nbytes


class Held:
    """Rows of a source in narrow types and, where that is smaller, as CSR.

    Args:
        source: where they are read from, once.
        fields, rows: of the template.
        places: rows along the first row dim, in any order; None for all.
        device, dtype: of the batches.

    Notes:
        A batch is made in one thread at a time: its rows are gathered into a buffer that is used again,
        unless they have the type of the batch already.
    """

    def __init__(
        self,
        source: Source,
        fields: Mapping[str, Field],
        rows: tuple[str, ...],
        places: np.ndarray | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.sizes, self.rows, self.places = dict(source.sizes), rows, places
        self.device, self.dtype, self.wanted = device, dtype, numpy_dtype(dtype)
        arrays: Mapping[str, np.ndarray | csr_array]
        if isinstance(source, TableSource):
            arrays = source.kept(rows[0], places, self.wanted)
            self.gaps = frozenset(name for name, span in source.spans.items() if span.gaps)
        else:
            rising, back = (None, None) if places is None else np.unique(places, return_inverse=True)
            arrays = source.read({} if rising is None else {rows[0]: rising})
            if back is not None:
                with_row = [(n, f.dims.index(rows[0])) for n, f in fields.items() if rows[0] in f.dims]
                arrays = {**arrays, **{n: np.take(arrays[n], back, axis) for n, axis in with_row}}
            self.gaps = frozenset(n for n, a in arrays.items() if a.dtype.kind == "f" and np.isnan(a).any())
        self.fields = dict(fields)
        self.own = {name: f for name, f in fields.items() if set(f.dims) & set(rows)}
        self.arrays = {name: arrays[name] for name in self.own}
        common = {name: f for name, f in fields.items() if name not in self.own}
        whole = {name: np.asarray(arrays[name]) for name in common}
        self.common = make_batch(whole, common, self.sizes, rows, {}, device, dtype, self.gaps)
        self._buffers: dict[str, np.ndarray] = {}

    @property
    def nbytes(self) -> int:
        """Memory of what is held by row."""
        arrays = list(self.arrays.values())
        parts = [(a.data, a.indices, a.indptr) if isinstance(a, csr_array) else (a,) for a in arrays]
        return sum(array.nbytes for part in parts for array in part)

    def batch(self, index: Mapping[str, np.ndarray]) -> Batch:
        """The batch of some of these rows, by row dim; a dim that is not named stays whole.

        Along the first row dim ``index`` has places among the rows that are held.
        """
        places, index = index, dict(index)
        if self.places is not None and self.rows[0] in index:
            index[self.rows[0]] = self.places[index[self.rows[0]]]
        arrays = {name: self._dense(name, places) for name in self.own}
        batch = make_batch(arrays, self.own, self.sizes, self.rows, index, self.device, self.dtype, self.gaps)
        values = {**self.common.values, **batch.values}
        masks = {**self.common.observed_mask, **batch.observed_mask}
        return replace(
            batch,
            values={name: values[name] for name in self.fields},
            observed_mask={name: masks[name] for name in self.fields if name in masks},
        )

    def _dense(self, name: str, places: Mapping[str, np.ndarray]) -> np.ndarray:
        array, dims = self.arrays[name], self.own[name].dims
        wanted = [(axis, places[dim]) for axis, dim in enumerate(dims) if dim in places]
        if isinstance(array, csr_array):
            matrix: Any = array[wanted[0][1]] if wanted and wanted[0][0] == 0 else array
            array = np.asarray(matrix.toarray(out=self._buffer(name, matrix.shape, matrix.dtype)))
            wanted = [(axis, chosen) for axis, chosen in wanted if axis]
        elif len(wanted) == 1:
            axis, chosen = wanted[0]
            shape = (*array.shape[:axis], len(chosen), *array.shape[axis + 1 :])
            out = self._buffer(name, shape, array.dtype)
            # without a mode numpy would gather elsewhere and copy
            return np.take(array, chosen, axis, out=out, mode="raise" if out is None else "clip")
        for axis, chosen in wanted:
            array = np.take(array, chosen, axis)
        return array

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
        """Where rows are gathered before they take the type of the batch; None if they have it already."""
        if dtype == self.wanted:
            return None
        if name not in self._buffers or self._buffers[name].shape != shape:
            self._buffers[name] = np.empty(shape, dtype)
        return self._buffers[name]
