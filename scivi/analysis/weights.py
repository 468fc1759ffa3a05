"""Importance weights: how far is the guide q from the posterior p that it stands for.

The weights p / q of the guide's own draws answer it, through the shape k-hat of their upper tail. Below 0.5
the guide is close; up to 0.7 its errors can still be corrected by the weights; above, neither the guide nor
the correction is to be believed (Yao et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from scipy.special import logsumexp

from scivi.analysis import groups, pareto
from scivi.errors import DataError

FEW_ROWS = 50  # beyond it the joint weights of all rows say nothing: see `reliability`; our choice
GOOD_K, USABLE_K = 0.5, 0.7  # Yao, Vehtari, Simpson, Gelman 2018
CORRECTED = "proposal_log_weight"  # in sample_stats: log weights of the proposals of corrected draws
FEW_EFFECTIVE = 400  # proposals, under which corrected draws ask for care (as of chains: Vehtari et al. 2021)
SHIFT_SD = 0.2  # our choice: a 90 % interval displaced by 0.2 sd still covers 89.3 %


def reliability(tree: xr.DataTree, *, threshold: float = USABLE_K, shift: float = SHIFT_SD) -> xr.Dataset:
    """Judge the whole approximation by its importance weights w = p(x, z, theta) / q(z, theta).

    With w smoothed and normalised: ess = 1 / sum(w^2), corrected mean = sum(w * theta).

    Args:
        tree: with groups posterior and sample_stats (lp, log_q; or proposal_log_weight, of draws that were
            taken from more by their weights: then it is the proposals that are judged, and the means are
            corrected ones already). Each chain is its own approximation; the worst counts.
        threshold: largest k-hat to accept.
        shift: largest |corrected mean - mean| to accept, in posterior sd, beyond two Monte Carlo errors.

    Returns:
        Dim variable: mean, sd, corrected_mean, shift_sd, shift_mcse (both in posterior sd), ok. Dim chain:
        k_hat, ess, gap (log mean(w) - mean(log w), an estimate of KL(q || p) in nats, from below). The
        attribute decisive is 0 if more than 50 rows have latents of their own (of rows that share no
        variable, more than one) and k-hat is above the threshold: then ok is False throughout, for want of
        evidence; few is 0 of so many rows. Of corrected draws, proposals is how many they were taken from,
        else 0. Row-level variables are listed up to 50 rows.

    Raises:
        DataError: a group is missing, or fewer than 25 draws.

    Notes:
        log w is a sum over rows. If each row's guide is off by a harmless 0.03 nats, its log weight has a
        variance of about 0.06, and that of a thousand rows 60: k-hat is far above 1 though every row is good.
        A small k-hat is good news at any size, but with many rows a large one is no news: their own weights
        decide (`row_reliability`), and the population needs a check of its own: the Newton finish on the
        marginal, or NUTS (`comparison.compare`).

    References:
        Yao, Vehtari, Simpson, Gelman (2018), ICML, arXiv:1802.02538.
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72), arXiv:1507.02646.
    """
    rows, proposals, shared = groups.local_rows(tree), 0, groups.population_names(tree)
    names = shared + (groups.local_names(tree) if rows <= FEW_ROWS else [])
    if groups.has(tree, "sample_stats", CORRECTED):
        log_weight = groups.group(tree, "sample_stats")[CORRECTED].astype(float).values
        proposals = log_weight.shape[1]
        found = _judged(tree, log_weight, names, threshold, shift, equal=True)
    else:
        found = _judged(tree, log_weights(tree).values, names, threshold, shift)
    strict = few(rows, shared)
    says = decisive(strict, found["k_hat"].values, threshold)
    found["ok"] = found["ok"] & says
    return found.assign_attrs(decisive=int(says), few=int(strict), local_rows=rows, proposals=proposals)


def log_weights(tree: xr.DataTree) -> xr.DataArray:
    """Log p - log q of every draw, all latents together, dims (chain, draw), and of many fits theirs."""
    stats = groups.group(tree, "sample_stats", "lp", "log_q")
    return (stats["lp"].astype(float) - stats["log_q"].astype(float)).transpose(*groups.SAMPLE, ...)


def few(rows: int, shared: Sequence[str]) -> bool:
    """Whether rows with latents are so few that all their weights together must be good: see `reliability`.

    Rows that share no variable are posteriors of their own, each with weights of its own.
    """
    return rows <= (FEW_ROWS if shared else 1)


def decisive(few: bool, k_hat: np.ndarray, threshold: float = USABLE_K) -> bool:
    """Whether the joint weights say anything: of few rows always, of many if they are good."""
    return few or bool((k_hat <= threshold).all())


def _judged(
    tree: xr.DataTree,
    log_weight: np.ndarray,
    names: list[str],
    threshold: float,
    shift: float,
    some: np.ndarray | slice = slice(None),
    *,
    equal: bool = False,
) -> xr.Dataset:
    """k-hat, effective size and gap by chain; by variable, how far the weights move its mean."""
    weight, numbers = smoothed(log_weight)
    posterior = groups.group(tree, "posterior").isel(draw=some)
    if equal:
        weight = np.full((posterior.sizes["chain"], posterior.sizes["draw"]), 1 / posterior.sizes["draw"])
    found = {
        name: groups.entrywise(posterior[name], lambda values: corrected(values, weight)) for name in names
    }
    keys = ("mean", "sd", "corrected_mean", "shift_sd", "shift_mcse")
    entries, columns = groups.stacked(found, keys)
    within = np.abs(columns["shift_sd"]) <= np.maximum(shift, 2 * columns["shift_mcse"])
    columns["ok"] = within & bool((numbers["k_hat"] <= threshold).all())
    result = groups.table("variable", entries, columns, threshold=threshold)
    return result.assign({key: ("chain", value) for key, value in numbers.items()})


def smoothed(log_weight: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Smoothed weights, (..., draw), summing to one, of log weights; and their k_hat, ess and gap, (...)."""
    log_smooth, k_hat = pareto.smooth(log_weight)
    gap = np.asarray(logsumexp(log_weight, axis=-1)) - np.log(log_weight.shape[-1]) - log_weight.mean(-1)
    numbers = {"k_hat": k_hat, "ess": pareto.effective_size(log_smooth), "gap": gap}
    return np.exp(log_smooth), numbers


