"""``simulate``: a template becomes data, with the truth behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine

from scivi.errors import TemplateError
from scivi.inference.gather import shape_of
from scivi.inference.opening import open_data
from scivi.inference.trees import dataset, units_of
from scivi.inputs.batches import Batch, chunks
from scivi.models.binding import seeded
from scivi.models.sites import value_of
from scivi.models.template import Template


def simulate(
    template: Template, sizes: Mapping[str, int], *, seed: int = 0, like: Any = None
) -> tuple[xr.Dataset, xr.Dataset]:
    """Make data from a template, with the truth behind them.

    Args:
        template: whose ``simulate`` is used, or whose model is run forward.
        sizes: of the dims.
        seed: of the data.
        like: a table whose given fields and labels are used when the model is run forward; without it fields
            take their default, or a feasible value.

    Returns:
        A table that ``scivi.fit`` takes, and the reported sites that made it.
    """
    if template.simulate is not None:
        generator = torch.Generator().manual_seed(seed)
        return template.simulate(dict(sizes), template.prior, generator)
    source = None if like is None else open_data(template, like)
    batch = _blank(template, sizes, source)
    with seeded(seed), torch.no_grad():
        own = template.nets(dict(batch.sizes), template.prior) if template.nets is not None else None
        trace = poutine.trace(template.model).get_trace(batch.predict(), template.prior, own)
    coords: dict[str, Any] = {d: np.arange(n) for d, n in template.all_sizes(batch.sizes).items()}
    if source is not None:
        coords |= {d: np.asarray(source.coords[d]) for d in source.sizes}
    coords |= {d: np.asarray(labels) for d, labels in template.coords.items()}
    units = units_of(template)
    values = {n: batch.values[n] for n, f in template.fields.items() if f.role == "given"}
    values |= {n: value_of(trace, n) for n in template.observed}
    table = {}
    for n, v in values.items():
        declared = template.fields[n]
        entries = v.numpy().reshape(shape_of(template, declared.dims, batch))
        table[n] = (declared.dims, declared.as_stored(entries))
    truth = {
        n: (d, value_of(trace, n).numpy().reshape(shape_of(template, d, batch)))
        for n, d in template.dims.items()
        if n in trace.nodes  # what is derived is no part of what made the data
    }
    return dataset(table, coords, units, sampled=False), dataset(truth, coords, units, sampled=False)


def _blank(template: Template, sizes: Mapping[str, int], source: Any) -> Batch:
    """A batch of feasible values, or of the given fields of a table."""
    if source is not None:
        most, cpu = max(source.sizes.values()), torch.device("cpu")
        return next(chunks(source, template.fields, template.row_dims, most, cpu, torch.float32))
    sizes = template.all_sizes(sizes)
    absent = sorted({d for f in template.fields.values() for d in f.dims} - set(sizes))
    if absent:
        raise TemplateError(f'simulate needs the size of {absent}: pass sizes={{"{absent[0]}": ...}}.')
    values = {n: torch.full([sizes[d] for d in f.dims], f.assumed) for n, f in template.fields.items()}
    return Batch(values, {}, sizes, template.row_dims)
