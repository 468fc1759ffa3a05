"""One verdict for each of many fits: the rules of the report, asked of every data set by itself.

What costs by the number (smoothing of weights, moved means) is worked out for all fits at once; the rules
then read a table of one fit at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from scivi.analysis import convergence, fit_rules, groups, verdict, weights
from scivi.errors import DataError

ENDS = ("stopped", "steps", "restarts")  # how each fit ended
PLATEAU = ("step", "beta", "objective", "objective_sd")  # of the history


def each(tree: xr.DataTree, over: str | None = None) -> xr.Dataset:
    """Say of every one of many fits whether to believe it, and why.

    The rules are those of ``report`` about the fit: finite draws, importance weights, ending, plateau. What
    ``report`` asks of the model is asked of one fit, of ``scivi.draw(fits[label], ...)``.

    Args:
        tree: draws from many fits, as ``Fits.draw`` makes them.
        over: the dim of the data sets; as the tree says if None.

    Returns:
        Dim ``over``: k_hat, ess and gap (nats) of each approximation as a whole (see ``reliability``),
        objective (nats per row), steps, restarts, stopped, verdict ("trust", "trust with care", "do not
        trust"), why (its sentences), and ok: whether the verdict is "trust".

    Raises:
        DataError: the tree does not say along which dim the fits lie, has no such dim, several chains, no
            weights, or fewer than 25 draws.

    Notes:
        Some milliseconds a fit.
    """
    over = over or groups.provenance(tree).get("over")
    if over is None:
        raise DataError("the tree does not name the dim of its data sets; say which: each(tree, over=...).")
    stats = groups.group(tree, "sample_stats", "lp", "log_q")
    if over not in stats["lp"].dims or stats.sizes["chain"] != 1:
        raise DataError(
            f'"lp" has dims {stats["lp"].dims} and {stats.sizes["chain"]} chains; wanted are "chain" (one), '
            f'"draw" and "{over}", as Fits.draw makes them.'
        )
    first = _one(tree, over, 0)
    joint, level = _joint(tree, over, first), _level(tree, over)
    rows = weights.row_reliability(tree) if "row_log_weight" in stats else None
    sound, broken = fit_rules.finite(first), _broken(tree, over)
    ends = tree.children["history"].dataset if "history" in tree.children else xr.Dataset()
    told = {name: ends[name].values for name in ENDS if name in ends}
    judged: list[tuple[str, str]] = []
    for k in range(stats.sizes[over]):
        own = joint.isel({over: k})
        says = weights.decisive(bool(joint.attrs["few"]), own["k_hat"].values)
        found = {"reliability": own.assign_attrs(decisive=int(says))}
        if rows is not None:
            found["row_reliability"] = rows.isel({over: k})
        fit = {
            "stopped": str(told["stopped"][k]) if "stopped" in told else None,
            "restarts": [{}] * int(told["restarts"][k]) if "restarts" in told else [],
        }
        checks = fit_rules.finite(_one(tree, over, k)) if broken[k] else sound
        checks = checks + fit_rules.importance(first, found, None)
        checks += fit_rules.optimisation(fit, None if level is None else level.isel(chain=[k]))
        word, why, _ = verdict.conclude(checks)
        judged.append((word, " ".join(why)))
    columns: dict[str, Any] = {name: (over, joint[name].values[:, 0]) for name in ("k_hat", "ess", "gap")}
    if level is not None:
        columns["objective"] = (over, level["objective"].values)
    columns |= {name: (over, values) for name, values in told.items()}
    words, reasons = (np.array(part) for part in zip(*judged, strict=True))
    columns |= {"verdict": (over, words), "why": (over, reasons), "ok": (over, words == "trust")}
    return xr.Dataset(
        columns, {over: stats[over]}, {"fits": len(words), "trusted": int((words == "trust").sum())}
    )


def _one(tree: xr.DataTree, over: str, place: int) -> xr.DataTree:
    """Draws and weights of one fit."""
    parts = {name: groups.group(tree, name).isel({over: place}) for name in ("posterior", "sample_stats")}
    found = xr.DataTree.from_dict(
        {name: part.drop_vars(over, errors="ignore") for name, part in parts.items()}
    )
    rows = groups.provenance(tree).get("data", {}).get("rows")
    found.attrs["provenance"] = {"data": {"rows": rows}}
    return found


def _broken(tree: xr.DataTree, over: str) -> np.ndarray:
    """Which fits have draws that are not finite."""
    found = np.zeros(tree.children["sample_stats"].sizes[over], bool)
    for array in groups.numeric(groups.group(tree, "posterior")).values():
        bad = ~np.isfinite(array.transpose(over, ...).values)
        found |= bad.reshape(len(bad), -1).any(1)
    return found


def _joint(tree: xr.DataTree, over: str, first: xr.DataTree) -> xr.Dataset:
    """What ``weights.reliability`` tells, of all fits: a table with ``over`` as one dim more."""
    posterior = groups.group(tree, "posterior")
    log_weight = weights.log_weights(tree).isel(chain=0).transpose(over, "draw").values
    rows = groups.local_rows(first)
    shared = groups.population_names(first)
    names = shared + (groups.local_names(first) if rows <= weights.FEW_ROWS else [])
    weight, numbers = weights.smoothed(log_weight)
    entries, parts = [], []
    for name in names:
        of_first = first.children["posterior"].dataset[name]
        entries += groups.labels(of_first.isel(chain=0, draw=0, drop=True))
        array = posterior[name].isel(chain=0).transpose(over, "draw", *groups.site_dims(of_first)).values
        own = [
            weights.corrected(a.reshape(1, len(a), -1).astype(float), w[None])
            for a, w in zip(array, weight, strict=True)
        ]
        parts.append({key: np.stack([one[key] for one in own]) for key in own[0]})
    columns: dict[str, Any] = {}
    for key in parts[0] if parts else ():
        columns[key] = ((over, "variable"), np.concatenate([part[key] for part in parts], 1))
    columns |= {key: ((over, "chain"), value[:, None]) for key, value in numbers.items()}
    few = weights.few(rows, shared)
    attrs = {"local_rows": rows, "few": int(few), "threshold": weights.USABLE_K}
    return xr.Dataset(columns, {"variable": np.array(entries, dtype=str)}, attrs)


def _level(tree: xr.DataTree, over: str) -> xr.Dataset | None:
    """The plateau of each fit, as if they were chains; None where nothing was learnt."""
    if not groups.has(tree, "history", *PLATEAU):
        return None
    history = groups.group(tree, "history")[list(PLATEAU)].drop_vars(over, errors="ignore")
    return convergence.plateau(xr.DataTree.from_dict({"history": history.rename({over: "chain"})}))
