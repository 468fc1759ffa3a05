"""How narrow a type holds the entries of a field: learnt chunk by chunk, so that rows can be kept in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# counts of a cell or a pixel are seldom above 255, and 65535 is the most of a 16-bit camera
_WHOLE = tuple(map(np.dtype, (np.uint8, np.int8, np.uint16, np.int16)))


@dataclass(slots=True)
class Span:
    """What the entries of a field have in common, over the chunks in which they are read.

    Args:
        low, high: the least and the greatest entry.
        whole: whether every entry is a whole number.
        gaps: whether some entry is missing (NaN).
        empty: whether every entry is.
    """

    low: float = np.inf
    high: float = -np.inf
    whole: bool = True
    gaps: bool = False
    empty: bool = True

    def add(self, values: np.ndarray) -> None:
        """Take in a chunk."""
        if not values.size:
            return
        low, high = values.min(), values.max()  # NaN if an entry is
        if np.isnan(low):
            self.gaps, self.whole = True, False
            self.empty = self.empty and bool(np.isnan(values).all())
            return
        self.empty = False
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if self.whole and values.dtype.kind == "f":
            self.whole = bool((values == np.rint(values)).all())

    def dtype(self, stored: np.dtype, wanted: np.dtype) -> np.dtype:
        """The narrowest type from which the entries reach ``wanted`` with the same bits as from ``stored``.

        Whole numbers of at most 16 bits have a type of that size. Anything else keeps ``stored``, or takes
        ``wanted`` where that is no wider.
        """
        if self.whole and self.low <= self.high:
            for dtype in _WHOLE:
                info = np.iinfo(dtype)
                if dtype.itemsize < wanted.itemsize and info.min <= self.low and self.high <= info.max:
                    return dtype
        return stored if stored.kind in "iuf" and stored.itemsize < wanted.itemsize else wanted
