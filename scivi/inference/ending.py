"""From the state of a fit to what remains of it: provenance, history, and what it has seen of its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from scivi.inference.gather import rows_at_once
from scivi.inference.objective import prepare
from scivi.inference.plan import Plan
from scivi.inference.state import Fit, State, freeze, versions
from scivi.inference.trees import plain_labels
from scivi.inputs.batches import chunks, some_field
from scivi.inputs.features import Features, Sample
from scivi.models.binding import stream_seed
from scivi.models.template import Template

_SEEN_DRAWS = 16  # as many rows at once as of so many draws: a pass that only compares needs no more


def identity_of(template: Template, source: Any, plan: Plan) -> dict[str, Any]:
    """What a resumed fit must share with the one that was begun."""
    free = {"save_every_s", "device"}
    made = template.made and [template.made[0], dict(template.made[1])]
    return {
        "template": template.name,
        "made": made,
        "prior": template.prior_numbers(),
        "plan": {k: v for k, v in plan.to_dict().items() if k not in free},
        "data": {"fingerprint": source.fingerprint, "sizes": dict(source.sizes)},
    }


def frozen(state: State, source: Any, plan: Plan, identity: Mapping[str, Any]) -> Fit:
    """The finished fit of a state that has taken its last step."""
    template, finish = state.bound.template, dict(state.finish)
    points = finish.pop("points", None)  # too many for the provenance, which every posterior carries
    ended = {
        "stopped": state.stopped,
        "steps": state.step,
        "wall_s": round(state.wall_s, 3),
        "restarts": state.restarts,
        "finish": finish,
        "engine": state.engine,
        "processes": state.team.size,
        "estimator": prepare(state.bound, state.bound.example, plan).estimator if state.learns else None,
    }
    provenance = {
        **identity,
        "weights": dict(state.bound.weights),
        "plan": plan.to_dict(),
        "seed": plan.seed,
        "device": plan.device,
        "versions": versions(),
        "fit": ended,
    }
    coords = {d: plain_labels(source.coords[d]) for d in source.sizes if d not in template.row_dims}
    coords |= {d: list(labels) for d, labels in template.coords.items()}
    seen, features = _seen(state, source, plan)
    population = None if points is None else torch.tensor(points).double()
    history = _history(state.history)
    return Fit(freeze(state.bound), coords, plan, history, provenance, seen, features, population)


def _history(entries: list[dict[str, float]]) -> xr.Dataset:
    """The history as a dataset over "log"; a part that came later is NaN before."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    columns = {n: ("log", np.array([e.get(n, np.nan) for e in entries])) for n in names}
    history = xr.Dataset(columns, {"log": np.arange(len(entries))})
    for name in history.data_vars:
        if str(name).startswith(("part_", "objective")):
            history[name].attrs["units"] = "nat / row"
    return history


def _seen(state: State, source: Any, plan: Plan) -> tuple[dict[str, torch.Tensor], Features]:
    """Smallest and largest value of each field along the rows, and features of some rows."""
    template, seen = state.bound.template, {}
    seed = stream_seed(plan.seed, "sampling")  # numpy's generator: torch's of that stream is another
    sample = Sample(template.told, template.row_dims[0], source.sizes, seed)
    some = some_field(state.bound.example)
    size = rows_at_once(state.bound, template.row_dims[0], _SEEN_DRAWS)
    for batch in chunks(source, template.fields, template.row_dims, size, torch.device("cpu"), some.dtype):
        sample.add(batch)
        for name, declared in template.fields.items():
            axes = [i for i, d in enumerate(declared.dims) if d in template.row_dims]
            if not axes:
                continue
            mask = batch.observed_mask.get(name)
            value = batch.values[name]
            low = value if mask is None else value.masked_fill(~mask, torch.inf)
            high = value if mask is None else value.masked_fill(~mask, -torch.inf)
            low, high = low.amin(axes), high.amax(axes)
            seen[f"{name}.min"] = torch.minimum(seen.get(f"{name}.min", low), low)
            seen[f"{name}.max"] = torch.maximum(seen.get(f"{name}.max", high), high)
    return seen, sample.features(source.coords)
