"""Exact posterior of a source's counts over a flat background, as aprates defines it, without the engine.

    n_on ~ Poisson(s + b),  n_off ~ Poisson(b / alpha),  flat priors on s >= 0 and b >= 0

With b summed out, p(s | n_on, n_off, alpha) is a finite mixture of gamma densities,

    p(s) = sum_j w_j s^j exp(-s) / j!,    j = 0 .. n_on
    w_j ~ C(n_on - j + n_off, n_off) (alpha / (1 + alpha))^(n_on - j)

References:
    Loredo 1992, in Statistical Challenges in Modern Astronomy, 275-297, section 12.3 (the sum).
    Primini & Kashyap 2014, ApJ 796, 24 (aprates: mode and 68 % highest-density interval).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special


@dataclass(frozen=True)
class SourceCounts:
    """Posterior of the expected source counts s; `log_weight` of the gammas of shape 1 .. n_on + 1."""

    log_weight: np.ndarray

    @classmethod
    def of(cls, n_on: int, n_off: int, alpha: float) -> SourceCounts:
        """Posterior given the counts in source and background aperture and the ratio of their areas."""
        background = np.arange(n_on, -1, -1)
        log_weight = (
            special.gammaln(background + n_off + 1)
            - special.gammaln(background + 1)
            + background * np.log(alpha / (1 + alpha))
        )
        return cls(special.log_softmax(log_weight))

    def _log_terms(self, s: float) -> np.ndarray:
        j = np.arange(len(self.log_weight))
        return self.log_weight + special.xlogy(j, s) - s - special.gammaln(j + 1)

    def density(self, s: float) -> float:
        """Posterior density at s."""
        return float(np.exp(special.logsumexp(self._log_terms(s))))

    def cdf(self, s: float) -> float:
        """Posterior probability of less than s."""
        return float(np.exp(self.log_weight) @ special.gammainc(np.arange(len(self.log_weight)) + 1.0, s))

    def quantile(self, prob: float) -> float:
        """Value below which lies the given probability."""
        return optimize.brentq(lambda s: self.cdf(s) - prob, 0.0, self._far(), xtol=1e-12)

    def mode(self) -> float:
        """Most probable value, 0 included: d log p / ds = E[j] / s - 1, j weighted by its term at s."""
        j = np.arange(len(self.log_weight))

        def slope(s: float) -> float:
            return float(special.softmax(self._log_terms(s)) @ j) / s - 1.0

        low = 1e-9
        return 0.0 if slope(low) <= 0 else optimize.brentq(slope, low, self._far(), xtol=1e-12)

    def interval(self, prob: float = 0.68) -> tuple[float, float]:
        """Shortest interval of the given probability; from 0 where that is denser than its end."""
        upper_tail = self.quantile(prob)
        if self.density(0.0) >= self.density(upper_tail):
            return 0.0, upper_tail

        def excess(low: float) -> float:
            return self.density(low) - self.density(self.quantile(self.cdf(low) + prob))

        low = optimize.brentq(excess, 0.0, min(self.mode(), self.quantile(1 - prob - 1e-9)), xtol=1e-10)
        return low, self.quantile(self.cdf(low) + prob)

    def _far(self) -> float:
        """A value above all but 1e-30 of the probability: ten Poisson sd and seventy counts."""
        n = len(self.log_weight)
        return n + 10 * np.sqrt(n) + 70.0
