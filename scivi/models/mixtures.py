"""``Adapted``: Student-t distributions over all latents together, mixed, which no gradient steps place.

References:
    Cappé, Douc, Guillin, Marin, Robert 2008, Stat. Comput. 18, 447, arXiv:0710.4242 (mixtures of Student-t
    distributions as proposals, fitted to their own weighted draws).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from scivi.errors import Unsupported
from scivi.models.guides import JointGuide, Slot, Start, refuse_discrete, slots_of
from scivi.models.sites import Site

ONE = torch.Size()
MOST_LATENTS = 200  # entries of all latents together (our choice: the covariances of 16 parts, 2.5 MB)
MOST_KEPT = 4000  # draws of NUTS (our choice: as many as a run here makes)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A guide that is fitted by adaptive importance sampling; ``guide="auto"`` is this with its defaults.

    One Student-t distribution at the mode; more, up to ``components``, for as long as importance weights show
    that the posterior is not reached. All rows are needed at once, and latents may be 200 numbers together.

    Args:
        components: the most.
        freedom: degrees of freedom; None for 4, and a third of the number of latents where these are more:
            tails heavier than the posterior's keep weights bounded, and cost more the more latents there are
            (our choice).
    """

    components: int = 16
    freedom: float | None = None

    def build(self, sites: Sequence[Site], starts: Start, nesting: int) -> nn.Module:
        """See ``Family.build``."""
        refuse_discrete(sites, "adapted")
        slots, start = slots_of(sites, starts)
        if len(start) > MOST_LATENTS:
            raise Unsupported(
                f'guide="auto" holds at most {MOST_LATENTS} latents together; here are {len(start)}. Write a '
                f"guide for the rows, or take MeanField() or JointNormal(rank=...)."
            )
        return AdaptedGuide(slots, start, self, nesting)


def heavy_tailed(dims: int) -> float:
    """Degrees of freedom of a distribution whose weights shall be bounded (our choice)."""
    return max(4.0, dims / 3)


class StudentMixture(dist.TorchDistribution):
    """Student-t distributions of D numbers, mixed.

    As a mixture of ``MultivariateStudentT`` it would make a draw of every part for each that is wanted, and
    solve with every triangle once for each point: gigabytes of 150 latents.

    Args:
        log_share: (k,), of shares that sum to one.
        loc: (k, D).
        tril: (k, D, D), lower triangular.
        freedom: degrees of freedom.
        batch_shape: of independent draws.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support: Any = constraints.real_vector

    def __init__(
        self, log_share: Tensor, loc: Tensor, tril: Tensor, freedom: float, batch_shape: torch.Size = ONE
    ) -> None:
        self.log_share, self.loc, self.tril, self.freedom = log_share, loc, tril, freedom
        super().__init__(batch_shape, loc.shape[1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> StudentMixture:
        """The same for more draws."""
        return StudentMixture(self.log_share, self.loc, self.tril, self.freedom, torch.Size(batch_shape))

    def each(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities and squared distances of (point, D) from every part, (point, k)."""
        d, nu = x.shape[1], self.freedom
        away = (x[:, None] - self.loc).permute(1, 2, 0)
        square = torch.linalg.solve_triangular(self.tril, away, upper=False).square().sum(1).mT
        constant = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - d / 2 * math.log(nu * math.pi)
        size = self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return constant - size - (nu + d) / 2 * torch.log1p(square / nu), square

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of (..., D), (...)."""
        found = torch.logsumexp(self.each(value.reshape(-1, value.shape[-1]))[0] + self.log_share, 1)
        return found.reshape(value.shape[:-1])

    def sample(self, sample_shape: torch.Size = ONE) -> Tensor:
        """Draws (*sample_shape, *batch_shape, D), from torch's random stream."""
        shape = torch.Size(sample_shape) + self.batch_shape
        n, d = shape.numel(), self.loc.shape[1]
        part = torch.multinomial(self.log_share.exp(), n, replacement=True)
        noise = torch.randn(n, d, dtype=self.loc.dtype, device=self.loc.device)
        wide = torch.distributions.Chi2(self.loc.new_tensor(self.freedom)).sample((n, 1)) / self.freedom
        found = noise / wide.sqrt()
        for k in range(len(self.loc)):
            own = part == k
            found[own] = self.loc[k] + found[own] @ self.tril[k].mT
        return found.reshape(shape + self.event_shape)


class Kept(dist.TorchDistribution):
    """Draws (N, D) that were made elsewhere, handed out in random order; their density is not known (NaN)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support: Any = constraints.real_vector

    def __init__(self, draws: Tensor, batch_shape: torch.Size = ONE) -> None:
        self.draws = draws
        super().__init__(batch_shape, draws.shape[1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Kept:
        """The same for more draws."""
        return Kept(self.draws, torch.Size(batch_shape))

    def sample(self, sample_shape: torch.Size = ONE) -> Tensor:
        """Without one twice, up to as many as there are."""
        shape = torch.Size(sample_shape) + self.batch_shape
        n, device = shape.numel(), self.draws.device
        rounds = [torch.randperm(len(self.draws), device=device) for _ in range(-(-n // len(self.draws)))]
        return self.draws[torch.cat(rounds)[:n]].reshape(shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Not known."""
        return torch.full_like(value[..., 0], torch.nan)


class AdaptedGuide(JointGuide):
    """The module of ``Adapted``: buffers ``log_share`` (K,), ``loc`` (K, D) and ``tril`` (K, D, D).

    Where the search has ended in NUTS, ``kept`` (MOST_KEPT, D) are its draws, and ``n_kept`` how many.
    """

    kept: Tensor
    n_kept: Tensor
    log_share: Tensor
    loc: Tensor
    tril: Tensor

    def __init__(self, slots: Sequence[Slot], start: Tensor, family: Adapted, nesting: int) -> None:
        super().__init__(slots, nesting)
        k, d = family.components, len(start)
        self.freedom = heavy_tailed(d) if family.freedom is None else family.freedom
        self.register_buffer("log_share", torch.full((k,), -torch.inf))
        self.register_buffer("loc", start.detach().expand(k, -1).clone())
        self.register_buffer("tril", torch.eye(d).expand(k, -1, -1).clone())
        self.register_buffer("kept", start.new_zeros(MOST_KEPT, d))
        self.register_buffer("n_kept", torch.zeros((), dtype=torch.int64))
        self.log_share[0] = 0.0

    def distribution(self) -> dist.TorchDistribution:
        """The mixture, or the draws that are kept; event (D,)."""
        if n := int(self.n_kept):
            return Kept(self.kept[:n])
        k = int((self.log_share > -torch.inf).sum())  # the first
        return StudentMixture(self.log_share[:k], self.loc[:k], self.tril[:k], self.freedom)

    @torch.no_grad()
    def keep(self, draws: Tensor) -> None:
        """Hand out these draws (N, D) instead, of which every so-manieth is kept if they are too many."""
        some = draws[:: -(-len(draws) // MOST_KEPT)]
        self.n_kept.fill_(len(some))
        self.kept[: len(some)] = some

    @torch.no_grad()
    def set(self, parts: StudentMixture) -> None:
        """Give it parts, of the same dims and degrees of freedom."""
        k = len(parts.loc)
        self.log_share.fill_(-torch.inf)
        self.log_share[:k], self.loc[:k], self.tril[:k] = parts.log_share, parts.loc, parts.tril
