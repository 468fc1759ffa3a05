"""A table meets the fields of a template: every fault at once, then rows by index, lazily."""

from __future__ import annotations

import hashlib
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from scivi.errors import DataError, listed
from scivi.inputs.columns import Column, Table, arranged
from scivi.inputs.fields import Field, Tally
from scivi.inputs.matching import Matching
from scivi.inputs.narrow import Span
from scivi.inputs.tables import as_table, from_table, pivoted

__all__ = ["TableSource", "arranged", "as_table", "from_anndata", "from_table", "open_source"]

_CHUNK = 2**19  # entries of a field that are checked at a time (our choice: 4 MB as float64)
_PIECE = 2**23  # entries that are read before they take a narrower type (our choice: 64 MB as float64)
_LABELS = 2**16  # labels that are read at a time (our choice: 5 MB as text)
FEW_ENTRIES = 2**20  # of all fields together, up to which ``validate`` sees them whole (our choice)
_HASHES = 2**20  # hashes of labels that are compared at a time (our choice: 8 MB)
_MOST_LABELS = 1_000_000  # labels that are read to warn of repeated ones (our choice)


class SomeLabels:
    """Labels of a dim of which only a part need be in memory: ``labels[3:5]`` reads two.

    All parts of text have one type, as wide as the longest label.

    Args:
        column: where they are.
    """

    def __init__(self, column: Column) -> None:
        self._column, self._text = column, None
        if column.dtype.kind in "OT":
            widths = (len(str(label)) for some in _in_chunks(column) for label in some)
            self._text = f"U{max(widths, default=1)}"

    def __len__(self) -> int:
        return self._column.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        labels = np.asarray(self._column.get([np.arange(len(self))[part]]))
        return labels if self._text is None else np.array(labels.tolist(), self._text)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class _Labels(Mapping[str, np.ndarray]):
    """Labels by dim, read when asked for: those of a long dim need not be in memory."""

    def __init__(self, sizes: Mapping[str, int], columns: Mapping[str, Column]) -> None:
        self._sizes, self._columns = sizes, columns

    def __getitem__(self, dim: str) -> np.ndarray:
        return np.asarray(self.parts(dim))

    def parts(self, dim: str) -> np.ndarray | SomeLabels:
        """Those of a long dim, of which parts can be read; numbers where it has none."""
        return SomeLabels(self._columns[dim]) if dim in self._columns else np.arange(self._sizes[dim])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


