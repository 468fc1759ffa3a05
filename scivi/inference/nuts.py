"""``nuts``: the same model under the no-U-turn sampler, as a tree with the groups and dims of ``draw``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from scivi.errors import PlanError, TemplateError, few, listed
from scivi.inference.capture import Function
from scivi.inference.chains import STATS, Chain, Length, chosen, nutpie_chain, nutpie_chains, pyro_chain
from scivi.inference.draws import check_rows
from scivi.inference.gather import AT_ONCE, Sampled, log_likelihood, prior_draws, reported
from scivi.inference.opening import EXAMPLE_ROWS, open_data
from scivi.inference.potential import Potential, Whitened, fast, model_at, potential, together
from scivi.inference.scores import by_particle, log_prob, quiet
from scivi.inference.state import Fit, freeze, versions
from scivi.inference.trees import data_groups, dataset, judged, labels_of, save_tree, tree, units_of
from scivi.inputs.batches import Batch, chunks
from scivi.inputs.subset import Subset, evenly
from scivi.models.binding import Bound, bind, seeded, stream_seed
from scivi.models.sites import sample_sites
from scivi.models.template import Template

CPU = torch.device("cpu")
Start = Callable[[], dict[str, Tensor]]  # a starting value for each latent, anew at each call
WARMUP, WARMUP_GIVEN = 500, 200  # draws in which a chain adapts (our choice; the second: benchmarks/nuts.py)
# Latents up to which coordinates are chosen that whiten draws of the guide, so many for each (our choice).
MOST_WHITENED, WHITENED_BY = 64, 30
STEPS = 10  # leapfrog steps of a draw, to foresee how long a run is (ours: 7 to 31 in benchmarks/nuts.py)


def nuts(
    template: Template,
    data: Any,
    *,
    given: Fit | None = None,
    draws: int = 1000,
    warmup: int | None = None,
    chains: int = 4,
    seed: int = 0,
    rows: int | None = None,
    backend: str | None = None,
    progress: bool = True,
    to: str | Path | None = None,
) -> xr.DataTree:
    """Sample the posterior of a template's model by the no-U-turn sampler, as a reference for a fit.

    Args:
        template: its model and prior are used, its guide is not.
        data: anything ``scivi.fit`` takes.
        given: a fit of the template. Networks that the model contains are held fixed at those of the fit, and
            it is then required; chains start at draws of its guide. Without it they start uniformly in
            (-2, 2) on the unbounded scale. Where the density cannot be captured, chains of few latents move
            in coordinates that whiten such draws.
        draws: kept from each chain.
        warmup: draws before them, in which step size and (diagonal) mass matrix adapt; None for 500, or
            200 where a fit is given.
        chains: run one after the other, or side by side where the density cannot be captured.
        seed: of everything.
        rows: take so many rows, evenly spread over the first row dim; None for all. The posterior is then
            that of these rows alone. Their labels are kept, to be matched with those of another posterior.
        backend: "nutpie" (the extra ``nuts``) or "pyro"; None or "auto" for nutpie where it is installed.
        progress: show a progress bar.
        to: also write the tree there, .nc or .zarr.

    Returns:
        Groups posterior, prior, log_likelihood, observed_data, constant_data, sample_stats. In sample_stats:
        ``lp``, log joint density as in ``draw``; ``diverging``; ``acceptance_rate``; ``step_size``;
        ``n_steps`` (leapfrog steps); ``tree_depth``; ``energy``. Attributes verdict, why and advice, as
        ``analysis.report`` gives them.

    Raises:
        DataError: the data do not fit the template.
        TemplateError: the model contains networks and ``given`` is missing, or is a fit of another template.
        PlanError: a number is out of range.
        Unsupported: another backend, or one that is not installed; a discrete latent that cannot be summed.
        FitError: no starting point has a finite density.

    Notes:
        Float64 on the CPU, chains in turn. Each leapfrog step costs a pass over all rows: with nutpie a tenth
        of a millisecond up to a thousand rows, and with Pyro's own sampler 2 to 5, so that its four chains
        take minutes. A long run is compiled first (up to half a minute; later runs find the code on disk).
        What cannot be captured runs slowly, and the provenance says why. Discrete latents are summed exactly
        while sampling, and drawn given the rest afterwards.

    References:
        Hoffman and Gelman 2014, JMLR 15, 1593-1623 (the sampler); Betancourt 2017, arXiv:1701.02434 (energy).
    """
    backend = chosen(backend)
    warmup = warmup if warmup is not None else WARMUP if given is None else WARMUP_GIVEN
    _check_numbers({"draws": draws, "warmup": warmup, "chains": chains, "rows": rows})
    whole = source = open_data(template, data)
    row = template.row_dims[0]
    if rows is not None and rows < source.sizes[row]:
        source = evenly(source, row, rows)
    batch = next(chunks(source, template.fields, template.row_dims, source.sizes[row], CPU, torch.float64))
    bound, learnt = _pair(template, source, given, seed)
    start = None if given is None else _guide_start(given, whole, source, batch)
    length = Length(draws, warmup)
    values, stats, told = _sample(bound, batch, start, length, chains, seed, backend, progress)
    with seeded(stream_seed(seed, "draws")), torch.no_grad(), quiet():
        collected = _rerun(bound, batch, values, chains * draws)
    groups = _groups(bound, source, collected, stats, (chains, draws), seed)
    made = _provenance(bound, whole, source, given, learnt, told, groups, seed, warmup)
    found = judged(tree(groups, made))
    if to is not None:
        save_tree(found, to)
    return found


def _check_numbers(numbers: Mapping[str, int | None]) -> None:
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
        names = few([f'"{name}"' for name in learnt], 3)
        raise TemplateError(
            f'the model of "{template.name}" contains learnt networks ({names}), which NUTS '
            f"does not sample. Fit the template first and pass given=fit: they are then held fixed at those "
            f"of the fit."
        )
    if given is not None:
        bound = replace(bound, nets=_doubled(given).nets)
    return freeze(bound), learnt


def _no_guide(batch: Batch, prior: Any, nets: Any) -> None:
    """NUTS needs none."""


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
    check_rows(given, whole)
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


def _sample(
    bound: Bound,
    batch: Batch,
    start: Start | None,
    length: Length,
    chains: int,
    seed: int,
    backend: str,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, np.ndarray], dict[str, Any]]:
    """Latents (chain x draw, ...) on their supports, the sampler's statistics (chain, draw), how it ran."""
    total = chains * (length.draws + length.warmup)
    told: dict[str, Any] = {"name": backend}
    with (
        tqdm(total=total, disable=not progress, desc=bound.template.name, unit="draw") as bar,
        quiet(),
        poutine.block(),
    ):
        with seeded(stream_seed(seed, "sampling")):
            density = potential(bound, batch)
            function = None
            if backend == "nutpie":
                begun = time.perf_counter()
                function, how = fast(density, STEPS * total)
                told |= how | {"compile_s": round(time.perf_counter() - begun, 2)}
        found, begun = [], time.perf_counter()
        own = [stream_seed(stream_seed(seed, "sampling") + chain, "sampling") for chain in range(chains)]
        if told.get("density") == "eager" and not any(s.discrete for s in bound.sites):
            firsts = []
            for each in own:
                with seeded(each):
                    firsts.append(density.start(None if start is None else start()))
            found = _side_by_side(together(bound, batch, density), density, firsts, start, length, own, bar)
            told["whitened"] = start is not None and density.size <= MOST_WHITENED
        for chain in range(len(found), chains):
            bar.set_postfix_str(f"chain {chain + 1} of {chains}")
            with seeded(own[chain]):
                first = density.start(None if start is None else start())
                if function is None:
                    found.append(pyro_chain(density, first, length, bar))
                else:
                    found.append(nutpie_chain(function, first, length, own[chain], bar))
    stats = {name: np.stack([chain.stats[name] for chain in found]) for name in STATS}
    told["gradients"] = sum(chain.gradients for chain in found)
    told["sampling_s"] = round(time.perf_counter() - begun, 3)
    return density.values(torch.cat([chain.path for chain in found])), stats, told


