"""Named values become a ``DataTree``: the one way out of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import arviz_base
import numpy as np
import xarray as xr
from torch import Tensor

from scivi.models.template import Template

Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]  # by variable: dims, and values with those dims
SAMPLED = ("chain", "draw")


def arranged(value: Tensor, n_draws: int, shape: Sequence[int]) -> np.ndarray:
    """A site's values over ``n_draws`` particles as (draw, *shape).

    Unit plates are dropped; constants are repeated.
    """
    array = value.detach().cpu().numpy()
    size = int(np.prod(shape, dtype=int))
    if array.size == n_draws * size:
        return array.reshape(n_draws, *shape)
    return np.broadcast_to(array.reshape(shape), (n_draws, *shape)).copy()


def dataset(
    named: Named, coords: Mapping[str, Any], units: Mapping[str, str], *, sampled: bool
) -> xr.Dataset:
    """One group: variables with dims, the coordinates of those dims, units in the attributes.

    Args:
        named: values; if ``sampled`` their leading dims are chain and draw, which ``dims`` does not name.
        coords: labels by dim; those of absent dims are left out.
        units: by variable.
        sampled: whether chain and draw lead.
    """
    present = {d for dims, _ in named.values() for d in dims}
    group = arviz_base.dict_to_dataset(
        {name: values for name, (_, values) in named.items()},
        dims={name: list(dims) for name, (dims, _) in named.items()},
        coords={d: np.asarray(labels) for d, labels in coords.items() if d in present},
        sample_dims=list(SAMPLED) if sampled else [],
        inference_library=None,
    )
    for name in group.data_vars:
        group[name].attrs["units"] = units.get(str(name), "1")
    return group


def plain_labels(labels: Any) -> list[Any]:
    """Labels of a dim as JSON can hold them: dates as ISO strings."""
    array = np.asarray(labels)
    return (array.astype(str) if array.dtype.kind in "mM" else array).tolist()


def units_of(template: Template) -> dict[str, str]:
    """Units of fields and reported sites."""
    return {**{name: f.unit for name, f in template.fields.items()}, **template.units}


def tree(groups: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]) -> xr.DataTree:
    """All groups under one root, which carries the provenance as JSON."""
    root = xr.DataTree.from_dict({name: group for name, group in groups.items() if group is not None})
    created = datetime.now(UTC).isoformat(timespec="seconds")
    root.attrs["provenance"] = json.dumps({**provenance, "created": created})
    return root


def save_tree(found: xr.DataTree, path: str | Path) -> Path:
    """Write a tree to .nc (netCDF) or .zarr; whole or not at all for netCDF."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zarr":
        found.to_zarr(path, mode="w", zarr_format=2)  # format 3 has no settled text type yet
        return path
    aside = path.with_name(f".{path.name}.part")
    found.to_netcdf(aside, engine="h5netcdf")
    aside.replace(path)
    return path
