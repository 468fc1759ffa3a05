"""Guide families: mean field, joint normal (full or low rank), and parts: Laplace base with skew.

A family is a frozen value with one method, ``build``, which makes the torch module that ``bind`` calls as the
guide. Amortised guides are written by hand from the parts here, as plain functions ``(batch, prior, nets)``.

Longer than 400 lines because families and the parts of amortised guides are not yet two files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from scivi.errors import TemplateError, Unsupported
from scivi.inputs.batches import Batch
from scivi.models.sites import Site, central

_HALF_LOG_2PI = 0.9189385332046727
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
        axis = dict(site.plates)[site.row_dim] - event_dim
        size = site.shape[site.row_axis]
        value = value.mean(axis, keepdim=True).expand(*_with(value.shape, axis, size)).clone()
    return value, event_dim


def _with(shape: Sequence[int], axis: int, size: int) -> list[int]:
    shape = list(shape)
    shape[axis] = size
    return shape


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

    amortised = False

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
            with _plates(batch, site):
                pyro.sample(site.name, dist.TransformedDistribution(base, [biject_to(site.support)]))


class _plates:
    """All plates of a site, entered together."""

    def __init__(self, batch: Batch, site: Site) -> None:
        self.plates = [batch.plate(name, dim=dim) for name, dim in site.plates]

    def __enter__(self) -> None:
        for plate in self.plates:
            plate.__enter__()

    def __exit__(self, *error: Any) -> None:
        for plate in reversed(self.plates):
            plate.__exit__(*error)


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
        with _plates(batch, slot):  # type: ignore[arg-type]
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
    sites: Mapping[str, tuple[tuple[int, ...], constraints.Constraint]],
    start: Mapping[str, Tensor],
    *,
    scale: float = 0.1,
    rank: int | None = None,
    nesting: int = 1,
) -> JointNormalGuide:
    """A joint normal for the global latents of an amortised template, to be kept in its ``nets``.

    Args:
        sites: by name, the event shape and the support.
        start: by name, the starting value, inside the support.
        scale: starting standard deviation on the unbounded scale.
        rank: None for a full covariance.
        nesting: dims taken by the template's plates.
    """
    slots, values = [], []
    for name, (_, support) in sites.items():
        value = biject_to(support).inv(torch.as_tensor(start[name]).float())
        slots.append(Slot(name, value.shape, value.dim(), support))
        values.append(value.reshape(-1))
    return JointNormalGuide(slots, torch.cat(values), scale, rank, nesting)


class IndependentNormals(nn.Module):
    """Independent normals on the unbounded scale, for global latents too many to correlate.

    It is kept in the ``nets`` of an amortised template, and called in its guide.

    Args:
        sites: by name, the event shape and the support.
        start: by name, the starting value, inside the support.
        scale: starting standard deviation.
        pace: by how much the means move where a network's weight moves by 1: a global that starts far from
            where it belongs would take thousands of steps of a size that suits networks.
    """

    def __init__(
        self,
        sites: Mapping[str, tuple[tuple[int, ...], constraints.Constraint]],
        start: Mapping[str, Tensor],
        *,
        scale: float = 0.1,
        pace: float = 1.0,
    ) -> None:
        super().__init__()
        self.supports, self.pace = {name: support for name, (_, support) in sites.items()}, pace
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

    def forward(self) -> dict[str, Tensor]:
        """Sample every site; the values by name."""
        return {name: pyro.sample(name, self.distribution(name)) for name in self.supports}


class SinhArcsinh(torch.distributions.Transform):
    """Skew and tail weight for each coordinate: y = (sinh((asinh(x) + skew) * tail) - m) / s.

    ``m`` and ``s`` keep the point x = 0 at 0 and the slope there at 1, so that skew and tail change the shape
    while place and width stay with the affine map that follows.

    Args:
        skew: real, 0 for none.
        tail: > 0; 1 for none, larger for heavier tails.

    References:
        Jones and Pewsey 2009, Biometrika 96(4), 761-780, doi:10.1093/biomet/asp053.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign: ClassVar[int] = 1

    def __init__(self, skew: Tensor, tail: Tensor, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.skew, self.tail = skew, tail

    def with_cache(self, cache_size: int = 1) -> SinhArcsinh:
        """The same transform with another cache size."""
        return self if cache_size == self._cache_size else SinhArcsinh(self.skew, self.tail, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        centre = self.skew * self.tail
        return (torch.sinh((torch.asinh(x) + self.skew) * self.tail) - torch.sinh(centre)) / self._slope(
            centre
        )

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh(torch.asinh(self._raw(y)) / self.tail - self.skew)

    def _slope(self, centre: Tensor) -> Tensor:
        return self.tail * torch.cosh(centre)

    def _raw(self, y: Tensor) -> Tensor:
        """The hyperbolic sine before place and slope were set."""
        centre = self.skew * self.tail
        return y * self._slope(centre) + torch.sinh(centre)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log |dy/dx|, each coordinate; cosh(a)**2 = 1 + sinh(a)**2 saves taking the angle again."""
        centre = torch.sinh(self.skew * self.tail)
        return 0.5 * (torch.log1p(self._raw(y).square()) - torch.log1p(x * x) - torch.log1p(centre.square()))


class TrilAffine(torch.distributions.Transform):
    """y = loc + tril x for batches of matrices (Pyro's ``LowerCholeskyAffine`` takes a single one).

    Args:
        loc: (*batch, d).
        tril: (*batch, d, d), lower, positive diagonal.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, tril: Tensor, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.loc, self.tril = loc, tril

    def with_cache(self, cache_size: int = 1) -> TrilAffine:
        """The same transform with another cache size."""
        return self if cache_size == self._cache_size else TrilAffine(self.loc, self.tril, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.tril @ x.unsqueeze(-1)).squeeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.tril, (y - self.loc).unsqueeze(-1), upper=False).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log det of tril, each batch."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


def skew_normal(loc: Tensor, scale_tril: Tensor, skew: Tensor, tail: Tensor) -> dist.TransformedDistribution:
    """A normal bent by sinh-arcsinh in each whitened coordinate, then carried to ``loc`` and ``scale_tril``.

    Args:
        loc: (*batch, d).
        scale_tril: (*batch, d, d), lower, positive diagonal.
        skew: (*batch, d), real.
        tail: (*batch, d), > 0.
    """
    noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
    bend = torch.distributions.transforms.IndependentTransform(SinhArcsinh(skew, tail), 1, cache_size=1)
    if loc.shape[-1] == 1:  # the same map without a matrix product
        affine = torch.distributions.transforms.AffineTransform(loc, scale_tril[..., 0], cache_size=1)
        carry = torch.distributions.transforms.IndependentTransform(affine, 1, cache_size=1)
    else:
        carry = TrilAffine(loc, scale_tril)
    return dist.TransformedDistribution(noise, [bend, carry])


def laplace(
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    steps: int = 6,
    max_step: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mode and Cholesky factor of the covariance at the mode, by Newton steps on each row at once.

    Args:
        derivatives: from points (*batch, d) to gradient (*batch, d) and negative Hessian (*batch, d, d),
            positive definite, of the log density.
        start: (*batch, d).
        steps: Newton steps.
        max_step: the most by which a coordinate moves in a step.

    Returns:
        Mode (*batch, d) and lower Cholesky factor of the inverse of the negative Hessian (*batch, d, d), both
        detached: a guide corrects them by a network, and learns through that.
    """
    with torch.no_grad():
        point = start
        for _ in range(steps):
            gradient, precision = derivatives(point)
            point = point + solve_spd(precision, gradient).clamp(-max_step, max_step)
        return point, inverse_tril(derivatives(point)[1])


def solve_spd(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solve matrix x = vector for symmetric positive definite (*batch, d, d); closed form for d <= 2."""
    if matrix.shape[-1] == 1:
        return vector / matrix[..., 0]
    if matrix.shape[-1] == 2:
        a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
        x, y = vector.unbind(-1)
        return torch.stack([c * x - b * y, a * y - b * x], -1) / (a * c - b * b).unsqueeze(-1)
    return torch.cholesky_solve(vector.unsqueeze(-1), _cholesky(matrix)).squeeze(-1)


def inverse_tril(precision: Tensor) -> Tensor:
    """Lower Cholesky factor of the inverse of a precision (*batch, d, d); closed form for d <= 2."""
    if precision.shape[-1] == 1:
        return precision.rsqrt()
    if precision.shape[-1] == 2:
        a, b, c = precision[..., 0, 0], precision[..., 0, 1], precision[..., 1, 1]
        first = (c / (a * c - b * b)).sqrt()
        lower = torch.stack([-b / c * first, c.rsqrt()], -1)
        return torch.stack([torch.stack([first, torch.zeros_like(first)], -1), lower], -2)
    flipped = _cholesky(precision.flip((-2, -1))).flip((-2, -1)).mT
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(flipped, eye.expand_as(precision), upper=False)


def _cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor; where rounding made a matrix indefinite its diagonal alone: a guide never fails."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    ridge = 10 * torch.finfo(matrix.dtype).eps
    tril, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge * diagonal))
    return torch.where((info == 0)[..., None, None], tril, torch.diag_embed(diagonal.sqrt()))


def noise_shape(fn: Any) -> tuple[int, ...] | None:
    """Event shape of the standard normal noise that one draw of ``fn`` is a smooth map of.

    None if it is no such map.
    """
    if isinstance(fn, torch.distributions.Normal | torch.distributions.MultivariateNormal):
        return tuple(fn.event_shape)
    if isinstance(fn, torch.distributions.Independent):
        inner = noise_shape(fn.base_dist)
        return None if inner is None else (*fn.event_shape[: fn.reinterpreted_batch_ndims], *inner)
    if isinstance(fn, torch.distributions.TransformedDistribution | dist.MaskedDistribution):
        return noise_shape(fn.base_dist)
    return None


def noise_size(fn: Any) -> int | None:
    """Numbers of noise in ``noise_shape``."""
    shape = noise_shape(fn)
    return None if shape is None else torch.Size(shape).numel()


def put(fn: Any, noise: Tensor) -> Tensor:
    """Value of ``fn`` at given standard normal noise, as ``rsample`` would compute it.

    Arguments as ``push`` has them.
    """
    if isinstance(fn, torch.distributions.Independent | dist.MaskedDistribution):
        return put(fn.base_dist, noise)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value = put(fn.base_dist, noise)
        for transform in fn.transforms:
            value = transform(value)
        return cast(Tensor, value)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    return fn.loc + fn.scale * noise


def push(fn: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Value of ``fn`` at given standard normal noise, and its log density there.

    The value is as ``rsample`` would compute it. No transform is inverted: the density comes from the noise
    and the slopes on the way.

    Args:
        fn: a normal, possibly multivariate, possibly transformed (``noise_shape`` is not None).
        noise: (*lead, *fn.batch_shape, *noise_shape), or broadcastable to it.
    """
    if isinstance(fn, dist.MaskedDistribution):
        return push(fn.base_dist, noise)
    if isinstance(fn, torch.distributions.Independent):
        value, density = push(fn.base_dist, noise)
        return value, _sum_right(density, fn.reinterpreted_batch_ndims)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        value, density = push(fn.base_dist, noise)
        path: list[Any] = [value]
        for transform in fn.transforms:
            path.append(transform(path[-1]))
        event_dim, slopes = len(fn.event_shape), 0.0
        for transform, x, y in zip(reversed(fn.transforms), path[-2::-1], path[::-1], strict=False):
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
            slopes = slopes + _sum_right(
                transform.log_abs_det_jacobian(x, y), event_dim - transform.domain.event_dim
            )
        return path[-1], _sum_right(density, event_dim - len(fn.base_dist.event_shape)) - slopes
    squares = -0.5 * noise * noise - _HALF_LOG_2PI
    if isinstance(fn, torch.distributions.MultivariateNormal):
        value = fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        return value, squares.sum(-1) - fn.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return fn.loc + fn.scale * noise, squares - fn.scale.log()


def _sum_right(value: Tensor, dims: int) -> Tensor:
    return value.flatten(-dims).sum(-1) if dims > 0 else value
