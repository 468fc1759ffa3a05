"""One call, one verdict: the report as a Dataset and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import xarray as xr

from scivi.analysis import groups, page, verdict
from scivi.analysis.check import note

MOST_ROWS = 100_000  # our choice: a share of 1 % of the rows is known to .03 points


def report(
    tree: xr.DataTree,
    *,
    reference: xr.DataTree | None = None,
    truth: xr.Dataset | None = None,
    to: str | Path | None = None,
    rows: int = MOST_ROWS,
) -> xr.Dataset:
    """Say whether to believe a posterior, and why.

    Every diagnostic for which the tree holds the groups is computed and turned into checks. A failed check
    that "decides" gives "do not trust"; else a failed one of "care" gives "trust with care"; else "trust".
    What decides:

    - Up to 50 rows with latents of their own, if they share variables, or without such rows: the joint Pareto
      k-hat of the approximation (> 0.7; > 0.5, or a gap of > 0.1 nats, or means that the weights move by
      > 0.2 sd, ask for care).
    - Beyond, the joint log weight is a sum over so many rows that its k-hat is large by dimension alone, even
      for an excellent guide (a small one is good news at any size). Then the rows' own k-hats decide: more
      than 10 % above 0.7 (more than 1 % asks for care).
    - There, for the population: the k-hat of its weighted draws, or of its normal approximation against the
      marginal, from the finish of the fit (> 0.7; > 0.5 asks for care). Without it, or NUTS on the same rows,
      nothing vouches for the population: care.
    - A NUTS reference: differences beyond 0.5 sd, or an sd wrong by half (0.2 sd or a quarter: care).
    - Planted truth: intervals whose coverage is off by more than 10 points.
    - Draws that are not finite; a fit that diverged, or whose objective fell by more than 0.1 nats per row
      at its end.

    Doubts about the model rather than the fit (predictive checks, PIT) ask for care.

    Args:
        tree: a posterior, from ``draw``, ``predict`` or ``nuts``, or read from disk.
        reference: a NUTS posterior of the same model and data, or of some of its rows.
        truth: the values that made simulated data, by variable.
        to: file to write the page to; folders are made. None: no page.
        rows: how many rows are examined, chosen at random, if there are more. Whether draws are finite is
            asked of all, and beside a reference so is all else.

    Returns:
        Dim check: value, threshold, ok, counts ("decides", "care", "note"), sentence, advice. Attributes
        verdict, why and advice (JSON lists of sentences).

    Raises:
        DataError: the tree has no posterior, or reference or truth share nothing with it.

    Notes:
        Reads the tree in blocks, with a few numbers in memory for each row that is examined. A share of rows
        that is 1 % among 100,000 of them is known to .03 points (one standard error). About 20 s for 1e5 rows
        of a thousand draws.
    """
    some = tree if reference is not None else groups.some_rows(tree, rows)
    found = verdict.measure(some, reference, truth, whole=tree)
    results = verdict.checks(tree, found)
    if some is not tree:
        text = f"{rows:,} of {groups.rows(tree):,} rows, chosen at random, were examined."
        results.append(note("rows examined", text, rows))
    word, why, advice = verdict.conclude(results)
    columns = {
        "value": np.array([c.value for c in results], float),
        "threshold": np.array([c.threshold for c in results], float),
        "ok": [c.ok for c in results],
        **{key: [getattr(c, key) for c in results] for key in ("counts", "sentence", "advice")},
    }
    attrs = {"verdict": word, "why": json.dumps(why), "advice": json.dumps(advice)}
    result = groups.table("check", [c.name for c in results], columns, **attrs)
    if to is not None:
        path = Path(to)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.render(some, found, result, reference), encoding="utf-8")
    return result
