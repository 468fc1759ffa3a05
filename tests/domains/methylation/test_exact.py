"""Acceptance "exact": genotypes summed out, against sums over all of them and against Pyro's enumeration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

from domains.genomics import transmission
from domains.genomics.methylation import EXAMPLE, tree_of
from domains.genomics.pedigrees import Pedigree
from domains.genomics.reads import Errors, PedigreeReads, seen
from domains.genomics.transmission import REPRODUCTIONS, Reproduction
from scivi.models import sum_product
from scivi.models.binding import seeded
from scivi.models.sum_product import Tree, Vector

LOCI, MOST = 5, 12
EXACT = 1e-10  # the acceptance; log likelihoods are of some tens of nats
FLOAT32 = 1e-3  # the acceptance, of gradients at rates of 1e-8 to 1e-2
RATES = [1e-8, 1e-6, 1e-4, 1e-2]


def stacked(matrix: sum_product.Matrix) -> np.ndarray:
    return torch.stack([torch.stack(row) for row in matrix]).numpy()


def random_tree(rng: np.random.Generator, n: int) -> Tree:
    """Any topology; inner nodes and leaves may be unobserved, edges may have no length."""
    parent = [-1] + [int(rng.integers(0, v)) for v in range(1, n)]
    observed = rng.permutation(n)[: rng.integers(1, n + 1)]
    return Tree(tuple(parent), (0, *map(int, rng.integers(0, 5, n - 1))), tuple(map(int, observed)))


def double(x) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def random_reads(seed: int, reproduction: Reproduction) -> tuple[PedigreeReads, Tensor]:
    """A tree of at most seven nodes, rates and founders of each locus, errors of each sample, reads."""
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, int(rng.integers(2, 8)))
    gain, loss = (double(10 ** rng.uniform(-8, -0.5, LOCI)) for _ in range(2))
    step = transmission.step(reproduction, gain, loss)
    root = double(rng.dirichlet(np.ones(len(step)), LOCI).T).unbind(0)
    total = rng.poisson(4, (LOCI, len(tree.seen))).clip(0, MOST)
    total[rng.random(total.shape) < 0.3] = 0  # not covered
    found = Errors(
        double(rng.uniform(1e-3, 0.05, len(tree.seen))),
        double([rng.uniform(0.01, 0.1)]),
        double([rng.uniform(0.01, 0.2)]),
    )
    reads = PedigreeReads(tree, step, root, double(total), found, most=MOST)
    return reads, double(rng.binomial(total, 0.5))


def every_genotype(reads: PedigreeReads, methylated: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """All genotypes of all nodes (way, node), and log probabilities with the reads (way, locus), by scipy."""
    tree, k = reads.tree, len(reads.root)
    ways = np.indices((k,) * len(tree.parent)).reshape(len(tree.parent), -1).T
    along = np.moveaxis(stacked(reads.step), -1, 0)
    errors, m, n = reads.errors, methylated.numpy(), reads.total.numpy()
    phi = float(1 / errors.overdispersion - 1)
    with np.errstate(divide="ignore"):
        log_p = np.log(torch.stack(reads.root).numpy())[ways[:, 0]]
        for v in tree.edges:
            power = np.moveaxis(np.linalg.matrix_power(along, tree.length[v]), 0, -1)
            log_p = log_p + np.log(power)[ways[:, tree.parent[v]], ways[:, v]]
    for s, v in enumerate(tree.seen):
        mean = [float(errors.nonconversion[s]), *[0.5] * (k - 2), 1 - float(errors.inappropriate)]
        log_e = [stats.betabinom.logpmf(m[:, s], n[:, s], mu * phi, (1 - mu) * phi) for mu in mean]
        log_p = log_p + np.array(log_e)[ways[:, v]]
    return ways, log_p


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_exact_likelihood_of_reads_sums_over_all_genotypes(seed, reproduction):
    reads, methylated = random_reads(seed, reproduction)
    truth = logsumexp(every_genotype(reads, methylated)[1], 0)
    np.testing.assert_allclose(reads.log_prob(methylated), truth, rtol=0, atol=EXACT)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_exact_posterior_genotypes_and_changes(seed, reproduction):
    reads, methylated = random_reads(seed, reproduction)
    ways, log_p = every_genotype(reads, methylated)
    weight, tree, k = np.exp(log_p - logsumexp(log_p, 0)), reads.tree, len(reads.root)
    of_reads = seen(methylated, reads.total, reads.errors, k, MOST)
    found = sum_product.posterior(tree, of_reads, reads.step, reads.root)
    for v, i in np.ndindex(len(tree.parent), k):
        np.testing.assert_allclose(found.states[v, i], weight[ways[:, v] == i].sum(0), rtol=0, atol=EXACT)
    for place, c in enumerate(tree.edges):
        for i, j in np.ndindex(k, k):
            both = (ways[:, tree.parent[c]] == i) & (ways[:, c] == j)
            np.testing.assert_allclose(found.pairs[place, i, j], weight[both].sum(0), rtol=0, atol=EXACT)


def enumerated(reads: PedigreeReads, methylated: Tensor) -> None:
    """The same as a Pyro model whose genotypes are sites."""
    tree, e = reads.tree, reads.errors
    along = {
        g: torch.stack([torch.stack(row, -1) for row in matrix], -2)
        for g, matrix in sum_product.powers(reads.step, [tree.length[v] for v in tree.edges]).items()
    }
    phi = 1 / e.overdispersion - 1
    place = torch.arange(LOCI)
    with pyro.plate("locus", LOCI):
        genotypes = []
        for v, p in enumerate(tree.parent):
            if p < 0:
                law = dist.Categorical(torch.stack(reads.root, -1))
            else:
                law = dist.Categorical(Vindex(along[tree.length[v]])[place, genotypes[p]])
            genotypes.append(pyro.sample(f"genotype_{v}", law))
        for s, v in enumerate(tree.seen):
            means = [e.nonconversion[s], *[double(0.5)] * (len(reads.root) - 2), 1 - e.inappropriate[0]]
            mean = torch.stack(means)[genotypes[v]]
            law = dist.BetaBinomial(mean * phi, (1 - mean) * phi, reads.total[:, s])
            pyro.sample(f"reads_{s}", law, obs=methylated[:, s])


def no_guide(*_) -> None:
    pass


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize("seed", [0, 3])
def test_exact_against_pyros_enumeration(seed, reproduction):
    reads, methylated = random_reads(seed, reproduction)
    model, elbo = config_enumerate(enumerated), TraceEnum_ELBO(max_plate_nesting=1)
    assert -elbo.loss(model, no_guide, reads, methylated) == pytest.approx(
        float(reads.log_prob(methylated).sum()), abs=1e-8
    )  # the acceptance
    theirs = elbo.compute_marginals(model, no_guide, reads, methylated)
    of_reads = seen(methylated, reads.total, reads.errors, len(reads.root), MOST)
    ours = sum_product.posterior(reads.tree, of_reads, reads.step, reads.root).states
    for v in range(len(reads.tree.parent)):
        torch.testing.assert_close(theirs[f"genotype_{v}"].probs.mT, ours[v], rtol=0, atol=1e-8)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
def test_exact_gradients_are_those_of_pyros_enumeration(reproduction):
    reads, methylated = random_reads(3, reproduction)
    log_rates = double(np.log([[0.002, 0.01, 0.1, 0.3, 1e-4], [0.02, 1e-5, 0.2, 0.1, 0.005]]))
    found = []
    for pyros in (False, True):
        leaf = log_rates.clone().requires_grad_(True)
        here = PedigreeReads(
            reads.tree,
            transmission.step(reproduction, *leaf.exp().unbind(0)),
            reads.root,
            reads.total,
            reads.errors,
            most=MOST,
        )
        if pyros:
            elbo = TraceEnum_ELBO(max_plate_nesting=1)
            loss = elbo.differentiable_loss(config_enumerate(enumerated), no_guide, here, methylated)
        else:
            loss = -here.log_prob(methylated).sum()
        found.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)  # the acceptance


TREE = tree_of(EXAMPLE)
FOUNDER = {"haploid": (0.7, 0.3), "selfing": (0.7, 0.02, 0.28)}
ERRORS = Errors(double(np.linspace(0.003, 0.01, len(TREE.seen))), double([0.02]), double([0.02]))


def as_type(errors: Errors, dtype: torch.dtype) -> Errors:
    return Errors(*(x.to(dtype) for x in (errors.nonconversion, errors.inappropriate, errors.overdispersion)))


def simulated(reproduction: Reproduction, gain: float, loss: float, loci: int) -> tuple[Tensor, Tensor]:
    """Reads of the example pedigree, of which nine per sample are expected."""
    founder = FOUNDER.get(reproduction, FOUNDER["selfing"])
    with seeded(1):
        total = torch.poisson(torch.full((loci, len(TREE.seen)), 9.0, dtype=torch.float64)).clamp_max(MOST)
        step = transmission.step(reproduction, double(gain), double(loss))
        reads = PedigreeReads(TREE, step, double(founder).unbind(0), total, ERRORS, most=MOST)
        return reads.sample(), total


def slopes(
    reproduction: Reproduction, gain: float, loss: float, m: Tensor, n: Tensor, dtype: torch.dtype
) -> Tensor:
    """Of each locus's log likelihood by its log gain and log loss, (2, loci)."""
    founder = FOUNDER.get(reproduction, FOUNDER["selfing"])
    leaf = torch.tensor(np.log([[gain], [loss]]), dtype=dtype).repeat(1, len(n)).requires_grad_(True)
    step = transmission.step(reproduction, *leaf.exp().unbind(0))
    root = torch.tensor(founder, dtype=dtype).unbind(0)
    reads = PedigreeReads(TREE, step, root, n.to(dtype), as_type(ERRORS, dtype), most=MOST)
    return torch.autograd.grad(reads.log_prob(m.to(dtype)).sum(), leaf)[0].double()


