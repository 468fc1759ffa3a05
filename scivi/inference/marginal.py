"""Local latents integrated on nodes that the guide places: the marginal as an objective, and at a point.

For row i with local latents z = T(e; x_i, theta), e standard normal noise of the guide,

    p(x_i | theta) = sum_k w_k p(x_i, z_k | theta) / q(z_k | x_i, theta),     z_k = T(e_k),

with nodes e_k and weights w_k: a Gauss-Hermite grid in up to three dimensions, a randomised low-discrepancy
set in more (then it is importance weighting per row). Nodes and their density are detached: the globals
follow the marginal. The guide, at detached globals, follows KL(posterior || guide), for which the weighted
nodes stand for the posterior (reweighted wake-sleep, Bornschein and Bengio 2015, arXiv:1406.2751, with
quadrature in place of samples): its gradient has no sampling noise, where the ELBO's hides differences of a
hundredth of a nat. A Gaussian guide biases the scatter of a population under the ELBO; under the marginal it
only has to put its nodes well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from scivi.inference.scores import Placed, by_particle, by_row, log_prob, particle_plate, placed, row_scale
from scivi.inputs.batches import Batch, some_field
from scivi.models.binding import Bound
from scivi.models.guides import JointNormalGuide
from scivi.models.noise import noise_shape, push, put
from scivi.models.sites import plates_of, row_dim_of, sample_sites

GRID_DIMS = 3  # above it a grid of nodes costs more than random ones (our choice: 7**3 = 343 nodes)
RANDOM_NODES, TRAINING_NODES = 128, 64
MOST_DIMS = 16  # above it a few hundred weighted nodes say too little about the marginal (our choice)


@dataclass(frozen=True, slots=True)
class Noise:
    """The share of one local guide site in a row's normal noise.

    Args:
        name: of the site.
        shape: of the noise of one draw, plates of the row dim as 1: (*plates, *event).
        start: first coordinate in the row's noise vector.
        row_dim: whose rows.
        row_axis: its plate's dim.
        n_plates: how many dims of ``shape`` are plates.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    row_dim: str
    row_axis: int
    n_plates: int

    @property
    def size(self) -> int:
        """Numbers of noise per row."""
        return math.prod(self.shape)

    def cut(self, points: Tensor) -> Tensor:
        """This site's coordinates of points (K, dims) as (K, *shape).

        Of points (K, rows, dims), with rows in place.
        """
        mine = points[..., self.start : self.start + self.size]
        if points.dim() == 2:
            return mine.reshape(len(points), *self.shape)
        place = self.n_plates + self.row_axis
        rest = self.shape[:place] + self.shape[place + 1 :]
        return mine.reshape(*points.shape[:2], *rest).movedim(1, 1 + place)


@dataclass(frozen=True, slots=True)
class Layout:
    """All local noise of a guide, or why it cannot be laid out (``refusal``).

    Args:
        sites: of the guide, in a row dim; none if rows have no latent, so that nothing is to be integrated.
        row_dims: the dims whose rows are summed.
        refusal: why not.
    """

    sites: tuple[Noise, ...] = ()
    row_dims: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def dims(self) -> int:
        """Numbers of noise per row."""
        return sum(s.size for s in self.sites)


def layout(bound: Bound, batch: Batch, most: int = MOST_DIMS) -> Layout:
    """Lay out the normal noise behind the local sites of a pair's guide, at most so many numbers a row."""
    if not bound.amortised:
        return Layout(refusal="the guide is not amortised")
    if any(s.discrete for s in bound.sites):
        return Layout(refusal="there are discrete latents")
    with torch.no_grad():
        trace = poutine.trace(bound.guide).get_trace(batch)
    sites, start, rows = [], 0, bound.template.row_dims
    for name, site in sample_sites(trace):
        row_dim = row_dim_of(site, rows)
        if row_dim is None:
            continue
        event, plates = noise_shape(site["fn"]), plates_of(site)
        if event is None:
            return Layout(refusal=f'the guide\'s site "{name}" is no smooth map of normal noise')
        if sum(p in rows for p in plates) > 1:
            return Layout(refusal=f'the site "{name}" lies in two row dims at once')
        spread = [1] * bound.nesting
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.name != row_dim:
                spread[frame.dim] = frame.size
        sites.append(Noise(name, (*spread, *event), start, row_dim, plates[row_dim], bound.nesting))
        start += sites[-1].size
    if not sites:
        if bound.local or global_module(bound) is None:
            return Layout(refusal="there is no latent per row, nor a joint normal of all globals")
        return Layout(row_dims=rows)
    if start > most:
        return Layout(refusal=f"{start} latents per row are too many to integrate (at most {most})")
    return Layout(tuple(sites), tuple(dict.fromkeys(s.row_dim for s in sites)))


