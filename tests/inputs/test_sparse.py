from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from scivi.inputs.sparse import in_memory, on_disk
from tests.inputs.test_feed import counts, in_halves

U8, U16 = np.dtype(np.uint8), np.dtype(np.uint16)


class Recorded:
    """An array on disk that notes what is read of it."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.read = values, []

    def __getitem__(self, key: slice) -> np.ndarray:
        self.read.append((key.start, key.stop))
        return self.values[key]

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)


def recorded(matrix: sparse.csr_matrix) -> tuple[dict[str, Recorded], SimpleNamespace]:
    group = {word: Recorded(getattr(matrix, word)) for word in ("data", "indices", "indptr")}
    return group, SimpleNamespace(**group)


def test_neighbouring_blocks_are_read_in_one_stretch():
    x = counts()
    group, noted = recorded(x)
    rows = np.concatenate([np.arange(200, 232), np.arange(16, 32), np.arange(32, 48), [40, 220]])
    read = on_disk(group, x.shape).rows(rows, U8)
    np.testing.assert_array_equal(read.toarray(), x[rows].toarray())
    assert noted.indptr.read == [(16, 49), (200, 233)]
    assert noted.data.read == [(x.indptr[16], x.indptr[48]), (x.indptr[200], x.indptr[232])]
    assert read.dtype == U8


def test_rows_with_small_gaps_come_in_one_stretch():
    x = counts()
    group, noted = recorded(x)
    rows = np.array([90, 11, 17, 11, 60])
    np.testing.assert_array_equal(on_disk(group, x.shape).rows(rows, U8).toarray(), x[rows].toarray())
    assert noted.indptr.read == [(11, 19), (60, 62), (90, 92)]


@pytest.mark.parametrize("rows", [None, np.array([], int), np.array([7]), np.arange(5, 90)])
def test_rows_of_a_matrix_are_the_same_in_memory_and_on_disk(rows):
    for x in (counts(), in_halves(counts(most=300))):
        read = [s.rows(rows, U16) for s in (in_memory(x), on_disk(recorded(x)[0], x.shape))]
        for matrix in read:
            assert matrix.dtype == U16
            np.testing.assert_array_equal(matrix.toarray(), (x if rows is None else x[rows]).toarray())
