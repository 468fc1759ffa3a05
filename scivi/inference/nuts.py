"""``nuts``: the same model under the no-U-turn sampler, as a tree with the groups and dims of ``draw``.

Longer than 400 lines because subsets of rows, starts from a fit and the sampler's statistics stand here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import NUTS, config_enumerate, infer_discrete
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from tqdm.auto import tqdm

from scivi.errors import FitError, PlanError, TemplateError, Unsupported, listed
from scivi.inference.draws import AT_ONCE, Collected, _check_rows, _gather_sites, _prior
from scivi.inference.loop import EXAMPLE_ROWS, open_data
from scivi.inference.plan import Plan
from scivi.inference.scores import Placed, by_particle, log_prob, particle_plate, quiet
from scivi.inference.state import Fit, freeze, versions
from scivi.inference.trees import dataset, save_tree, tree, units_of
from scivi.inputs.batches import Batch, chunks
from scivi.models.binding import Bound, bind, seeded, stream_seed
from scivi.models.sites import sample_sites
from scivi.models.template import Template

CPU = torch.device("cpu")
Start = Callable[[], dict[str, Tensor]]  # a starting value for each latent, anew at each call


@dataclass
class Subset:
    """Some rows of a source, as a source; ``fingerprint`` is that of the whole."""

    source: Any
    row: str
    places: np.ndarray
    sizes: Mapping[str, int]
    coords: Mapping[str, np.ndarray]
    nbytes: int
    fingerprint: str

    def read(self, index: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Fields by name; ``index`` counts the rows that were taken."""
        places = self.places[np.asarray(index[self.row])] if self.row in index else self.places
        return self.source.read({**index, self.row: places})


def evenly(source: Any, row: str, rows: int) -> Subset:
    """So many rows of a source, evenly spread from the first to the last."""
    places = np.linspace(0, source.sizes[row] - 1, rows).round().astype(int)
    coords = {d: np.asarray(source.coords[d]) for d in source.sizes}
    coords[row] = coords[row][places]
    return Subset(source, row, places, {**source.sizes, row: rows}, coords, source.nbytes, source.fingerprint)


def nuts(
    template: Template,
    data: Any,
    *,
    given: Fit | None = None,
    draws: int = 1000,
    warmup: int = 500,
    chains: int = 4,
    seed: int = 0,
    rows: int | None = None,
    backend: str = "pyro",
    progress: bool = True,
    to: str | Path | None = None,
) -> xr.DataTree:
    """Sample the posterior of a template's model by the no-U-turn sampler, as a reference for a fit.

    Args:
        template: its model and prior are used, its guide is not.
        data: anything ``scivi.fit`` takes.
        given: a fit of the template. Networks that the model contains are held fixed at those of the fit, and
            it is then required; chains start at draws of its guide. Without it they start uniformly in
            (-2, 2) on the unbounded scale.
        draws: kept from each chain.
        warmup: draws before them, in which step size and (diagonal) mass matrix adapt.
        chains: run one after the other.
        seed: of everything.
        rows: take so many rows, evenly spread over the first row dim; None for all. The posterior is then
            that of these rows alone. Their labels are kept, to be matched with those of another posterior.
        backend: "pyro".
        progress: show a progress bar.
        to: also write the tree there, .nc or .zarr.

    Returns:
        Groups posterior, prior, log_likelihood, observed_data, constant_data, sample_stats. In sample_stats:
        ``lp``, log joint density as in ``draw``; ``diverging``; ``acceptance_rate``; ``step_size``;
        ``n_steps`` (leapfrog steps); ``tree_depth``; ``energy``.

    Raises:
        DataError: the data do not fit the template.
        TemplateError: the model contains networks and ``given`` is missing, or is a fit of another template.
        PlanError: a number is out of range.
        Unsupported: another backend; a discrete latent that cannot be summed.
        FitError: no starting point has a finite density.

    Notes:
        Float64 on the CPU. Each leapfrog step costs a pass over all rows, 2 to 3 ms up to a thousand rows:
        four chains of 1500 draws take minutes, and a hundred thousand rows are out of reach. Discrete latents
        are summed exactly while sampling, and drawn given the rest afterwards.

    References:
        Hoffman and Gelman 2014, JMLR 15, 1593-1623 (the sampler); Betancourt 2017, arXiv:1701.02434 (energy).
    """
    _check_request(backend, {"draws": draws, "warmup": warmup, "chains": chains, "rows": rows})
    whole = source = open_data(template, data)
    row = template.row_dims[0]
    if rows is not None and rows < source.sizes[row]:
        source = evenly(source, row, rows)
    batch = next(chunks(source, template.fields, template.row_dims, source.sizes[row], CPU, torch.float64))
    bound, learnt = _pair(template, source, given, seed)
    start = None if given is None else _guide_start(given, whole, source, batch)
    values, stats = _sample(bound, batch, start, draws, warmup, chains, seed, progress)
    with seeded(stream_seed(seed, "draws")), torch.no_grad(), quiet():
        collected = _rerun(bound, batch, values, chains * draws)
    groups = _groups(bound, source, collected, stats, (chains, draws), seed)
    found = tree(groups, _provenance(template, whole, source, given, learnt, groups, seed, warmup))
    if to is not None:
        save_tree(found, to)
    return found


