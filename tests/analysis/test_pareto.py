from __future__ import annotations

import numpy as np
import pytest

from scivi.analysis import pareto
from scivi.errors import DataError


@pytest.mark.parametrize("draws", [50, 200, 1000, 4000])
def test_rows_agree_with_arviz_one_by_one(draws):
    from arviz_stats.base.array import array_stats

    rng = np.random.default_rng(0)
    log_weight = rng.standard_t(5, size=(8, draws)) * np.linspace(0.1, 2, 8)[:, None]
    smoothed, k_hat = pareto.smooth(log_weight)
    for i in range(8):
        theirs, k = array_stats.psislw(-log_weight[i])
        np.testing.assert_allclose(k_hat[i], k, rtol=0, atol=1e-10)  # same formula, sums in another order
        np.testing.assert_allclose(smoothed[i], theirs, rtol=0, atol=1e-9)  # the same, through expm1 and log


@pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
def test_shape_of_an_exact_pareto_tail_is_found(k):
    log_weight = k * np.random.default_rng(1).exponential(
        size=(20, 20_000)
    )  # exp of it is Pareto with shape k
    _, k_hat = pareto.smooth(log_weight)
    # sd of one: (1 + k) / sqrt(424 in the tail) <= 0.1; three sd of a mean of 20; the prior pulls by 10 / 434
    np.testing.assert_allclose(k_hat.mean(), k, atol=3 * 0.1 / 20**0.5 + 0.02)


def test_weights_are_normalised_and_effective_size_is_right():
    smoothed, _ = pareto.smooth(np.random.default_rng(2).normal(size=(3, 500)))
    np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1, rtol=1e-12)  # float64 sum of 500
    np.testing.assert_allclose(pareto.effective_size(np.log(np.full((1, 8), 1 / 8))), 8, rtol=1e-12)


def test_equal_weights_mean_an_exact_guide():
    smoothed, k_hat = pareto.smooth(np.full((1, 100), -3.0))
    assert k_hat == 0
    np.testing.assert_allclose(pareto.effective_size(smoothed), 100, rtol=1e-12)


def test_rounding_has_no_tail():
    """Weights of an exact guide in single precision differ by rounding, whatever its distribution is."""
    rounding = 3e-5 * np.random.default_rng(0).standard_cauchy((50, 1000)).clip(-10, 10)
    smoothed, k_hat = pareto.smooth(rounding)
    assert (k_hat == 0).all()
    np.testing.assert_allclose(pareto.effective_size(smoothed), 1000, rtol=1e-6)


def test_weights_of_zero_and_rounded_weights_are_finite():
    rng = np.random.default_rng(3)
    zeros = np.r_[np.full(50, -np.inf), rng.normal(size=150)]
    rounded = np.round(0.2 * rng.normal(size=200), 1)  # ties throughout, also at the threshold
    smoothed, k_hat = pareto.smooth(np.stack([zeros, rounded]))
    assert np.isfinite(k_hat).all()
    assert not np.isnan(smoothed).any()


def test_nan_is_reported_as_the_worst_not_passed_over():
    smoothed, k_hat = pareto.smooth(np.array([np.r_[np.nan, np.zeros(99)], np.r_[np.inf, np.zeros(99)]]))
    assert np.isposinf(k_hat).all()
    assert np.isnan(smoothed).all()


def test_too_few_draws_are_refused():
    with pytest.raises(DataError, match="10 draws per row; Pareto k-hat needs at least 25"):
        pareto.smooth(np.zeros((1, 10)))
