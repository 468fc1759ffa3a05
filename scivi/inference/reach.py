"""What draws of a guide have not seen: walkers that begin at them, and modes found from elsewhere.

Importance weights of draws tell nothing of places that no draw has reached. So walkers, which begin at draws
and move by the density's gradient (Hamiltonian Monte Carlo), are asked whether they come to where weights are
larger than any that was seen; and modes, which Newton's method finds from random starts, whether draws belong
to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from scivi.errors import FitError, Unsupported
from scivi.inference.importance import pareto_k, truncated
from scivi.inference.modes import Density, modes
from scivi.inference.potential import Potential, left_of_plates, whole
from scivi.inference.scores import by_particle, log_prob, particle_plate, placed, quiet
from scivi.inputs.batches import Batch, read_batch, some_field
from scivi.models.binding import Bound, seeded, stream_seed
from scivi.models.guides import JointGuide
from scivi.models.mixtures import MOST_LATENTS, heavy_tailed
from scivi.models.sites import sample_sites, value_of

WALKERS, WALKS, STEPS = 300, 2, 15  # what looks around, trajectories of each, and their steps (our choice)
STRIDES = -3.5, -0.7  # logarithms of the least and the largest step, in sd (our choice)
BEYOND = math.log(2.0)  # weights that count as larger than any seen (our choice)
NEAR, WIDE = 3, 5  # starts of the search for modes, in (-2, 2) and from the prior (our choice)
DRAWS = 4000  # of a guide that is asked (our choice)
HOPELESS_K = 1.0  # of weights that will not do, whatever more draws of them say
HARDLY = 0.1  # of a mode's share, as which draws have to belong to it (our choice)


def walk(density: Density, points: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where walkers come to that begin at points (point, D) by their weights, each with a step of its own.

    Returns:
        The places (walker, D), and the log density there.
    """
    x = points[torch.multinomial(weight, WALKERS, replacement=True)]
    away = points - weight @ points
    spread = (away.mT * weight) @ away
    tril = torch.linalg.cholesky(spread + torch.diag_embed(1e-10 * spread.diagonal()))
    low, high = STRIDES
    step = (low + (high - low) * torch.rand(WALKERS, 1)).double().exp()
    value, slope = density(x)
    for _ in range(WALKS):
        first = torch.randn_like(x)
        at, speed, there, bend = x, first + 0.5 * step * (slope @ tril), value, slope
        for k in range(STEPS):
            at = at + step * (speed @ tril.mT)
            there, bend = density(at)
            speed = speed + (0.5 if k == STEPS - 1 else 1.0) * step * (bend @ tril)
        gained = there - value - 0.5 * (speed.square() - first.square()).sum(1)
        taken = torch.rand(WALKERS).log() < torch.nan_to_num(gained, nan=-math.inf)
        x, slope = (torch.where(taken[:, None], new, old) for new, old in ((at, x), (bend, slope)))
        value = torch.where(taken, there, value)
    return x, value


def beyond(log_weight: Tensor, most: Tensor) -> float:
    """Share of walkers whose log weights are above the largest of the draws by a factor of two."""
    return float((log_weight > most + BEYOND).double().mean())


def unseen(bound: Bound, source: Any, seed: int) -> dict[str, Any]:
    """What draws of a fitted guide, whose weights are good, have not seen.

    Args:
        bound: the fitted pair.
        source: data, all rows of which are taken at once.
        seed: of draws, walkers and starts.

    Returns:
        ``missed``, the share of walkers that came to larger weights; ``modes``, how many were found, and
        ``unseen_modes``, the share of the posterior (by Laplace's approximation) at those to which hardly a
        draw belongs. Nothing where the weights are bad, which says enough; of models with networks, discrete
        latents or more than 200 latents; or whose density cannot be captured.
    """
    template = bound.template
    if bound.nets.own is not None and any(True for _ in bound.nets.own.parameters()):
        return {}
    if sum(math.prod(s.shape) for s in bound.sites) > MOST_LATENTS or any(s.discrete for s in bound.sites):
        return {}
    some = some_field(bound.example)
    with seeded(stream_seed(seed, "reach"), some.device), quiet(), poutine.block():
        try:
            data = whole(template, source, seed, eager=False)
        except (Unsupported, FitError):
            return {}
        batch = read_batch(source, template.fields, template.row_dims, {}, some)
        own = _Guide(bound, batch, data.density)
        points = own.drawn(DRAWS)
        log_weight = data.value(points) - own.log_prob(points)
        if pareto_k(log_weight.numpy()) > HOPELESS_K:
            return {}
        weight = truncated(log_weight)
        walked, there = walk(data.at, points, weight)
        found = modes(data.at, data.starts(NEAR, WIDE), heavy_tailed(points.shape[1]))
        belong = weight @ torch.softmax(found.each(points)[0] + found.log_share, 1)
        share = found.log_share.exp()
        hardly = share[belong < HARDLY * share].sum()
    missed = beyond(there - own.log_prob(walked), log_weight.max())
    return {"missed": missed, "modes": len(share), "unseen_modes": float(hardly)}


def order(density: Potential, guide: JointGuide) -> Tensor:
    """Places in the density's vector of the entries of the guide's."""
    places, first = {}, 0
    for name, shape in density.shapes.items():
        places[name] = torch.arange(first, first + shape.numel())
        first += shape.numel()
    return torch.cat([places[slot.name] for slot in guide.slots])


@dataclass(frozen=True)
class _Guide:
    """A fitted guide over the flat vector of a density.

    Args:
        bound: the fitted pair.
        batch: all rows, in the dtype of the fit.
        density: of the latents.
    """

    bound: Bound
    batch: Batch
    density: Potential

    @torch.no_grad()
    def drawn(self, n: int) -> Tensor:
        """Draws (n, D), in float64."""
        with particle_plate(n, self.bound.nesting):
            trace = poutine.trace(self.bound.guide).get_trace(self.batch)
        parts = []
        for name in self.density.shapes:
            value = value_of(trace, name).double().cpu()
            parts.append(self.density.transforms[name](value).reshape(n, -1))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def log_prob(self, points: Tensor) -> Tensor:
        """Log density of points (point, D), (point,)."""
        guide, some = self.bound.nets.guide, some_field(self.bound.example)
        if isinstance(guide, JointGuide):
            flat = points[:, order(self.density, guide)].to(some)
            return guide.distribution().log_prob(flat).double().cpu()
        n, (values, total) = len(points), self.density.values_and_jacobian(points)
        values = {name: value.to(some) for name, value in left_of_plates(self.bound, values).items()}
        with particle_plate(n, self.bound.nesting), placed(values):
            trace = poutine.trace(self.bound.guide).get_trace(self.batch)
        for _, site in sample_sites(trace):
            total = total + by_particle(log_prob(site), self.bound.nesting).expand(n).double().cpu()
        return total