@dataclass(frozen=True, slots=True)
class TableSource:
    """Rows of a table that fits a template; made by ``open_source``.

    Args:
        fields: of the template.
        columns: by field, with dims in the words of the template; a field that takes its default has none.
        sizes: of every dim.
        coords: labels of every dim, read when asked for.
        nbytes: of all fields as float32.
        fingerprint: sha256 of the entries and dims of all fields, whatever holds them.
        spans: by field that has a column, what its entries have in common.
    """

    fields: Mapping[str, Field]
    columns: Mapping[str, Column]
    sizes: Mapping[str, int]
    coords: Mapping[str, np.ndarray]
    nbytes: int = 0
    fingerprint: str = ""
    spans: Mapping[str, Span] = field(default_factory=lambda: MappingProxyType({}))

    def read(self, index: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fields by name, new arrays with dims as declared; only ``index`` along the dims it names."""
        index = {dim: np.asarray(places, dtype=np.int64) for dim, places in index.items()}
        return {name: self.whole(name, index) for name in self.fields}

    def kept(
        self, row: str, places: np.ndarray | None, wanted: np.dtype
    ) -> dict[str, np.ndarray | csr_array]:
        """Fields as ``read`` gives them, in the types and forms in which they take the least memory.

        Args:
            row: the dim of which only some rows may be wanted.
            places: those rows, in any order; None for all.
            wanted: the type that the entries shall have in the end.

        Returns:
            By field an array of the narrowest type that holds it, or a CSR array if that is smaller.
        """
        rising = None if places is None else np.argsort(places)  # neighbours are read together
        return {name: self._kept(name, row, places, rising, wanted) for name in self.fields}

    def kept_nbytes(self, row: str, wanted: np.dtype) -> int:
        """Memory that ``kept`` takes of all rows."""
        return sum(int(min(self._nbytes(name, row, wanted))) for name in self.fields)

    def chunk(self, row: str) -> int:
        """Rows that are stored together along a dim, in the column with the most to read; 1 if none are."""

        def nbytes(column: Column) -> int:
            n = math.prod(column.shape) if column.sparse is None else column.sparse.nnz
            return n * column.dtype.itemsize

        columns = [c for c in self.columns.values() if row in c.dims[:1]]
        return max(columns, key=nbytes).chunk or 1 if columns else 1

    def _kept(
        self, name: str, row: str, places: np.ndarray | None, rising: np.ndarray | None, wanted: np.dtype
    ) -> np.ndarray | csr_array:
        dtype, dims = self._narrowest(name, wanted), self.fields[name].dims
        dense, sparse = self._nbytes(name, row, wanted)
        if sparse < dense:
            held = self.columns[name].sparse
            assert held is not None
            return held.rows(places, dtype)
        if row not in dims:
            return self.whole(name).astype(dtype, copy=False)
        axis = dims.index(row)
        rows = np.arange(self.sizes[row]) if places is None else places
        shape = [len(rows) if d == row else self.sizes[d] for d in dims]
        array, step = np.empty(shape, dtype), max(1, _PIECE * len(rows) // max(1, math.prod(shape)))
        for start in range(0, len(rows), step):
            stop = start + step
            some = slice(start, stop) if rising is None else rising[start:stop]
            array[(slice(None),) * axis + (some,)] = self.whole(name, {row: rows[some]})
        return array

    def _narrowest(self, name: str, wanted: np.dtype) -> np.dtype:
        if name not in self.spans:
            return wanted
        return self.spans[name].dtype(self.columns[name].dtype.newbyteorder("="), wanted)

    def _nbytes(self, name: str, row: str, wanted: np.dtype) -> tuple[float, float]:
        """Memory of a field kept dense, and kept as CSR (infinite if it cannot be)."""
        dims, size = self.fields[name].dims, self._narrowest(name, wanted).itemsize
        dense = size * math.prod(self.sizes[d] for d in dims)
        column = self.columns.get(name)
        if column is None or column.sparse is None or column.dims != dims or dims[0] != row:
            return dense, math.inf
        place = 4 if max(column.sparse.nnz, *column.shape) < 2**31 else 8  # scipy's types of an index
        return dense, (size + place) * column.sparse.nnz + place * (self.sizes[row] + 1)

    def whole(self, name: str, index: Mapping[str, np.ndarray] = MappingProxyType({})) -> np.ndarray:
        """One field, repeated along the dims that its column lacks."""
        dims = self.fields[name].dims
        shape = tuple(len(index[d]) if d in index else self.sizes[d] for d in dims)
        if name not in self.columns:
            return np.full(shape, self.fields[name].default)
        values, own = self.entries(name, index)
        if own == dims:
            return values
        present = tuple(n if d in own else 1 for d, n in zip(dims, shape, strict=True))
        return np.array(np.broadcast_to(values.reshape(present), shape))

    def entries(
        self, name: str, index: Mapping[str, np.ndarray], *, said: bool = False
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """What the table has for a field, and the dims it has there: those declared, or fewer.

        Of a field with labels their places, or with ``said`` the words as they stand in the table.
        """
        column = self.columns[name]
        read = column.said if said and column.said is not None else column.get
        values = _native(np.asarray(read([index.get(d) for d in column.dims])))
        own = tuple(d for d in self.fields[name].dims if d in column.dims)
        return np.asarray(np.transpose(values, [column.dims.index(d) for d in own]), order="C"), own


def _native(values: np.ndarray) -> np.ndarray:
    """Numbers of a type that torch can read."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "u" and size > 1:
        return values.astype(np.int64)
    if kind == "f" and size not in (2, 4, 8):
        return values.astype(np.float64)
    return values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))


