"""Loadings that move: a panel of returns taken apart into shocks that are uncorrelated, day by day.

For day t and series k in their order, the first ``factors`` of which load on those that follow,

    y_kt     = sum_(j < k, j < factors) b_kjt y_jt + u_kt
    b_kj,t+1 = b_kjt + (c_k / c_j) w_k^(1/2) noise

which is y_t = Lambda_t u_t with unit lower-triangular loadings Lambda_t: the shocks of the first series are
the factors, those of the others what is their own. c are the sds of the first days. A day's b are known from
the days before (Kalman's filter, for each of some speeds w; speeds are averaged by how well they foresaw the
last days), and its shock is standardised,

    u_kt = (y_kt - E b_kt' y_<kt) / g_kt,      g_kt^2 = e_t^a (1 + Var(b_kt' y_<kt) / s_kt),

with s a moving mean of the squares of the numerator, over months, and e that of their ratios to s, over all
series and few days: when all are restless at once, this shows in e long before it would in each by itself.
All depend on earlier days and earlier series alone, so that

    log p(y_t | past) = sum_k log p(u_kt | past) - log g_kt

holds whatever model the shocks are given: here, stochastic volatility. Correlations of the returns move with
the loadings and with the shocks' volatilities; those of the order are the user's choice.

A missing return is no shock; to the series after it, it is what the loadings foretell.

References:
    West and Harrison 1997, Bayesian Forecasting and Dynamic Models, chapter 4.
    Raftery, Karny and Ettler 2010, Technometrics 52, 52, doi:10.1198/TECH.2009.08104 (speeds averaged).
    Lopes, McCulloch and Tsay 2022, Journal of Econometrics 230, 39 (the triangle with stochastic volatility).
    Zhao, Xie and West 2016, Applied Stochastic Models in Business and Industry 32, 311.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from scivi.errors import DataError

SPEEDS = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # w: a loading moves by .03 to .5 c_k / c_j in a year
FORGETTING = 0.99  # of a speed's past forecasts, a day; Raftery, Karny and Ettler's
LEVEL = 0.95  # of s, a day: a memory of a month, nearly RiskMetrics' .94
# Of e, a day, and its power a. Chosen on ten stocks to 2009 and exchange rates to 2008, whose last days gain
# .11 and .007 nats; .9 would do as well on the latter, and a = 1 on neither.
COMMON, POWER = 0.8, 0.6
SETTLE = 100  # first days, of which loadings know too little
_FARTHEST = 4.0  # sd beyond which a shock moves s no further
_NU = 8.0  # degrees of freedom by which speeds are weighed (our choice, far from a normal's)


@dataclass(frozen=True)
class Loadings:
    """What is known of b at the end of a day, for K series, W speeds and q = min(factors, K - 1).

    Args:
        mean: (K, W, q); 0 where j >= k.
        covariance: (K, W, q, q).
        moves: variance of a day's move, (K, W, q).
        log_weight: of the speeds, (K, W).
        level: s, (K, W).
        unrest: e.
    """

    mean: np.ndarray
    covariance: np.ndarray
    moves: np.ndarray
    log_weight: np.ndarray
    level: np.ndarray
    unrest: float = 1.0

    @property
    def weight(self) -> np.ndarray:
        """Of the speeds, of sum 1, (K, W)."""
        weight = np.exp(self.log_weight - self.log_weight.max(-1, keepdims=True))
        return weight / weight.sum(-1, keepdims=True)

    def matrix(self) -> np.ndarray:
        """Lambda at the mean of b, (K, K)."""
        n = len(self.mean)
        b = np.zeros((n, n))
        b[:, : self.mean.shape[-1]] = np.einsum("kw,kwq->kq", self.weight, self.mean)
        return np.linalg.inv(np.eye(n) - b)

    def _given(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each series is regressed on (K, q), and the returns with nothing missing (K,)."""
        n, q = len(y), self.mean.shape[-1]
        if not np.isfinite(y).all():
            b, y = np.einsum("kw,kwq->kq", self.weight, self.mean), y.copy()
            for k in np.flatnonzero(~np.isfinite(y)):
                y[k] = b[k] @ np.where(np.arange(q) < k, y[:q], 0.0)
        return np.where(np.arange(q) < np.arange(n)[:, None], y[:q], 0.0), y

    def _foretold(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """P x (K, W, q), x' P x and the expected return (K, W), with P the covariance of the day."""
        reached = np.einsum("kwpq,kq->kwp", self.covariance, x) + self.moves * x[:, None]
        return reached, np.einsum("kwp,kp->kw", reached, x), np.einsum("kwq,kq->kw", self.mean, x)

    def _residual(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Y less what was expected of it, the variance of that, and s, (K,) each."""
        _, spread, each = self._foretold(x)
        weight = self.weight
        mean = (weight * each).sum(-1)
        spread = (weight * (spread + (each - mean[:, None]) ** 2)).sum(-1)
        return y - mean, spread, (weight * self.level).sum(-1)

    def shocks(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of tomorrow's returns y (K,): u and log g, (K,); NaN and 0 where there is none."""
        residual, spread, level = self._residual(self._given(y)[0], y)
        log_g = 0.5 * (np.log1p(spread / level) + POWER * np.log(self.unrest))
        return residual * np.exp(-log_g), np.where(np.isfinite(y), log_g, 0.0)

    def after(self, y: np.ndarray) -> Loadings:
        """What is known once a day's returns (K,) are; NaN where there is none."""
        x, full = self._given(y)
        there = np.isfinite(y)[:, None]
        reached, spread, each = self._foretold(x)
        total, error = spread + self.level, full[:, None] - each
        square = error**2 / total
        log_p = -0.5 * np.log(total) - 0.5 * (_NU + 1) * np.log1p(square / (_NU - 2))
        gain = np.where(there, 1 / total, 0.0)
        covariance = self.covariance.copy()
        np.einsum("kwqq->kwq", covariance)[...] += self.moves
        covariance -= gain[..., None, None] * reached[..., :, None] * reached[..., None, :]
        moved = (1 - LEVEL) * self.level * (np.minimum(square, _FARTHEST**2) - 1)
        residual, variance, level = self._residual(x, y)
        return replace(
            self,
            mean=self.mean + (gain * error)[..., None] * reached,
            covariance=covariance,
            log_weight=FORGETTING * self.log_weight + np.where(there, log_p, 0.0),
            level=self.level + np.where(there, moved, 0.0),
            unrest=float(_restless(self.unrest, residual**2 / (variance + level))),
        )

    def returns(self, shocks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns along paths of shocks (path, K, horizon), with b and e of each path moving on; s stays."""
        count, n, horizon = shocks.shape
        q, found = self.mean.shape[-1], np.empty_like(shocks)
        edges = self.weight.cumsum(-1)
        pick = (rng.random((count, n, 1)) * edges[:, -1:] > edges).sum(-1)  # a speed, (path, K)
        row = np.arange(n)
        root = np.linalg.cholesky(self.covariance + 1e-12 * np.eye(q))
        b = self.mean[row, pick] + np.einsum(
            "pkab,pkb->pka", root[row, pick], rng.standard_normal((count, n, q))
        )
        step, unrest = np.sqrt(self.moves)[row, pick], np.full(count, self.unrest)
        level = (self.weight * self.level).sum(-1)
        for h in range(horizon):
            b = b + step * rng.standard_normal((count, n, q))
            own = shocks[:, :, h] * unrest[:, None] ** (0.5 * POWER)
            for k in range(n):
                j = min(k, q)
                found[:, k, h] = own[:, k] + (b[:, k, :j] * found[:, :j, h]).sum(-1)
            unrest = _restless(unrest, own**2 / level)
        return found


def _restless(unrest: np.ndarray | float, square: np.ndarray) -> np.ndarray:
    """E after a day with squares over s, (*, K); NaN where there is none. A day without any leaves it."""
    there = np.isfinite(square)
    total = np.where(there, np.minimum(square, _FARTHEST**2), 0.0).sum(-1)
    count = there.sum(-1)
    return np.where(count > 0, COMMON * unrest + (1 - COMMON) * total / np.maximum(count, 1), unrest)


def start(returns: np.ndarray, factors: int | None = None) -> Loadings:
    """Loadings of which nothing is known yet: of mean 0, sd c_k / c_j.

    Args:
        returns: of the first days, (K, day), for the scales c.
        factors: how many of the series, from the first, load on others; None for all.

    Raises:
        DataError: series without any movement in these days.
    """
    n = len(returns)
    c = np.sqrt(np.nanmean(returns**2, -1))
    if not (c > 0).all():
        raise DataError(f"series {np.flatnonzero(~(c > 0)).tolist()} do not move in the first days.")
    q = min(n - 1, n - 1 if factors is None else factors)
    ratio = np.where(np.arange(q) < np.arange(n)[:, None], (c[:, None] / c[:q]) ** 2, 0.0)
    shape = (n, len(SPEEDS))
    return Loadings(
        mean=np.zeros((*shape, q)),
        covariance=np.broadcast_to((ratio[:, :, None] * np.eye(q))[:, None], (*shape, q, q)).copy(),
        moves=np.asarray(SPEEDS)[None, :, None] * ratio[:, None],
        log_weight=np.zeros(shape),
        level=np.broadcast_to(c[:, None] ** 2, shape).copy(),
    )


def split(returns: xr.DataArray, factors: int | None = None) -> tuple[xr.DataArray, xr.DataArray, Loadings]:
    """Shocks of all days after the first, and what is then known of the loadings.

    Args:
        returns: percent, (series, day).
        factors: how many of the series, from the first, load on others; None for all.

    Returns:
        Shocks in percent and log g, both (series, day) from the day ``SETTLE`` on, and the loadings.

    Raises:
        DataError: days too few, or series that do not move.
    """
    y = returns.transpose("series", "day").values.astype(float)
    if y.shape[1] < 2 * SETTLE:
        raise DataError(f"loadings need {2 * SETTLE} days; there are {y.shape[1]}.")
    known, found = start(y[:, :SETTLE], factors), []
    for t in range(y.shape[1]):
        if t >= SETTLE:
            found.append(known.shocks(y[:, t]))
        known = known.after(y[:, t])
    shocks, log_g = (np.stack(part, -1) for part in zip(*found, strict=True))
    like = returns.transpose("series", "day").isel(day=slice(SETTLE, None))
    return like.copy(data=shocks), like.copy(data=log_g), known
