"""Forecasts against filters on a grid, closed forms, and scipy's distributions."""

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats

from domains.finance import forecasts, shocks
from domains.finance.likelihood import Story
from scivi.errors import DataError

SKEWED = {"mu": -0.5, "phi": 0.95, "sigma": 0.3, "nu": 7.0, "nu_upper": 12.0, "rho": -0.6, "drift": 0.05}
PLAIN = {"mu": 0.2, "phi": 0.9, "sigma": 0.4}


def posterior(draws, next_log_variance, *, days, series=("a",), log_weight=None):
    """A tree as ``scivi.draw`` makes it, of parameters (draw,) or numbers, the same for all series."""
    n = np.size(next_log_variance)
    dims, one = ("chain", "draw", "series"), np.ones((1, n, len(series)))
    found = {name: (dims, one * np.reshape(value, (1, -1, 1))) for name, value in draws.items()}
    found["log_variance_next"] = (dims, one * np.reshape(next_log_variance, (1, -1, 1)))
    coords = {"chain": [0], "draw": np.arange(n), "series": list(series), "day": days}
    groups = {"posterior": xr.Dataset(found, coords)}
    if log_weight is not None:
        groups["sample_stats"] = xr.Dataset(
            {"row_log_weight": (dims, one * np.reshape(log_weight, (1, -1, 1)))}
        )
    return xr.DataTree.from_dict(groups)


def table(y, days, series=("a",)):
    return xr.Dataset(
        {"returns": (("series", "day"), np.atleast_2d(y))}, {"series": list(series), "day": days}
    )


def shock(p):
    """The law of eps, standardised, by scipy."""
    if "nu" not in p:
        return stats.norm()
    law = stats.jf_skew_t(p["nu"] / 2, p.get("nu_upper", p["nu"]) / 2)
    mean, sd = law.mean(), law.std()
    return stats.jf_skew_t(p["nu"] / 2, p.get("nu_upper", p["nu"]) / 2, loc=-mean / sd, scale=1 / sd)


def on_a_grid(p, start, y, points=301):
    """Log predictive densities and PIT by sums over a grid of h, from p(h) at its points at first."""
    half = 6 * p["sigma"] / (1 - p["phi"] ** 2) ** 0.5
    h = np.linspace(p["mu"] - half, p["mu"] + half, points)
    rho, law = p.get("rho", 0.0), shock(p)
    move = stats.norm(p["mu"] + p["phi"] * (h[:, None] - p["mu"]), p["sigma"]).pdf(h)
    move = move / move.sum(1, keepdims=True)
    eta = (h - p["mu"] - p["phi"] * (h[:, None] - p["mu"])) / p["sigma"]
    scale = np.exp(h[:, None] / 2) * (1 - rho**2) ** 0.5 + 0 * eta
    loc = p.get("drift", 0.0) + np.exp(h[:, None] / 2) * rho * eta
    now = start(h)
    now, log, pit = now / now.sum(), [], []
    for value in y:
        joint = now[:, None] * move
        if np.isfinite(value):
            e = (value - loc) / scale
            pit.append((joint * law.cdf(e)).sum())
            joint = joint * law.pdf(e) / scale
            log.append(np.log(joint.sum()))
        now = joint.sum(0) / joint.sum()
    return np.array(log), np.array(pit)


