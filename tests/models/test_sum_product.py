from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from scivi.models.sum_product import Matrix, Seen, Tree, Vector, log_likelihood, posterior, powers, scaled

ROWS = 6
EXACT = (
    1e-10  # of log likelihoods of some tens of nats and of probabilities: 1e4 roundings of float64 at most
)


def random_tree(rng: np.random.Generator, n: int, roots: int = 1) -> Tree:
    """Any topology: inner nodes and leaves may be unseen, edges may have no length."""
    parent = [-1] * roots + [int(rng.integers(0, v)) for v in range(roots, n)]
    length = [0 if p < 0 else int(rng.integers(0, 6)) for p in parent]
    seen = rng.permutation(n)[: rng.integers(1, n + 1)]
    return Tree(tuple(parent), tuple(length), tuple(map(int, seen)))


def random_numbers(rng: np.random.Generator, tree: Tree, k: int, scale: float = 5.0) -> list[np.ndarray]:
    """Log likelihoods (state, seen, row), step (state, state, row), root (state, row)."""
    log_e = scale * rng.normal(size=(k, len(tree.seen), ROWS))
    log_e[:, rng.random(log_e.shape[1:]) < 0.2] = 0  # nothing was seen there
    step = np.moveaxis(rng.dirichlet(np.full(k, 0.3), (k, ROWS)), -1, 1)
    return [log_e, step, rng.dirichlet(np.ones(k), ROWS).T]


def every_state(tree: Tree, log_e: np.ndarray, step: np.ndarray, root: np.ndarray) -> tuple[np.ndarray, ...]:
    """All ways to give states to the nodes (way, node), and their log probabilities (way, row)."""
    k = len(root)
    ways = np.indices((k,) * len(tree.parent)).reshape(len(tree.parent), -1).T
    with np.errstate(divide="ignore"):
        log_p = sum(np.log(root[ways[:, v]]) for v, p in enumerate(tree.parent) if p < 0)
        for v in tree.edges:
            along = np.linalg.matrix_power(np.moveaxis(step, -1, 0), tree.length[v])
            log_p = log_p + np.log(np.moveaxis(along, 0, -1))[ways[:, tree.parent[v]], ways[:, v]]
    for s, v in enumerate(tree.seen):
        log_p = log_p + log_e[ways[:, v], s]
    return ways, log_p


def given(
    log_e: np.ndarray, step: np.ndarray, root: np.ndarray, dtype: torch.dtype = torch.float64
) -> tuple[Seen, Matrix, Vector]:
    """The same as the arguments of the functions."""
    rows = [[torch.tensor(x, dtype=dtype) for x in row] for row in (*step, root)]
    *matrix, first = (tuple(row) for row in rows)
    return scaled([torch.tensor(x, dtype=dtype) for x in log_e]), tuple(matrix), first


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seed", range(12))
def test_exact_likelihood_and_posterior_are_sums_over_all_states(seed, k):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, int(rng.integers(1, 8)), roots=1)
    numbers = random_numbers(rng, tree, k)
    ways, log_p = every_state(tree, *numbers)
    truth = logsumexp(log_p, 0)
    np.testing.assert_allclose(log_likelihood(tree, *given(*numbers)), truth, rtol=0, atol=EXACT)
    found, weight = posterior(tree, *given(*numbers)), np.exp(log_p - truth)
    assert found.states.shape == (len(tree.parent), k, ROWS)
    for v in range(len(tree.parent)):
        for i in range(k):
            expected = weight[ways[:, v] == i].sum(0)
            np.testing.assert_allclose(found.states[v, i], expected, rtol=0, atol=EXACT)
    for place, c in enumerate(tree.edges):
        for i, j in np.ndindex(k, k):
            both = (ways[:, tree.parent[c]] == i) & (ways[:, c] == j)
            np.testing.assert_allclose(found.pairs[place, i, j], weight[both].sum(0), rtol=0, atol=EXACT)


def test_exact_for_several_trees_at_once():
    rng = np.random.default_rng(5)
    tree = random_tree(rng, 7, roots=3)
    numbers = random_numbers(rng, tree, 3)
    truth = logsumexp(every_state(tree, *numbers)[1], 0)
    np.testing.assert_allclose(log_likelihood(tree, *given(*numbers)), truth, rtol=0, atol=EXACT)


