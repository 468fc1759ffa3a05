from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from scivi.analysis import coverage, ranks, sbc, uniform_band
from scivi.errors import DataError


def truth_of(tree: xr.DataTree) -> xr.Dataset:
    """One draw of another seed: exchangeable with the draws of an exact guide."""
    return tree["posterior"].to_dataset().isel(chain=0, draw=0, drop=True)


def test_ranks_are_counts_below_and_align_by_coordinate(catalogue):
    tree = catalogue(rows=6, draws=50)
    truth = truth_of(catalogue(rows=6, draws=50, seed=1)).isel(source=[4, 1])
    found = ranks(tree, truth)
    assert list(found["source"].values) == ["J0001", "J0004"]
    below = (tree["posterior"]["z"].sel(source="J0004") < truth["z"].sel(source="J0004")).sum()
    assert float(found["z"].sel(source="J0004")) == float(below)
    assert found.attrs["draws"] == 50


def test_ties_are_spread(catalogue):
    tree = catalogue(rows=400, draws=9)
    z = tree["posterior"]["z"]
    tree["posterior"] = tree["posterior"].to_dataset().assign(z=xr.zeros_like(z))
    found = ranks(tree, xr.Dataset({"z": ("source", np.zeros(400))}, coords={"source": z["source"]}))[
        "z"
    ].values
    counts = np.bincount(found.astype(int), minlength=10)
    assert counts.size == 10
    assert counts.min() > 15  # 40 expected, sd 6: four sd


def test_truth_that_does_not_fit_is_refused(catalogue):
    tree = catalogue(rows=6, draws=50)
    with pytest.raises(DataError, match="nothing in common"):
        ranks(tree, xr.Dataset({"nu": 1.0}))
    elsewhere = xr.Dataset({"z": ("source", np.zeros(2))}, coords={"source": ["K1", "K2"]})
    with pytest.raises(DataError, match='"z" cannot be aligned: no coordinate of'):
        ranks(tree, elsewhere)
    with pytest.raises(DataError, match=r'"z" cannot be aligned: .*size'):
        ranks(tree, xr.Dataset({"z": ("source", np.zeros(2))}))


@pytest.mark.parametrize(("change", "good"), [({}, True), ({"scale": 0.6}, False), ({"shift": 1.0}, False)])
def test_coverage_passes_the_exact_guide_and_no_other(catalogue, change, good):
    truth = truth_of(catalogue(rows=1000, draws=2, seed=1))
    found = coverage(catalogue(rows=1000, draws=200, **change), truth)
    assert bool(found["ok"].sel(variable="z").all()) is good
    np.testing.assert_allclose(
        found["expected"], [[0.5, 0.8, 0.9, 0.95]] * 2, atol=1 / 201
    )  # ranks of 200 draws
    np.testing.assert_allclose(
        found["mc_error"].sel(variable="z", prob=0.9), 0.0095, atol=1e-3
    )  # sqrt(.09 / 1000)


def test_band_agrees_with_arviz():
    from arviz_stats import ecdf_utils

    rng, n = np.random.default_rng(0), 100
    x = np.arange(1, n) / n
    level = ecdf_utils.simulate_confidence_bands(n, 1, x, 0.95, 2000, rng)
    lower, upper = ecdf_utils.get_pointwise_confidence_band(level, n, x)
    ours = uniform_band(n, prob=0.95)
    np.testing.assert_allclose(
        ours["lower"], lower, atol=1.01 / n
    )  # both round to counts; levels are simulated
    np.testing.assert_allclose(ours["upper"], upper, atol=1.01 / n)


@pytest.mark.parametrize("n", [30, 1000, 50_000])
def test_band_holds_a_uniform_sample_as_often_as_promised(n):
    band, rng = uniform_band(n, prob=0.9), np.random.default_rng(1)
    curves = rng.multinomial(n, np.full(100, 0.01), size=1000).cumsum(-1)[:, :-1] / n
    inside = ((curves >= band["lower"].values) & (curves <= band["upper"].values)).all(-1).mean()
    # 1000 curves: sd 0.01; level from 2000 curves: 0.007; counts are discrete, so small n is conservative
    assert 0.9 - 4 * 0.012 <= inside <= (0.96 if n < 100 else 0.9 + 4 * 0.012)


def test_sbc_passes_uniform_ranks_and_names_the_fault():
    rng, draws, n = np.random.default_rng(0), 99, 500
    faults = {
        "right": rng.integers(0, 100, n),
        "narrow": np.clip(50 + 50 * rng.normal(0, 0.9, n), 0, 99).astype(int),
        "high": (100 * rng.beta(1, 1.4, n)).astype(int),
    }
    data = xr.Dataset({k: ("simulation", v) for k, v in faults.items()}, attrs={"draws": draws})
    found = sbc(data)
    assert list(found["ok"].values) == [True, False, False]
    assert float(found["spread"].sel(variable="narrow")) > 1.1
    assert float(found["mean"].sel(variable="high")) < 0.45
    assert float(found["share_of_band"].sel(variable="right")) <= 1


def test_sbc_of_a_list_of_simulations(catalogue):
    parts = []
    for seed in range(40):
        tree = catalogue(rows=3, draws=60, seed=seed)
        parts.append(ranks(tree, truth_of(catalogue(rows=3, draws=2, seed=1000 + seed))))
    found = sbc(parts)
    assert list(found["variable"].values) == ["mu", "z[J0000]", "z[J0001]", "z[J0002]"]
    assert bool(found["ok"].all())  # four entries at 0.99 each; the seed is fixed


def test_sbc_without_draws_is_refused():
    with pytest.raises(DataError, match="sbc needs the number of draws"):
        sbc(xr.Dataset({"a": ("simulation", [1, 2])}))
    with pytest.raises(DataError, match="sbc needs the number of draws"):
        sbc(xr.Dataset(), draws=10)