def sizes(reproduction: Reproduction, gain: float, loss: float, m: Tensor, n: Tensor) -> Tensor:
    """What the slopes are sums of, without signs, (2, loci).

    A slope is the sum over edges and their ends of P(i, j | reads) d ln T_ij / d ln rate: chances that a copy
    changed, less chances that it did not.
    """
    founder = FOUNDER.get(reproduction, FOUNDER["selfing"])
    step = transmission.step(reproduction, double(gain), double(loss))
    of_reads = seen(m, n, ERRORS, len(step), MOST)
    pairs = sum_product.posterior(TREE, of_reads, step, double(founder).unbind(0)).pairs

    def log_powers(log_rates: Tensor) -> Tensor:
        rows = transmission.step(reproduction, *log_rates.exp().unbind(0))
        along = sum_product.powers(rows, [TREE.length[v] for v in TREE.edges])
        along = [torch.stack([torch.stack(row) for row in along[TREE.length[v]]]) for v in TREE.edges]
        return torch.stack(along).clamp_min(1e-300).log()  # a change that cannot be has no slope

    by_rate = torch.autograd.functional.jacobian(log_powers, double(np.log([gain, loss])))
    return torch.einsum("eijl,eijr->rl", pairs, by_rate.abs())


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
@pytest.mark.parametrize("gain", RATES)
@pytest.mark.parametrize("loss", RATES)
def test_exact_float32_gradient(gain, loss, reproduction):
    m, n = simulated(reproduction, gain, loss, 4000)
    few, many = (slopes(reproduction, gain, loss, m, n, d) for d in (torch.float32, torch.float64))
    size = sizes(reproduction, gain, loss, m, n)
    assert bool((size >= many.abs() * (1 - 1e-9)).all())  # it is what the slopes are sums of
    # of many loci: relative to the sum itself unless it cancels to less than a hundredth of its parts
    scale = torch.maximum(many.sum(1).abs(), size.sum(1) / 100)
    assert float(((few - many).sum(1).abs() / scale).max()) < FLOAT32
    # of each locus: relative to the slope itself, likewise
    scale = torch.maximum(many.abs(), size / 100)
    assert float(((few - many).abs() / scale).max()) < FLOAT32


