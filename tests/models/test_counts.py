from __future__ import annotations

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from scivi.inference.capture import captured
from scivi.models.binding import seeded
from scivi.models.counts import (
    _STIRLING,
    NegativeBinomialMean,
    NegativeBinomialMixture,
    log_negative_binomial,
)


def cases(n: int = 400) -> list[tuple[float, float, float]]:
    """Counts 0 to 1e5, with means far from them and near them, theta 1e-3 to 1e6."""
    random, out = np.random.default_rng(0), []
    for k in range(n):
        theta = 10 ** random.uniform(-3, 6)
        count = [0, random.integers(1, 10), *(int(10 ** random.uniform(0, 5)) for _ in range(2))][k % 4]
        near = count + 3 * random.normal() * np.sqrt(count + count**2 / theta)
        mean = max(1e-4, near) if k % 4 == 3 else 10 ** random.uniform(-4, 5)
        out.append((float(count), float(mean), float(theta)))
    return out


def exactly(count: float, mean: float, theta: float) -> tuple[float, float, float, float]:
    """Log density, its slopes, and the size of the parts of the slope by theta; in 60 digits."""
    with mpmath.workdps(60):
        n, m, t = mpmath.mpf(count), mpmath.mpf(mean), mpmath.mpf(theta)
        value = mpmath.loggamma(n + t) - mpmath.loggamma(t) - mpmath.loggamma(n + 1)
        value += t * mpmath.log(t / (t + m)) + n * mpmath.log(m / (t + m))
        u = (n - m) / (t + m)
        gammas = mpmath.digamma(n + t) - mpmath.digamma(t) - mpmath.log((n + t) / t)
        by_theta = mpmath.log(1 + u) - u + gammas
        by_mean = t * (n - m) / (m * (t + m))
        parts = abs(mpmath.log(1 + u) - u) + abs(gammas)
        return float(value), float(by_mean), float(by_theta), float(parts)


# Some ten roundings: of the reciprocals, the logs, and of u, which the excess takes squared.
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("recorded", [False, True])
def test_value_and_slopes_are_those_of_the_log_gammas_in_sixty_digits(dtype, error, recorded):
    count, mean, theta = torch.tensor(cases(), dtype=dtype).unbind(1)

    def function(count, mean, theta):
        mean, theta = (x.detach().requires_grad_(True) for x in (mean, theta))
        value = log_negative_binomial(count, mean, theta)
        return value.detach(), *torch.autograd.grad(value.sum(), [mean, theta])

    arguments = (count, mean, theta)
    found = (captured(function, arguments) if recorded else function)(*arguments)
    truth = [exactly(*case) for case in zip(*(x.tolist() for x in arguments), strict=True)]
    value, by_mean, by_theta, parts = (np.array(x) for x in zip(*truth, strict=True))
    np.testing.assert_allclose(found[0], value, rtol=error)
    np.testing.assert_allclose(found[1], by_mean, rtol=error)
    # near its zero the slope is the difference of its two parts, and has the errors of these
    assert np.max(np.abs(found[2].double().numpy() - by_theta) / parts) < error


@pytest.mark.parametrize(("mean", "theta"), [(0.3, 0.05), (2.0, 1.0), (40.0, 7.5), (900.0, 3e4)])
def test_density_is_scipys(mean, theta):
    count = np.unique(np.concatenate([np.arange(30), np.geomspace(30, 5000, 40).astype(int)]))
    fn = NegativeBinomialMean(*(torch.tensor(x, dtype=torch.float64) for x in (mean, theta)))
    truth = stats.nbinom.logpmf(count, theta, theta / (theta + mean))
    # scipy takes differences of log gammas, which are as large as theta log theta
    np.testing.assert_allclose(fn.log_prob(torch.tensor(count).double()), truth, rtol=1e-8, atol=1e-8)
    top = torch.arange(int(mean + 60 * (mean + mean**2 / theta) ** 0.5) + 200).double()
    assert float(fn.log_prob(top).exp().sum()) == pytest.approx(1, abs=1e-9)  # beyond 60 sd, and rounding


@pytest.mark.parametrize("dtype", list(_STIRLING))
def test_the_table_is_stirlings_error(dtype):
    slope_error, value_error = {torch.float32: (3e-7, 2e-9), torch.float64: (2e-13, 1e-14)}[dtype]
    with mpmath.workdps(40):
        table = [mpmath.mpf(c) for c in _STIRLING[dtype]]
        for x in [mpmath.mpf(k) / 60 for k in range(1, 61)]:
            z = 1 / x
            value = mpmath.loggamma(z) - (z - 0.5) * mpmath.log(z) + z - mpmath.log(2 * mpmath.pi) / 2
            slope = mpmath.digamma(z) - mpmath.log(z) + x / 2
            found = sum(c * x ** (k + 1) for k, c in enumerate(table))
            found_slope = -sum((k + 1) * c * x ** (k + 2) for k, c in enumerate(table))
            assert abs(found / value - 1) < value_error  # as stated beside the table
            assert abs(found_slope / slope - 1) < slope_error


