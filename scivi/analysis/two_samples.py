"""Do two samples of rows come from one distribution: one permutation test over all features together.

Every statistic is worked out for the rows as they are and for random divisions of the same rows into samples
of the same sizes. If all rows come from one distribution each division is as likely as the actual one, so
that the rank of the actual statistic is a p-value whatever the features depend on (Westfall & Young 1993).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

PERMUTATIONS = 999  # the least p-value is one in a thousand (our choice)
NEIGHBOURS = 10  # of each row (our choice)
JOINT = ("dependence", "neighbours", "isolation")
_BLOCK = 2**22  # distances, or products of two features, held at once
_COLUMNS = 64  # divisions worked out at once: so many rows of them stay in the processor's cache


@dataclass(frozen=True)
class Compared:
    """Two samples compared; features first, then ``JOINT``.

    Args:
        ks: Kolmogorov-Smirnov distance of each feature, and of the isolation; NaN where none is defined.
        p_value: of each, adjusted for all: that some feature of equal samples has so large a statistic.
        overall: p-value of the largest.
        pair: places of the two features whose dependence differs most.
    """

    ks: np.ndarray
    p_value: np.ndarray
    overall: float
    pair: tuple[int, int]


def compare(new: np.ndarray, reference: np.ndarray, seed: int) -> Compared:
    """Compare two samples of rows, (row, feature) each; NaN is missing.

    A statistic counts in standard deviations above its mean over all divisions, so that a rare word and a
    smooth number are heard alike; the largest of them is the test. Of each feature there are three, of which
    the largest counts: the KS distance, and the changes of mean and spread of its normal scores. Beside them:

    - dependence: the largest change of the product of two features' normal scores, as of their correlation;
    - neighbours: how many of a row's nearest ten are of its own sample (Chen, Chen & Su 2018, the weighted
      count of edges);
    - isolation: as of a feature, of how far a row's tenth neighbour in both samples together is.

    References:
        Westfall & Young (1993), Resampling-based multiple testing: the maximum over dependent tests.
        Phipson & Smyth (2010), doi:10.2202/1544-6115.1585: p = (1 + number as large) / (1 + permutations).
        Chen, Chen & Su (2018), doi:10.1080/01621459.2017.1307757.
    """
    rows, n = np.concatenate([new, reference]), len(new)
    members = memberships(n, len(rows), seed)
    places = scaled(rows, rows)
    near, isolation = neighbours(places)
    every = np.column_stack([rows, isolation])
    z, of = normal_scores(every), np.ascontiguousarray(members.T, np.float32)
    found = [ks_distances(column, members) for column in every.T]
    kinds = [
        np.stack([distance * np.sqrt(size) for distance, size in found], 1),
        changes(z, of),
        changes(z**2, of),
    ]
    alone = np.maximum.reduce([_standard(kind) for kind in kinds])
    of_pairs, pair = dependence(z[:, :-1], of)
    joint = _standard(np.column_stack([of_pairs, own_neighbours(near, members)]))
    standard = np.column_stack([alone[:, :-1], joint, alone[:, -1]])
    largest, actual = standard.max(1), standard[0] - 1e-5  # equal up to rounding is equal
    p_value = (1 + (largest[1:, None] >= actual).sum(0)) / (1 + PERMUTATIONS)
    ks = np.array([float(distance[0]) for distance, _ in found])
    return Compared(np.r_[ks[:-1], np.nan, np.nan, ks[-1]], p_value, float(p_value.min()), pair)


def memberships(n: int, total: int, seed: int) -> np.ndarray:
    """Which rows are new: as it is in the first column, then at random, (row, 1 + permutation) of 0 and 1."""
    found = np.zeros((PERMUTATIONS + 1, total), np.int8)
    found[:, :n] = 1
    found[1:] = np.random.default_rng(seed).permuted(found[1:], axis=1)
    return np.ascontiguousarray(found.T)


def ks_distances(values: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KS distance between members and the others for every column, and n m / (n + m); 0 where one is empty.

    Args:
        values: (row,); rows where it is not finite do not count.
        members: (row, column) of 0 and 1.
    """
    there = np.flatnonzero(np.isfinite(values))
    order = there[np.argsort(values[there], kind="stable")]
    in_order, total, columns = values[order], len(order), int(members.shape[1])
    last = np.flatnonzero(np.r_[in_order[1:] != in_order[:-1], True]) if total else np.empty(0, int)
    if len(last) < 2:
        return np.zeros(columns), np.zeros(columns)
    at = (last + 1).astype(np.int32)[:, None]
    gap, n = np.empty(columns, np.int64), np.empty(columns, np.int64)
    for start in range(0, columns, _COLUMNS):
        some = slice(start, start + _COLUMNS)
        below = np.cumsum(members[order, some], axis=0, dtype=np.int32)
        below = below if len(last) == total else below[last]
        n[some] = below[-1]
        below = below * np.int32(total) - at * below[-1]  # whole numbers: ties stay ties
        gap[some] = np.maximum(below.max(0), -below.min(0))
    size = n * (total - n)
    return np.where(size > 0, gap / np.maximum(size, 1), 0.0), size / float(total)


