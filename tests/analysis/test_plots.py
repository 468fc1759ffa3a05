from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scivi import analysis
from scivi.errors import DataError


@pytest.fixture(autouse=True)
def closed():
    """No figure is left by tests of other files, nor left to them."""
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def trees(catalogue):
    """A posterior, and one of the same rows under NUTS."""
    tree = catalogue(rows=60, draws=200, scale=0.6)
    return tree, catalogue(rows=60, draws=90, chains=2, method="nuts", extra=False)


@pytest.fixture
def drawing(trees):
    """By name, a function of ``ax`` that draws, and how many panels it has."""
    tree, nuts = trees
    rng = np.random.default_rng(0)
    ranks = {
        n: xr.Dataset({"a": ("simulation", rng.integers(0, 100, 60))}, attrs={"draws": 99}) for n in "xy"
    }
    return {
        "history": (lambda ax: analysis.plot_history(tree, ax=ax), 2),
        "row_k": (lambda ax: analysis.plot_row_k(tree, ax=ax), 2),
        "population": (lambda ax: analysis.plot_population(tree, reference=nuts, ax=ax), 1),
        "predictive": (lambda ax: analysis.plot_predictive(tree, ax=ax), 1),
        "catalogue": (lambda ax: analysis.plot_catalogue(tree, "z", ax=ax), 1),
        "comparison": (lambda ax: analysis.plot_comparison(tree, nuts, ax=ax), 2),
        "ranks": (lambda ax: analysis.plot_ranks(ranks, ax=ax), 2),
    }


@pytest.fixture
def drawn(drawing):
    """Every figure of one catalogue, on a Figure of its own, drawn under untouched settings."""
    before, figures = dict(mpl.rcParams), {}
    for name, (draw, _) in drawing.items():
        figures[name] = Figure()
        draw(figures[name])
        figures[name].canvas.draw()
    assert dict(mpl.rcParams) == before
    return figures


def test_every_figure_is_labelled_and_needs_no_window(drawn):
    assert plt.get_fignums() == []
    for figure in drawn.values():
        assert all(ax.get_xlabel() for ax in figure.axes if ax.get_visible())


def test_threshold_line_units_and_both_posteriors_are_drawn(drawn):
    ax = drawn["row_k"].axes[0]
    assert any(line.get_ydata()[0] == 0.7 for line in ax.lines)
    assert drawn["population"].axes[0].get_title(loc="left") == "mu"
    assert drawn["population"].axes[0].get_xlabel() == "ln ct"
    labels = [line.get_label() for line in drawn["population"].axes[0].lines]
    assert labels == ["prior", "posterior", "NUTS"]  # with 200 and 180 draws: none is dropped
    assert drawn["catalogue"].axes[0].get_ylabel() == "z (ln ct)"


def test_without_axes_a_drawing_has_a_figure_of_its_own_that_a_notebook_shows(drawing):
    for name, (draw, panels) in drawing.items():
        found = draw(None)
        assert isinstance(found, Axes if panels == 1 else np.ndarray), name
        axes = np.array(found, object).ravel()
        assert [axes[0].figure.number] == plt.get_fignums()
        assert [ax for ax in axes[0].figure.axes if ax.get_visible()] == list(axes)
        plt.close("all")


def test_given_axes_are_drawn_on_and_returned_and_nothing_else_is_made(drawing):
    for name, (draw, panels) in drawing.items():
        figure, given = plt.subplots(2, panels, squeeze=False)
        before = plt.get_fignums()
        found = draw(given[0] if panels > 1 else given[0, 0])
        assert plt.get_fignums() == before, name
        assert list(np.array(found, object).ravel()) == list(given[0])
        assert all(ax.has_data() for ax in given[0])
        assert not any(ax.has_data() for ax in given[1])
        assert figure.axes == [*given.ravel()]
        assert figure.legends == []  # what is the drawing's own stays in its axes
        plt.close(figure)


def test_axes_may_come_in_any_arrangement(trees):
    tree, _ = trees
    one, two = Figure().subplots(2, 1)
    assert list(analysis.plot_history(tree, ax=[[one], [two]])) == [one, two]


def test_too_few_or_too_many_axes_are_counted(drawing):
    grid = Figure().subplots(1, 4)
    for draw, panels in drawing.values():
        for some in (grid[:0], grid[: panels - 1], grid[: panels + 1]):
            told = "has one panel" if panels == 1 else f"has {panels} panels"
            with pytest.raises(DataError, match=rf"ax is {len(some)} Axes: .* {told}; give .*subplots\("):
                draw(some)


def test_what_is_no_axes_is_named(trees):
    tree, _ = trees
    with pytest.raises(DataError, match=r"ax is str, which is no Axes: .* 2 panels; .*subplots\(1, 2\)\[1\]"):
        analysis.plot_history(tree, ax="left")
    full = Figure()
    full.subplots(1, 2)
    with pytest.raises(DataError, match="holds 2 Axes already"):
        analysis.plot_history(tree, ax=full)
    assert plt.get_fignums() == []


def test_a_grid_that_is_not_full_says_how_many_of_its_axes_are_wanted(catalogue):
    tree = catalogue(rows=5, draws=30)
    values = tree["posterior"].to_dataset()
    four = values.assign({f"mu{k}": values["mu"] + k for k in range(4)})
    tree["posterior"] = xr.DataTree(four)
    with pytest.raises(
        DataError, match=r"has 5 panels; give 5 Axes, such as the first 5 of plt.subplots\(2, 4\)"
    ):
        analysis.plot_population(tree, ax=Figure().subplots(1, 2))
    blank = [ax for ax in analysis.plot_population(tree)[0].figure.axes if not ax.get_visible()]
    assert len(blank) == 3


def test_wrong_names_are_refused(catalogue):
    with pytest.raises(DataError, match='"mu" does not run over rows'):
        analysis.plot_catalogue(catalogue(rows=5, draws=30), "mu")
