"""A table before anybody asks anything of it: named columns that are read by index, whatever holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from scivi.errors import DataError, listed
from scivi.inputs.fields import as_word
from scivi.inputs.sparse import GAP, Sparse, in_memory

Index = Sequence[np.ndarray | None]  # per axis the places wanted, in any order; None for all of them


@dataclass(frozen=True, slots=True)
class Column:
    """An array that is read when it is asked for.

    Args:
        dims: names of its axes.
        shape: size of each axis.
        dtype: as stored.
        get: entries at the places wanted, a new array each time.
        scan: axis along which a few rows can only be read by reading all (compressed the other way), or None.
        sparse: the same entries by rows without making them dense, where that is how they are held.
        codes: the same entries as places in ``categories`` (-1 where missing), if that is how they are held.
        categories: reads the words that the codes stand for.
        said: of a column of the places of labels, the words as they were.
        chunk: entries along the first axis that are stored together, and are read together, or None.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    get: Callable[[Index], np.ndarray]
    scan: int | None = None
    sparse: Sparse | None = None
    codes: Callable[[Index], np.ndarray] | None = None
    categories: Callable[[], np.ndarray] | None = None
    said: Callable[[Index], np.ndarray] | None = None
    chunk: int | None = None

    @property
    def numeric(self) -> bool:
        """Whether the entries are numbers or booleans."""
        return self.dtype.kind in "biuf"


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns and the labels of their dims; nothing is checked yet.

    Args:
        columns: by name. AnnData's have a place before the name: "layers/counts".
        labels: by dim, the column of its labels.
        row: the axis that takes the name of the template's first row dim, if no dim has that name.
        loose: axes without a name of their own, which take the names that a field declares, in order.
        lines: whether it is a list of lines, which is pivoted if it has a column for each dim of a matrix.
        what: what the user gave, for messages.
    """

    columns: Mapping[str, Column]
    labels: Mapping[str, Column] = field(default_factory=lambda: MappingProxyType({}))
    row: str | None = None
    loose: frozenset[str] = frozenset()
    lines: bool = False
    what: str = "table"


def axes(name: str, n: int, *known: str) -> tuple[str, ...]:
    """Names of the n axes of a column: those that are known, then loose ones of its own."""
    return (*known, *(f"{name}#{k}" for k in range(len(known), n)))


def from_array(array: Any, dims: tuple[str, ...]) -> Column:
    """A column of an array in memory; a scipy sparse matrix becomes dense where it is read."""
    if hasattr(array, "toarray"):  # scipy's matrices and arrays, which share no base class
        return from_sparse(in_memory(array), dims)
    array = np.asarray(array)
    return Column(dims, array.shape, array.dtype, lambda index: _taken(array, index))


def _taken(array: np.ndarray, index: Index) -> np.ndarray:
    wanted = [(axis, places) for axis, places in enumerate(index) if places is not None]
    if not wanted:
        return np.array(array)
    for axis, places in wanted:
        array = np.take(array, places, axis)
    return array


def from_sparse(sparse: Sparse, dims: tuple[str, ...]) -> Column:
    """A column of a sparse matrix, which becomes dense where it is read."""

    def get(index: Index) -> np.ndarray:
        rows, columns = index
        matrix = sparse.rows(rows, sparse.dtype)
        return (matrix if columns is None else matrix[:, columns]).toarray()

    return Column(dims, sparse.shape, sparse.dtype, get, sparse=sparse)


def from_categories(codes: Column, categories: Callable[[], np.ndarray]) -> Column:
    """A column of words that are held as places in a list, -1 where one is missing."""

    def get(index: Index) -> np.ndarray:
        return words_at(codes.get(index), categories())

    own = {"codes": codes.get, "categories": categories}
    return Column(codes.dims, codes.shape, np.dtype(object), get, chunk=codes.chunk, **own)


def words_at(places: np.ndarray, words: Iterable[Any]) -> np.ndarray:
    """The words at these places, None where a place is -1."""
    return np.array([*words, None], object)[places]


def labelled(column: Column, labels: Sequence[str]) -> Column:
    """The place of each word among the labels: NaN where it is missing, -1 where it is none of them."""
    import pandas as pd

    places = {"": np.nan} | {label: place for place, label in enumerate(labels)}

    def placed(words: Iterable[Any]) -> np.ndarray:  # with one more for code -1, which is a missing word
        return np.array([*(places.get(as_word(word), -1) for word in words), np.nan], np.float32)

    def of_words(index: Index) -> np.ndarray:
        entries = column.get(index)
        flat = entries.ravel() if entries.dtype.kind in "biuf" else entries.astype(object).ravel()
        codes, words = pd.factorize(flat)
        return placed(words)[codes].reshape(entries.shape)

    codes = column.codes
    of_codes = None if column.categories is None else placed(column.categories())
    get = of_words if codes is None or of_codes is None else lambda index: of_codes[codes(index)]
    own = {"said": column.get, "chunk": column.chunk}
    return Column(column.dims, column.shape, np.dtype(np.float32), get, column.scan, **own)


def from_series(series: Any, dims: tuple[str, ...]) -> Column:
    """A column of a pandas Series: categories stay codes.

    Nullable numbers become floats with NaN, anything else stays as it is.
    """
    import pandas as pd

    if isinstance(series.dtype, pd.CategoricalDtype) and series.cat.categories.dtype.kind not in "biuf":
        codes = from_array(series.cat.codes, dims)
        return from_categories(codes, lambda: np.asarray(series.cat.categories))
    if pd.api.types.is_extension_array_dtype(series.dtype) and pd.api.types.is_numeric_dtype(series.dtype):
        plain = series.to_numpy(dtype=float if series.isna().any() else None, na_value=np.nan)
        return from_array(plain, dims)
    return from_array(series, dims)


def from_disk(
    block: Callable[[tuple[slice, ...]], np.ndarray],
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
    scan: int | None = None,
    chunk: int | None = None,
) -> Column:
    """A column of which only blocks can be read: neighbouring rows in one reading, then put in order."""

    def get(index: Index) -> np.ndarray:
        wanted = {axis: np.unique(p, return_inverse=True) for axis, p in enumerate(index) if p is not None}
        window = [slice(0, n) for n in shape]
        for axis, (places, _) in wanted.items():
            window[axis] = slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
        if not wanted:
            return np.array(block(tuple(window)))
        lead, (places, _) = next(iter(wanted.items()))
        parts = []
        for run in np.split(places, np.flatnonzero(np.diff(places) > GAP) + 1):
            start = int(run[0]) if len(run) else 0
            window[lead] = slice(start, int(run[-1]) + 1 if len(run) else 0)
            part = np.asarray(block(tuple(window)))
            parts.append(part if len(run) == part.shape[lead] else np.take(part, run - start, lead))
        array = parts[0] if len(parts) == 1 else np.concatenate(parts, lead)
        for axis, (kept, inverse) in wanted.items():
            places = inverse if axis == lead else kept[inverse] - window[axis].start
            if len(places) < array.shape[axis] or (places != np.arange(len(places))).any():
                array = np.take(array, places, axis)
        return array

    return Column(dims, shape, dtype, get, scan, chunk=chunk)


def arranged(
    table: Table,
    *,
    dims: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    select: Mapping[str, Sequence[Any]] | None = None,
) -> Table:
    """The same table with other names, or only some labels of a dim. Nothing on disk is read but labels.

    In a table of lines (a frame, CSV, ECSV, FITS) the columns of labels stand for the dims.

    Args:
        table: the table.
        dims: new name by old name.
        columns: field name by column name to be used for it.
        select: by dim (its old name), the labels to keep, in that order (lines keep their own order).

    Raises:
        DataError: listing dims, columns and labels that are not there.
    """
    dims, columns, select = dict(dims or {}), dict(columns or {}), dict(select or {})
    sizes = {d: n for c in table.columns.values() for d, n in zip(c.dims, c.shape, strict=True)}
    listing = {d for d in table.columns if table.lines and d not in sizes}
    faults = [
        f'there is no dim "{d}"; the dims are {sorted({*sizes, *listing})}'
        for d in dict.fromkeys([*dims, *select])
        if d not in sizes and d not in listing
    ]
    faults += [
        f'there is no column "{place}" (wanted for "{name}"); there are {sorted(table.columns)}'
        for name, place in columns.items()
        if place not in table.columns
    ]
    places: dict[str, np.ndarray] = {}
    for d, wanted in select.items():
        if d in sizes:
            labels = table.labels[d].get([None]) if d in table.labels else np.arange(sizes[d])
            places[d] = _places(labels, d, wanted, faults)
        elif d in listing and table.row is not None:
            labels = table.columns[d].get([None]).astype(str)
            _places(np.unique(labels), d, wanted, faults)
            kept = np.flatnonzero(np.isin(labels, [str(w) for w in wanted]))
            places[table.row] = np.intersect1d(places.get(table.row, kept), kept)
    if faults:
        raise DataError(listed("the table cannot be arranged so:", faults))
    chosen = {**table.columns, **{name: table.columns[place] for name, place in columns.items()}}
    chosen |= {new: table.columns[old] for old, new in dims.items() if old in listing}
    labels_of = {dims.get(d, d): _renamed(_kept(c, places), dims) for d, c in table.labels.items()}
    for d, kept in places.items():  # a dim without labels keeps the numbers of its rows
        labels_of.setdefault(dims.get(d, d), from_array(kept, (dims.get(d, d),)))
    return replace(
        table,
        columns={name: _renamed(_kept(column, places), dims) for name, column in chosen.items()},
        labels=labels_of,
        row=None if table.row in dims else table.row,
        loose=frozenset(d for d in table.loose if d not in dims),
    )


def _places(labels: np.ndarray, dim: str, wanted: Sequence[Any], faults: list[str]) -> np.ndarray:
    place = {str(label): k for k, label in enumerate(labels)}
    if absent := [str(w) for w in wanted if str(w) not in place]:
        shown = ", ".join(list(place)[:20])
        faults.append(f'dim "{dim}" has no label {", ".join(map(repr, absent))}; it has {shown}')
    return np.array([place[str(w)] for w in wanted if str(w) in place], dtype=np.int64)


def _renamed(column: Column, dims: Mapping[str, str]) -> Column:
    return replace(column, dims=tuple(dims.get(d, d) for d in column.dims))


def _kept(column: Column, places: Mapping[str, np.ndarray]) -> Column:
    kept = [places.get(d) for d in column.dims]
    if all(k is None for k in kept):
        return column

    def at(read: Callable[[Index], np.ndarray]) -> Callable[[Index], np.ndarray]:
        def get(index: Index) -> np.ndarray:
            pairs = zip(kept, index, strict=True)
            return read([i if k is None else (k if i is None else k[i]) for k, i in pairs])

        return get

    shape = tuple(n if k is None else len(k) for n, k in zip(column.shape, kept, strict=True))
    sparse = column.sparse and column.sparse.chosen(*kept)
    codes = column.codes and at(column.codes)
    chunk = column.chunk if kept[0] is None else None  # some rows of each chunk are not wanted
    return replace(column, shape=shape, get=at(column.get), sparse=sparse, codes=codes, chunk=chunk)
