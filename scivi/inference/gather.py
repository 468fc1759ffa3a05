"""Traces over some rows become named values: what a chunk of rows adds to a posterior tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from scivi.errors import TemplateError
from scivi.inference.scores import by_particle, by_row, log_prob, particle_plate, placed, quiet, row_scale
from scivi.inference.trees import dataset
from scivi.inputs.batches import Batch, some_field
from scivi.models.binding import Bound, seeded, stream_seed
from scivi.models.sites import plates_of, row_dim_of, sample_sites, value_of
from scivi.models.template import Template

Sampled = dict[str, tuple[tuple[str, ...], Tensor]]  # by name: dims, and values (draw, *dims)
AT_ONCE = 2**19  # draws x rows held at once (our choice: some hundred MB with a dozen sites)
ENTRIES_AT_ONCE = 2**21  # draws x rows x entries of a row, likewise (our choice: 8 MB a tensor)


def rows_at_once(bound: Bound, row: str, draws: int) -> int:
    """Rows along a dim that a run over so many draws may take."""
    fields = bound.template.fields.values()
    entries = [math.prod(bound.example.sizes[d] for d in f.dims if d != row) for f in fields if row in f.dims]
    return max(1, min(AT_ONCE // draws, ENTRIES_AT_ONCE // (draws * max(entries, default=1))))


def shape_of(template: Template, dims: Sequence[str], batch: Batch) -> list[int]:
    """Sizes of dims in a batch: its own rows along a row dim, the whole along others."""
    sizes = template.all_sizes(batch.sizes)
    return [batch.n_rows(d) if d in template.row_dims else sizes[d] for d in dims]


def arranged(value: Tensor, draws: int, shape: Sequence[int]) -> Tensor:
    """A site's values over so many particles as (draw, *shape).

    Unit plates are dropped; constants are repeated.
    """
    own = draws if value.numel() == draws * math.prod(shape) else 1
    return value.reshape(own, *shape).expand(draws, *shape)


def reported(
    bound: Bound, model: poutine.Trace, batch: Batch, draws: int, *, row: str | None = None
) -> Sampled:
    """What a model's trace has to report; with ``row``, only what has this dim.

    Raises:
        TemplateError: a site's shape is not that of its dims.
    """
    template, values, found = bound.template, bound.values(batch, model), {}
    for name, dims in template.dims.items():
        if row is not None and row not in dims:
            continue
        value, shape = values[name], shape_of(template, dims, batch)
        if value.numel() not in (math.prod(shape), draws * math.prod(shape)):
            raise TemplateError(
                f'site "{name}" has shape {tuple(value.shape)} over {draws} draws, which is not '
                f"(draw, {', '.join(dims)}) = {(draws, *shape)}. Correct dims, or write the model so that it "
                f"takes leading dims of draws."
            )
        found[name] = (dims, arranged(value, draws, shape))
    return found


def log_likelihood(template: Template, model: poutine.Trace, batch: Batch, draws: int) -> Sampled:
    """Log density of each observed site over its plates; 0 if missing."""
    found = {}
    for name in (n for n in template.observed if n in template.told):
        node = model.nodes[name]
        plates = sorted(plates_of(node).items(), key=lambda item: item[1])
        dims = tuple(p for p, _ in plates if p != "_particle")
        value = log_prob(node, scaled=False)
        found[name] = (dims, arranged(value, draws, shape_of(template, dims, batch)))
    return found


def forecasts(bound: Bound, model: poutine.Trace, batch: Batch, draws: int) -> Sampled:
    """Observed fields drawn anew at a trace's latents."""
    template = bound.template
    values = {n: s["value"] for n, s in sample_sites(model) if not s["is_observed"]}
    with particle_plate(draws, bound.nesting), placed(values):
        again = poutine.trace(bound.model).get_trace(batch.predict())
    dims = {n: f.dims for n, f in template.told.items() if f.role == "observed"}
    return {
        n: (d, arranged(value_of(again, n), draws, shape_of(template, d, batch))) for n, d in dims.items()
    }


def prior_draws(
    bound: Bound, draws: int, seed: int, coords: Mapping[str, Any], units: Mapping[str, str]
) -> xr.Dataset:
    """The group prior: draws of the reported sites that have no rows."""
    template = bound.template
    shared = {n: dims for n, dims in template.dims.items() if not set(dims) & set(template.row_dims)}
    if not shared:
        return dataset({}, coords, units, sampled=True)
    some = some_field(bound.example)
    with seeded(stream_seed(seed, "draws") ^ 1, some.device), torch.no_grad(), quiet():
        with particle_plate(draws, bound.nesting):
            trace = poutine.trace(bound.model).get_trace(bound.example.predict())
    named = {}
    for name, dims in shared.items():
        if name in trace.nodes:
            shape = shape_of(template, dims, bound.example)
            value = arranged(value_of(trace, name), draws, shape)
            named[name] = (dims, value.contiguous().cpu().numpy()[None])
    return dataset(named, coords, units, sampled=True)


def density(bound: Bound, trace: poutine.Trace, batch: Batch, row: str, *, rows_only: bool) -> Tensor:
    """Log density of a trace by draw, each row counted once.

    Of the sites along ``row``, and unless ``rows_only`` of those along no row dim.
    """
    rows = bound.template.row_dims
    total = torch.zeros(())
    for _, site in sample_sites(trace):
        dim = row_dim_of(site, rows)
        if dim != row and (rows_only or dim is not None):
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
