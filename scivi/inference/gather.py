"""Traces over some rows become named arrays: what a chunk of rows adds to a posterior tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from scivi.errors import TemplateError
from scivi.inference.scores import Placed, by_particle, by_row, log_prob, particle_plate, quiet, row_scale
from scivi.inference.trees import arranged, dataset
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound, seeded, stream_seed
from scivi.models.sites import plates_of, row_dim_of, sample_sites, value_of
from scivi.models.template import Template

AT_ONCE = 2**20  # draws x rows held at once (our choice: a few hundred MB with a dozen sites)


def shape_of(template: Template, dims: Sequence[str], batch: Batch) -> list[int]:
    """Sizes of dims in a batch: its own rows along a row dim, the whole along others."""
    sizes = template.all_sizes(batch.sizes)
    return [batch.n_rows(d) if d in template.row_dims else sizes[d] for d in dims]


def reported(
    template: Template, model: poutine.Trace, batch: Batch, draws: int, *, row: str | None = None
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Reported sites of a model's trace, (draw, *dims); with ``row``, only those that have this dim.

    Raises:
        TemplateError: a site's shape is not that of its dims.
    """
    found = {}
    for name, dims in template.dims.items():
        if row is not None and row not in dims:
            continue
        value, shape = value_of(model, name), shape_of(template, dims, batch)
        if value.numel() not in (int(np.prod(shape)), draws * int(np.prod(shape))):
            raise TemplateError(
                f'site "{name}" has shape {tuple(value.shape)} over {draws} draws, which is not '
                f"(draw, {', '.join(dims)}) = {(draws, *shape)}. Correct dims, or write the model so that it "
                f"takes leading dims of draws."
            )
        found[name] = (dims, arranged(value, draws, shape))
    return found


def log_likelihood(
    template: Template, model: poutine.Trace, batch: Batch, draws: int
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Log density of each observed site over its plates, (draw, *plates); 0 if missing."""
    found = {}
    for name in template.observed:
        node = model.nodes[name]
        placed = sorted(plates_of(node).items(), key=lambda item: item[1])
        dims = tuple(p for p, _ in placed if p != "_particle")
        value = log_prob(node, scaled=False)
        found[name] = (dims, arranged(value, draws, shape_of(template, dims, batch)))
    return found


def forecasts(
    bound: Bound, model: poutine.Trace, batch: Batch, draws: int
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Observed fields drawn anew at a trace's latents, (draw, *dims)."""
    template = bound.template
    values = {n: s["value"] for n, s in sample_sites(model) if not s["is_observed"]}
    with particle_plate(draws, bound.nesting), Placed(values, lambda name, _: values[name]):
        again = poutine.trace(bound.model).get_trace(batch.predict())
    dims = {n: template.fields[n].dims for n in template.observed}
    return {
        n: (d, arranged(value_of(again, n), draws, shape_of(template, d, batch))) for n, d in dims.items()
    }


def prior_draws(
    bound: Bound, draws: int, seed: int, coords: Mapping[str, Any], units: Mapping[str, str]
) -> xr.Dataset:
    """The group prior: draws of the reported sites that have no rows."""
    template = bound.template
    some = next(iter(bound.example.values.values()))
    with seeded(stream_seed(seed, "draws") ^ 1, some.device), torch.no_grad(), quiet():
        with particle_plate(draws, bound.nesting):
            trace = poutine.trace(bound.model).get_trace(bound.example.predict())
    named = {}
    for name, dims in template.dims.items():
        if not set(dims) & set(template.row_dims):
            shape = shape_of(template, dims, bound.example)
            named[name] = (dims, arranged(value_of(trace, name), draws, shape)[None])
    return dataset(named, coords, units, sampled=True)


def density(bound: Bound, trace: poutine.Trace, batch: Batch, *, rows_only: bool) -> Tensor:
    """Log density of a trace by draw, rows counted once; ``rows_only``: of what has the first row dim."""
    rows = bound.template.row_dims
    total = torch.zeros(())
    for _, site in sample_sites(trace):
        dim = row_dim_of(site, rows)
        if rows_only and rows[0] not in plates_of(site):
            continue
        value = by_particle(log_prob(site), bound.nesting)
        total = total + (value if dim is None else value / row_scale(batch, dim))
    return total


def row_weight(
    bound: Bound, guide: poutine.Trace, model: poutine.Trace, batch: Batch, draws: int
) -> Tensor | None:
    """Log weight of a row's latents given the globals, (draws, rows); None if a row has none of its own."""
    row = bound.template.row_dims[0]
    if not any(s.row_dim == row for s in bound.sites):
        return None
    out: Tensor = torch.zeros(())
    for trace, sign in ((model, 1.0), (guide, -1.0)):
        for _, site in sample_sites(trace):
            dims = plates_of(site)
            if row in dims:
                out = out + sign * by_row(log_prob(site), bound.nesting, dims[row]) / row_scale(batch, row)
    return out.expand(draws, -1)
