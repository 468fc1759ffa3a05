"""Did the fit settle, and on what: plateau, restarts, collapse, contraction.

How close the settled guide is to the posterior is asked in `weights`.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from scivi.analysis import groups
from scivi.analysis.weights import SHIFT_SD

# Burda, Grosse, Salakhutdinov 2016: a unit is active if its means vary by more than 0.01 under a unit prior
ACTIVE_SHARE = 0.01
END = 0.4  # of its spread from the prior's farthest draw: a posterior so near reaches its end (our choice)
ENDS = {(False, False): "", (True, False): "lower", (False, True): "upper", (True, True): "both"}


FEWEST_ROWS = 10  # fewer do not tell whether latents vary from row to row (our choice)


def plateau(
    tree: xr.DataTree, *, window: float = 0.1, tolerance: float = 0.01, too_noisy: float = 0.1
) -> xr.Dataset:
    """Did the objective level off: compare the last two windows of its history.

    improvement = mean of the last window but one - mean of the last, nats per row. Its error is the larger of
    what the noise of the single steps implies and what the scatter of the log entries shows.

    Args:
        tree: with group history. Entries from before the end of a KL warm-up are left out.
        window: length of a window, as a share of the log entries; at least five, or two where the noise of
            single steps was recorded.
        tolerance: improvement that no longer matters, nats per row; our choice.
        too_noisy: largest error of the improvement at which one can still tell, nats per row; our choice.

    Returns:
        Dim chain: objective (last window), improvement, improvement_se, entries, verdict ("level", "still
        falling", "rising", "too noisy to tell", "too short to tell", "not finite"), ok.
    """
    history = groups.group(tree, "history", "objective")
    if "chain" not in history.dims:
        history = history.expand_dims("chain")
    records = [
        _level(history.isel(chain=c), window, tolerance, too_noisy) for c in range(history.sizes["chain"])
    ]
    columns = {key: [r[key] for r in records] for key in records[0]}
    return groups.table("chain", [str(c) for c in range(len(records))], columns, tolerance=tolerance)


def _level(
    history: xr.Dataset, window: float, tolerance: float, too_noisy: float
) -> dict[str, float | str | bool]:
    """The plateau of one fit."""
    logged = (
        np.isfinite(history["step"].values) if "step" in history else np.isfinite(history["objective"].values)
    )
    if "beta" in history:
        logged &= history["beta"].values == history["beta"].values[logged][-1]
    value = history["objective"].values[logged].astype(float)
    n = max(2 if "objective_sd" in history else 5, round(window * len(value)))
    found: dict[str, float | str | bool] = {
        "objective": float(value[-n:].mean()),
        "improvement": np.nan,
        "improvement_se": np.nan,
        "entries": len(value),
    }
    if not np.isfinite(value).all():
        return found | {"verdict": "not finite", "ok": False}
    if len(value) < 2 * n:
        return found | {"verdict": "too short to tell", "ok": False}
    last, before = value[-n:], value[-2 * n : -n]
    errors = [np.sqrt((last.var(ddof=1) + before.var(ddof=1)) / n)]
    if "objective_sd" in history and "step" in history:
        steps = np.diff(history["step"].values[logged].astype(float), prepend=0.0).clip(1)[-2 * n :]
        noise = history["objective_sd"].values[logged].astype(float)[-2 * n :]
        errors.append(np.sqrt((noise**2 / steps).sum()) / n)
    improvement, error = float(before.mean() - last.mean()), float(np.nanmax(errors))
    found |= {"improvement": improvement, "improvement_se": error}
    limit = max(tolerance, 2 * error)
    if error > too_noisy:
        verdict = "too noisy to tell"
    elif abs(improvement) <= limit:
        verdict = "level"
    else:
        verdict = "still falling" if improvement > 0 else "rising"
    return found | {"verdict": verdict, "ok": verdict == "level"}


def restarts(tree: xr.DataTree, *, shift: float = SHIFT_SD, rhat: float = 1.01) -> xr.Dataset:
    """Do the chains agree: independent fits for SVI, Markov chains for NUTS.

    spread_sd = max over chains |mean of the chain - mean of all| / sd within chains.

    Args:
        tree: with group posterior.
        shift: largest spread to accept for SVI, in sd.
        rhat: largest R-hat to accept for NUTS (Vehtari et al. 2021, doi:10.1214/20-BA1221).

    Returns:
        Dim variable (entries reduced to the worst): spread_sd, r_hat, ess_bulk (NUTS only, else NaN),
        worst_at, ok. With one chain nothing can be compared: spread_sd and r_hat are NaN, ok is False and the
        attribute available is 0.
    """
    from arviz_stats.base.array import array_stats

    nuts = groups.provenance(tree).get("method") == "nuts"

    def judge(values: np.ndarray) -> dict[str, np.ndarray]:
        mean, within = values.mean(1), np.sqrt(values.var(1).mean(0))
        gone = np.full(values.shape[2], np.nan)
        if values.shape[0] < 2:
            return {"spread_sd": gone, "r_hat": gone, "ess_bulk": gone}
        with np.errstate(all="ignore"):
            spread = np.abs(mean - mean.mean(0)).max(0) / within
        r_hat, ess = gone.copy(), gone.copy()
        for i in np.flatnonzero(within > 0) if nuts else ():
            r_hat[i] = array_stats.rhat(values[..., i], method="rank")
            ess[i] = array_stats.ess(values[..., i], method="bulk")
        return {"spread_sd": spread, "r_hat": r_hat, "ess_bulk": ess}

    names, columns = [], {"spread_sd": [], "r_hat": [], "ess_bulk": [], "worst_at": []}
    for name, array in groups.numeric(groups.group(tree, "posterior")).items():
        found = groups.entrywise(array, judge)
        names.append(name)
        columns["spread_sd"].append(groups.worst(array, found["spread_sd"].values)[0])
        columns["r_hat"].append(groups.worst(array, found["r_hat"].values)[0])
        columns["ess_bulk"].append(-groups.worst(array, -found["ess_bulk"].values)[0])
        columns["worst_at"].append(groups.worst(array, found["r_hat" if nuts else "spread_sd"].values)[1])
    key, limit = ("r_hat", rhat) if nuts else ("spread_sd", shift)
    columns["ok"] = [value <= limit for value in columns[key]]
    chains = groups.group(tree, "posterior").sizes["chain"]
    return groups.table("variable", names, columns, available=int(chains > 1), chains=chains, nuts=int(nuts))


def collapse(tree: xr.DataTree, *, threshold: float = ACTIVE_SHARE) -> xr.Dataset:
    """Which local latents carry information about their row (active units).

    share = Var_rows(E[z]) / (Var_rows(E[z]) + mean_rows(Var[z])), where what the means' own Monte Carlo error
    adds to their variance is taken off.

    Args:
        tree: with group posterior.
        threshold: smallest share of an active unit.

    Returns:
        Dim variable, one entry per local latent and unit: between, within (variances), share, ok. No rows: no
        entries.

    Notes:
        A small share also arises without fault, if the population truly has no scatter or the data say
        nothing of the row.

    References:
        Burda, Grosse, Salakhutdinov (2016), ICLR, arXiv:1509.00519. They use the variance of the means alone,
        for a unit normal prior; the share does not depend on the latent's unit.
    """
    row, posterior = groups.row_dim(tree), groups.group(tree, "posterior")
    draws = posterior.sizes["chain"] * posterior.sizes["draw"]
    parts = {}
    for name in groups.local_names(tree):
        found = groups.entrywise(posterior[name], groups.moments)
        noise = (found["sd"] ** 2).mean(row)
        # means of few draws scatter by themselves
        spread = (found["mean"].var(row) - noise / draws).clip(0.0)
        parts[name] = xr.Dataset({"between": spread, "within": noise})
    names, columns = groups.stacked(parts, ("between", "within"))
    total = columns["between"] + columns["within"]
    share = columns["between"] / np.where(total > 0, total, np.nan)
    return groups.table(
        "variable", names, columns | {"share": share, "ok": share >= threshold}, threshold=threshold
    )


def contraction(tree: xr.DataTree, *, threshold: float = 1.1) -> xr.Dataset:
    """How much the data narrowed each variable: posterior spread / prior spread.

    A spread is half the central 68.27 % interval: the sd of a normal, and finite for a half-Cauchy prior.

    Args:
        tree: with groups posterior and prior.
        threshold: largest ratio to accept; our choice. Near 1 the data said nothing; well above it, data and
            prior disagree or the guide is too wide.

    Returns:
        Dim variable, population entries one by one, row-level variables by their median: prior_spread,
        posterior_spread, contraction, ok; end, at which end of its prior a posterior piles up: "lower",
        "upper", "both" or "".

    Notes:
        A posterior piles up at an end if its outer 5 % begin within ``END`` spreads from the prior's
        farthest draw: a uniform does, at both; a normal is 1.6 spreads away from there even if
        nothing was learnt. It is what the prior says that bounds it there, not the data.
    """

    def spread(values: np.ndarray) -> dict[str, np.ndarray]:
        left, low, high, right = np.quantile(values, [0.05, 0.158655, 0.841345, 0.95], axis=(0, 1))
        ends = {"least": values.min((0, 1)), "most": values.max((0, 1))}
        return {"spread": (high - low) / 2, "left": left, "right": right, **ends}

    posterior, prior = groups.group(tree, "posterior"), groups.group(tree, "prior")
    local = set(groups.local_names(tree))
    names, wide, narrow, ends = [], [], [], []
    for name, array in groups.numeric(posterior).items():
        if name not in prior:
            continue
        own, its = groups.entrywise(array, spread), groups.entrywise(prior[name], spread)
        after, before = own["spread"].rename(name), its["spread"].rename(name)
        if name in local or before.shape != after.shape:
            names.append(name)
            wide.append(np.nanmedian(before, keepdims=True).ravel())
            narrow.append(np.nanmedian(after, keepdims=True).ravel())
            ends.append("")
        else:
            names += groups.labels(after)
            wide.append(before.values.ravel())
            narrow.append(after.values.ravel())
            near = END * after.values
            lower, upper = own["left"].values - its["least"].values, its["most"].values - own["right"].values
            ends += [
                ENDS[bool(a), bool(b)] for a, b in zip((lower < near).flat, (upper < near).flat, strict=True)
            ]
    a, b = (np.concatenate(parts) if parts else np.empty(0) for parts in (wide, narrow))
    ratio = b / np.where(a > 0, a, np.nan)
    columns = {"prior_spread": a, "posterior_spread": b, "contraction": ratio, "ok": ~(ratio > threshold)}
    return groups.table("variable", names, {**columns, "end": ends}, threshold=threshold)
