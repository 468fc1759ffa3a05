"""Discrete latents that a guide leaves out: summed exactly while fitting, drawn given the rest afterwards."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.enum import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from scivi.errors import Unsupported
from scivi.inference.scores import by_particle, by_row, log_prob, particle_plate, placed
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound
from scivi.models.sites import plates_of, sample_sites, value_of


@dataclass(frozen=True)
class Summed:
    """What is left of the sites of a trace that depend on summed latents.

    Args:
        sites: their names.
        terms: log of the sum over all values of the latents, unscaled, over the plates that remain.
        scale: of those plates.
    """

    sites: tuple[str, ...]
    terms: tuple[Tensor, ...]
    scale: float


def left_out(bound: Bound, guide: poutine.Trace) -> list[str]:
    """Discrete latents of the model for which a run of the guide has no site."""
    return [s.name for s in bound.sites if s.discrete and s.name not in guide.nodes]


def summed_out(trace: poutine.Trace) -> Summed:
    """Sum the enumerated latents of a trace, plate by plate (Obermeyer et al. 2019, arXiv:1902.03210).

    Raises:
        Unsupported: summed sites are scaled differently.
    """
    trace.compute_log_prob()
    trace.pack_tensors()
    sites = dict(sample_sites(trace))
    symbols = {s["infer"]["_enumerate_symbol"] for s in sites.values() if s["infer"].get("_enumerate_symbol")}
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    names, scales = [], set()
    for name, site in sites.items():
        if symbols.isdisjoint(site["packed"]["log_prob"]._pyro_dims):
            continue
        plates = frozenset(trace.plate_to_symbol[p] for p in plates_of(site))
        own = packed.scale_and_mask(site["packed"]["unscaled_log_prob"], mask=site["packed"]["mask"])
        factors.setdefault(plates, []).append(own)
        names.append(name)
        scales.add(float(site["scale"]))
    if len(scales) > 1:
        raise Unsupported(
            f"the summed sites {names} stand for rows in the proportions {sorted(scales)}; a sum has one. "
            f"Put them in one row dim, or use Plan(rows_per_batch=None)."
        )
    left = contract_tensor_tree(factors, symbols) if factors else {}
    terms = [packed.unpack(term, trace.symbol_to_dim) for found in left.values() for term in found]
    return Summed(tuple(names), tuple(terms), scales.pop() if scales else 1.0)


def complete(
    bound: Bound, batch: Batch, guide: poutine.Trace, draws: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """Draw what the guide left out given its values and the data.

    Returns:
        The guide's trace, with the density of what was drawn as a site "_left_out", and the model's.
    """
    names, first = left_out(bound, guide), -2 - bound.nesting

    def story() -> None:
        with particle_plate(draws, bound.nesting):
            poutine.replay(bound.model, trace=guide)(batch)

    enumerated = config_enumerate(story, "parallel")
    with EnumMessenger(first_available_dim=first):
        summed = summed_out(poutine.trace(enumerated).get_trace())
    drawn = poutine.trace(infer_discrete(enumerated, first_available_dim=first)).get_trace()
    values = {n: s["value"] for n, s in sample_sites(guide)} | {n: value_of(drawn, n) for n in names}
    with particle_plate(draws, bound.nesting), placed(values):
        model = poutine.trace(bound.model).get_trace(batch)

        def completed(batch: Batch) -> None:
            bound.guide(batch)
            _score_of_drawn(bound, batch, model, summed)

        return poutine.trace(completed).get_trace(batch), model


def _score_of_drawn(bound: Bound, batch: Batch, model: poutine.Trace, summed: Summed) -> None:
    """Score log p(drawn | rest) = log p(drawn, rest) - log p(rest), row by row if each row has its own."""
    sites: list[Any] = [model.nodes[name] for name in summed.sites]
    row, nesting = bound.template.row_dims[0], bound.nesting
    if not all(row in plates_of(site) for site in sites):
        total = sum(by_particle(log_prob(s, scaled=False), nesting) for s in sites) - sum(
            by_particle(term, nesting) for term in summed.terms
        )
        pyro.factor("_left_out", torch.as_tensor(total).reshape(-1, *(1,) * nesting), has_rsample=False)
        return
    axis = plates_of(sites[0])[row]
    own = sum(by_row(log_prob(s, scaled=False), nesting, axis) for s in sites) - sum(
        by_row(term, nesting, axis) for term in summed.terms
    )
    shape = [len(torch.as_tensor(own)), *(1,) * nesting]
    shape[axis] = batch.n_rows(row)
    with batch.plate(row, dim=axis):
        pyro.factor("_left_out", torch.as_tensor(own).reshape(shape), has_rsample=False)