def _check_request(backend: str, numbers: Mapping[str, int | None]) -> None:
    if backend != "pyro":
        raise Unsupported(f'backend = "{backend}" is not offered; "pyro" is. "nutpie" comes later.')
    faults = [
        f"{name} = {n!r}; it must be a whole number of at least 1"
        for name, n in numbers.items()
        if not (name == "rows" and n is None) and (not isinstance(n, int) or n < 1)
    ]
    if faults:
        raise PlanError(listed("nuts cannot be run so:", faults))


def _pair(template: Template, source: Any, given: Fit | None, seed: int) -> tuple[Bound, list[str]]:
    """The model with its nets held fixed, and the parameters on which it depends."""
    if given is not None and given.template.name != template.name:
        raise TemplateError(f'given is a fit of "{given.template.name}"; this is "{template.name}".')
    example = next(chunks(source, template.fields, template.row_dims, EXAMPLE_ROWS, CPU, torch.float64))
    bound = replace(bind(replace(template, guide=_no_guide), example, seed), template=template)
    with seeded(stream_seed(seed, "init")), quiet():
        learnt = _learnt(bound, example)
    if learnt and given is None:
        raise TemplateError(
            f'the model of "{template.name}" contains learnt networks ({_few(learnt)}), which NUTS '
            f"does not sample. Fit the template first and pass given=fit: they are then held fixed at those "
            f"of the fit."
        )
    if given is not None:
        bound = replace(bound, nets=_doubled(given).nets)
    return freeze(bound), learnt


def _no_guide(batch: Batch, prior: Any, nets: Any) -> None:
    """NUTS needs none."""


def _few(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f'"{n}"' for n in names[:most]) + more


def _learnt(bound: Bound, batch: Batch) -> list[str]:
    """Parameters of the nets on which the log joint density depends."""
    parameters = dict(bound.nets.named_parameters())
    if not parameters:
        return []
    with torch.no_grad():
        prior = poutine.trace(bound.model).get_trace(batch)
    model = poutine.trace(poutine.replay(bound.model, trace=prior)).get_trace(batch)
    total = torch.stack([log_prob(site).sum().double() for _, site in sample_sites(model)]).sum()
    if not total.requires_grad:
        return []
    slopes = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return [name for name, slope in zip(parameters, slopes, strict=True) if slope is not None]


def _doubled(fit: Fit) -> Bound:
    """The fit's pair in float64 on the CPU; the fit's own is left as it is."""
    like = fit.bound.example
    example = replace(
        like,
        values={k: v.to(CPU, torch.float64) for k, v in like.values.items()},
        observed_mask={k: v.to(CPU) for k, v in like.observed_mask.items()},
        index={k: v.to(CPU) for k, v in like.index.items()},
    )
    pair = bind(fit.template, example, 0)
    pair.nets.load_state_dict(fit.nets.state_dict())
    return freeze(pair)


def _guide_start(given: Fit, whole: Any, source: Any, batch: Batch) -> Start:
    """Draws of the fit's guide for the rows in ``batch``."""
    pair, template = _doubled(given), given.template
    row = template.row_dims[0]
    _check_rows(given, whole)
    places = None
    if not pair.amortised:  # one factor for each row: run it on all of them, then take those that are wanted
        batch = next(chunks(whole, template.fields, template.row_dims, whole.sizes[row], CPU, torch.float64))
        places = torch.as_tensor(source.places) if isinstance(source, Subset) else None
    axes = {s.name: s.row_axis for s in pair.sites if s.row_dim == row}

    def start() -> dict[str, Tensor]:
        with torch.no_grad(), quiet():
            trace = poutine.trace(pair.guide).get_trace(batch)
        values = {name: site["value"] for name, site in sample_sites(trace)}
        if places is None:
            return values
        return {n: v.index_select(v.dim() + axes[n], places) if n in axes else v for n, v in values.items()}

    return start


