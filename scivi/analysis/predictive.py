"""Does the posterior predict the data: PIT, predictive checks, leave-one-out density."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from scivi.analysis import groups, pareto
from scivi.analysis.calibration import ALPHA, rank_among, uniformity
from scivi.analysis.weights import log_weights, row_reliability

EFFECT = 0.02  # a difference that does not matter, however many rows show it; our choice


def pit_values(tree: xr.DataTree, *, seed: int = 0) -> xr.Dataset:
    """Probability integral transform of each observed value under its posterior predictive draws.

    u = (number below + U (number equal + 1)) / (S + 1), U uniform: randomised, so that counts give uniform u
    too.

    Returns:
        The observed fields that have predictive draws, with their dims; NaN where the observation is missing.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, draws, seen in _replicated(tree):
        rank = rank_among(draws, seen, rng)
        found[name] = (rank + rng.random(rank.shape)) / (draws.sizes["chain"] * draws.sizes["draw"] + 1)
    return xr.Dataset(found)


def _replicated(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray, xr.DataArray]]:
    """Each observed field that has predictive draws: name, draws and observations, aligned."""
    predictive, observed = groups.group(tree, "posterior_predictive"), groups.group(tree, "observed_data")
    for name, array in groups.numeric(predictive).items():
        if name in observed:
            yield name, *groups.aligned(array, observed[name])


def pit(tree: xr.DataTree, *, prob: float = 0.99, tolerance: float = EFFECT, seed: int = 0) -> xr.Dataset:
    """Are observations where the posterior predictive expects them.

    Args:
        tree: with groups posterior_predictive (from ``predict``) and observed_data.
        prob: probability that a right model passes.
        tolerance: distance, or excess of tail_share, that does not matter.
        seed: of the randomisation.

    Returns:
        Dim variable, one entry per observed field: n, distance and share_of_band (as in `sbc`), tail_share
        (of values in the outer 5 % on either side; 0.1 if uniform), ok.

    Notes:
        The posterior has seen the data, so u is somewhat too central even for a right model; where rows have
        latents of their own, strongly so. There only the opposite is a fault, and ok tests nothing but too
        large a tail_share. For globals alone use `arviz_stats.loo_pit`, which leaves each observation out.
    """
    from scipy.stats import binom

    local, names, records = groups.have_latents(tree), [], []
    for name, array in pit_values(tree, seed=seed).data_vars.items():
        values = array.values.ravel()
        values = values[np.isfinite(values)]
        record = uniformity(values, prob, tolerance)
        extreme = int((np.abs(values - 0.5) > 0.45).sum())
        if local and values.size:
            rare = binom.sf(extreme - 1, values.size, 0.1) < 1 - prob
            record["ok"] = not (rare and extreme / values.size > 0.1 + tolerance)
        names.append(str(name))
        records.append(record | {"tail_share": extreme / max(values.size, 1)})
    columns = {
        key: [r[key] for r in records] for key in ("n", "distance", "share_of_band", "tail_share", "ok")
    }
    return groups.table("variable", names, columns, prob=prob, one_sided=int(local))


STATISTICS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda x: x.mean(-1),
    "sd": lambda x: x.std(-1),
    "zero fraction": lambda x: (x == 0).mean(-1),
    "max": lambda x: x.max(-1),
}


def predictive_check(
    tree: xr.DataTree,
    statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]] = STATISTICS,
    *,
    alpha: float = ALPHA,
    tolerance: float = EFFECT,
) -> xr.Dataset:
    """Compare statistics of the data with those of replicated data.

    p = P(T(replicated) > T(observed)) + P(equal) / 2; effect = |observed - mean replicated| / (sd replicated
    * sqrt(n)), a difference in units of what one observation contributes: it does not grow with n.
    ok if 2 min(p, 1 - p) >= alpha, or effect <= tolerance.

    Args:
        tree: with groups posterior_predictive and observed_data.
        statistics: name -> function of (draws, n) that returns (draws,); missing observations are left out on
            both sides.
        alpha: level.
        tolerance: effect that does not matter, however certain.

    Returns:
        Dim variable, one entry per field and statistic ("n_on: max"): observed, replicated_mean,
        replicated_sd, p_value, effect, ok.

    References:
        Gelman, Meng, Stern (1996), Statistica Sinica 6:733.
    """
    names, rows = [], []
    for field, draws, seen in _replicated(tree):
        rest = groups.site_dims(draws)
        flat_seen = seen.transpose(*rest).values.ravel().astype(float)
        there = np.isfinite(flat_seen)
        if not there.any():
            continue
        replicated = {name: [] for name in statistics}
        for part in _by_draw(draws):
            for name, statistic in statistics.items():
                replicated[name].append(statistic(part[:, there]))
        for name, statistic in statistics.items():
            real, copies = float(statistic(flat_seen[None, there])[0]), np.concatenate(replicated[name])
            if real == copies.min() == copies.max():
                continue  # nothing to compare: no zero among continuous data
            p = float((copies > real).mean() + (copies == real).mean() / 2)
            names.append(f"{field}: {name}")
            mean, sd = float(copies.mean()), float(copies.std())
            effect = abs(real - mean) / (sd * there.sum() ** 0.5) if sd > 0 else np.inf
            rows.append((real, mean, sd, p, effect, 2 * min(p, 1 - p) >= alpha or effect <= tolerance))
    keys = ("observed", "replicated_mean", "replicated_sd", "p_value", "effect", "ok")
    columns = {key: [row[i] for row in rows] for i, key in enumerate(keys)}
    return groups.table("variable", names, columns, alpha=alpha, tolerance=tolerance)


