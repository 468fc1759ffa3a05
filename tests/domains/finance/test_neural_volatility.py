"""The neural volatility model: densities against dense algebra and loops, the filter against a grid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import integrate
from scipy.stats import multivariate_normal, norm

import scivi
from domains.finance import backtest, neural_forecasts, neural_volatility, shocks
from domains.finance.volatility_networks import Dynamics, Nets, Smoother, States, Steps
from domains.finance.volatility_networks import simulate as draw_series
from scivi.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def dynamics(n_states: int = 2, *, plain: bool = False, seed: int = 0) -> Dynamics:
    """Moves with a network that speaks up, or, if plain, one that is silent; double precision."""
    torch.manual_seed(seed)
    made = Dynamics(n_states, 8).double()
    with torch.no_grad():
        list(made.net.parameters())[-2].mul_(0.0 if plain else 10.0)
        made.log_tails.copy_(torch.tensor([1.5, 2.5]))
    return made.requires_grad_(False)


def steps(n_states: int, days: int) -> tuple[Steps, torch.Tensor, torch.Tensor]:
    """Links, pseudo-observations and their precisions at random; none on day 2."""
    torch.manual_seed(1)
    link, cross, kick = 0.3 * torch.randn(3, n_states, days - 1).double()
    weight, first = torch.rand(n_states, days - 1).double() + 0.5, torch.rand(n_states, 1).double() + 0.5
    a, b = torch.randn(n_states, days).double(), torch.rand(n_states, days).double()
    b[:, 2] = 0
    return Steps(first, link, cross, kick, weight), a, b


def dense(
    moves: Steps, a: np.ndarray, b: np.ndarray, k: int, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of state k, term by term of the formula in the docstring of ``Smoother``."""
    first, link, cross, kick, weight = (part[k].numpy() for part in moves)
    days = len(a)
    precision, shift = np.diag(b), b * (a - before)
    precision[0, 0] += first[0]
    for t in range(days - 1):
        row = np.zeros(days)
        row[t + 1], row[t] = 1, -link[t]
        precision += weight[t] * np.outer(row, row)
        shift = shift + weight[t] * (kick[t] + cross[t] * before[t]) * row
    covariance = np.linalg.inv(precision)
    return covariance @ shift, covariance


def test_smoother_is_the_product_of_its_normals():
    days = 7
    moves, a, b = steps(2, days)
    smoother, x = Smoother(moves, a, b), torch.randn(2, days).double()
    wanted, before = 0.0, np.zeros(days)
    for k in range(2):
        mean, covariance = dense(moves, a[k].numpy(), b[k].numpy(), k, before)
        wanted += multivariate_normal(mean, covariance).logpdf(x[k].numpy())
        before = before + x[k].numpy()
    np.testing.assert_allclose(float(smoother.log_prob(x)), wanted, rtol=1e-10)


def test_smoother_draws_what_it_scores():
    days, n = 5, 40_000
    moves, a, b = steps(2, days)
    torch.manual_seed(0)
    drawn = Smoother(moves, a, b).rsample(torch.Size((n,)))
    mean, covariance = dense(moves, a[0].numpy(), b[0].numpy(), 0, np.zeros(days))
    error = np.sqrt(np.diag(covariance) / n)
    assert np.abs((drawn[:, 0].mean(0).numpy() - mean) / error).max() < 4.5
    np.testing.assert_allclose(np.cov(drawn[:, 0].numpy().T), covariance, atol=6 / n**0.5)
    second = a[1].numpy(), b[1].numpy(), 1
    left = np.array([two - dense(moves, *second, one)[0] for one, two in drawn[:2000].numpy()])
    covariance = dense(moves, *second, np.zeros(days))[1]
    assert np.abs(left.mean(0) / np.sqrt(np.diag(covariance) / 2000)).max() < 4.5
    np.testing.assert_allclose(np.cov(left.T), covariance, atol=6 / 2000**0.5)


