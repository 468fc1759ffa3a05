"""SVI beside NUTS, per variable, in units of the NUTS posterior's sd; and the summary of one posterior."""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr

from scivi.analysis import groups
from scivi.analysis.weights import SHIFT_SD
from scivi.errors import DataError

SD_RATIO = 1.25  # our choice: an sd wrong by a quarter turns a 90 % interval into one of 81 % or 96 %
# E W1 between two samples of one unit normal is W1_FLOOR * sqrt(1/n + 1/m): sqrt(2/pi) times the integral of
# sqrt(F (1 - F)), from the Brownian bridge limit of the difference of two empirical distribution functions.
W1_FLOOR = 1.2884

ROUNDING = 1e-5  # of float32 draws, with room


def compare(
    svi: xr.DataTree, nuts: xr.DataTree, *, shift: float = SHIFT_SD, sd_ratio: float = SD_RATIO
) -> xr.Dataset:
    """Compare two posteriors of the same model and data, entry by entry.

    shift = (mean_svi - mean_nuts) / sd_nuts; sd_ratio = sd_svi / sd_nuts; w1 = Wasserstein-1 distance /
    sd_nuts.

    Args:
        svi: the posterior to judge.
        nuts: the reference; may hold a subset of the rows, in any order, and any number of draws.
        shift: largest 95th percentile of |shift| to accept, beyond two Monte Carlo errors.
        sd_ratio: largest factor, up or down, by which 95 % of the sds may differ, beyond two Monte Carlo
            errors.

    Returns:
        Dim variable, entries reduced: n, shift_median (signed), shift_p95, shift_worst (of absolute
        values), shift_mcse, sd_ratio_median, sd_ratio_p95 (of max(r, 1/r)), sd_ratio_worst, sd_ratio_mcse,
        w1_median, w1_p95, w1_worst, w1_floor (what two samples of this size show if the posteriors are
        equal), worst_at, comparable, ok. comparable is False for a population variable if the reference holds
        fewer rows: its posterior then is another one. Attributes: reference_ok, reference_r_hat,
        reference_divergences.

    Raises:
        DataError: no variable or no coordinate in common, or none that varies.

    Notes:
        Unequal numbers of draws are no obstacle here; `arviz_plots.plot_forest` drops such models without a
        word.
    """
    found = entrywise_differences(svi, nuts)
    records = {
        name: _reduced(name, entries)
        for name, entries in found.items()
        if not _constant(*(entries[k].values for k in ("sd_svi", "sd_nuts", "mean_nuts"))).all()
    }
    if not records:
        raise DataError("nothing to compare: every variable that the two share is constant in both.")
    row = groups.row_dim(svi)
    full = _rows(svi, row) == _rows(nuts, row)
    names = list(records)
    columns = {key: [records[n][key] for n in names] for key in records[names[0]]}
    columns["comparable"] = [full or row in groups.group(svi, "posterior")[n].dims for n in names]
    moved = np.asarray(columns["shift_p95"]) - 2 * np.asarray(columns["shift_mcse"])
    scaled = np.asarray(columns["sd_ratio_p95"]) - 2 * np.asarray(columns["sd_ratio_mcse"])
    columns["ok"] = list((moved <= shift) & (scaled <= sd_ratio))
    return groups.table("variable", names, columns, shift=shift, sd_ratio=sd_ratio, **_health(nuts))


def entrywise_differences(svi: xr.DataTree, nuts: xr.DataTree) -> dict[str, xr.Dataset]:
    """Differences of every shared entry, by variable.

    Holds shift, shift_mcse, sd_ratio, sd_ratio_mcse, w1, w1_floor as `compare` defines them, and mean_svi,
    mean_nuts, sd_svi, sd_nuts. Dims are those of the site; entries that NUTS holds fixed are NaN.
    """
    a, b = groups.numeric(groups.group(svi, "posterior")), groups.numeric(groups.group(nuts, "posterior"))
    shared = [name for name in a if name in b]
    if not shared:
        raise DataError(
            f"the posteriors hold {sorted(a)} and {sorted(b)}: no variable in common. Fit the same template."
        )
    markov = groups.provenance(svi).get("method") == "nuts"
    return {name: _differences(*groups.aligned(a[name], b[name]), markov) for name in shared}


