import numpy as np
import pytest
from scipy import integrate, stats

from domains.finance import scores


def test_crps_of_samples_is_the_double_sum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 50)), rng.normal(size=3)
    w = rng.dirichlet(np.ones(50), size=3)
    apart = np.abs(x[:, :, None] - x[:, None, :])
    brute = (w * np.abs(x - y[:, None])).sum(-1) - 0.5 * np.einsum("si,sj,sij->s", w, w, apart)
    np.testing.assert_allclose(scores.crps(x, y, w), brute, rtol=1e-12)
    equal = np.abs(x - y[:, None]).mean(-1) - 0.5 * apart.mean((-1, -2))
    np.testing.assert_allclose(scores.crps(x, y), equal, rtol=1e-12)


def test_crps_of_quantiles_is_the_integral_over_the_line():
    # The definition, integral of (F(x) - 1{y <= x})^2; 4000 quantiles leave 1e-4 of the unit (mean pinball).
    t, probs = stats.t(5), (np.arange(4000) + 0.5) / 4000
    y = np.array([-3.0, 0.2, 1.5])
    exact = [
        integrate.quad(lambda x: t.cdf(x) ** 2, -np.inf, at)[0]
        + integrate.quad(lambda x: t.sf(x) ** 2, at, np.inf)[0]
        for at in y
    ]
    quantiles = np.broadcast_to(t.ppf(probs), (3, 4000))
    np.testing.assert_allclose(scores.crps_of_quantiles(quantiles, probs, y), exact, atol=2e-4)
    np.testing.assert_allclose(scores.crps(quantiles, y), exact, atol=2e-4)


@pytest.mark.parametrize(("n", "k", "level"), [(1000, 10, 0.01), (1000, 22, 0.01), (250, 3, 0.05)])
def test_kupiec_is_the_ratio_of_binomials(n, k, level):
    hits = np.arange(n) < k
    ratio = 2 * (stats.binom.logpmf(k, n, k / n) - stats.binom.logpmf(k, n, level))
    found = scores.kupiec(hits, level)
    assert found.statistic == pytest.approx(ratio, abs=1e-9)
    assert found.p == pytest.approx(stats.chi2.sf(ratio, 1), abs=1e-9)


def test_kupiec_of_no_hit_is_finite():
    assert scores.kupiec(np.zeros(500, bool), 0.01).statistic == pytest.approx(-1000 * np.log(0.99))


def test_christoffersen_is_the_g_test_of_today_against_yesterday():
    hits = np.random.default_rng(1).random(600) < 0.06
    hits[100:110] = True
    table = np.array([[(~hits[:-1] & ~hits[1:]).sum(), (~hits[:-1] & hits[1:]).sum()],
                      [(hits[:-1] & ~hits[1:]).sum(), (hits[:-1] & hits[1:]).sum()]])  # fmt: skip
    expected = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
    found = scores.christoffersen(hits)
    assert found.statistic == pytest.approx(expected[0], rel=1e-9)
    assert found.p == pytest.approx(expected[1], rel=1e-6)
    assert scores.christoffersen(np.zeros(600, bool)).p == 1.0


def test_tests_reject_as_often_as_they_say():
    # Of 2000 right forecasts about 5 % are below p = .05: counts are discrete, so between 3 and 8 %.
    rng = np.random.default_rng(2)
    hits = rng.random((2000, 1000)) < 0.05
    for p in ([scores.kupiec(h, 0.05).p for h in hits], [scores.christoffersen(h).p for h in hits]):
        assert 0.03 < np.mean(np.array(p) < 0.05) < 0.08


def test_fz0_by_hand_and_least_at_the_truth():
    # -1 / (.05 x -3) x 1 x (-2 + 4) + -2 / -3 + ln 3 - 1
    by_hand = 2 / 0.15 + 2 / 3 + np.log(3) - 1
    assert scores.fz0(np.array([-4.0]), np.array([-2.0]), np.array([-3.0]), 0.05)[0] == pytest.approx(by_hand)
    level, law = 0.05, stats.norm()
    risk, shortfall = law.ppf(level), -law.pdf(law.ppf(level)) / level

    def loss(v, e):
        return integrate.quad(
            lambda y: law.pdf(y) * float(scores.fz0(np.array(y), np.array(v), np.array(e), level)),
            -9,
            9,
            points=[v],
        )[0]

    best = loss(risk, shortfall)
    for step in (-0.1, 0.1):
        assert loss(risk + step, shortfall) > best + 1e-4
        assert loss(risk, shortfall + step) > best + 1e-4
    assert np.isnan(scores.fz0(np.array([0.0]), np.array([1.0]), np.array([0.5]), level)).all()


def test_uniformity_tells_forecasts_that_are_too_narrow():
    y = np.random.default_rng(3).normal(size=2000)
    right, narrow = (scores.uniformity(stats.norm(0, sd).cdf(y)) for sd in (1.0, 0.8))
    assert right.p > 0.01
    assert right.sd == pytest.approx(y.std(), rel=1e-6)
    assert narrow.p < 1e-6
    assert narrow.sd == pytest.approx(y.std() / 0.8, rel=1e-3)
    assert narrow.share.sum() == pytest.approx(1.0)
    assert narrow.share[[0, -1]].min() > 0.12