def _by_draw(array: xr.DataArray) -> Iterator[np.ndarray]:
    """Yield (some draws, all entries) at a time."""
    rest = groups.site_dims(array)
    array = array.transpose(*groups.SAMPLE, *rest)
    entries = max(int(np.prod([array.sizes[d] for d in rest])), 1)
    step = max(1, groups.BLOCK // entries)
    for chain in range(array.sizes["chain"]):
        for start in range(0, array.sizes["draw"], step):
            part = array.isel(chain=chain, draw=slice(start, start + step)).values
            yield part.reshape(part.shape[0], -1).astype(float)


def loo(
    tree: xr.DataTree, *, threshold: float = 0.7, rows: xr.Dataset | None = None, share: float = 1.0
) -> xr.Dataset:
    """Expected log predictive density of a row left out, corrected for the approximation.

    Rows without latents of their own, per observed site: with r_s = p(x, theta_s) / q(theta_s) / p(x_i |
    theta_s), smoothed and normalised, elpd_i = log sum_s r_s p(x_i | theta_s) (Magnusson et al. 2019; the
    numbers of `arviz_stats.loo_approximate_posterior`, or for NUTS of `arviz_stats.loo`).

    Rows with latents of their own, all observed sites together: p(x_i | z_i, theta) is not the density of a
    left-out row, since z_i has seen x_i, and the joint ratio p / q over all rows drowns in the other rows'
    noise. Instead z_i is integrated by the row's own weights, elpd_i = log mean_s exp(row_log_weight), whose
    normaliser is known. The globals are not left out: the sum is too large by about one nat per
    well-determined global.

    Args:
        tree: with log_likelihood, or sample_stats/row_log_weight.
        threshold: largest k-hat of a row to accept.
        rows: the result of `weights.row_reliability`, if at hand.
        share: of all rows, for which the rows of the tree stand if they were chosen at random; elpd, se and
            p_loo are those of all.

    Returns:
        Dim variable, one entry per observed site (or the one entry "row"): elpd, se (NaN of a single row),
        p_loo (NaN where rows have latents), n, bad_share (of rows with k-hat above threshold), ok (none above
        one per cent).
        elpd_<site> and k_hat_<site> per row.

    Raises:
        DataError: neither group is there, or fewer than 25 draws.

    References:
        Magnusson, Andersen, Jonasson, Vehtari (2019), ICML, arXiv:1904.10679.
        Vehtari, Gelman, Gabry (2017), Statistics and Computing 27:1413, arXiv:1507.04544.
    """
    if groups.has(tree, "sample_stats", "row_log_weight"):
        rows = row_reliability(tree, threshold=threshold) if rows is None else rows
        sites = {"row": rows.rename(log_evidence="elpd").assign(p_loo=xr.full_like(rows["gap"], np.nan))}
        kind = "latents of rows integrated, globals not left out"
    else:
        sites, kind = _leave_one_out(tree), "leave-one-out"
    columns: dict[str, list[float]] = {k: [] for k in ("elpd", "se", "p_loo", "n", "bad_share", "ok")}
    pointwise = {}
    for name, found in sites.items():
        elpd, k_hat = found["elpd"].values.ravel(), found["k_hat"].values.ravel()
        there = np.isfinite(elpd)  # missing observations have no density
        n, bad = int(there.sum()), float((k_hat[there] > threshold).mean())
        p_loo = float(found["p_loo"].values.ravel()[there].sum())
        elpd_se = np.sqrt(n * elpd[there].var(ddof=1)) if n > 1 else np.nan
        row = (elpd[there].sum() / share, elpd_se / share, p_loo / share, n, bad, bad <= 0.01)
        for key, value in zip(columns, row, strict=True):
            columns[key].append(float(value))
        pointwise |= {f"elpd_{name}": found["elpd"], f"k_hat_{name}": found["k_hat"]}
    return groups.table("variable", list(sites), columns, kind=kind).assign(pointwise)


def _leave_one_out(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """elpd, k_hat and p_loo of each entry of each observed site; chains are pooled."""
    sites, correction = groups.numeric(groups.group(tree, "log_likelihood")), 0.0
    if groups.has(tree, "sample_stats", "lp", "log_q"):
        ratio = log_weights(tree).values.ravel()
        correction = ratio - ratio.max()

    def judge(values: np.ndarray) -> dict[str, np.ndarray]:
        flat = values.reshape(-1, values.shape[2]).T  # (entry, draw of any chain)
        smoothed, k_hat = pareto.smooth(correction - flat)
        elpd = logsumexp(smoothed + flat, axis=-1)
        return {
            "elpd": elpd,
            "k_hat": k_hat,
            "p_loo": logsumexp(flat, axis=-1) - np.log(flat.shape[1]) - elpd,
        }

    return {name: groups.entrywise(array, judge) for name, array in sites.items()}
