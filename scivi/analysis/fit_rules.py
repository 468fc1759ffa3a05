"""Rules about the fit: is this distribution the posterior of this model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from scivi.analysis import groups, pareto, weights
from scivi.analysis.check import RICHER, Check, either, graded, note, worst

LEVEL = {
    "level": "The objective levelled off: it changed by {gain:.3g} ± {error:.2g} nats per row at the end.",
    "still falling": "The objective was still falling at the end, by {gain:.3g} ± {error:.2g} nats per row.",
    "rising": "The objective was rising at the end, by {gain:.3g} ± {error:.2g} nats per row.",
    "too noisy to tell": "The objective is too noisy (± {error:.2g} nats) to tell whether it levelled off.",
    "too short to tell": "The history is too short to tell whether the objective levelled off.",
    "not finite": "The objective is not finite somewhere in the history.",
}


def finite(tree: xr.DataTree) -> list[Check]:
    """No NaN or infinity in any draw."""
    bad, total = 0, 0
    for array in groups.numeric(groups.group(tree, "posterior")).values():
        for _, values in groups.blocks(array):
            bad, total = bad + int((~np.isfinite(values)).sum()), total + values.size
    text = f"{bad:,} of {total:,} posterior numbers are not finite."
    advice = "Look for rows with extreme or missing values; scivi.check names the site."
    return [either("finite draws", bad, 0, bad == 0, "decides", "All draws are finite.", text, advice)]


def counted(weights: Mapping[str, float]) -> list[Check]:
    """Observations that a model counts more or less than once."""
    advice = "Take poutine.scale out of the model: batch.plate scales minibatches by itself."
    return [
        Check(
            "weight of data", w, 1.0, False, "care", f"{name} counts {w:.3g} times in the posterior.", advice
        )
        for name, w in weights.items()
    ]


def drifted(table: xr.Dataset) -> list[Check]:
    """Whether new rows are like those of the fit: a guide knows no others."""
    bad = ~table["ok"].values
    shift = table["shift_sd"].values
    order = np.argsort(np.where(bad, table["p_value"].fillna(0.0).values, np.inf), kind="stable")
    named = ", ".join(
        f"{table['variable'].values[k]}" + (f" ({shift[k]:+.2g} sd)" if np.isfinite(shift[k]) else "")
        for k in order[: min(4, bad.sum())]
    )
    p = table.attrs["p_value"]
    good = f"These rows are no other than those of the fit, as far as can be told (p = {p:.2g})."
    small = f"These rows differ from those of the fit, though little (p = {p:.2g}): {named}."
    text = f"These rows differ from those of the fit (p = {p:.2g}): {named}."
    matters = bool(table.attrs["drifted"] and table["matters"].any())
    advice = "Fit again with such rows among the data; scivi.analysis.drift names rows and features."
    fine = small if table.attrs["drifted"] else good
    return [either("drift", p, table.attrs["alpha"], not matters, "care", fine, text, advice)]


def optimisation(fit: Mapping[str, Any], level: xr.Dataset | None, corrected: bool = False) -> list[Check]:
    """How the fit ended, and whether its objective had levelled off; if weights correct draws, no matter."""
    result: list[Check] = []
    if fit.get("stopped") == "diverged":
        text, advice = "The fit diverged.", "Lower the learning rate, or check the data."
        result.append(Check("ending", np.nan, np.nan, False, "decides", text, advice))
    if fit.get("stopped") == "signal":
        text = "The fit was interrupted before its end."
        result.append(Check("ending", np.nan, np.nan, False, "care", text, "Resume the fit."))
    again = fit.get("restarts") or []
    if again:
        text = f"The fit diverged and was restarted {len(again)} times before it ended well."
        result.append(note("restarts after divergence", text, len(again)))
    if fit.get("stopped") == "nothing to learn":
        text = "Nothing was to be learnt: the guide works out the posterior of each row by itself."
        return [*result, note("plateau", text)]
    finish = fit.get("finish") or {}
    if "tried" in finish:
        return [*result, note("guide", _ladder(finish), len(finish["tried"]))]
    if finish.get("alone") and "method" in finish:
        text = f"Nothing was to be learnt but what rows share; {finish['method']} on the marginal found that."
        return [*result, note("plateau", text)]
    if level is None:
        return result
    verdicts = [str(v) for v in level["verdict"].values]
    at = next((i for i, v in enumerate(verdicts) if v != "level"), 0)
    gain, error = float(level["improvement"][at]), float(level["improvement_se"][at])
    text = LEVEL[verdicts[at]].format(gain=abs(gain), error=error)
    if corrected:
        return [*result, note("plateau", text, gain)]
    # our choice: a tenth of a nat per row within a tenth of the run is a fit that has not ended
    stop = verdicts[at] == "not finite" or (verdicts[at] in ("still falling", "rising") and abs(gain) > 0.1)
    counts = "decides" if stop else "care"
    limit, ok = float(level.attrs["tolerance"]), verdicts[at] == "level"
    return [*result, either("plateau", gain, limit, ok, counts, text, text, "Fit for more steps.")]


def _ladder(finish: Mapping[str, Any]) -> str:
    """What was tried for a guide, what it cost, and why that was the end."""
    steps = [
        f"{t['guide']} (k-hat {t['k_hat']:.2f}, {t['effective_share']:.0%} effective, {t['evaluations']:,} "
        f"evaluations, {t['seconds']:.2g} s)"
        for t in finish["tried"]
    ]
    return f"Tried: {'; '.join(steps)}. The end: {finish['stopped']}."


def reach(finish: Mapping[str, Any]) -> list[Check]:
    """Whether walkers that began at draws, or searches for modes, came to where the guide hardly is."""
    result = []
    if "missed" in finish:
        share = finish["missed"]
        text = f"{share:.1%} of walkers that began at draws came to where weights are twice the largest."
        # our choice: what a twentieth of them find four sd away moves a mean by .2 sd, what a quarter by 1
        result.append(graded("reach", share, 0.05, 0.25, text, text, RICHER))
    if "unseen_modes" in finish:
        share, n = finish["unseen_modes"], finish["modes"]
        good = f"Draws belong to every mode that was found ({n})."
        text = f"{share:.1%} of the posterior lies at modes to which hardly a draw belongs ({n} were found)."
        # our choice: modes are further away
        result.append(graded("modes", share, 0.01, 0.1, good, text, RICHER))
    return result


def importance(
    tree: xr.DataTree, found: Mapping[str, xr.Dataset], finish: Mapping[str, Any] | None
) -> list[Check]:
    """Importance weights: joint ones where they can tell, else those of rows and of the population.

    Up to 50 rows with latents of their own, or none such, the joint k-hat decides. Beyond, a large joint
    k-hat is a matter of dimension (see `weights.reliability`): the share of rows with a poor k-hat of their
    own decides about the rows, and the Newton finish, or NUTS on the same rows, about the population.
    """
    if finish and finish.get("method") == "nuts":
        return _kept(finish)
    joint, rows, result = found.get("reliability"), found.get("row_reliability"), []
    new = groups.are_new(tree)
    if joint is None and rows is None and not new:
        text = "No importance weights were stored: how far the guide is from the posterior is unknown."
        advice = "Draw again with scivi.draw."
        result.append(Check("importance weights", np.nan, np.nan, False, "care", text, advice))
    if joint is not None:
        result += _joint(joint, whole=rows is None)
    if rows is not None:
        result += _rows(rows)
    if joint is not None and joint.attrs.get("proposals"):
        return result  # weights corrected the draws, those of the population among them
    if finish and finish.get("method") == "importance sampling":
        result += _sampled(finish)
    elif groups.has(tree, "sample_stats", "global_log_weight"):
        result += _weighed(weights.population_reliability(tree))
    elif finish and finish.get("method") == "newton":
        result += _sampled(finish) if "log_weight" in finish else _newton(finish, _rows_of_fit(tree))
    elif (rows is not None or new) and not (joint is not None and joint.attrs["decisive"]):
        result += _population(tree, found.get("compare"))
    return result


def _rows_of_fit(tree: xr.DataTree) -> int:
    """How many rows the fit had."""
    made = groups.provenance(tree)
    sizes = (made.get("fit_data") or made["data"])["sizes"]
    return int(sizes[groups.row_dim(tree)])


def _kept(finish: Mapping[str, Any]) -> list[Check]:
    """Draws of NUTS that stand for a guide: whether its chains have converged."""
    r_hat, ess, bad, n = (finish[k] for k in ("r_hat", "ess", "divergences", "draws"))
    longer = "Run scivi.nuts longer, or write the model in other coordinates (not centred)."
    mixed = f"The draws are those of NUTS: no guide was good enough (R-hat at most {r_hat:.3f})."
    size = f"The worst variable has {ess:,.0f} effective draws."
    gone = f"{bad:,} of {n:,} draws diverged: places that they belong to were not reached."
    # our choices: R-hat as everywhere; a divergence in a hundred draws is a place that is missing
    return [
        graded("R-hat", r_hat, 1.01, 1.05, mixed, mixed, longer),
        either("effective draws", ess, 400, ess >= 400, "care", size, size, longer),
        graded("divergences", bad / n, 0.0, 0.01, gone, gone, longer),
    ]


def _joint(joint: xr.Dataset, *, whole: bool) -> list[Check]:
    """k-hat of the whole approximation, and how far its weights move the means.

    Args:
        joint: of ``weights.reliability``.
        whole: whether draws that were corrected were so in all latents, those of rows among them.
    """
    k, ess = float(joint["k_hat"].max()), float(joint["ess"].min())
    if not joint.attrs["decisive"]:
        text = f"The joint k-hat over {joint.attrs['local_rows']:,} rows ({k:.1f}) says nothing at that size."
        return [note("joint k-hat", text, k)]
    numbers = f"k-hat {k:.2f}, effective size {ess:.0f}"
    if proposals := joint.attrs.get("proposals", 0):
        return _corrected(proposals, k, ess, whole=whole)
    # a small k-hat over many rows is more than can be asked for: only few rows must meet the strict limit
    limit = weights.GOOD_K if joint.attrs["few"] else weights.USABLE_K
    degree = "not close to" if k > weights.USABLE_K else "only roughly"
    good = f"The approximation as a whole is close to the posterior ({numbers})."
    bad = f"The approximation as a whole is {degree} the posterior ({numbers})."
    result = [graded("k-hat", k, limit, weights.USABLE_K, good, bad, RICHER)]
    if joint.attrs["few"]:
        gap = float(joint["gap"].max())
        text = f"The guide is {gap:.2g} nats from the posterior as a whole (KL divergence, from below)."
        # our choice: by Pinsker's inequality 0.1 nats bound the error of any probability by 0.22. Needed
        # beside k-hat, which scatters by 0.15 at a thousand draws and lets mean field on eight schools
        # pass one time in three
        result.append(graded("gap", gap, 0.1, np.inf, text, text, RICHER))
    if k <= weights.USABLE_K and joint.sizes["variable"]:
        shift = abs(joint[["shift_sd"]])
        value, name = worst(shift, "shift_sd", "variable")
        beyond = float((shift["shift_sd"] - 2 * joint["shift_mcse"]).max())
        good = f"Correction by the weights moves no mean by much (at most {value:.2f} sd, {name})."
        bad = f"Correction by the weights moves the mean of {name} by {value:.2f} sd."
        advice = "Take the corrected means of analysis.reliability, or a richer guide."
        counts, ok = "decides" if beyond > 1 else "care", value <= weights.SHIFT_SD
        result.append(either("corrected means", value, weights.SHIFT_SD, ok, counts, good, bad, advice))
    return result


def _corrected(proposals: int, k: float, ess: float, *, whole: bool) -> list[Check]:
    """Draws that were taken from more by their weights: whether these can be used, and are of many draws.

    Of what rows share alone, as its draws were kept when the fit ended, fewer are enough.
    """
    what = "Draws" if whole else "Draws of what rows share"
    chosen = f"{what} were taken from {proposals:,} by their importance weights"
    good = f"{chosen}, which can be used (k-hat {k:.2f}): the guide's own error is corrected."
    bad = f"{chosen}, which cannot be used (k-hat {k:.2f})."
    size = f"The weights are worth {ess:,.0f} independent draws: a mean is known to {ess**-0.5:.2g} sd."
    more = "Draw more, or take a richer guide."
    fewest = weights.FEW_EFFECTIVE if whole else 100  # our choice: a mean to a tenth of its sd
    return [
        graded("k-hat", k, weights.USABLE_K, weights.USABLE_K, good, bad, RICHER),
        either("effective draws", ess, fewest, ess >= fewest, "care", size, size, more),
    ]


def _rows(rows: xr.Dataset) -> list[Check]:
    """Rows whose own weights are poor, the mean gap, and rows outside the range of the fit."""
    bad, outside, n = ~rows["ok"].values, rows["outside"].values, rows["ok"].size
    share, gap, strange = float(bad.mean()), float(np.nanmean(rows["gap"].values)), float(outside.mean())
    poor = f"{int(bad.sum()):,} of {n:,} rows have a k-hat above {rows.attrs['threshold']} ({share:.2%})."
    lost = f"A row's guide is {gap:.2g} nats from its posterior, on average over rows."
    away = f"{int(outside.sum()):,} of {n:,} rows lie outside the range of the fit ({strange:.2%}); "
    away += f"of these, {int((bad & outside).sum()):,} have poor weights."
    better = "Use a richer guide for the rows (a flow, or a Laplace base), or fit longer."
    some = "Draw the rows with poor weights with refine=, or leave them out of what you conclude."
    return [
        # our choice: a hundredth of the rows does not change a catalogue, a tenth does
        graded("rows with poor weights", share, 0.01, 0.1, poor, poor, better if share > 0.1 else some),
        # our choice: by Pinsker's inequality 0.1 nats bound the error of any probability by 0.22
        graded("mean gap of rows", gap, 0.1, 1.0, lost, lost, better),
        graded("rows outside", strange, 0.05, np.inf, away, away, "Fit again with such rows included."),
    ]


def _weighed(table: xr.Dataset) -> list[Check]:
    """The population's approximation against the marginal, in which every row is integrated.

    A k-hat of up to 0.7 says that the weights can be believed; what they then say of the means decides.
    """
    k, ess, draws = float(table["k_hat"].max()), float(table["ess"].min()), int(table["draws"])
    numbers = f"k-hat {k:.2f}, effective size {ess:.0f} of {draws}"
    if k > weights.USABLE_K:
        text = f"The population's approximation is not close to its marginal posterior ({numbers})."
        advice = (
            "Run scivi.nuts for the population, or reparametrise it so that its posterior is nearer to "
            "normal."
        )
        return [Check("population k-hat", k, weights.USABLE_K, False, "decides", text, advice)]
    value, name = worst(abs(table[["shift_sd"]]), "shift_sd", "variable")
    weighing = "Weighing the population by its marginal posterior moves"
    text = f"{weighing} no mean by more than {value:.2f} sd ({name}; {numbers})."
    bad = f"{weighing} the mean of {name} by {value:.2f} sd ({numbers})."
    advice = "Take the corrected means of analysis.population_reliability, or run scivi.nuts."
    return [
        either("population", value, weights.SHIFT_SD, value <= weights.SHIFT_SD, "care", text, bad, advice)
    ]


def _sampled(finish: Mapping[str, Any]) -> list[Check]:
    """A population whose draws were weighed on its marginal when the fit ended.

    Of few rows mean and covariance come from the weights (importance sampling), of more from Newton.
    """
    smoothed, k_hat = pareto.smooth(np.asarray(finish["log_weight"], dtype=float)[None])
    k, ess = float(k_hat[0]), float(pareto.effective_size(smoothed)[0])
    if finish["method"] == "newton":
        n = len(finish["log_weight"])
        text = f"{n} draws of the population, weighed with every row of the fit integrated: k-hat {k:.2f}, "
        text += f"effective size {ess:.0f}."
        fewest = 0.5 * n  # our choice: as weights with a variance of one
    else:
        text = (
            f"Mean and spread of the population come from {finish['draws']} weighted draws of its marginal "
        )
        text += f"posterior (k-hat {k:.2f}, effective size {ess:.0f}: right to {ess**-0.5:.2f} sd)."
        fewest = 100  # our choice: they give a mean to a tenth of its sd
    advice = "Run scivi.nuts for the population, or fit for longer."
    few = [] if ess >= fewest else [Check("population size", ess, fewest, False, "care", text, advice)]
    return [graded("population k-hat", k, weights.USABLE_K, 1.0, text, text, advice), *few]


# our choice: the skewness of a posterior of regular globals falls as 1 / sqrt(rows), to a few hundredths here
MANY_ROWS = 5000


def _newton(finish: Mapping[str, Any], n: int) -> list[Check]:
    """A population that was finished by Newton over n rows, where weights of it were not affordable."""
    text = (
        f"The population was finished by Newton on its marginal over {n:,} rows "
        f"(last step {finish['step_sd']:.2g} sd)"
    )
    good, bad = f"{text}.", f"{text}; whether its posterior is normal was not checked."
    advice = "Compare with scivi.nuts on a subset, or draw with 50 draws or more from the data of the fit."
    return [either("population", finish["step_sd"], 0.1, n >= MANY_ROWS, "care", good, bad, advice)]


def _population(tree: xr.DataTree, compared: xr.Dataset | None) -> list[Check]:
    """Without Newton finish, only a comparison with NUTS on the same rows vouches for the population."""
    names = groups.population_names(tree)
    if not names:
        return []
    same = [n for n in names if compared is not None and n in compared["variable"].values]
    if compared is not None and same and bool(compared["comparable"].sel(variable=same).all()):
        return [note("population", "The population variables are judged by the comparison with NUTS.")]
    few = ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")
    if groups.are_new(tree):
        text = (
            f"These rows are not those of the fit: nothing here vouches for the population variables ({few})."
        )
        advice = "Draw the rows of the fit too, and read the report of these."
    else:
        text = f"Nothing vouches for the population variables ({few}): the ELBO alone can bias them by "
        text += "several sd while every row looks right."
        advice = (
            'Use Plan(estimator="marginal"), which ends with a Newton finish, or compare with scivi.nuts.'
        )
    return [Check("population", np.nan, np.nan, False, "care", text, advice)]


def agreement(table: xr.Dataset) -> list[Check]:
    """Several fits of one model."""
    if not table.attrs["available"]:
        return [note("restarts", "There is one fit only: agreement of restarts is not available.")]
    value, where = worst(table, "spread_sd", "worst_at")
    text = f"{table.attrs['chains']} independent fits differ by at most {value:.2f} sd ({where})."
    advice = "Fit for more steps; look for several modes."
    return [graded("restarts", value, weights.SHIFT_SD, 1.0, text, text, advice)]


def sampling(tree: xr.DataTree, table: xr.Dataset) -> list[Check]:
    """Markov chains: R-hat, effective size, divergences (Vehtari et al. 2021, doi:10.1214/20-BA1221)."""
    if not table.attrs["available"]:
        text = "There is one chain only: R-hat is not available."
        return [Check("R-hat", np.nan, 1.01, False, "care", text, "Run four chains.")]
    value, where = worst(table, "r_hat", "worst_at")
    ess = float(np.nanmin(table["ess_bulk"].values))
    wild = 0.0
    if groups.has(tree, "sample_stats", "diverging"):
        wild = float(tree.children["sample_stats"].dataset["diverging"].mean())
    agree = f"The chains agree to R-hat {value:.3f} (worst: {where})."
    size = f"The smallest bulk effective size is {ess:.0f}; 400 or more are wanted."
    calm, gone = "No transition diverged.", f"{wild:.2%} of transitions diverged."
    advice = "Raise the target acceptance rate, or reparametrise."
    return [
        graded("R-hat", value, 1.01, 1.05, agree, agree, "Run longer chains."),
        either("effective size", ess, 400, ess >= 400, "care", size, size, "Run longer chains."),
        graded("divergences", wild, 0.0, 0.01, calm, gone, advice),
    ]
