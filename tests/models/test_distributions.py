from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import integrate, special, stats

from scivi.models.binding import seeded
from scivi.models.distributions import PoissonOverBackground

CASES = [
    (3.0, 4.0, 2.0),
    (0.05, 1.0, 30.0),
    (40.0, 121.0, 6.0),
    (7.0, 0.5, 0.4),
    (250.0, 3.0, 1.5),
    (1.0, 900.0, 9.0),
]


def double(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def made(rate: float, shape: float, inverse_scale: float, **knobs) -> PoissonOverBackground:
    return PoissonOverBackground(*(double(x) for x in (rate, shape, inverse_scale)), **knobs)


def by_convolution(n: int, rate: float, shape: float, inverse_scale: float) -> float:
    """Log of the sum over background counts, from scipy's two mass functions."""
    k = np.arange(n + 1)
    background = stats.nbinom.logpmf(k, shape, inverse_scale / (1 + inverse_scale))
    return float(special.logsumexp(background + stats.poisson.logpmf(n - k, rate)))


def counts_of_note(rate: float, shape: float, inverse_scale: float) -> list[int]:
    """Zero, and counts from the median to six sd either side."""
    mean = rate + shape / inverse_scale
    sd = (rate + shape / inverse_scale * (1 + 1 / inverse_scale)) ** 0.5
    return sorted({0, *(max(0, int(mean + x * sd)) for x in (-6, -3, -1, 0, 1, 3, 6))})


@pytest.mark.parametrize("case", CASES)
def test_log_prob_is_the_convolution_of_scipys_mass_functions(case):
    counts = counts_of_note(*case)
    found = made(*case).log_prob(torch.tensor(counts).double())
    truth = [by_convolution(n, *case) for n in counts]
    np.testing.assert_allclose(found, truth, rtol=1e-10, atol=1e-10)  # float64: log gammas of up to 1e4


@pytest.mark.parametrize("case", CASES[:4])
def test_log_prob_is_the_integral_over_the_background(case):
    rate, shape, inverse_scale = case
    gamma = stats.gamma(shape, scale=1 / inverse_scale)
    for n in counts_of_note(*case)[1:4]:
        ends = gamma.ppf([0.0, 0.2, 0.5, 0.8, 1 - 1e-14])
        truth = sum(
            integrate.quad(
                lambda b, n=n: stats.poisson.pmf(n, rate + b) * gamma.pdf(b), lo, hi, epsabs=0, epsrel=1e-10
            )[0]
            for lo, hi in pairwise(ends)
        )
        found = float(made(*case).log_prob(torch.tensor(float(n)).double()).exp())
        assert found == pytest.approx(
            truth, rel=1e-7
        )  # of the quadrature, at a density that may have a pole at 0


@pytest.mark.parametrize("case", CASES)
def test_probabilities_sum_to_one_and_have_the_mean(case):
    top = counts_of_note(*case)[-1] * 3 + 60
    n = torch.arange(top + 1).double()
    p = made(*case).log_prob(n).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)  # what lies beyond 18 sd, and rounding
    assert float((n * p).sum()) == pytest.approx(float(made(*case).mean), rel=1e-8)
    assert float(made(*case).mean) == pytest.approx(case[0] + case[1] / case[2])


@pytest.mark.parametrize("case", CASES)
def test_draws_have_mean_and_variance(case):
    rate, shape, inverse_scale = case
    variance = rate + shape / inverse_scale * (1 + 1 / inverse_scale)  # Poisson plus negative binomial
    with seeded(0):
        drawn = made(*case).sample((100_000,))
    assert drawn.shape == (100_000,)
    error = (variance / 100_000) ** 0.5
    assert float(drawn.mean()) == pytest.approx(float(made(*case).mean), abs=4 * error)  # 4 standard errors
    fourth = float(((drawn - drawn.mean()) ** 4).mean())
    error = ((fourth - variance**2) / 100_000) ** 0.5
    assert float(drawn.var()) == pytest.approx(variance, abs=4 * error)  # the same


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_finite_difference(case):
    counts = torch.tensor(counts_of_note(*case)).double()
    rate = double(case[0]).requires_grad_(True)
    fn = PoissonOverBackground(rate, *(double(x) for x in case[1:]))
    (slope,) = torch.autograd.grad(fn.log_prob(counts).sum(), rate)
    h = 1e-4 * case[0]
    up, down = (sum(by_convolution(int(n), case[0] + s * h, *case[1:]) for n in counts) for s in (1, -1))
    assert float(slope) == pytest.approx(
        (up - down) / (2 * h), rel=1e-6, abs=1e-7
    )  # second order in h, 1e-8 relative