def _differences(left: xr.DataArray, right: xr.DataArray, markov: bool) -> xr.Dataset:
    """Entry by entry, of two that are aligned and small enough to be held."""
    from arviz_stats.base.array import array_stats
    from scipy.stats import wasserstein_distance

    rest = groups.site_dims(left)
    x, y = (a.transpose(*groups.SAMPLE, *rest).values.astype(float) for a in (left, right))
    x, y = (a.reshape(*a.shape[:2], -1) for a in (x, y))
    out = {key: np.full(x.shape[2], np.nan) for key in ("shift_mcse", "sd_ratio_mcse", "w1", "w1_floor")}
    mean_x, mean_y, sd_x, sd_y = x.mean((0, 1)), y.mean((0, 1)), x.std((0, 1)), y.std((0, 1))
    fixed = _constant(sd_x, sd_y, mean_y)  # no sd to compare in
    with np.errstate(all="ignore"):
        shift, ratio = (mean_x - mean_y) / sd_y, sd_x / sd_y
        out |= {"shift": np.where(fixed, np.nan, shift), "sd_ratio": np.where(fixed, np.nan, ratio)}
    for i in np.flatnonzero((sd_y > 0) & (sd_x > 0) & ~fixed):
        ess_y = float(np.asarray(array_stats.ess(y[..., i], method="mean")))
        ess_x = (
            float(np.asarray(array_stats.ess(x[..., i], method="mean"))) if markov else float(x[..., i].size)
        )
        ess_y = ess_y if np.isfinite(ess_y) else float(y[..., i].size)
        ratio = out["sd_ratio"][i]
        out["shift_mcse"][i] = np.sqrt(1 / ess_y + ratio**2 / ess_x)
        out["sd_ratio_mcse"][i] = ratio * np.sqrt(
            _log_sd_var(y[..., i], ess_y) + _log_sd_var(x[..., i], ess_x)
        )
        out["w1"][i] = wasserstein_distance(x[..., i].ravel(), y[..., i].ravel()) / sd_y[i]
        out["w1_floor"][i] = W1_FLOOR * np.sqrt(1 / ess_x + 1 / ess_y)
    out |= {"mean_svi": mean_x, "mean_nuts": mean_y, "sd_svi": sd_x, "sd_nuts": sd_y}
    shape = [left.sizes[d] for d in rest]
    coords = {d: left.coords[d] for d in rest if d in left.coords}
    return xr.Dataset({k: (rest, v.reshape(shape)) for k, v in out.items()}, coords=coords)


def _constant(sd_svi: np.ndarray, sd_nuts: np.ndarray, mean_nuts: np.ndarray) -> np.ndarray:
    """Entries that both hold fixed, up to rounding, such as the diagonal of a correlation matrix."""
    return np.maximum(sd_svi, sd_nuts) <= ROUNDING * (1 + np.abs(mean_nuts))


def _log_sd_var(values: np.ndarray, ess: float) -> float:
    """Variance of the log of the sample sd: (kurtosis - 1) / (4 ess), by the delta method."""
    centred = values - values.mean()
    return float(((centred**4).mean() / (centred**2).mean() ** 2 - 1) / (4 * ess))