def test_path_density_is_that_of_a_loop_over_days():
    model, days = dynamics(), 9
    x, y = torch.randn(2, days).double(), torch.randn(days).double()
    seen = torch.ones(days, dtype=torch.bool)
    seen[4] = False
    start = (model.log_sigma.exp() / (1 - model.phi**2).sqrt()).numpy()
    wanted = norm.logpdf(x[:, 0].numpy(), 0, start).sum()
    for t in range(days - 1):
        h = float(model.level + x[:, t].sum())
        e = (float(y[t]) - float(model.drift)) * np.exp(-h / 2) if seen[t] else 0.0
        inputs = torch.cat([x[:, t], torch.tensor([np.tanh(e / 3), float(seen[t])]).double()])
        shift, stretch = model.net(inputs).tanh().numpy().reshape(2, 2)
        rho, sigma = model.rho.numpy() * float(seen[t]), model.log_sigma.exp().numpy()
        loc = model.phi.numpy() * x[:, t].numpy() + 0.3 * shift + sigma * rho * e
        wanted += norm.logpdf(x[:, t + 1].numpy(), loc, sigma * np.sqrt(1 - rho**2) * np.exp(stretch)).sum()
    np.testing.assert_allclose(float(States(model, y, seen).log_prob(x)), wanted, rtol=1e-10)


def test_slope_of_leverage_is_the_derivative_of_the_step():
    model = dynamics(plain=True)
    x, y = torch.randn(2, 1).double(), torch.tensor([-1.5]).double()
    found: Any = torch.autograd.functional.jacobian(lambda x: model.step(x, y).loc, x)
    jacobian = found[:, 0, :, 0]
    slope = model.linear(x, y)[1][:, 0]
    torch.testing.assert_close(jacobian, torch.diag(model.phi) + slope[:, None].expand(2, 2))


def test_return_has_the_density_of_its_log_variance():
    model, scale = dynamics(), torch.tensor([2.5]).double()
    x = torch.tensor([[[0.4], [-0.9]]]).double()

    def density(y: float, power: int) -> float:
        found = neural_volatility.Returns(model, x, scale)
        return y**power * float(found.log_prob(torch.tensor([[y]]).double()).exp())

    mass, mean, square = (
        integrate.quad(density, -150, 150, (k,), points=[0], limit=200)[0] for k in range(3)
    )
    variance = float((model.log_variance(x) + 2 * scale.log()).exp())
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    np.testing.assert_allclose(mean, float(model.drift * scale), atol=1e-3)
    np.testing.assert_allclose(square, variance, rtol=2e-2)  # tails of nu 6.5 beyond 150


def test_replicated_return_suits_the_next_states():
    model = dynamics(1, plain=True)
    with torch.no_grad():
        model.atanh_rho.fill_(-1.0)
    x = torch.tensor([[0.2, 0.05]]).double()
    sigma, rho, phi = float(model.log_sigma.exp()), float(model.rho), float(model.phi)

    def joint(e: float, power: int) -> float:
        tails = (tail.double() for tail in model.tails)
        shock = float(shocks.log_density(torch.tensor(e).double(), *tails).exp())
        return float(
            e**power * shock * norm.pdf(0.05, phi * 0.2 + sigma * rho * e, sigma * np.sqrt(1 - rho**2))
        )

    mass, first, second = (integrate.quad(joint, -8, 8, (k,))[0] for k in range(3))
    mean, sd, n = first / mass, (second / mass - (first / mass) ** 2) ** 0.5, 4000
    torch.manual_seed(0)
    drawn = neural_volatility.Returns(model, x.expand(n, 1, 2), torch.ones(n).double()).sample()[:, :1]
    e = model.shock(drawn, x[:, :1]).numpy()
    assert abs(e.mean() - mean) < 4.5 * sd / n**0.5 + 0.02  # 64 candidates are few: a bias of about 1 / 64


