"""AnnData as a ``Table``: in memory, backed, h5ad and zarr; sparse rows become dense when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scivi.errors import DataError, Unsupported
from scivi.inputs.columns import (
    Column,
    Table,
    axes,
    from_array,
    from_categories,
    from_disk,
    from_series,
    from_sparse,
)
from scivi.inputs.sparse import on_disk

_GROUPS = {"layers": ("obs", "var"), "obsm": ("obs",), "varm": ("var",)}


def of_anndata(adata: Any) -> Table:
    """The table of an AnnData object; ``X`` of a backed one stays on disk."""
    if adata.isbacked and adata.is_view:
        raise Unsupported(
            "a view of a backed AnnData cannot be streamed. Pass the whole, or its to_memory()."
        )
    columns: dict[str, Column] = {}
    labels = {axis: from_array(getattr(adata, f"{axis}_names"), (axis,)) for axis in ("obs", "var")}
    if adata.isbacked:
        columns["X"] = of_element(adata.file["X"], ("obs", "var"))
    elif adata.X is not None:
        columns["X"] = from_array(adata.X, ("obs", "var"))
    for place, dims in _GROUPS.items():
        for key, value in getattr(adata, place).items():
            name = f"{place}/{key}"
            own = axes(name, np.ndim(value), *dims)
            if hasattr(value, "columns"):  # a DataFrame: its columns are the labels of the second axis
                labels[own[1]] = from_array(np.asarray(value.columns, str), own[1:])
                value = value.to_numpy()
            columns[name] = from_array(value, own)
    for place, frame in (("obs", adata.obs), ("var", adata.var)):
        columns |= {f"{place}/{key}": from_series(frame[key], (place,)) for key in frame.columns}
    for key, value in adata.uns.items():
        if isinstance(value, int | float | np.ndarray | np.number):
            columns[f"uns/{key}"] = from_array(value, axes(f"uns/{key}", np.ndim(value)))
    return _table(columns, labels)


def of_h5ad(path: Path) -> Table:
    """The table of a .h5ad file, which stays open and is read as needed."""
    import h5py

    try:
        return of_group(h5py.File(path, "r"))
    except OSError as error:
        raise DataError(f'"{path}" cannot be read as HDF5: {error}') from None


def of_group(group: Any) -> Table:
    """The table of an AnnData stored in an HDF5 or zarr group."""
    columns: dict[str, Column] = {}
    labels = {
        axis: of_element(group[axis][group[axis].attrs["_index"]], (axis,))
        for axis in ("obs", "var")
        if axis in group
    }
    if "X" in group and _encoding(group["X"]) != "null":
        columns["X"] = of_element(group["X"], ("obs", "var"))
    for place, dims in _GROUPS.items():
        for key in group[place] if place in group else ():
            element, name = group[place][key], f"{place}/{key}"
            own = axes(name, _n_axes(element), *dims)
            if _encoding(element) == "dataframe":
                labels[own[1]] = from_array(list(element.attrs["column-order"]), own[1:])
            columns[name] = of_element(element, own)
    for place in ("obs", "var"):
        for key in group[place].attrs["column-order"] if place in group else ():
            columns[f"{place}/{key}"] = of_element(group[place][key], (place,))
    for key in group["uns"] if "uns" in group else ():
        element = group["uns"][key]
        if _encoding(element) in ("array", "numeric-scalar"):
            columns[f"uns/{key}"] = of_element(element, axes(f"uns/{key}", element.ndim))
    return _table(columns, labels)


def _table(columns: dict[str, Column], labels: dict[str, Column]) -> Table:
    loose = frozenset(d for column in columns.values() for d in column.dims if d != "obs")
    return Table(columns, labels, row="obs", loose=loose, what="AnnData")


def _encoding(element: Any) -> str:
    return str(element.attrs.get("encoding-type", "array"))


def _n_axes(element: Any) -> int:
    matrix = _encoding(element) in ("dataframe", "csr_matrix", "csc_matrix")
    return 2 if matrix else getattr(element, "ndim", 1)  # a ragged array of awkward is a group


def of_element(element: Any, dims: tuple[str, ...]) -> Column:
    """A column of an array, matrix, frame or list of words as AnnData stores it; it stays on disk."""
    encoding = _encoding(element)
    if encoding in ("csr_matrix", "csc_matrix"):
        return _of_sparse(element, dims, by_rows=encoding == "csr_matrix")
    if encoding == "dataframe":
        return _of_frame(element, dims)
    if encoding in ("nullable-integer", "nullable-boolean", "nullable-string-array"):
        values, mask, text = element["values"], element["mask"], encoding == "nullable-string-array"
        gap = np.array(None if text else np.nan)
        dtype = np.dtype(object if text else float)
        return from_disk(
            lambda key: np.where(mask[key], gap, values[key]), dims, values.shape, dtype, chunk=_chunk(values)
        )
    if encoding == "categorical":
        categories = of_element(element["categories"], ("category",))
        return from_categories(of_element(element["codes"], dims), lambda: categories.get([None]))
    if encoding not in ("array", "string-array", "numeric-scalar"):  # kept so that messages can name them
        shape = tuple(getattr(element, "shape", (element.attrs.get("length", 0),) * len(dims)))
        return Column(dims, shape, np.dtype(object), lambda index: np.empty(shape, object))
    read = element.asstr() if element.dtype.kind == "O" and hasattr(element, "asstr") else element  # HDF5
    shape, dtype = tuple(element.shape), np.dtype(element.dtype)
    return from_disk(lambda key: np.asarray(read[key]), dims, shape, dtype, chunk=_chunk(element))


def _chunk(array: Any) -> int | None:
    """Rows of an HDF5 or zarr array that are stored together."""
    return array.chunks[0] if array.ndim and array.chunks else None


def _of_frame(group: Any, dims: tuple[str, ...]) -> Column:
    columns = [of_element(group[key], dims[:1]) for key in group.attrs["column-order"]]
    dtype = np.result_type(*(c.dtype for c in columns)) if columns else np.dtype(float)
    shape = (group[group.attrs["_index"]].shape[0], len(columns))

    def block(key: tuple[slice, ...]) -> np.ndarray:
        rows = np.arange(key[0].start, key[0].stop)
        return np.stack([c.get([rows]) for c in columns[key[1]]], axis=1)

    return from_disk(block, dims, shape, dtype)


def _of_sparse(group: Any, dims: tuple[str, ...], by_rows: bool) -> Column:
    shape = (int(group.attrs["shape"][0]), int(group.attrs["shape"][1]))
    if by_rows:
        return from_sparse(on_disk(group, shape), dims)
    turned = on_disk(group, (shape[1], shape[0]))  # a CSC is the CSR of its transpose

    def block(key: tuple[slice, ...]) -> np.ndarray:
        rows, columns = key
        return turned.rows(np.arange(columns.start, columns.stop), turned.dtype)[:, rows].toarray().T

    return from_disk(block, dims, shape, turned.dtype, scan=0)
