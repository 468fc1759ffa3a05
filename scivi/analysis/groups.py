"""Read a result tree: its groups, its rows, its variables entry by entry in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from scivi.errors import DataError

SAMPLE = ("chain", "draw")
BLOCK = 2_000_000  # numbers held at once: 16 MB as float64, our choice

_MAKER = {  # of groups that scivi.draw alone does not make
    "posterior_predictive": "scivi.predict",
    "history": "scivi.draw of a fit (NUTS has no history)",
}


def has(tree: xr.DataTree, name: str, *variables: str) -> bool:
    """Say whether a group exists and holds all the named variables."""
    return name in tree.children and all(v in tree.children[name].dataset for v in variables)


def group(tree: xr.DataTree, name: str, *variables: str) -> xr.Dataset:
    """Return one group of the tree.

    Raises:
        DataError: the group, or a variable needed from it, is missing.
    """
    if name not in tree.children:
        raise DataError(
            f'the tree has no group "{name}"; it has {sorted(tree.children)}. '
            f"Make one with {_MAKER.get(name, 'scivi.draw')}."
        )
    found = tree.children[name].to_dataset(inherit=False)
    missing = [v for v in variables if v not in found]
    if missing:
        raise DataError(
            f'group "{name}" lacks {missing}; it has {sorted(map(str, found.data_vars))}. '
            f"Make the tree again with {_MAKER.get(name, 'scivi.draw')}."
        )
    return found


def provenance(tree: xr.DataTree) -> dict[str, Any]:
    """Return the tree's provenance, empty if it has none."""
    stored = tree.attrs.get("provenance", "{}")
    return json.loads(stored) if isinstance(stored, str) else dict(stored)


def site_dims(array: xr.DataArray) -> tuple[str, ...]:
    """Dims of an array other than chain and draw."""
    return tuple(str(d) for d in array.dims if d not in SAMPLE)


def row_dim(tree: xr.DataTree) -> str | None:
    """The dim whose entries are the rows of the data, or None if the tree does not say."""
    if "sample_stats" in tree.children:
        stats = tree.children["sample_stats"].dataset
        for name in ("row_log_weight", "outside"):
            if name in stats and site_dims(stats[name]):
                return site_dims(stats[name])[0]
    declared = provenance(tree).get("data", {}).get("rows")
    if declared:
        return declared if isinstance(declared, str) else declared[0]
    for name in ("log_likelihood", "observed_data"):
        if name in tree.children:
            for array in tree.children[name].dataset.data_vars.values():
                if site_dims(array):
                    return site_dims(array)[0]
    return None


def local_rows(tree: xr.DataTree) -> int:
    """Number of rows that have latents of their own (0: all latents are shared)."""
    if not has(tree, "sample_stats", "row_log_weight"):
        return 0
    weight = tree.children["sample_stats"].dataset["row_log_weight"]
    return int(np.prod([weight.sizes[d] for d in site_dims(weight)]))


def have_latents(tree: xr.DataTree) -> bool:
    """Whether rows have latents of their own, also where draws carry no weights of rows."""
    return bool(provenance(tree).get("local")) or local_rows(tree) > 0


def some_rows(tree: xr.DataTree, most: int, *, seed: int = 0) -> xr.DataTree:
    """A tree with so many of its rows, chosen at random; the tree itself if it has no more."""
    row, n = row_dim(tree), rows(tree)
    if row is None or n <= most:
        return tree
    kept = np.sort(np.random.default_rng(seed).choice(n, most, replace=False, shuffle=False))
    parts = {name: node.to_dataset(inherit=False) for name, node in tree.children.items()}
    chosen = xr.DataTree.from_dict(
        {name: p.isel({row: kept}) if p.sizes.get(row) == n else p for name, p in parts.items()}
    )
    chosen.attrs = tree.attrs
    return chosen


def are_new(tree: xr.DataTree) -> bool:
    """Whether the data are not those of the fit."""
    made = provenance(tree)
    here, there = (made.get(name, {}).get("fingerprint") for name in ("data", "fit_data"))
    return here is not None and there is not None and here != there


def rows(tree: xr.DataTree) -> int:
    """Number of rows of the data, 0 if the tree does not say."""
    row = row_dim(tree)
    return max((node.sizes.get(row, 0) for node in tree.children.values()), default=0)


def population_names(tree: xr.DataTree) -> list[str]:
    """Numeric posterior variables that do not run over rows."""
    row = row_dim(tree)
    return [name for name, array in numeric(group(tree, "posterior")).items() if row not in array.dims]


def local_names(tree: xr.DataTree) -> list[str]:
    """Numeric posterior variables that run over rows."""
    row = row_dim(tree)
    return [name for name, array in numeric(group(tree, "posterior")).items() if row in array.dims]


def numeric(dataset: xr.Dataset) -> dict[str, xr.DataArray]:
    """The variables of a dataset that hold numbers, by name."""
    return {str(name): array for name, array in dataset.data_vars.items() if array.dtype.kind in "fiub"}


def label(array: xr.DataArray, flat: int) -> str:
    """Name one entry of an array without sample dims, as ArviZ does: ``theta[Choate]``."""
    return labels(array, [flat])[0]


