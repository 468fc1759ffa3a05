from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from scivi.analysis import compare, summary
from scivi.analysis.comparison import W1_FLOOR, entrywise_differences
from scivi.errors import DataError


def nuts_of(catalogue, **change):
    return catalogue(draws=1000, chains=4, method="nuts", seed=7, extra=False, **change)


def test_equal_posteriors_agree_and_show_the_floor(catalogue):
    found = compare(catalogue(rows=30, draws=4000), nuts_of(catalogue, rows=30))
    assert bool(found["ok"].all())
    assert bool(found["comparable"].all())
    assert found.attrs["reference_ok"] == 1
    assert np.all(found["shift_p95"] < 4 * found["shift_mcse"])
    z = found.sel(variable="z")
    np.testing.assert_allclose(z["w1_median"], z["w1_floor"], rtol=0.4)  # E W1; its sd is about a third of it
    np.testing.assert_allclose(z["w1_floor"], W1_FLOOR * np.sqrt(2 / 4000), rtol=0.1)  # ESS near the draws


def test_floor_constant_is_the_integral():
    from scipy.integrate import quad
    from scipy.stats import norm

    area = quad(lambda t: np.sqrt(norm.cdf(t) * norm.sf(t)), -12, 12)[0]
    np.testing.assert_allclose(W1_FLOOR, np.sqrt(2 / np.pi) * area, rtol=1e-4)  # four digits are stated


def test_shift_ratio_and_distance_against_closed_form(catalogue):
    nuts = nuts_of(catalogue, rows=30)
    moved = entrywise_differences(catalogue(rows=30, draws=4000, global_shift=1.0), nuts)["mu"]
    error = 4 * float(moved["shift_mcse"])
    np.testing.assert_allclose(float(moved["shift"]), 1.0, atol=error)
    np.testing.assert_allclose(float(moved["w1"]), 1.0, atol=error)  # W1 of equal shapes is the shift
    narrow = entrywise_differences(catalogue(rows=30, draws=4000, scale=0.8), nuts)["mu"]
    np.testing.assert_allclose(float(narrow["sd_ratio"]), 0.8, atol=4 * float(narrow["sd_ratio_mcse"]))
    np.testing.assert_allclose(
        float(narrow["w1"]), 0.2 * np.sqrt(2 / np.pi), atol=2 * float(narrow["w1_floor"])
    )
    np.testing.assert_allclose(
        float(narrow["sd_ratio_mcse"]), 0.8 / np.sqrt(4000), rtol=0.15
    )  # 1/sqrt(2n), twice


def test_wrong_posteriors_are_refused_and_the_worst_named(catalogue):
    found = compare(catalogue(rows=30, draws=1000, scale=0.5), nuts_of(catalogue, rows=30))
    assert not found["ok"].any()
    assert found["worst_at"].sel(variable="z").item().startswith("z[J")


def test_subset_of_rows_in_another_order_and_other_draws(catalogue):
    svi = catalogue(rows=30, draws=700)
    nuts = nuts_of(catalogue, rows=30)
    for name in ("posterior", "observed_data", "log_likelihood", "constant_data"):
        nuts[name] = nuts[name].to_dataset().isel(source=[20, 3, 11])
    found = compare(svi, nuts)
    assert int(found["n"].sel(variable="z")) == 3
    assert list(found["comparable"].values) == [False, True]
    assert bool(found["ok"].sel(variable="z"))


def test_a_reference_that_did_not_converge_says_so(catalogue):
    nuts = nuts_of(catalogue, rows=5)
    stats = nuts["sample_stats"].to_dataset()
    stats["diverging"][0, :3] = True
    nuts["sample_stats"] = stats
    found = compare(catalogue(rows=5), nuts)
    assert found.attrs["reference_ok"] == 0
    assert found.attrs["reference_divergences"] == 3


def test_nothing_in_common_is_refused(catalogue):
    svi, nuts = catalogue(rows=5, draws=50), nuts_of(catalogue, rows=5)
    nuts["posterior"] = nuts["posterior"].to_dataset().assign_coords(source=list("abcde"))
    with pytest.raises(DataError, match="no coordinate of"):
        compare(svi, nuts)
    nuts["posterior"] = nuts["posterior"].to_dataset()[["mu"]].rename(mu="nu")
    with pytest.raises(DataError, match="no variable in common"):
        compare(svi, nuts)
    both = xr.DataTree.from_dict({"posterior": svi["posterior"].to_dataset()[["mu"]] * 0.0})
    with pytest.raises(DataError, match="constant in both"):
        compare(both, both)


def test_summary_is_the_exact_posterior(catalogue, exact):
    tree = catalogue(rows=30, draws=20_000)
    found = summary(tree).sel(variable="mu")
    mean, sd = exact(tree)
    np.testing.assert_allclose(float(found["mean"]), mean, atol=4 * sd / 20_000**0.5)
    np.testing.assert_allclose(
        float(found["lower"]), mean - 1.881 * sd, atol=0.1 * sd
    )  # quantile at 3 %: sd 0.018
    assert found["unit"].item() == "ln ct"
    assert list(summary(tree)["variable"].values) == ["mu"]


def test_summary_of_rows_and_hdi(catalogue):
    found = summary(catalogue(rows=3, draws=500), ["z"], interval="hdi")
    assert list(found["variable"].values) == ["z[J0000]", "z[J0001]", "z[J0002]"]
    assert bool((found["lower"] < found["mean"]).all() & (found["mean"] < found["upper"]).all())
    with pytest.raises(DataError, match="lacks"):
        summary(catalogue(rows=3, draws=50), ["nu"])