def test_exact_of_one_node_and_of_a_pair_at_no_distance():
    log_e = np.log([[[0.2]], [[0.9]]])
    step, root = np.array([[[0.7], [0.3]], [[0.1], [0.9]]]), np.array([[0.25], [0.75]])
    alone = log_likelihood(Tree((-1,), (0,), (0,)), *given(log_e, step, root))
    assert float(alone) == pytest.approx(np.log(0.25 * 0.2 + 0.75 * 0.9), abs=1e-15)  # by hand
    twice = np.concatenate([log_e, log_e], 1)
    both = log_likelihood(Tree((-1, 0), (0, 0), (0, 1)), *given(twice, step, root))
    assert float(both) == pytest.approx(
        np.log(0.25 * 0.2**2 + 0.75 * 0.9**2), abs=1e-15
    )  # one state, seen twice


def test_what_is_not_seen_changes_nothing():
    rng = np.random.default_rng(1)
    tree = Tree((-1, 0, 0, 1, 1), (0, 2, 1, 3, 1), (3, 4, 2))
    numbers = random_numbers(rng, tree, 3)
    more = Tree((*tree.parent, 4, 2), (*tree.length, 2, 5), (*tree.seen, 5))
    log_e = np.concatenate([numbers[0], np.zeros((3, 1, ROWS))], 1)
    short = log_likelihood(tree, *given(*numbers))
    torch.testing.assert_close(log_likelihood(more, *given(log_e, *numbers[1:])), short, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shared", ["step", "root", "both"])
def test_numbers_that_rows_share_need_not_be_repeated(shared):
    rng = np.random.default_rng(2)
    tree = random_tree(rng, 6)
    log_e, step, root = random_numbers(rng, tree, 3)
    step = step[..., :1] if shared != "root" else step
    root = root[..., :1] if shared != "step" else root
    seen, short, first = given(log_e, step, root)
    if shared == "both":
        short = tuple(tuple(x.squeeze() for x in row) for row in short)
    full = given(log_e, *(np.broadcast_to(x, (*x.shape[:-1], ROWS)) for x in (step, root)))
    torch.testing.assert_close(log_likelihood(tree, seen, short, first), log_likelihood(tree, *full))
    for few, many in zip(posterior(tree, seen, short, first), posterior(tree, *full), strict=True):
        torch.testing.assert_close(few.expand(many.shape), many)


def test_draws_come_before_rows():
    rng = np.random.default_rng(3)
    tree = random_tree(rng, 5)
    log_e, step, root = random_numbers(rng, tree, 3)
    other = random_numbers(rng, tree, 3)[1]
    seen, first, start = given(log_e, step, root)
    second = given(log_e, other, root)[1]
    both = tuple(
        tuple(torch.stack([a, b]) for a, b in zip(*rows, strict=True))
        for rows in zip(first, second, strict=True)
    )
    found = log_likelihood(tree, seen, both, start)
    assert found.shape == (2, ROWS)
    for draw, matrix in enumerate((first, second)):
        torch.testing.assert_close(found[draw], log_likelihood(tree, seen, matrix, start))


def test_slopes_are_those_of_differences():
    rng = np.random.default_rng(4)
    tree = Tree((-1, 0, 0, 1, 1), (0, 2, 1, 3, 0), (3, 4, 0))
    log_e, step, root = random_numbers(rng, tree, 3, scale=1.0)

    def function(log_e: Tensor, step: Tensor, root: Tensor) -> Tensor:
        matrix = tuple(tuple(row.unbind(0)) for row in step.unbind(0))
        return log_likelihood(tree, scaled(log_e.unbind(0)), matrix, root.unbind(0))

    leaves = tuple(torch.tensor(x).requires_grad_(True) for x in (log_e, step, root))
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", ["chain", "star", "comb"])
def test_large_trees_stay_in_range(shape, dtype):
    n, rng = 400, np.random.default_rng(6)
    above = {"chain": lambda v: v - 1, "star": lambda v: 0, "comb": lambda v: v - 1 - v % 2}[shape]
    tree = Tree((-1, *(max(0, above(v)) for v in range(1, n))), (0, *[1] * (n - 1)), tuple(range(1, n)))
    rate = 1e-4
    step = np.array([[1 - rate, rate], [rate, 1 - rate]])[..., None]
    state = rng.integers(0, 2, n - 1)  # half of the nodes disagree with the others: each change is rare
    log_e = np.where(state == np.arange(2)[:, None], 0.0, -30.0)[..., None]
    root = np.array([[0.4], [0.6]])
    found = log_likelihood(tree, *given(log_e, step, root, dtype))
    truth = _in_logs(tree, log_e, np.log(step), np.log(root))
    error = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]  # 400 roundings
    np.testing.assert_allclose(found, truth, rtol=error)