def test_parameters_broadcast_and_each_count_has_its_own():
    rate = torch.tensor([[0.5], [4.0]]).double()
    shape, inverse_scale = torch.tensor([1.0, 3.0, 50.0]).double(), torch.tensor([10.0, 2.0, 8.0]).double()
    fn = PoissonOverBackground(rate, shape, inverse_scale)
    assert fn.batch_shape == (2, 3)
    count = torch.tensor([0.0, 2.0, 9.0]).double()
    found = fn.log_prob(count)
    for i in range(2):
        for j in range(3):
            truth = by_convolution(int(count[j]), float(rate[i]), float(shape[j]), float(inverse_scale[j]))
            assert float(found[i, j]) == pytest.approx(truth, abs=1e-10)
    wider = fn.expand(torch.Size((5, 2, 3)))
    assert wider.sample().shape == (5, 2, 3)
    torch.testing.assert_close(wider.log_prob(count), found.expand(5, 2, 3))


def test_a_known_largest_count_changes_nothing():
    count = torch.tensor([0.0, 3.0, 12.0]).double()
    torch.testing.assert_close(
        made(3.0, 4.0, 2.0, most=12).log_prob(count), made(3.0, 4.0, 2.0).log_prob(count)
    )


def test_a_missing_count_weighs_nothing_and_hurts_no_gradient():
    rate = torch.ones(3).double().requires_grad_(True)
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("source", 3):
            fn = PoissonOverBackground(rate, torch.ones(3).double(), torch.ones(3).double())
            pyro.sample("n", fn.mask(mask), obs=torch.tensor([2.0, 0.0, 5.0]).double())

    total = poutine.trace(model).get_trace().log_prob_sum()
    assert float(total.detach()) == pytest.approx(
        by_convolution(2, 1.0, 1.0, 1.0) + by_convolution(5, 1.0, 1.0, 1.0)
    )
    (slope,) = torch.autograd.grad(total, rate)
    assert float(slope[1]) == 0.0
    assert bool(torch.isfinite(slope).all())


FAINT = [  # counts far above what source and background are expected to give, and some that are not
    (n, rate, shape, inverse_scale)
    for n in (50, 200, 1000)
    for rate in (1e-6, 1e-2, 3.0, 1e3)
    for shape in (0.5, 1.0, 4.0)
    for inverse_scale in (1.0, 30.0, 3000.0)
]


def slope_by_convolution(n: int, rate: float, shape: float, inverse_scale: float) -> float:
    """Derivative of log p(n) by the log of the rate: what of the source is expected in n, less the rate."""
    k = np.arange(n + 1)
    background = stats.nbinom.logpmf(k, shape, inverse_scale / (1 + inverse_scale))
    weight = special.softmax(background + stats.poisson.logpmf(n - k, rate))
    return float(weight @ (n - k)) - rate


@pytest.mark.parametrize(
    ("dtype", "value_error", "slope_error"), [(torch.float32, 2e-6, 5e-4), (torch.float64, 1e-10, 1e-10)]
)
def test_counts_far_above_their_rate_have_the_background_they_need(dtype, value_error, slope_error):
    n, rate, shape, inverse_scale = torch.tensor(FAINT, dtype=dtype).unbind(1)
    log_rate = rate.log().requires_grad_(True)
    found = PoissonOverBackground(log_rate.exp(), shape, inverse_scale).log_prob(n)
    (slope,) = torch.autograd.grad(found.sum(), log_rate)
    columns = (x.detach().double().tolist() for x in (log_rate.exp(), shape, inverse_scale))
    cases = list(zip(map(int, n), *columns, strict=True))
    truth, slopes = ([of(*case) for case in cases] for of in (by_convolution, slope_by_convolution))
    np.testing.assert_allclose(found.detach(), truth, rtol=value_error)  # rounding of log(rate / n)
    # the terms have the size n log(n / rate), of which float32 keeps 6e-8; a slope of 0 is a difference
    np.testing.assert_allclose(slope, slopes, rtol=slope_error, atol=4e3 * torch.finfo(dtype).eps)


def test_in_single_precision_bright_sources_keep_their_digits():
    for rate, n in ((1e3, 1000), (1e5, 100_300)):
        fn = PoissonOverBackground(torch.tensor(rate), torch.tensor(20.0), torch.tensor(5.0))
        # what is left to float32 is n log(rate / n) + n - rate, with 6e-8 of n in each part
        assert float(fn.log_prob(torch.tensor(float(n)))) == pytest.approx(
            by_convolution(n, rate, 20.0, 5.0), abs=1e-6 + 1.2e-7 * n
        )


def test_what_is_no_count_is_refused():
    with pytest.raises(ValueError, match="support"):
        made(3.0, 4.0, 2.0, validate_args=True).log_prob(torch.tensor(-1.0).double())
