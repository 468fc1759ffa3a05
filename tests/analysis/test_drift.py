from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import ks_2samp

from scivi.analysis import drift
from scivi.errors import DataError


def data_tree(n: int = 500, shift: float = 0.0, seed: int = 0, missing: int = 0) -> xr.DataTree:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(5, (n, 2)).astype(float)
    counts[:missing, 0] = np.nan
    observed = xr.Dataset({"n_on": (("source", "band"), counts)}, coords={"band": ["soft", "hard"]})
    given = xr.Dataset({"exposure": ("source", rng.normal(100 + shift, 10, n)), "area": ((), 0.25)})
    return xr.DataTree.from_dict({"observed_data": observed, "constant_data": given})


def test_same_source_of_data_passes():
    found = drift(data_tree(seed=1), data_tree())
    assert list(found["variable"].values) == ["n_on[soft]", "n_on[hard]", "exposure", "area"]
    assert bool(found["ok"].all())


def test_shifted_field_is_named_with_its_numbers():
    new, old = data_tree(seed=1, shift=20), data_tree()
    found = drift(new, old)
    assert list(found["ok"].values) == [True, True, False, True]
    one = found.sel(variable="exposure")
    theirs = ks_2samp(new["constant_data"]["exposure"].values, old["constant_data"]["exposure"].values)
    np.testing.assert_allclose(float(one["ks"]), theirs.statistic, rtol=1e-12)
    np.testing.assert_allclose(float(one["shift_sd"]), 2.0, atol=0.4)  # medians of 500 (0.056 sd), spread 5 %
    assert float(one["outside"]) > 0.05


def test_missing_values_absent_fields_and_changed_constants_are_faults():
    new = data_tree(seed=1, missing=200)
    new["constant_data"] = new["constant_data"].to_dataset().drop_vars("exposure").assign(area=0.5)
    found = drift(new, data_tree())
    assert list(found["ok"].values) == [False, True, False, False]
    assert not bool(found["present"].sel(variable="exposure"))
    np.testing.assert_allclose(float(found["missing"][0]), 0.4, rtol=1e-12)


def test_a_small_but_certain_difference_does_not_matter():
    found = drift(data_tree(n=50_000, shift=0.5, seed=1), data_tree(n=50_000)).sel(variable="exposure")
    assert float(found["p_value"]) < 0.01
    assert bool(found["ok"])


def test_no_data_is_refused():
    with pytest.raises(DataError, match='the reference has neither "observed_data"'):
        drift(data_tree(), xr.DataTree())
