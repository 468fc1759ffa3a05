"""Hidden states on a tree summed out exactly: leaves to root for the likelihood, and back for the posterior.

Node v of a tree has a state k = 0 .. K-1. A root's has the probability ``root[k]``; a child's, given its
parent's, follows the matrix of one unit step to the power of the edge's length. What is seen at a node has
the likelihood e_v[k] (Felsenstein 1981, J. Mol. Evol. 17, 368, doi:10.1007/BF01734359):

    inside_v[k] = e_v[k] prod_c sum_j T_c[k, j] inside_c[j]          over the children c of v
    likelihood  = sum_k root[k] inside_root[k]

States and nodes are few and are written out one by one, rows are many: every tensor here ends in the rows, so
that the whole tree is arithmetic on long vectors, which a compiler makes a single loop of. Matrices are
tuples of tuples of tensors that broadcast against the rows: of shape () where all rows share them.

Numbers stay in range without logarithms inside: likelihoods are scaled to a largest of 1, and products to a
sum of 1 with each factor. Nothing is subtracted, so that probabilities of 1e-16 keep their
digits in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]
Matrix = tuple[Vector, ...]
# Nats below the likeliest state at which a state counts no less; its square is in the range of the type.
_FLOOR = {torch.float32: -40.0, torch.float64: -340.0}


@dataclass(frozen=True)
class Tree:
    """A tree, or several, whose nodes are numbered from the roots on.

    Args:
        parent: of each node, which comes before it; -1 for a root.
        length: of the edge to it, in steps; whole numbers >= 0, not read at a root.
        seen: nodes at which something is observed, in the order of the observations.
    """

    parent: tuple[int, ...]
    length: tuple[int, ...]
    seen: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(p >= v for v, p in enumerate(self.parent)):
            raise ValueError("a parent must come before its children")

    @property
    def edges(self) -> tuple[int, ...]:
        """The nodes that have a parent, which stand for the edges to them."""
        return tuple(v for v, p in enumerate(self.parent) if p >= 0)


def product(a: Matrix, b: Matrix) -> Matrix:
    """Matrix product."""
    columns = tuple(zip(*b, strict=True))
    return tuple(tuple(_dot(row, column) for column in columns) for row in a)


def powers(step: Matrix, exponents: Iterable[int]) -> dict[int, Matrix]:
    """Powers of a matrix, by squaring what the exponents share.

    Args:
        step: square, entries of any shape.
        exponents: whole numbers >= 0.
    """
    wanted = sorted(set(exponents))
    one, zero = torch.ones_like(step[0][0]), torch.zeros_like(step[0][0])
    identity = tuple(tuple(one if i == j else zero for j in range(len(step))) for i in range(len(step)))
    found = {0: identity, 1: step}
    for n in wanted:
        _power(found, n)
    return {n: found[n] for n in wanted}


def _power(found: dict[int, Matrix], n: int) -> Matrix:
    if n not in found:
        before = n - 1 if n - 1 in found else n // 2
        found[n] = product(_power(found, before), _power(found, n - before))
    return found[n]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + x * y
    return total


class Seen(NamedTuple):
    """Likelihoods of what is seen, scaled to a largest of 1.

    Args:
        states: by state, (..., seen nodes, rows).
        log_scale: logarithm of what they were divided by, summed over the nodes, (..., rows).
    """

    states: Vector
    log_scale: Tensor


def scaled(log_likelihood: Sequence[Tensor]) -> Seen:
    """Log likelihoods by state, each (..., seen nodes, rows), in the form in which they are summed."""
    most = log_likelihood[0]
    for other in log_likelihood[1:]:
        most = torch.maximum(most, other)
    most = most.detach()
    floor = _FLOOR[most.dtype]
    states = tuple((x - most).clamp_min(floor).exp() for x in log_likelihood)
    return Seen(states, most.sum(-2))


class _Inside(NamedTuple):
    inside: list[Vector]  # of each node, scaled: its own likelihood times what its children say
    said: list[Vector]  # of each node with a parent: what it says to the parent
    scales: list[Tensor]  # by which products were divided
    along: dict[int, Matrix]  # edges, by their lengths


def _inside(tree: Tree, seen: Seen, step: Matrix) -> _Inside:
    """Leaves to roots."""
    own_of = _by_node(tree, seen)
    along = powers(step, (tree.length[v] for v in tree.edges))
    factors: list[list[Vector]] = [[] for _ in tree.parent]
    inside: list[Vector] = [()] * len(tree.parent)
    said: list[Vector] = [()] * len(tree.parent)
    scales: list[Tensor] = []
    for v in reversed(range(len(tree.parent))):
        if v in own_of:
            factors[v].append(own_of[v])
        inside[v], divisors = _times(factors[v], step)
        scales += divisors
        if tree.parent[v] >= 0:
            said[v] = tuple(_dot(row, inside[v]) for row in along[tree.length[v]])
            factors[tree.parent[v]].append(said[v])
    return _Inside(inside, said, scales, along)


def _by_node(tree: Tree, seen: Seen) -> dict[int, Vector]:
    """What is seen at each node where something is, by state, (..., rows)."""
    parts = zip(*(e.unbind(-2) for e in seen.states), strict=True)
    return dict(zip(tree.seen, parts, strict=True))


def _times(factors: Sequence[Vector], step: Matrix) -> tuple[Vector, list[Tensor]]:
    """Product of what is said of a node, with each factor brought to a sum of 1, and the divisors.

    A sum below 1e-19 (float64: 1e-154) is divided by that, and what is left by the next divisor.
    """
    if not factors:
        return tuple(torch.ones_like(step[0][0]) for _ in step), []
    out, scales = factors[0], []
    least = math.sqrt(torch.finfo(out[0].dtype).tiny)  # so that two can be multiplied
    for other in factors[1:]:
        out = tuple(a * b for a, b in zip(out, other, strict=True))
        scale = sum(out[1:], start=out[0]).detach().clamp_min(least)  # any will do: it has no derivative
        over = scale.reciprocal()
        out = tuple(x * over for x in out)
        scales.append(scale)
    return out, scales


def log_likelihood(tree: Tree, seen: Seen, step: Matrix, root: Vector) -> Tensor:
    """Log probability of what is seen at the nodes of a tree, all states summed out.

    Args:
        tree: its shape.
        seen: from ``scaled``: by state, (..., seen nodes, rows).
        step: probabilities of one unit step, from state (row) to state (column), each fit for (..., rows).
        root: probabilities of a root's state, each fit for (..., rows).

    Returns:
        Of each row, (..., rows).

    Notes:
        K**2 multiplications for each edge and row, and K**3 for each distinct matrix power. States more than
        40 nats less likely than the likeliest (float32; float64: 340) count as that much less.
    """
    found = _inside(tree, seen, step)
    total = seen.log_scale
    pairs = [a * b for a, b in zip(found.scales[::2], found.scales[1::2], strict=False)]
    for part in pairs + found.scales[2 * len(pairs) :]:  # a logarithm costs more than a product
        total = total + part.log()
    for v, p in enumerate(tree.parent):
        if p < 0:
            total = total + _dot(root, found.inside[v]).log()
    return total


class Posterior(NamedTuple):
    """What is believed of the hidden states, given what is seen.

    Args:
        states: of each node, in the tree's order, its states' probabilities: (nodes, K, ..., rows).
        pairs: of each edge, in the order of ``Tree.edges``, the probabilities of the states at its two ends,
            parent first: (edges, K, K, ..., rows).
    """

    states: Tensor
    pairs: Tensor


def posterior(tree: Tree, seen: Seen, step: Matrix, root: Vector) -> Posterior:
    """Posterior of the states of every node, seen or not, and of both ends of every edge.

    The arguments are those of ``log_likelihood``.
    """
    found, own_of = _inside(tree, seen, step), _by_node(tree, seen)
    outside: list[Vector] = [root] * len(tree.parent)
    pairs = []
    for c in tree.edges:  # parents before children, so that what is outside of the parent is known
        v, along = tree.parent[c], found.along[tree.length[c]]
        others = [outside[v], *(found.said[d] for d in tree.edges if tree.parent[d] == v and d != c)]
        if v in own_of:
            others.append(own_of[v])
        here, _ = _times(others, step)
        outside[c] = tuple(_dot(here, arriving) for arriving in zip(*along, strict=True))
        joint = [here[i] * t * found.inside[c][j] for i, row in enumerate(along) for j, t in enumerate(row)]
        pairs.append(_normalised(joint).unflatten(0, (len(step), len(step))))
    states = [
        _normalised([a * b for a, b in zip(o, i, strict=True)])
        for o, i in zip(outside, found.inside, strict=True)
    ]
    return Posterior(_stacked(states), _stacked(pairs) if pairs else states[0].new_zeros(0))


def _normalised(parts: Sequence[Tensor]) -> Tensor:
    joint = _stacked(parts)
    return joint / joint.sum(0)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts))