def _side_by_side(
    many: Function,
    density: Potential,
    firsts: list[Tensor],
    start: Start | None,
    length: Length,
    seeds: list[int],
    bar: tqdm,
) -> list[Chain]:
    """Chains whose points are worked out together; in coordinates that whiten the guide, if there is one."""
    if start is None or density.size > MOST_WHITENED:
        return nutpie_chains(many, firsts, length, seeds, bar)
    draws = []
    with seeded(stream_seed(seeds[0], "init")):
        for _ in range(WHITENED_BY * density.size):
            values = start()
            named = {name: density.transforms[name](values[name]) for name in density.shapes}
            draws.append(density.joined(named))
    white = Whitened.of(torch.stack(draws))
    found = nutpie_chains(white.density(many), [white.z(x) for x in firsts], length, seeds, bar)
    return [replace(chain, path=white.point(chain.path)) for chain in found]


@dataclass
class _Rerun:
    """The model's run on the draws: by name, dims and values (draw, *dims); log joint density (draw,)."""

    posterior: dict[str, tuple[tuple[str, ...], np.ndarray]]
    likelihood: dict[str, tuple[tuple[str, ...], np.ndarray]]
    log_joint: np.ndarray


def _rerun(bound: Bound, batch: Batch, values: Mapping[str, Tensor], total: int) -> _Rerun:
    """Run the model on the draws, some at a time."""
    template = bound.template
    size = max(1, AT_ONCE // max(batch.n_rows(r) for r in template.row_dims))
    found, likelihood, joint = [], [], []
    for begin in range(0, total, size):
        n = min(size, total - begin)
        model = model_at(bound, batch, {name: v[begin : begin + n] for name, v in values.items()}, n)
        found.append(reported(bound, model, batch, n))
        likelihood.append(log_likelihood(template, model, batch, n))
        density = [by_particle(log_prob(s), bound.nesting).expand(n) for _, s in sample_sites(model)]
        joint.append(torch.stack([d.double() for d in density]).sum(0).numpy())

    def joined(parts: list[Sampled]) -> Any:
        return {n: (dims, torch.cat([p[n][1] for p in parts]).numpy()) for n, (dims, _) in parts[0].items()}

    return _Rerun(joined(found), joined(likelihood), np.concatenate(joint))


def _groups(
    bound: Bound,
    source: Any,
    found: _Rerun,
    stats: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    seed: int,
) -> dict[str, xr.Dataset]:
    template = bound.template
    units, coords = units_of(template), labels_of(template, source, *shape)

    def sampled(values: np.ndarray) -> np.ndarray:
        return values.reshape(*shape, *values.shape[1:])

    posterior = {n: (dims, sampled(v)) for n, (dims, v) in found.posterior.items()}
    groups = {"posterior": dataset(posterior, coords, units, sampled=True)}
    groups["prior"] = prior_draws(bound, shape[1], seed, coords, units)
    likelihood = {n: (dims, sampled(v)) for n, (dims, v) in found.likelihood.items()}
    groups["log_likelihood"] = dataset(likelihood, coords, dict.fromkeys(likelihood, "nat"), sampled=True)
    for group, named in data_groups(template.told, source, {}).items():
        groups[group] = dataset(named, coords, units, sampled=False)
    named = {"lp": ((), sampled(found.log_joint))}
    whole = {"diverging": bool, "n_steps": int, "tree_depth": int}
    stats = {**stats, "acceptance_rate": stats["acceptance_rate"].clip(0.0, 1.0)}  # a mean, with its rounding
    named |= {n: ((), values.astype(whole.get(n, float))) for n, values in stats.items()}
    groups["sample_stats"] = dataset(named, coords, {"lp": "nat", "energy": "nat"}, sampled=True)
    return groups


def _provenance(
    bound: Bound,
    whole: Any,
    source: Any,
    given: Fit | None,
    learnt: list[str],
    told: Mapping[str, Any],
    groups: Mapping[str, xr.Dataset],
    seed: int,
    warmup: int,
) -> dict[str, Any]:
    template = bound.template
    chains, draws = (groups["posterior"].sizes[d] for d in ("chain", "draw"))
    subset = None
    if source is not whole:
        row = template.row_dims[0]
        subset = {"dim": row, "taken": source.sizes[row], "of": whole.sizes[row]}
    return {
        "template": template.name,
        "prior": template.prior_numbers(),
        "weights": dict(bound.weights),
        "local": [site.name for site in bound.local],
        "data": {
            "fingerprint": whole.fingerprint,
            "sizes": dict(source.sizes),
            "rows": list(template.row_dims),
        },
        "subset": subset,
        "method": "nuts",
        "backend": told["name"],
        "sampler": {name: value for name, value in told.items() if name != "name"},
        "plan": {"draws": draws, "warmup": warmup, "chains": chains},
        "held_fixed": learnt,
        "given": None if given is None else {"data": given.provenance["data"], "seed": given.plan.seed},
        "seed": seed,
        "device": "cpu",
        "versions": versions(),
    }
