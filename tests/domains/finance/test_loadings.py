"""Moving loadings against a dense Gaussian posterior, and on panels whose loadings are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from domains.finance import loadings
from scivi.errors import DataError


def turning(days: int = 1200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two series, (2, day); the second follows the first by a coefficient that swings between -1 and 1."""
    rng = np.random.default_rng(seed)
    b = np.sin(2 * np.pi * np.arange(days) / 600)
    first, own = rng.standard_normal((2, days))
    return np.stack([first, b * first + 0.5 * own]), b


def panel(values: np.ndarray) -> xr.DataArray:
    coords = {"series": [f"s{k}" for k in range(len(values))], "day": np.arange(values.shape[1])}
    return xr.DataArray(values, coords, ("series", "day"))


def test_coefficients_are_those_of_a_dense_posterior():
    """40 days of 3 series: b of all days is normal, with covariance C + min(s, t) W between two days."""
    rng, days = np.random.default_rng(1), 40
    y = rng.standard_normal((3, days)) * np.array([[1.0], [0.5], [2.0]])
    known, levels = loadings.start(y), []
    prior = known.covariance[2]
    for t in range(days):
        levels.append(known.level[2])
        known = known.after(y[:, t])
    levels = np.array(levels)  # (day, speed)
    t = np.arange(1, days + 1)
    for w in range(len(loadings.SPEEDS)):
        walk = np.minimum(t[:, None], t) * np.ones((2, 1, 1))
        cross = [prior[w, q, q] + known.moves[2, w, q] * walk[q] for q in range(2)]  # of b_q over days
        total = sum(c * np.outer(y[q], y[q]) for q, c in enumerate(cross)) + np.diag(levels[:, w])
        weight = np.linalg.solve(total, y[2])
        wanted = [(cross[q][-1] * y[q]) @ weight for q in range(2)]
        np.testing.assert_allclose(known.mean[2, w], wanted, rtol=1e-9)
        for q in range(2):
            reach = cross[q][-1] * y[q]
            variance = cross[q][-1, -1] - reach @ np.linalg.solve(total, reach)
            np.testing.assert_allclose(known.covariance[2, w, q, q], variance, rtol=1e-9)


def test_a_shock_depends_on_earlier_days_and_earlier_series_alone():
    y = np.random.default_rng(2).standard_normal((4, 260))
    shocks, log_g, _ = loadings.split(panel(y))
    changed = y.copy()
    changed[2:, 200] = 9.0  # series 2 and 3 of one day
    other, its, _ = loadings.split(panel(changed))
    at = 200 - loadings.SETTLE
    for a, b in ((shocks, other), (log_g, its)):
        np.testing.assert_array_equal(a[:, :at], b[:, :at])
        np.testing.assert_array_equal(a[:2, at], b[:2, at])
    np.testing.assert_array_equal(log_g[2, at], its[2, at])
    assert log_g[3, at] != its[3, at]
    assert shocks[3, at] != other[3, at]


def test_loadings_that_turn_are_followed():
    """A loading that moves through 2 in 300 days; uncorrelated shocks: |r| < 4 / sqrt(1100) = .12."""
    y, b = turning()
    known, found = loadings.start(y[:, : loadings.SETTLE]), []
    for t in range(y.shape[1]):
        found.append(known.matrix()[1, 0])
        known = known.after(y[:, t])
    late = slice(200, None)
    error = np.sqrt(np.mean((np.array(found) - b)[late] ** 2))
    still = np.sqrt(np.mean((b[late] - (y[0] @ y[1]) / (y[0] @ y[0])) ** 2))
    assert error < 0.25 < still
    shocks, _, _ = loadings.split(panel(y))
    assert abs(np.corrcoef(shocks[0] * shocks[0].std(), shocks[1])[0, 1]) < 0.12
    assert float(shocks[1].std()) < 0.6  # .5 without any error of the loading; .86 with a constant one


