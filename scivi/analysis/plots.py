"""The figures of the report. Each function draws on axes and returns them: see `figures`, which makes them.

No setting of matplotlib is changed. Where axes or a Figure are given, pyplot is not used: no window opens,
and no display is needed.

Longer than 400 lines because figures that stand on one page are drawn in one place, in one hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from scivi.analysis import groups
from scivi.analysis.calibration import uniform_band
from scivi.analysis.comparison import entrywise_differences
from scivi.analysis.figures import (
    BLUE,
    CYAN,
    GREEN,
    INK,
    MIDDLE,
    PALE,
    PURPLE,
    RED,
    YELLOW,
    Panels,
    leftmost,
    titled,
)
from scivi.analysis.weights import USABLE_K, row_reliability
from scivi.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from scivi.analysis.figures import Where

SHOWN_ROWS = 150  # beyond it single intervals cannot be told apart at page width; our choice
SHOWN_PANELS = 12  # population variables drawn; our choice


def _name(array: xr.DataArray, name: str | None = None) -> str:
    """Long name and unit for an axis."""
    unit = str(array.attrs.get("units", ""))
    text = str(name or array.attrs.get("long_name", array.name))
    return f"{text} ({unit})" if unit not in ("", "1") else text


def plot_history(tree: xr.DataTree, *, ax: Where = None) -> Any:
    """Objective against step, with the noise of single steps; beside it the parts of the bound.

    Args:
        tree: with group history.
        ax: one Axes, or two if the history has parts; an empty Figure; None for a new one.

    Returns:
        The Axes, or an array of both.

    Raises:
        DataError: the tree has no history, or not as many axes are given.
    """
    history = groups.group(tree, "history", "objective")
    if "chain" not in history.dims:
        history = history.expand_dims("chain")
    parts = [str(v) for v in history.data_vars if str(v).startswith("part_")]
    panels = Panels(ax, 2 if parts else 1, (8.4 if parts else 5.2, 3.0))
    _objective(panels.each[0], history)
    if parts:
        _parts(panels.each[1], history.isel(chain=0), parts)
    return panels.told


def _objective(ax: Axes, history: xr.Dataset) -> None:
    """Each chain's objective; the first steps may lie beyond the frame."""
    marker = "." if _steps(history.isel(chain=0)).size < 3 else None
    for chain in range(history.sizes["chain"]):
        one = history.isel(chain=chain)
        step, value = _steps(one), one["objective"].values
        mean, noise = ("mean of log window", "± sd of a single step") if chain == 0 else (None, None)
        ax.plot(step, value, marker=marker, color=BLUE, lw=1.2, alpha=0.9, label=mean)
        if "objective_sd" in one:
            sd = one["objective_sd"].values
            ax.fill_between(step, value - sd, value + sd, color=BLUE, alpha=0.15, lw=0, label=noise)
    value = history["objective"].values[np.isfinite(history["objective"].values)]
    if value.size > 10:  # the first steps of a fit would squeeze the rest
        low, high = np.quantile(value, [0.0, 0.95])
        margin = 0.1 * (high - low) or 0.1 * (abs(high) or 1.0)
        ax.set_ylim(low - margin, high + 2 * margin)
    ax.legend(fontsize=8, frameon=False)
    titled(ax, "step", "negative bound (nats per row)", "Objective, lower is better")


