"""Paths summed out against a fine grid, and against the closed form where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scivi.models.chains import Autoregressive
from scivi.models.paths import Accuracy, log_sum, quadratics

FINE = Accuracy(nodes=15, terms=12)


def series(length: int = 120, seed: int = 0) -> torch.Tensor:
    """Returns with a volatility that comes and goes, and two days far out."""
    g = torch.Generator().manual_seed(seed)
    level = torch.sin(torch.arange(length) / 15.0).double()
    y = (0.5 * level).exp() * torch.randn(length, generator=g, dtype=torch.float64)
    y[30], y[31] = -6.0, 0.0
    return y


def light(y: torch.Tensor):
    """Normal errors: log density of a day's return given its log variance."""
    return lambda now, ahead: -0.5 * (now + y.square() * (-now).exp()) - 0.9189385332046727


def heavy(y: torch.Tensor, nu: float, rho: float, mu: float, phi: float, sigma: float):
    """Student-t errors with leverage."""
    t = torch.distributions.StudentT(torch.tensor(nu, dtype=torch.float64))
    scale = ((nu - 2) / nu * (1 - rho**2)) ** 0.5

    def link(now, ahead):
        eta = (ahead - mu - phi * (now - mu)) / sigma
        e = (y * (-0.5 * now).exp() - rho * eta) / scale
        return t.log_prob(e) - 0.5 * now - torch.log(torch.tensor(scale))

    return link


def by_grid(prior: Autoregressive, link, points: int = 240, reach: float = 7.0) -> float:
    """Log of the sum over paths by the trapezoid rule in every entry, entry after entry."""
    mu, phi, sigma = (float(v) for v in (prior.centre, prior.phi, prior.step_scale))
    h = torch.linspace(mu - reach, mu + reach, points, dtype=torch.float64)
    width = h[1] - h[0]
    step = torch.distributions.Normal(mu + phi * (h[:, None] - mu), sigma).log_prob(h[None]) + width.log()
    forward = torch.distributions.Normal(mu, sigma / (1 - phi**2) ** 0.5).log_prob(h) + width.log()
    days = prior.event_shape[0] - 1
    values = link(h[:, None, None].expand(-1, points, days), h[None, :, None].expand(points, -1, days))
    for t in range(days):
        forward = torch.logsumexp(forward[:, None] + step + values[..., t], 0)
    return float(torch.logsumexp(forward, 0))


def path(mu: float, phi: float, sigma: float, days: int) -> Autoregressive:
    """A prior in double precision."""
    return Autoregressive(*(torch.tensor(v, dtype=torch.float64) for v in (mu, phi, sigma)), days + 1)


@pytest.mark.parametrize(("phi", "sigma"), [(0.95, 0.3), (0.8, 0.6)])
def test_sum_with_normal_errors_is_that_of_a_grid(phi, sigma):
    y = series()
    prior, link = path(0.0, phi, sigma, len(y)), light(y)
    truth, near = by_grid(prior, link), quadratics(prior, link, False, Accuracy())
    coarse = log_sum(prior, link, near, False, Accuracy(nodes=7, terms=5))[0]
    assert float(coarse) == pytest.approx(truth, abs=5e-3)
    assert float(log_sum(prior, link, near, False, FINE)[0]) == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize(("nu", "rho"), [(12.0, -0.7), (5.0, 0.4)])
def test_sum_with_heavy_tails_and_leverage_is_that_of_a_grid(nu, rho):
    y = series()
    prior, link = path(0.0, 0.95, 0.3, len(y)), heavy(y, nu, rho, 0.0, 0.95, 0.3)
    truth = by_grid(prior, link)
    near = quadratics(prior, link, True, Accuracy())
    assert float(log_sum(prior, link, near, True, Accuracy())[0]) == pytest.approx(truth, abs=2e-2)
    assert float(log_sum(prior, link, near, True, FINE)[0]) == pytest.approx(truth, abs=1e-3)


def test_quadratic_links_are_summed_exactly():
    """Normal observations of the path: the sum is the density of a normal with a dense covariance."""
    y, noise = series(60), 0.7
    prior = path(0.2, 0.9, 0.4, 60)
    link = lambda now, ahead: torch.distributions.Normal(now, noise).log_prob(y)  # noqa: E731
    t = torch.arange(60.0, dtype=torch.float64)
    covariance = 0.16 / (1 - 0.81) * 0.9 ** (t - t[:, None]).abs() + noise**2 * torch.eye(60).double()
    truth = torch.distributions.MultivariateNormal(0.2 + 0 * t, covariance).log_prob(y)
    near = quadratics(prior, link, False, replace(Accuracy(), full=30, tolerance=1e-9))
    value, chain = log_sum(prior, link, near, False, Accuracy(nodes=3, terms=2))
    assert float(value) == pytest.approx(float(truth), abs=1e-8)
    own = torch.zeros(61, 61, dtype=torch.float64)
    own[:60, :60] = torch.eye(60) / noise**2
    diagonal, off = prior.precision()
    full = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1) + own
    torch.testing.assert_close(chain.variance, torch.linalg.inv(full).diagonal(), rtol=1e-8, atol=1e-10)


def test_quadratics_of_other_parameters_serve_as_well():
    y = series()
    here, there = path(0.0, 0.95, 0.3, len(y)), path(0.2, 0.93, 0.36, len(y))
    link = light(y)
    own = log_sum(there, link, quadratics(there, link, False, Accuracy()), False, Accuracy())[0]
    other = log_sum(there, link, quadratics(here, link, False, Accuracy()), False, Accuracy())[0]
    assert float(other) == pytest.approx(float(own), abs=3e-3)


def test_slope_is_that_of_the_grid():
    y, d = series(60), 1e-4
    link = light(y)
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    one = torch.ones((), dtype=torch.float64)
    prior = Autoregressive(0 * one, 0.95 * one, sigma, 61)
    near = quadratics(prior, link, False, FINE)
    (slope,) = torch.autograd.grad(log_sum(prior, link, near, False, FINE)[0], sigma)
    apart = by_grid(path(0.0, 0.95, 0.3 + d, 60), link) - by_grid(path(0.0, 0.95, 0.3 - d, 60), link)
    assert float(slope) == pytest.approx(apart / (2 * d), abs=2e-2)


def test_days_that_are_missing_say_nothing():
    y = series(40)
    there = torch.ones(40, dtype=torch.bool)
    there[10:25] = False
    prior, whole = path(0.0, 0.95, 0.3, 40), light(y)
    link = lambda now, ahead: torch.where(there, whole(now, ahead), 0.0)  # noqa: E731
    near = quadratics(prior, link, False, Accuracy())
    assert float(log_sum(prior, link, near, False, FINE)[0]) == pytest.approx(by_grid(prior, link), abs=1e-4)
    assert not torch.cat([near.now_now[10:25], near.now[10:25]]).any()


def test_half_steps_end_where_full_steps_go_to_and_fro():
    """Nearly Cauchy tails and strong leverage, where the change of a full step does not fall."""
    y = series(300, seed=3)
    prior, link = path(0.0, 0.95, 0.36, 300), heavy(y, 3.3, -0.86, 0.0, 0.95, 0.36)
    found = [
        quadratics(prior, link, True, replace(Accuracy(), steps=n, tolerance=0.0)).posterior(prior).mean
        for n in (29, 30)
    ]
    assert float((found[1] - found[0]).abs().max()) < 0.02
