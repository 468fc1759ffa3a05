"""Axes to draw on, given or new, and how they look.

A function that draws takes ``ax`` and returns what it has drawn on: one of matplotlib's Axes if it has one
panel, else a 1-D array of them, as ``matplotlib.pyplot.subplots`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from scivi.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Where: TypeAlias = Axes | Sequence[Axes] | np.ndarray | Figure | None

# Paul Tol's bright scheme, distinguishable by colour-blind readers: https://personal.sron.nl/~pault/
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377",
)  # fmt: skip
INK, PALE, MIDDLE = "#333333", "#E6E6E6", "#888888"  # a page shows them inverted to readers in the dark


class Panels:
    """The axes of one drawing.

    Args:
        ax: axes, one for each panel, in any arrangement; an empty Figure, which is sized and laid out, and of
            which pyplot need not know; or None for a new figure of pyplot, which a notebook shows.
        count: of panels.
        size: of a new figure, width and height in inches.
        columns: of its grid; None for one row.
        **grid: more about it, as ``Figure.subplots`` takes it.

    Raises:
        DataError: other than ``count`` axes are given, or a figure that holds some already.
    """

    def __init__(
        self, ax: Where, count: int, size: tuple[float, float], *, columns: int | None = None, **grid: Any
    ) -> None:
        from matplotlib.figure import Figure

        self.laid_out = ax is None or isinstance(ax, Figure)
        columns = columns or count
        self.each = _given(ax, count, columns) if not self.laid_out else _new(ax, count, columns, size, grid)
        for one in self.each:
            plain(one)

    @property
    def told(self) -> Any:
        """What the caller is handed: the axes if there is one panel, else all in an array."""
        return self.each[0] if len(self.each) == 1 else self.each

    def legend(self) -> None:
        """The first panel's legend: above all panels of a figure laid out here, else within that panel."""
        handles, names = self.each[0].get_legend_handles_labels()
        if self.laid_out:
            how = {"loc": "outside upper left", "ncols": 3, "fontsize": 8, "frameon": False}
            self.each[0].get_figure().legend(handles, names, **how)
        else:
            self.each[0].legend(handles, names, fontsize=8, frameon=False)


def _given(ax: Any, count: int, columns: int) -> np.ndarray:
    """The axes that a caller gave, (count,)."""
    from matplotlib.axes import Axes

    found = np.array(ax, dtype=object).ravel()
    others = sorted({type(one).__name__ for one in found if not isinstance(one, Axes)})
    if len(found) == count and not others:
        return found
    rows = -(-count // columns)
    need = "one panel; give one Axes, such as plt.subplots()[1]"
    if count > 1:
        used = f"the first {count} of " if rows * columns > count else ""
        need = f"{count} panels; give {count} Axes, such as {used}plt.subplots({rows}, {columns})[1].flat"
    got = f"{', '.join(others)}, which is no Axes" if others else f"{len(found)} Axes"
    raise DataError(f"ax is {got}: this drawing has {need}, or leave ax out for a new figure.")


def _new(ax: Any, count: int, columns: int, size: tuple[float, float], grid: dict[str, Any]) -> np.ndarray:
    """Axes of a grid in a new or empty figure, (count,); places of the grid that are left over stay blank."""
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure()
    if ax.axes:
        raise DataError(
            f"ax is a figure that holds {len(ax.axes)} Axes already: give these, or an empty one."
        )
    ax.set_size_inches(size)
    ax.set_layout_engine("constrained")
    ax.set_facecolor("white")
    found = ax.subplots(-(-count // columns), columns, squeeze=False, **grid).ravel()
    for one in found[count:]:
        one.set_visible(False)
    return found[:count]


def plain(ax: Axes) -> None:
    """Two spines, and small ticks."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(labelsize=8, color="#999999", labelcolor=INK)


def titled(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Name the axes of a panel."""
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.set_title(title, fontsize=9, color=INK, loc="left")


def leftmost(ax: Axes) -> bool:
    """Whether a panel stands first in its row of the grid, as far as there is one."""
    spec = ax.get_subplotspec()
    return spec is None or spec.is_first_col()
