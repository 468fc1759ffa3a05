"""Guide families: mean field and joint normal (full or low rank); the same for globals of an amortised guide.

A family is a frozen value with one method, ``build``, which makes the torch module that ``bind`` calls as the
guide. Amortised guides are written by hand, as plain functions ``(batch, prior, nets)``, from ``normals``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from scivi.errors import TemplateError, Unsupported
from scivi.inputs.batches import Batch
from scivi.models.sites import Site, central

Start = Mapping[str, list[Tensor]]


@runtime_checkable
class Family(Protocol):
    """A ready-made guide: from the model's latent sites to a module whose forward samples them."""

    def build(self, sites: Sequence[Site], starts: Start, nesting: int) -> nn.Module:
        """The guide's module.

        Args:
            sites: latent sites of the model.
            starts: a few prior draws by site, of which the median is the start.
            nesting: dims taken by plates.
        """
        ...


def refuse_discrete(sites: Sequence[Site], family: str) -> None:
    """Raise where a family that has no factor for discrete latents meets some."""
    discrete = [s.name for s in sites if s.discrete]
    if discrete:
        raise TemplateError(
            f"the {family} guide has no factor for the discrete latents {discrete}. Sum them in the model, "
            f'write a guide that leaves them out and fit with Plan(estimator="enumerate"), or give them a '
            f"factor."
        )


def _unconstrained(site: Site, starts: Start) -> tuple[Tensor, int]:
    """Start of a site on the unbounded scale, rows widened to the full data, and its event dims there."""
    bijector = biject_to(site.support)
    value = bijector.inv(central(starts[site.name], site.support))
    event_dim = site.event_dim + bijector.domain.event_dim - bijector.codomain.event_dim
    event_dim = max(event_dim, bijector.domain.event_dim)
    if site.row_dim is not None:
        axis, shape = dict(site.plates)[site.row_dim] - event_dim, list(value.shape)
        shape[axis] = site.shape[site.row_axis]
        value = value.mean(axis, keepdim=True).expand(shape).clone()
    return value, event_dim


@dataclass(frozen=True, slots=True)
class MeanField:
    """Independent normals on the unbounded scale, one for each entry of each latent.

    Args:
        scale: starting standard deviation (Pyro's AutoNormal takes the same .1).
    """

    scale: float = 0.1

    def build(self, sites: Sequence[Site], starts: Start, nesting: int) -> nn.Module:
        """See ``Family.build``."""
        refuse_discrete(sites, "mean-field")
        return MeanFieldNormal(sites, starts, self.scale)


class MeanFieldNormal(nn.Module):
    """The module of ``MeanField``: a table of means and log standard deviations by site."""

    def __init__(self, sites: Sequence[Site], starts: Start, scale: float) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.loc, self.log_scale, self.event_dims = nn.ParameterDict(), nn.ParameterDict(), {}
        for site in self.sites:
            value, self.event_dims[site.name] = _unconstrained(site, starts)
            self.loc[site.name] = nn.Parameter(value.clone())
            self.log_scale[site.name] = nn.Parameter(torch.full_like(value, scale).log())
        self.amortised = all(s.row_dim is None for s in self.sites)

    def forward(self, batch: Batch) -> None:
        """Sample every site, within its plates."""
        for site in self.sites:
            loc, scale = self.loc[site.name], self.log_scale[site.name].exp()
            event_dim = self.event_dims[site.name]
            if site.row_dim is not None and site.row_dim in batch.index:
                axis = dict(site.plates)[site.row_dim] - event_dim
                loc, scale = (x.index_select(axis, batch.index[site.row_dim]) for x in (loc, scale))
            base = dist.Normal(loc, scale).to_event(event_dim)
            with _within(batch, site.plates):
                pyro.sample(site.name, dist.TransformedDistribution(base, [biject_to(site.support)]))


@contextmanager
def _within(batch: Batch, plates: Sequence[tuple[str, int]]) -> Iterator[None]:
    """All plates of a site, entered together."""
    with ExitStack() as stack:
        for name, dim in plates:
            stack.enter_context(batch.plate(name, dim=dim))
        yield


