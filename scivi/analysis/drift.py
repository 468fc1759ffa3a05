"""New data beside the data of the fit: can an amortised posterior be asked about them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from scivi.analysis import groups
from scivi.errors import DataError

FEW_UNITS = 20  # entries beside the rows (bands, times) that are listed one by one; our choice


def drift(
    tree: xr.DataTree,
    reference: xr.DataTree,
    *,
    distance: float = 0.1,
    alpha: float = 0.01,
    outside: float = 0.05,
    missing: float = 0.05,
) -> xr.Dataset:
    """Compare every field of new data with the same field of the data of the fit.

    Args:
        tree: draws for the new data, with groups observed_data and constant_data (or one of them).
        reference: draws for the data of the fit.
        distance: largest Kolmogorov-Smirnov distance to accept even if significant; our choice.
        alpha: level of the two-sample Kolmogorov-Smirnov test (conservative for counts).
        outside: largest share of values beyond the range seen in the fit; our choice.
        missing: largest difference of the missing share; our choice.

    Returns:
        Dim variable, one entry per field (per unit, as in "n_on[soft]", if the field has at most 20 beside
        its rows): n, n_reference, ks, p_value, outside, shift_sd (difference of medians, in half the central
        68 % of the reference), missing, missing_reference, present, ok. A field absent from the new data has
        present False.

    Raises:
        DataError: neither tree has data.

    References:
        Two-sample test: scipy.stats.ks_2samp, asymptotic beyond 20 values.
    """
    new, old = _fields(tree), _fields(reference)
    if not new or not old:
        where = "the reference" if new else "the tree"
        raise DataError(f'{where} has neither "observed_data" nor "constant_data". Make it with scivi.draw.')
    names, records = [], []
    for name, values in old.items():
        record = _versus(new.get(name, np.empty(0)), values)
        near = record["p_value"] >= alpha or record["ks"] <= distance
        record["ok"] = bool(
            name in new
            and near
            and record["outside"] <= outside
            and abs(record["missing"] - record["missing_reference"]) <= missing
        )
        names.append(name)
        records.append(record | {"present": name in new})
    columns = {key: [r[key] for r in records] for key in records[0]}
    return groups.table("variable", names, columns, distance=distance, alpha=alpha, outside=outside)


def _fields(tree: xr.DataTree) -> dict[str, np.ndarray]:
    """Flat values of every numeric field, split by unit where there are few."""
    row, found = groups.row_dim(tree), {}
    for name in ("observed_data", "constant_data"):
        if name not in tree.children:
            continue
        for field, array in groups.numeric(groups.group(tree, name)).items():
            units = array.size // array.sizes[row] if row in array.dims and array.sizes[row] else 0
            if 1 < units <= FEW_UNITS:
                split = array.transpose(..., row)
                values = split.values.reshape(units, -1)
                names = groups.labels(split.isel({row: 0}, drop=True).rename(field))
                found |= dict(zip(names, values.astype(float), strict=True))
            else:
                found[field] = array.values.ravel().astype(float)
    return found


def _versus(new: np.ndarray, old: np.ndarray) -> dict[str, float]:
    """Two-sample numbers of one field."""
    from scipy.stats import ks_2samp

    a, b = new[np.isfinite(new)], old[np.isfinite(old)]
    record = {
        "n": a.size,
        "n_reference": b.size,
        "ks": np.nan,
        "p_value": np.nan,
        "outside": np.nan,
        "shift_sd": np.nan,
        "missing": 1 - a.size / max(new.size, 1),
        "missing_reference": 1 - b.size / max(old.size, 1),
    }
    if not a.size or not b.size:
        return record
    low, middle, high = np.quantile(b, [0.158655, 0.5, 0.841345])
    test = ks_2samp(a, b, method="asymp" if min(a.size, b.size) > 20 else "exact")
    spread = (high - low) / 2
    return record | {
        "ks": float(test.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        "p_value": float(test.pvalue),  # pyright: ignore[reportAttributeAccessIssue]
        "outside": float(((a < b.min()) | (a > b.max())).mean()),
        "shift_sd": float((np.median(a) - middle) / spread) if spread > 0 else np.nan,
    }
