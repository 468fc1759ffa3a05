"""What is believed: diagnostics of a posterior that need neither torch nor pyro.

Every verb takes an `xarray.DataTree` and returns an `xarray.Dataset` with a boolean column ``ok``; `report`
puts them together. The functions that draw are named ``plot_…`` and return a matplotlib Figure.
"""

from scivi.analysis.calibration import coverage, ranks, sbc, uniform_band
from scivi.analysis.comparison import compare, summary
from scivi.analysis.convergence import collapse, contraction, plateau, restarts
from scivi.analysis.drift import drift
from scivi.analysis.each import each
from scivi.analysis.plots import (
    plot_catalogue,
    plot_comparison,
    plot_drift,
    plot_history,
    plot_population,
    plot_predictive,
    plot_ranks,
    plot_row_k,
)
from scivi.analysis.predictive import loo, pit, pit_values, predictive_check
from scivi.analysis.report import report
from scivi.analysis.weights import population_reliability, reliability, row_reliability

__all__ = [
    "collapse",
    "compare",
    "contraction",
    "coverage",
    "drift",
    "each",
    "loo",
    "pit",
    "pit_values",
    "plateau",
    "plot_catalogue",
    "plot_comparison",
    "plot_drift",
    "plot_history",
    "plot_population",
    "plot_predictive",
    "plot_ranks",
    "plot_row_k",
    "population_reliability",
    "predictive_check",
    "ranks",
    "reliability",
    "report",
    "restarts",
    "row_reliability",
    "sbc",
    "summary",
    "uniform_band",
]