def test_filter_agrees_with_a_grid():
    model, n = dynamics(1), 40
    with torch.no_grad():
        model.logit_phi.fill_(2.0)
        model.log_sigma.fill_(-1.0)
    torch.manual_seed(3)
    y = draw_series(model.float(), 1, n)[1][0].double()
    y[20] = torch.nan
    model = model.double()
    grid = torch.linspace(-6, 6, 601).double()
    width = float(grid[1] - grid[0])
    chance = torch.from_numpy(norm.pdf(grid.numpy(), 0, float(model.start().exp())))
    tails, shock = model.tails, torch.linspace(-10, 10, 201).double()
    wanted = []
    for value in y:
        h = model.level + grid
        if value.isnan():  # the return is summed out on a grid of shocks
            share = shocks.log_density(shock, *tails).exp() * (shock[1] - shock[0])
            after = torch.zeros_like(chance)
            for e, weight in zip(shock, share, strict=True):
                step = model.step(grid[None], model.drift + (h / 2).exp() * e)
                after += weight * _moved(grid, chance, step.loc[0], step.log_scale[0].exp(), width)
            wanted.append(np.nan)
        else:
            density = model.log_likelihood(value.expand(len(grid)), grid[None]).exp()
            total = float((chance * density).sum() * width)
            wanted.append(np.log(total / float(chance.sum() * width)))
            step = model.step(grid[None], value.expand(len(grid)))
            after = _moved(grid, chance * density / total, step.loc[0], step.log_scale[0].exp(), width)
        chance = after
    nets = SimpleNamespace(own=SimpleNamespace(dynamics=model.float()))
    fitted, scale = SimpleNamespace(bound=SimpleNamespace(nets=nets)), 3.0  # percent
    table = xr.Dataset(
        {"returns": (("series", "day"), scale * y[None].numpy()), "scale": ("series", [scale])},
        {"series": ["a"], "day": np.arange(n)},
    )
    found = neural_forecasts.filtered(fitted, table, 1, particles=20_000)
    got = found["log_score"].values[:, 0] + np.log(scale)
    assert np.isnan(got[19])
    assert np.isfinite(np.delete(got, 19)).all()
    np.testing.assert_allclose(got, wanted[1:], atol=0.03)  # of 20 000 particles, sd below .008
    assert abs(np.nanmean(got - wanted[1:])) < 0.003
    summary = backtest.summary(found)
    assert float(summary["days"][0]) == n - 2


def _moved(
    grid: torch.Tensor, chance: torch.Tensor, loc: torch.Tensor, sd: torch.Tensor, width: float
) -> torch.Tensor:
    kernel = torch.exp(-0.5 * ((grid[:, None] - loc) / sd) ** 2) / (sd * (2 * torch.pi) ** 0.5)
    return kernel @ chance * width


def test_missing_days_say_nothing():
    torch.manual_seed(0)
    nets = Nets(2, 8, 3).requires_grad_(False)
    y, seen = torch.randn(1, 40), torch.ones(1, 40, dtype=torch.bool)
    seen[:, 10:15] = False
    other = torch.where(seen, y, 7.0)
    ours, theirs = (nets.encoder(nets.dynamics, values, seen) for values in (y, other))
    assert bool((ours.b[..., 10:15] == 0).all())
    torch.testing.assert_close(ours.mean, theirs.mean)
    x = ours.rsample()
    scale = torch.ones(1)
    pair = (neural_volatility.Returns(nets.dynamics, x, scale, seen).log_prob(v) for v in (y, other))
    torch.testing.assert_close(*pair)


def test_windows_are_slices_of_the_series():
    y = np.random.default_rng(0).standard_t(4, (2, 100))
    y[1, 7] = np.nan
    table = xr.Dataset({"returns": (("series", "day"), y)}, {"series": ["a", "b"], "day": np.arange(100)})
    rows = neural_volatility.windows(table, length=40, step=25)
    assert list(rows["window"].values) == [f"{s} {d}" for s in "ab" for d in (0, 25, 50, 60)]
    np.testing.assert_array_equal(rows["returns"].sel(window="b 25").values, y[1, 25:65])
    wanted = [np.nanmean(np.abs(row)) * np.sqrt(np.pi / 2) for row in y]
    np.testing.assert_allclose(rows["scale"].values, np.repeat(wanted, 4))
    with pytest.raises(DataError, match="length"):
        neural_volatility.windows(table, length=200)


@pytest.mark.slow
def test_template_obeys_the_laws():
    template = neural_volatility.make(3, width=8, layers=3)
    table, _ = scivi.simulate(template, {"window": 6, "day": 30}, seed=1)
    table["returns"][2, 5:9] = np.nan
    laws = scivi.check(template, table)
    assert laws.attrs["ok"], laws.to_pandas().to_string()


@pytest.mark.slow
def test_fit_finds_the_volatility():
    template = neural_volatility.make(width=16, layers=3)
    table, truth = scivi.simulate(template, {"window": 32, "day": 100}, seed=0)
    plan = scivi.Plan(**{**template.plan, "steps": 150})
    tree = scivi.draw(scivi.fit(template, table, plan, progress=False), table, 20)
    found = np.asarray(tree["posterior"]["log_variance"].mean(("chain", "draw")))
    assert np.corrcoef(found.ravel(), np.asarray(truth["log_variance"]).ravel())[0, 1] > 0.7
    used = neural_volatility.collapse(tree)
    assert float(used["kl_per_day"]) > 0.01
    assert float(used["sd_h"]) > 0.2
