"""Posteriors of sources: as a table for other programs (FITS, ECSV, VOTable), and as spectra."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from scivi.analysis import row_reliability
from scivi.analysis.figures import BLUE, MIDDLE, Panels
from scivi.errors import DataError, missing_extra

if TYPE_CHECKING:
    from astropy.table import Table

    from scivi.analysis.figures import Where

PROB = 0.68  # of the intervals, as catalogues have them


def catalogue(result: xr.DataTree, *, prob: float = PROB) -> Table:
    """One line for each source: its flux in each band, and whether to believe it.

    ``catalogue(result).write("ic2395.fits")`` or ``.write("ic2395.ecsv")`` writes it.

    Args:
        result: of ``scivi.draw`` with a template of `photons`.
        prob: of the intervals, equal tails.

    Returns:
        Columns source; for each band flux_BAND, the median, and flux_BAND_lower and _upper, in counts per
        unit of exposure; k_hat of the source's importance weights (above .7 its line is not to be believed;
        none where draws were corrected as a whole) and outside, whether it lies beyond what the fit has seen.
        In meta: verdict, model, prob, and the reasons of the verdict as comments.

    Raises:
        DataError: the result has no brightness of sources.
        Unsupported: astropy is not installed.
    """
    try:
        from astropy.table import Table
    except ModuleNotFoundError:
        raise missing_extra("astropy", "astro") from None

    posterior = result["posterior"].to_dataset()
    if set(getattr(posterior.get("log_brightness"), "dims", ())) != {"chain", "draw", "source", "band"}:
        raise DataError('the posterior has no "log_brightness" by source and band, as those of photons have.')
    tails = [(1 - prob) / 2, 0.5, (1 + prob) / 2]
    log_flux = posterior["log_brightness"].quantile(tails, ("chain", "draw"))
    table = Table({"source": posterior["source"].values})
    for band in posterior["band"].values:
        for name, values in zip(("_lower", "", "_upper"), log_flux.sel(band=band).values, strict=True):
            table[f"flux_{band}{name}"] = np.exp(values)
    if "row_log_weight" in result["sample_stats"]:
        table["k_hat"] = row_reliability(result)["k_hat"].values
    table["outside"] = result["sample_stats"]["outside"].values
    made = json.loads(result.attrs.get("provenance", "{}"))
    table.meta = {"verdict": result.attrs.get("verdict", "not judged"), "prob": prob}
    table.meta |= {"model": made.get("template", ""), "comments": json.loads(result.attrs.get("why", "[]"))}
    return table


def plot_spectra(result: xr.DataTree, *, ax: Where = None) -> Any:
    """Median fluxes of all sources by band, over the population: its median, and two thirds of the sources.

    Args:
        result: of ``scivi.draw`` with a template of `photons`.
        ax: one of matplotlib's Axes; a new figure's if None.

    Returns:
        The Axes; x is ln(keV) where the bands have edges.
    """
    posterior = result["posterior"].to_dataset()
    given = result["constant_data"].to_dataset() if "constant_data" in result.children else xr.Dataset()
    edged = {"e_min", "e_max"} <= set(given) and bool(np.isfinite(given["e_min"]).all())
    bands = posterior["band"].values
    at = np.sqrt(given["e_min"].values * given["e_max"].values) if edged else np.arange(bands.size)
    log_flux = posterior["log_brightness"].median(("chain", "draw")).transpose("band", "source")
    flux = np.exp(log_flux.values)
    mu, sigma = (posterior[name].mean(("chain", "draw")).values for name in ("mu", "sigma"))
    panel = Panels(ax, 1, (5.2, 3.4)).told
    panel.plot(at, flux, "-", lw=0.4, color=MIDDLE, alpha=0.5, zorder=1)
    panel.fill_between(at, np.exp(mu - sigma), np.exp(mu + sigma), color=BLUE, alpha=0.3, lw=0, zorder=2)
    panel.plot(at, np.exp(mu), "o-", color=BLUE, zorder=3, label="population, 68 % of sources")
    panel.plot([], [], lw=0.8, color=MIDDLE, label="sources, median")
    panel.set(yscale="log", ylabel="flux", xlabel="band, at its energy" if edged else "band")
    if edged:
        panel.set_xscale("log")
    panel.set_xticks(at, [str(band) for band in bands])
    panel.minorticks_off()
    panel.legend(frameon=False, fontsize=8)
    return panel
