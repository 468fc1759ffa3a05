"""The log density of a bound model over its latents on the unbounded scale, as a function of one flat vector.

    log p(x) = log p(data, T(x)) + log |det dT/dx|,    T the transforms to the latents' supports

Discrete latents are summed. Float64 on the CPU, whatever the fit was made in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from scivi.errors import FitError, Unsupported
from scivi.inference.capture import Function, captured, compiled, first_of, largest_of, stacked
from scivi.inference.scores import by_particle, log_prob, particle_plate, placed
from scivi.inputs.batches import Batch, chunks
from scivi.models.binding import Bound, bind
from scivi.models.sites import sample_sites, value_of
from scivi.models.template import Template

# One operation of a captured graph, measured on one core with tensors of 10 to 1000 entries.
OPERATION_S = 3e-6
NUMBERS_AT_ONCE = 2**22  # in the largest tensor of a call (our choice: 32 MB)
TRIES = 100  # random starting points (as in Pyro)
COMPILING_S = 10.0  # seconds of such operations from which compiling pays (our choice: it takes 5 to 20)


@dataclass(frozen=True)
class Potential:
    """Density and gradient of the latents that are not discrete.

    Args:
        shapes: of the latents on the unbounded scale, by name, in the order of the flat vector.
        transforms: to the unbounded scale.
        energy: minus the log density of latents by name.
        first: a point at which it is finite, (n,).
    """

    shapes: Mapping[str, torch.Size]
    transforms: Mapping[str, Any]
    energy: Callable[[dict[str, Tensor]], Tensor]
    first: Tensor

    @property
    def size(self) -> int:
        """Entries of the flat vector."""
        return len(self.first)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Latents by name on the unbounded scale, from (..., n)."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()], -1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape((*flat.shape[:-1], *shape)) for (name, shape), part in named}

    def values(self, flat: Tensor) -> dict[str, Tensor]:
        """Latents by name on their supports, from (draw, n)."""
        return {name: self.transforms[name].inv(z) for name, z in self.split(flat).items()}

    def values_and_jacobian(self, flat: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``values`` of (draw, n), and log |det dT/dx|, (draw,)."""
        values, total = {}, flat.new_zeros(len(flat))
        for name, z in self.split(flat).items():
            back = self.transforms[name].inv
            values[name] = back(z)
            total = total + back.log_abs_det_jacobian(z, values[name]).reshape(len(flat), -1).sum(1)
        return values, total

    def joined(self, named: Mapping[str, Tensor]) -> Tensor:
        """One flat vector (n,) from latents by name on the unbounded scale."""
        return torch.cat([named[name].detach().reshape(-1).double() for name in self.shapes])

    def start(self, values: Mapping[str, Tensor] | None) -> Tensor:
        """A point (n,) of finite density: the latents as given, others uniform in (-2, 2)."""
        for _ in range(TRIES):
            named = self.split(torch.empty_like(self.first).uniform_(-2, 2))
            for name in named.keys() & (values or {}).keys():
                named[name] = self.transforms[name]((values or {})[name])
            point = self.joined(named)
            value, gradient = self.density(point)
            if bool(value.isfinite() & gradient.isfinite().all() & (gradient != 0).all()):
                return point  # nutpie takes its first scales from the gradient
            values = None
        return self.first

    def density(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (), and its gradient (n,)."""
        leaf = flat.detach().requires_grad_(True)
        value = -self.energy(self.split(leaf))
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient


@dataclass(frozen=True)
class Whitened:
    """Coordinates z in which some draws have mean 0 and unit covariance, of x = loc + tril z.

    A sampler whose steps have no direction of their own goes along correlated latents as fast as along any.

    Args:
        loc: (n,).
        tril: (n, n), lower.
    """

    loc: Tensor
    tril: Tensor

    @classmethod
    def of(cls, draws: Tensor) -> Whitened:
        """Those of draws (draw, n), more than there are coordinates."""
        covariance = torch.cov(draws.T).reshape(draws.shape[1], -1)
        ridge = 1e-6 * covariance.diagonal()
        return cls(draws.mean(0), torch.linalg.cholesky(covariance + torch.diag_embed(ridge)))

    def point(self, z: Tensor) -> Tensor:
        """From z (..., n) to x."""
        return self.loc + z @ self.tril.T

    def z(self, point: Tensor) -> Tensor:
        """From x (n,) to z."""
        return torch.linalg.solve_triangular(self.tril, (point - self.loc).unsqueeze(-1), upper=False)[:, 0]

    def density(self, function: Function) -> Function:
        """A density of x and its gradient, as a function of z; the density itself stays that of x."""

        def of_z(z: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = function(self.point(z))
            return value, gradient @ self.tril

        return of_z


def potential(bound: Bound, batch: Batch) -> Potential:
    """The density of a bound model given all rows of a batch.

    Raises:
        FitError: no starting point in (-2, 2) has a finite density.
        Unsupported: a discrete latent cannot be summed.
    """
    name = bound.template.name
    try:
        first, energy, transforms, _ = initialize_model(
            bound.model, (batch,), max_plate_nesting=bound.nesting
        )
    except ValueError as error:
        if "initial params" in str(error):
            raise FitError(f'NUTS found no point at which the density of "{name}" is finite.') from None
        if "discrete" in str(error):
            left = [s.name for s in bound.sites if s.discrete]
            raise Unsupported(
                f'NUTS cannot sample "{name}": of the discrete latents {left} one has no finite support.'
            ) from None
        raise
    shapes = {name: z.shape for name, z in first.items()}
    flat = torch.cat([z.detach().reshape(-1).double() for z in first.values()])
    return Potential(shapes, transforms, energy, flat)


def fast(density: Potential, calls: int) -> tuple[Function, dict[str, Any]]:
    """The density as a function of one flat vector, captured, and compiled where so many calls repay it.

    Returns:
        The function, to log density and gradient; and how it runs, for the provenance.
    """
    try:
        graph = captured(lambda x: density.density(x), [density.first])  # methods are miscounted
        seconds = calls * OPERATION_S * len(graph.graph.nodes)
        if seconds < COMPILING_S:
            return _same(graph, density), {"density": "captured"}
        function, how = compiled(graph, [density.first])
        return _same(function, density), {"density": how}
    except Unsupported as refusal:
        return density.density, {"density": "eager", "why": str(refusal)}


def _same(function: Function, density: Potential) -> Function:
    """The function, if it has the density's value and gradient at another point than it was captured at.

    Raises:
        Unsupported: it has not.
    """
    point = density.first * 0.9 + 0.01
    for ours, theirs in zip(function(point), density.density(point), strict=True):
        # float64, thousands of terms
        if not torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8, equal_nan=True):
            raise Unsupported("the captured density differs from the model's")
    return function


def together(bound: Bound, batch: Batch, density: Potential) -> Callable[..., Any]:
    """The density and its gradient at several points at once: (point, n) to (point,) and (point, n)."""

    def many(points: Tensor) -> tuple[Tensor, Tensor]:
        leaf, n = points.detach().requires_grad_(True), len(points)
        values, total = density.values_and_jacobian(leaf)
        model = model_at(bound, batch, values, n)
        for _, site in sample_sites(model):
            total = total + by_particle(log_prob(site), bound.nesting).expand(n)
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
        return total.detach(), gradient

    return many


def model_at(bound: Bound, batch: Batch, values: Mapping[str, Tensor], n: int) -> poutine.Trace:
    """The model with each latent's draws left of all plates; discrete ones that were summed are drawn."""
    own = left_of_plates(bound, values) if n > 1 else {name: value[0] for name, value in values.items()}

    def model(batch: Batch) -> None:
        with particle_plate(n, bound.nesting), placed(own):
            bound.model(batch)

    run: Callable[..., Any] = model
    if any(s.discrete for s in bound.sites):
        # a plate of draws outside of this handler would be hidden from it
        run = infer_discrete(config_enumerate(model, "parallel"), first_available_dim=-2 - bound.nesting)
    return poutine.trace(run).get_trace(batch)


def left_of_plates(bound: Bound, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents by name, (draw, ...), with the draws left of all plates."""
    event_dims = {s.name: s.event_dim for s in bound.sites}
    found = {}
    for name, value in values.items():
        pad = (1,) * (bound.nesting - (value.dim() - 1 - event_dims[name]))
        found[name] = value.reshape(len(value), *pad, *value.shape[1:])
    return found


def refuse_unless_singular(error: RuntimeError) -> None:
    """Raise an error again unless a matrix could not be factored; compiled code has plain words for it."""
    if not isinstance(error, torch.linalg.LinAlgError) and not str(error).startswith("linalg."):
        raise error


@dataclass(frozen=True)
class Whole:
    """The density of a model given all rows of its data, in float64.

    Args:
        pair: the model.
        batch: the data.
        density: of one point.
        at: density and gradient of many points (point, n).
        value: density of many points.
    """

    pair: Bound
    batch: Batch
    density: Potential
    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    value: Callable[[Tensor], Tensor]

    def starts(self, near: int, wide: int) -> list[Tensor]:
        """Points (n,) at which it is finite: some in (-2, 2), and some drawn from the prior."""
        found = [self.density.first, *(self.density.start(None) for _ in range(near - 1))]
        for _ in range(wide):
            with torch.no_grad():
                prior = poutine.trace(self.pair.model).get_trace(self.batch)
            found.append(self.density.start({name: value_of(prior, name) for name in self.density.shapes}))
        return found


def whole(template: Template, source: Any, seed: int, *, eager: bool = True) -> Whole:
    """The density given all rows of the data.

    Args:
        template: of the model.
        source: data.
        seed: of initial values.
        eager: also where it cannot be captured.

    Raises:
        FitError: no starting point has a finite density.
        Unsupported: it cannot be captured, and ``eager`` is false.
    """
    n = max(source.sizes[row] for row in template.row_dims)
    cpu = torch.device("cpu")
    batch = next(chunks(source, template.fields, template.row_dims, n, cpu, torch.float64))
    pair = bind(template, batch, seed)
    density = potential(pair, batch)
    return Whole(pair, batch, density, *many(pair, batch, density, eager))


def many(
    bound: Bound, batch: Batch, density: Potential, eager: bool
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor]]:
    """Density and gradient of many points at once, (point, n) to (point,) and (point, n); and density alone.

    Captured and stacked where that can be had; else refused unless ``eager``. Minus infinity and no gradient
    where a matrix cannot be factored.
    """
    try:
        graph = captured(lambda x: density.density(x), [density.first])
    except Unsupported:
        if not eager:
            raise
        entries = sum(value.numel() for value in batch.values.values())
        both = _safe(density.density, together(bound, batch, density), entries)
        return both, lambda points: both(points)[0]
    alone = first_of(graph)
    both, value = (_safe(g, stacked(g, [False]), largest_of(g)) for g in (graph, alone))
    return both, lambda points: value(points)[0]


def _safe(each: Function, function: Function, largest: int) -> Callable[[Tensor], Any]:
    """A function of many points, some at a time; one by one where a matrix of one cannot be factored."""
    at_once = max(1, NUMBERS_AT_ONCE // max(1, largest))

    def one(point: Tensor) -> Sequence[Tensor]:
        try:
            return each(point)
        except RuntimeError as error:
            refuse_unless_singular(error)
            return point.new_tensor(-math.inf), torch.zeros_like(point)

    def some(points: Tensor) -> Sequence[Tensor]:
        try:
            return function(points)
        except RuntimeError as error:
            refuse_unless_singular(error)
            return [torch.stack(of) for of in zip(*map(one, points), strict=False)]

    def at(points: Tensor) -> tuple[Tensor, ...]:
        value, *rest = (torch.cat(of) for of in zip(*map(some, points.split(at_once)), strict=True))
        slopes = (torch.nan_to_num(slope, posinf=0.0, neginf=0.0) for slope in rest)
        return torch.nan_to_num(value, nan=-math.inf, posinf=-math.inf), *slopes

    return at
