"""What a fit begins with: data that fit the template, a device, the state before the first step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scivi.errors import DataError, PlanError, listed
from scivi.inference.plan import Plan
from scivi.inference.state import State, new_state
from scivi.inference.team import team
from scivi.inputs.batches import chunks
from scivi.inputs.feed import Feed
from scivi.inputs.sources import open_source
from scivi.models.binding import bind, stream_seed
from scivi.models.guides import JointGuide
from scivi.models.template import Template

EXAMPLE_ROWS = 64  # rows that a pair is bound to (our choice: enough for any shape)


def open_data(template: Template, data: Any) -> Any:
    """Data as a source that fits the template, checked.

    Args:
        template: whose fields, dims and sentences on wrong data count.
        data: anything ``open_source`` takes.

    Raises:
        DataError: the data do not fit; every fault is listed.
    """
    return open_source(
        data,
        template.fields,
        template.row_dims,
        name=template.name,
        sizes=template.sizes,
        validate=template.validate,
        distinct=template.distinct,
    )


def open_measured(template: Template, data: Any) -> Any:
    """``open_data``, of data to learn from.

    Raises:
        DataError: an observed field is missing everywhere, too; that is a forecast, and no fit.
    """
    source = open_data(template, data)
    spans = getattr(source, "spans", {})  # a source that somebody wrote may have none
    empty = [n for n, span in spans.items() if span.empty and template.fields[n].role == "observed"]
    if empty:
        faults = [f'observed field "{name}": every entry is missing (NaN)' for name in empty]
        title = f'there is nothing to learn from for template "{template.name}"; look how these were read:'
        raise DataError(listed(title, faults))
    return source


def device_of(plan: Plan) -> torch.device:
    """The device that a plan names.

    Raises:
        PlanError: there is none such here.
    """
    try:
        device = torch.device(plan.device)
    except RuntimeError:
        raise PlanError(f'device = "{plan.device}" is no device; use "cpu", "cuda" or "cuda:1".') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f'device = "{plan.device}", but torch finds no CUDA device here; use "cpu".')
    return device


def begin(template: Template, source: Any, plan: Plan) -> State:
    """The state of a fit before its first step."""
    ours = team()
    device, dtype = ours.device(device_of(plan)), getattr(torch, plan.dtype)
    feed = Feed(
        source,
        template.fields,
        template.row_dims,
        plan.rows_per_batch,
        stream_seed(plan.seed, "order"),
        device,
        dtype,
        plan.resident_bytes,
        share=(ours.rank, ours.size),
    )
    read = template.fields, template.row_dims
    bound = bind(template, next(chunks(source, *read, EXAMPLE_ROWS, device, dtype)), plan.seed)
    if isinstance(bound.nets.guide, JointGuide) and not bound.amortised:  # it can be run on all rows alone
        whole = next(chunks(source, *read, source.sizes[template.row_dims[0]], device, dtype))
        bound = replace(bound, example=whole)
    return new_state(bound, feed, plan, ours)
