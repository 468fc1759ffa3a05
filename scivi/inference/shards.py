"""Draws that several processes write into one .zarr, each the rows that it has worked out itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from scivi.files import opened
from scivi.inference.team import Team, team
from scivi.inference.trees import IN_PARTS, ZARR, Named, Pieces, dataset


def collector(
    row: str, coords: Mapping[str, Any], units: Mapping[str, str], to: str | Path | None
) -> tuple[Team, Pieces | Shards]:
    """What takes in draws some rows at a time, and the processes that share the rows.

    Of several processes they are shared if they go to a .zarr; else each has all, and the first alone writes.
    """
    ours = team()
    if ours.size > 1 and to is not None and Path(to).suffix == ".zarr":
        return ours, Shards(Pieces(row, coords, units, to), ours)
    return Team(), Pieces(row, coords, units, to if ours.rank == 0 else None)


class Shards:
    """``Pieces`` of several processes; used as they are.

    The first process begins the store with the first rows and lets it grow to its full size. Then each writes
    its own rows: a piece is a chunk of the store, so that no two processes write to one file. The first gives
    the store its place when all are done.

    Args:
        pieces: for a .zarr; the first process's own, from which the others know where it is.
        team: the processes.
    """

    def __init__(self, pieces: Pieces, team: Team) -> None:
        self.pieces, self.team, self.coords = pieces, team, pieces.coords
        self._begun, self._open = False, ExitStack()

    def __enter__(self) -> Shards:
        if self.team.rank == 0:
            self._open.enter_context(self.pieces)
        return self

    def __exit__(self, *how: object) -> None:
        self._open.close()

    def add(self, rows: slice | None, groups: Mapping[str, Named]) -> None:
        """Take in the variables of some rows; of those without rows the first process's first are kept."""
        first = self.team.rank == 0
        if first and (rows is None or rows.start == 0):
            self.pieces.add(rows, groups)
            if rows is not None:
                self._grow()
        self._begin()
        if rows is None or (first and rows.start == 0):
            return
        row = self.pieces.row
        for group, named in groups.items():
            local = {name: v for name, v in named.items() if row in v[0]}
            if local:
                piece = dataset(local, {}, {}, sampled=False)
                piece.to_zarr(self.pieces.store, group=group, mode="r+", region={row: rows}, **IN_PARTS)

    def tree(self, whole: Mapping[str, xr.Dataset], provenance: Mapping[str, object]) -> xr.DataTree:
        """All that came from all processes, read lazily."""
        self._begin()
        self.team.wait()  # for the rows of the others
        found = self.pieces.tree(whole, provenance) if self.team.rank == 0 else None
        self.team.wait()
        assert self.pieces.to is not None
        return opened(self.pieces.to) if found is None else found

    def _begin(self) -> None:
        """Wait until the store is there."""
        if not self._begun:
            self.team.wait()
            self._begun = True

    def _grow(self) -> None:
        """Let the store have room for all rows, and all their labels."""
        import zarr

        row, labels = self.pieces.row, np.asarray(self.coords[self.pieces.row])
        for group in self.pieces.begun:
            for _, array in zarr.open_group(self.pieces.store, path=group, zarr_format=ZARR).arrays():
                dims: Any = array.attrs["_ARRAY_DIMENSIONS"]
                array.resize([len(labels) if d == row else n for d, n in zip(dims, array.shape, strict=True)])
            named = xr.Dataset(coords={row: labels})
            named.to_zarr(self.pieces.store, group=group, mode="a", **IN_PARTS)
