"""What one run of a model tells about its sample sites: the facts that guides and objectives need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints


@dataclass(frozen=True, slots=True)
class Site:
    """A latent site of a model, as one run showed it.

    Args:
        name: of the site.
        shape: batch and event shape in the full data, plates from the right.
        event_dim: trailing dims that are one event.
        support: of the prior.
        plates: ``(name, dim)`` of each plate it stands in, dim counted from the right of the batch shape.
        row_dim: the minibatched plate it stands in, or None for a global site.
        discrete: whether it takes whole numbers.
    """

    name: str
    shape: tuple[int, ...]
    event_dim: int
    support: constraints.Constraint
    plates: tuple[tuple[str, int], ...]
    row_dim: str | None
    discrete: bool

    @property
    def row_axis(self) -> int:
        """Axis of the rows in ``shape``, counted from the right."""
        return dict(self.plates)[self.row_dim] - self.event_dim if self.row_dim else 0


def is_subsample(site: Mapping[str, Any]) -> bool:
    """Whether pyro's plate made this site to hold its row numbers."""
    return isinstance(site["fn"], _Subsample)


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether the site came from ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic", False))


def sample_sites(trace: poutine.Trace) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sites of a trace that carry a density."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site) and not is_deterministic(site):
            yield name, site


def value_of(trace: poutine.Trace, name: str) -> Tensor:
    """Value of a site of a trace that was run."""
    return cast(Tensor, trace.nodes[name]["value"])


def plates_of(site: Mapping[str, Any]) -> dict[str, int]:
    """Plate names and dims of a site of a trace."""
    return {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}


def weight_of(site: Mapping[str, Any]) -> float:
    """How many times the site counts, besides what its plates make of a minibatch (``poutine.scale``)."""
    frames = [f for f in site["cond_indep_stack"] if f.full_size]
    plates = math.prod(f.full_size / f.size for f in frames)
    return float(torch.as_tensor(site["scale"]).double().mean()) / plates


def row_dim_of(site: Mapping[str, Any], rows: tuple[str, ...]) -> str | None:
    """The row dim in whose plate the site stands, None for a global site."""
    return next((name for name in plates_of(site) if name in rows), None)


def nesting_of(*traces: poutine.Trace) -> int:
    """How many dims from the right are taken by plates."""
    dims = [d for t in traces for _, s in sample_sites(t) for d in plates_of(s).values()]
    return -min(dims, default=0)


def latent_sites(trace: poutine.Trace, sizes: Mapping[str, int], rows: tuple[str, ...]) -> tuple[Site, ...]:
    """The latent sites of one run of a model.

    Args:
        trace: of the model on an example batch.
        sizes: of the full data; a row dim of a site's shape is widened to it.
        rows: the minibatched dims.
    """
    found = []
    for name, site in sample_sites(trace):
        if site["is_observed"]:
            continue
        fn, plates = site["fn"], plates_of(site)
        shape = list(fn.shape())
        for plate, dim in plates.items():
            if plate in rows:
                shape[dim - fn.event_dim] = sizes[plate]
        found.append(
            Site(
                name=name,
                shape=tuple(shape),
                event_dim=fn.event_dim,
                support=fn.support,
                plates=tuple(plates.items()),
                row_dim=row_dim_of(site, rows),
                discrete=bool(fn.support.is_discrete),
            )
        )
    return tuple(found)


def central(values: list[Tensor], support: constraints.Constraint) -> Tensor:
    """Median of prior draws, taken where the support is unbounded.

    There a median of each entry stays inside it.
    """
    bijector = torch.distributions.biject_to(support)
    stacked = torch.stack([bijector.inv(v) for v in values])
    return bijector(stacked.median(0).values)
