from __future__ import annotations

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from scivi import analysis
from scivi.errors import DataError


@pytest.fixture
def drawn(catalogue):
    """Every figure of one catalogue, drawn under untouched settings."""
    before = dict(mpl.rcParams)
    tree = catalogue(rows=60, draws=200, scale=0.6)
    nuts = catalogue(rows=60, draws=90, chains=2, method="nuts", extra=False)
    figures = {
        "history": analysis.plot_history(tree),
        "row_k": analysis.plot_row_k(tree),
        "population": analysis.plot_population(tree, reference=nuts),
        "predictive": analysis.plot_predictive(tree),
        "catalogue": analysis.plot_catalogue(tree, "z"),
        "comparison": analysis.plot_comparison(tree, nuts),
    }
    for figure in figures.values():
        figure.canvas.draw()
    assert dict(mpl.rcParams) == before
    return figures


def test_every_figure_is_labelled_and_needs_no_window(drawn):
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
    for figure in drawn.values():
        assert isinstance(figure, Figure)
        assert all(ax.get_xlabel() for ax in figure.axes if ax.get_visible())


def test_threshold_line_units_and_both_posteriors_are_drawn(drawn):
    ax = drawn["row_k"].axes[0]
    assert any(line.get_ydata()[0] == 0.7 for line in ax.lines)
    assert drawn["population"].axes[0].get_title(loc="left") == "mu"
    assert drawn["population"].axes[0].get_xlabel() == "ln ct"
    labels = [line.get_label() for line in drawn["population"].axes[0].lines]
    assert labels == ["prior", "posterior", "NUTS"]  # with 200 and 180 draws: none is dropped
    assert drawn["catalogue"].axes[0].get_ylabel() == "z (ln ct)"


def test_wrong_names_are_refused(catalogue):
    with pytest.raises(DataError, match='"mu" does not run over rows'):
        analysis.plot_catalogue(catalogue(rows=5, draws=30), "mu")
