"""Named values become a ``DataTree`` with its verdict, in memory or in a file: the one way out of torch."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from scivi.errors import DataError
from scivi.files import opened, put, remove
from scivi.inputs.batches import Batch
from scivi.inputs.features import Features, constants_of
from scivi.inputs.fields import Field
from scivi.models.template import Template

Named = Mapping[str, tuple[tuple[str, ...], np.ndarray]]  # by variable: dims, and values with those dims
SAMPLED = ("chain", "draw")
IN_NATS = ("log_likelihood", "sample_stats")  # groups of log densities
JUDGED_ROWS = 1000  # a share of one row in ten is known to one in a hundred (our choice)
ZARR = 2  # format 3 has no settled text type yet
IN_PARTS: dict[str, Any] = {"consolidated": False, "zarr_format": ZARR}  # of a store that grows


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
    lead = SAMPLED if sampled else ()
    present = {d for dims, _ in named.values() for d in dims}
    labels = {d: np.asarray(own) for d, own in coords.items() if d in present}
    if sampled and named:
        shape = next(iter(named.values()))[1].shape
        labels |= {d: np.arange(n) for d, n in zip(SAMPLED, shape, strict=False)}
    columns = {
        name: ((*lead, *dims), values, {"units": units.get(name, "1")})
        for name, (dims, values) in named.items()
    }
    return xr.Dataset(columns, labels)


def plain_labels(labels: Any) -> list[Any]:
    """Labels of a dim as JSON can hold them: dates as ISO strings."""
    array = np.asarray(labels)
    return (array.astype(str) if array.dtype.kind in "mM" else array).tolist()


def units_of(template: Template) -> dict[str, str]:
    """Units of fields and reported sites."""
    return {**{name: f.unit for name, f in template.fields.items()}, **template.units}


def labels_of(template: Template, source: Any, chains: int, draws: int) -> dict[str, Any]:
    """Labels of every dim of a result, those without names as numbers; of rows to be read in parts."""
    sizes = {**template.all_sizes(source.sizes), "chain": chains, "draw": draws}
    coords = {d: source.coords[d] if d in source.sizes else np.arange(n) for d, n in sizes.items()}
    row = template.row_dims[0]
    if hasattr(source.coords, "parts"):
        coords[row] = source.coords.parts(row)
    return coords | {d: np.asarray(labels) for d, labels in template.coords.items()}


def data_groups(
    fields: Mapping[str, Field], source: Any, index: Mapping[str, np.ndarray]
) -> dict[str, Named]:
    """Observed and given fields, of some rows or all, as they were handed in; by group."""
    table = source.read(index)
    return {
        group: {n: (f.dims, table[n]) for n, f in fields.items() if f.role == role}
        for group, role in (("observed_data", "observed"), ("constant_data", "given"))
    }


def feature_dims(template: Template, source: Any) -> tuple[str, str, str]:
    """Dims of features, of the fit's rows and of constants: "_" is added where the data have such a dim."""
    taken = {*source.sizes, *template.all_sizes(source.sizes), *SAMPLED}
    feature, fit_row, constant = (
        f"{name}_" if name in taken else name for name in ("feature", "fit_row", "constant")
    )
    return feature, fit_row, constant


def feature_labels(features: Features | None, template: Template, source: Any) -> dict[str, Any]:
    """Labels of the dims of ``feature_group``."""
    if features is None:
        return {}
    feature, _, constant = feature_dims(template, source)
    return {feature: np.array(features.names), constant: np.array(list(features.constants), str)}


def feature_group(
    features: Features | None, template: Template, source: Any, batch: Batch
) -> dict[str, Named]:
    """What ``analysis.drift`` compares: features of these rows, and of those that the fit has kept."""
    if features is None:
        return {}
    feature, fit_row, constant = feature_dims(template, source)
    own = features.of(batch, template.told, source.coords)
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "feature_values": ((template.row_dims[0], feature), own),
        "fit_values": ((fit_row, feature), features.values),
    }
    if features.constants:
        here = constants_of(batch, template.told, source.coords)
        values = np.array([here.get(name, np.nan) for name in features.constants])
        found["constant_values"] = ((constant,), values)
        found["fit_constants"] = ((constant,), np.array(list(features.constants.values())))
    return {"features": found}


def tree(groups: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]) -> xr.DataTree:
    """All groups under one root, which carries the provenance as JSON."""
    root = xr.DataTree.from_dict({name: group for name, group in groups.items() if group.data_vars})
    created = datetime.now(UTC).isoformat(timespec="seconds")
    root.attrs["provenance"] = json.dumps({**provenance, "created": created})
    return root


