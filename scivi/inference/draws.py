"""``draw`` and ``predict``: a fit and data become a labelled posterior.

``simulate``: a template becomes data.

Longer than 400 lines because drawing, weighing and gathering share one pass over the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from scivi.errors import DataError, TemplateError, Unsupported, listed
from scivi.inference import marginal
from scivi.inference.discrete import complete, left_out
from scivi.inference.loop import open_data
from scivi.inference.refine import Refined, refine_rows
from scivi.inference.scores import Placed, by_particle, by_row, log_prob, particle_plate, quiet, row_scale
from scivi.inference.state import Fit
from scivi.inference.trees import Named, arranged, dataset, plain_labels, save_tree, tree, units_of
from scivi.inputs.batches import Batch, chunks
from scivi.models.binding import Bound, seeded, stream_seed
from scivi.models.sites import plates_of, row_dim_of, sample_sites, value_of
from scivi.models.template import Template

AT_ONCE = 2**20  # draws x rows held at once (our choice: a few hundred MB with a dozen sites)
POOR_SHARE = (
    0.2  # share of effective draws under which a row's amortised posterior counts as poor (our choice)
)
WEIGHED_DRAWS = 400  # draws whose global weight is worked out by integrating all rows
FEWEST_WEIGHED = 50  # fewer draws say nothing about the weights' tail
WEIGHED_NODES = 2**27  # rows x nodes x draws above which it is not (our choice: about a minute)


@dataclass
class Collected:
    """What the chunks of rows have given so far."""

    posterior: dict[str, list[np.ndarray]] = field(default_factory=dict)
    likelihood: dict[str, list[np.ndarray]] = field(default_factory=dict)
    predictive: dict[str, list[np.ndarray]] = field(default_factory=dict)
    rows: dict[str, list[np.ndarray]] = field(default_factory=dict)
    dims: dict[str, tuple[str, ...]] = field(default_factory=dict)
    log_joint: Tensor | float = 0.0
    log_guide: Tensor | float = 0.0


def draw(
    fit: Fit | Sequence[Fit],
    data: Any,
    draws: int = 1000,
    *,
    seed: int = 0,
    to: str | Path | None = None,
    refine: bool = False,
    predictive: bool = False,
) -> xr.DataTree:
    """Draw from the posterior of the rows of ``data``, seen in the fit or not.

    Args:
        fit: a fit, or several of one template: each becomes a chain.
        data: anything ``scivi.fit`` takes, with the same fields.
        draws: from each fit.
        seed: of the draws.
        to: also write the tree there: .nc, or .zarr, to which rows are written as they come.
        refine: improve, one by one, the rows that lie outside what the fit has seen or whose weights are
            poor, and report the amortisation gap of each.
        predictive: also draw the observed fields anew.

    Returns:
        Groups posterior, prior, log_likelihood, observed_data, constant_data, sample_stats and history. In
        sample_stats: ``lp`` and ``log_q`` (chain, draw), log densities of model and guide over all rows;
        ``row_log_weight`` (chain, draw, row), the log importance weight of a row's latents given the globals;
        ``outside`` and ``poor`` (row); ``global_log_weight`` (chain, draw), that of the globals with all rows
        integrated, where affordable.

    Raises:
        DataError: the data do not fit the template.
        Unsupported: the guide is not amortised and these are not the rows of the fit.

    Notes:
        A guide draws one value of the globals for each draw and every row follows it. Time grows with
        rows x draws.
    """
    fits = [fit] if isinstance(fit, Fit) else list(fit)
    if not fits:
        raise Unsupported("draw needs at least one fit.")
    template = fits[0].template
    source = open_data(template, data)
    for one in fits:
        _check_rows(one, source)
        _check_labels(one, source)
    chains = [
        _chain(one, source, draws, stream_seed(seed + k, "draws"), refine, predictive)
        for k, one in enumerate(fits)
    ]
    groups = _groups(fits, source, chains, draws, seed)
    provenance = {**fits[0].provenance, "method": "svi", "draws": draws, "draw_seed": seed}
    provenance["data"] = {"fingerprint": source.fingerprint, "sizes": dict(source.sizes)}
    provenance["fit_data"] = fits[0].provenance["data"]
    found = tree(groups, provenance)
    if to is not None:
        save_tree(found, to)
    return found


def predict(
    fit: Fit | Sequence[Fit],
    data: Any,
    draws: int = 1000,
    *,
    seed: int = 0,
    to: str | Path | None = None,
    refine: bool = False,
) -> xr.DataTree:
    """``draw``, with a group ``posterior_predictive`` in which missing entries of the data are forecasts."""
    return draw(fit, data, draws, seed=seed, to=to, refine=refine, predictive=True)


def _check_rows(fit: Fit, source: Any) -> None:
    if not fit.bound.amortised and source.fingerprint != fit.provenance["data"]["fingerprint"]:
        raise Unsupported(
            f'the guide of "{fit.template.name}" holds one factor for each row of the fit and knows nothing '
            f"of others; draw from the data of the fit, or give the template an amortised guide."
        )


def _check_labels(fit: Fit, source: Any) -> None:
    """Data to draw from must have the labels of the fit along every dim that a population has."""
    template = fit.template
    shared = {d for dims in template.dims.values() if not set(dims) & set(template.row_dims) for d in dims}
    here = {
        d: plain_labels(source.coords[d]) for d in sorted(shared & set(source.sizes) - set(template.coords))
    }
    faults = [
        f'"{d}": {own} here, {fit.coords[d]} in the fit' for d, own in here.items() if own != fit.coords[d]
    ]
    if faults:
        raise DataError(
            listed("these data have other labels than those of the fit; select or reorder them:", faults)
        )


def _chain(fit: Fit, source: Any, draws: int, seed: int, refine: bool, predictive: bool) -> Collected:
    """All of one fit's draws, rows in chunks."""
    bound = fit.bound
    some = next(iter(bound.example.values.values()))
    whole = source.sizes[bound.template.row_dims[0]]
    size = max(1, AT_ONCE // draws) if bound.nets.guide is None or bound.amortised else whole
    out, given = Collected(), None
    with seeded(seed, some.device), torch.no_grad(), quiet():
        for batch in chunks(
            source, bound.template.fields, bound.template.row_dims, size, some.device, some.dtype
        ):
            given = _globals(bound, draws) if given is None else given
            _collect(out, fit, batch, draws, given, refine, predictive, first=not out.rows)
        finished = fit.provenance["fit"]["finish"].get("method")
        if finished != "importance sampling" and source.fingerprint == fit.provenance["data"]["fingerprint"]:
            _weigh_globals(out, bound, source, draws, given or {})
    return out


def _globals(bound: Bound, draws: int) -> dict[str, Tensor]:
    """Values of the guide's global sites, auxiliary ones too, over all draws."""
    with particle_plate(draws, bound.nesting):
        trace = poutine.trace(bound.guide).get_trace(bound.example)
    rows = bound.template.row_dims
    return {name: site["value"] for name, site in sample_sites(trace) if row_dim_of(site, rows) is None}


def _collect(
    out: Collected,
    fit: Fit,
    batch: Batch,
    draws: int,
    given: Mapping[str, Tensor],
    refine: bool,
    predictive: bool,
    first: bool,
) -> None:
    bound = fit.bound
    with particle_plate(draws, bound.nesting):
        with Placed(given, lambda name, _: given[name]):
            guide = poutine.trace(bound.guide).get_trace(batch)
    guide, model = _run_model(bound, batch, guide, draws)
    weight = _row_weight(bound, guide, model, batch, draws)
    outside = _outside(fit, batch)
    poor = outside.copy()
    if weight is not None:
        poor |= _effective_share(weight) < POOR_SHARE
    refined, lost = None, torch.zeros(())
    if refine and weight is not None and poor.any():
        refined = refine_rows(bound, batch, given, torch.as_tensor(np.flatnonzero(poor)), draws)
    if refined is not None:
        guide, model = _replaced(bound, batch, guide, refined, draws)
        by_guide = _row_weight(bound, guide, model, batch, draws)
        if by_guide is not None:
            weight = by_guide.index_copy(1, refined.rows, refined.log_weight)
            lost = (by_guide - weight).sum(1)
    _gather_sites(out, fit.template, model, batch, draws, first)
    _gather_densities(out, bound, guide, model, batch, first)
    out.log_guide = out.log_guide + lost
    if predictive:
        with particle_plate(draws, bound.nesting):
            values = {n: s["value"] for n, s in sample_sites(model) if not s["is_observed"]}
            with Placed(values, lambda name, _: values[name]):
                again = poutine.trace(bound.model).get_trace(batch.predict())
        for name in fit.template.observed:
            out.predictive.setdefault(name, []).append(
                _field_values(again.nodes[name], fit.template, name, batch, draws)
            )
    found = {"outside": outside, "poor": poor}
    if weight is not None:
        found["row_log_weight"] = weight.cpu().numpy()
    if refine:
        gap = np.full(len(outside), np.nan)
        if refined is not None:
            gap[refined.rows.cpu().numpy()] = refined.gap.cpu().numpy()
        found["amortisation_gap"] = gap
    for name, of_rows in found.items():
        out.rows.setdefault(name, []).append(of_rows)


def _run_model(
    bound: Bound, batch: Batch, guide: poutine.Trace, draws: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """Guide and model on the guide's values; discrete latents that it leaves out are drawn given the data."""
    if left_out(bound, guide):
        return complete(bound, batch, guide, draws)
    with particle_plate(draws, bound.nesting):
        return guide, poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)


def _shape(template: Template, dims: Sequence[str], batch: Batch) -> list[int]:
    sizes = template.all_sizes(batch.sizes)
    return [batch.n_rows(d) if d in template.row_dims else sizes[d] for d in dims]


def _gather_sites(
    out: Collected, template: Template, model: poutine.Trace, batch: Batch, draws: int, first: bool
) -> None:
    for name, dims in template.dims.items():
        if not first and not set(dims) & set(template.row_dims):
            continue
        value, shape = value_of(model, name), _shape(template, dims, batch)
        if value.numel() not in (int(np.prod(shape)), draws * int(np.prod(shape))):
            raise TemplateError(
                f'site "{name}" has shape {tuple(value.shape)} over {draws} draws, which is not '
                f"(draw, {', '.join(dims)}) = {(draws, *shape)}. Correct dims, or write the model so that it "
                f"takes leading dims of draws."
            )
        out.posterior.setdefault(name, []).append(arranged(value, draws, shape))
        out.dims[name] = dims
    for name in template.observed:
        node = model.nodes[name]
        placed = sorted(plates_of(node).items(), key=lambda item: item[1])
        dims = tuple(p for p, _ in placed if p != "_particle")
        value = log_prob(node, scaled=False)
        out.likelihood.setdefault(name, []).append(arranged(value, draws, _shape(template, dims, batch)))
        out.dims[f"log_likelihood {name}"] = dims


def _field_values(
    node: Mapping[str, Any], template: Template, name: str, batch: Batch, draws: int
) -> np.ndarray:
    return arranged(node["value"], draws, _shape(template, template.fields[name].dims, batch))


def _gather_densities(
    out: Collected, bound: Bound, guide: poutine.Trace, model: poutine.Trace, batch: Batch, first: bool
) -> None:
    """Add the chunk's log densities; those of the globals once."""
    rows = bound.template.row_dims
    for trace, side in ((model, "log_joint"), (guide, "log_guide")):
        total: Tensor | float = getattr(out, side)
        for _, site in sample_sites(trace):
            dim = row_dim_of(site, rows)
            if dim is None and not first:
                continue
            value = by_particle(log_prob(site), bound.nesting)
            total = total + (value if dim is None else value / row_scale(batch, dim))
        setattr(out, side, total)


def _row_weight(
    bound: Bound, guide: poutine.Trace, model: poutine.Trace, batch: Batch, draws: int
) -> Tensor | None:
    """Log weight of a row's latents given the globals, (draws, rows); None if a row has none of its own."""
    row = bound.template.row_dims[0]
    if not any(s.row_dim == row for s in bound.sites):
        return None
    out: Tensor = torch.zeros(())
    for trace, sign in ((model, 1.0), (guide, -1.0)):
        for _, site in sample_sites(trace):
            dims = plates_of(site)
            if row in dims:
                out = out + sign * by_row(log_prob(site), bound.nesting, dims[row]) / row_scale(batch, row)
    return out.expand(draws, -1)


def _effective_share(weight: Tensor) -> np.ndarray:
    """Effective over actual draws of each row's importance weights."""
    normal = torch.softmax(weight.double(), 0)
    return (1 / normal.square().sum(0) / len(weight)).cpu().numpy()


def _outside(fit: Fit, batch: Batch) -> np.ndarray:
    """Rows with an entry beyond the range that the fit has seen, by more than a tenth of it."""
    row, template = fit.template.row_dims[0], fit.template
    out = torch.zeros(batch.n_rows(row), dtype=torch.bool)
    for name, declared in template.fields.items():
        if row not in declared.dims:
            continue
        axis = declared.dims.index(row)
        value = batch.values[name].cpu().movedim(axis, 0)
        low, high = fit.seen[f"{name}.min"], fit.seen[f"{name}.max"]
        margin = 0.1 * (high - low) + 1e-6 * high.abs()
        beyond = (value < low - margin) | (value > high + margin)
        mask = batch.observed_mask.get(name)
        if mask is not None:
            beyond &= mask.cpu().movedim(axis, 0)
        out |= beyond.reshape(len(out), -1).any(1)
    return out.numpy()


def _replaced(
    bound: Bound, batch: Batch, guide: poutine.Trace, refined: Refined, draws: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """The traces with the refined rows' values in place, under the guide's own density."""
    values = {n: s["value"].clone() for n, s in sample_sites(guide)}
    for name, value in refined.values.items():
        axis = refined.axes[name]
        values[name] = values[name].expand(draws, *values[name].shape[1:]).clone()
        values[name].index_copy_(values[name].dim() + axis, refined.rows, value)
    with particle_plate(draws, bound.nesting), Placed(values, lambda name, _: values[name]):
        guide = poutine.trace(bound.guide).get_trace(batch)
    return _run_model(bound, batch, guide, draws)


def _weigh_globals(
    out: Collected, bound: Bound, source: Any, draws: int, given: Mapping[str, Tensor]
) -> None:
    """Log p(data | globals) + log prior - log q of the first draws, every row integrated.

    Absent where not affordable.
    """
    module = marginal.global_module(bound)
    if module is None or module.name not in given or not bound.amortised:
        return
    template, some = bound.template, next(iter(bound.example.values.values()))
    plan = marginal.layout(bound, bound.example)
    if plan.refusal is not None:
        return
    per_dim = {1: 15, 2: 9}.get(plan.dims, 5)
    n_nodes = marginal.n_nodes(plan.dims, per_dim)
    n = min(draws, WEIGHED_DRAWS, WEIGHED_NODES // (n_nodes * source.sizes[template.row_dims[0]]))
    if n < FEWEST_WEIGHED:
        return
    size = max(64, 2**19 // n_nodes)
    theta = given[module.name].reshape(draws, -1)[:n]
    total = -module.distribution().log_prob(theta).double()
    for s in range(n):
        total[s] += marginal.log_prior(bound, module, theta[s], bound.example)
    for batch in chunks(source, template.fields, template.row_dims, size, some.device, some.dtype):
        for s in range(n):
            total[s] += marginal.log_marginal(bound, module, theta[s], batch, plan, per_dim)
    weights = np.full(draws, np.nan)
    weights[:n] = total.cpu().numpy()
    out.rows["global_log_weight"] = [weights]


def _groups(
    fits: Sequence[Fit], source: Any, chains: Sequence[Collected], draws: int, seed: int
) -> dict[str, xr.Dataset]:
    template = fits[0].template
    sizes = template.all_sizes(source.sizes)
    coords = {d: source.coords[d] if d in source.sizes else np.arange(n) for d, n in sizes.items()}
    coords |= {d: np.asarray(labels) for d, labels in template.coords.items()}
    units, row = units_of(template), template.row_dims[0]

    def stacked(which: str, dims: Mapping[str, tuple[str, ...]]) -> Named:
        parts = [getattr(c, which) for c in chains]
        found = {}
        for name in parts[0]:
            axis = _row_axis(dims[name], template)
            found[name] = (dims[name], np.stack([_joined(p[name], axis) for p in parts]))
        return found

    first = chains[0]
    groups = {"posterior": dataset(stacked("posterior", first.dims), coords, units, sampled=True)}
    groups["prior"] = _prior(fits[0], draws, seed, coords, units)
    own = {n: first.dims[f"log_likelihood {n}"] for n in first.likelihood}
    groups["log_likelihood"] = dataset(
        stacked("likelihood", own), coords, {n: "nat" for n in own}, sampled=True
    )
    if first.predictive:
        own = {n: template.fields[n].dims for n in first.predictive}
        groups["posterior_predictive"] = dataset(stacked("predictive", own), coords, units, sampled=True)
    table = source.read({})
    for group, role in (("observed_data", "observed"), ("constant_data", "given")):
        named = {n: (f.dims, table[n]) for n, f in template.fields.items() if f.role == role}
        groups[group] = dataset(named, coords, units, sampled=False)
    groups["sample_stats"] = _stats(chains, coords, row, draws)
    history = [f.history for f in fits]
    groups["history"] = history[0] if len(history) == 1 else xr.concat(history, "chain", join="outer")
    return {name: group for name, group in groups.items() if group.data_vars}


def _stats(chains: Sequence[Collected], coords: Mapping[str, Any], row: str, draws: int) -> xr.Dataset:
    nat = {
        "lp": "nat",
        "log_q": "nat",
        "row_log_weight": "nat",
        "global_log_weight": "nat",
        "amortisation_gap": "nat",
    }
    sampled: dict[str, Any] = {}
    for name, side in (("lp", "log_joint"), ("log_q", "log_guide")):
        sampled[name] = (
            (),
            np.stack([torch.as_tensor(getattr(c, side)).expand(draws).cpu().numpy() for c in chains]),
        )
    found = chains[0].rows
    if "row_log_weight" in found:
        sampled["row_log_weight"] = (
            (row,),
            np.stack([np.concatenate(c.rows["row_log_weight"], 1) for c in chains]),
        )
    if all("global_log_weight" in c.rows for c in chains):
        sampled["global_log_weight"] = ((), np.stack([c.rows["global_log_weight"][0] for c in chains]))
    stats = dataset(sampled, coords, nat, sampled=True)
    flags = {
        n: ((row,), np.any([np.concatenate(c.rows[n]) for c in chains], axis=0)) for n in ("outside", "poor")
    }
    if "amortisation_gap" in found:
        flags["amortisation_gap"] = ((row,), np.concatenate(found["amortisation_gap"]))
    return stats.merge(dataset(flags, coords, nat, sampled=False))


def _row_axis(dims: Sequence[str], template: Template) -> int | None:
    first = template.row_dims[0]
    return 1 + list(dims).index(first) if first in dims else None


def _joined(parts: Sequence[np.ndarray], axis: int | None) -> np.ndarray:
    return parts[0] if axis is None or len(parts) == 1 else np.concatenate(parts, axis)


def _prior(
    fit: Fit, draws: int, seed: int, coords: Mapping[str, Any], units: Mapping[str, str]
) -> xr.Dataset:
    """Prior draws of the reported global sites."""
    template, bound = fit.template, fit.bound
    names = [n for n, dims in template.dims.items() if not set(dims) & set(template.row_dims)]
    some = next(iter(bound.example.values.values()))
    with seeded(stream_seed(seed, "draws") ^ 1, some.device), torch.no_grad(), quiet():
        with particle_plate(draws, bound.nesting):
            trace = poutine.trace(bound.model).get_trace(bound.example.predict())
    named: dict[str, Any] = {}
    for name in names:
        shape = _shape(template, template.dims[name], bound.example)
        named[name] = (template.dims[name], arranged(value_of(trace, name), draws, shape)[None])
    return dataset(named, coords, units, sampled=True)


def simulate(
    template: Template, sizes: Mapping[str, int], *, seed: int = 0, like: Any = None
) -> tuple[xr.Dataset, xr.Dataset]:
    """Make data from a template, with the truth behind them.

    Args:
        template: whose ``simulate`` is used, or whose model is run forward.
        sizes: of the dims.
        seed: of the data.
        like: a table whose given fields are used when the model is run forward; without it they take their
            default, or a feasible value.

    Returns:
        A table that ``scivi.fit`` takes, and the reported sites that made it.
    """
    if template.simulate is not None:
        generator = torch.Generator().manual_seed(seed)
        return template.simulate(dict(sizes), template.prior, generator)
    batch = _blank(template, sizes, like)
    with seeded(seed), torch.no_grad():
        own = template.nets(dict(batch.sizes), template.prior) if template.nets is not None else None
        trace = poutine.trace(template.model).get_trace(batch.predict(), template.prior, own)
    coords = {d: np.arange(n) for d, n in batch.sizes.items()}
    units = units_of(template)
    values = {n: batch.values[n] for n, f in template.fields.items() if f.role == "given"}
    values |= {n: value_of(trace, n) for n in template.observed}
    table = {
        n: (template.fields[n].dims, v.numpy().reshape(_shape(template, template.fields[n].dims, batch)))
        for n, v in values.items()
    }
    truth = {
        n: (d, value_of(trace, n).numpy().reshape(_shape(template, d, batch)))
        for n, d in template.dims.items()
    }
    return dataset(table, coords, units, sampled=False), dataset(truth, coords, units, sampled=False)


def _blank(template: Template, sizes: Mapping[str, int], like: Any) -> Batch:
    """A batch of feasible values, or of the given fields of a table."""
    if like is not None:
        source = open_data(template, like)
        return next(
            chunks(
                source,
                template.fields,
                template.row_dims,
                max(source.sizes.values()),
                torch.device("cpu"),
                torch.float32,
            )
        )
    sizes = template.all_sizes(sizes)
    absent = sorted({d for f in template.fields.values() for d in f.dims} - set(sizes))
    if absent:
        raise TemplateError(f'simulate needs the size of {absent}: pass sizes={{"{absent[0]}": ...}}.')
    values = {
        n: torch.full([sizes[d] for d in f.dims], f.feasible if f.default is None else f.default)
        for n, f in template.fields.items()
    }
    return Batch(values, {}, sizes, template.row_dims)
