"""Joint forecasts of a panel against closed forms, SciPy and a panel whose correlations are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

import scivi
from domains.finance import backtest, factor_volatility, volatility
from scivi.errors import DataError

LEVEL = -0.5  # log variance of every shock, which hardly moves


def simulated(days: int = 420, nu: float = 1e6, seed: int = 0) -> xr.Dataset:
    """Three series: y2 = .8 y1 + u2, y3 = -.5 y1 + u3, with t shocks of common scale; variance exp(LEVEL)."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((3, days)) * np.exp(LEVEL / 2)
    if nu < 1e3:
        u = u * np.sqrt((nu - 2) / rng.chisquare(nu, days))
    y = np.stack([u[0], 0.8 * u[0] + u[1], -0.5 * u[0] + u[2]])
    coords = {"series": ["a", "b", "c"], "day": pd.bdate_range("2015-01-01", periods=days)}
    return xr.Dataset({"returns": (("series", "day"), y)}, coords)


def known(table: xr.Dataset) -> xr.DataTree:
    """40 draws of the shocks' true parameters, normal and nearly of constant variance."""
    dims, shape = ("chain", "draw", "series"), (1, 40, table.sizes["series"])
    values = {"mu": LEVEL, "phi": 0.9, "sigma": 0.01, "log_variance_next": LEVEL}
    found = {name: (dims, np.full(shape, value)) for name, value in values.items()}
    coords = {"chain": [0], "draw": np.arange(40), "series": table["series"], "day": table["day"]}
    return xr.DataTree.from_dict({"posterior": xr.Dataset(found, coords)})


@pytest.mark.parametrize("nu", [4.0, 25.0])
def test_copula_is_that_of_scipys_multivariate_t(nu):
    x = np.random.default_rng(0).standard_t(nu, (50, 4))
    wanted = stats.multivariate_t(np.zeros(4), np.eye(4), nu).logpdf(x) - stats.t.logpdf(x, nu).sum(-1)
    u = stats.t.cdf(x, nu)
    np.testing.assert_allclose(factor_volatility.log_copula(u, nu), wanted, rtol=1e-6, atol=1e-8)
    u[:, 2] = np.nan  # of the others alone
    kept = x[:, [0, 1, 3]]
    wanted = stats.multivariate_t(np.zeros(3), np.eye(3), nu).logpdf(kept) - stats.t.logpdf(kept, nu).sum(-1)
    np.testing.assert_allclose(factor_volatility.log_copula(u, nu), wanted, rtol=1e-6, atol=1e-8)


