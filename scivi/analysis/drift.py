"""New data beside those that a fit remembers: can an amortised posterior be asked about them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from scivi.analysis import conformal, groups, two_samples
from scivi.errors import DataError

DISTANCE = 0.1  # KS distance above which a difference matters to most uses (our choice)
MOST_ROWS = 2000  # of the new rows that the test looks at, chosen at random (our choice)
FEW_ROWS = 20  # below, only large shifts are seen (our choice)
FEW_REFERENCE = 400  # below, a strange row among many cannot be told (our choice)
_LEARNT = (": direction ", ": off its directions", ": entries ")  # of other fits, these are other quantities
_ROWS_AT_ONCE = 2**14
_Record = dict[str, float | bool]
_NOTHING: _Record = {
    "n": 0, "n_reference": 0, "missing": np.nan, "missing_reference": np.nan,
    "present": True, "outside": np.nan, "shift_sd": np.nan,
}  # fmt: skip
_FAULT: _Record = {**_NOTHING, "ks": np.nan, "p_value": np.nan, "ok": False, "matters": True}


def drift(
    tree: xr.DataTree, reference: xr.DataTree | None = None, *, alpha: float = 0.05, seed: int = 0
) -> xr.Dataset:
    """Compare new rows with those of the fit: which rows and which fields differ, and how far.

    The fit's own data are not needed: the tree carries features of up to 2000 of its rows.

    Args:
        tree: draws of a fit for the new data.
        reference: draws for other data, beside which these are put; None for the rows that the fit remembers.
            Of another fit, what it has learnt for itself (principal directions) is left out.
        alpha: the chance of a false alarm: if all rows come from one distribution, ``drifted`` is true of a
            share alpha of such comparisons, or a little less. Also the expected share of false ones among the
            rows that are flagged.
        seed: of the permutations, and of the choice of rows beyond 2000.

    Returns:
        Dim variable, the features of the fields ("n_on[soft]", "counts: mean", "counts: direction 2"),
        three of all together ("dependence", "neighbours" and "isolation"; see ``two_samples.compare``) and
        the entries of fields without rows:

        - n, n_reference: values that are there; missing, missing_reference: share of those that are not.
        - ks: Kolmogorov-Smirnov distance. p_value: of the permutation test, adjusted for all features; not
          below .001.
        - shift_sd: difference of medians, in half the central 68 % of the reference.
        - outside: share beyond the smallest and largest of the reference.
        - present: whether the new data have such an entry, be it missing.
        - ok: p_value > alpha and present; of a constant, unchanged.
        - matters: not ok, and ks > 0.1 or without one. Of many rows a difference may be certain and small.

        Dim of the rows:

        - row_p_value: conformal, so that it is at most p for a share p of rows of the fit's kind.
        - row_ok: not flagged at false discovery rate alpha.
        - row_distance: to its tenth neighbour among the fit's rows.
        - row_feature, row_shift_sd: in which feature it is strangest, and how far from the median there.

        Attributes: p_value (of all features together), drifted (p_value <= alpha, or a field is absent, or a
        constant changed), alpha, n, n_reference (rows that the test compared), dependence_of (the features
        that go together otherwise than in the fit, most of all), and note (what few rows mean).

    Raises:
        DataError: the tree, or the reference, has no features or no rows.

    Notes:
        The p-value holds for rows that come one by one from the fit's distribution and that the fit has not
        seen; of the fit's own rows it is too large. Takes a second or two for 2000 rows; time for the rows
        grows with their number, memory with a few numbers of each. Fields along a second row dim (empty
        droplets) are not looked at.
    """
    rng = np.random.default_rng(seed)
    new = _remembered(tree, "the tree")
    old = new if reference is None else _remembered(reference, "the reference")
    rows, known = _alike(new, old, reference is None)
    absent = np.isinf(rows[0].values)
    absentees = _names(rows[:, absent])
    rows, known = rows[:, ~absent], known[:, ~absent]
    names = _names(rows)
    some, kept = _some(rows, rng), _some(known, rng)
    compared = two_samples.compare(some, kept, seed)
    records = [_versus(own, theirs) for own, theirs in zip(some.T, kept.T, strict=True)]
    records += [_NOTHING | {"n": len(some), "n_reference": len(kept)} for _ in two_samples.JOINT]
    for k, record in enumerate(records):
        p_value = float(compared.p_value[k])
        record |= {"ks": float(compared.ks[k]), "p_value": p_value, "ok": p_value > alpha}
        record["matters"] = not record["ok"] and not record["ks"] <= DISTANCE
    others = {v: _FAULT | {"present": False} for v in absentees if not any(w in v for w in _LEARNT)}
    others |= _constants(new, old, reference is None)
    faulty = not all(record["ok"] for record in others.values())
    every, variables = [*records, *others.values()], [*names, *two_samples.JOINT, *others]
    attrs = {
        "p_value": compared.overall,
        "drifted": compared.overall <= alpha or faulty,
        "alpha": alpha,
        "n": len(some),
        "n_reference": len(kept),
        "dependence_of": " and ".join(dict.fromkeys(names[k] for k in compared.pair)),
        "note": _note(len(some), len(kept)),
    }
    columns = {key: [record[key] for record in every] for key in records[0]}
    table = groups.table("variable", variables, columns, **attrs)
    return table.assign(_by_row(rows, kept, names, alpha))


def _remembered(tree: xr.DataTree, what: str) -> xr.Dataset:
    """The group of features."""
    if not groups.has(tree, "features", "feature_values", "fit_values"):
        raise DataError(
            f"{what} has no features of the fit's rows and its own to compare. Make it with scivi.draw, of a "
            f"fit that remembers them: those saved by older versions, and scivi.nuts, do not."
        )
    found = groups.group(tree, "features")
    if not found["feature_values"].shape[0]:
        raise DataError(f"{what} has no rows.")
    return found


def _some(values: xr.DataArray, rng: np.random.Generator) -> np.ndarray:
    """Its rows, or so many at random, (row, feature) float64."""
    n = len(values)
    chosen = slice(None) if n <= MOST_ROWS else np.sort(rng.choice(n, MOST_ROWS, replace=False))
    return values[chosen].values.astype(np.float64)


def _alike(new: xr.Dataset, old: xr.Dataset, own: bool) -> tuple[xr.DataArray, xr.DataArray]:
    """The same features of new rows and of those that they are put beside."""
    rows, known = new["feature_values"], old["fit_values" if own else "feature_values"]
    if own:
        return rows, known
    same = np.array_equal(new["fit_values"].values, old["fit_values"].values, equal_nan=True)
    here, there = _names(rows), _names(known)
    shared = [v for v in here if v in there and (same or not any(word in v for word in _LEARNT))]
    if not shared:
        raise DataError(f"tree and reference have no feature in common: {here[:5]} and {there[:5]}.")
    return rows[:, [here.index(v) for v in shared]], known[:, [there.index(v) for v in shared]]


def _names(values: xr.DataArray) -> list[str]:
    """Of the features, which are its second dim."""
    return [str(v) for v in values[values.dims[1]].values]


def _versus(new: np.ndarray, old: np.ndarray) -> _Record:
    """How far one feature's new values are from the others."""
    a, b = new[np.isfinite(new)], old[np.isfinite(old)]
    record = {
        "n": a.size,
        "n_reference": b.size,
        "missing": 1 - a.size / max(new.size, 1),
        "missing_reference": 1 - b.size / max(old.size, 1),
        "present": True,
    }
    if not a.size or not b.size:
        return _NOTHING | record
    low, middle, high = np.quantile(b, [0.158655, 0.5, 0.841345])
    spread = (high - low) / 2
    return record | {
        "outside": float(((a < b.min()) | (a > b.max())).mean()),
        "shift_sd": float((np.median(a) - middle) / spread) if spread > 0 else np.nan,
    }