@dataclass(frozen=True, slots=True)
class JointNormal:
    """One normal over all latents together, on the unbounded scale.

    Use ``rank=None`` for a full covariance, a number for diagonal plus that many factors. Needs the full
    batch if there are latents per row: it does not scale with rows. For the globals of an amortised template,
    ``global_normal`` makes the same module for use in ``nets``.

    Args:
        rank: rank of the factor, None for a full covariance.
        scale: starting standard deviation.
    """

    rank: int | None = None
    scale: float = 0.1

    def build(self, sites: Sequence[Site], starts: Start, nesting: int) -> nn.Module:
        """See ``Family.build``."""
        refuse_discrete(sites, "joint normal")
        slots, start = slots_of(sites, starts)
        return JointNormalGuide(slots, start, self.scale, self.rank, nesting)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a site lies in the joint vector."""

    name: str
    shape: torch.Size
    event_dim: int
    support: constraints.Constraint
    plates: tuple[tuple[str, int], ...] = ()
    row_dim: str | None = None


def slots_of(sites: Sequence[Site], starts: Start) -> tuple[tuple[Slot, ...], Tensor]:
    """Where each site lies in a joint vector, and the vector at the start (D,)."""
    values = [_unconstrained(s, starts) for s in sites]
    slots = tuple(
        Slot(s.name, v.shape, e, s.support, s.plates, s.row_dim)
        for s, (v, e) in zip(sites, values, strict=True)
    )
    return slots, torch.cat([v.reshape(-1) for v, _ in values])


class JointGuide(nn.Module):
    """A distribution over all latents together, on the unbounded scale: ``distribution``, event (D,).

    Sites are slices of one auxiliary draw ``name``, carried to their supports.
    """

    def __init__(self, slots: Sequence[Slot], nesting: int, name: str = "_joint") -> None:
        super().__init__()
        self.slots, self.nesting, self.name = tuple(slots), nesting, name
        self.amortised = all(s.row_dim is None for s in slots)

    def distribution(self) -> dist.TorchDistribution:
        """Of the joint vector (D,)."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample the joint vector and every site; returns the values by site."""
        rows = [s.row_dim for s in self.slots if s.row_dim is not None and s.row_dim in batch.index]
        if rows:
            raise Unsupported(
                f"the joint guide holds every row of {sorted(set(rows))} in one vector and needs the "
                f"full batch: fit it with Plan(rows_per_batch=None), on the data that it was bound to."
            )
        joint = pyro.sample(self.name, self.distribution(), infer={"is_auxiliary": True})
        return {
            slot.name: self._site(slot, part, batch)
            for slot, part in zip(self.slots, self._parts(joint), strict=True)
        }

    def _parts(self, joint: Tensor) -> list[Tensor]:
        """The joint vector cut into sites (*lead, *plates, *event); lead are the dims left of the plates."""
        lead = joint.shape[: max(0, joint.dim() - 1 - self.nesting)] if joint.dim() > 1 else ()
        parts, start = [], 0
        for slot in self.slots:
            stop = start + slot.shape.numel()
            plates = len(slot.shape) - slot.event_dim
            pad = (1,) * (self.nesting - plates) if lead else ()
            parts.append(joint[..., start:stop].reshape((*lead, *pad, *slot.shape)))
            start = stop
        return parts

    def _site(self, slot: Slot, part: Tensor, batch: Batch) -> Tensor:
        bijector = biject_to(slot.support)
        value = bijector(part)
        slope = bijector.log_abs_det_jacobian(part, value)
        event_dim = value.dim() - (part.dim() - slot.event_dim)
        extra = slope.dim() - (value.dim() - event_dim)
        density = -(slope.flatten(-extra).sum(-1) if extra > 0 else slope)
        with _within(batch, slot.plates):
            return pyro.sample(slot.name, dist.Delta(value, log_density=density, event_dim=event_dim))


