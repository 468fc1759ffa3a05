"""When a fit has reached its plateau: one rule, for one fit or for many at once."""

from __future__ import annotations

import numpy as np

from scivi.inference.plan import Plateau


def levelled(
    rule: Plateau, steps: np.ndarray, objective: np.ndarray, sd: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Whether the averaged objective no longer improves, as ``Plateau`` says.

    Args:
        rule: how much is an improvement.
        steps: at each entry of the history, (..., entry), the last entry of each fit being its latest; NaN
            where a fit has no entry.
        objective: mean since the entry before, nats per row.
        sd: standard deviation of a step's objective about it.
        weight: steps since the entry before.

    Returns:
        (...), False where the history is too short or too noisy to tell.
    """
    latest = np.nanmax(steps, -1, keepdims=True, initial=0.0)
    window = np.maximum(rule.window, latest // 4)
    recent = steps > latest - window  # NaN is neither
    before = (steps > latest - 2 * window) & (steps <= latest - window)
    with np.errstate(invalid="ignore", divide="ignore"):  # of a fit without entries in a window
        now, now_error = _mean(recent, objective, sd, weight)
        then, then_error = _mean(before, objective, sd, weight)
    error = np.sqrt(now_error + then_error)
    enough = latest[..., 0] >= max(rule.min_steps, 2 * rule.window)
    told = recent.any(-1) & before.any(-1) & (error <= 2 * rule.least)
    return enough & told & (then - now < np.maximum(rule.tolerance * error, rule.least))


def _mean(
    some: np.ndarray, objective: np.ndarray, sd: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean objective of some entries and its squared error, (...)."""
    share = np.where(some, weight, 0.0)
    total = share.sum(-1)
    value, spread = (np.where(some, x, 0.0) for x in (objective, sd))
    return (share * value).sum(-1) / total, (share * spread**2).sum(-1) / total**2
