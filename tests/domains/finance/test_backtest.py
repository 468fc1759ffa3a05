"""Backtests of a process with known parameters, and of the template on short series."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from typer.testing import CliRunner

from domains.finance import backtest, scores, volatility
from domains.finance.likelihood import Story
from scivi.errors import DataError

TRUTH = {"mu": 0.0, "phi": 0.95, "sigma": 0.3, "rho": -0.5}
KIND = volatility.make("normal")


def simulated(n_series=2, days=400, seed=0):
    """Dated returns of the process of TRUTH."""
    story = Story(
        **{name: torch.full((n_series,), value, dtype=torch.float64) for name, value in TRUTH.items()}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        y = story.returns(story.path(days).rsample())
    coords = {"series": [f"s{k}" for k in range(n_series)], "day": pd.bdate_range("2018-01-01", periods=days)}
    return xr.Dataset({"returns": (("series", "day"), y.numpy())}, coords)


def known(table):
    """60 draws of the true parameters; tomorrow's log variance is at random, which some weeks forget."""
    dims, shape = ("chain", "draw", "series"), (1, 60, table.sizes["series"])
    found = {name: (dims, np.full(shape, value)) for name, value in TRUTH.items()}
    sd = TRUTH["sigma"] / (1 - TRUTH["phi"] ** 2) ** 0.5
    found["log_variance_next"] = (dims, np.random.default_rng(0).normal(TRUTH["mu"], sd, shape))
    coords = {"chain": [0], "draw": np.arange(60), "series": table["series"], "day": table["day"]}
    return xr.DataTree.from_dict({"posterior": xr.Dataset(found, coords)})


QUIET = {"particles": 30, "progress": False}


def test_forecasts_know_nothing_of_their_day_or_later():
    table = simulated()
    changed = table.copy(deep=True)
    changed["returns"][:, 350:] = 9.0
    found, other = (
        backtest.backtest(known, t, t["day"].values[300], refit_every=20, **QUIET) for t in (table, changed)
    )
    names = ["value_at_risk", "expected_shortfall", "effective_size"]  # do not depend on the day's return
    xr.testing.assert_identical(found[names].isel(day=slice(51)), other[names].isel(day=slice(51)))
    xr.testing.assert_identical(
        found["log_score"].isel(day=slice(50)), other["log_score"].isel(day=slice(50))
    )
    later = slice(51, 60)
    assert (found["value_at_risk"].isel(day=later) != other["value_at_risk"].isel(day=later)).all()


def test_fits_are_given_the_days_before_them():
    table, seen = simulated(), []

    def posterior(part):
        seen.append((part.sizes["day"], part["day"].values[-1]))
        return known(part)

    days = table["day"].values
    start = pd.Timestamp(days[349]) + pd.Timedelta(hours=1)  # no day of the table: the next is taken
    found = backtest.backtest(posterior, table, start, refit_every=20, window=100, **QUIET)
    assert seen == [(100, days[349]), (100, days[369]), (100, days[389])]
    assert found["fit"].values.tolist() == days[[350, 370, 390]].tolist()
    assert found.sizes["day"] == 50
    np.testing.assert_array_equal(found["returns"].values, table["returns"].values[:, 350:].T)
    with pytest.raises(DataError, match="both are needed"):
        backtest.backtest(known, table, "2030-01-01", **QUIET)