def _in_logs(tree: Tree, log_e: np.ndarray, log_step: np.ndarray, log_root: np.ndarray) -> np.ndarray:
    """The same sums wholly in logarithms, for edges of length 1 and a single root that is not seen."""
    log_inside = np.zeros((len(tree.parent), len(log_root), log_e.shape[-1]))
    for s, v in enumerate(tree.seen):
        log_inside[v] += log_e[:, s]
    for v in reversed(tree.edges):
        log_inside[tree.parent[v]] += logsumexp(log_step + log_inside[v], axis=1)
    return logsumexp(log_root + log_inside[0], axis=0)


def test_float32_keeps_probabilities_of_1e_16():
    small = 1e-16
    step = np.array([[1 - small, small], [small, 1 - small]])[..., None]
    log_e = np.array([[[-35.0], [0.0]], [[0.0], [-35.0]]])  # two nodes that all but surely differ
    tree, root = Tree((-1, 0, 0), (0, 1, 1), (1, 2)), np.array([[0.5], [0.5]])
    numbers = (log_e, step, root)
    truth = logsumexp(every_state(tree, *numbers)[1], 0)
    found = log_likelihood(tree, *given(*numbers, torch.float32))
    np.testing.assert_allclose(found, truth, rtol=1e-6)  # ten roundings of float32


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 40.0), (torch.float64, 340.0)])
def test_states_beyond_the_floor_count_as_much_as_at_it(dtype, floor):
    seen = scaled([torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), -2 * floor, dtype=dtype)])
    assert float(seen.states[1].log()) == pytest.approx(-floor, rel=1e-6)
    assert float(seen.states[1]) ** 2 > torch.finfo(dtype).tiny  # as the module says


@pytest.mark.parametrize("shape", [(), (3,)])
def test_powers_are_repeated_products(shape):
    rng = np.random.default_rng(7)
    step = rng.dirichlet(np.ones(3), (*shape, 3))
    exponents = [0, 1, 2, 3, 7, 30, 31, 1000]
    entries = torch.tensor(np.moveaxis(step, (-2, -1), (0, 1)))
    found = powers(tuple(tuple(row.unbind(0)) for row in entries.unbind(0)), exponents)
    assert list(found) == exponents
    for n, matrix in found.items():
        truth = np.moveaxis(np.linalg.matrix_power(step, n), (-2, -1), (0, 1))
        np.testing.assert_allclose(torch.stack([torch.stack(row) for row in matrix]), truth, rtol=1e-12)


def test_powers_of_small_rates_keep_their_digits_in_float32():
    rate, n = 1e-8, 1000
    entries = [[1 - rate, rate], [2 * rate, 1 - 2 * rate]]
    step = tuple(tuple(torch.tensor(x) for x in row) for row in entries)
    found = powers(step, [n])[n]
    eigenvalue = (1 - 3 * rate) ** n  # closed form of a chain of two states
    assert float(found[0][1]) == pytest.approx(
        (1 - eigenvalue) / 3, rel=1e-4
    )  # 1 - rate is rounded 1000 times
    assert float(found[1][0]) == pytest.approx(2 * (1 - eigenvalue) / 3, rel=1e-4)


def test_a_child_before_its_parent_is_refused():
    with pytest.raises(ValueError, match="a parent must come before its children"):
        Tree((1, -1), (1, 0), (0,))


def test_edges_are_the_nodes_with_a_parent():
    tree = Tree((-1, 0, -1, 2), (0, 1, 0, 1), (3,))
    assert tree.edges == (1, 3)
    assert all(a < b for a, b in pairwise(tree.edges))