def _parts(ax: Axes, history: xr.Dataset, parts: list[str]) -> None:
    """The parts of one chain's bound."""
    for colour, part in zip((BLUE, RED, GREEN, PURPLE, YELLOW, CYAN) * 4, parts, strict=False):
        ax.plot(_steps(history), history[part].values, color=colour, lw=1.2, label=part.removeprefix("part_"))
    settled = history[parts].to_array().values
    settled = settled[:, settled.shape[1] // 10 :]
    if np.isfinite(settled).any():
        low, high = np.nanmin(settled), np.nanmax(settled)
        ax.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
    ax.legend(fontsize=8, frameon=False, ncols=1 + len(parts) // 7)
    titled(ax, "step", "nats per row", "Parts of the bound: likelihoods, minus KL")


def _steps(history: xr.Dataset) -> np.ndarray:
    return history["step"].values if "step" in history else np.arange(history.sizes["log"])


def plot_row_k(
    tree: xr.DataTree, *, threshold: float = USABLE_K, rows: xr.Dataset | None = None, ax: Where = None
) -> Any:
    """Pareto k-hat of every row, with the threshold line, and its distribution.

    Args:
        tree: with ``sample_stats/row_log_weight``.
        threshold: of the line.
        rows: the result of `weights.row_reliability`, if at hand.
        ax: two Axes; an empty Figure; None for a new one.

    Returns:
        An array of both Axes.

    Raises:
        DataError: the tree has no such weights, or not as many axes are given.
    """
    rows = row_reliability(tree, threshold=threshold) if rows is None else rows
    k = rows["k_hat"].values.ravel()
    size = np.clip(np.where(np.isfinite(k), k, np.nanmax(np.where(np.isfinite(k), k, 1.0))), -0.5, 2.0)
    outside = rows["outside"].values.ravel()
    panels = Panels(ax, 2, (8.4, 3.0), width_ratios=[3.2, 1], sharey=True)
    left, right = panels.each
    bad, order = size > threshold, np.arange(k.size)
    dot = 4.0 if k.size > 2000 else 12.0
    for mask, colour, text in (
        (~bad & ~outside, BLUE, "within reach"),
        (outside & ~bad, YELLOW, "outside the range of the fit"),
        (bad, RED, f"k-hat above {threshold}"),
    ):
        if mask.any():
            label = f"{text}: {mask.sum():,}"
            left.scatter(order[mask], size[mask], s=dot, color=colour, lw=0, label=label, rasterized=True)
    right.hist(size, bins=40, orientation="horizontal", color=BLUE, alpha=0.8)
    for each in panels.each:
        each.axhline(threshold, color=INK, lw=1, ls="--")
        each.set_ylim(min(-0.2, size.min() - 0.05), max(1.0, size.max() + 0.1))
    panels.legend()
    row = next(iter(rows["k_hat"].dims), "row")
    titled(left, f"{row}, in the order of the table", "Pareto k-hat of the row")
    titled(right, "rows")
    return panels.told


def _varies(draws: np.ndarray) -> bool:
    """Whether an entry is more than a constant up to rounding, as the diagonal of a correlation matrix is."""
    return bool(np.std(draws) > 1e-5 * (1 + np.abs(draws).max()))


def plot_population(tree: xr.DataTree, *, reference: xr.DataTree | None = None, ax: Where = None) -> Any:
    """Posterior against prior, and a reference if given, of each population variable.

    Args:
        tree: with group posterior; entries of variables are drawn up to 12, those that vary.
        reference: a NUTS posterior.
        ax: one Axes for each entry; an empty Figure; None for a new one.

    Returns:
        The Axes, or an array of them if there are several entries.

    Raises:
        DataError: every variable runs over rows, or not as many axes are given.
    """
    posterior = groups.group(tree, "posterior")
    prior = groups.group(tree, "prior") if "prior" in tree.children else xr.Dataset()
    other = groups.group(reference, "posterior") if reference is not None else xr.Dataset()
    sizes = {n: posterior[n].isel(chain=0, draw=0).size for n in groups.population_names(tree)}
    varying = ((n, i) for n in sizes for i in range(sizes[n]) if _varies(_entry(posterior[n], i)))
    entries = list(islice(varying, SHOWN_PANELS))
    if not entries:
        raise DataError("no population variable: every variable of the posterior runs over rows.")
    panels = _grid(ax, len(entries), 4, (2.1, 1.9))
    for each, (name, index) in zip(panels.each, entries, strict=True):
        draws = _entry(posterior[name], index)
        span = np.quantile(draws, [0.001, 0.999])
        margin = 0.6 * (span[1] - span[0])
        view = (span[0] - margin, span[1] + margin)
        if name in prior and prior[name].dims == posterior[name].dims:
            _density(each, _entry(prior[name], index), view, MIDDLE, "prior", fill=True)
        _density(each, draws, view, BLUE, "posterior", fill=True)
        if name in other:
            _density(each, _entry(other[name], index), view, INK, "NUTS", fill=False)
        label = "\n".join(wrap(groups.label(posterior[name].isel(chain=0, draw=0), index), 24))
        each.set_xlim(view)
        each.set_ylim(bottom=0)
        each.set_yticks([])
        each.locator_params(axis="x", nbins=4)
        unit = str(posterior[name].attrs.get("units", ""))
        titled(each, "" if unit == "1" else unit, "density" if each is panels.each[0] else "", label)
    panels.legend()
    return panels.told


def _grid(ax: Where, count: int, most: int, size: tuple[float, float], **grid: Any) -> Panels:
    """So many panels, at most so many in a row, each of a width and height in inches."""
    columns = min(count, most)
    whole = max(size[0] * columns, 4.2), size[1] * -(-count // columns) + 0.3
    return Panels(ax, count, whole, columns=columns, **grid)


def _entry(array: xr.DataArray, index: int) -> np.ndarray:
    """All draws of one entry, counted in C order."""
    rest = groups.site_dims(array)
    where = np.unravel_index(index, [array.sizes[d] for d in rest])
    return array.isel(dict(zip(rest, where, strict=True))).values.ravel().astype(float)


def _density(ax: Axes, draws: np.ndarray, view: tuple, colour: str, label: str, *, fill: bool) -> None:
    """ArviZ' kernel density of the draws that fall near the view, scaled to their share."""
    from arviz_stats.base.array import array_stats

    width = view[1] - view[0]
    near = draws[(draws > view[0] - width) & (draws < view[1] + width)]
    if near.size < 20 or near.std() == 0:
        return
    x, y, _ = array_stats.kde(near)
    y = y * near.size / draws.size
    ax.plot(x, y, color=colour, lw=1.3, label=label, ls="-" if fill else "--")
    if fill:
        ax.fill_between(x, 0, y, color=colour, alpha=0.25, lw=0)


def plot_predictive(tree: xr.DataTree, *, bins: int = 30, ax: Where = None) -> Any:
    """Distribution of each observed field beside its replicates: median and 90 % band.

    Args:
        tree: with groups posterior_predictive and observed_data.
        bins: of a field, about so many.
        ax: one Axes for each field; an empty Figure; None for a new one.

    Returns:
        The Axes, or an array of them if there are several fields.

    Raises:
        DataError: no observed field has predictive draws, or not as many axes are given.
    """
    predictive, observed = groups.group(tree, "posterior_predictive"), groups.group(tree, "observed_data")
    fields = [name for name in groups.numeric(predictive) if name in observed][:SHOWN_PANELS]
    if not fields:
        raise DataError("no observed field has predictive draws. Make them with scivi.predict.")
    panels = _grid(ax, len(fields), 3, (2.8, 2.5))
    for each, name in zip(panels.each, fields, strict=True):
        _beside(each, predictive[name], observed[name], bins)
        titled(each, _name(observed[name], name), "number of values" if leftmost(each) else "")
    panels.legend()
    return panels.told


def _beside(ax: Axes, predictive: xr.DataArray, observed: xr.DataArray, bins: int) -> None:
    """Counts of a field's values in bins, and of its replicates'."""
    draws, seen = groups.aligned(predictive, observed)
    rest = groups.site_dims(draws)
    flat = seen.transpose(*rest).values.ravel().astype(float)
    there = np.isfinite(flat)
    step = max(1, draws.sizes["draw"] // 200)  # two hundred replicates draw a band well enough
    few = draws.isel(chain=0, draw=slice(None, None, step)).transpose("draw", *rest)
    edges, growing = _edges(flat[there], bins)
    middle = (edges[1:] + edges[:-1]) / 2
    inside = [d.values.ravel()[there].clip(edges[0], edges[-1]) for d in few]
    copies = np.stack([np.histogram(values, edges)[0] for values in inside])
    low, centre, high = np.quantile(copies, [0.05, 0.5, 0.95], axis=0)
    ax.stairs(high, edges, baseline=low, fill=True, color=BLUE, alpha=0.25, lw=0, label="replicated, 90 %")
    ax.stairs(centre, edges, baseline=None, color=BLUE, lw=1.1, label="replicated, median")
    ax.plot(middle, np.histogram(flat[there], edges)[0], ".", color=INK, ms=5, label="observed")
    if growing:
        ax.set_xscale("symlog", linthresh=1.0)
        ax.set_xlim(left=edges[0])


def _edges(values: np.ndarray, bins: int) -> tuple[np.ndarray, bool]:
    """Bins for data, and whether they grow: unit bins for few counts, growing for many, else equal."""
    low, high = values.min(), values.max()
    whole = bool((values == np.round(values)).all())
    if whole and high - low <= bins:
        return np.arange(low, high + 2) - 0.5, False
    if whole and low >= 0:
        return np.r_[0.0, np.unique(np.round(np.geomspace(1, high + 1, bins)))] - 0.5, True
    return np.linspace(low, high + 1e-9 * max(abs(high), 1e-300), bins + 1), False


def plot_catalogue(tree: xr.DataTree, name: str | None = None, *, prob: float = 0.9, ax: Where = None) -> Any:
    """Posterior mean and interval of a row-level variable, rows sorted by size.

    Args:
        tree: with group posterior.
        name: variable over rows; None: the first one. Of further dims (bands) up to three are drawn, one a
            panel.
        prob: probability of the interval.
        ax: one Axes for each panel; an empty Figure; None for a new one.

    Returns:
        The Axes, or an array of them if there are several panels.

    Raises:
        DataError: no variable runs over rows, or not as many axes are given.
    """
    local = groups.local_names(tree)
    if not local or (name is not None and name not in local):
        raise DataError(f'"{name}" does not run over rows; of the posterior, {local} do.')
    row = groups.row_dim(tree) or ""
    array = groups.group(tree, "posterior")[name or local[0]]
    tail = (1 - prob) / 2

    def interval(values: np.ndarray) -> dict[str, np.ndarray]:
        low, high = np.quantile(values, [tail, 1 - tail], axis=(0, 1))
        return {"mean": values.mean((0, 1)), "low": low, "high": high}

    found = groups.entrywise(array, interval).transpose(..., row)
    units = found["mean"].isel({row: 0}, drop=True).rename(array.name)
    count = min(units.size, 3)
    panels = Panels(ax, count, (max(2.8 * count, 6.4), 3.0), sharey=True)
    for j, each in enumerate(panels.each):
        mean, low, high = (found[k].values.reshape(units.size, -1)[j] for k in ("mean", "low", "high"))
        order = np.argsort(mean)
        x = np.arange(order.size)
        if order.size > SHOWN_ROWS:
            keep = np.linspace(0, order.size - 1, SHOWN_ROWS).astype(int)
            order, x = order[keep], x[keep]
        each.vlines(x, low[order], high[order], color=BLUE, alpha=0.35, lw=1.0, label=f"{prob:.0%} interval")
        each.plot(x, mean[order], ".", color=BLUE, ms=3, label="posterior mean")
        left = _name(array, groups.label(units, j)) if j == 0 else ""
        titled(each, f"{row}, sorted by mean", left, groups.label(units, j) if count > 1 else "")
    panels.each[0].legend(fontsize=8, frameon=False)
    return panels.told


def plot_comparison(svi: xr.DataTree, nuts: xr.DataTree, *, ax: Where = None) -> Any:
    """Differences of means, and ratios of sds, of every entry that SVI and NUTS share.

    Args:
        svi: a posterior.
        nuts: one of the same model and data, under NUTS.
        ax: two Axes; an empty Figure; None for a new one.

    Returns:
        An array of both Axes.

    Raises:
        DataError: they share nothing, or not as many axes are given.
    """
    found = entrywise_differences(svi, nuts)
    names = list(found)[:SHOWN_PANELS]
    panels = Panels(ax, 2, (8.4, 0.6 + 0.42 * max(len(names), 4)), sharey=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        for each, key in zip(panels.each, ("shift", "sd_ratio"), strict=True):
            value, error = found[name][key].values.ravel(), found[name][f"{key}_mcse"].values.ravel()
            if value.size == 1:
                each.errorbar(value, [i], xerr=2 * error, fmt="o", ms=4, lw=1.2, color=BLUE)
            else:
                spread = i + 0.25 * rng.uniform(-1, 1, value.size)
                each.scatter(value, spread, s=5, lw=0, color=BLUE, alpha=0.35, rasterized=True)
    for each, at, reach in zip(panels.each, (0.0, 1.0), ((-0.2, 0.2), (0.8, 1.25)), strict=True):
        each.axvline(at, color=INK, lw=1)
        each.axvspan(*reach, color=GREEN, alpha=0.1, lw=0)
        each.set_yticks(range(len(names)), names)
        each.set_ylim(len(names) - 0.5, -0.5)
    titled(panels.each[0], "difference of means (NUTS sd)")
    titled(panels.each[1], "sd of SVI / sd of NUTS")
    return panels.told


def plot_ranks(ranks: xr.Dataset | Mapping[str, xr.Dataset], *, prob: float = 0.99, ax: Where = None) -> Any:
    """Distribution function of ranks less that of uniform ones, a curve for each entry, with its band.

    Of calibrated posteriors each curve stays inside with probability prob. An arch above 0: draws too high;
    an S that rises first: posterior too narrow.

    Args:
        ranks: as ``scivi.calibrate`` makes them, with dim simulation and attribute draws; or several by name,
            a panel for each.
        prob: of the band, which is simultaneous over the ranks, and of one curve.
        ax: one Axes for each of them; an empty Figure; None for a new one.

    Returns:
        The Axes, or an array of them if there are several.

    Raises:
        DataError: not as many axes are given.
    """
    named = {"": ranks} if isinstance(ranks, xr.Dataset) else dict(ranks)
    panels = _grid(ax, len(named), 3, (2.8, 2.5), sharey=True)
    for each, (title, found) in zip(panels.each, named.items(), strict=True):
        n, number = found.sizes["simulation"], 0
        band = uniform_band(n, prob=prob)
        x = band["x"].values
        each.fill_between(x, band["lower"] - x, band["upper"] - x, color=PALE, lw=0, step="mid")
        for array in found.data_vars.values():
            for row in array.transpose(..., "simulation").values.reshape(-1, n):
                unit = np.sort((row[np.isfinite(row)] + 0.5) / (found.attrs["draws"] + 1))
                curve = np.searchsorted(unit, x, side="right") / max(unit.size, 1)
                each.plot(x, curve - x, color=BLUE, lw=0.8, alpha=0.7)
                number += 1
        each.axhline(0, color=INK, lw=0.8)
        titled(each, "rank / draws", "ECDF - uniform" if leftmost(each) else "", title)
        each.text(0.98, 0.02, f"{n} fits, {number} curves", transform=each.transAxes, ha="right", fontsize=8)
    return panels.told


def plot_drift(drift: xr.Dataset, *, ax: Where = None) -> Any:
    """KS distance of every feature, the largest first, and the p-values of the rows.

    Args:
        drift: as ``analysis.drift`` makes it.
        ax: two Axes; an empty Figure; None for a new one.

    Returns:
        An array of both Axes.

    Raises:
        DataError: not as many axes are given.
    """
    told = drift.isel(variable=np.flatnonzero(np.isfinite(drift["ks"].values)))
    told = told.isel(variable=np.argsort(-told["ks"].values, kind="stable")[: 2 * SHOWN_PANELS])
    ks, good = told["ks"].values, told["ok"].values
    panels = Panels(ax, 2, (8.4, 1.0 + 0.17 * max(ks.size, 8)), width_ratios=[1.4, 1])
    left, right = panels.each
    for mask, colour, text in ((good, BLUE, "as in the fit"), (~good, RED, "p at most alpha")):
        left.barh(np.flatnonzero(mask), ks[mask], color=colour, label=text)
    left.set_yticks(range(ks.size), told["variable"].values)
    left.set_ylim(ks.size - 0.5, -0.5)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    p_value = drift["row_p_value"].values
    right.hist(p_value, bins=np.linspace(0, 1, 21), color=BLUE, alpha=0.8)
    right.axhline(p_value.size / 20, color=INK, lw=1, ls="--")
    flagged = int((~drift["row_ok"].values).sum())
    titled(left, "KS distance", title=f"Features, p = {drift.attrs['p_value']:.2g} in all")
    titled(right, "p-value of the row", "rows", f"{flagged:,} of {p_value.size:,} rows flagged")
    return panels.told
