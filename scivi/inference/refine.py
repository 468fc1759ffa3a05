"""Rows that the encoder serves badly get a posterior of their own.

The guide turns standard normal noise e, d numbers of each row, into z = T(e; x_i, theta). A refined row draws
its noise from a normal of its own, e = shift_i + root_i u with standard normal u, fitted by Gaussian
variational inference. With the log weight of a draw

    w_i(u) = log p(x_i, z | theta) - log q_i(z),     z = T(shift_i + root_i u; x_i, theta),

the row's ELBO is E w_i. It is stationary where mean slope E w_i' and mean curvature E w_i'' are zero (Opper
and Archambeau 2009). A step of length t <= 1 goes where they would be if w_i were quadratic:

    A = 1 - E w_i'',     shift_i += t root_i A**-1 E w_i',     root_i = root_i A**(-t / 2).

Means are over the same few points at every step, and a step that does not raise the ELBO is not taken. First
derivatives are enough, since E w_i'' = E[w_i' u'] (Stein). As the points have mean 0 and mean square 1
exactly, this is also the least-squares regression of the slopes on the points, and exact for a normal
posterior.

By how much the ELBO rises is the row's amortisation gap (Cremer, Li and Duvenaud 2018), measured from below:
a richer family could gain more. In many dims draws come from a normal somewhat wider than the fitted one,
so that the importance weights have lighter tails.

References:
    Opper and Archambeau 2009, Neural Computation 21, 786, doi:10.1162/neco.2008.08-07-592.
    Cremer, Li and Duvenaud 2018, arXiv:1801.03558.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from scivi.inference import marginal
from scivi.inference.scores import by_row, log_prob, particle_plate, row_scale
from scivi.inputs.batches import Batch, some_field, take
from scivi.models.binding import Bound
from scivi.models.sites import plates_of, row_dim_of, sample_sites

# All are our choice.
STEPS, ENOUGH = 25, 2e-3  # most steps; nats: a row is done when a step promises less
POINTS, POINTS_PER_DIM = 64, 3  # the larger number; ten per dim gain .01 nats in 21 dims
REACH = 3.0  # sd: first bound of a step, doubled after each success, so that two dozen sd are four steps
FLATTEST, STEEPEST = 0.5, 1e6  # least precision and largest slope that a step believes in
AT_ONCE = 2**23  # rows x points x entries of a row: about a GB while fitting
MOST_DIMS = 64  # of a row's noise: a covariance of more is not worth its points
# Draws' sd over fitted sd, so that weights have lighter tails than the posterior: of 200 CITE-seq cells in 21
# dims k-hat is above .7 in 11, 5 and 2 % at 1, 1.05 and 1.1, with as many effective draws. In few dims the
# fitted normal is as good as its draws' sd shows, and that is kept.
WIDER, FEW_DIMS = 1.1, 4


@dataclass(frozen=True)
class Refined:
    """Draws of the refined rows.

    Args:
        rows: their places in the batch.
        values: by local guide site, (draws, ..., rows, ...).
        axes: by site, the axis of the rows, counted from the right.
        log_weight: of each draw given the globals, (draws, rows), nats.
        gap: amortisation gap of each row, nats.
    """

    rows: Tensor
    values: dict[str, Tensor]
    axes: dict[str, int]
    log_weight: Tensor
    gap: Tensor


def refine_rows(
    bound: Bound, batch: Batch, given: Mapping[str, Tensor], rows: Tensor, draws: int
) -> Refined | None:
    """Refine some rows of a batch; None if the guide's noise cannot be laid out.

    Args:
        bound: the pair.
        batch: the rows, of which some are refined.
        given: values of the guide's global sites over all draws; the rows are fitted at the first.
        rows: places of the rows to refine.
        draws: how many.

    Notes:
        A step costs as many evaluations of model and guide per row, with gradient, as there are points; most
        rows take three to eight. Rows are cut into blocks, so that of memory only the draws grow with them.
        In more than ``FEW_DIMS`` dims draws are wider than the fitted normal, by ``WIDER`` in sd.
    """
    plan = _own_noise(marginal.layout(bound, batch, MOST_DIMS), bound.template.row_dims[0])
    if not plan.sites:
        return None
    like = some_field(batch)
    rows, points = rows.to(like.device), _points(plan.dims, like)
    typical = {name: value[:1] for name, value in given.items()} if draws > 1 else given
    whole = _Rows(bound, batch, plan, given).take(rows)
    fits = [_fit(replace(some, given=typical), points) for _, some in whole.blocks(len(points))]
    shift, root, gap = (torch.cat(parts) for parts in zip(*fits, strict=True))
    root = root * wider(plan.dims)
    found = []
    for at, some in whole.blocks(draws):
        noise = torch.randn(draws, len(at), plan.dims, dtype=like.dtype, device=like.device)
        found.append(some.weights(shift[at], root[at], noise))
    axes = {s.name: s.row_axis - (len(s.shape) - s.n_plates) for s in plan.sites}
    values = {name: torch.cat([v[name] for _, v in found], axis) for name, axis in axes.items()}
    return Refined(rows, values, axes, torch.cat([w for w, _ in found], 1), gap)


def wider(dims: int) -> float:
    """By how much draws are wider than the fitted normal, in sd."""
    return WIDER if dims > FEW_DIMS else 1.0


def _own_noise(plan: marginal.Layout, row: str) -> marginal.Layout:
    """The layout of one row dim's noise alone: latents along the others do not weigh on its rows."""
    sites, start = [], 0
    for site in plan.sites:
        if site.row_dim == row:
            sites.append(replace(site, start=start))
            start += site.size
    return marginal.Layout(tuple(sites), (row,))


