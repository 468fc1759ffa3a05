"""One run of a bound pair, as log densities by site, summed to particles and to rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from scivi.errors import TemplateError, Unsupported
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound
from scivi.models.sites import plates_of, row_dim_of, sample_sites

Place = Callable[[str, Any], Tensor]  # from a guide site's name and distribution to the value it takes


class Placed(Messenger):
    """Guide sites named in ``sites`` take the value that ``place`` gives, instead of a sample."""

    def __init__(self, sites: Iterable[str], place: Place) -> None:
        super().__init__()
        self.sites, self.place = frozenset(sites), place

    def _pyro_sample(self, msg: dict[str, Any]) -> None:  # type: ignore[override]
        if msg["name"] in self.sites:
            msg["value"], msg["done"] = self.place(msg["name"], msg["fn"]), True


def placed(values: Mapping[str, Tensor]) -> Placed:
    """Sites take these values, by name."""
    return Placed(values, lambda name, _: values[name])


@dataclass(frozen=True)
class Pair:
    """Traces of guide and model on the same values."""

    guide: poutine.Trace
    model: poutine.Trace


@contextmanager
def quiet() -> Iterator[None]:
    """Run without pyro's and torch's argument checks: each costs a pass and a wait on the device."""
    with pyro.validation_enabled(False):
        yield


def particle_plate(particles: int, nesting: int) -> Any:
    """A plate of independent repeats, left of all plates of the template; nothing for a single one."""
    return pyro.plate("_particle", particles, dim=-1 - nesting) if particles > 1 else ExitStack()


def run_pair(
    bound: Bound, batch: Batch, *, particles: int = 1, drawn: Placed | None = None, allow: Iterable[str] = ()
) -> Pair:
    """Run the guide, then the model on the guide's values.

    Args:
        bound: the pair.
        batch: the rows.
        particles: independent repeats, vectorised in a plate left of all others.
        drawn: guide sites that are drawn otherwise than by their distribution.
        allow: latents of the model that the guide may leave out.

    Raises:
        TemplateError: the guide leaves out a latent of the model.
    """
    with particle_plate(particles, bound.nesting):
        with drawn or ExitStack():
            guide = poutine.trace(bound.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)
    missing = [
        n for n, s in sample_sites(model) if not s["is_observed"] and n not in guide.nodes and n not in allow
    ]
    if missing and not batch.predicting:
        raise TemplateError(
            f'template "{bound.template.name}": the guide has no factor for {missing}. Every latent of '
            f'the model needs one; discrete ones may be left out with Plan(estimator="enumerate").'
        )
    return Pair(guide, model)


def log_prob(site: Any, *, scaled: bool = True) -> Tensor:
    """Log density of a site of a trace, masked, and scaled by its plates unless told otherwise.

    Without gradients it is worked out once and kept with the site: what is told of draws needs it three
    times.
    """
    value = site.get("plain_log_prob")
    if value is None:
        value = site["fn"].log_prob(site["value"])
        if not torch.is_grad_enabled():
            site["plain_log_prob"] = value
    if site["mask"] is not None:
        value = torch.where(
            torch.as_tensor(site["mask"], device=value.device), value, torch.zeros_like(value)
        )
    return value * site["scale"] if scaled else value


def by_particle(value: Tensor, nesting: int) -> Tensor:
    """Sum over all but the particles: shape (particles,) or (1,)."""
    if value.dim() <= nesting:
        return value.sum().reshape(1)
    return value.flatten(1).sum(1) if value.dim() > 1 else value


def by_row(value: Tensor, nesting: int, row_axis: int) -> Tensor:
    """Sum over all but particles and rows: shape (particles or 1, rows).

    Args:
        value: log density of a local site.
        nesting: dims taken by plates.
        row_axis: of the rows, counted from the right.
    """
    value = value.reshape((1,) * (nesting + 1 - value.dim()) + tuple(value.shape))
    axes = [a for a in range(1, nesting + 1) if a != nesting + 1 + row_axis]
    return value.sum(axes) if axes else value


@dataclass(frozen=True)
class Scores:
    """Log densities of a pair, split into what is global and what belongs to a row.

    Args:
        pair: the traces.
        model, guide: scaled log density by site.
        observed: sites of the model that the data score.
        row_of: by site, its row dim or None.
        nesting: dims taken by plates.
    """

    pair: Pair
    model: dict[str, Tensor]
    guide: dict[str, Tensor]
    observed: frozenset[str]
    row_of: dict[str, str | None]
    nesting: int

    def latent_parts(self) -> dict[str, Tensor]:
        """Log p - log q by latent, each (particles,)."""
        names = [n for n in {**self.guide, **self.model} if n not in self.observed]
        parts = {n: self._sum(self.model, n) - self._sum(self.guide, n) for n in names}
        return cast(dict[str, Tensor], parts)  # each is in one of the two at least

    def observed_parts(self) -> dict[str, Tensor]:
        """Log likelihood by observed site, each (particles,)."""
        return {n: by_particle(self.model[n], self.nesting) for n in self.model if n in self.observed}

    def _sum(self, side: dict[str, Tensor], name: str) -> Tensor | float:
        return by_particle(side[name], self.nesting) if name in side else 0.0

    def local_rows(self, side: str, row_dim: str, scale: float) -> Tensor | float:
        """Log densities of the sites in a row dim, unscaled, (particles or 1, rows)."""
        values: dict[str, Tensor] = getattr(self, side)
        out: Tensor | float = 0.0
        for name, value in values.items():
            if self.row_of[name] == row_dim:
                node = self.pair.model.nodes.get(name) or self.pair.guide.nodes[name]
                out = out + by_row(value, self.nesting, plates_of(node)[row_dim]) / scale
        return out


def score(bound: Bound, pair: Pair) -> Scores:
    """Log densities of a pair of traces."""
    rows = bound.template.row_dims
    model, guide, observed, row_of = {}, {}, set(), {}
    for side, trace in ((guide, pair.guide), (model, pair.model)):
        for name, site in sample_sites(trace):
            side[name] = log_prob(site)
            row_of[name] = row_dim_of(site, rows)
            if trace is pair.model and site["is_observed"]:
                observed.add(name)
    return Scores(pair, model, guide, frozenset(observed), row_of, bound.nesting)


def row_scale(batch: Batch, row_dim: str) -> float:
    """By how much a plate over this row dim multiplies: rows in all over rows in the batch."""
    return batch.sizes[row_dim] / batch.n_rows(row_dim)


def local_guide_sites(bound: Bound, batch: Batch) -> dict[str, Any]:
    """Local sites of the guide, by name, from one run without gradients.

    Raises:
        Unsupported: a local site stands in two row dims.
    """
    with torch.no_grad():
        trace = poutine.trace(bound.guide).get_trace(batch)
    found = {}
    for name, site in sample_sites(trace):
        inside = [p for p in plates_of(site) if p in bound.template.row_dims]
        if len(inside) > 1:
            raise Unsupported(
                f'site "{name}" lies in the row dims {inside} at once; per-row bounds need one.'
            )
        if inside:
            found[name] = site
    return found