def judged(found: xr.DataTree) -> xr.DataTree:
    """The same tree, with the attributes "verdict", "why" and "advice" that ``analysis.report`` gives.

    The verdict is "not judged", and why tells the reason, where that is refused: of very few draws.
    """
    from scivi.analysis.report import report

    try:
        found.attrs |= report(found, rows=JUDGED_ROWS).attrs
    except DataError as error:
        found.attrs |= {"verdict": "not judged", "why": json.dumps([str(error)]), "advice": "[]"}
    return found


def save_tree(found: xr.DataTree | xr.Dataset, path: str | Path) -> Path:
    """Write a tree or dataset to .nc (netCDF) or .zarr, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        if path.suffix == ".zarr":
            found.to_zarr(aside, mode="w", zarr_format=ZARR)
        else:
            found.to_netcdf(aside, engine="h5netcdf")
        put(aside, path)
    except RuntimeError as error:  # as which HDF5 tells of a full disk
        if number := re.search(r"errno = (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    finally:
        remove(aside)
    return path


def _aside(path: Path) -> Path:
    """Where a file or folder is written before it takes its place."""
    return path.with_name(f".{path.name}.part")


class Pieces:
    """Groups that come some rows at a time: held until the end, or appended to a .zarr as they come.

    Args:
        row: the dim along which pieces follow one another.
        coords: labels of all dims; those of rows are read as the rows come if they go to a .zarr.
        units: by variable.
        to: a file for the tree; with .zarr memory does not grow with the rows.
    """

    def __init__(
        self, row: str, coords: Mapping[str, Any], units: Mapping[str, str], to: str | Path | None
    ) -> None:
        self.row, self.coords, self.units = row, coords, units
        self.to = None if to is None else Path(to)
        self.store = _aside(self.to) if self.to is not None and self.to.suffix == ".zarr" else None
        self.parts: dict[str, dict[str, tuple[tuple[str, ...], list[np.ndarray]]]] = {}
        self.begun: set[str] = set()

    def __enter__(self) -> Pieces:
        if self.store is not None:
            self.store.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.store, ignore_errors=True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.store is not None:
            shutil.rmtree(self.store, ignore_errors=True)

    def add(self, rows: slice | None, groups: Mapping[str, Named]) -> None:
        """Take in the variables of some rows; of those without the row dim the first is kept.

        Args:
            rows: which; None if no variable has the row dim.
            groups: by group and name, dims (chain and draw included) and values.
        """
        for group, named in groups.items():
            local = {n: v for n, v in named.items() if self.row in v[0]}
            kept = self.parts.setdefault(group, {})
            for name, (dims, values) in named.items():
                if name not in local:
                    kept.setdefault(name, (dims, [values]))
                elif self.store is None:
                    kept.setdefault(name, (dims, []))[1].append(values)
            if self.store is not None and local:
                self._append(group, local, rows)

    def _append(self, group: str, local: Named, rows: slice | None) -> None:
        coords = {**self.coords, self.row: self.coords[self.row][rows]}
        piece = dataset(local, coords, self._units(group, local), sampled=False)
        if group in self.begun:
            piece.to_zarr(self.store, group=group, append_dim=self.row, **IN_PARTS)
            return
        chunks = {n: {"chunks": v.shape} for n, (_, v) in local.items()}
        piece.to_zarr(self.store, group=group, mode="a", encoding=chunks, **IN_PARTS)
        self.begun.add(group)

    def tree(self, whole: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]) -> xr.DataTree:
        """All that came, with groups that are whole, under one root; read lazily where it went to .zarr."""
        groups = {}
        for group, kept in self.parts.items():
            named = {n: (dims, self._joined(dims, values)) for n, (dims, values) in kept.items()}
            groups[group] = dataset(named, self.coords, self._units(group, named), sampled=False)
        found = tree({**groups, **whole}, provenance)
        if self.store is None:
            judged(found)
            if self.to is not None:
                save_tree(found, self.to)
            return found
        assert self.to is not None
        for name, group in found.children.items():
            group.to_dataset().to_zarr(self.store, group=name, mode="a", **IN_PARTS)
        self._finish(found.attrs)
        with opened(self.store) as written:
            self._finish(judged(written).attrs)
        put(self.store, self.to)
        return opened(self.to)

    def _finish(self, attrs: Mapping[Any, Any]) -> None:
        """Write the attributes of the root, and where all arrays of the store are."""
        import zarr

        xr.Dataset(attrs=attrs).to_zarr(self.store, mode="a", **IN_PARTS)
        zarr.consolidate_metadata(str(self.store), zarr_format=ZARR)

    def _units(self, group: str, named: Named) -> Mapping[str, str]:
        if group not in IN_NATS:
            return self.units
        return {name: "nat" for name, (_, values) in named.items() if values.dtype != bool}

    def _joined(self, dims: tuple[str, ...], values: list[np.ndarray]) -> np.ndarray:
        return values[0] if len(values) == 1 else np.concatenate(values, dims.index(self.row))
