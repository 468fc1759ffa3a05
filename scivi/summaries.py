"""What the command line tells of folders, files and results, as plain values and as lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scivi.errors import DataError
from scivi.files import opened

if TYPE_CHECKING:
    import xarray as xr


def tree_at(path: Path) -> xr.DataTree:
    """A posterior.

    Raises:
        DataError: there is none that can be read.
    """
    if not path.exists():
        raise DataError(f'there is no "{path}".')
    try:
        return opened(path)
    except (OSError, ValueError) as error:
        raise DataError(f'"{path}" is no posterior that can be read: {error}') from None


def described(path: Path) -> dict[str, Any]:
    """What is in a folder of a fit, a posterior, or data.

    Raises:
        DataError: there is nothing, or nothing that is known.
    """
    if not path.exists():
        raise DataError(f'there is no "{path}".')
    if path.is_dir() and not {"zarr.json", ".zgroup"} & {p.name for p in path.iterdir()}:
        inside = [p for p in sorted(path.iterdir()) if p.suffix in (".nc", ".zarr") or p.name == "fit"]
        told = {p.stem: json.loads(p.read_text()) for p in sorted(path.glob("*.json"))}
        if not inside and not told:
            raise DataError(f'"{path}" holds neither a fit nor data.')
        return {"folder": str(path), **told, **{p.name: described(p) for p in inside}}
    if path.suffix in (".nc", ".zarr"):
        tree = tree_at(path)
        if tree.children:
            groups = {name: sizes_of(node) for name, node in tree.children.items()}
            return {"groups": groups, "provenance": json.loads(tree.attrs.get("provenance", "{}"))}
    from scivi.inputs.tables import as_table

    table = as_table(path)
    columns = table.columns.items()
    shown = {n: {"dims": list(c.dims), "shape": list(c.shape), "dtype": str(c.dtype)} for n, c in columns}
    return {"kind": table.what, "columns": shown}


def sizes_of(node: Any) -> dict[str, int]:
    """Size of every dim of a dataset or group."""
    return {str(dim): int(n) for dim, n in node.sizes.items()}


def calibration(ranks: xr.Dataset, judged: xr.Dataset) -> dict[str, Any]:
    """How often each verdict fell, and how uniform the ranks of each variable are."""
    words = [str(word) for word in ranks["verdict"].values]
    columns = ("mean", "spread", "distance", "share_of_band", "ok")
    uniform = {
        str(v): {c: round(float(judged[c].sel(variable=v)), 4) for c in columns}
        for v in judged["variable"].values
    }
    return {"verdicts": {word: words.count(word) for word in sorted(set(words))}, "uniform": uniform}


def lines(summary: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """A summary as lines to print."""
    space = "  " * depth
    for name, entry in summary.items():
        if isinstance(entry, Mapping) and any(isinstance(v, Mapping) for v in entry.values()):
            yield f"{space}{name}:"
            yield from lines(entry, depth + 1)
        elif isinstance(entry, Mapping):
            yield f"{space}{name}: " + ", ".join(f"{k} {_flat(v)}" for k, v in entry.items())
        elif isinstance(entry, list) and depth == 0:
            yield f"{name}:" + "".join(f"\n  - {line}" for line in entry)
        else:
            yield f"{space}{name}: {_flat(entry)}"


def _flat(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)