def test_slopes_have_slopes():
    count = torch.tensor([0.0, 1, 2, 7, 150]).double()

    def function(mean, theta):
        return log_negative_binomial(count, mean, theta)

    mean = torch.tensor([0.4, 2.0, 2.0, 30.0, 100.0]).double().requires_grad_(True)
    theta = torch.tensor([0.3, 0.8, 5.0, 60.0, 2.0]).double().requires_grad_(True)
    assert torch.autograd.gradcheck(function, (mean, theta))
    assert torch.autograd.gradgradcheck(function, (mean, theta))


def test_slopes_are_summed_to_what_broadcasts():
    count = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 9.0]]).double()
    mean = torch.tensor([[0.7], [3.0]]).double().requires_grad_(True)
    theta = torch.tensor([0.2, 1.0, 30.0]).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m, t: log_negative_binomial(count, m, t), (mean, theta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(dtype):
    count = torch.tensor([0.0, 1.0, 1e5, 1e7], dtype=dtype).reshape(-1, 1, 1)
    mean = torch.tensor([0.0, 1e-30, 1e-8, 1.0, 1e8], dtype=dtype).reshape(-1, 1).requires_grad_(True)
    theta = torch.tensor([0.0, 1e-12, 1.0, 1e12], dtype=dtype).requires_grad_(True)
    found = log_negative_binomial(count, mean, theta)
    assert bool(torch.isfinite(found).all())
    assert float(found.detach().max()) <= 0
    for slope in torch.autograd.grad(found.sum(), [mean, theta]):
        assert bool(torch.isfinite(slope).all())


def test_capture_takes_other_counts_than_it_was_made_with():
    generator = torch.Generator().manual_seed(0)
    mean, theta = torch.rand(6, 5, generator=generator) * 4, torch.rand(5, generator=generator) * 3

    def function(count, mean, theta):
        leaves = [x.detach().requires_grad_(True) for x in (mean, theta)]
        value = log_negative_binomial(count, *leaves).sum()
        return value.detach(), *torch.autograd.grad(value, leaves)

    none, some = torch.zeros(6, 5), torch.poisson(mean, generator=generator)
    graph = captured(function, (none, mean, theta))
    for count in (none, some):
        for found, truth in zip(graph(count, mean, theta), function(count, mean, theta), strict=True):
            torch.testing.assert_close(found, truth)


def mixture(shape: tuple[int, ...] = ()) -> NegativeBinomialMixture:
    numbers = (torch.full(shape, x, dtype=torch.float64) for x in (2.0, 25.0, 3.0, -0.4))
    return NegativeBinomialMixture(*numbers)


def test_mixture_is_that_of_scipys_densities():
    count, p = np.arange(80), 1 / (1 + np.exp(0.4))
    low, high = (stats.nbinom.pmf(count, 3.0, 3.0 / (3.0 + mean)) for mean in (2.0, 25.0))
    truth = np.log(p * low + (1 - p) * high)
    np.testing.assert_allclose(mixture().log_prob(torch.tensor(count).double()), truth, rtol=1e-11)


@pytest.mark.parametrize(
    "fn", [NegativeBinomialMean(torch.tensor(4.0), torch.tensor(1.5)), mixture()], ids=["one", "mixture"]
)
def test_draws_have_mean_and_variance(fn):
    n = 100_000
    with seeded(0):
        drawn = fn.sample((n,))
    mean, variance = float(fn.mean), float(fn.variance)
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)  # 4 standard errors
    fourth = float(((drawn - drawn.mean()) ** 4).mean())
    error = ((fourth - variance**2) / n) ** 0.5
    assert float(drawn.var()) == pytest.approx(variance, abs=4 * error)  # the same


@pytest.mark.parametrize("kind", ["one", "mixture"])
def test_shapes_broadcast_and_expand(kind):
    mean, theta = torch.rand(4, 1) + 0.5, torch.rand(3) + 0.5
    if kind == "one":
        fn = NegativeBinomialMean(mean, theta)
    else:
        fn = NegativeBinomialMixture(mean, mean + 3, theta, torch.zeros(()))
    count = torch.tensor([0.0, 2.0, 9.0])
    assert fn.batch_shape == (4, 3)
    assert fn.mean.shape == fn.variance.shape == (4, 3)
    assert fn.sample((7,)).shape == (7, 4, 3)
    wider = fn.expand(torch.Size((2, 4, 3)))
    assert wider.sample().shape == (2, 4, 3)
    torch.testing.assert_close(wider.log_prob(count), fn.log_prob(count).expand(2, 4, 3))
    assert fn.to_event(1).log_prob(count).shape == (4,)
    assert isinstance(fn.to_event(1), dist.Independent)


@pytest.mark.parametrize(
    "made",
    [
        lambda: NegativeBinomialMean(torch.tensor(-1.0), torch.tensor(1.0), validate_args=True),
        lambda: NegativeBinomialMean(torch.tensor(1.0), torch.tensor(0.0), validate_args=True),
    ],
)
def test_what_is_no_parameter_is_refused(made):
    with pytest.raises(ValueError, match="Expected parameter"):
        made()


def test_what_is_no_count_is_refused():
    fn = NegativeBinomialMean(torch.tensor(1.0), torch.tensor(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        fn.log_prob(torch.tensor(-1.0))
