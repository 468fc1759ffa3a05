"""How good are forecasts of returns: scores of distributions, and tests of value at risk.

For a day with return y, forecast distribution F, value at risk v (the quantile of level a, a return and so
usually negative) and expected shortfall e (the mean return below it):

    CRPS   E|Y - y| - E|Y - Y'| / 2,   Y and Y' independent, of F
    FZ0    -1{y <= v} (v - y) / (a e) + v / e + log(-e) - 1
    PIT    F(y), uniform if forecasts are right

Smaller is better. The tests look at the days on which the return fell short of v: Kupiec's at how many,
Christoffersen's at whether one follows another more often than chance has it.

References:
    Gneiting and Raftery 2007, JASA 102, 359, doi:10.1198/016214506000001437 (CRPS, equation 21).
    Patton, Ziegel and Chen 2019, Journal of Econometrics 211, 388, doi:10.1016/j.jeconom.2018.10.008 (FZ0,
        equation 6).
    Kupiec 1995, Journal of Derivatives 3, 73.
    Christoffersen 1998, International Economic Review 39, 841.
    Diebold, Gunther and Tay 1998, International Economic Review 39, 863 (PIT).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.special import xlogy

_FARTHEST = 1e-6  # PIT of a normal score is kept so far from 0 and 1


class LikelihoodRatio(NamedTuple):
    """A likelihood-ratio test with one degree of freedom.

    Args:
        statistic: twice the log likelihood ratio.
        p: probability of a larger one by chance.
    """

    statistic: float
    p: float


def crps(samples: np.ndarray, observed: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Continuous ranked probability score of weighted samples, exact for the distribution that they are.

    Args:
        samples: (*, n).
        observed: (*).
        weight: (*, n), of sum 1; None for equal ones.

    Returns:
        (*), in the unit of the samples.

    Notes:
        The mean over samples of a continuous F exceeds that of F by E|Y - Y'| / (2 n).
    """
    order = np.argsort(samples, axis=-1, kind="stable")
    x = np.take_along_axis(samples, order, -1)
    w = np.full(x.shape, 1 / x.shape[-1]) if weight is None else np.take_along_axis(weight, order, -1)
    up_to = w.cumsum(-1)
    half_apart = (w * x * (2 * up_to - w - 1)).sum(-1)
    return (w * np.abs(x - np.asarray(observed)[..., None])).sum(-1) - half_apart


def crps_of_quantiles(quantiles: np.ndarray, probs: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """The same score from quantiles: twice the mean pinball loss.

    Args:
        quantiles: (*, n).
        probs: their probabilities, (n,), evenly spread: (k - 1/2) / n.
        observed: (*).
    """
    error = np.asarray(observed)[..., None] - quantiles
    return 2 * np.maximum(probs * error, (probs - 1) * error).mean(-1)


def fz0(observed: np.ndarray, value_at_risk: np.ndarray, shortfall: np.ndarray, level: float) -> np.ndarray:
    """Joint loss of value at risk and expected shortfall.

    Args:
        observed: returns.
        value_at_risk: quantile of the level.
        shortfall: expected shortfall, < 0; NaN comes of one that is not.
        level: such as 0.01.
    """
    below = np.where(observed <= value_at_risk, value_at_risk - observed, 0.0)
    negative = np.where(shortfall < 0, shortfall, np.nan)
    return -below / (level * negative) + value_at_risk / negative + np.log(-negative) - 1


def _log_likelihood(hits: int, days: int) -> float:
    """Of independent hits, at their frequency."""
    share = hits / days if days else 0.0
    return float(xlogy(hits, share) + xlogy(days - hits, 1 - share))


def kupiec(hits: np.ndarray, level: float) -> LikelihoodRatio:
    """Are there as many hits as the level says?

    Args:
        hits: True on days whose return fell short of the value at risk, (day,).
        level: such as 0.01.
    """
    n, k = len(hits), int(np.sum(hits))
    expected = float(xlogy(k, level) + xlogy(n - k, 1 - level))
    ratio = max(2 * (_log_likelihood(k, n) - expected), 0.0)
    return LikelihoodRatio(ratio, float(stats.chi2.sf(ratio, 1)))


def christoffersen(hits: np.ndarray) -> LikelihoodRatio:
    """Is a hit as likely after a hit as after none?

    Args:
        hits: True on days whose return fell short of the value at risk, (day,) in order.
    """
    before, now = np.asarray(hits[:-1], bool), np.asarray(hits[1:], bool)
    apart = sum(_log_likelihood(int(now[some].sum()), int(some.sum())) for some in (before, ~before))
    ratio = max(2 * (apart - _log_likelihood(int(now.sum()), len(now))), 0.0)
    return LikelihoodRatio(ratio, float(stats.chi2.sf(ratio, 1)))


class Uniformity(NamedTuple):
    """How far probability integral transforms are from uniform.

    Args:
        distance: Kolmogorov's, of the largest difference of cumulative probabilities.
        p: probability of a larger distance by chance.
        mean, sd: of their normal scores; 0 and 1 if uniform. An sd above 1: forecasts are too narrow.
        share: of days in each tenth, (10,).
    """

    distance: float
    p: float
    mean: float
    sd: float
    share: np.ndarray


def uniformity(pit: np.ndarray) -> Uniformity:
    """Summary of probability integral transforms, (day,), in [0, 1]."""
    test = stats.kstest(pit, "uniform")
    normal = stats.norm.ppf(np.clip(pit, _FARTHEST, 1 - _FARTHEST))
    share = np.histogram(pit, bins=10, range=(0.0, 1.0))[0] / len(pit)
    return Uniformity(
        float(test.statistic), float(test.pvalue), float(normal.mean()), float(normal.std()), share
    )
