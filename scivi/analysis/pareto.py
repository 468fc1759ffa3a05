"""Pareto-smoothed importance weights for many rows at once.

ArviZ has the same for one series at a time (a millisecond each); a catalogue has 1e5 of them. The numbers are
the same: a test holds the two together.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from scivi.errors import DataError

MIN_DRAWS = 25  # a tail of five, the fewest that ArviZ fits
EQUAL = 1e-3  # largest weights nearer than this, relatively, are equal: rounding too makes tails (our choice)
_PRIOR_B, _PRIOR_K = 3.0, 10.0  # Zhang & Stephens 2009; prior on k: Vehtari et al. 2024; both as in ArviZ


def tail_length(draws: int) -> int:
    """Number of largest weights fitted: 3 sqrt(S), or S / 5 for few draws (Vehtari et al. 2024)."""
    return int(3 * draws**0.5) if draws > 225 else draws // 5


def fit_tail(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a generalised Pareto distribution to each row of excesses over a threshold.

    Empirical Bayes on the profile likelihood, with a weak prior on k at 0.5 worth ten draws.

    Args:
        excess: (row, M), each row ascending, > 0 somewhere.

    Returns:
        Shape k and scale sigma, (row,).

    References:
        Zhang, Stephens (2009), Technometrics 51:316, doi:10.1198/tech.2009.08017.
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72), arXiv:1507.02646.
    """
    n = excess.shape[-1]
    m = 30 + int(n**0.5)
    quartile, largest = excess[:, int(n / 4 + 0.5) - 1], excess[:, -1]
    quartile = np.where(quartile > 0, quartile, excess.mean(-1))  # ties at the threshold (rounded weights)
    spread = 1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))
    b = spread / (_PRIOR_B * quartile[:, None]) + 1 / largest[:, None]  # (row, m)
    k = np.empty_like(b)
    for j in range(m):  # a loop over 30-50 grid points holds (row, M) at once, not (row, m, M)
        k[:, j] = np.log1p(-b[:, j, None] * excess).mean(-1)
    profile = n * (np.log(-b / k) - k - 1)
    weight = np.exp(profile - np.asarray(logsumexp(profile, axis=-1, keepdims=True)))
    weight = np.where(weight >= 10 * np.finfo(float).eps, weight, 0.0)
    b = (b * weight).sum(-1) / weight.sum(-1)
    shape = np.log1p(-b[:, None] * excess).mean(-1)
    return (n * shape + _PRIOR_K * 0.5) / (n + _PRIOR_K), -shape / b


def smooth(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smooth each row of log weights.

    The M largest weights are replaced by the quantiles of the generalised Pareto distribution fitted to them,
    cut at the largest raw weight; then each row is normalised to sum(exp) = 1.

    Args:
        log_weights: (row, draw); -inf is a draw of no weight.

    Returns:
        Normalised log weights (row, draw) and k-hat (row,). A row whose largest weights are equal has k-hat
        0: the guide is exact there. A row with NaN or +inf has k-hat inf and NaN weights.

    Raises:
        DataError: fewer than 25 draws.
    """
    draws = log_weights.shape[-1]
    if draws < MIN_DRAWS:
        raise DataError(
            f"{draws} draws per row; Pareto k-hat needs at least {MIN_DRAWS}. Draw again with more draws."
        )
    raw = np.array(log_weights, np.float64)
    broken = ~np.isfinite(raw.max(-1)) | np.isnan(raw).any(-1)
    raw[broken] = 0.0
    raw -= raw.max(-1, keepdims=True)
    m = tail_length(draws)
    order = np.argpartition(raw, draws - m - 1, axis=-1)[:, draws - m - 1 :]
    order = np.take_along_axis(
        order, np.argsort(np.take_along_axis(raw, order, -1), axis=-1, kind="stable"), -1
    )
    tail = np.take_along_axis(raw, order, -1)
    cutoff = np.exp(tail[:, :1])
    excess = np.exp(tail[:, 1:]) - cutoff
    flat = excess[:, -1] <= EQUAL  # relative to the largest weight, 1
    excess[flat] = 1.0
    with np.errstate(all="ignore"):
        k, sigma = fit_tail(excess)
        prob = (np.arange(m) + 0.5) / m
        quantile = np.log(cutoff + sigma[:, None] * np.expm1(-k[:, None] * np.log1p(-prob)) / k[:, None])
    smoothed = np.where(np.isfinite(quantile) & ~flat[:, None], np.minimum(quantile, 0.0), tail[:, 1:])
    np.put_along_axis(raw, order[:, 1:], smoothed, -1)
    raw -= logsumexp(raw, axis=-1, keepdims=True)
    raw[broken] = np.nan
    k = np.where(flat, 0.0, np.where(np.isfinite(k), k, np.inf))
    return raw, np.where(broken, np.inf, k)


def effective_size(log_weights: np.ndarray) -> np.ndarray:
    """Importance-sampling effective size 1 / sum(w^2) of normalised log weights, (..., draw) -> (...)."""
    return np.exp(-np.asarray(logsumexp(2 * log_weights, axis=-1)))
