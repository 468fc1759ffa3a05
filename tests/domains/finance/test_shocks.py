"""Densities of shocks against scipy's, by quadrature and by draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from domains.finance import shocks


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


E = torch.linspace(-8, 8, 33, dtype=torch.float64)


def test_normal_and_t_are_those_of_scipy():
    np.testing.assert_allclose(shocks.log_density(E), stats.norm.logpdf(E), rtol=1e-12)
    for nu in (2.1, 5.0, 80.0):
        wanted = stats.t(nu, scale=((nu - 2) / nu) ** 0.5).logpdf(E)
        np.testing.assert_allclose(shocks.log_density(E, number(nu)), wanted, rtol=1e-10)


@pytest.mark.parametrize(("lower", "upper"), [(3.0, 9.0), (40.0, 5.0), (6.0, 6.0)])
def test_two_tails_are_those_of_jones_and_faddy(lower, upper):
    a, b = lower / 2, upper / 2
    mean, variance = stats.jf_skew_t.stats(a, b, moments="mv")
    wanted = stats.jf_skew_t.logpdf(mean + variance**0.5 * E.numpy(), a, b) + 0.5 * np.log(variance)
    np.testing.assert_allclose(shocks.log_density(E, number(lower), number(upper)), wanted, rtol=1e-9)
    if lower == upper:
        np.testing.assert_allclose(shocks.log_density(E, number(lower)), wanted, rtol=1e-9)


@pytest.mark.parametrize(("lower", "upper"), [(5.0, 30.0), (12.0, 4.5)])
def test_mean_is_0_and_variance_1(lower, upper):
    def density(e: float) -> float:
        return float(shocks.log_density(number(e), number(lower), number(upper)).exp())

    moments = [integrate.quad(lambda e: density(e) * e**p, -np.inf, np.inf, limit=200)[0] for p in range(3)]  # noqa: B023
    np.testing.assert_allclose(moments, [1.0, 0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize(("lower", "upper"), [(None, None), (6.0, None), (6.0, 25.0), (9.0, 4.5)])
def test_draws_follow_the_density(lower, upper):
    """Kolmogorov-Smirnov distance of 20,000 draws: 1.95 / sqrt(n) at one in a thousand."""
    torch.manual_seed(0)
    nu, nu_upper = (None if v is None else number(v) for v in (lower, upper))
    drawn = shocks.sample((20_000,), number(0.0), nu, nu_upper).numpy()
    if lower is None:
        law = stats.norm
    else:
        a, b = lower / 2, (upper or lower) / 2
        mean, variance = stats.jf_skew_t.stats(a, b, moments="mv")
        law = stats.jf_skew_t(a, b, loc=-mean / variance**0.5, scale=variance**-0.5)
    assert stats.kstest(drawn, law.cdf).statistic < 1.95 / 20_000**0.5


@pytest.mark.parametrize(("lower", "upper"), [(None, None), (6.0, None), (6.0, 25.0), (9.0, 4.5)])
def test_quantiles_undo_probabilities(lower, upper):
    nu, nu_upper = (None if v is None else number(v) for v in (lower, upper))
    e = torch.tensor([-6.0, -3.0, -0.3, 0.0, 1.0, 2.5, 4.0], dtype=torch.float64)
    p = shocks.cumulative(e, nu, nu_upper)
    np.testing.assert_allclose(shocks.quantile(p, nu, nu_upper), e, rtol=1e-6, atol=1e-9)


def test_far_out_single_precision_follows_the_power_of_the_tail():
    """At a million sd either way: SciPy's density in double precision, to single precision's rounding."""
    a, b = 2.5, 6.0
    mean, variance = stats.jf_skew_t.stats(a, b, moments="mv")
    for e in (-1e6, 1e6):
        x = mean + variance**0.5 * e
        slope = -(2 * a + 1) if e < 0 else -(2 * b + 1)
        base = stats.jf_skew_t.logpdf(mean + variance**0.5 * e / 1e4, a, b) + 0.5 * np.log(variance)
        found = shocks.log_density(torch.tensor(e), torch.tensor(2 * a), torch.tensor(2 * b))
        wanted = base + slope * np.log(x / (mean + variance**0.5 * e / 1e4))
        assert float(found) == pytest.approx(wanted, abs=2e-2)  # the power law is exact to 1e-3 there
