"""From diagnostics to one word: trust, trust with care, do not trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xarray as xr

from scivi.analysis import (
    calibration,
    comparison,
    convergence,
    fit_rules,
    groups,
    model_rules,
    predictive,
    weights,
)
from scivi.analysis.check import Check, note
from scivi.analysis.drift import drift

DRIFT_ALPHA = 0.01  # of new rows like those of the fit, one report in a hundred says otherwise (our choice)

# Passed, these do not add to the reasons for trust: others say the same better.
MINOR = {
    "finite draws",
    "corrected means",
    "gap",
    "mean gap of rows",
    "rows outside",
    "effective size",
    "active units",
    "contraction",
}


def measure(
    tree: xr.DataTree,
    reference: xr.DataTree | None = None,
    truth: xr.Dataset | None = None,
    whole: xr.DataTree | None = None,
) -> dict[str, xr.Dataset]:
    """Every diagnostic that the tree has the groups for, by name of its function.

    Args:
        tree: a posterior.
        reference: a NUTS posterior to compare it with.
        truth: the values that made simulated data, to compare it with.
        whole: the posterior with all its rows, if the tree has some of them.
    """
    whole = tree if whole is None else whole
    found = {"summary": comparison.summary(tree), "restarts": convergence.restarts(tree)}
    svi = groups.provenance(tree).get("method", "svi") == "svi"
    corrected = groups.has(tree, "sample_stats", weights.CORRECTED)
    # Rows that are new weigh what they share by their own likelihood, not by that of the rows it came from.
    others = groups.are_new(tree) and bool(groups.population_names(tree))
    if svi and (corrected or (not others and groups.has(tree, "sample_stats", "lp", "log_q"))):
        found["reliability"] = weights.reliability(whole)
    if svi and groups.has(tree, "sample_stats", "row_log_weight"):
        found["row_reliability"] = weights.row_reliability(tree)
    if groups.has(tree, "history", "objective"):
        found["plateau"] = convergence.plateau(tree)
    if groups.local_rows(tree) >= convergence.FEWEST_ROWS:
        found["collapse"] = convergence.collapse(tree)
    if "prior" in tree.children:
        found["contraction"] = convergence.contraction(tree)
    if "posterior_predictive" in tree.children and "observed_data" in tree.children:
        found["predictive_check"] = predictive.predictive_check(tree)
        found["pit"] = predictive.pit(tree)
    if groups.local_rows(tree) or "log_likelihood" in tree.children:
        share = 1.0 if whole is tree else groups.rows(tree) / groups.rows(whole)
        found["loo"] = predictive.loo(tree, rows=found.get("row_reliability"), share=share)
    if groups.has(tree, "features", "feature_values", "fit_values") and groups.are_new(tree):
        found["drift"] = drift(tree, alpha=DRIFT_ALPHA)
    if truth is not None:
        found["coverage"] = calibration.coverage(tree, truth)
    if reference is not None:
        found["compare"] = comparison.compare(tree, reference)
    return found


def checks(tree: xr.DataTree, found: Mapping[str, xr.Dataset]) -> list[Check]:
    """Apply every rule to what was measured; the order is that of the page."""
    made = groups.provenance(tree)
    method, fit = made.get("method", "svi"), made.get("fit") or {}
    result = fit_rules.finite(tree) + fit_rules.counted(made.get("weights") or {})
    if method == "svi":
        result += fit_rules.importance(tree, found, fit.get("finish"))
        of_all = "reliability" in found and bool(found["reliability"].attrs["proposals"])
        corrected = of_all and "row_reliability" not in found
        result += fit_rules.optimisation(fit, found.get("plateau"), corrected)
        result += fit_rules.reach(fit.get("finish") or {})
        result += fit_rules.agreement(found["restarts"])
    elif method == "nuts":
        result += fit_rules.sampling(tree, found["restarts"])
    else:
        result.append(note("method", f'Computed by "{method}": there is no guide to check by its weights.'))
    if "drift" in found:
        result += fit_rules.drifted(found["drift"])
    for name, rule in model_rules.RULES.items():
        if name in found and found[name].sizes.get("variable", 0):
            result += rule(found[name])
    return result


def conclude(results: Sequence[Check]) -> tuple[str, list[str], list[str]]:
    """Verdict, reasons and advice of all checks, the deciding ones first."""
    deciding = [c for c in results if not c.ok and c.counts == "decides"]
    careful = [c for c in results if not c.ok and c.counts == "care"]
    verdict = "do not trust" if deciding else "trust with care" if careful else "trust"
    failed = deciding + careful
    why = list(dict.fromkeys(c.sentence for c in failed)) or [
        c.sentence for c in results if c.counts != "note" and c.name not in MINOR
    ]
    return verdict, why, list(dict.fromkeys(c.advice for c in failed if c.advice))
