"""Some rows of a source, as a source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Subset:
    """Some rows of a source, as a source; ``fingerprint`` is that of the whole."""

    source: Any
    row: str
    places: np.ndarray
    sizes: Mapping[str, int]
    coords: Mapping[str, np.ndarray]
    nbytes: int
    fingerprint: str

    def read(self, index: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fields by name; ``index`` counts the rows that were taken."""
        places = self.places[np.asarray(index[self.row])] if self.row in index else self.places
        return self.source.read({**index, self.row: places})


def evenly(source: Any, row: str, rows: int) -> Subset:
    """So many rows of a source, evenly spread from the first to the last."""
    places = np.linspace(0, source.sizes[row] - 1, rows).round().astype(int)
    coords = {d: np.asarray(source.coords[d]) for d in source.sizes}
    coords[row] = coords[row][places]
    return Subset(source, row, places, {**source.sizes, row: rows}, coords, source.nbytes, source.fingerprint)