def labels(array: xr.DataArray, flat: Sequence[int] | None = None) -> list[str]:
    """Names of the given entries, or of all, in C order; days as dates: ``volatility[2015-01-12]``."""
    flat = range(array.size) if flat is None else flat
    if not array.dims:
        return [str(array.name) for _ in flat]
    coords = [array[d].values if d in array.coords else np.arange(array.sizes[d]) for d in array.dims]
    where = np.unravel_index(np.asarray(flat, int), array.shape)
    parts = zip(*([_told(c[i]) for i in at] for c, at in zip(coords, where, strict=True)), strict=True)
    return [f"{array.name}[{', '.join(p)}]" for p in parts]


def _told(label: Any) -> str:
    """A label as text; a time as a date if it is midnight, else to the second if it is a whole one."""
    if isinstance(label, np.datetime64):
        for unit in ("D", "s"):
            if label == label.astype(f"datetime64[{unit}]"):
                return str(np.datetime_as_string(label, unit=unit))
    return str(label)


def aligned(left: xr.DataArray, right: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """Keep the entries that two arrays share by coordinate; chains and draws are left alone.

    Raises:
        DataError: other dims, a dim without coordinate whose sizes differ, or no entry in common.
    """
    dims = set(site_dims(left)), set(site_dims(right))
    fault = f"dims {sorted(dims[0])} and {sorted(dims[1])}" if dims[0] != dims[1] else ""
    if not fault:
        try:
            left, right = xr.align(left, right, join="inner", exclude=SAMPLE)
        except ValueError as error:  # sizes differ, or a coordinate has duplicates
            fault = str(error)
    if not fault and left.size == 0:
        fault = f"no coordinate of {sorted(dims[0])} in common"
    if fault:
        raise DataError(f'"{left.name}" cannot be aligned: {fault}. Give both the same dims and coordinates.')
    return left, right


def blocks(array: xr.DataArray, block: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield an array in pieces along its longest site dim, each (chain, draw, *site dims) float64.

    A lazily opened array is read one piece at a time.
    """
    rest = site_dims(array)
    array = array.transpose(*SAMPLE, *rest)
    if not rest:
        yield slice(None), array.values.astype(np.float64)
        return
    axis = longest(array)
    step = max(1, block * array.sizes[axis] // max(array.size, 1))
    for start in range(0, array.sizes[axis], step):
        piece = slice(start, start + step)
        yield piece, array.isel({axis: piece}).values.astype(np.float64)


def longest(array: xr.DataArray) -> str:
    """The longest site dim."""
    return max(site_dims(array), key=lambda d: array.sizes[d])


def entrywise(
    array: xr.DataArray, statistic: Callable[[np.ndarray], dict[str, np.ndarray]], block: int = BLOCK
) -> xr.Dataset:
    """Apply a statistic to every entry of a variable.

    Args:
        array: dims (chain, draw, *site dims).
        statistic: takes (chain, draw, n) and returns named arrays of n numbers.
        block: numbers held in memory at once.

    Returns:
        One variable per statistic, with the site dims and their coordinates.
    """
    rest = site_dims(array)
    parts: dict[str, list[np.ndarray]] = {}
    for _, piece in blocks(array, block):
        for name, values in statistic(piece.reshape(*piece.shape[:2], -1)).items():
            parts.setdefault(name, []).append(np.asarray(values).reshape(piece.shape[2:]))
    axis = rest.index(longest(array)) if rest else 0
    joined = {k: np.concatenate(v, axis=axis) if rest else v[0] for k, v in parts.items()}
    coords = {d: array.coords[d] for d in rest if d in array.coords}
    return xr.Dataset({k: (rest, v) for k, v in joined.items()}, coords=coords)


def stacked(found: Mapping[str, xr.Dataset], keys: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Statistics of several variables, entry by entry: the entries' names, and a column for each key."""
    names = [entry for name, one in found.items() for entry in labels(one[keys[0]].rename(name))]
    parts = {key: [one[key].values.ravel() for one in found.values()] for key in keys}
    return names, {key: np.concatenate([np.empty(0), *columns]) for key, columns in parts.items()}


def moments(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and sd over chain and draw of each entry, (chain, draw, n) -> n."""
    return {"mean": values.mean((0, 1)), "sd": values.std((0, 1))}


def worst(array: xr.DataArray, values: np.ndarray) -> tuple[float, str]:
    """The largest of the values (NaN loses), in C order of the site dims, and the label of its entry."""
    flat = np.asarray(values, float).ravel()
    if not np.isfinite(flat).any():
        return float("nan"), ""
    where = int(np.nanargmax(np.where(np.isfinite(flat), flat, -np.inf)))
    template = array.isel(dict.fromkeys(SAMPLE, 0), missing_dims="ignore")
    return float(flat[where]), label(template.transpose(*site_dims(array)), where)


def table(dim: str, names: list[str], columns: dict[str, Any], **attrs: Any) -> xr.Dataset:
    """A Dataset with one dim: a row per name, a variable per column."""
    data = {k: (dim, np.asarray(v, dtype=bool if k == "ok" else None)) for k, v in columns.items()}
    return xr.Dataset(data, coords={dim: np.asarray(names, dtype=str)}, attrs=attrs)
