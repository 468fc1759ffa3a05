"""Rules about the model and the outside world: the data, planted truth, a NUTS reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from scivi.analysis.check import RICHER, Check, either, listed, note, worst

HARDLY = 0.7  # posterior over prior spread; of normals, 1 / sqrt(2) where the data say as much as the prior
SEE_MODEL = "If the fit is otherwise sound, the model is in question: see the predictive figure."


def _collapse(table: xr.Dataset) -> list[Check]:
    bad = ~table["ok"].values
    good = "Every row-level variable carries information about its row."
    text = f"{bad.sum()} of {bad.size} row-level variables say nothing of their row ({listed(table, bad)})."
    advice = "Use fewer latents or a longer KL warm-up; or the data say nothing of them, which is a result."
    return [either("active units", bad.sum(), 0, not bad.any(), "care", good, text, advice)]


def _contraction(table: xr.Dataset) -> list[Check]:
    bad, value = ~table["ok"].values, float(np.nanmax(table["contraction"].values, initial=-np.inf))
    text = f"Posterior wider than prior for {listed(table, bad)} (up to {value:.2f} times)."
    advice = "Check the prior of these variables, and whether the guide is too wide."
    good, limit = "No posterior is wider than its prior.", table.attrs["threshold"]
    result = [either("contraction", value, limit, not bad.any(), "care", good, text, advice)]
    return [*result, *_identification(table)]


def _identification(table: xr.Dataset) -> list[Check]:
    """What the data leave open: nothing is wrong with the fit, but the intervals are the prior's."""
    share, end = table["contraction"].values, table["end"].values
    one_sided, flat = np.isin(end, ["lower", "upper"]), (end == "both") | (share > HARDLY)
    told = []
    if flat.any():
        told.append(f"The data hardly narrow {listed(table, flat)}: the prior decides.")
    if one_sided.any():
        told.append(
            f"The data bound {listed(table, one_sided)} from one side only, the prior from the other."
        )
    return [note("identification", " ".join(told), int((flat | one_sided).sum()))] if told else []


def _predictive(table: xr.Dataset) -> list[Check]:
    bad, p = ~table["ok"].values, table["p_value"].values
    value, limit = float((2 * np.minimum(p, 1 - p)).min()), table.attrs["alpha"]
    shown = f"{value:.2g}" if value >= 0.001 else "below 0.001"
    good = f"Replicated data look like the data ({bad.size} statistics, smallest two-sided p {shown})."
    text = f"The model does not reproduce {listed(table, bad)} (two-sided p {shown})."
    return [either("predictive checks", value, limit, not bad.any(), "care", good, text, SEE_MODEL)]


def _pit(table: xr.Dataset) -> list[Check]:
    n, distance = table["n"].values, table["distance"].values
    few = np.isnan(distance) & ((n == 0) | (not table.attrs["one_sided"]))  # of which nothing can be told
    bad, value = ~table["ok"].values & ~few, float(np.nanmax(distance, initial=0.0))
    counts = [f"{name} ({k})" for name, k in zip(table["variable"].values[few], n[few], strict=True)]
    why = f"Too few observed values to say where they lie in the posterior predictive: {', '.join(counts)}."
    if few.all():
        return [note("PIT", why)]
    good = "Observations lie where the posterior predictive expects them (PIT)."
    text = (
        f"Observations do not lie where the posterior predictive expects them (PIT of {listed(table, bad)})."
    )
    good, text = (f"{told} {why}" if few.any() else told for told in (good, text))
    return [either("PIT", value, np.nan, not bad.any(), "care", good, text, SEE_MODEL)]


def _coverage(table: xr.Dataset) -> list[Check]:
    ok, many = table["ok"].values, table["n"].values >= 20
    gap = np.abs(table["coverage"].values - table["expected"].values)
    value = float(gap[many].max()) if many.any() else np.nan
    bad = np.asarray(~ok.all(1))
    wide = bool((gap[many][~ok[many]] > 0.1).any())  # our choice: 90 % intervals that are 80 % ones
    good = "Intervals hold the true values as often as they should."
    i, j = np.unravel_index(int(np.argmax(np.where(ok, -1.0, gap))), gap.shape)
    name, prob, share = table["variable"].values[i], float(table["prob"][j]), float(table["coverage"][i, j])
    text = f"Intervals do not hold the truth as often as they should: of the {prob:.0%} intervals of {name}, "
    text += f"{share:.1%} do. Failed: {listed(table, bad)}."
    counts, limit = "decides" if wide else "care", table.attrs["tolerance"]
    return [either("coverage", value, limit, not bad.any(), counts, good, text, RICHER)]


def _compare(table: xr.Dataset) -> list[Check]:
    same = table.isel(variable=np.flatnonzero(table["comparable"].values))
    result, attrs = [], table.attrs
    if not attrs["reference_ok"]:
        text = f"The NUTS reference itself has not converged (R-hat {attrs['reference_r_hat']:.3f}, "
        text += f"{attrs['reference_divergences']} divergences)."
        result.append(
            Check("reference", attrs["reference_r_hat"], 1.01, False, "care", text, "Run NUTS longer.")
        )
    if not same.sizes["variable"]:
        return [*result, note("NUTS", "NUTS saw other rows: nothing is comparable.")]
    bad = ~same["ok"].values
    value, where = worst(same, "shift_p95", "variable")
    moved = same["shift_p95"].values - 2 * same["shift_mcse"].values
    scaled = same["sd_ratio_p95"].values - 2 * same["sd_ratio_mcse"].values
    far = bool((moved > 0.5).any() or (scaled > 1.5).any())  # our choice: twice what asks for care
    counts = "decides" if far and attrs["reference_ok"] else "care"
    good = f"SVI agrees with NUTS: 95 % of the means within {value:.2f} sd (worst variable: {where})."
    text = f"SVI differs from NUTS in {listed(same, bad)}: means up to {value:.2f} sd ({where}), "
    text += f"sds up to a factor {np.nanmax(same['sd_ratio_p95'].values):.2f}."
    return [*result, either("NUTS", value, attrs["shift"], not bad.any(), counts, good, text, RICHER)]


def _loo(table: xr.Dataset) -> list[Check]:
    sites = [
        f"{name} {float(elpd):.1f} ± {float(se):.1f}"
        for name, elpd, se in zip(*(table[k].values for k in ("variable", "elpd", "se")), strict=True)
    ]
    text = f"Expected log predictive density in nats: {', '.join(sites)} ({table.attrs['kind']})."
    return [note("predictive density", text)]


RULES: dict[str, Callable[[xr.Dataset], list[Check]]] = {
    "collapse": _collapse,
    "contraction": _contraction,
    "predictive_check": _predictive,
    "pit": _pit,
    "coverage": _coverage,
    "compare": _compare,
    "loo": _loo,
}