class JointNormalGuide(JointGuide):
    """The module of ``JointNormal``.

    It has ``loc`` and ``log_diag`` (D,), and ``factor``: (D, D) below the diagonal if D > 1, or (D, rank).
    """

    factor: Tensor

    def __init__(
        self,
        slots: Sequence[Slot],
        start: Tensor,
        scale: float,
        rank: int | None,
        nesting: int,
        name: str = "_joint",
    ) -> None:
        super().__init__(slots, nesting, name)
        self.rank = rank
        self.loc = nn.Parameter(start.detach().clone())
        self.log_diag = nn.Parameter(torch.full_like(start, scale).log())
        shape = (start.numel(), start.numel() if rank is None else rank)
        factor = torch.zeros(shape, dtype=start.dtype) + (0.0 if rank is None else 1e-2 * scale)
        if rank is None and start.numel() == 1:
            # Nothing to correlate: a zero that is neither learnt nor saved.
            self.register_buffer("factor", factor, persistent=False)
        else:
            self.factor = nn.Parameter(factor)

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the covariance (full rank only); rows are scaled: Adam's steps are in sd."""
        scale = self.log_diag.exp()
        return scale[:, None] * (
            self.factor.tril(-1) + torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        )

    def distribution(self) -> dist.TorchDistribution:
        """The joint normal, event (D,)."""
        if self.rank is None:
            return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)
        return dist.LowRankMultivariateNormal(self.loc, self.factor, (2 * self.log_diag).exp())

    @torch.no_grad()
    def set(self, loc: Tensor, covariance: Tensor) -> None:
        """Give it a mean (D,) and a covariance (D, D); full rank only.

        Raises:
            Unsupported: if the guide has a low rank.
        """
        if self.rank is not None:
            raise Unsupported("a low-rank normal cannot hold a given covariance; use rank=None.")
        tril = torch.linalg.cholesky(covariance)
        self.loc.copy_(loc)
        self.log_diag.copy_(tril.diagonal().log())
        self.factor.copy_((tril / tril.diagonal()[:, None]).tril(-1))


def global_normal(
    supports: Mapping[str, constraints.Constraint],
    start: Mapping[str, Tensor],
    *,
    scale: float = 0.1,
    rank: int | None = None,
    nesting: int = 1,
) -> JointNormalGuide:
    """A joint normal for the global latents of an amortised template, to be kept in its ``nets``.

    Args:
        supports: of every site, by name.
        start: by name, the starting value, inside the support; it has the shape of the site.
        scale: starting standard deviation on the unbounded scale.
        rank: None for a full covariance.
        nesting: dims taken by the template's plates.
    """
    slots, values = [], []
    for name, support in supports.items():
        value = biject_to(support).inv(torch.as_tensor(start[name]).float())
        slots.append(Slot(name, value.shape, value.dim(), support))
        values.append(value.reshape(-1))
    return JointNormalGuide(slots, torch.cat(values), scale, rank, nesting)


class IndependentNormals(nn.Module):
    """Independent normals on the unbounded scale, for global latents too many to correlate.

    It is kept in the ``nets`` of an amortised template, and called in its guide.

    Args:
        supports: of every site, by name.
        start: by name, the starting value, inside the support; it has the shape of the site.
        scale: starting standard deviation.
        pace: by how much the means move where a network's weight moves by 1: a global that starts far from
            where it belongs would take thousands of steps of a size that suits networks.
    """

    def __init__(
        self,
        supports: Mapping[str, constraints.Constraint],
        start: Mapping[str, Tensor],
        *,
        scale: float = 0.1,
        pace: float = 1.0,
    ) -> None:
        super().__init__()
        self.supports, self.pace = dict(supports), pace
        self.loc, self.log_scale = nn.ParameterDict(), nn.ParameterDict()
        for name, support in self.supports.items():
            value = biject_to(support).inv(torch.as_tensor(start[name]).float())
            self.loc[name] = nn.Parameter(value / pace)
            self.log_scale[name] = nn.Parameter(torch.full_like(value, scale).log())

    def distribution(self, name: str) -> dist.TorchDistribution:
        """Of a site, all of it one event."""
        loc = self.pace * self.loc[name]
        base = dist.Normal(loc, self.log_scale[name].exp()).to_event(loc.dim())
        return dist.TransformedDistribution(base, [biject_to(self.supports[name])])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Sample every site, whatever the rows; the values by name, as ``JointNormalGuide`` gives them."""
        return {name: pyro.sample(name, self.distribution(name)) for name in self.supports}