def normal_scores(rows: np.ndarray) -> np.ndarray:
    """Normal quantiles of the ranks of each column, float32; 0 where it is not finite."""
    from scipy.stats import rankdata

    z = np.zeros(rows.shape, np.float32)
    for k, column in enumerate(rows.T):
        there = np.isfinite(column)
        z[there, k] = ndtri((rankdata(column[there]) - 0.5) / max(1, there.sum()))
    return z


def changes(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """|Sum over the new rows - its mean over all divisions| in its sd over these, (division, column).

    Args:
        values: (row, column), float32.
        of: the new rows of each division, (division, row) of 0 and 1, float32.
    """
    total, n = len(values), float(of[0].sum())
    values = values - values.mean(0)
    square = (values.astype(np.float64) ** 2).sum(0)
    sd = np.sqrt(square * n * (total - n) / (total * max(1, total - 1)))
    varies = square > 1e-9 * total
    return np.abs(of @ (values * np.divide(1.0, sd, out=np.zeros_like(sd), where=varies).astype(np.float32)))


def dependence(z: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Largest change of the product of two columns, (division,), and the places of these as it is."""
    largest, pair = np.zeros(len(of), np.float32), (0, 0)
    first, second = np.triu_indices(z.shape[1], 1)
    for some in blocks(len(first), len(z)):
        change = changes(z[:, first[some]] * z[:, second[some]], of)
        if change[0].max() > largest[0]:
            at = some.start + int(change[0].argmax())
            pair = int(first[at]), int(second[at])
        np.maximum(largest, change.max(1), out=largest)
    return largest, pair


def own_neighbours(near: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Neighbours of the same sample, new and old weighted so that their sizes do not count, (column,)."""
    total, n = len(near), int(members[:, 0].sum())
    new, touched = np.zeros(members.shape[1], np.int64), np.zeros(members.shape[1], np.int64)
    for k in range(near.shape[1]):
        other = members[near[:, k]]
        new += (members & other).sum(0, dtype=np.int64)
        touched += (members | other).sum(0, dtype=np.int64)
    old = near.size - touched
    weight = (n - 1) / max(1, total - 2)  # for one new row, its neighbours say nothing
    return (1 - weight) * new + weight * old


def neighbours(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest ten other rows of each, (row, 10), and how far the tenth is, (row,); fewer of few rows."""
    k = min(NEIGHBOURS, len(places) - 1)
    near, far = np.empty((len(places), k), int), np.zeros(len(places))
    for some, apart in to_others(places) if k else ():
        near[some] = np.argpartition(apart, k - 1, axis=1)[:, :k]
        far[some] = np.take_along_axis(apart, near[some], 1).max(1)
    return near, far


def to_others(places: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Distances of some rows at a time to all, (some, row), infinite to themselves."""
    for some in blocks(len(places), len(places)):
        apart = distances(places[some], places)
        here = np.arange(len(apart))
        apart[here, some.start + here] = np.inf
        yield some, apart


def blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows of a width, each of as many as are held at once."""
    step = max(1, _BLOCK // width)
    return (slice(start, start + step) for start in range(0, n, step))


def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Euclidean distances between rows, (left, right)."""
    square = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return np.sqrt(square.clip(0)).round(5)  # equal rows have equal distances, whatever the rounding


def deviations(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Rows less the reference's medians, in half the central 68 % of the reference; 0 where missing.

    Where most entries are equal, the sd stands for it, and a tenth of their size where all are.
    """
    found = np.zeros(rows.shape)
    for k, (own, column) in enumerate(zip(rows.T, reference.T, strict=True)):
        there = column[np.isfinite(column)]
        if there.size:
            low, middle, high = np.quantile(there, [0.158655, 0.5, 0.841345])
            spread = (high - low) / 2 or there.std() or 0.1 * (abs(middle) or 1.0)
            found[:, k] = np.nan_to_num((own - middle) / spread, posinf=0.0, neginf=0.0)
    return found


def scaled(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Deviations for distances: linear up to about three, logarithmic beyond, so that no tail rules them."""
    return 3 * np.arcsinh(deviations(rows, reference) / 3)


def _standard(statistic: np.ndarray) -> np.ndarray:
    """Each column in sd from its mean over all divisions, the actual one among them; 0 if it never varies."""
    sd, size = statistic.std(0), np.abs(statistic).max(0)
    varies = sd > 1e-6 * (1 + size)
    return np.where(varies, (statistic - statistic.mean(0)) / np.where(varies, sd, 1.0), 0.0)