@dataclass(frozen=True)
class _Rows:
    """Rows of a batch, with what weighs their draws; ``given`` are the values of the globals."""

    bound: Bound
    batch: Batch
    plan: marginal.Layout
    given: Mapping[str, Tensor]

    def __len__(self) -> int:
        return self.batch.n_rows(self.bound.template.row_dims[0])

    def take(self, places: Tensor) -> _Rows:
        """Those at some places."""
        row, batch = self.bound.template.row_dims[0], self.batch
        index = batch.index.get(row, torch.arange(batch.sizes[row], device=places.device))
        some = take(batch, {row: places}, self.bound.template.fields)
        return replace(self, batch=replace(some, index={**batch.index, row: index[places]}))

    def blocks(self, n: int) -> Iterator[tuple[Tensor, _Rows]]:
        """Places and rows of blocks that can be weighed at ``n`` points each at once."""
        fields, row = self.bound.template.fields, self.bound.template.row_dims[0]
        observed = [f for f in self.bound.template.observed if row in fields[f].dims]
        entries = max([self.plan.dims, *(self.batch.values[f].numel() // len(self) for f in observed)])
        places = torch.arange(len(self), device=some_field(self.batch).device)
        for at in places.split(max(1, AT_ONCE // (n * entries))):
            yield at, self.take(at)

    def weights(self, shift: Tensor, root: Tensor, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log weight w(u) of draws (n, rows), and their latents by site.

        Args:
            shift: mean of the noise, (rows, d).
            root: of its covariance, (rows, d, d).
            u: standard normal, (n, rows, d).
        """
        bound, row = self.bound, self.bound.template.row_dims[0]
        noise = shift + torch.einsum("rij,nrj->nri", root, u)
        with particle_plate(len(u), bound.nesting):
            guide, density = marginal.run_guide(
                bound, self.batch, self.plan, noise, fixed=self.given, moving=True
            )
            values = marginal.latent_values(guide)
            model = marginal.run_model(bound, self.batch, values)
        joint = torch.zeros(())
        for _, site in sample_sites(model):
            if row_dim_of(site, (row,)) is not None:
                own = by_row(log_prob(site), bound.nesting, plates_of(site)[row])
                joint = joint + own / row_scale(self.batch, row)
        # density[row] is that of z for standard normal noise: its own share of it gives way to that of u
        moved = 0.5 * (noise.square() - u.square()).sum(-1) - torch.linalg.slogdet(root).logabsdet
        return joint - density[row] - moved, {s.name: values[s.name] for s in self.plan.sites}


class _Normal(NamedTuple):
    """A normal of each row's noise, and the step from there.

    Args:
        shift: mean, (rows, d).
        root: of the covariance, (rows, d, d).
        elbo: E w, nats, (rows,).
        axes: eigenvectors of the precision A, (rows, d, d).
        along: A**-1 E w' in these axes, (rows, d).
        narrowing: log of the eigenvalues of A, (rows, d).
        promise: slope of the ELBO by the length of the step, nats, (rows,).
        reach: how far a step may go, (rows,).
    """

    shift: Tensor
    root: Tensor
    elbo: Tensor
    axes: Tensor
    along: Tensor
    narrowing: Tensor
    promise: Tensor
    reach: Tensor


def _fit(rows: _Rows, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift and root of each row's noise, and the rise of its ELBO over that of standard normal noise."""
    n, d = len(rows), points.shape[-1]
    one = torch.eye(d, dtype=points.dtype, device=points.device).repeat(n, 1, 1)
    best = _weighed(rows, points, points.new_zeros(n, d), one, points.new_full((n,), REACH))
    first = best.elbo.clone()
    for _ in range(STEPS):
        (left,) = (best.promise >= ENOUGH).nonzero(as_tuple=True)
        if not len(left):
            break
        now = _Normal(*(x[left] for x in best))
        far = (now.along.square() + 0.5 * now.narrowing.square()).sum(-1).sqrt()  # in sd: the Fisher metric
        length = (now.reach / far).clamp(max=1)[:, None]
        turned = now.root @ now.axes
        shift = now.shift + length * (turned @ now.along.unsqueeze(-1)).squeeze(-1)
        root = turned * (-0.5 * length * now.narrowing).exp().unsqueeze(-2) @ now.axes.mT
        tried = _weighed(rows.take(left), points, shift, root, 2 * now.reach)
        better = tried.elbo > now.elbo
        for kept, new in zip(best, tried, strict=True):
            kept[left[better]] = new[better]
        best.reach[left[~better]] = (0.5 * length[:, 0] * far)[~better]
    return best.shift, best.root, best.elbo - first


def _weighed(rows: _Rows, points: Tensor, shift: Tensor, root: Tensor, reach: Tensor) -> _Normal:
    """ELBO, slope and curvature at a normal of each row's noise, as a step."""
    with torch.enable_grad():
        u = points[:, None].repeat(1, len(shift), 1).requires_grad_()
        w, _ = rows.bound.frozen(lambda: rows.weights(shift, root, u))
        slopes = torch.autograd.grad(w.sum(), u)[0]
    slopes = slopes.nan_to_num(0.0).clamp(-STEEPEST, STEEPEST)  # a rate may overflow far from the row
    curvature = torch.einsum("nri,nj->rij", slopes, points) / len(points)
    one = torch.eye(points.shape[-1], dtype=points.dtype, device=points.device)
    precision, axes = torch.linalg.eigh(one - 0.5 * (curvature + curvature.mT))
    slope = (axes.mT @ slopes.mean(0).unsqueeze(-1)).squeeze(-1)
    believed = precision.clamp_min(FLATTEST)
    along, narrowing = slope / believed, believed.log()
    promise = (slope * along + 0.5 * (precision - 1) * narrowing).sum(-1)
    elbo = w.detach().mean(0).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    return _Normal(shift, root, elbo, axes, along, narrowing, promise, reach)


def _points(dims: int, like: Tensor) -> Tensor:
    """Points (n, dims) like standard normal draws, +u beside -u, of mean square exactly 1."""
    half = max(POINTS, POINTS_PER_DIM * dims) // 2
    engine = torch.quasirandom.SobolEngine(dims, scramble=True, seed=0)
    uniform = engine.draw(half, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    normal = torch.special.ndtri(uniform)
    tril = torch.linalg.cholesky(normal.mT @ normal / half)
    normal = torch.linalg.solve_triangular(tril, normal.mT, upper=False).mT
    return torch.cat([normal, -normal]).to(like)
