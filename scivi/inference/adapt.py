"""``adapt`` places the guide ``Adapted``, and gives it more parts until its importance weights are good.

Newton's method finds modes from a few starts, and the curvature there the first parts, one Student-t
distribution each. In each round they are sampled, the latest draws are weighed by the mixture of everything
that they were drawn from (AMIS, Cornuet et al. 2012), and the parts are moved to the weighted draws by
expectation maximisation (Cappé et al. 2008). A round's own weights say how good the parts are that made it.
What no draw has reached they cannot say: of that walkers are asked (``reach``). These measurements, and no
loss curve, end the search, or split every part in two. If sixteen parts do not do, and nutpie is there, its
chains show where the posterior lies: parts are fitted to their draws, and if these do not do either, the
draws themselves are kept.

References:
    Cornuet, Marin, Mira, Robert 2012, Scand. J. Stat. 39, 798, doi:10.1111/j.1467-9469.2011.00756.x.
    Cappé, Douc, Guillin, Marin, Robert 2008, Stat. Comput. 18, 447, arXiv:0710.4242.
    Vehtari, Simpson, Gelman, Yao, Gabry 2024, JMLR 25(72), arXiv:1507.02646 (k-hat).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from scivi.errors import Unsupported
from scivi.inference.chains import Chain, Length, nutpie_chain
from scivi.inference.importance import USABLE_K, pareto_k, truncated
from scivi.inference.modes import Density, modes
from scivi.inference.potential import Whitened, Whole, fast, whole
from scivi.inference.reach import NEAR, WIDE, beyond, order, walk
from scivi.inference.scores import quiet
from scivi.models.binding import Bound, seeded, stream_seed
from scivi.models.mixtures import AdaptedGuide, StudentMixture

GOOD_K, GOOD_SHARE = 0.5, 0.3  # k-hat and share of effective draws at which the search ends (our choice)
USABLE_SHARE = 0.02  # effective draws, of which four times as many are proposed (our choice)
ROUND, ROUND_BY = 4000, 100  # draws of a round: at least, and for each latent (our choice)
CONFIRMED = 2  # times as many draws confirm that weights are good (our choice)
KEPT = 6  # times as many draws that are remembered (our choice)
ROUNDS = 5  # with the same number of parts (our choice)
BETTER = 1.1  # by which the share must grow from round to round, or parts are split (our choice)
MISSED = 0.01  # share of walkers that may see larger weights than any draw has (our choice)
CHAINS, CHAIN = 4, Length(draws=1000, warmup=500)
LEAPS = 10  # of a draw of theirs, to foresee how long they are


@dataclass(frozen=True)
class _Measured:
    """Parts, and how good weights of draws of them are.

    Args:
        parts: what was measured.
        k_hat: of its weights' tail.
        share: effective draws over draws.
        missed: share of walkers that came to where the weight is twice the largest of the draws; 1 if none
            were asked.
    """

    parts: StudentMixture
    k_hat: float
    share: float
    missed: float = 1.0

    @property
    def weighs_well(self) -> bool:
        """Whether the weights of the draws are good."""
        return self.k_hat <= GOOD_K and self.share >= GOOD_SHARE

    @property
    def good(self) -> bool:
        """Whether they are, and walkers find nothing that the draws have not."""
        return self.weighs_well and self.missed <= MISSED

    @property
    def usable(self) -> bool:
        """Whether the weights can correct the draws."""
        return self.k_hat <= USABLE_K and self.share >= USABLE_SHARE and self.missed <= MISSED


class _Search:
    """The latest draws, what they were drawn from, and what each round has shown."""

    def __init__(self, density: Density, value_of: Callable[[Tensor], Tensor], dims: int, bar: tqdm) -> None:
        self._density, self._value = density, value_of
        self.bar, self.draws = bar, max(ROUND, ROUND_BY * dims)
        self.points, self.value = torch.empty(0, dims).double(), torch.empty(0).double()
        self.drawn_from: list[StudentMixture] = []
        self.tried: list[dict[str, Any]] = []
        self.evaluations = 0
        self.best: _Measured | None = None
        self.walked = torch.empty(0, dims).double()

    def density(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Log density and its gradient, counted."""
        self.evaluations += len(points)
        return self._density(points)

    def round(self, parts: StudentMixture) -> _Measured:
        """Draw, weigh, measure."""
        log_weight = self.drawn(parts)
        found = _measured(parts, log_weight)
        if found.weighs_well:  # so it seems: k-hat of few draws scatters
            log_weight = torch.cat([log_weight, *(self.drawn(parts) for _ in range(CONFIRMED - 1))])
            found = _measured(parts, log_weight)
        if found.weighs_well:
            found = self.asked(found, log_weight)
        if self.best is None or _rank(found) > _rank(self.best):
            self.best = found
        self.bar.update(1)
        self.bar.set_postfix_str(
            f"{len(parts.loc)} parts, k-hat {found.k_hat:.2f}, {found.share:.0%} effective"
        )
        return found

    def lost(self, found: _Measured) -> bool:
        """Whether too few draws have weight for parts to be moved to."""
        return found.share * self.draws < 2

    def forget(self) -> None:
        """Leave all draws behind."""
        self.points, self.value, self.drawn_from = self.points[:0], self.value[:0], []
        self.walked = self.walked[:0]

    def asked(self, found: _Measured, log_weight: Tensor) -> _Measured:
        """The same, with what walkers say of it."""
        self.walked, there = walk(self.density, self.points, self.weight())
        missed = beyond(there - found.parts.log_prob(self.walked), log_weight.max())
        return replace(found, missed=missed)

    def confirmed(self) -> _Measured:
        """The best so far, after walkers were asked where its weights can be used."""
        assert self.best is not None
        if self.best.missed == 1.0 and replace(self.best, missed=0.0).usable:
            self.best = self.asked(self.best, self.drawn(self.best.parts))
        return self.best

    def drawn(self, parts: StudentMixture) -> Tensor:
        """Log weights of new draws, which are kept."""
        new = parts.sample(torch.Size([self.draws]))
        value, kept = self._value(new), (KEPT - 1) * self.draws
        self.points = torch.cat([self.points[-kept:], new])
        self.value = torch.cat([self.value[-kept:], value])
        self.drawn_from = [*self.drawn_from[1 - KEPT :], parts]
        self.evaluations += len(new)
        return value - parts.log_prob(new)

    def weight(self) -> Tensor:
        """Of these draws, by the mixture of what they were drawn from."""
        mixed = torch.stack([parts.log_prob(self.points) for parts in self.drawn_from])
        return truncated(self.value - (torch.logsumexp(mixed, 0) - math.log(len(mixed))))

    def moved(self, parts: StudentMixture) -> StudentMixture:
        """Nearer to all draws by their weights; and half to the walkers, if there are any."""
        weight, half = self.weight(), 0.5 if len(self.walked) else 1.0
        equal = torch.full((len(self.walked),), 0.5 / max(1, len(self.walked))).double()
        return nearer(parts, torch.cat([self.points, self.walked]), torch.cat([half * weight, equal]))

    def rung(self, name: str, make: Callable[[], StudentMixture]) -> _Measured:
        """Rounds with as many parts, until weights are good or get no better; the last round."""
        begun, first, shares = time.perf_counter(), self.evaluations, [0.0]
        found = self.round(make())
        for _ in range(ROUNDS - 1):
            if found.good or self.lost(found) or (len(shares) > 2 and found.share < BETTER * max(shares)):
                break
            shares.append(found.share)
            found = self.round(self.moved(found.parts))
        told = {"guide": name, "k_hat": round(found.k_hat, 3), "effective_share": round(found.share, 4)}
        told |= {"missed": round(found.missed, 4)} if found.weighs_well else {}
        spent = {"evaluations": self.evaluations - first, "seconds": round(time.perf_counter() - begun, 3)}
        self.tried.append(told | spent)
        return found