def test_a_few_factors_load_on_all():
    rng = np.random.default_rng(3)
    factor = rng.standard_normal(600)
    y = np.stack([factor, *(0.8 * factor + 0.6 * rng.standard_normal((5, 600)))])
    _, _, known = loadings.split(panel(y), factors=1)
    assert known.mean.shape == (6, len(loadings.SPEEDS), 1)
    matrix = known.matrix()
    np.testing.assert_allclose(np.diag(matrix), 1.0)
    np.testing.assert_allclose(matrix[1:, 1:], np.eye(5), atol=1e-12)
    assert (np.abs(matrix[1:, 0] - 0.8) < 0.2).all()


def test_paths_have_the_loadings_covariance():
    """20,000 paths: 4 standard errors of a covariance, 4 sqrt((s_ii s_jj + s_ij^2) / n)."""
    y, _ = turning(400)
    third = 0.3 * y[0] - 0.6 * y[1] + 0.2 * np.random.default_rng(4).standard_normal(400)
    _, _, known = loadings.split(panel(np.stack([*y, third])))
    calm = {"covariance": 0 * known.covariance, "moves": 0 * known.moves, "unrest": 1.0}
    known = replace(known, **calm)  # nothing but the means
    heavy = known.weight.argmax(-1)
    known = replace(known, log_weight=np.where(np.arange(len(loadings.SPEEDS)) == heavy[:, None], 0.0, -1e3))
    sd = np.array([1.0, 0.5, 0.2])
    rng = np.random.default_rng(5)
    paths = known.returns(rng.standard_normal((20_000, 3, 1)) * sd[:, None], rng)
    wanted = known.matrix() @ np.diag(sd**2) @ known.matrix().T
    error = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / 20_000)
    assert (np.abs(np.cov(paths[..., 0].T) - wanted) < 4 * error).all()


def test_unrest_is_common_and_passes():
    """Six quiet series, all three times as large from day 250 on: scales of all follow within a week."""
    y = np.random.default_rng(6).standard_normal((6, 400))
    y[:, 250:] *= 3
    _, log_g, known = loadings.split(panel(y))
    at = 250 - loadings.SETTLE
    before, soon = (log_g[:, days].values for days in (slice(at - 40, at), slice(at + 3, at + 8)))
    risen = soon.mean(-1) - before.mean(-1)
    assert (risen > 0.25).all()
    assert np.ptp(risen) < 0.2  # what is left is the loadings' own
    assert 0.5 < known.unrest < 2.0  # months later s knows it, too
    flat = replace(known, unrest=4.0)
    paths = flat.returns(np.zeros((3, 6, 2)), np.random.default_rng(7))
    np.testing.assert_allclose(paths, 0.0)
    assert replace(known, unrest=4.0).after(np.full(6, np.nan)).unrest == 4.0


def test_a_missing_return_is_no_shock_and_teaches_nothing():
    y, _ = turning(300)
    gaps = y.copy()
    gaps[1, 250] = gaps[0, 260] = np.nan
    shocks, log_g, known = loadings.split(panel(gaps))
    at = np.array([250, 260]) - loadings.SETTLE
    assert np.isnan(shocks[1, at[0]])
    assert np.isnan(shocks[0, at[1]])
    assert np.isfinite(shocks).sum() == shocks.size - 2
    assert np.isfinite(log_g).all()
    assert np.isfinite(known.mean).all()
    # the first series is unknown, and foretold to be 0: so is the second
    assert float(shocks[1, at[1]] * np.exp(log_g[1, at[1]])) == pytest.approx(y[1, 260])


@pytest.mark.parametrize(
    ("values", "match"), [(np.ones((2, 150)), "200 days"), (np.zeros((2, 300)), "do not move")]
)
def test_panels_that_cannot_be_taken_apart_are_refused(values, match):
    with pytest.raises(DataError, match=match):
        loadings.split(panel(values))