@pytest.mark.slow
def test_right_parameters_pass_the_tests_and_wrong_ones_fail():
    # 3 x 400 days of the truth: PIT is uniform, hits are as many as they should be. With a variance that is
    # sixteen times as large and does not move, neither is.
    table = simulated(3, 450, seed=1)

    def too_wide(part):
        found = known(part)["posterior"].to_dataset()
        level = np.log(16.0) + 0 * found["mu"]
        return xr.DataTree.from_dict(
            {"posterior": found.assign(mu=level, log_variance_next=level, sigma=0.01 + 0 * level)}
        )

    start = table["day"].values[50]
    right, wide = (
        backtest.summary(backtest.backtest(f, table, start, refit_every=2000, **QUIET))
        for f in (known, too_wide)
    )
    for name in ("pit_p", "kupiec_p", "christoffersen_p"):
        assert (right[name] > 0.01).all(), name
    assert (np.abs(right["pit_sd"] - 1) < 4 / np.sqrt(2 * 400)).all()
    assert (wide["pit_p"] < 1e-6).all()
    assert (wide["kupiec_p"].sel(level=0.05) < 0.01).all()
    for name in ("crps", "fz0"):
        assert (right[name] < wide[name]).all(), name
    assert (right["log_score"] > wide["log_score"]).all()


def test_summary_is_of_the_days_that_are_there():
    table = simulated(1, 160)
    table["returns"][:, [110, 130]] = np.nan
    found = backtest.backtest(known, table, table["day"].values[100], **QUIET)
    one = found.isel(series=0)
    assert np.isnan(one["log_score"].values).sum() == 2
    assert np.isfinite(one["value_at_risk"]).all()
    told = backtest.summary(found).isel(series=0)
    there = np.isfinite(one["returns"].values)
    y, risk = one["returns"].values[there], one["value_at_risk"].sel(level=0.05).values[there]
    assert int(told["days"]) == 58
    assert float(told["crps"]) == pytest.approx(float(one["crps"].mean()))
    assert float(told["kupiec_p"].sel(level=0.05)) == scores.kupiec(y < risk, 0.05).p
    assert float(told["pit_distance"]) == pytest.approx(
        stats.kstest(one["pit"].values[there], "uniform").statistic
    )
    assert "log_score" in backtest.lines(backtest.summary(found))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Pareto k-hat")
def test_the_template_fitted_forecasts_as_well_as_the_truth():
    # 120 days after 600 of fit: parameters cost of the order of 5 / (2 x 600) nats a day.
    table = simulated(2, 720, seed=3)
    start = table["day"].values[600]
    fitted = backtest.backtest(KIND, table, start, draws=200, **QUIET)
    truth = backtest.backtest(known, table, start, **QUIET)
    loss = (truth["log_score"] - fitted["log_score"]).isel(
        day=slice(20, None)
    )  # the truth begins knowing no h
    assert float(loss.mean()) < 0.02
    assert fitted["k_hat"].dims == ("fit", "series")
    assert (fitted["k_hat"] < 1).all()


@pytest.mark.filterwarnings("ignore:Pareto k-hat")
def test_command_line_goes_from_prices_to_json(tmp_path):
    y = simulated(2, 320, seed=4)["returns"].to_pandas().T
    csv, out, daily = tmp_path / "prices.csv", tmp_path / "scores.json", tmp_path / "daily.csv"
    (100 * np.exp(y.cumsum() / 100)).to_csv(csv)
    start = str(y.index[300].date())
    options = ["--errors", "normal", "--draws", "60", "--particles", "10", "--column", "s1", "--quiet"]
    run = CliRunner().invoke(
        backtest.app, [str(csv), "--start", start, *options, "--json", str(out), "--daily", str(daily)]
    )
    assert run.exit_code == 0, run.output
    assert "kupiec_p_1" in run.output
    told = json.loads(out.read_text())
    assert list(told) == ["s1"]
    assert told["s1"]["days"] == 20
    assert 0 <= told["s1"]["christoffersen_p_5"] <= 1
    assert len(pd.read_csv(daily)) == 40  # 20 days at two levels
    (100 * np.exp(y.cumsum() / 100)).iloc[::-1].to_csv(csv)
    run = CliRunner().invoke(backtest.app, [str(csv), "--start", start])
    assert run.exit_code == 1
    assert "days are not in order" in run.output
    assert CliRunner().invoke(backtest.app, [str(csv), "--start", start, "--errors", "cauchy"]).exit_code == 2
