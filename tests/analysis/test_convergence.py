from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from scivi.analysis import collapse, contraction, plateau, restarts
from scivi.analysis.model_rules import RULES


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "level"),
        ({"drop": 0.2}, "still falling"),
        ({"drop": -0.2}, "rising"),
        ({"noise": 1.0}, "too noisy to tell"),
        ({"entries": 8}, "too short to tell"),
    ],
)
def test_plateau_names_what_happened(catalogue, history, change, verdict):
    tree = catalogue(rows=5, draws=30)
    tree["history"] = history(**change)
    found = plateau(tree)
    assert found["verdict"].item() == verdict
    assert bool(found["ok"]) == (verdict == "level")


def test_plateau_improvement_is_the_planted_one_within_its_error(catalogue, history):
    tree = catalogue(rows=5, draws=30)
    tree["history"] = history(drop=0.2)
    found = plateau(tree)
    np.testing.assert_allclose(
        float(found["improvement"][0]), 0.2, atol=4 * float(found["improvement_se"][0])
    )


def test_plateau_ignores_warm_up_nan_and_several_fits(catalogue, history):
    tree = catalogue(rows=5, draws=30)
    one, two = history(), history(drop=0.3, seed=1)
    short = one.where(xr.DataArray(np.arange(100), dims="log") < 60)  # padded with NaN
    tree["history"] = xr.concat([short, two], dim="chain")
    assert list(plateau(tree)["verdict"].values) == ["level", "still falling"]
    warm = history().assign(beta=("log", np.r_[np.linspace(0, 1, 98), np.ones(2)]))
    tree["history"] = warm
    assert plateau(tree)["verdict"].item() == "too short to tell"


def test_plateau_sees_nan(catalogue, history):
    tree = catalogue(rows=5, draws=30)
    broken = history()
    broken["objective"][-1] = np.nan
    tree["history"] = broken
    assert plateau(tree)["verdict"].item() == "not finite"


def test_one_chain_says_not_available(catalogue):
    found = restarts(catalogue(rows=5, draws=30))
    assert found.attrs["available"] == 0
    assert np.isnan(found["r_hat"]).all()
    assert not found["ok"].any()


def test_restarts_that_disagree_are_named(catalogue):
    tree = catalogue(rows=5, draws=2000, chains=2)
    assert bool(restarts(tree)["ok"].all())
    z = tree["posterior"]["z"].values.copy()
    z[1, :, 3] += 2 * z[0, :, 3].std()
    tree["posterior"] = tree["posterior"].to_dataset().assign(z=(("chain", "draw", "source"), z))
    found = restarts(tree).sel(variable="z")
    assert found["worst_at"].item() == "z[J0003]"
    np.testing.assert_allclose(
        float(found["spread_sd"]), 1.0, atol=0.1
    )  # half of 2 sd; mean of 2000 draws: 0.03
    assert not bool(found["ok"])


def test_r_hat_of_nuts_is_that_of_arviz(catalogue):
    import arviz_stats

    tree = catalogue(rows=3, draws=200, chains=4, method="nuts")
    found = restarts(tree)
    theirs = arviz_stats.rhat(tree["posterior"]["mu"].to_dataset(), method="rank")
    np.testing.assert_allclose(float(found["r_hat"].sel(variable="mu")), float(theirs["mu"]), rtol=1e-12)


def test_collapse_share_against_closed_form(catalogue):
    tree = catalogue(rows=2000, draws=200)
    found = collapse(tree)
    s, tau = tree["constant_data"]["s"].values, 1.5
    within = (1 / (1 / tau**2 + 1 / s**2)).mean()
    between = (tau**4 / (tau**2 + s**2)).mean()  # variance of the conditional means
    np.testing.assert_allclose(
        float(found["share"][0]), between / (between + within), atol=0.04
    )  # 2000 rows: 3 %
    assert bool(found["ok"].all())
    z = tree["posterior"]["z"]
    noise = z.copy(data=np.random.default_rng(0).normal(size=z.shape))
    tree["posterior"] = tree["posterior"].to_dataset().assign(z=noise)
    assert not collapse(tree)["ok"].any()  # share is 1 / 200 draws


def test_contraction_against_closed_form(catalogue, exact):
    tree = catalogue(rows=40, draws=20_000)
    found = contraction(tree)
    ratio = exact(tree)[1] / 10.0
    # a quantile at one sd of 20,000 draws has an error of 1 %; four of them
    np.testing.assert_allclose(float(found["contraction"].sel(variable="mu")), ratio, rtol=0.05)
    assert "z" in found["variable"].values
    assert bool(found["ok"].all())


def test_posteriors_that_pile_up_at_an_end_of_their_prior_are_told():
    """Of a uniform prior: nothing learnt, bounded from one side only, and bounded from both."""
    rng, shape = np.random.default_rng(0), (1, 4000)
    prior = xr.Dataset({name: (("chain", "draw"), rng.uniform(-5, 5, shape)) for name in "abcd"})
    drawn = {
        "a": rng.uniform(-5, 5, shape),
        "b": -5 + rng.exponential(0.4, shape),
        "c": 5 - rng.exponential(0.4, shape),
        "d": rng.normal(-3.5, 0.5, shape),
    }
    posterior = xr.Dataset({name: (("chain", "draw"), x) for name, x in drawn.items()})
    tree = xr.DataTree.from_dict({"posterior": posterior, "prior": prior})
    found = contraction(tree)
    assert found["end"].values.tolist() == ["both", "lower", "upper", ""]
    (check,) = [c for c in RULES["contraction"](found) if c.name == "identification"]
    assert check.counts == "note"
    assert "hardly narrow a:" in check.sentence
    assert "bound b, c from one side" in check.sentence


def test_a_normal_posterior_like_its_prior_piles_up_nowhere():
    rng = np.random.default_rng(0)
    groups = {
        name: xr.Dataset({"x": (("chain", "draw"), rng.normal(size=(1, 4000)))})
        for name in ("posterior", "prior")
    }
    found = contraction(xr.DataTree.from_dict(groups))
    assert found["end"].item() == ""
    (check,) = [c for c in RULES["contraction"](found) if c.name == "identification"]
    assert "hardly narrow x:" in check.sentence
