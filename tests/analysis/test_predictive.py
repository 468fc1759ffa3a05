from __future__ import annotations

import re

import numpy as np
import pytest
import xarray as xr
from scipy.special import logsumexp
from scipy.stats import norm, poisson

from scivi.analysis import loo, model_rules, pit, pit_values, predictive_check


def counts_tree(rate: float = 3.0, predicted: float = 3.0, n: int = 800, draws: int = 200) -> xr.DataTree:
    """Counts of a known rate, replicates of another; nothing was fitted: PIT is uniform if they agree."""
    rng = np.random.default_rng(0)
    observed = rng.poisson(rate, n).astype(float)
    observed[:5] = np.nan
    replicated = rng.poisson(predicted, (1, draws, n)).astype(float)
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"rate": (("chain", "draw"), np.full((1, draws), predicted))}),
            "observed_data": xr.Dataset({"count": ("row", observed)}),
            "posterior_predictive": xr.Dataset({"count": (("chain", "draw", "row"), replicated)}),
        }
    )


def test_pit_of_counts_is_uniform_for_the_right_model_only():
    right, wrong = pit(counts_tree()), pit(counts_tree(predicted=4.0))
    assert bool(right["ok"].all())
    assert int(right["n"][0]) == 795
    assert not wrong["ok"].any()
    assert float(wrong["share_of_band"][0]) > 1


def test_pit_values_keep_dims_and_missing():
    found = pit_values(counts_tree())["count"]
    assert found.dims == ("row",)
    assert np.isnan(found.values[:5]).all()
    assert 0 < np.nanmin(found) < np.nanmax(found) < 1


def test_pit_with_row_latents_is_one_sided(catalogue):
    tree = catalogue(rows=500, draws=200)
    found = pit(tree)
    assert found.attrs["one_sided"] == 1
    assert float(found["tail_share"][0]) < 0.1  # the rows' own latents have seen the data
    assert bool(found["ok"].all())
    x = tree["observed_data"]["x"]
    tree["observed_data"] = xr.Dataset({"x": x + 6 * np.sign(x - x.mean())})
    assert not pit(tree)["ok"].any()


def test_predictive_p_values_against_closed_form():
    tree = counts_tree(draws=4000, n=205)
    found = predictive_check(tree)
    seen = tree["observed_data"]["count"].values[5:]
    zero = (seen == 0).sum()
    exact = poisson.sf(seen.sum(), 3.0 * 200) + poisson.pmf(seen.sum(), 3.0 * 200) / 2  # the sum is Poisson
    from scipy.stats import binom

    exact_zero = binom.sf(zero, 200, np.exp(-3.0)) + binom.pmf(zero, 200, np.exp(-3.0)) / 2
    p = found["p_value"].to_series()
    np.testing.assert_allclose(
        p["count: mean"], exact, atol=4 * 0.5 / 4000**0.5
    )  # binomial error of 4000 draws
    np.testing.assert_allclose(p["count: zero fraction"], exact_zero, atol=4 * 0.5 / 4000**0.5)
    assert bool(found["ok"].all())
    assert not predictive_check(counts_tree(predicted=4.0)).sel(variable="count: mean")["ok"]


def test_a_statistic_without_variation_is_left_out(catalogue):
    names = predictive_check(catalogue(rows=20, draws=50))["variable"].values
    assert "x: zero fraction" not in names
    assert "x: max" in names


def test_statistics_of_ones_own(catalogue):
    found = predictive_check(catalogue(rows=20, draws=50), {"median": lambda x: np.median(x, -1)})
    assert list(found["variable"].values) == ["x: median"]


def without_row_latents(catalogue) -> xr.DataTree:
    """The same tree as if z were shared: only the joint weights are there, of a guide a little too narrow."""
    tree = catalogue(rows=12, draws=1000, scale=0.9, extra=False)
    tree["sample_stats"] = tree["sample_stats"].to_dataset().drop_vars("row_log_weight")
    return tree


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")  # ArviZ warns; ours has bad_share
def test_loo_of_shared_latents_is_that_of_arviz(catalogue):
    import arviz_stats

    tree = without_row_latents(catalogue)
    stats = tree["sample_stats"]
    theirs = arviz_stats.loo_approximate_posterior(
        tree, log_p=stats["lp"], log_q=stats["log_q"], pointwise=True
    )
    found = loo(tree)
    np.testing.assert_allclose(
        found["elpd_x"], theirs.elpd_i, atol=1e-8
    )  # same smoothing, other order of sums
    np.testing.assert_allclose(found["k_hat_x"], theirs.pareto_k, atol=1e-8)
    se = theirs.elpd_i.std(ddof=1) * theirs.elpd_i.size**0.5  # as ArviZ has it since 1.0
    np.testing.assert_allclose(float(found["se"][0]), se, rtol=1e-8)
    np.testing.assert_allclose(float(found["p_loo"][0]), theirs.p, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")  # ArviZ warns; ours has bad_share
def test_loo_without_log_q_is_plain_loo(catalogue):
    import arviz_stats

    tree = without_row_latents(catalogue)
    tree["sample_stats"] = tree["sample_stats"].to_dataset().drop_vars("log_q")
    theirs = arviz_stats.loo(tree, reff=1.0, pointwise=True)
    np.testing.assert_allclose(loo(tree)["elpd_x"], theirs.elpd_i, atol=1e-8)


def test_loo_with_row_latents_integrates_them(catalogue):
    tree = catalogue(rows=300, draws=2000, scale=0.9)
    found = loo(tree)
    mu, s = tree["posterior"]["mu"].values.ravel(), tree["constant_data"]["s"].values
    x = tree["observed_data"]["x"].values
    exact = logsumexp(norm.logpdf(x, mu[:, None], np.sqrt(1.5**2 + s**2)), axis=0) - np.log(mu.size)
    # weights of a guide at 0.9 have a relative variance of about 0.02: error per row sqrt(0.02 / 2000)
    np.testing.assert_allclose(found["elpd_row"], exact, atol=5 * 0.004)
    assert np.isnan(found["p_loo"].item())
    assert bool(found["ok"].all())


@pytest.mark.parametrize("missing", ["posterior_predictive", "observed_data"])
def test_missing_groups_are_named(missing):
    tree = counts_tree()
    with pytest.raises(ValueError, match=missing):
        pit(tree.drop_nodes(missing))


def test_a_small_but_certain_difference_does_not_matter():
    found = predictive_check(counts_tree(predicted=3.02, n=160_000, draws=40)).sel(variable="count: mean")
    assert float(found["p_value"]) > 0.99
    np.testing.assert_allclose(
        float(found["effect"]), 0.03 / 3**0.5, atol=0.012
    )  # two means of 40,000, sd of 60
    assert bool(found["ok"])


def test_of_too_few_values_nothing_is_told_but_their_number():
    """With 4 values or none the rule is a note; beside a field with enough it says which has too few."""
    few, none = counts_tree(), counts_tree()
    few["observed_data"]["count"].values[9:] = np.nan  # the first five are so already
    none["observed_data"]["count"].values[:] = np.nan
    for tree, told in ((few, r"count \(4\)"), (none, r"count \(0\)")):
        [check] = model_rules.RULES["pit"](pit(tree))
        assert (check.name, check.counts) == ("PIT", "note")
        assert re.search(f"Too few observed values .*: {told}", check.sentence)
    [check] = model_rules.RULES["pit"](xr.concat([pit(counts_tree()), pit(few)], "variable"))
    assert (check.ok, check.counts) == (True, "care")
    assert "Too few observed values to say where they lie" in check.sentence
