"""Rows that the encoder serves badly get a posterior of their own.

It is an affine map of their noise, optimised row by row. The guide turns standard normal noise e into
z = T(e; x_i, theta). A refined row draws e from N(shift_i, spread_i**2) instead. By how much that raises the
row's ELBO is its amortisation gap (Cremer, Li and Duvenaud 2018, arXiv:1801.03558), measured from below: a
richer family could gain more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from torch import Tensor

from scivi.inference import marginal
from scivi.inference.scores import Placed, by_row, log_prob, particle_plate, row_scale
from scivi.inputs.batches import Batch, take
from scivi.models.binding import Bound
from scivi.models.sites import plates_of, row_dim_of, sample_sites

STEPS, SAMPLES, LR = 200, 32, 0.3  # our choice: steps fall from LR to 0, and reach shifts of two dozen sd


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
        given: values of the guide's global sites over all draws.
        rows: places of the rows to refine.
        draws: how many.
    """
    plan = marginal.layout(bound, batch)
    if plan.refusal is not None or not plan.sites:
        return None
    row = bound.template.row_dims[0]
    index = batch.index.get(row, torch.arange(batch.sizes[row], device=rows.device))
    some = replace(take(batch, {row: rows}, bound.template.fields), index={row: index[rows]})
    typical = {name: value[:1] for name, value in given.items()}
    like = next(iter(batch.values.values()))
    points = _normal_points(plan.dims, like)[:, None]
    shift = torch.zeros(len(rows), plan.dims, dtype=like.dtype, device=like.device)
    log_spread, first = torch.zeros_like(shift), shift.new_zeros(len(rows))
    with torch.enable_grad():
        shift, log_spread = shift.requires_grad_(True), log_spread.requires_grad_(True)
        optimiser = torch.optim.Adam([shift, log_spread], lr=LR)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
        for step in range(STEPS):
            weight, _ = _weights(bound, some, plan, typical, points, shift, log_spread)
            bound_of_row = weight.mean(0)
            first = bound_of_row.detach() if step == 0 else first
            optimiser.zero_grad()
            (-bound_of_row.sum()).backward()
            optimiser.step()
            fall.step()
    with torch.no_grad():
        last = _weights(bound, some, plan, typical, points, shift, log_spread)[0].mean(0)
        noise = torch.randn(draws, len(rows), plan.dims, dtype=like.dtype, device=like.device)
        weight, values = _weights(bound, some, plan, given, noise, shift, log_spread)
    axes = {s.name: s.row_axis - (len(s.shape) - s.n_plates) for s in plan.sites}
    return Refined(rows, values, axes, weight, last - first)


def _normal_points(dims: int, like: Tensor) -> Tensor:
    uniform = torch.quasirandom.SobolEngine(dims, scramble=True, seed=0).draw(SAMPLES, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).to(like)


def _weights(
    bound: Bound,
    batch: Batch,
    plan: marginal.Layout,
    given: Mapping[str, Tensor],
    points: Tensor,
    shift: Tensor,
    log_spread: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log weight (points, rows) of local draws, and the draws.

    They are at noise shift + spread * points (points, rows or 1, dims).
    """
    row, n = bound.template.row_dims[0], len(points)
    noise = shift + log_spread.exp() * points
    with particle_plate(n, bound.nesting):
        guide, density = marginal.run_guide(bound, batch, plan, noise, fixed=given, moving=True)
        values = marginal.latent_values(guide)
        with Placed(values, lambda name, _: values[name]):
            model = poutine.trace(bound.model).get_trace(batch)
    joint = torch.zeros(())
    for _, site in sample_sites(model):
        if row_dim_of(site, (row,)) is not None:
            joint = joint + by_row(log_prob(site), bound.nesting, plates_of(site)[row]) / row_scale(
                batch, row
            )
    base = (-0.5 * noise.square()).sum(-1)
    own = (-0.5 * points.square()).sum(-1) - log_spread.sum(-1)
    weight = joint - (density[row] - base + own)
    return weight, {s.name: values[s.name] for s in plan.sites}