def adapt(bound: Bound, source: Any, seed: int, progress: bool = True) -> dict[str, Any]:
    """Place the guide of a pair.

    Args:
        bound: with the guide ``Adapted``, which is changed.
        source: data, all rows of which are taken at once.
        seed: of everything.
        progress: show a progress bar.

    Returns:
        For the provenance: what was tried, what each cost and how good its weights were, why it stopped.

    Raises:
        Unsupported: the model contains networks, which nothing here would learn.
        FitError: no starting point has a finite density.
    """
    guide, template = bound.nets.guide, bound.template
    assert isinstance(guide, AdaptedGuide)
    if bound.nets.own is not None and any(True for _ in bound.nets.own.parameters()):
        raise Unsupported(
            f'guide="auto" learns no networks, and "{template.name}" has some. Write a guide, or take a '
            f"family that is fitted by steps, such as JointNormal()."
        )
    with seeded(stream_seed(seed, "sampling")), quiet(), poutine.block():
        data = whole(template, source, seed)
        density = data.density
        with tqdm(disable=not progress, desc=f"{template.name}: rounds", unit="round") as bar:
            search = _Search(data.at, data.value, density.size, bar)
            best, stopped, chains = _climb(search, data, guide.freedom, len(guide.log_share))
    told = {"tried": search.tried, "stopped": stopped, "evaluations": search.evaluations}
    places = order(density, guide)
    if chains is not None:
        draws = torch.cat([chain.path for chain in chains])
        guide.keep(
            draws[torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed))][:, places]
        )
        return {"method": "nuts", **told, **_converged(chains)}
    parts = best.parts
    spread = (parts.tril @ parts.tril.mT)[:, places][:, :, places]
    tril = torch.linalg.cholesky(spread)
    guide.set(StudentMixture(parts.log_share, parts.loc[:, places], tril, parts.freedom))
    told |= {"method": "adaptive importance sampling", "parts": len(parts.loc)}
    return told | ({"missed": best.missed} if best.k_hat <= USABLE_K else {})


