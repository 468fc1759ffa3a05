"""How methylation passes from parent to offspring: one generation (or division) as a matrix of genotypes.

Each function takes the rates of gain (an unmethylated copy becomes methylated) and of loss, per cytosine copy
and step, as tensors of any shape, and gives the probabilities of going from one state (row) to another
(column). Diploid states are UU, UM, MM, the haploid ones U and M. Every entry is a sum of products of
probabilities, none a difference, so that float32 keeps rates of 1e-8.

References:
    Shahryary et al. 2020, Genome Biology 21, 260, doi:10.1186/s13059-020-02161-6 (selfing, clonal).
    Fu et al. 2010, Ann. Appl. Stat. 4, 871, doi:10.1214/09-AOAS297 (maintenance, de novo).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from scivi.models.sum_product import Matrix, Vector

Reproduction = Literal["selfing", "clonal", "haploid", "division"]
REPRODUCTIONS: tuple[str, ...] = get_args(Reproduction)


def states(reproduction: Reproduction) -> tuple[str, ...]:
    """Names of the states, from no copy methylated to all."""
    return ("U", "M") if reproduction == "haploid" else ("UU", "UM", "MM")


def step(reproduction: Reproduction, gain: Tensor, loss: Tensor) -> Matrix:
    """Probabilities of one generation, by state before and state after.

    "selfing": each of the two gametes draws a copy of the parent, which then may change: with q the
    probability that a gamete is methylated, the offspring has Binomial(2, q) methylated copies, q = gain,
    (1 + gain - loss) / 2, 1 - loss. Eigenvalues 1, x, x**2 / 2 with x = 1 - gain - loss. "clonal": both
    copies are passed on, and change independently. "haploid": one copy. "division": the states are of the two
    strands of a double strand; a daughter cell gets one, at random, and makes the other anew: methylated
    opposite a methylated one with probability 1 - loss (maintenance), opposite an unmethylated one with
    probability gain (de novo).

    Args:
        reproduction: as above.
        gain: probability of gain.
        loss: of loss, of the same shape.
    """
    keep_u, keep_m = 1 - gain, 1 - loss
    if reproduction == "selfing":
        methylated = (gain, 0.5 * (gain + keep_m), keep_m)
        unmethylated = (keep_u, 0.5 * (keep_u + loss), loss)
        return tuple((p * p, 2 * p * q, q * q) for p, q in zip(unmethylated, methylated, strict=True))
    if reproduction == "clonal":
        return (
            (keep_u * keep_u, 2 * gain * keep_u, gain * gain),
            (loss * keep_u, keep_u * keep_m + gain * loss, gain * keep_m),
            (loss * loss, 2 * loss * keep_m, keep_m * keep_m),
        )
    if reproduction == "division":
        none = torch.zeros_like(gain)
        return ((keep_u, gain, none), (0.5 * keep_u, 0.5 * (gain + loss), 0.5 * keep_m), (none, loss, keep_m))
    return ((keep_u, gain), (loss, keep_m))


def equilibrium(reproduction: Reproduction, gain: Tensor, loss: Tensor) -> Vector:
    """Probabilities of the states after infinitely many generations.

    The arguments are those of ``step``.
    """
    total = gain + loss
    u, m = loss / total, gain / total
    if reproduction == "haploid":
        return (u, m)
    if reproduction == "clonal":
        return (u * u, 2 * u * m, m * m)
    if reproduction == "division":
        parts = (loss * (1 - gain), 2 * gain * loss, gain * (1 - loss))
        norm = parts[0] + parts[1] + parts[2]
        return tuple(part / norm for part in parts)
    x = 1 - total
    share = 2 * (1 + x) / (2 - x * x)  # of the heterozygotes: 2 gain loss / total times this
    return (u * (1 - gain * share), 2 * u * gain * share, m * (1 - loss * share))