def test_reads_that_are_masked_are_reads_that_are_not_there():
    reads, methylated = random_reads(2, "selfing")
    mask = torch.rand(methylated.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    found = reads.present(mask).log_prob(methylated)
    truth = logsumexp(
        every_genotype(
            PedigreeReads(reads.tree, reads.step, reads.root, reads.total * mask, reads.errors, most=MOST),
            methylated * mask,
        )[1],
        0,
    )
    np.testing.assert_allclose(found, truth, rtol=0, atol=EXACT)
    nothing = reads.present(torch.zeros_like(mask)).log_prob(methylated)
    np.testing.assert_allclose(nothing, 0, atol=1e-14)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
def test_probabilities_of_all_reads_sum_to_one(reproduction):
    reads, outcomes, _ = _small(reproduction)
    assert float(reads.log_prob(outcomes).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
def test_sampled_reads_come_as_often_as_their_probability_says(reproduction):
    reads, outcomes, one = _small(reproduction)
    expected, draws = reads.log_prob(outcomes).exp().numpy(), 200_000
    with seeded(0):
        drawn = one.sample((draws,)).squeeze(1)
    base = torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64)
    counted = np.bincount((drawn @ base).long().numpy(), minlength=27)[(outcomes @ base).long().numpy()]
    assert counted.sum() == draws
    # each frequency has a standard error of (p (1 - p) / draws)**.5; the test of all at once fails by chance
    # once in 1e4 seeds
    assert stats.chisquare(counted, draws * expected).pvalue > 1e-4


def _small(reproduction: Reproduction) -> tuple[PedigreeReads, Tensor, PedigreeReads]:
    """A pedigree with a founder not sequenced, all outcomes of two reads of three samples, and one locus."""
    tree = Tree((-1, 0, 1, 0), (0, 2, 1, 3), (1, 2, 3))
    step = transmission.step(reproduction, double(0.1), double(0.2))
    root = double([0.5, *[0.2] * (len(step) - 2), 0.5 - 0.2 * (len(step) - 2)]).unbind(0)
    errors = Errors(double([0.02, 0.05, 0.1]), double([0.04]), double([0.1]))
    outcomes = torch.cartesian_prod(*[torch.arange(3.0, dtype=torch.float64)] * 3)
    many, one = (
        PedigreeReads(tree, step, root, torch.full((n, 3), 2.0, dtype=torch.float64), errors, most=2)
        for n in (len(outcomes), 1)
    )
    return many, outcomes, one


@pytest.mark.parametrize("reproduction", REPRODUCTIONS)
def test_collapsed_pedigree_is_the_full_one(reproduction):
    """Founder 0; 1 and 2 are only on the way to 3 and 5; 4 has no descendant with reads; 6 hangs on 5."""
    pedigree = Pedigree(
        ("0", "1", "2", "3", "4", "5", "6", "7"),
        ("", "0", "1", "2", "2", "1", "5", "4"),
        (0, 1, 3, 2, 1, 4, 0, 2),
        samples=("3", "6", "5"),
    )
    full, short = (tree_of(pedigree, collapsed=c) for c in (False, True))
    assert (len(full.parent), len(short.parent)) == (8, 5)
    reads, _ = random_reads(0, reproduction)
    generator = torch.Generator().manual_seed(0)
    total = torch.randint(0, MOST, (LOCI, 3), generator=generator).double()
    methylated = (total * torch.rand(LOCI, 3, generator=generator)).round()
    errors = replace(reads.errors, nonconversion=double([0.01, 0.02, 0.03]))
    found = [
        PedigreeReads(tree, reads.step, reads.root, total, errors, most=MOST).log_prob(methylated)
        for tree in (full, short)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_one_founder_for_all_loci_or_one_of_each():
    reads, methylated = random_reads(1, "selfing")
    root: Vector = double([0.5, 0.2, 0.3]).unbind(0)
    each = tuple(x.expand(LOCI) for x in root)
    found = [
        PedigreeReads(reads.tree, reads.step, r, reads.total, reads.errors, most=MOST).log_prob(methylated)
        for r in (root, each)
    ]
    torch.testing.assert_close(*found)


def test_draws_of_errors_come_before_loci():
    reads, methylated = random_reads(1, "selfing")
    nonconversion = torch.stack([reads.errors.nonconversion, 2 * reads.errors.nonconversion])
    errors = Errors(
        nonconversion, *(x.repeat(2, 1) for x in (reads.errors.inappropriate, reads.errors.overdispersion))
    )
    both = PedigreeReads(reads.tree, reads.step, reads.root, reads.total, errors, most=MOST)
    assert both.batch_shape == (2, LOCI)
    found = both.log_prob(methylated)
    for draw in range(2):
        alone = Errors(nonconversion[draw], reads.errors.inappropriate, reads.errors.overdispersion)
        one = PedigreeReads(reads.tree, reads.step, reads.root, reads.total, alone, most=MOST)
        torch.testing.assert_close(found[draw], one.log_prob(methylated))
    assert both.sample().shape == (2, LOCI, len(reads.tree.seen))