def _climb(
    search: _Search, data: Whole, freedom: float, most: int
) -> tuple[_Measured, str, list[Chain] | None]:
    """From the modes to as many parts as are needed, and to chains if none do; why it ended."""
    starts = data.starts(NEAR, WIDE)
    found = search.rung("Student-t at the mode", lambda: modes(search.density, starts, freedom))
    while not found.good and not search.lost(found) and 2 * len(found.parts.loc) <= most:
        parts = search.moved(halved(found.parts))
        found = search.rung(f"{len(parts.loc)} Student-t parts", lambda parts=parts: parts)
    best, chains = search.confirmed(), None
    if not best.usable and find_spec("nutpie") is not None:
        chains = _chains(search, data)
        draws = torch.cat([chain.path for chain in chains])
        for n in range(0, most.bit_length(), 2):  # 1, 4, 16 parts
            name = f"{2**n} Student-t part{'s' * (n > 0)} at draws of NUTS"
            found = search.rung(name, lambda n=n: _parts_at(draws, 2**n, freedom))
            if found.good:
                break
        best = search.confirmed()
    if best.good:
        return best, "weights are good", None
    if best.usable:
        return best, "weights can be used, and walkers find nothing else", None
    if chains is not None:
        return best, "weights cannot be used: draws of NUTS are kept", chains
    return best, "weights cannot be used, and nutpie is not installed, whose draws would be kept", None


def _converged(chains: Sequence[Chain]) -> dict[str, Any]:
    """What chains say of themselves, the worst of all coordinates."""
    from arviz_stats.base import array

    stats: Any = array.array_stats
    paths = torch.stack([chain.path for chain in chains]).numpy()  # (chain, draw, D)
    every = [paths[..., k] for k in range(paths.shape[-1])]
    return {
        "r_hat": max(float(stats.rhat(one, method="rank")) for one in every),
        "ess": min(float(stats.ess(one, method="bulk")) for one in every),
        "divergences": int(sum(chain.stats["diverging"].sum() for chain in chains)),
        "draws": paths.shape[0] * paths.shape[1],
    }