def _constants(new: xr.Dataset, old: xr.Dataset, own: bool) -> dict[str, _Record]:
    """Records of the entries of fields without rows, by name."""
    if "constant_values" not in new:
        return {}
    here = new["constant_values"].to_series()
    there = old["fit_constants" if own else "constant_values"].to_series()
    found = {}
    for name, value in there.items():
        present = name in here.index
        ok = present and (here[name] == value or (np.isnan(here[name]) and np.isnan(value)))
        same = {"n": int(present), "n_reference": 1, "ok": True, "matters": False}
        found[str(name)] = _FAULT | {"present": present} | (same if ok else {})
    return found


def _by_row(rows: xr.DataArray, kept: np.ndarray, names: list[str], alpha: float) -> xr.Dataset:
    """What is told of every new row; some are read at a time."""
    row = str(rows.dims[0])
    parts = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        values = rows[start : start + _ROWS_AT_ONCE].values.astype(np.float64)
        parts.append((*conformal.row_p_values(values, kept), *conformal.strangest(values, kept)))
    p_value, distance, where, shift = (np.concatenate(part) for part in zip(*parts, strict=True))
    columns = {
        "row_p_value": (row, p_value),
        "row_ok": (row, ~conformal.discoveries(p_value, alpha)),
        "row_distance": (row, distance),
        "row_feature": (row, np.array(names)[where]),
        "row_shift_sd": (row, shift),
    }
    return xr.Dataset(columns, {row: rows[row].values} if row in rows.coords else {})


def _note(n: int, n_reference: int) -> str:
    """What few rows mean, empty of many."""
    said = []
    if n < FEW_ROWS:
        said.append(f"{n} new rows show only large shifts; row_p_value judges them one by one")
    if n_reference < FEW_REFERENCE:
        said.append(f"beside {n_reference} rows no row_p_value is below {1 / (n_reference + 1):.2g}")
    return "; ".join(said)