def nodes(
    dims: int, per_dim: int, like: Tensor, *, n_random: int = RANDOM_NODES, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes (K, dims) and log weights (K,) that integrate against a standard normal.

    Args:
        dims: dimensions.
        per_dim: Gauss-Hermite nodes each; exact for polynomials up to degree 2 per_dim - 1.
        like: gives dtype and device.
        n_random: scrambled Sobol nodes where ``dims`` is above the grid's limit.
        shift: uniform numbers (dims,) that move those around the unit cube, which makes their sums unbiased.
    """
    if dims == 0:
        return like.new_zeros(1, 0), like.new_zeros(1)
    if dims <= GRID_DIMS:
        x, w = np.polynomial.hermite_e.hermegauss(per_dim)
        grid = np.stack(np.meshgrid(*[x] * dims, indexing="ij"), -1).reshape(-1, dims)
        log_w = sum(np.meshgrid(*[np.log(w / w.sum())] * dims, indexing="ij"))
        return like.new_tensor(grid), like.new_tensor(np.asarray(log_w).reshape(-1))
    with disable_proxy_modes_tracing():  # they go into a capture as they are, and not how they are made
        engine = torch.quasirandom.SobolEngine(dims, scramble=True, seed=0)
        uniform = engine.draw(n_random, dtype=torch.float64)
    uniform = uniform.to(like.device)
    if shift is not None:
        uniform = (uniform + shift) % 1
    normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return normal.to(like), like.new_full((n_random,), -math.log(n_random))


def training_nodes(dims: int, per_dim: int) -> int:
    """Nodes per dimension while training: fewer in more dimensions, since the finish takes them all.

    Five, because the guide learns its shape from them: of photon counts four leave it .074 nats from a
    source's posterior, five .006.
    """
    return per_dim if dims < 2 else min(per_dim, 5)


def summing_nodes(dims: int, per_dim: int) -> int:
    """Nodes per dimension where the finish sums over all rows, before fine nodes correct it (our choice)."""
    return per_dim if dims < 2 else min(per_dim, 4)


def fine_nodes(per_dim: int) -> int:
    """Nodes per dimension that correct the finish."""
    return 2 * per_dim + 1


def n_nodes(dims: int, per_dim: int) -> int:
    """How many nodes the full marginal takes."""
    return per_dim**dims if dims <= GRID_DIMS else 2 * RANDOM_NODES


class _ShownDetached(Messenger):
    """Global values that the guide's code sees carry no gradient; the trace keeps those that do."""

    def __init__(self, rows: tuple[str, ...]) -> None:
        super().__init__()
        self.rows = rows

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:  # type: ignore[override]
        if not msg["infer"].get("is_auxiliary") and row_dim_of(msg, self.rows) is None:
            msg["value"] = msg["value"].detach()


def run_guide(
    bound: Bound,
    batch: Batch,
    plan: Layout,
    points: Tensor,
    *,
    fixed: Mapping[str, Tensor] | None = None,
    moving: bool = False,
) -> tuple[poutine.Trace, dict[str, Tensor]]:
    """The guide with local sites put at noise ``points``, and their log density, (points, rows) by row dim.

    Args:
        bound: the pair.
        batch: the rows.
        plan: of the guide's noise.
        points: (points, dims), or (points, rows, dims).
        fixed: values of other sites.
        moving: let values move with the guide's parameters, as in a pathwise gradient; else they stay where
            they are put and only the density has a gradient.
    """
    noise = {s.name: s for s in plan.sites}
    density = {dim: points.new_zeros(len(points), 1) for dim in plan.row_dims}

    def place(name: str, fn: Any) -> Tensor:
        if fixed and name in fixed:
            return fixed[name]
        site = noise[name]
        if moving or not torch.is_grad_enabled():
            value, log_q = push(fn, site.cut(points))
        else:
            with torch.no_grad():  # a new tensor: the transforms' caches do not know it
                value = put(fn, site.cut(points)).clone()
            log_q = fn.log_prob(value)
        density[site.row_dim] = density[site.row_dim] + by_row(log_q, bound.nesting, site.row_axis)
        return value

    # the trace records a value before the guide's code sees it detached
    with Placed([*noise, *(fixed or {})], place):
        trace = poutine.trace(_ShownDetached(bound.template.row_dims)(bound.guide)).get_trace(batch)
    return trace, density


def run_model(bound: Bound, batch: Batch, values: Mapping[str, Tensor]) -> poutine.Trace:
    """Trace of the model with its latents at ``values``."""
    with placed(values):
        return poutine.trace(bound.model).get_trace(batch)


def _rows(trace: poutine.Trace, bound: Bound, batch: Batch, row_dim: str) -> Tensor:
    """Log density of all sites in a row dim, (points or 1, rows), unscaled."""
    out = torch.zeros(())
    for _, site in sample_sites(trace):
        if row_dim_of(site, bound.template.row_dims) == row_dim:
            own = by_row(log_prob(site), bound.nesting, plates_of(site)[row_dim])
            out = out + own / row_scale(batch, row_dim)
    return out


def _globals(trace: poutine.Trace, bound: Bound, skip: str = "") -> dict[str, Tensor]:
    return {
        name: by_particle(log_prob(site), bound.nesting).sum()
        for name, site in sample_sites(trace)
        if row_dim_of(site, bound.template.row_dims) is None and name != skip
    }


def latent_values(trace: poutine.Trace) -> dict[str, Tensor]:
    """Values of a guide's latents, auxiliary ones left out."""
    return {n: s["value"] for n, s in sample_sites(trace) if not s["infer"].get("is_auxiliary")}


def objective(
    bound: Bound, batch: Batch, plan: Layout, per_dim: int, beta: float | Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, value of the bound, and its parts, in nats over all rows.

    The weighted nodes are each row's posterior: globals follow their sum, the guide follows their cross
    entropy.

    Args:
        bound: the pair.
        batch: the rows.
        plan: of the guide's noise.
        per_dim: Gauss-Hermite nodes per local dimension.
        beta: weight of the globals' KL.
    """
    like = some_field(batch)
    per_dim = training_nodes(plan.dims, per_dim)
    shift = torch.rand(plan.dims, dtype=torch.float64, device=like.device) if plan.dims > GRID_DIMS else None
    points, log_w = nodes(plan.dims, per_dim, like, n_random=TRAINING_NODES, shift=shift)
    guide, density = run_guide(bound, batch, plan, points)
    values = latent_values(guide)
    model = run_model(bound, batch, values)
    marginal, own = torch.zeros(()), torch.zeros(())
    for row_dim in plan.row_dims:
        scale, log_q = row_scale(batch, row_dim), density[row_dim]
        weight = _rows(model, bound, batch, row_dim) - log_q.detach() + log_w[:, None]
        marginal = marginal + scale * torch.logsumexp(weight, 0).sum()
        own = own + scale * (torch.softmax(weight.detach(), 0) * log_q).sum()
    prior, posterior = _globals(model, bound), _globals(guide, bound)
    data = {"marginal": marginal, **{k: v for k, v in prior.items() if k not in values}}
    latents = [k for k in {**posterior, **prior} if k not in data]
    kl = {k: cast(Tensor, prior.get(k, 0.0) - posterior.get(k, 0.0)) for k in latents}
    value = cast(Tensor, sum(data.values()) + beta * sum(kl.values()))
    # The guide's own part is minus KL(posterior || guide), up to a constant.
    return -(value + own), value, {**data, **kl}


def global_module(bound: Bound) -> JointNormalGuide | None:
    """The joint normal that holds all global latents of a pair, if there is one of full rank."""
    names = {s.name for s in bound.sites if s.row_dim is None}
    for module in bound.nets.modules():
        if (
            isinstance(module, JointNormalGuide)
            and {s.name for s in module.slots} == names
            and module.rank is None
        ):
            return module
    return None


def log_marginal(
    bound: Bound, module: JointNormalGuide, theta: Tensor, batch: Batch, plan: Layout, per_dim: int
) -> Tensor:
    """Log density of some rows given the globals at ``theta`` (D,), each row integrated and counted once.

    Args:
        bound: the pair; its guide places the nodes given ``theta``, and they stay there.
        module: the joint normal that holds the globals.
        theta: globals on the unbounded scale; the result is differentiable in it.
        batch: the rows.
        plan: of the guide's noise.
        per_dim: Gauss-Hermite nodes per local dimension.
    """
    points, log_w = nodes(plan.dims, per_dim, theta, n_random=2 * RANDOM_NODES)
    with torch.no_grad():
        guide, density = run_guide(bound, batch, plan, points, fixed={module.name: theta})
    values = latent_values(guide) | latent_values(_population(module, theta, batch))
    model = run_model(bound, batch, values)
    out = theta.new_zeros(())
    for row_dim in plan.row_dims:
        weight = _rows(model, bound, batch, row_dim) - density[row_dim]
        out = out + torch.logsumexp(weight + log_w[:, None], 0).sum()
    return out


def log_prior(bound: Bound, module: JointNormalGuide, theta: Tensor, batch: Batch) -> Tensor:
    """Log prior density of the globals at unbounded ``theta`` (D,), with observed sites of no row."""
    population = _population(module, theta, batch)
    with torch.no_grad(), placed({module.name: theta}):
        local = latent_values(poutine.trace(bound.guide).get_trace(batch))
    model = run_model(bound, batch, {**local, **latent_values(population)})
    out = sum(_globals(model, bound).values()) - sum(_globals(population, bound, skip=module.name).values())
    return cast(Tensor, out)


def log_joint(bound: Bound, module: JointNormalGuide, theta: Tensor, batches: Sequence[Batch]) -> Tensor:
    """Log density of globals at several points and of all rows, where rows have no latents, (point,).

    Args:
        bound: the pair.
        module: the joint normal that holds the globals.
        theta: globals on the unbounded scale (point, D).
        batches: all rows, in one or several.
    """
    n, nesting, rows = len(theta), bound.nesting, bound.template.row_dims
    at = theta.to(module.loc)
    at = at.reshape(n, *[1] * nesting, -1) if n > 1 else at[0]
    total = theta.new_zeros(n).double()
    for number, batch in enumerate(batches):
        with particle_plate(n, nesting):
            population = _population(module, at, batch)
            model = run_model(bound, batch, latent_values(population))
        total = total + sum(_rows(model, bound, batch, row).sum(1).expand(n) for row in rows)
        if number == 0:  # globals count once
            total = with_globals(total, bound, module, model, population)
    return total


def with_globals(
    total: Tensor, bound: Bound, module: JointNormalGuide, model: poutine.Trace, population: poutine.Trace
) -> Tensor:
    """Log densities (point,) with those that the traces have of no row: the model's less the guide's."""
    for sign, trace in ((1, model), (-1, population)):
        for name, site in sample_sites(trace):
            if name != module.name and row_dim_of(site, bound.template.row_dims) is None:
                own = by_particle(log_prob(site), bound.nesting)
                total = total + sign * own.expand(len(total)).double()
    return total


def _population(module: JointNormalGuide, theta: Tensor, batch: Batch) -> poutine.Trace:
    """The global sites at ``theta``."""
    with placed({module.name: theta}):
        return poutine.trace(module).get_trace(batch)