def test_shared_tail_is_found():
    """1000 days of 6 series; nu of 6 within a factor of 1.5, whose log has an error of about .1."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((6, 1000))
    common = normal * np.sqrt(6 / rng.chisquare(6, 1000))
    found = [factor_volatility.shared_tail(xr.DataArray(v, dims=("series", "day"))) for v in (common, normal)]
    assert 4 < found[0] < 9
    assert found[1] > 50


@pytest.mark.slow
def test_density_has_mass_1_and_is_that_of_the_paths():
    """Two series on a grid; the share of 40,000 paths in a quadrant within 4 standard errors."""
    table = simulated(nu=5.0).isel(series=slice(2))
    panel = factor_volatility.split(table)
    state = factor_volatility.begin(known(panel.shocks), panel, particles=5)
    edge = np.linspace(-7, 7, 71)
    y = np.stack(np.meshgrid(edge, edge, indexing="ij"), -1)
    density = np.exp([[state.log_density(point) for point in row] for row in y])
    cell = (edge[1] - edge[0]) ** 2
    assert density.sum() * cell == pytest.approx(1.0, abs=2e-3)
    ahead = factor_volatility.forecast(state, 1, 40_000)["returns"].isel(horizon=0).values
    for low in (-0.6, -1.2):
        inside = (edge < low + 1e-9).astype(float)
        inside[np.isclose(edge, low)] = 0.5  # the edge's cells lie half inside
        mass = inside @ density @ inside * cell
        share = (ahead < low).all(-1).mean()
        assert share == pytest.approx(mass, abs=4 * np.sqrt(mass / 40_000) + 1e-3)


@pytest.mark.slow
def test_log_score_is_that_of_the_normal_that_made_the_returns():
    """Known parameters and 300 days to learn three loadings from: some .5 x 3 / 300 nats a day are lost."""
    table = simulated(700, seed=2)
    found = factor_volatility.backtest(
        known, table, table["day"].values[400], refit_every=1000, particles=5, paths=2000, progress=False
    )
    loading = np.array([[1, 0, 0], [0.8, 1, 0], [-0.5, 0, 1]])
    law = stats.multivariate_normal(np.zeros(3), np.exp(LEVEL) * loading @ loading.T)
    truth = law.logpdf(table["returns"].values[:, 400:].T)
    loss = truth - found["joint_log_score"].values
    assert -0.01 < loss.mean() < 0.05
    told = backtest.summary(found)
    assert "log_score" not in told
    assert "joint" not in backtest.lines(told)
    for name in ("kupiec_p", "christoffersen_p", "pit_p"):
        assert (told[name] > 0.01).all(), name


def test_forecasts_know_nothing_of_their_day_or_later():
    table = simulated(330)
    changed = table.copy(deep=True)
    changed["returns"][:, 315:] = 7.0
    settings = {"refit_every": 10, "particles": 5, "paths": 200, "progress": False}
    one, other = (
        factor_volatility.backtest(known, t, t["day"].values[300], **settings) for t in (table, changed)
    )
    same = ["value_at_risk", "expected_shortfall"]
    xr.testing.assert_identical(one[same].isel(day=slice(16)), other[same].isel(day=slice(16)))
    np.testing.assert_array_equal(one["joint_log_score"][:15], other["joint_log_score"][:15])


def test_correlations_of_a_forecast_are_those_of_the_panel():
    table = simulated(1000, seed=3)
    panel = factor_volatility.split(table)
    state = factor_volatility.begin(known(panel.shocks), panel, particles=5)
    matrix = factor_volatility.correlation(factor_volatility.forecast(state, 5, 20_000))
    assert matrix.dims == ("series", "other")
    # .8 / sqrt(1.64) and -.5 / sqrt(1.25); loadings know some 300 days: an error of .05
    assert float(matrix.sel(series="a", other="b")) == pytest.approx(0.8 / 1.64**0.5, abs=0.12)
    assert float(matrix.sel(series="a", other="c")) == pytest.approx(-0.5 / 1.25**0.5, abs=0.12)


def test_new_days_follow_without_a_refit():
    table = simulated(330)
    panel = factor_volatility.split(table.isel(day=slice(320)))
    state = factor_volatility.begin(known(panel.shocks), panel, particles=5)
    later = factor_volatility.update(state, table.isel(day=slice(320, None)).sel(series=["c", "a", "b"]))
    assert later.shocks.day == table["day"].values[-1]
    whole = factor_volatility.split(table)
    np.testing.assert_allclose(later.loadings.mean, whole.loadings.mean, rtol=1e-10)
    with pytest.raises(DataError, match="days begin after"):
        factor_volatility.update(later, table.isel(day=slice(-3, None)))


def test_portfolios():
    returns = simulated(5)["returns"]
    equal = factor_volatility.portfolio(returns)
    assert equal.dims == ("series", "day")
    np.testing.assert_allclose(equal[0], returns.mean("series"))
    np.testing.assert_allclose(factor_volatility.portfolio(returns, {"b": 1.0})[0], returns[1])
    with pytest.raises(DataError, match="gold"):
        factor_volatility.portfolio(returns, {"gold": 1.0})


@pytest.mark.filterwarnings("ignore:Pareto k-hat")  # little is known of a volatility that stands still
def test_a_fit_of_shocks_leads_to_forecasts():
    """The whole way, on 500 days of t shocks that come together."""
    panel = factor_volatility.split(simulated(500, nu=5.0, seed=5))
    assert panel.nu < 15
    fit = scivi.fit(volatility.make("normal", leverage=False), panel.shocks, progress=False)
    result = scivi.draw(fit, panel.shocks, 100)
    state = factor_volatility.begin(result, panel, particles=20)
    ahead = factor_volatility.forecast(state, 10, 500)
    assert ahead["returns"].dims == ("path", "series", "horizon")
    assert ahead["returns"].shape == (500, 3, 10)
    assert np.isfinite(ahead["returns"]).all()
    assert ahead["day"].values[0] > panel.shocks["day"].values[-1]
    with pytest.raises(DataError, match="the panel of"):
        factor_volatility.begin(known(panel.shocks.isel(series=slice(2))), panel)


def test_a_panel_has_two_series():
    with pytest.raises(DataError, match="two series"):
        factor_volatility.split(simulated(300).isel(series=[0]))
