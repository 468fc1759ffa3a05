"""The figures of the report. Each function returns a matplotlib Figure and changes no setting of matplotlib.

Drawn on `matplotlib.figure.Figure` alone: no pyplot, no window, no display needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from scivi.analysis import groups
from scivi.analysis.calibration import uniform_band
from scivi.analysis.comparison import entrywise_differences
from scivi.analysis.weights import USABLE_K, row_reliability
from scivi.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's bright scheme, distinguishable by colour-blind readers: https://personal.sron.nl/~pault/
BLUE, RED, GREEN, YELLOW, CYAN, PURPLE = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377",
)  # fmt: skip
INK, PALE, MIDDLE = "#333333", "#E6E6E6", "#888888"  # a page shows them inverted to readers in the dark
SHOWN_ROWS = 150  # beyond it single intervals cannot be told apart at page width; our choice
SHOWN_PANELS = 12  # population variables drawn; our choice


def _figure(rows: int, columns: int, width: float, height: float, **grid: Any) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of plain axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for ax in axes.flat:
        _plain(ax)
    return figure, axes


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(labelsize=8, color="#999999", labelcolor=INK)


def _name(array: xr.DataArray, name: str | None = None) -> str:
    """Long name and unit for an axis."""
    unit = str(array.attrs.get("units", ""))
    text = str(name or array.attrs.get("long_name", array.name))
    return f"{text} ({unit})" if unit not in ("", "1") else text


def _titled(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.set_title(title, fontsize=9, color=INK, loc="left")


def plot_history(tree: xr.DataTree) -> Figure:
    """Objective against step, with the noise of single steps; beside it the parts of the bound."""
    history = groups.group(tree, "history", "objective")
    if "chain" not in history.dims:
        history = history.expand_dims("chain")
    parts = [str(v) for v in history.data_vars if str(v).startswith("part_")]
    figure, axes = _figure(1, 2 if parts else 1, 8.4 if parts else 5.2, 3.0)
    ax, marker = axes[0, 0], "." if _steps(history.isel(chain=0)).size < 3 else None
    for chain in range(history.sizes["chain"]):
        one = history.isel(chain=chain)
        step, value = _steps(one), one["objective"].values
        ax.plot(
            step,
            value,
            marker=marker,
            color=BLUE,
            lw=1.2,
            alpha=0.9,
            label="mean of log window" if chain == 0 else None,
        )
        if "objective_sd" in one:
            sd, label = one["objective_sd"].values, "± sd of a single step" if chain == 0 else None
            ax.fill_between(step, value - sd, value + sd, color=BLUE, alpha=0.15, lw=0, label=label)
    value = history["objective"].values[np.isfinite(history["objective"].values)]
    if value.size > 10:  # the first steps of a fit would squeeze the rest
        low, high = np.quantile(value, [0.0, 0.95])
        margin = 0.1 * (high - low) or 0.1 * (abs(high) or 1.0)
        ax.set_ylim(low - margin, high + 2 * margin)
    ax.legend(fontsize=8, frameon=False)
    _titled(ax, "step", "negative bound (nats per row)", "Objective, lower is better")
    for colour, part in zip((BLUE, RED, GREEN, PURPLE, YELLOW, CYAN) * 4, parts, strict=False):
        one = history.isel(chain=0)
        axes[0, 1].plot(_steps(one), one[part].values, color=colour, lw=1.2, label=part.removeprefix("part_"))
    if parts:
        settled = history[parts].isel(chain=0).to_array().values
        settled = settled[:, settled.shape[1] // 10 :]
        if np.isfinite(settled).any():
            low, high = np.nanmin(settled), np.nanmax(settled)
            axes[0, 1].set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
        axes[0, 1].legend(fontsize=8, frameon=False, ncols=1 + len(parts) // 7)
        _titled(axes[0, 1], "step", "nats per row", "Parts of the bound: likelihoods, minus KL")
    return figure


def _steps(history: xr.Dataset) -> np.ndarray:
    return history["step"].values if "step" in history else np.arange(history.sizes["log"])


def plot_row_k(tree: xr.DataTree, *, threshold: float = USABLE_K, rows: xr.Dataset | None = None) -> Figure:
    """Pareto k-hat of every row, with the threshold line, and its distribution.

    Args:
        tree: with ``sample_stats/row_log_weight``.
        threshold: of the line.
        rows: the result of `weights.row_reliability`, if at hand.
    """
    rows = row_reliability(tree, threshold=threshold) if rows is None else rows
    k = rows["k_hat"].values.ravel()
    size = np.clip(np.where(np.isfinite(k), k, np.nanmax(np.where(np.isfinite(k), k, 1.0))), -0.5, 2.0)
    outside = rows["outside"].values.ravel()
    figure, axes = _figure(1, 2, 8.4, 3.0, width_ratios=[3.2, 1], sharey=True)
    ax, bad, order = axes[0, 0], size > threshold, np.arange(k.size)
    dot = 4.0 if k.size > 2000 else 12.0
    for mask, colour, text in (
        (~bad & ~outside, BLUE, "within reach"),
        (outside & ~bad, YELLOW, "outside the range of the fit"),
        (bad, RED, f"k-hat above {threshold}"),
    ):
        if mask.any():
            label = f"{text}: {mask.sum():,}"
            ax.scatter(order[mask], size[mask], s=dot, color=colour, lw=0, label=label, rasterized=True)
    for each in axes.flat:
        each.axhline(threshold, color=INK, lw=1, ls="--")
    axes[0, 1].hist(size, bins=40, orientation="horizontal", color=BLUE, alpha=0.8)
    ax.set_ylim(min(-0.2, size.min() - 0.05), max(1.0, size.max() + 0.1))
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    row = next(iter(rows["k_hat"].dims), "row")
    _titled(ax, f"{row}, in the order of the table", "Pareto k-hat of the row")
    _titled(axes[0, 1], "rows")
    return figure


def _varies(draws: np.ndarray) -> bool:
    """Whether an entry is more than a constant up to rounding, as the diagonal of a correlation matrix is."""
    return bool(np.std(draws) > 1e-5 * (1 + np.abs(draws).max()))


def plot_population(tree: xr.DataTree, *, reference: xr.DataTree | None = None) -> Figure:
    """Posterior against prior, and a reference if given, of each population variable.

    Raises:
        DataError: every variable runs over rows.
    """
    posterior = groups.group(tree, "posterior")
    prior = groups.group(tree, "prior") if "prior" in tree.children else xr.Dataset()
    other = groups.group(reference, "posterior") if reference is not None else xr.Dataset()
    entries = [(n, i) for n in groups.population_names(tree) for i in np.ndindex(*_shape(posterior[n]))]
    entries = [(n, i) for n, i in entries if _varies(_entry(posterior[n], i))]
    if not entries:
        raise DataError("no population variable: every variable of the posterior runs over rows.")
    entries = entries[:SHOWN_PANELS]
    columns = min(len(entries), 4)
    rows = -(-len(entries) // columns)
    figure, axes = _figure(rows, columns, max(2.1 * columns, 4.2), 1.9 * rows + 0.3)
    for ax in axes.flat[len(entries) :]:
        ax.set_visible(False)
    for ax, (name, index) in zip(axes.flat, entries, strict=False):
        draws = _entry(posterior[name], index)
        span = np.quantile(draws, [0.001, 0.999])
        margin = 0.6 * (span[1] - span[0])
        view = (span[0] - margin, span[1] + margin)
        if name in prior and prior[name].dims == posterior[name].dims:
            _density(ax, _entry(prior[name], index), view, MIDDLE, "prior", fill=True)
        _density(ax, draws, view, BLUE, "posterior", fill=True)
        if name in other:
            _density(ax, _entry(other[name], index), view, INK, "NUTS", fill=False)
        flat = int(np.ravel_multi_index(index, _shape(posterior[name]))) if index else 0
        label = groups.label(posterior[name].isel(chain=0, draw=0), flat)
        label = "\n".join(wrap(label, 24))
        ax.set_xlim(view)
        ax.set_ylim(bottom=0)
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=4)
        unit = str(posterior[name].attrs.get("units", ""))
        _titled(ax, "" if unit == "1" else unit, "density" if ax is axes.flat[0] else "", label)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return figure


def _shape(array: xr.DataArray) -> tuple[int, ...]:
    return tuple(array.sizes[d] for d in groups.site_dims(array))


def _entry(array: xr.DataArray, index: tuple[int, ...]) -> np.ndarray:
    chosen = array.isel(dict(zip(groups.site_dims(array), index, strict=True)))
    return chosen.values.ravel().astype(float)


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


def plot_predictive(tree: xr.DataTree, *, bins: int = 30) -> Figure:
    """Distribution of each observed field beside its replicates: median and 90 % band.

    Raises:
        DataError: no observed field has predictive draws.
    """
    predictive, observed = groups.group(tree, "posterior_predictive"), groups.group(tree, "observed_data")
    fields = [name for name in groups.numeric(predictive) if name in observed][:SHOWN_PANELS]
    if not fields:
        raise DataError("no observed field has predictive draws. Make them with scivi.predict.")
    columns = min(len(fields), 3)
    rows = -(-len(fields) // columns)
    figure, axes = _figure(rows, columns, max(2.8 * columns, 4.2), 2.5 * rows + 0.3)
    for ax in axes.flat[len(fields) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, fields, strict=False):
        draws, seen = groups.aligned(predictive[name], observed[name])
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
        ax.stairs(
            high, edges, baseline=low, fill=True, color=BLUE, alpha=0.25, lw=0, label="replicated, 90 %"
        )
        ax.stairs(centre, edges, baseline=None, color=BLUE, lw=1.1, label="replicated, median")
        ax.plot(middle, np.histogram(flat[there], edges)[0], ".", color=INK, ms=5, label="observed")
        if growing:
            ax.set_xscale("symlog", linthresh=1.0)
            ax.set_xlim(left=edges[0])
        _titled(ax, _name(seen, name), "number of values" if ax in axes[:, 0] else "")
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return figure


def _edges(values: np.ndarray, bins: int) -> tuple[np.ndarray, bool]:
    """Bins for data, and whether they grow: unit bins for few counts, growing for many, else equal."""
    low, high = values.min(), values.max()
    whole = bool((values == np.round(values)).all())
    if whole and high - low <= bins:
        return np.arange(low, high + 2) - 0.5, False
    if whole and low >= 0:
        return np.r_[0.0, np.unique(np.round(np.geomspace(1, high + 1, bins)))] - 0.5, True
    return np.linspace(low, high + 1e-9 * max(abs(high), 1e-300), bins + 1), False


def plot_catalogue(tree: xr.DataTree, name: str | None = None, *, prob: float = 0.9) -> Figure:
    """Posterior mean and interval of a row-level variable, rows sorted by size.

    Args:
        tree: with group posterior.
        name: variable over rows; None: the first one. Of further dims (bands) up to three are drawn, one a
            panel.
        prob: probability of the interval.

    Raises:
        DataError: no variable runs over rows.
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
    panels = min(units.size, 3)
    figure, axes = _figure(1, panels, max(2.8 * panels, 6.4), 3.0, sharey=True)
    for j, ax in enumerate(axes.flat):
        mean, low, high = (found[k].values.reshape(units.size, -1)[j] for k in ("mean", "low", "high"))
        order = np.argsort(mean)
        x = np.arange(order.size)
        if order.size > SHOWN_ROWS:
            keep = np.linspace(0, order.size - 1, SHOWN_ROWS).astype(int)
            order, x = order[keep], x[keep]
        ax.vlines(x, low[order], high[order], color=BLUE, alpha=0.35, lw=1.0, label=f"{prob:.0%} interval")
        ax.plot(x, mean[order], ".", color=BLUE, ms=3, label="posterior mean")
        left = _name(array, groups.label(units, j)) if j == 0 else ""
        _titled(ax, f"{row}, sorted by mean", left, groups.label(units, j) if panels > 1 else "")
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure


def plot_comparison(svi: xr.DataTree, nuts: xr.DataTree) -> Figure:
    """Differences of means, and ratios of sds, of every entry that SVI and NUTS share."""
    found = entrywise_differences(svi, nuts)
    names = list(found)[:SHOWN_PANELS]
    figure, axes = _figure(1, 2, 8.4, 0.6 + 0.42 * max(len(names), 4), sharey=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        for ax, key in zip(axes[0], ("shift", "sd_ratio"), strict=True):
            value, error = found[name][key].values.ravel(), found[name][f"{key}_mcse"].values.ravel()
            if value.size == 1:
                ax.errorbar(value, [i], xerr=2 * error, fmt="o", ms=4, lw=1.2, color=BLUE)
            else:
                spread = i + 0.25 * rng.uniform(-1, 1, value.size)
                ax.scatter(value, spread, s=5, lw=0, color=BLUE, alpha=0.35, rasterized=True)
    for ax, at, reach in zip(axes[0], (0.0, 1.0), ((-0.2, 0.2), (0.8, 1.25)), strict=True):
        ax.axvline(at, color=INK, lw=1)
        ax.axvspan(*reach, color=GREEN, alpha=0.1, lw=0)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    _titled(axes[0, 0], "difference of means (NUTS sd)")
    _titled(axes[0, 1], "sd of SVI / sd of NUTS")
    return figure


def plot_ranks(ranks: xr.Dataset | Mapping[str, xr.Dataset], *, prob: float = 0.99) -> Figure:
    """Distribution function of ranks less that of uniform ones, a curve for each entry, with its band.

    Of calibrated posteriors each curve stays inside with probability prob. An arch above 0: draws too high;
    an S that rises first: posterior too narrow.

    Args:
        ranks: as ``scivi.calibrate`` makes them, with dim simulation and attribute draws; or several by name,
            a panel for each.
        prob: of the band, which is simultaneous over the ranks, and of one curve.
    """
    panels = {"": ranks} if isinstance(ranks, xr.Dataset) else dict(ranks)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, max(2.8 * columns, 4.2), 2.5 * rows + 0.3, sharey=True)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (title, found) in zip(axes.flat, panels.items(), strict=False):
        n, number = found.sizes["simulation"], 0
        band = uniform_band(n, prob=prob)
        x = band["x"].values
        ax.fill_between(x, band["lower"] - x, band["upper"] - x, color=PALE, lw=0, step="mid")
        for array in found.data_vars.values():
            for row in array.transpose(..., "simulation").values.reshape(-1, n):
                unit = np.sort((row[np.isfinite(row)] + 0.5) / (found.attrs["draws"] + 1))
                curve = np.searchsorted(unit, x, side="right") / max(unit.size, 1)
                ax.plot(x, curve - x, color=BLUE, lw=0.8, alpha=0.7)
                number += 1
        ax.axhline(0, color=INK, lw=0.8)
        _titled(ax, "rank / draws", "ECDF - uniform" if ax in axes[:, 0] else "", title)
        ax.text(0.98, 0.02, f"{n} fits, {number} curves", transform=ax.transAxes, ha="right", fontsize=8)
    return figure