@pytest.mark.parametrize("p", [PLAIN, SKEWED | {"nu_upper": None}, SKEWED], ids=["normal", "t", "skewed t"])
def test_cumulative_probability_is_scipys(p):
    p = {name: value for name, value in p.items() if value is not None}
    e = np.array([-40.0, -6.0, -1.0, 0.0, 0.3, 2.0, 9.0])
    found = shocks.cumulative(
        torch.tensor(e),
        *(torch.tensor(p[k], dtype=torch.float64) if k in p else None for k in ("nu", "nu_upper")),
    )
    np.testing.assert_allclose(found.numpy(), shock(p).cdf(e), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("p", [PLAIN, SKEWED], ids=["normal", "skewed, leverage"])
def test_filter_is_that_of_a_grid_with_gaps(p):
    # 40 draws of one parameter with 500 particles: a day's density has a relative error of about
    # 1 / sqrt(20000) times its spread over particles, some units on a day of surprise: .03 of a nat.
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    stationary = stats.norm(p["mu"], p["sigma"] / (1 - p["phi"] ** 2) ** 0.5)
    y = 1.2 * rng.standard_t(5, size=50)
    y[[10, 11, 30]], y[20] = np.nan, 0.0
    start = stationary.ppf((np.arange(40) + 0.5) / 40)[torch.randperm(40, generator=torch_rng).numpy()]
    state = forecasts.begin(posterior(p, start, days=[0]), particles=500, seed=1)
    log, pit = [], []
    for day, value in enumerate(y, 1):
        if np.isfinite(value):
            log.append(state.log_density(np.array([value]))[0])
            pit.append(state.probability(np.array([value]))[0])
        else:
            assert state.log_density(np.array([value]))[0] == pytest.approx(0, abs=1e-12)
        state = state.after(np.array([value]), day)
    exact, exact_pit = on_a_grid(p, stationary.pdf, y)
    assert np.abs(np.array(log) - exact).max() < 0.1
    assert abs(np.mean(log) - exact.mean()) < 0.01
    assert np.abs(np.array(pit) - exact_pit).max() < 0.015


def test_draws_of_parameters_are_weighed_by_their_evidence():
    # Two values of mu, half the draws each: after 30 days the odds are the ratio of the grid's likelihoods.
    n, low, high = 200, PLAIN | {"mu": -0.3}, PLAIN | {"mu": 0.7}
    y = np.random.default_rng(1).normal(size=30)
    mu = np.repeat([-0.3, 0.7], n // 2)
    state = forecasts.begin(posterior(PLAIN | {"mu": mu}, np.full(n, 0.2), days=[0]), particles=300, seed=0)
    found = forecasts.update(state, table(y, np.arange(1, 31)))
    known = [on_a_grid(p, lambda h: stats.norm(0.2, 0.02).pdf(h), y, 601)[0].sum() for p in (low, high)]
    log_weight = found.log_weight[:, 0]
    odds = float(log_weight[: n // 2].logsumexp(0) - log_weight[n // 2 :].logsumexp(0))
    assert odds == pytest.approx(known[0] - known[1], abs=0.15)
    assert found.effective_size()[0] < n


def test_a_filter_settles_on_the_last_days_whatever_it_began_with():
    # The posterior's paths are drawn from the prior, which knows nothing of the data: 50 days of returns put
    # them where a grid has them, at phi = .9.
    p, n, days = PLAIN, 60, np.arange(80)
    rng = np.random.default_rng(8)
    y = 2.0 * rng.normal(size=81)
    sd = p["sigma"] / (1 - p["phi"] ** 2) ** 0.5
    tree = posterior(p, np.full(n, -1.0), days=days)
    paths = xr.DataArray(rng.normal(p["mu"], sd, (1, n, 1, 80)), dims=("chain", "draw", "series", "day"))
    groups = {"posterior": tree["posterior"].to_dataset().assign(log_variance=paths)}
    tree = xr.DataTree.from_dict(groups | {"observed_data": table(y[:80], days)})
    found = forecasts.begin(tree, particles=300).log_density(y[80:])
    exact = on_a_grid(p, stats.norm(p["mu"], sd).pdf, y)[0][-1]
    assert found[0] == pytest.approx(exact, abs=0.02)
    unsettled = forecasts.begin(tree, particles=300, settle=0).log_density(y[80:])
    assert abs(unsettled[0] - exact) > 0.1


def test_weights_correct_the_draws():
    # Drawn from N(0.5, 1), weighed to be N(0, 1): the mean of h is 0 within 4 / sqrt(2000 / e^(1/4)) of it.
    rng = np.random.default_rng(2)
    h = rng.normal(0.5, 1.0, 2000)
    log_weight = stats.norm(0, 1).logpdf(h) - stats.norm(0.5, 1).logpdf(h)
    tree = posterior(PLAIN, h, days=[0], log_weight=log_weight)
    assert float(np.exp(forecasts.weights(tree)["log_weight"]).sum()) == pytest.approx(1)
    found = forecasts.forecast(tree, horizon=1, paths=8000)
    assert abs(float(found["log_variance"].mean())) < 0.1
    assert float(found["log_variance"].std()) == pytest.approx(1.0, abs=0.1)


def test_poor_weights_warn_and_broken_ones_are_refused():
    h = np.random.default_rng(3).normal(size=200)
    with pytest.warns(UserWarning, match="do not trust"):
        forecasts.begin(posterior(PLAIN, h, days=[0], log_weight=6 * h), particles=2)
    with pytest.raises(DataError, match="no finite weights"):
        forecasts.begin(posterior(PLAIN, h, days=[0], log_weight=np.nan * h))


def test_simulated_days_have_the_moments_of_the_process():
    # Given h tomorrow, log variance k days on is normal: E y^2 = exp(m + v / 2), in closed form.
    n, h0 = 60_000, 1.5
    days = np.array(["2020-01-02", "2020-01-03"], "datetime64[ns]")
    found = forecasts.forecast(posterior(PLAIN, np.full(50, h0), days=days), horizon=10, paths=n, seed=4)
    assert [str(d)[:10] for d in found["day"].values[:2]] == ["2020-01-06", "2020-01-07"]
    assert found["returns"].dims == ("path", "series", "horizon")
    k = np.arange(10)
    mean = PLAIN["mu"] + PLAIN["phi"] ** k * (h0 - PLAIN["mu"])
    var = PLAIN["sigma"] ** 2 * (1 - PLAIN["phi"] ** (2 * k)) / (1 - PLAIN["phi"] ** 2)
    y, h = (found[name].values[:, 0] for name in ("returns", "log_variance"))
    np.testing.assert_allclose(h.mean(0), mean, atol=4 * np.sqrt(var.max() / n))
    np.testing.assert_allclose(h.var(0), var, rtol=0.03, atol=1e-9)
    error = 4 * (y**2).std(0) / n**0.5
    assert (np.abs((y**2).mean(0) - np.exp(mean + var / 2)) < error).all()
    assert forecasts.forecast(posterior(PLAIN, np.full(50, h0), days=[7]))["day"].values[0] == 8


def test_leverage_joins_returns_and_later_variance():
    # corr(y_t, h_(t+1)) given h_t = 0 and normal shocks is rho.
    p = PLAIN | {"rho": -0.8}
    found = forecasts.forecast(posterior(p, np.zeros(50), days=[0]), horizon=2, paths=40_000)
    r = np.corrcoef(found["returns"].values[:, 0, 0], found["log_variance"].values[:, 0, 1])[0, 1]
    assert r == pytest.approx(-0.8, abs=0.01)


def test_risk_of_normal_returns_is_in_closed_form():
    # Log variance is held at ln 4 by sigma near 0: y ~ N(0, 4).
    p = {"mu": np.log(4.0), "phi": 0.5, "sigma": 1e-6}
    tree = posterior(p, np.full(100, np.log(4.0)), days=[0])
    returns = forecasts.forecast(tree, horizon=2, paths=100_000)["returns"]
    z = stats.norm.ppf([0.01, 0.05])
    risk, shortfall = forecasts.value_at_risk(returns), forecasts.expected_shortfall(returns)
    np.testing.assert_allclose(risk.sel(series="a", horizon=2), 2 * z, rtol=0.03)
    np.testing.assert_allclose(
        shortfall.sel(series="a", horizon=2), -2 * stats.norm.pdf(z) / [0.01, 0.05], rtol=0.03
    )
    np.testing.assert_allclose(forecasts.quantiles(returns, [0.5]).values, 0, atol=0.04)
    y, w = forecasts.begin(tree, particles=1000).sample()
    np.testing.assert_allclose(forecasts.weighted_quantiles(y, w, [0.01, 0.05])[0][0], 2 * z, rtol=0.03)


def test_weighted_quantiles_are_those_of_repeated_values():
    rng = np.random.default_rng(5)
    values, times = np.sort(rng.normal(size=(2, 40)), -1), rng.integers(1, 9, size=(2, 40))
    weight = times / times.sum(-1, keepdims=True)
    quantile, mean = forecasts.weighted_quantiles(values, weight, [0.1, 0.4])
    for s in range(2):
        long = np.repeat(values[s], times[s] * 100)
        for k, level in enumerate((0.1, 0.4)):
            assert quantile[s, k] == np.quantile(long, level, method="inverted_cdf")
            assert mean[s, k] == pytest.approx(long[: round(level * len(long))].mean(), rel=2e-3)


def test_days_taken_in_at_once_or_in_turn_are_the_same():
    days = np.arange("2021-03-01", "2021-03-05", dtype="datetime64[D]").astype("datetime64[ns]")
    y = np.array([[0.3, np.nan, -2.0, 52.0], [0.0, 0.1, 0.0, -0.2]])
    h = np.random.default_rng(6).normal(size=60)
    tree = posterior(SKEWED, h, days=days[:1] - np.timedelta64(3, "D"), series=("a", "b"))
    new = table(y, days, ("a", "b"))
    at_once = forecasts.update(tree, new)
    in_turn = forecasts.update(
        forecasts.update(tree, new.isel(day=slice(2))), new.isel(day=slice(2, 4), series=[1, 0])
    )
    assert torch.equal(at_once.now, in_turn.now)
    assert torch.equal(at_once.log_weight, in_turn.log_weight)
    assert at_once.day == days[-1]
    for found in (forecasts.forecast(at_once)["returns"], at_once.sample()[0], at_once.ahead.numpy()):
        assert np.isfinite(found).all()  # though one day had a return of 52 %
    with pytest.raises(DataError, match="new days begin after"):
        forecasts.update(at_once, new)
    with pytest.raises(DataError, match="the forecasts are of series"):
        forecasts.update(tree, new.isel(series=[0]))


def test_random_numbers_of_others_stay_where_they_were():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tree = posterior(SKEWED, np.zeros(30), days=[0])
    first = forecasts.forecast(tree, seed=1)
    assert torch.equal(torch.rand(3), expected)
    xr.testing.assert_identical(first, forecasts.forecast(tree, seed=1))
    assert not first.equals(forecasts.forecast(tree, seed=2))


def test_filter_and_simulation_agree_on_tomorrow():
    # 40 000 paths and the mixture itself: Kolmogorov's distance of right samples stays below 1.95 / sqrt(n).
    h = np.random.default_rng(7).normal(size=100)
    state = forecasts.begin(posterior(SKEWED, h, days=[0]), particles=400)
    y = forecasts.forecast(state, horizon=1, paths=40_000)["returns"].values[:, 0, 0]
    at = np.quantile(y, np.linspace(0.02, 0.98, 15))
    below = [state.probability(np.array([value]))[0] for value in at]
    np.testing.assert_allclose(below, np.linspace(0.02, 0.98, 15), atol=0.01)


def test_fan_chart_draws_its_bands():
    days = np.arange("2021-03-01", "2021-03-11", dtype="datetime64[D]").astype("datetime64[ns]")
    tree = posterior(SKEWED, np.zeros(30), days=days)
    found = forecasts.forecast(tree, horizon=5, paths=200)
    past = table(np.ones(10), days)["returns"]
    ax = Figure().subplots()
    assert forecasts.fan_chart(found, "a", past=past, ax=ax) is ax
    assert len(ax.collections) == 3
    before = ax.lines[0].get_ydata()
    assert before[-1] == 0
    assert before[0] == -9


def test_particles_are_drawn_in_proportion():
    log_weight = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]]).log()
    counts = [np.bincount(row, minlength=3) for row in forecasts.systematic(log_weight, 1000).numpy()]
    assert np.abs(counts[0] - np.array([500, 200, 300])).max() <= 1
    assert counts[1].tolist() == [0, 1000, 0]
    even = forecasts.systematic(torch.zeros(4, 7))
    assert torch.equal(even, torch.arange(7).expand(4, 7))


def test_names_are_those_of_the_story():
    state = forecasts.begin(posterior(SKEWED, np.zeros(30), days=[0]), particles=2)
    assert set(state.story.parts()) == set(SKEWED)
    assert isinstance(state.story, Story)