def _reduced(name: str, entries: xr.Dataset) -> dict[str, float | str]:
    """Median, 95th percentile and worst over the entries of one variable."""
    shift = entries["shift"].values.ravel()
    size, off, w1 = np.abs(shift), entries["sd_ratio"].values.ravel(), entries["w1"].values.ravel()
    seen = np.isfinite(size) & np.isfinite(off)
    if not seen.any():
        keys = ("shift_median", "shift_p95", "shift_worst", "shift_mcse", "sd_ratio_median", "sd_ratio_p95",
                "sd_ratio_worst", "sd_ratio_mcse", "w1_median", "w1_p95", "w1_worst", "w1_floor")  # fmt: skip
        return {"n": 0, **dict.fromkeys(keys, np.nan), "worst_at": ""}
    factor = np.maximum(off[seen], 1 / np.maximum(off[seen], 1e-12))
    template = entries["shift"].rename(name)
    where = int(np.nanargmax(np.where(seen, size, -1)))
    return {
        "n": int(seen.sum()),
        "shift_median": float(np.median(shift[seen])),
        "shift_p95": float(np.quantile(size[seen], 0.95)),
        "shift_worst": float(size[seen].max()),
        "shift_mcse": float(np.nanmedian(entries["shift_mcse"])),
        "sd_ratio_median": float(np.median(off[seen])),
        "sd_ratio_p95": float(np.quantile(factor, 0.95)),
        "sd_ratio_worst": float(off[seen][np.argmax(factor)]),
        "sd_ratio_mcse": float(np.nanmedian(entries["sd_ratio_mcse"])),
        "w1_median": float(np.median(w1[seen])),
        "w1_p95": float(np.quantile(w1[seen], 0.95)),
        "w1_worst": float(w1[seen].max()),
        "w1_floor": float(np.nanmedian(entries["w1_floor"])),
        "worst_at": groups.label(template, where),
    }


def _rows(tree: xr.DataTree, row: str | None) -> int:
    """Number of rows behind a tree, as far as it says."""
    for name in ("observed_data", "log_likelihood", "posterior"):
        if row and name in tree.children and row in tree.children[name].dataset.sizes:
            return tree.children[name].dataset.sizes[row]
    return 0


def _health(nuts: xr.DataTree) -> dict[str, float]:
    """Whether the reference itself converged: worst R-hat of its population variables, divergences."""
    from arviz_stats.base.array import array_stats

    posterior = groups.group(nuts, "posterior")
    names = groups.population_names(nuts) or list(groups.numeric(posterior))
    worst = float("nan")
    if posterior.sizes["chain"] > 1:
        for name in names:
            values = posterior[name].transpose(*groups.SAMPLE, ...).values.astype(float)
            flat = values.reshape(*values.shape[:2], -1)
            varying = np.flatnonzero(flat.std((0, 1)) > 0)
            worst = np.fmax(
                worst,
                max((float(np.asarray(array_stats.rhat(flat[..., i]))) for i in varying), default=worst),
            )
    recorded = groups.has(nuts, "sample_stats", "diverging")
    divergences = int(nuts.children["sample_stats"].dataset["diverging"].sum()) if recorded else 0
    good = divergences == 0 and not worst > 1.01
    return {"reference_ok": int(good), "reference_r_hat": float(worst), "reference_divergences": divergences}


def summary(
    tree: xr.DataTree,
    var_names: list[str] | None = None,
    *,
    prob: float = 0.94,
    interval: Literal["eti", "hdi"] = "eti",
) -> xr.Dataset:
    """Mean, sd and interval of each entry, by ArviZ.

    Args:
        tree: with group posterior.
        var_names: variables to list; None: those that do not run over rows, or all if every one does.
        prob: probability of the interval.
        interval: "eti" (equal tails) or "hdi" (highest density).

    Returns:
        Dim variable, one entry per element: mean, sd, lower, upper, unit, ok (all finite).

    Raises:
        DataError: an unknown name.
    """
    from arviz_stats.base.array import array_stats

    posterior = groups.group(tree, "posterior", *(var_names or ()))
    chosen = var_names or groups.population_names(tree) or groups.local_names(tree)

    def describe(values: np.ndarray) -> dict[str, np.ndarray]:
        flat = np.moveaxis(values, 2, 0).reshape(values.shape[2], -1)
        ends = getattr(array_stats, interval)(flat, prob=prob, axis=-1)
        return groups.moments(values) | {"lower": ends[..., 0], "upper": ends[..., 1]}

    found = {name: groups.entrywise(posterior[name], describe) for name in chosen}
    names, columns = groups.stacked(found, ("mean", "sd", "lower", "upper"))
    finite = np.isfinite(np.array(list(columns.values()))).all(0)
    sizes = {name: one["mean"].size for name, one in found.items()}
    unit = [str(posterior[name].attrs.get("units", "")) for name in found for _ in range(sizes[name])]
    columns = {**columns, "unit": unit, "ok": finite}
    return groups.table("variable", names, columns, prob=prob, interval=interval)
