"""Figures of the templates, on axes that are given: what is drawn is what the result holds."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from domains.astrophysics.catalogues import plot_spectra
from domains.finance.backtest import plot_backtest
from domains.genomics.divergence import plot_rates
from domains.genomics.expression import plot_foreground
from scivi.errors import DataError

SAMPLE = ("chain", "draw")


@pytest.fixture(autouse=True)
def no_window():
    """Where axes are given, pyplot makes no figure."""
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def axes(n: int = 1):
    return Figure().subplots(1, n)


def repeated(values: np.ndarray, draws: int = 3) -> np.ndarray:
    """The same values in each draw of one chain."""
    return np.broadcast_to(values, (1, draws, *np.shape(values)))


def test_spectra_run_through_the_median_fluxes():
    log_flux = np.log([[1.0, 4.0], [2.0, 8.0], [3.0, 16.0]])
    posterior = xr.Dataset(
        {
            "log_brightness": ((*SAMPLE, "source", "band"), repeated(log_flux)),
            "mu": ((*SAMPLE, "band"), repeated(np.log([2.0, 8.0]))),
            "sigma": ((*SAMPLE, "band"), repeated(np.log([2.0, 2.0]))),
        },
        {"band": ["soft", "hard"]},
    )
    edges = xr.Dataset({"e_min": ("band", [0.5, 2.0]), "e_max": ("band", [2.0, 8.0])})
    ax = plot_spectra(xr.DataTree.from_dict({"posterior": posterior, "constant_data": edges}), ax=axes())
    lines = [line.get_ydata() for line in ax.get_lines()]
    np.testing.assert_allclose(lines[:3], np.exp(log_flux))
    np.testing.assert_allclose(lines[3], [2.0, 8.0])
    np.testing.assert_allclose(ax.get_lines()[3].get_xdata(), [1.0, 4.0])  # keV, middle of ln E


def test_a_backtest_crosses_the_days_below_the_lowest_value_at_risk():
    found = xr.Dataset(
        {
            "returns": (("day", "series"), [[0.0], [-3.0], [1.0], [-1.5]]),
            "value_at_risk": (("day", "series", "level"), np.tile([[[-2.0, -1.0]]], (4, 1, 1))),
        },
        {"series": ["a"], "level": [0.01, 0.05], "day": np.arange(4)},
    )
    ax = plot_backtest(found, "a", ax=axes())
    crossed = ax.get_lines()[-1]
    assert list(crossed.get_xdata()) == [1]
    assert crossed.get_label() == "undercut (1 days)"


def test_rates_stand_beside_their_prior():
    rate = np.linspace(0.0, 1.0, 101)
    names = ("gain_rate_mean", "loss_rate_mean")
    sets = {
        group: xr.Dataset(
            {name: ((*SAMPLE, "context"), (scale * rate)[None, :, None] * [1.0, 2.0]) for name in names},
            {"context": ["CG", "CHH"]},
        )
        for group, scale in (("prior", 1.0), ("posterior", 0.1))
    }
    both = plot_rates(xr.DataTree.from_dict(sets), ax=axes(2))
    prior, posterior = (line.get_ydata() for line in both[0].get_lines())
    np.testing.assert_allclose(prior, [0.5, 1.0])
    np.testing.assert_allclose(posterior, [0.05, 0.1])
    with pytest.raises(DataError, match="2 panels"):
        plot_rates(xr.DataTree.from_dict(sets), ax=axes())


def test_bars_of_foreground_and_background_add_up_to_all_cells():
    chance = np.array([[0.9, 0.0], [0.2, 0.0], [0.5, 1.0]])
    posterior = xr.Dataset(
        {"foreground": ((*SAMPLE, "cell", "protein"), repeated(chance))}, {"protein": ["CD3", "CD19"]}
    )
    counts = xr.Dataset({"adt": (("cell", "protein"), [[9.0, 0.0], [1.0, 3.0], [np.nan, 99.0]])})
    tree = xr.DataTree.from_dict({"posterior": posterior, "observed_data": counts})
    ax = plot_foreground(tree, ["CD3"], ax=axes())
    heights = [sum(bar.get_height() for bar in bars) for bars in ax.containers]
    np.testing.assert_allclose(heights, [0.9, 1.1])  # what was not counted is not drawn
    with pytest.raises(DataError, match="no protein CD4; it has CD3, CD19"):
        plot_foreground(tree, ["CD4"], ax=axes())
