"""AlphaBeta's estimator of epimutation rates, re-derived, to stand beside our own.

Every sample is called U, I or M (0, 1, 2: methylated copies of the two) at every locus. For a pair of
samples the divergence is the mean of ``|state - state'| / 2`` over the loci called in both. Its expectation,
given that the founder is U, I, M with chances ``p0uu, weight (1 - p0uu), (1 - weight) (1 - p0uu)``, follows
from gain and loss rates along the pedigree. The rates, ``weight`` and an ``intercept`` (errors of calls)
minimise

    sum_pairs (divergence - intercept - expected)^2 + n_pairs equilibrium_weight (puu - equilibrium)^2

where ``puu`` is the proportion of U that the rates lead to in the end.

What this is not: calls are taken as certain, pairs as independent though they share samples and ancestors,
all loci as having the same rates. So the rates are biased where reads are few, and the intervals too narrow.

Longer than 400 lines because a user's whole way, from reads to intervals, is to be read in one place.

References:
    Shahryary et al. 2020, Genome Biology 21, 260, doi:10.1186/s13059-020-02161-6 (the model, "ABneutral" and
    "ABneutralSOMA"). Details that the paper leaves out (rounding, p0uu, bootstrap) are those of AlphaBeta at
    github.com/jlab-code/AlphaBeta, commit 0477545, read and written anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.optimize import least_squares
from scipy.special import logsumexp, xlog1py, xlogy
from tqdm.auto import tqdm

from domains.genomics.pedigrees import Pedigree
from scivi.errors import DataError, FitError, listed

if TYPE_CHECKING:
    import pandas

    Divergences = xr.Dataset | pandas.DataFrame | Mapping[str, Any]

TIMES = ("time0", "time1", "time2")
DIFFERENCE = np.abs(np.subtract.outer(np.arange(3), np.arange(3))) / 2  # |state - state'| / 2
RATES = (1e-12, 0.5)  # our choice of limits: below, nothing happens in any pedigree; above, states alternate
LOCI_AT_A_TIME = 1 << 16  # our choice: bounds memory to a few hundred bytes times this per sample


@dataclass(frozen=True, slots=True, eq=False)
class AlphaBeta:
    """A fit of the neutral model.

    Args:
        gain: AlphaBeta's alpha, U to M per haploid cytosine and generation.
        loss: AlphaBeta's beta, M to U per haploid cytosine and generation.
        weight: proportion of the founder's loci that are not U which are I.
        intercept: divergence of a sample from itself, by errors of its calls.
        value: the objective at these numbers.
        predicted: divergence of each pair, with the intercept, dims (pair,).
        p0uu: the founder's proportion of U, as given.
        equilibrium: the proportion of U in the end, as given.
        equilibrium_weight: as given.
        somatic: as given.
        n_agreeing: how many of the starts ended within one in a million of this value.
    """

    gain: float
    loss: float
    weight: float
    intercept: float
    value: float
    predicted: np.ndarray
    p0uu: float
    equilibrium: float
    equilibrium_weight: float
    somatic: bool
    n_agreeing: int


def calls(
    methylated: np.ndarray,
    total: np.ndarray,
    proportions: Sequence[float],
    *,
    false_methylated: float | np.ndarray,
    false_unmethylated: float | np.ndarray,
    threshold: float = 0.99,
) -> np.ndarray:
    """Call states sample by sample, P(k | m, n) ~ proportions_k Binomial(m; n, theta_k).

    theta is false_methylated, 1/2, 1 - false_unmethylated. The program in use, methimpute, also looks at
    neighbouring loci, and learns the numbers that are given here.

    Args:
        methylated: methylated reads, dims (locus, sample).
        total: all reads, dims (locus, sample); 0 where not covered.
        proportions: of U, I and M among loci, positive, summing to 1.
        false_methylated: chance that a read of U is methylated, in (0, 1/2); one number, or dims (sample,).
        false_unmethylated: chance that a read of M is not, in (0, 1/2); one number, or dims (sample,).
        threshold: posterior probability below which there is no call; AlphaBeta's default is .99.

    Returns:
        0, 1, 2, or -1 for no call, int8, dims (locus, sample).

    Raises:
        DataError: shapes, counts or probabilities cannot be.

    Example:
        >>> reads = np.array([[0, 9, 5, 0, 1]]), np.array([[9, 9, 9, 0, 2]])
        >>> calls(*reads, (0.8, 0.01, 0.19), false_methylated=0.01, false_unmethylated=0.02)
        array([[ 0,  2,  1, -1, -1]], dtype=int8)
    """
    methylated, total, prior = np.asarray(methylated), np.asarray(total), np.asarray(proportions, float)
    faults = []
    if methylated.shape != total.shape or methylated.ndim != 2:
        faults.append(
            f"methylated {methylated.shape} and total {total.shape} need equal shapes (locus, sample)"
        )
    elif n_over := int(((methylated > total) | (methylated < 0)).sum()):
        faults.append(f"{n_over} entries have more methylated reads than reads, or fewer than 0")
    if prior.shape != (3,) or not (prior > 0).all() or abs(prior.sum() - 1) > 1e-6:
        faults.append(f"proportions {proportions} need three positive numbers that sum to 1")
    errors = {"false_methylated": false_methylated, "false_unmethylated": false_unmethylated}
    for name, error in errors.items():
        if not ((np.asarray(error) > 0) & (np.asarray(error) < 0.5)).all():
            faults.append(f"{name} {error} is not between 0 and 1/2")
        if np.ndim(error) and np.shape(error) != methylated.shape[1:]:
            faults.append(
                f"{name} has the shape {np.shape(error)}; one number or {methylated.shape[1:]} is needed"
            )
    if faults:
        raise DataError(listed("The reads cannot be called:", faults))
    states = np.full(methylated.shape, -1, np.int8)
    both = (np.broadcast_to(error, methylated.shape[1:]) for error in errors.values())
    for sample, (low, high) in enumerate(zip(*both, strict=True)):
        theta, m, n = np.array([low, 0.5, 1 - high]), methylated[:, sample, None], total[:, sample, None]
        log_joint = np.log(prior) + xlogy(m, theta) + xlog1py(n.astype(float) - m, -theta)
        log_posterior = log_joint - logsumexp(log_joint, axis=1, keepdims=True)
        sure = log_posterior.max(axis=1) >= np.log(threshold)
        states[sure, sample] = log_posterior[sure].argmax(axis=1)
    return states


def divergences(states: np.ndarray, pedigree: Pedigree, *, decimals: int | None = None) -> xr.Dataset:
    """Divergence and times of every pair of samples.

    Leave out the loci of chloroplast and mitochondrion, and all but one context, before.

    Args:
        states: 0, 1, 2, or -1 for no call, dims (locus, sample); the samples as in the pedigree.
        pedigree: who descends from whom.
        decimals: round the divergences down to so many digits. AlphaBeta does to 5, which lowers small ones
            by up to 1e-5; None keeps them.

    Returns:
        ``time0``, ``time1``, ``time2`` (generations; ``Pedigree.pair_times``), ``divergence`` and ``n_loci``
        (called in both), dim pair, labelled ``first`` and ``second``; the attribute ``p0uu`` is the mean over
        samples of the proportion of U among their calls, which AlphaBeta takes for the founder's.

    Raises:
        DataError: states do not fit the pedigree, or two samples share no called locus.

    Example:
        >>> line = Pedigree(("mother", "child"), ("", "mother"), (0, 1), ("mother", "child"))
        >>> table = divergences(np.array([[0, 0], [0, 1], [2, -1], [2, 2]]), line)
        >>> table.divergence.item(), table.n_loci.item(), table.attrs["p0uu"]
        (0.16666666666666666, 3, 0.41666666666666663)
    """
    states, samples = np.asarray(states), pedigree.samples
    times, n_samples = pedigree.pair_times(), len(samples)
    if states.ndim != 2 or states.shape[1] != n_samples:
        raise DataError(
            f"states have the shape {states.shape}; (locus, {n_samples}) is needed, a column for each of "
            f"the pedigree's samples. Pass the columns in the order of pedigree.samples."
        )
    if unknown := sorted(set(np.unique(states).tolist()) - {-1, 0, 1, 2}):
        raise DataError(f"states hold {unknown}; 0, 1, 2, and -1 for no call are needed. Recode them.")
    counts = np.zeros((3 * n_samples, 3 * n_samples))
    for begin in range(0, len(states), LOCI_AT_A_TIME):
        block = states[begin : begin + LOCI_AT_A_TIME]
        is_state = (block[:, :, None] == np.arange(3)).reshape(len(block), -1).astype(np.float64)
        counts += is_state.T @ is_state
    # loci where one sample is in state k and the other in state l, dims (sample, k, sample, l)
    together = counts.reshape(n_samples, 3, n_samples, 3)
    i, j = np.triu_indices(n_samples, 1)
    n_loci = together.sum((1, 3))[i, j]
    own = np.einsum("sksk->sk", together)  # loci of each sample in each state
    apart = [f'"{samples[a]}" and "{samples[b]}"' for a, b, n in zip(i, j, n_loci, strict=True) if not n]
    if apart:
        raise DataError(listed("Samples that share no called locus have no divergence; drop some:", apart))
    divergence = np.einsum("akbl,kl->ab", together, DIFFERENCE)[i, j] / n_loci
    if decimals is not None:
        # The small number keeps a decimal fraction from falling to the one below by its rounding to binary.
        divergence = np.floor(divergence * 10**decimals + 1e-9) / 10**decimals
    columns = {name: ("pair", times[:, n]) for n, name in enumerate(TIMES)}
    columns |= {"divergence": ("pair", divergence), "n_loci": ("pair", n_loci.astype(np.int64))}
    labels = {"first": ("pair", np.array(samples)[i]), "second": ("pair", np.array(samples)[j])}
    return xr.Dataset(columns, labels, {"p0uu": float((own[:, 0] / own.sum(1)).mean())})


def predicted(
    times: np.ndarray,
    gain: float,
    loss: float,
    weight: float,
    intercept: float,
    p0uu: float,
    *,
    somatic: bool = False,
) -> np.ndarray:
    """Divergence that the model expects of each pair.

    With T the transition matrix of a generation and s0 the founder's proportions,

        intercept + sum_k (s0 T^time0)_k sum_ij (T^(time1 - time0))_ki |i - j| / 2 (T^(time2 - time0))_kj.

    Args:
        times: time0, time1, time2 in generations, whole, dims (pair, 3).
        gain: U to M per haploid cytosine and generation.
        loss: M to U per haploid cytosine and generation.
        weight: proportion of the founder's loci that are not U which are I.
        intercept: added to every pair.
        p0uu: the founder's proportion of U.
        somatic: descent by cell division: two copies that change independently; otherwise by selfing, which
            draws two gametes.

    Returns:
        Expected divergence, dims (pair,).
    """
    time0, time1, time2 = np.asarray(times).astype(np.int64).T
    step = _transition(gain, loss, somatic)
    founder = np.array([p0uu, weight * (1 - p0uu), (1 - weight) * (1 - p0uu)])
    ancestor = founder @ _powers(step, time0)
    first, second = _powers(step, time1 - time0), _powers(step, time2 - time0)
    return intercept + (ancestor * (first @ DIFFERENCE * second).sum(-1)).sum(-1)


def equilibrium_puu(gain: float, loss: float, *, somatic: bool = False) -> float:
    """Proportion of U after many generations.

    With m = gain / (gain + loss) and lambda = 1 - gain - loss: (1 - m)^2 for independent copies; by selfing
    (1 - m) (1 - 2 m (1 - lambda^2) / (2 - lambda^2)), in which heterozygotes are those that arise anew.

    Args:
        gain: U to M per haploid cytosine and generation.
        loss: M to U per haploid cytosine and generation.
        somatic: as in ``predicted``.
    """
    methylated, squared = gain / (gain + loss), (1 - gain - loss) ** 2
    if somatic:
        return (1 - methylated) ** 2
    return (1 - methylated) * (1 - 2 * methylated * (1 - squared) / (2 - squared))


def objective(
    table: Divergences,
    gain: float,
    loss: float,
    weight: float,
    intercept: float,
    p0uu: float,
    *,
    equilibrium: float | None = None,
    equilibrium_weight: float = 1.0,
    somatic: bool = False,
) -> float:
    """AlphaBeta's sum of squares, the formula at the head of this module.

    Args:
        table: as ``divergences`` returns.
        gain: U to M per haploid cytosine and generation.
        loss: M to U per haploid cytosine and generation.
        weight: proportion of the founder's loci that are not U which are I.
        intercept: added to every pair.
        p0uu: the founder's proportion of U.
        equilibrium: the proportion of U in the end; p0uu if None.
        equilibrium_weight: how strongly the rates are tied to it, per pair.
        somatic: as in ``predicted``.
    """
    problem = _problem(table, p0uu, equilibrium, equilibrium_weight, somatic)
    return float((_residuals(np.array([gain, loss, weight, intercept]), problem) ** 2).sum())


def fit_alphabeta(
    table: Divergences,
    p0uu: float,
    *,
    equilibrium: float | None = None,
    equilibrium_weight: float = 1.0,
    somatic: bool = False,
    starts: int = 20,
    seed: int = 0,
) -> AlphaBeta:
    """Fit rates, weight and intercept by AlphaBeta's least squares.

    The objective is AlphaBeta's; its minimum is sought by a Gauss-Newton method with exact derivatives in
    log rates, where AlphaBeta runs Nelder-Mead from many more starts. As there, weight and intercept are not
    negative.

    Args:
        table: as ``divergences`` returns.
        p0uu: the founder's proportion of U; ``divergences(...).attrs["p0uu"]`` is AlphaBeta's choice.
        equilibrium: the proportion of U in the end; p0uu if None, as AlphaBeta's users do.
        equilibrium_weight: how strongly the rates are tied to it, per pair.
        somatic: as in ``predicted``.
        starts: number of random starts, drawn as AlphaBeta does.
        seed: of the starts.

    Raises:
        DataError: the table lacks columns, or holds what cannot be.
        FitError: no start converged.
    """
    problem = _problem(table, p0uu, equilibrium, equilibrium_weight, somatic)
    largest = max(problem.observed.max(), RATES[0])  # some number above 0 where no pair differs
    rng, fits = np.random.default_rng(seed), []
    for _ in range(starts):
        # As AlphaBeta: rates log uniform in 1e-9 to 1e-2, weight to .1, intercept to the largest divergence.
        rates = np.exp(rng.uniform(np.log(1e-9), np.log(1e-2), 2))
        start = np.array([*rates, rng.uniform(0, 0.1), rng.uniform(0, largest)])
        if (found := _minimise(start, problem, low=(0.0, 0.0), high=(1.0, np.inf))) is not None:
            fits.append(found)
    if not fits:
        raise FitError(f"none of {starts} starts of AlphaBeta's least squares converged; raise starts.")
    values = np.array([(_residuals(found, problem) ** 2).sum() for found in fits])
    best = fits[int(values.argmin())]
    gain, loss, weight, intercept = best.tolist()
    return AlphaBeta(
        gain,
        loss,
        weight,
        intercept,
        value=float(values.min()),
        predicted=_expected(best, problem),
        p0uu=problem.p0uu,
        equilibrium=problem.equilibrium,
        equilibrium_weight=problem.equilibrium_weight,
        somatic=somatic,
        n_agreeing=int((values <= values.min() * (1 + 1e-6)).sum()),
    )


def null(table: Divergences) -> tuple[float, float]:
    """AlphaBeta's model without epimutations: one divergence for all pairs.

    Returns:
        The mean divergence, and the sum of squares about it, which a fit's ``value`` should be well below.
    """
    observed = _problem(table, 0.5, None, 0.0, False).observed
    return float(observed.mean()), float(((observed - observed.mean()) ** 2).sum())


def bootstrap(
    fit: AlphaBeta, table: Divergences, *, draws: int = 1000, seed: int = 0, progress: bool = False
) -> xr.Dataset:
    """AlphaBeta's bootstrap: residuals shuffled among pairs with replacement, and fitted again.

    Pairs share samples and ancestors, so that their residuals are not exchangeable: intervals from this are
    too narrow. It is here to be compared with. As in AlphaBeta, weight and intercept may become negative.

    Args:
        fit: the fit of the table.
        table: as ``divergences`` returns.
        draws: number of tables made and fitted.
        seed: of the draws.
        progress: show a bar.

    Returns:
        ``gain``, ``loss``, ``weight`` and ``intercept`` of each table, dim draw, NaN where a fit did not
        converge; standard errors are ``.std(ddof=1)``, intervals ``.quantile([0.025, 0.975])``.
    """
    problem = _problem(table, fit.p0uu, fit.equilibrium, fit.equilibrium_weight, fit.somatic)
    residuals = problem.observed - fit.predicted
    start = np.array([fit.gain, fit.loss, fit.weight, fit.intercept])
    rng, free = np.random.default_rng(seed), (np.inf, np.inf)
    found = np.full((draws, 4), np.nan)
    for draw in tqdm(range(draws), desc="bootstrap", disable=not progress):
        made = replace(problem, observed=fit.predicted + rng.choice(residuals, residuals.size))
        if (again := _minimise(start, made, low=(-np.inf, -np.inf), high=free)) is not None:
            found[draw] = again
    names = ("gain", "loss", "weight", "intercept")
    columns = {name: ("draw", found[:, n]) for n, name in enumerate(names)}
    return xr.Dataset(columns, {"draw": np.arange(draws)})


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """What is given. Many pairs have the same times: each triple is kept once, and which one a pair has."""

    times: np.ndarray  # (triple, 3)
    triple: np.ndarray  # (pair,)
    observed: np.ndarray  # (pair,)
    p0uu: float
    equilibrium: float
    equilibrium_weight: float
    somatic: bool


def _transition(gain: Any, loss: Any, somatic: bool) -> np.ndarray:
    """One generation, dims (state of the parent, state of the child); complex rates pass for derivatives."""
    if somatic:  # copies change one by one; I has one of each
        a, b = gain, loss
        het = [b * (1 - a), (1 - a) * (1 - b) + a * b, a * (1 - b)]
        return np.array([[(1 - a) ** 2, 2 * a * (1 - a), a**2], het, [b**2, 2 * b * (1 - b), (1 - b) ** 2]])
    q = np.array([gain, (1 + gain - loss) / 2, 1 - loss])  # chance that a gamete is methylated
    return np.stack([(1 - q) ** 2, 2 * q * (1 - q), q**2], axis=1)


def _powers(step: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """A matrix to many powers by squaring, dims (exponent, 3, 3)."""
    result = np.broadcast_to(np.eye(3, dtype=step.dtype), (len(exponents), 3, 3))
    while exponents.any():
        result = np.where((exponents & 1)[:, None, None] == 1, result @ step, result)
        step, exponents = step @ step, exponents >> 1
    return result


def _expected(values: np.ndarray, problem: _Problem) -> np.ndarray:
    """Expected divergence at gain, loss, weight and intercept, dims (pair,)."""
    gain, loss, weight, intercept = values
    by_triple = predicted(problem.times, gain, loss, weight, intercept, problem.p0uu, somatic=problem.somatic)
    return by_triple[problem.triple]


def _residuals(values: np.ndarray, problem: _Problem) -> np.ndarray:
    """Numbers whose squares sum to the objective, dims (pair + 1,)."""
    off = equilibrium_puu(values[0], values[1], somatic=problem.somatic) - problem.equilibrium
    tie = np.sqrt(problem.observed.size * problem.equilibrium_weight) * off
    return np.append(problem.observed - _expected(values, problem), tie)


def _minimise(
    start: np.ndarray, problem: _Problem, *, low: tuple[float, float], high: tuple[float, float]
) -> np.ndarray | None:
    """Gain, loss, weight and intercept at a minimum, the latter two in bounds; None if none is reached."""
    # So that tolerances mean the same for small divergences.
    scale = np.sqrt((problem.observed**2).mean()) or 1.0
    limits = np.log(RATES)

    def values(z: np.ndarray) -> np.ndarray:
        return np.append(np.exp(z[:2]), z[2:] * np.array([1.0, scale]))

    result = least_squares(
        lambda z: _residuals(values(z), problem) / scale,
        np.array([*np.log(start[:2]), start[2], start[3] / scale]),
        jac="cs",  # exact: every operation above takes complex numbers
        bounds=([limits[0]] * 2 + [*low], [limits[1]] * 2 + [*high]),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-12,
        gtol=1e-12,
        max_nfev=1000,
    )
    return values(result.x) if result.status > 0 else None


def _problem(
    table: Divergences, p0uu: float, equilibrium: float | None, equilibrium_weight: float, somatic: bool
) -> _Problem:
    """The problem, after everything that is wrong with it has been said."""
    missing = [name for name in (*TIMES, "divergence") if name not in table]
    if missing:
        names = ", ".join(f'"{name}"' for name in missing)
        raise DataError(f"the divergences have no column {names}; pass what divergences() returns.")
    times = np.stack([np.asarray(table[name], dtype=np.float64) for name in TIMES], axis=1)
    observed = np.asarray(table["divergence"], dtype=np.float64)
    faults = []
    if not len(observed):
        faults.append("there are no pairs; at least two samples are needed")
    if n := int((~((observed >= 0) & (observed <= 1))).sum()):
        faults.append(f"{n} divergences are not in 0 to 1")
    if n := int((~(times == np.floor(times))).any(1).sum()):
        faults.append(f"{n} pairs have times that are not whole numbers of generations")
    if n := int((~((times[:, 0] >= 0) & (times[:, 0] <= times[:, 1:].min(1)))).sum()):
        faults.append(f"{n} pairs have a common ancestor (time0) that is negative or later than a sample")
    if not equilibrium_weight >= 0:
        faults.append(f"equilibrium_weight {equilibrium_weight} is negative")
    faults += [
        f"{name} {value} is not in 0 to 1"
        for name, value in {"p0uu": p0uu, "equilibrium": equilibrium}.items()
        if value is not None and not 0 <= value <= 1
    ]
    if faults:
        raise DataError(listed("AlphaBeta cannot be fitted to these divergences:", faults))
    rows, triple = np.unique(times, axis=0, return_inverse=True)
    end = p0uu if equilibrium is None else equilibrium
    return _Problem(rows, triple.ravel(), observed, p0uu, end, equilibrium_weight, somatic)
