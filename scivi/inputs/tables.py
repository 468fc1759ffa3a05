"""Every kind of data that we take, as a ``Table``: files, AnnData, xarray, frames and plain arrays."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from scivi.errors import DataError, listed, missing_extra
from scivi.inputs.columns import Column, Table, axes, from_array, from_disk, from_series, words_at

KINDS = (
    "an AnnData, an xarray Dataset or DataArray, a DataFrame, a dict of arrays, or the path of a "
    ".h5ad, .nc, .zarr, .csv, .tsv, .ecsv or .fits"
)


def as_table(data: Any, name: str | None = None) -> Table:
    """A ``Table`` of any kind of data; files stay on disk wherever their format allows it.

    Args:
        data: what the user gave.
        name: column name of a DataArray that has none.

    Raises:
        DataError: if the kind is unknown, or the file is not there.
        Unsupported: if reading it needs an extra that is not installed.
    """
    if isinstance(data, Table):
        return data
    if isinstance(data, str | Path):
        return _of_path(Path(data))
    if isinstance(data, xr.Dataset):
        return _of_dataset(data)
    if isinstance(data, xr.DataArray):
        name = str(data.name or name or "values")
        return _of_dataset(data.to_dataset(name=name))
    if _is_a(data, "anndata", "AnnData"):
        from scivi.inputs.annotated import of_anndata

        return of_anndata(data)
    if _is_a(data, "pandas", "DataFrame"):
        return _of_frame(data)
    if _is_a(data, "astropy.table", "Table"):
        return _of_astropy(data)
    if isinstance(data, Mapping):
        return _of_mapping(data)
    raise DataError(f"data of type {type(data).__name__} cannot be read. Give {KINDS}.")


def _is_a(data: Any, module: str, name: str) -> bool:
    """Whether ``data`` is of a type whose module somebody has imported already."""
    return module in sys.modules and isinstance(data, getattr(sys.modules[module], name))


def _of_path(path: Path) -> Table:
    if not path.exists():
        raise DataError(f'there is no "{path}".')
    endings = "".join(path.suffixes[-2:]).lower().removesuffix(".gz")
    kind = endings.rsplit(".", 1)[-1]
    if kind == "h5ad":
        from scivi.inputs.annotated import of_h5ad

        return of_h5ad(path)
    if kind == "zarr" or path.is_dir():
        return _of_zarr(path)
    if kind in ("nc", "nc4", "netcdf", "cdf"):
        with path.open("rb") as file:
            engine = "scipy" if file.read(3) == b"CDF" else "h5netcdf"  # netCDF 3, or HDF5
        return _of_dataset(_opened(path, engine))
    if kind in ("csv", "tsv"):
        import pandas as pd

        # exactly the numbers that are written: pandas' default parser may be off in the last place
        exact: dict[str, Any] = {"float_precision": "round_trip"}
        return _of_frame(pd.read_csv(path, sep="," if kind == "csv" else "\t", **exact))
    if kind in ("ecsv", "fits", "fit"):
        try:
            from astropy.table import Table as AstropyTable
        except ImportError:
            raise missing_extra("astropy", "astro") from None
        return _of_astropy(AstropyTable.read(path))
    raise DataError(f'"{path}" has an ending that we do not know. Give {KINDS}.')


def _opened(path: Path, engine: str) -> xr.Dataset:
    # no cache and no index: both would load whole columns; units such as "s" are not time spans to be decoded
    lazily: dict[str, Any] = {"chunks": None, "cache": False, "create_default_indexes": False}
    if engine == "zarr":
        lazily["consolidated"] = False
    try:
        return xr.open_dataset(path, engine=engine, decode_timedelta=False, **lazily)
    except (OSError, ValueError) as error:
        raise DataError(f'"{path}" cannot be read as {engine}: {error}') from None


def _of_zarr(path: Path) -> Table:
    import zarr
    from zarr.errors import BaseZarrError

    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, BaseZarrError) as error:
        raise DataError(f'"{path}" is not a zarr group: {error}') from None
    if group.attrs.get("encoding-type") == "anndata":
        from scivi.inputs.annotated import of_group

        return of_group(group)
    return _of_dataset(_opened(path, "zarr"))


def _of_dataset(dataset: xr.Dataset) -> Table:
    columns = {str(name): _of_variable(variable) for name, variable in dataset.variables.items()}
    own = [d for d in dataset.dims if d in dataset.variables and dataset.variables[d].dims == (d,)]
    labels = {str(d): columns[str(d)] for d in own}
    return Table(columns, labels, what="Dataset")


def _of_variable(variable: xr.Variable) -> Column:
    dims = tuple(str(d) for d in variable.dims)
    if variable._in_memory:  # xarray has no public word for it; without it rows would be read block by block
        return from_array(variable.values, dims)
    chunk = variable.encoding.get("preferred_chunks", {}).get(dims[0]) if dims else None
    return from_disk(lambda key: variable[key].values, dims, variable.shape, variable.dtype, chunk=chunk)


def _of_frame(frame: Any) -> Table:
    index = {str(n): np.asarray(frame.index.get_level_values(n)) for n in frame.index.names if n is not None}
    row = next(iter(index)) if len(index) == 1 else "row"
    columns = {str(name): from_series(frame[name], (row,)) for name in frame.columns}
    columns |= {name: from_array(values, (row,)) for name, values in index.items() if name not in columns}
    labels = {} if len(index) > 1 else {row: from_array(frame.index, (row,))}
    return Table(columns, labels, row=row, lines=True, what="DataFrame")


def _of_astropy(table: Any) -> Table:
    columns = {}
    for name in table.colnames:
        values = table[name]
        masked = getattr(values, "mask", None)
        plain = np.asarray(values)
        plain = plain.astype(str) if plain.dtype.kind == "S" else plain.astype(plain.dtype.newbyteorder("="))
        if masked is not None and np.any(masked) and plain.dtype.kind in "biuf":
            plain = np.where(np.asarray(masked), np.nan, plain.astype(float))
        columns[name] = from_array(plain, axes(name, plain.ndim, "row"))
    loose = frozenset(d for column in columns.values() for d in column.dims[1:])
    return Table(columns, row="row", loose=loose, lines=True, what="astropy Table")


def _of_mapping(data: Mapping[str, Any]) -> Table:
    columns, labels, loose = {}, {}, set()
    for name, value in data.items():
        if isinstance(value, xr.DataArray):
            column = _of_variable(value.variable)
            coords = value.coords.to_dataset()
            labels |= {str(d): _of_variable(coords.variables[d]) for d in value.dims if d in coords}
        elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple | list):
            column = _of_value(value[1], tuple(value[0]))
        else:
            dims = axes(name, np.ndim(value))
            column, loose = from_array(value, dims), loose | set(dims)
        if column.dims == (str(name),):  # as in xarray, what has the name of its dim is the labels of it
            labels[str(name)] = column
        columns[str(name)] = column
    return Table(columns, labels, loose=frozenset(loose), what="dict of arrays")


def _of_value(value: Any, dims: tuple[str, ...]) -> Column:
    """A column of an array, of scipy's sparse matrices, or of AnnData's on disk."""
    if hasattr(value, "group") and hasattr(value, "format"):
        from scivi.inputs.annotated import of_element

        return of_element(value.group, dims)
    return from_array(value, dims)


def from_table(
    data: Any, dims: Sequence[str], *, narrow: Mapping[str, str | Sequence[str]] | None = None
) -> xr.Dataset:
    """Turn a long table, one line for each combination of labels, into a Dataset.

    Args:
        data: DataFrame, dict of arrays, or the path of a table (CSV, ECSV, FITS).
        dims: the columns that hold labels: ("source", "band") makes a matrix of every other column.
        narrow: by column, the dims it depends on, if fewer; columns of text that are wanted too.

    Returns:
        Dataset with coords ``dims``, labels in order of first appearance; combinations that do not occur are
        NaN (None in text), other columns of text are left out.

    Raises:
        DataError: listing missing columns, combinations that occur twice, and narrow columns that vary.
    """
    table = as_table(data)
    own = {name: (d,) if isinstance(d, str) else tuple(d) for name, d in (narrow or {}).items()}
    return pivoted(table, tuple(dims), own)


def pivoted(table: Table, dims: tuple[str, ...], narrow: Mapping[str, tuple[str, ...]]) -> xr.Dataset:
    """As ``from_table``, of a ``Table`` whose columns all have one dim."""
    import pandas as pd

    absent = [name for name in [*dims, *narrow] if name not in table.columns]
    if absent:
        shown = ", ".join(sorted(table.columns))
        raise DataError(f"the long table has no column {', '.join(map(repr, absent))}; it has {shown}.")
    keys = {d: pd.factorize(table.columns[d].get([None])) for d in dims}
    coords = {d: _plain(labels) for d, (_, labels) in keys.items()}
    arrays, faults = {}, []
    for name, column in table.columns.items():
        if name in dims or not (column.numeric or name in narrow) or len(column.dims) != 1:
            continue
        own = narrow.get(name, dims)
        shape = tuple(len(coords[d]) for d in own)
        places = np.ravel_multi_index([keys[d][0] for d in own], shape)
        entries, words = column.get([None]), None
        if not column.numeric:
            codes, words = pd.factorize(entries)
            entries = np.where(codes < 0, np.nan, codes)
        values, fault = _scattered(entries, places, int(np.prod(shape)), whole=own == dims)
        if words is not None:
            values = words_at(np.nan_to_num(values, nan=-1).astype(int), words)
        if fault:
            faults.append(f'column "{name}", {own}: {fault}')
        arrays[name] = (own, values.reshape(shape))
    if faults:
        raise DataError(listed("the long table cannot be pivoted:", dict.fromkeys(faults)))
    return xr.Dataset(arrays, coords=coords)


def _plain(labels: Any) -> np.ndarray:
    labels = np.asarray(labels)
    return labels.astype(str) if labels.dtype.kind == "O" else labels


def _scattered(values: np.ndarray, places: np.ndarray, size: int, whole: bool) -> tuple[np.ndarray, str]:
    _, first, count = np.unique(places, return_index=True, return_counts=True)
    if whole and count.max(initial=1) > 1:
        line = int(first[count.argmax()])
        return np.zeros(size), f"{int((count > 1).sum())} combinations occur more than once; see line {line}"
    out = np.full(size, np.nan) if len(first) < size else np.empty(size, values.dtype)
    out[places[first]] = values[first]
    differs = (out[places] != values) & ~((out[places] != out[places]) & (values != values))
    if not differs.any():
        return out, ""
    n, line = int(differs.sum()), differs.argmax()
    return out, f"it differs within a label in {n} lines; the first is line {line}"
