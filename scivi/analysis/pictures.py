"""A figure as a picture in a page: as it was drawn for a desk, and again for a phone."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from scivi.analysis.skeleton import NARROW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH, CSS_PER_INCH = 200, 100  # of a figure, and of its place on the page


def picture(figure: Figure, caption: str) -> str:
    """A figure as it is, and once more with its panels below each other, for a narrow page."""
    panels = "; ".join(dict.fromkeys(filter(None, map(_panel, figure.axes))))
    wide, width, height = _data(figure)
    small, _, _ = _data(narrowed(figure))
    return (
        f'<figure><picture><source media="screen and (max-width:{NARROW}px)" srcset="{small}">'
        f'<img width="{width}" height="{height}" alt="Figure: {escape(panels)}." src="{wide}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _panel(ax: Axes) -> str:
    """What a panel shows, for those who cannot see it."""
    if not ax.get_visible():
        return ""
    title, x, y = ax.get_title(loc="left").replace("\n", " "), ax.get_xlabel(), ax.get_ylabel()
    return ": ".join(filter(None, (title, f"{y} against {x}" if x and y else x or y)))


def _data(figure: Figure) -> tuple[str, int, int]:
    """A figure as data, clear where nothing is drawn, with its width and height on the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = (round(float(v) * CSS_PER_INCH) for v in figure.get_size_inches())
    return f"data:image/png;base64,{data}", width, height


def narrowed(figure: Figure, width: float = 3.58) -> Figure:
    """Put the panels of a figure below each other, as on a phone. Changes the figure, and returns it.

    Args:
        figure: of ``scivi.analysis.plots``.
        width: in inches, a hundredth of which is a pixel of a page.
    """
    shown = [ax for ax in figure.axes if ax.get_visible()]
    first = shown[0].get_subplotspec()
    if first is None:
        return figure
    ratios = np.atleast_1d(first.get_gridspec().get_width_ratios()).tolist()
    small = all(not ax.get_yticks().size for ax in shown)  # no scale at the left: two beside each other
    beside = len(set(ratios)) > 1 and shown[-1].get_shared_y_axes().joined(shown[0], shown[-1])
    columns = min(len(shown), 2) if small or beside else 1
    rows, height = -(-len(shown) // columns), figure.get_figheight() / first.get_gridspec().nrows
    grid = figure.add_gridspec(rows, columns, width_ratios=ratios if beside else None)
    for i, ax in enumerate(shown):
        ax.set_subplotspec(grid[i // columns, i % columns])
        if columns == 1:
            ax.tick_params(labelleft=True)
        elif small:
            ax.locator_params(axis="x", nbins=2)
    figure.set_size_inches(width, rows * min(height, 1.7 if small else 2.6) + 0.3)
    for legend in list(figure.legends):
        handles = [artist for artist in legend.legend_handles if artist is not None]
        names = [text.get_text() for text in legend.get_texts()]
        legend.remove()
        beside = 3 if sum(map(len, names)) < 30 else 1  # letters that fit
        figure.legend(handles, names, loc="outside upper left", ncols=beside, fontsize=8, frameon=False)
    return figure