def plot_drift(drift: xr.Dataset) -> Figure:
    """KS distance of every feature, the largest first, and the p-values of the rows.

    Args:
        drift: as ``analysis.drift`` makes it.
    """
    told = drift.isel(variable=np.flatnonzero(np.isfinite(drift["ks"].values)))
    told = told.isel(variable=np.argsort(-told["ks"].values, kind="stable")[: 2 * SHOWN_PANELS])
    ks, good = told["ks"].values, told["ok"].values
    figure, axes = _figure(1, 2, 8.4, 1.0 + 0.17 * max(ks.size, 8), width_ratios=[1.4, 1])
    left, right = axes[0]
    for mask, colour, text in ((good, BLUE, "as in the fit"), (~good, RED, "p at most alpha")):
        left.barh(np.flatnonzero(mask), ks[mask], color=colour, label=text)
    left.set_yticks(range(ks.size), told["variable"].values)
    left.set_ylim(ks.size - 0.5, -0.5)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    p_value = drift["row_p_value"].values
    right.hist(p_value, bins=np.linspace(0, 1, 21), color=BLUE, alpha=0.8)
    right.axhline(p_value.size / 20, color=INK, lw=1, ls="--")
    flagged = int((~drift["row_ok"].values).sum())
    _titled(left, "KS distance", title=f"Features, p = {drift.attrs['p_value']:.2g} in all")
    _titled(right, "p-value of the row", "rows", f"{flagged:,} of {p_value.size:,} rows flagged")
    return figure