def open_source(
    data: Any,
    fields: Mapping[str, Field],
    rows: Sequence[str],
    *,
    name: str = "template",
    sizes: Mapping[str, int | str] = MappingProxyType({}),
    validate: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], list[str]] | None = None,
    distinct: bool = False,
) -> TableSource:
    """Open data for a template: match names and dims, then read all entries once, in chunks, to check them.

    A field finds its column by name, an AnnData's in layers, obs, var, obsm, varm and uns. A given field
    whose column has fewer dims is repeated along the others. A long table, with a column per dim, is pivoted.

    Args:
        data: a source (returned as it is), an AnnData, an xarray Dataset or DataArray, a DataFrame, a dict of
            arrays, or the path of a .h5ad, .nc, .zarr, .csv, .tsv, .ecsv or .fits.
        fields: what the template needs.
        rows: its row dims.
        name: its name, for messages.
        sizes: of dims that the data do not give: a number, or the dim that has the same size.
        validate: more faults, from fields and the labels of all dims, both by name. It sees fields with rows
            only if all fields together have ``FEW_ENTRIES`` at most.
        distinct: whether a label of a row that occurs more than once is a fault; else it is a warning.

    Returns:
        A source: ``sizes``, ``coords``, ``fingerprint``, ``nbytes`` and ``read(index)``.

    Raises:
        DataError: listing every fault: names, dims, types, sizes, the number of entries off the support or
            above another field's, repeated labels, and what ``validate`` says.

    Notes:
        Costs one pass over the entries; memory does not grow with the number of rows of data on disk.
    """
    if all(hasattr(data, word) for word in ("sizes", "nbytes", "read")):
        return data  # opened before, or a kind of source that somebody wrote
    observed = [f for f, declared in fields.items() if declared.role == "observed"]
    table = as_table(data, observed[0] if len(observed) == 1 else None)
    matching = Matching(_pivoted_if_long(table, fields), dict(fields), tuple(rows))
    columns = matching.columns()
    found = matching.sizes_of(columns, sizes)
    labels = {d: column for d, column in matching.labels().items() if d in found}
    source = TableSource(
        fields=MappingProxyType(dict(fields)),
        columns=MappingProxyType(columns),
        sizes=MappingProxyType(found),
        coords=_Labels(found, labels),
    )
    fingerprint, spans, faults = _checked(source, tuple(rows), matching)
    common = [n for n, f in fields.items() if not set(f.dims) & set(rows)]
    if validate is not None and matching.can_be_read(common) and not matching.unsized:
        few = sum(math.prod(found[d] for d in f.dims) for f in fields.values()) <= FEW_ENTRIES
        seen = [n for n in fields if n in common or (few and matching.can_be_read([n]))]
        faults += validate({n: source.whole(n) for n in seen}, source.coords)
    told = [d for d in rows if d in labels and (distinct or found[d] <= _MOST_LABELS)]
    repeated = [fault for d in told if (fault := _repeated(d, labels[d]))]
    other = [
        f'there are {c.shape[0]} labels of dim "{d}", which has {found[d]} entries.'
        for d, c in labels.items()
        if c.shape[0] != found[d] and d not in matching.unsized
    ]
    if wrong := [*matching.faults, *other, *faults, *(repeated if distinct else [])]:
        raise DataError(listed(f'the data cannot be used with template "{name}":', wrong))
    for fault in repeated:
        warnings.warn(fault, stacklevel=3)
    nbytes = 4 * sum(math.prod(found[d] for d in f.dims) for f in fields.values())
    return replace(source, nbytes=nbytes, fingerprint=fingerprint, spans=MappingProxyType(spans))


def from_anndata(adata: Any, dims: Mapping[str, str] | None = None, **columns: str) -> Table:
    """An AnnData as a table, with the place of each field said outright. Nothing is copied.

    Without this a field is looked for by name in layers, obs, var, obsm, varm, uns; ``X`` is never guessed.

    Args:
        adata: an AnnData (backed or not), or the path of a .h5ad or of an AnnData zarr store.
        dims: what "obs" and "var" are called in the template: ``{"obs": "cell", "var": "gene"}``.
        **columns: by field, its place: "X", "layers/counts", "obs/size", "obsm/protein", "uns/alpha".

    Returns:
        A table for ``fit`` and every other verb that takes data.

    Raises:
        DataError: listing places and dims that are not there.
    """
    table = as_table(adata)
    if table.what != "AnnData":
        raise DataError(f"from_anndata takes an AnnData, not a {table.what}.")
    return arranged(table, dims=dims, columns=columns)


