"""Do the posterior's probabilities hold: ranks, coverage, simulation-based calibration.

Checks against the data instead of the truth are in `predictive`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from scivi.analysis import groups
from scivi.errors import DataError

ALPHA = 0.01  # a sound check fails once in a hundred; our choice
GRID = 100  # equal bins, at whose inner edges a distribution function is compared; our choice


def ranks(tree: xr.DataTree, truth: xr.Dataset, *, seed: int = 0) -> xr.Dataset:
    """Rank of the true value among the draws, 0 to S; ties are broken at random.

    Args:
        tree: with group posterior.
        truth: true values by variable, aligned with the posterior by coordinate.
        seed: of the tie breaking.

    Returns:
        The variables of truth that the posterior has, with their site dims. The attribute draws is S.

    Raises:
        DataError: the two share no variable or no coordinate.
    """
    group = groups.group(tree, "posterior")
    posterior = groups.numeric(group)
    shared = [name for name in groups.numeric(truth) if name in posterior]
    if not shared:
        raise DataError(
            f"truth has {sorted(map(str, truth.data_vars))}, the posterior {sorted(posterior)}: "
            "nothing in common. Rename the variables of truth."
        )
    rng = np.random.default_rng(seed)
    found = {name: rank_among(*groups.aligned(posterior[name], truth[name]), rng) for name in shared}
    return xr.Dataset(found, attrs={"draws": group.sizes["chain"] * group.sizes["draw"]})


def rank_among(array: xr.DataArray, true: xr.DataArray, rng: np.random.Generator) -> xr.DataArray:
    """Randomised rank of each entry of ``true`` among the draws of ``array``; NaN where it is missing."""
    rest = groups.site_dims(array)
    true = true.transpose(*rest)
    parts = []
    for piece, values in groups.blocks(array):
        at = true.isel({groups.longest(array): piece}).values if rest else true.values
        below, equal = (values < at).sum((0, 1)), (values == at).sum((0, 1))
        rank = below + np.floor(rng.random(at.shape) * (equal + 1))
        parts.append(np.where(np.isnan(at.astype(float)), np.nan, rank))
    axis = rest.index(groups.longest(array)) if rest else 0
    return true.copy(data=np.concatenate(parts, axis) if rest else parts[0])


def coverage(
    tree: xr.DataTree,
    truth: xr.Dataset,
    probs: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    *,
    alpha: float = ALPHA,
    tolerance: float = 0.02,
    seed: int = 0,
) -> xr.Dataset:
    """How often central intervals hold the truth.

    An interval of probability p holds the truth if |(rank + 1/2) / (S + 1) - 1/2| <= p / 2; `expected` is
    what that gives for a uniform rank, so that a small S does no harm.

    Args:
        tree: with group posterior.
        truth: true values by variable, aligned by coordinate.
        probs: probabilities of the central intervals.
        alpha: level of the exact binomial test.
        tolerance: difference from `expected` that does not matter, however many rows show it; our choice.
        seed: of the tie breaking.

    Returns:
        Dims variable, prob: coverage, expected, mc_error (binomial sd), p_value, ok. Dim variable: n.

    Notes:
        The test takes entries as independent; rows that share uncertain globals are not quite. With one entry
        per variable it can hardly fail: repeat over simulations and use `sbc`.
    """
    from scipy.stats import binomtest

    found = ranks(tree, truth, seed=seed)
    draws = found.attrs["draws"]
    distance = np.abs((np.arange(draws + 1) + 0.5) / (draws + 1) - 0.5)
    names, shape = [str(v) for v in found.data_vars], (len(found.data_vars), len(probs))
    columns = {key: np.full(shape, np.nan) for key in ("coverage", "expected", "mc_error", "p_value")}
    counts = np.zeros(len(names), int)
    for i, name in enumerate(names):
        rank = found[name].values.ravel()
        rank = rank[np.isfinite(rank)].astype(int)
        counts[i] = rank.size
        for j, prob in enumerate(probs):
            inside, expected = int((distance[rank] <= prob / 2).sum()), float((distance <= prob / 2).mean())
            columns["coverage"][i, j], columns["expected"][i, j] = inside / max(rank.size, 1), expected
            columns["mc_error"][i, j] = np.sqrt(expected * (1 - expected) / max(rank.size, 1))
            columns["p_value"][i, j] = binomtest(inside, rank.size, expected).pvalue if rank.size else np.nan
    result = xr.Dataset(
        {key: (("variable", "prob"), value) for key, value in columns.items()},
        coords={"variable": names, "prob": list(probs)},
        attrs={"alpha": alpha, "tolerance": tolerance},
    ).assign(n=("variable", counts))
    near = np.abs(result["coverage"] - result["expected"]) <= tolerance
    return result.assign(ok=near | (result["p_value"] >= alpha))


def uniform_band(n: int, *, prob: float = 0.95, seed: int = 0) -> xr.Dataset:
    """Simultaneous band for the distribution function of n uniform numbers.

    Each point's binomial interval is widened until, over simulations, the whole curve stays inside with
    probability prob. ArviZ (`arviz_stats.ecdf_utils`) has this with every sample drawn; counts in bins
    suffice and do not slow down with n.

    Args:
        n: sample size.
        prob: probability that a uniform sample stays inside everywhere.
        seed: of the simulations.

    Returns:
        Dim x: lower, upper.

    References:
        Säilynoja, Bürkner, Vehtari (2022), Statistics and Computing 32:32, doi:10.1007/s11222-022-10090-6.
    """
    from scipy.stats import binom

    x = np.arange(1, GRID) / GRID
    counts = np.random.default_rng(seed).multinomial(n, np.full(GRID, 1 / GRID), size=2000)
    counts = counts.cumsum(-1)[:, :-1]
    tails = np.minimum(binom.cdf(counts, n, x), binom.sf(counts - 1, n, x)).min(-1)
    level = np.quantile(tails, 1 - prob)  # a point's tail probability that prob of the curves never go below
    lower, upper = binom.ppf(level, n, x) / n, binom.ppf(1 - level, n, x) / n
    return xr.Dataset(
        {"lower": ("x", lower), "upper": ("x", upper)}, coords={"x": x}, attrs={"n": n, "prob": prob}
    )


def uniformity(values: np.ndarray, prob: float, tolerance: float = 0.0) -> dict[str, float | bool]:
    """Compare numbers in [0, 1] with `uniform_band`: distance, its share of the band, ok."""
    values = values[np.isfinite(values)]
    if values.size < 5:
        return {"n": values.size, "distance": np.nan, "share_of_band": np.nan, "ok": False}
    band = uniform_band(values.size, prob=prob)
    x = band["x"].values
    curve = np.searchsorted(np.sort(values), x, side="right") / values.size
    above, below = band["upper"].values - x, x - band["lower"].values
    room = np.where(curve > x, above, below)
    share = np.abs(curve - x) / np.maximum(room, 1 / values.size)
    inside = ((curve >= band["lower"].values) & (curve <= band["upper"].values)).all()
    distance = float(np.abs(curve - x).max())
    return {
        "n": values.size,
        "distance": distance,
        "share_of_band": float(share.max()),
        "ok": bool(inside or distance <= tolerance),
    }


def sbc(
    ranks: xr.Dataset | Sequence[xr.Dataset],
    *,
    draws: int | None = None,
    dim: str = "simulation",
    prob: float = 0.99,
    seed: int = 0,
) -> xr.Dataset:
    """Simulation-based calibration: ranks of planted parameters must be uniform.

    Simulate theta from the prior and data from theta, fit, take `ranks`; repeat. The distribution function of
    the ranks is compared with its simultaneous band.

    Args:
        ranks: one Dataset with the dim of repetitions, or a list of `ranks`, one per simulation.
        draws: number of posterior draws behind each rank; read from the attribute draws if None.
        dim: the dim of repetitions. A row dim may stand in, if the globals are well known.
        prob: probability that a calibrated posterior passes, for each entry.
        seed: of the spreading of integer ranks over [0, 1].

    Returns:
        Dim variable, one entry per variable and remaining index: n, mean (0.5 if unbiased; below: draws too
        high), spread (sd / that of the uniform; above 1: posterior too narrow), distance, share_of_band, ok.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv:1804.06788. Säilynoja et al. (2022), as
        `uniform_band`.
    """
    if not isinstance(ranks, xr.Dataset):
        draws = draws or ranks[0].attrs.get("draws")
        ranks = xr.concat(list(ranks), dim=dim)
    draws = draws or ranks.attrs.get("draws")
    if not draws or not ranks.data_vars or any(dim not in array.dims for array in ranks.data_vars.values()):
        raise DataError(
            f'sbc needs the number of draws (got {draws}) and ranks with dim "{dim}" '
            f"(got {dict(ranks.sizes)}). Pass draws=..., and dim= the name of the dim of repetitions."
        )
    rng = np.random.default_rng(seed)
    names: list[str] = []
    records: list[dict[str, float | bool]] = []
    for name, array in ranks.data_vars.items():
        entries = array.transpose(..., dim)
        names += groups.labels(entries.isel({dim: 0}, drop=True).rename(name))
        for row in entries.values.reshape(-1, entries.sizes[dim]).astype(float):
            unit = (row + rng.random(row.shape)) / (draws + 1)
            seen = unit[np.isfinite(unit)]
            shape = {"mean": float(seen.mean()), "spread": float(seen.std() * np.sqrt(12))}
            records.append(shape | uniformity(unit, prob))
    columns = {key: [r[key] for r in records] for key in records[0]}
    return groups.table("variable", names, columns, draws=int(draws), prob=prob)