class _Kernel(NUTS):
    """Pyro's sampler, which also tells the kinetic energy of a transition's momentum (Pyro 1.9 does not)."""

    kinetic = 0.0

    def _sample_r(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        momentum, unscaled = super()._sample_r(name)
        self.kinetic = float(self._kinetic_energy(unscaled))
        return momentum, unscaled


class _Potential:
    """Minus the log density on the unbounded scale, counting how often it is asked."""

    def __init__(self, function: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, z: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        return self.function(z)


def _sample(
    bound: Bound,
    batch: Batch,
    start: Start | None,
    draws: int,
    warmup: int,
    chains: int,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Latents (chain x draw, ...) on their supports, and the sampler's statistics (chain, draw)."""
    bar = tqdm(total=chains * (draws + warmup), disable=not progress, desc=bound.template.name, unit="draw")
    values: dict[str, list[Tensor]] = {}
    stats: list[dict[str, list[float]]] = []
    try:
        for chain in range(chains):
            with (
                seeded(stream_seed(stream_seed(seed, "sampling") + chain, "sampling")),
                quiet(),
                poutine.block(),
            ):
                first, potential, transforms = _density(bound, batch, start)
                bar.set_postfix_str(f"chain {chain + 1} of {chains}")
                path, numbers = _chain(first, potential, draws, warmup, bar)
            stats.append(numbers)
            for name in first:
                z = torch.stack([point[name] for point in path])
                values.setdefault(name, []).append(transforms[name].inv(z))
    finally:
        bar.close()
    table = {name: np.array([numbers[name] for numbers in stats]) for name in stats[0]}
    return {name: torch.cat(parts) for name, parts in values.items()}, table


def _density(
    bound: Bound, batch: Batch, start: Start | None
) -> tuple[dict[str, Tensor], _Potential, dict[str, Any]]:
    """Starting point and potential on the unbounded scale, and the transforms to it."""
    name = bound.template.name
    try:
        first, function, transforms, _ = initialize_model(
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
    # A model that has plain numbers in its distributions starts in float32.
    first = {n: z.double() for n, z in first.items()}
    if start is not None:
        drawn = start()
        moved = {n: transforms[n](drawn[n]).to(z).reshape(z.shape) for n, z in first.items() if n in drawn}
        if bool(torch.isfinite(function({**first, **moved}))):
            first = {**first, **moved}
    return first, _Potential(function), transforms


def _chain(
    first: dict[str, Tensor], potential: _Potential, draws: int, warmup: int, bar: tqdm
) -> tuple[list[dict[str, Tensor]], dict[str, list[float]]]:
    """One chain: its draws, and what the sampler did at each."""
    kernel = _Kernel(potential_fn=potential)
    kernel.initial_params = first
    kernel.setup(warmup)
    path, point = [], first
    names = ("diverging", "acceptance_rate", "step_size", "n_steps", "tree_depth", "energy")
    stats: dict[str, list[float]] = {name: [] for name in names}
    for k in range(warmup + draws):
        before, calls, accepted = (
            float(cast(Tensor, kernel._fetch_from_cache()[1])),
            potential.calls,
            kernel._mean_accept_prob,
        )
        point = kernel.sample(point)
        bar.update()
        if k < warmup:
            continue
        n, n_steps = k - warmup + 1, potential.calls - calls
        rate = kernel._mean_accept_prob if n == 1 else accepted + n * (kernel._mean_accept_prob - accepted)
        rate = min(1.0, max(0.0, rate))  # it comes out of a running mean, with its rounding
        diverged = (n - 1) in kernel.diagnostics()["divergences"][-1:]
        numbers = (
            diverged,
            rate,
            kernel.step_size,
            n_steps,
            np.ceil(np.log2(n_steps + 1)),
            before + kernel.kinetic,
        )
        for name, number in zip(names, numbers, strict=True):
            stats[name].append(number)
        path.append({name: z.detach() for name, z in point.items()})
    return path, stats


def _rerun(bound: Bound, batch: Batch, values: Mapping[str, Tensor], total: int) -> Collected:
    """The model on the draws, some at a time: reported sites, log likelihood, log joint, each (draw, ...)."""
    template, out = bound.template, Collected()
    size = max(1, AT_ONCE // max(batch.n_rows(r) for r in template.row_dims))
    joint = []
    for begin in range(0, total, size):
        n = min(size, total - begin)
        part = {name: v[begin : begin + n] for name, v in values.items()}
        model = _model_at(bound, batch, part, n)
        _gather_sites(out, template, model, batch, n, first=True)
        density = [by_particle(log_prob(s), bound.nesting).expand(n) for _, s in sample_sites(model)]
        joint.append(torch.stack([d.double() for d in density]).sum(0))
    out.log_joint = torch.cat(joint)
    return out


def _model_at(bound: Bound, batch: Batch, values: Mapping[str, Tensor], n: int) -> poutine.Trace:
    """The model with each latent's draws left of all plates; discrete ones that were summed are drawn."""
    event_dims = {s.name: s.event_dim for s in bound.sites}
    placed = {}
    for name, value in values.items():
        pad = (1,) * (bound.nesting - (value.dim() - 1 - event_dims[name]))
        placed[name] = value.reshape(n, *pad, *value.shape[1:]) if n > 1 else value[0]

    def model(batch: Batch) -> None:
        with particle_plate(n, bound.nesting), Placed(placed, lambda name, _: placed[name]):
            bound.model(batch)

    run: Callable[..., Any] = model
    if any(s.discrete for s in bound.sites):
        # a plate of draws outside of this handler would be hidden from it
        run = infer_discrete(config_enumerate(model, "parallel"), first_available_dim=-2 - bound.nesting)
    return poutine.trace(run).get_trace(batch)


def _groups(
    bound: Bound,
    source: Any,
    found: Collected,
    stats: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    seed: int,
) -> dict[str, xr.Dataset]:
    template = bound.template
    sizes, units = template.all_sizes(source.sizes), units_of(template)
    coords: dict[str, Any] = {d: template.coords.get(d, np.arange(n)) for d, n in sizes.items()}
    coords |= {d: np.asarray(source.coords[d]) for d in source.sizes if d not in template.coords}

    def sampled(parts: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(parts)
        return joined.reshape(*shape, *joined.shape[1:])

    posterior = {n: (found.dims[n], sampled(parts)) for n, parts in found.posterior.items()}
    groups = {"posterior": dataset(posterior, coords, units, sampled=True)}
    groups["prior"] = _prior(Fit(bound, {}, Plan(), xr.Dataset(), {}, {}), shape[1], seed, coords, units)
    likelihood = {
        n: (found.dims[f"log_likelihood {n}"], sampled(parts)) for n, parts in found.likelihood.items()
    }
    groups["log_likelihood"] = dataset(likelihood, coords, dict.fromkeys(likelihood, "nat"), sampled=True)
    table = source.read({})
    for group, role in (("observed_data", "observed"), ("constant_data", "given")):
        named = {n: (f.dims, table[n]) for n, f in template.fields.items() if f.role == role}
        groups[group] = dataset(named, coords, units, sampled=False)
    named = {"lp": ((), sampled([torch.as_tensor(found.log_joint).numpy()]))}
    whole = {"diverging": bool, "n_steps": int, "tree_depth": int}
    named |= {n: ((), values.astype(whole.get(n, float))) for n, values in stats.items()}
    groups["sample_stats"] = dataset(named, coords, {"lp": "nat", "energy": "nat"}, sampled=True)
    return groups


def _provenance(
    template: Template,
    whole: Any,
    source: Any,
    given: Fit | None,
    learnt: list[str],
    groups: Mapping[str, xr.Dataset],
    seed: int,
    warmup: int,
) -> dict[str, Any]:
    row = template.row_dims[0]
    chains, draws = (groups["posterior"].sizes[d] for d in ("chain", "draw"))
    return {
        "template": template.name,
        "prior": template.prior_numbers(),
        "data": {
            "fingerprint": whole.fingerprint,
            "sizes": dict(source.sizes),
            "rows": list(template.row_dims),
        },
        "subset": {"dim": row, "taken": source.sizes[row], "of": whole.sizes[row]}
        if source is not whole
        else None,
        "method": "nuts",
        "backend": "pyro",
        "plan": {"draws": draws, "warmup": warmup, "chains": chains},
        "held_fixed": learnt,
        "given": None if given is None else {"data": given.provenance["data"], "seed": given.plan.seed},
        "seed": seed,
        "device": "cpu",
        "versions": versions(),
    }