def _chains(search: _Search, data: Whole) -> list[Chain]:
    """Chains that begin anew: modes may lie where nothing is."""
    function, _ = fast(data.density, LEAPS * CHAINS * (CHAIN.draws + CHAIN.warmup))
    starts = data.starts(CHAINS, 0)
    seeds = torch.randint(2**31, (CHAINS,)).tolist()
    with tqdm(disable=True) as bar:
        chains = [nutpie_chain(function, x, CHAIN, seed, bar) for x, seed in zip(starts, seeds, strict=True)]
    search.evaluations += sum(chain.gradients for chain in chains)
    search.forget()
    return chains


def _parts_at(draws: Tensor, n: int, freedom: float) -> StudentMixture:
    """So many parts, fitted to draws (draw, D)."""
    equal = torch.full((len(draws),), 1 / len(draws)).double()
    tril = Whitened.of(draws).tril.expand(n, -1, -1)
    loc = draws[torch.randperm(len(draws))[:n]]
    return nearer(StudentMixture(equal.new_full((n,), -math.log(n)), loc, tril, freedom), draws, equal, 30)


def nearer(parts: StudentMixture, x: Tensor, weight: Tensor, times: int = 5) -> StudentMixture:
    """Parts moved to points (point, D) with weights (point,), by steps of expectation maximisation."""
    d, nu = x.shape[1], parts.freedom
    for _ in range(times):
        log_each, square = parts.each(x)
        own = torch.softmax(log_each + parts.log_share, 1) * weight[:, None]
        pull = own * (nu + d) / (nu + square)
        mass = own.sum(0)
        loc = pull.mT @ x / pull.sum(0)[:, None]
        spread = torch.stack(
            [(p[:, None] * (x - m)).mT @ (x - m) / n for p, m, n in zip(pull.mT, loc, mass, strict=True)]
        )
        # a part with few effective draws has no shape of its own, but that of all parts
        effective = mass.square() / own.square().sum(0)
        known = (effective / (effective + d))[:, None, None]
        spread = known * spread + (1 - known) * (mass[:, None, None] * spread).sum(0) / mass.sum()
        kept = mass > 1e-3 * mass.sum()
        ridge = 1e-10 * spread[kept].diagonal(dim1=-2, dim2=-1)
        tril, failed = torch.linalg.cholesky_ex(spread[kept] + torch.diag_embed(ridge))
        if bool(failed.any()):  # fewer draws than dimensions have weight
            return parts
        parts = StudentMixture((mass[kept] / mass[kept].sum()).log(), loc[kept], tril, nu)
    return parts


def halved(parts: StudentMixture) -> StudentMixture:
    """Every part as two, apart along a direction drawn from torch's random stream."""
    way = torch.randn_like(parts.loc)
    off = 0.7 * (parts.tril @ (way / way.norm(dim=1, keepdim=True)).unsqueeze(-1)).squeeze(-1)
    loc, tril = torch.cat([parts.loc + off, parts.loc - off]), 0.8 * parts.tril.repeat(2, 1, 1)
    return StudentMixture(parts.log_share.repeat(2) - math.log(2), loc, tril, parts.freedom)


def _measured(parts: StudentMixture, log_weight: Tensor) -> _Measured:
    share = float(1 / torch.softmax(log_weight, 0).square().sum()) / len(log_weight)
    return _Measured(parts, pareto_k(log_weight.numpy()), share)


def _rank(found: _Measured) -> tuple[bool, bool, bool, float, float]:
    return found.k_hat <= USABLE_K, found.good, found.weighs_well, -found.missed, found.share