def _pivoted_if_long(table: Table, fields: Mapping[str, Field]) -> Table:
    """A table of lines becomes matrices if it has a column for each dim of a field that has several."""
    dims = tuple(dict.fromkeys(d for f in fields.values() for d in f.dims))
    wide = any(len(f.dims) > 1 and name in table.columns for name, f in fields.items())
    if not (wide and table.lines and all(d in table.columns for d in dims)):
        return table
    narrow = {
        n: f.dims
        for n, f in fields.items()
        if n in table.columns and (f.labels or set(f.dims) < set(dims)) and n not in dims
    }
    return as_table(pivoted(table, dims, narrow))


def _checked(
    source: TableSource, rows: tuple[str, ...], matching: Matching
) -> tuple[str, dict[str, Span], list[str]]:
    """Fingerprint, spans and faults of all entries, read once in chunks.

    A field is held against its bound entry by entry, both repeated along dims that their columns lack.
    """
    digest, faults, spans = hashlib.sha256(), [], {}
    for name in sorted(source.fields):
        if name not in source.columns:
            digest.update(f"{name} = {source.fields[name].default}".encode())
            continue
        column, declared = source.columns[name], source.fields[name]
        own = tuple(d for d in declared.dims if d in column.dims)
        sizes = dict(zip(column.dims, column.shape, strict=True))
        bound = declared.at_most
        if bound and matching.can_be_read([name, bound]):
            own, sizes = declared.dims, source.sizes
        else:
            bound = ""
        along = next((d for d in (*rows, *own) if d in own), None)
        step = _CHUNK * sizes.get(along or "", 1) // max(1, math.prod(sizes[d] for d in own))
        step = _whole(max(1, step), column.chunk if along == column.dims[0] else None) if along else 1
        digest.update(f"{name} {own} {[sizes[d] for d in own]}".encode())
        tally, spans[name] = Tally(name, declared, own), Span()
        for start in range(0, sizes[along] if along else 1, step):
            index = {along: np.arange(start, min(sizes[along], start + step))} if along else {}
            values = source.whole(name, index) if bound else source.entries(name, index)[0]
            spans[name].add(values)
            tally.add(
                values,
                tuple(start if d == along else 0 for d in own),
                most=source.whole(bound, index) if bound else None,
                said=partial(_said, source, name, index) if declared.labels else None,
            )
            block = np.moveaxis(values, own.index(along), 0) if along else values
            digest.update(block.astype("<f8").tobytes())
        faults += tally.faults()
    return digest.hexdigest(), spans, faults


def _whole(n: int, chunk: int | None) -> int:
    """About so many rows, best in whole chunks: fewer, or up to four times as many if a chunk has more."""
    chunk = chunk or 1
    return n - n % chunk or min(chunk, 4 * n)


def _said(source: TableSource, name: str, index: Mapping[str, np.ndarray]) -> np.ndarray:
    return source.entries(name, index, said=True)[0]


def _repeated(dim: str, labels: Column) -> str:
    """A sentence on the labels of a dim that occur more than once, if there are any."""
    shared = _shared_hashes(labels)
    told = (label for some in _in_chunks(labels) for label in some)
    count = Counter(label for label in told if hash(label) in shared) if shared else {}
    again = [label for label, times in count.items() if times > 1]
    if not again:
        return ""
    return f'{len(again)} labels of "{dim}" occur more than once; the first is "{again[0]}".'


def _shared_hashes(labels: Column) -> set[int]:
    """Hashes that several labels have. A file takes them all, 8 bytes each; part by part they are sorted."""
    n_parts, shared = 1 + labels.shape[0] // _HASHES, set()
    with tempfile.TemporaryFile() as file:
        for some in _in_chunks(labels):
            file.write(np.fromiter(map(hash, some), np.int64, len(some)).tobytes())
        for part in range(n_parts):
            file.seek(0)
            blocks = map(np.frombuffer, iter(partial(file.read, 8 * _LABELS), b""), repeat(np.int64))
            hashes = np.concatenate([np.empty(0, np.int64), *(b[b % n_parts == part] for b in blocks)])
            hashes.sort()
            shared.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    return shared


def _in_chunks(labels: Column) -> Iterator[list[Any]]:
    n, step = labels.shape[0], _whole(_LABELS, labels.chunk)
    for start in range(0, n, step):
        some = labels.get([np.arange(start, min(n, start + step))])
        yield (some.astype(str) if some.dtype.kind in "mM" else some).tolist()