def corrected(values: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
    """Raw and reweighted means of values (chain, draw, n), of the chain whose mean moves most.

    Args:
        values: of n variables.
        weight: (chain, draw), smoothed and summing to one.

    Returns:
        By name, each (n,): mean, sd, corrected_mean, shift_sd and shift_mcse, as `reliability` tells them.
    """
    mean, sd = values.mean(1), values.std(1)  # (chain, n)
    sd = np.where(sd > 0, sd, np.nan)
    excess = weight - 1 / weight.shape[1]  # corrected - raw = sum((w - 1/S) (x - mean))
    centred = values - mean[:, None]
    moved = np.einsum("cd,cdn->cn", excess, centred)
    error = np.sqrt(np.einsum("cd,cdn->cn", excess**2, centred**2))
    pick = np.argmax(np.nan_to_num(np.abs(moved / sd)), axis=0)[None]

    def take(a: np.ndarray) -> np.ndarray:
        return np.take_along_axis(a, pick, 0)[0]

    return {
        "mean": take(mean),
        "sd": take(sd),
        "corrected_mean": take(mean + moved),
        "shift_sd": take(np.nan_to_num(moved / sd)),
        "shift_mcse": take(np.nan_to_num(error / sd)),
    }


def population_reliability(
    tree: xr.DataTree, *, threshold: float = USABLE_K, shift: float = SHIFT_SD
) -> xr.Dataset:
    """Judge the globals' own approximation by their weights with the rows integrated out.

    w = p(x | theta) p(theta) / q(theta), where p(x | theta) integrates the latents of every row.

    Args:
        tree: with ``sample_stats/global_log_weight``; draws without one are NaN.
        threshold: largest k-hat to accept.
        shift: largest |corrected mean - mean| to accept, in posterior sd, beyond two Monte Carlo errors.

    Returns:
        As `reliability` does, for the variables that do not run over rows; ``draws`` counts the weighted
        ones.

    Raises:
        DataError: no such weights were stored (too many rows to integrate at each draw), or fewer than 25.
    """
    stats = groups.group(tree, "sample_stats")
    if "global_log_weight" not in stats:
        raise DataError(
            '"sample_stats" has no "global_log_weight": the rows were not integrated at each draw.'
        )
    every = stats["global_log_weight"].astype(float).transpose(*groups.SAMPLE).values
    some = np.asarray(np.isfinite(every).all(0))
    found = _judged(tree, every[:, some], groups.population_names(tree), threshold, shift, some)
    return found.assign(draws=int(some.sum()))


def row_reliability(
    tree: xr.DataTree, *, threshold: float = USABLE_K, block: int = groups.BLOCK
) -> xr.Dataset:
    """Judge every row's own approximation by the importance weights of its latents given the globals.

    gap = log mean(w) - mean(log w), an estimate of KL(q || p) of the row in nats, from below. Both k-hat and
    gap also contain how much p(x_i | theta) itself varies over the draws of theta: little where rows are
    many.

    Args:
        tree: with ``sample_stats/row_log_weight``.
        threshold: largest k-hat to accept.
        block: numbers in memory at once.

    Returns:
        The rows' dim: k_hat, ess, gap, log_evidence (log mean(w), nats), outside (False where not recorded),
        amortisation_gap if the tree has it, ok. Several chains: the worst of each number. A row outside the
        range of the fit is ok if its weights are: they come from the model, not from the training set.

    Raises:
        DataError: no row weights (the template has no latents of its rows), or fewer than 25 draws.
    """
    stats = groups.group(tree, "sample_stats")
    if "row_log_weight" not in stats:
        raise DataError(
            '"sample_stats" has no "row_log_weight": the rows have no latents of their own, or the tree is '
            "of NUTS. Use reliability(tree) instead."
        )

    def judge(values: np.ndarray) -> dict[str, np.ndarray]:
        chains, draws, n = values.shape
        flat = np.moveaxis(values, 1, 2).reshape(chains * n, draws)
        smoothed, k_hat = pareto.smooth(flat)
        evidence = logsumexp(flat, axis=-1) - np.log(draws)
        k_hat, ess, evidence, mean = (
            a.reshape(chains, n) for a in (k_hat, pareto.effective_size(smoothed), evidence, flat.mean(-1))
        )
        gap = (evidence - mean).max(0)
        return {"k_hat": k_hat.max(0), "ess": ess.min(0), "gap": gap, "log_evidence": evidence.max(0)}

    result = groups.entrywise(stats["row_log_weight"], judge, block)
    outside = stats["outside"].values if "outside" in stats else np.zeros(result["k_hat"].shape)
    result["outside"] = (result["k_hat"].dims, outside.astype(bool))
    if "amortisation_gap" in stats:
        result = result.assign(amortisation_gap=stats["amortisation_gap"])
    return result.assign(ok=result["k_hat"] <= threshold).assign_attrs(threshold=threshold)
