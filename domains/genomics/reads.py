"""Methylated reads of the sampled members of a pedigree, their genotypes summed out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Beta as BetaDistribution
from torch.distributions import Binomial, constraints

from scivi.models import sum_product
from scivi.models.counts import log_rising
from scivi.models.sum_product import Matrix, Seen, Tree, Vector


@dataclass(frozen=True)
class Errors:
    """What sequencing makes of a genotype.

    Args:
        nonconversion: chance that an unmethylated read is taken for methylated, by sample, (*, samples).
        inappropriate: chance that a methylated read is taken for unmethylated, (*, 1).
        overdispersion: correlation of two reads of one sample at one locus, in (0, 1), (*, 1).
    """

    nonconversion: Tensor
    inappropriate: Tensor
    overdispersion: Tensor

    def fractions(self, n_states: int) -> list[tuple[Tensor, Tensor]]:
        """By state, expected fractions of methylated and of unmethylated reads, each (*, samples or 1)."""
        half = torch.full_like(self.inappropriate, 0.5)
        unmethylated = (self.nonconversion, 1 - self.nonconversion)
        methylated = (1 - self.inappropriate, self.inappropriate)
        return [unmethylated, *[(half, half)] * (n_states - 2), methylated]


def seen(methylated: Tensor, total: Tensor, errors: Errors, n_states: int, most: int) -> Seen:
    """Likelihood of reads in each state: beta-binomial around nonconversion, 1/2 and 1 - inappropriate.

        m ~ BetaBinomial(n, a = mu_k phi, b = (1 - mu_k) phi),   phi = (1 - rho) / rho

    Args:
        methylated: reads m, (loci, samples).
        total: of n; where it is 0 nothing is learnt.
        errors: of sequencing.
        n_states: 2 (U, M) or 3 (UU, UM, MM).
        most: the largest n.

    Returns:
        By state, (*, samples, loci), worked out in float64 and given in the dtype of ``total``.
    """
    m, n = methylated.mT.long().contiguous(), total.mT.long().contiguous()
    rho = errors.overdispersion.double()
    phi = (1 - rho) / rho
    logs = [
        log_rising(mean.double() * phi, m, most) + log_rising(rest.double() * phi, n - m, most)
        for mean, rest in errors.fractions(n_states)
    ]
    found = sum_product.scaled(torch.broadcast_tensors(*logs))
    one = torch.ones_like(phi.flatten()[:1]).detach()
    ways = log_rising(one, n, most) - log_rising(one, m, most) - log_rising(one, n - m, most)
    log_scale = found.log_scale + (ways - log_rising(phi, n, most)).sum(-2)
    return Seen(tuple(e.to(total.dtype) for e in found.states), log_scale.to(total.dtype))


class PedigreeReads(TorchDistribution):
    """Methylated reads of all samples at a locus; the genotypes of the pedigree are summed out exactly.

    Args:
        tree: the pedigree.
        step: one generation, by state before and after, each broadcast to (*, loci).
        root: the founder's states, each broadcast to (*, loci).
        total: reads, (loci, samples).
        errors: of sequencing.
        most: the largest total.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support: ClassVar[constraints.Constraint] = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(
        self, tree: Tree, step: Matrix, root: Vector, total: Tensor, errors: Errors, *, most: int
    ) -> None:
        self.tree, self.step, self.root = tree, step, root
        self.total, self.errors, self.most = total, errors, most
        of_states = [x.shape for row in (*step, root) for x in row]
        of_errors = [(*x.shape[:-1], 1) for x in (errors.nonconversion, errors.inappropriate)]
        shape = torch.broadcast_shapes(total.shape[:-1], *of_states, *of_errors)
        super().__init__(shape, total.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> PedigreeReads:
        """The same distribution over a larger batch."""
        made = PedigreeReads(self.tree, self.step, self.root, self.total, self.errors, most=self.most)
        made._batch_shape = torch.Size(batch_shape)
        return made

    def present(self, mask: Tensor) -> PedigreeReads:
        """The distribution of those reads that are there: a sample without them says nothing of its locus."""
        total = self.total * mask
        return PedigreeReads(self.tree, self.step, self.root, total, self.errors, most=self.most)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of methylated reads (loci, samples), (*, loci)."""
        methylated = torch.minimum(value, self.total)
        given = seen(methylated, self.total, self.errors, len(self.root), self.most)
        found = sum_product.log_likelihood(self.tree, given, self.step, self.root)
        return found.expand(self.batch_shape)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Methylated reads, (*sample, *batch, samples): genotypes from the founder down, then reads."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            by_length = sum_product.powers(self.step, {self.tree.length[v] for v in self.tree.edges})
            states: list[Tensor] = []
            for parent, length in zip(self.tree.parent, self.tree.length, strict=True):
                rows = by_length[length] if parent >= 0 else (self.root,)
                given = states[parent] if parent >= 0 else torch.zeros(shape, device=self.total.device)
                uniform = torch.rand(shape, dtype=self.total.dtype, device=self.total.device)
                state = torch.zeros_like(uniform)
                for k, row in enumerate(rows):
                    below = torch.zeros_like(uniform)
                    for probability in row[:-1]:
                        below = below + probability
                        state = torch.where(given == k, state + (uniform > below), state)
                states.append(state)
            sampled = torch.stack([states[v] for v in self.tree.seen], -1)
            return _reads(sampled, self.total, self.errors, len(self.root))


def _reads(states: Tensor, total: Tensor, errors: Errors, n_states: int) -> Tensor:
    """Beta-binomial reads of states (*, samples), in 0 .. n_states - 1."""
    mean = torch.zeros_like(states)
    for k, (fraction, _) in enumerate(errors.fractions(n_states)):
        mean = torch.where(states == k, fraction.unsqueeze(-2), mean)
    rho = errors.overdispersion.unsqueeze(-2)
    phi = (1 - rho) / rho
    level = BetaDistribution(mean * phi, (1 - mean) * phi).sample()
    return Binomial(total.expand_as(level), level).sample()
