"""How strange is a row beside the rows of a fit: p-values that hold for any distribution of rows."""

from __future__ import annotations

import numpy as np

from scivi.analysis.two_samples import NEIGHBOURS, blocks, deviations, distances, scaled, to_others


def row_p_values(rows: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Conformal p-value of every row, and how far its tenth neighbour is, (row,) each.

    A row's score is the distance to its tenth nearest neighbour among the reference; that of a row of the
    reference, the distance to its tenth among the others and the new row. If the new row comes from where the
    reference does, its rank among all scores is uniform, whatever the distribution:

        p = (1 + number of reference rows with as large a score) / (reference rows + 1)

    Args:
        rows: (row, feature), NaN is missing.
        reference: likewise.

    Notes:
        Exact but for the scale of the features, which the reference alone gives: one row would move it by
        less than 1 / sqrt(rows). The least p-value is 1 / (reference rows + 1).

    References:
        Vovk, Gammerman & Shafer (2005), Algorithmic learning in a random world, section 2.2.
        Bates, Candès, Lei, Romano & Sesia (2023), doi:10.1214/22-AOS2244: so used to find outliers.
    """
    p_value, score = np.ones(len(rows)), np.zeros(len(rows))
    k = min(NEIGHBOURS, len(reference) - 1)
    if k < 1:
        return p_value, score
    known = scaled(reference, reference)
    last, before = np.empty(len(known)), np.zeros(len(known))  # the k-th neighbour, and the one before it
    for some, apart in to_others(known):
        near = np.sort(np.partition(apart, k - 1, axis=1)[:, :k], axis=1)
        last[some] = near[:, -1]
        if k > 1:
            before[some] = near[:, -2]
    for some in blocks(len(rows), len(known)):
        apart = distances(scaled(rows[some], reference), known)
        own = np.partition(apart, k - 1, axis=1)[:, k - 1]
        theirs = np.where(apart < last, np.maximum(before, apart), last)  # the new row among their neighbours
        score[some] = own
        p_value[some] = (1 + (theirs >= own[:, None]).sum(1)) / (len(known) + 1)
    return p_value, score


def strangest(rows: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The feature in which each row is strangest, and how far it is from the median there, in sd.

    The one with the least share of the reference at its value or beyond, on the nearer side; of those beyond
    the whole reference, the farthest.
    """
    apart, tail = deviations(rows, reference), np.full(rows.shape, np.inf)
    for k, (own, column) in enumerate(zip(rows.T, reference.T, strict=True)):
        known, there = np.sort(column[np.isfinite(column)]), np.isfinite(own)
        below = np.searchsorted(known, own[there], "right")
        above = known.size - np.searchsorted(known, own[there], "left")
        tail[there, k] = np.minimum(below, above)
    rank = tail - np.arctan(np.abs(apart)) / np.pi  # less than half a row of the reference
    where = rank.argmin(1)
    return where, apart[np.arange(len(rows)), where]


def discoveries(p_value: np.ndarray, level: float) -> np.ndarray:
    """Rows flagged by Benjamini and Hochberg: of those, a share of at most ``level`` is expected to be false.

    References:
        Benjamini & Hochberg (1995), doi:10.1111/j.2517-6161.1995.tb02031.x; for conformal p-values, Bates et
        al. (2023), theorem 2.
    """
    n, order = len(p_value), np.argsort(p_value)
    below = np.flatnonzero(p_value[order] <= level * np.arange(1, n + 1) / max(1, n))
    found = np.zeros(n, bool)
    found[order[: below[-1] + 1 if below.size else 0]] = True
    return found
