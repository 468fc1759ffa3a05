"""``draw`` and ``predict``: a fit and data become a labelled posterior, rows in chunks.

Longer than 400 lines because all that is told of a chunk of rows is worked out in one place.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from scivi.errors import DataError, TrustWarning, Unsupported, listed
from scivi.inference import marginal
from scivi.inference.discrete import complete, left_out
from scivi.inference.gather import (
    Sampled,
    density,
    forecasts,
    log_likelihood,
    prior_draws,
    reported,
    row_weight,
    rows_at_once,
)
from scivi.inference.importance import USABLE_K, chosen, pareto_k, truncated
from scivi.inference.opening import open_data
from scivi.inference.population import weigh_globals
from scivi.inference.refine import Refined, refine_rows
from scivi.inference.scores import particle_plate, placed, quiet
from scivi.inference.shards import collector
from scivi.inference.state import Fit
from scivi.inference.team import Team
from scivi.inference.trees import (
    SAMPLED,
    Named,
    data_groups,
    feature_group,
    feature_labels,
    labels_of,
    plain_labels,
    units_of,
)
from scivi.inputs.batches import Batch, read_batch, some_field
from scivi.models.binding import Bound, seeded, stream_seed
from scivi.models.guides import JointGuide
from scivi.models.mixtures import AdaptedGuide
from scivi.models.sites import row_dim_of, sample_sites

Groups = dict[str, dict[str, tuple[tuple[str, ...], np.ndarray]]]  # by group and name: dims and values

# Share of effective draws under which a row's amortised posterior counts as poor (our choice).
POOR_SHARE = 0.2
FEWEST_EFFECTIVE = 100  # draws of a population: a mean is known to a tenth of its sd (our choice)
PROPOSED = 4  # proposals of which a corrected draw is taken (our choice)
MOST_CHUNKS = 2**32  # chunks along one row dim: each has a stream of its own
WEIGHED_DRAWS = 400  # draws whose global weight is worked out by integrating all rows
SILENT_S = 2.0  # seconds before a progress bar shows
WEIGHED_NODES = 2**27  # rows x nodes x draws above which it is not (our choice: about a minute)


def draw(
    fit: Fit | Sequence[Fit],
    data: Any,
    draws: int = 1000,
    *,
    seed: int = 0,
    to: str | Path | None = None,
    refine: bool = False,
    predictive: bool = False,
    correct: bool | None = None,
    progress: bool = True,
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
        correct: take the draws out of more by their importance weights, if these can be used (k-hat of at
            most .7): out of four times as many where no latent belongs to a row, or the guide holds all
            together; else what rows share out of the weighted draws with which a fit of few rows has ended.
            None where that can be had, True to insist on the former, False for the guide's own draws.
        progress: show a progress bar if it takes more than two seconds.

    Returns:
        Groups posterior, prior, log_likelihood, observed_data, constant_data, sample_stats, history, and
        features, a few numbers of each of these rows and of some of the fit's, for ``analysis.drift``. In
        sample_stats: ``lp`` and ``log_q`` (chain, draw), log densities of model and guide over all rows;
        ``row_log_weight`` (chain, draw, row), the log importance weight of a row's latents given the globals;
        ``outside`` and ``poor`` (row); ``global_log_weight`` (chain, draw), that of the globals with all rows
        integrated, where affordable. Of corrected draws ``proposal_log_weight`` (chain, proposal), of all
        that they were taken from, and no ``log_q``: they are the guide's no more (nor ``row_log_weight``,
        where the draws of rows are corrected too).
        Attributes verdict, why and advice, as ``analysis.report`` gives them for 1000 of the rows.

    Raises:
        DataError: the data do not fit the template.
        Unsupported: the guide is not amortised and these are not the rows of the fit; or ``correct`` is asked
            of a guide of rows, or of one whose weights cannot be used.

    Notes:
        A guide draws one value of the globals for each draw and every row follows it. Time grows with
        rows x draws.

        Inside a process group of ``torch.distributed``, and with a .zarr to write to, the processes share the
        rows: all call it alike. Each chunk of rows has its own random stream, so that the draws are those of
        one process. Without a .zarr each works out all of it, and the first writes.
    """
    fits = [fit] if isinstance(fit, Fit) else list(fit)
    if not fits:
        raise Unsupported("draw needs at least one fit.")
    template = fits[0].template
    source = open_data(template, data)
    for one in fits:
        check_rows(one, source)
        _check_labels(one, source)
    chains = [_Chain(one, draws, stream_seed(seed + k, "draws")) for k, one in enumerate(fits)]
    _correct(chains, source, correct)
    units = units_of(template)
    labels = labels_of(template, source, len(fits), draws)
    labels |= feature_labels(fits[0].features, template, source)
    ours, pieces = collector(template.row_dims[0], labels, units, to)
    shown = progress and ours.rank == 0
    with pieces:
        first, *others = template.row_dims
        for number, rows, batch in _chunks(fits, source, draws, first, ours, shown):
            found = [chain.rows(batch, number, refine, predictive) for chain in chains]
            index = {} if rows == slice(0, source.sizes[first]) else {first: np.arange(rows.start, rows.stop)}
            own = feature_group(fits[0].features, template, source, batch)
            pieces.add(rows, {**_stacked(found), **data_groups(template.told, source, index), **own})
        for k, row in enumerate(others, 1):
            for number, _, batch in _chunks(fits, source, draws, row, ours, shown):
                for chain in chains:
                    chain.add_density(batch, row, k * MOST_CHUNKS + number)
        pieces.add(None, {})  # a process that has no rows meets the others here
        for chain in chains:
            chain.add_up(ours)
        if ours.rank == 0:
            pieces.add(None, {"sample_stats": _totals(chains, source)})
        history = [f.history for f in fits]
        whole = {"prior": prior_draws(fits[0].bound, draws, seed, pieces.coords, units)}
        whole["history"] = history[0] if len(history) == 1 else xr.concat(history, "chain", join="outer")
        provenance = {**fits[0].provenance, "method": "svi", "draws": draws, "draw_seed": seed}
        provenance["data"] = {"fingerprint": source.fingerprint, "sizes": dict(source.sizes)}
        provenance["fit_data"] = fits[0].provenance["data"]
        provenance["local"] = [site.name for site in fits[0].bound.local]
        return pieces.tree(whole, provenance)


def predict(
    fit: Fit | Sequence[Fit],
    data: Any,
    draws: int = 1000,
    *,
    seed: int = 0,
    to: str | Path | None = None,
    refine: bool = False,
    progress: bool = True,
) -> xr.DataTree:
    """``draw``, with a group ``posterior_predictive`` in which missing entries of the data are forecasts.

    Warns:
        TrustWarning: the verdict on the posterior is "do not trust".
    """
    found = draw(fit, data, draws, seed=seed, to=to, refine=refine, predictive=True, progress=progress)
    if found.attrs["verdict"] == "do not trust":
        reasons = json.loads(found.attrs["why"]) + json.loads(found.attrs["advice"])
        warnings.warn(f"do not trust these predictions: {' '.join(reasons)}", TrustWarning, stacklevel=2)
    return found


def check_rows(fit: Fit, source: Any) -> None:
    """Refuse rows that a guide which is not amortised knows nothing of."""
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


def _chunks(
    fits: Sequence[Fit], source: Any, draws: int, row: str, ours: Team, shown: bool
) -> Iterator[tuple[int, slice, Batch]]:
    """The rows along a dim, some at a time, and where they stand, with one row of every other row dim.

    Numbered; of several processes each has its share. All at once for a guide with a factor for each row.
    """
    bound = fits[0].bound
    template, some = bound.template, some_field(bound.example)
    n = source.sizes[row]
    size = rows_at_once(bound, row, draws) if all(f.bound.amortised for f in fits) else n
    others = {d: np.arange(1) for d in template.row_dims if d != row and source.sizes[d] > 1}
    numbers = range(ours.rank, math.ceil(n / size), ours.size)
    total = sum(min(size, n - number * size) for number in numbers)
    title = f"{template.name}: draws"
    with tqdm(total=total, disable=not shown, delay=SILENT_S, desc=title, unit=row) as bar:
        for number in numbers:
            rows = slice(number * size, min(n, number * size + size))
            index = others if size >= n else {**others, row: np.arange(rows.start, rows.stop)}
            yield number, rows, read_batch(source, template.fields, template.row_dims, index, some)
            bar.update(rows.stop - rows.start)


def _stacked(found: Sequence[Groups]) -> Groups:
    """The chains' values as (chain, draw, *dims); flags of rows hold for a row that has one in any chain."""
    out: Groups = {}
    for group, named in found[0].items():
        for name, (dims, first) in named.items():
            values = [one[group][name][1] for one in found]
            if name in ("outside", "poor"):
                joined = dims, np.any(values, axis=0)
            elif name == "amortisation_gap":
                joined = dims, first
            else:
                joined = (*SAMPLED, *dims), np.stack(values)
            out.setdefault(group, {})[name] = joined
    return out


def _totals(chains: Sequence[_Chain], source: Any) -> Named:
    """What holds for a draw as a whole, (chain, draw)."""
    totals = {"lp": [c.log_joint for c in chains]}
    if not any(c.corrected or c.kept for c in chains):
        totals["log_q"] = [c.log_guide for c in chains]
    weights = [c.global_weights(source) for c in chains]
    if all(w is not None for w in weights):
        totals["global_log_weight"] = weights
    draws = chains[0].draws
    told: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name, of in totals.items():
        told[name] = (SAMPLED, np.stack([np.broadcast_to(v, (draws,)) for v in of]))
    if corrected := [c.proposal_log_weight for c in chains if c.corrected]:
        told["proposal_log_weight"] = (("chain", "proposal"), np.stack(corrected))
    return told


def _correct(chains: Sequence[_Chain], source: Any, asked: bool | None) -> None:
    """Let draws be taken from more by their weights where that helps; of all chains or none."""
    if asked is False or any(c.kept for c in chains):
        return
    # What rows share follows from the data of the fit: the likelihood of other rows cannot weigh it.
    own = all(c.fit.provenance["data"]["fingerprint"] == source.fingerprint for c in chains)
    able, k_hat = own and all(c.together and not c.summed for c in chains), math.inf
    if asked and not able:
        raise Unsupported(
            "these draws cannot be corrected as a whole: the data are not those of the fit, or the guide has "
            "a factor for each row, or leaves out discrete latents. refine=True improves rows one by one."
        )
    if able:
        found = [chain.proposals(source) for chain in chains]
        k_hat = max(pareto_k(weight.numpy()) for _, weight in found)
    if k_hat <= USABLE_K:
        for chain, proposals in zip(chains, found, strict=True):
            chain.take(*proposals)
    elif all(_can_be_used(c.fit) for c in chains):
        for chain in chains:
            chain.take_population()
    elif asked:
        raise Unsupported(
            f"the importance weights cannot be used (k-hat {k_hat:.2f}, at most {USABLE_K} can): take a "
            f'richer guide, such as guide="auto", or scivi.nuts.'
        )


def _can_be_used(fit: Fit) -> bool:
    """Whether the weights of the draws that a fit has kept of what rows share give a mean to .1 sd."""
    if fit.population is None:
        return False
    log_weight = torch.tensor(fit.provenance["fit"]["finish"]["log_weight"]).double()
    ess = 1 / truncated(log_weight).square().sum()
    return pareto_k(log_weight.numpy()) <= USABLE_K and bool(ess >= FEWEST_EFFECTIVE)


class _Chain:
    """One fit's draws: one value of the globals for each, which every row follows."""

    def __init__(self, fit: Fit, draws: int, seed: int) -> None:
        self.fit, self.draws, self.seed = fit, draws, seed
        self.like = some_field(fit.bound.example)  # of the fit's dtype, on its device
        with self._running(0):
            self.given = _globals(fit.bound, draws)
        self.log_joint, self.log_guide = np.zeros(()), np.zeros(())
        self.proposal_log_weight = np.empty(0)

    @property
    def corrected(self) -> bool:
        """Whether the draws were taken from more by their weights."""
        return self.proposal_log_weight.size > 0

    @property
    def kept(self) -> bool:
        """Whether the guide hands out draws of NUTS, whose density is not known."""
        guide = self.fit.bound.nets.guide
        return isinstance(guide, AdaptedGuide) and bool(guide.n_kept)

    @property
    def together(self) -> bool:
        """Whether a draw of the globals, auxiliary ones among them, is one of all latents."""
        bound = self.fit.bound
        return isinstance(bound.nets.guide, JointGuide) or all(s.row_dim is None for s in bound.sites)

    @property
    def summed(self) -> bool:
        """Whether the guide leaves out discrete latents."""
        bound = self.fit.bound
        with self._running(0):
            return bool(left_out(bound, poutine.trace(bound.guide).get_trace(bound.example)))

    def take(self, values: Mapping[str, Tensor], log_weight: Tensor) -> None:
        """Take the draws out of proposals by their weights."""
        with self._running(1):
            self.given = chosen(values, log_weight, self.draws)
        self.proposal_log_weight = log_weight.numpy()

    def take_population(self) -> None:
        """Take what rows share out of the weighted draws that the fit has kept."""
        log_weight = torch.tensor(self.fit.provenance["fit"]["finish"]["log_weight"]).double()
        assert self.fit.population is not None
        with self._running(1):
            theta = chosen({"theta": self.fit.population}, log_weight, self.draws)["theta"]
            self.given = _globals(self.fit.bound, self.draws, theta)
        self.proposal_log_weight = log_weight.numpy()

    def proposals(self, source: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Four times as many values of the globals, and their log weights, all rows taken together."""
        bound, rows = self.fit.bound, self.fit.template.row_dims
        whole = read_batch(source, self.fit.template.fields, rows, {}, self.like)
        total, most = PROPOSED * self.draws, max(source.sizes[row] for row in rows)
        blocks = math.ceil(total / max(4, rows_at_once(bound, rows[0], 1) // most))
        values, weights = [], []
        with self._running(0):
            for part in torch.arange(total).tensor_split(blocks):
                n = len(part)
                given = _globals(bound, n)
                guide, model = _run_pair(bound, whole, given, n)
                weight = torch.zeros(n).double()
                for k, row in enumerate(rows):
                    log_p, log_q = (density(bound, t, whole, row, rows_only=k > 0) for t in (model, guide))
                    weight = weight + (log_p - log_q).cpu()
                values.append(given)
                weights.append(weight)
        return {name: torch.cat([one[name] for one in values]) for name in values[0]}, torch.cat(weights)

    @contextmanager
    def _running(self, stream: int) -> Iterator[None]:
        with seeded(self.seed + stream, self.like.device), torch.no_grad(), quiet():
            yield

    def rows(self, batch: Batch, number: int, refine: bool, predictive: bool) -> Groups:
        """Draws for a chunk of rows, the first with all that has no rows; the chunk's density is added up."""
        with self._running(1 + number):
            return self._rows(batch, number, refine, predictive)

    def _rows(self, batch: Batch, number: int, refine: bool, predictive: bool) -> Groups:
        bound, draws, template = self.fit.bound, self.draws, self.fit.template
        row = template.row_dims[0]
        guide, model = _run_pair(bound, batch, self.given, draws)
        weight = row_weight(bound, guide, model, batch, draws)
        outside = _outside(self.fit, batch)
        poor = outside.copy()
        if (self.corrected and self.together) or self.kept:
            weight = None
        if weight is not None:
            poor |= _effective_share(weight) < POOR_SHARE
        gap, lost = np.full(len(outside), np.nan), 0.0
        if refine and weight is not None and poor.any():
            refined = refine_rows(bound, batch, self.given, torch.as_tensor(np.flatnonzero(poor)), draws)
            if refined is not None:
                guide, model = _replaced(bound, batch, guide, refined, draws)
                by_guide = row_weight(bound, guide, model, batch, draws)
                assert by_guide is not None
                weight = by_guide.index_copy(1, refined.rows, refined.log_weight)
                lost = (by_guide - weight).sum(1)
                gap[refined.rows.cpu().numpy()] = refined.gap.cpu().numpy()
        log_p, log_q = (density(bound, t, batch, row, rows_only=number > 0) for t in (model, guide))
        self.log_joint = self.log_joint + _numpy(log_p)
        self.log_guide = self.log_guide + _numpy(log_q + lost)
        stats: dict[str, Any] = {"outside": ((row,), outside), "poor": ((row,), poor)}
        if weight is not None:
            stats["row_log_weight"] = ((row,), weight.cpu().numpy())
        if refine:
            stats["amortisation_gap"] = ((row,), gap)
        groups: Groups = {
            "posterior": _arrays(reported(bound, model, batch, draws, row=None if number == 0 else row)),
            "log_likelihood": _arrays(log_likelihood(template, model, batch, draws)),
            "sample_stats": stats,
        }
        if predictive:
            groups["posterior_predictive"] = _arrays(forecasts(bound, model, batch, draws))
        return groups

    def add_density(self, batch: Batch, row: str, stream: int) -> None:
        """Add up the density of a chunk of rows along another row dim, of which nothing else is told."""
        bound = self.fit.bound
        with self._running(1 + stream):
            guide, model = _run_pair(bound, batch, self.given, self.draws)
            self.log_joint = self.log_joint + _numpy(density(bound, model, batch, row, rows_only=True))
            self.log_guide = self.log_guide + _numpy(density(bound, guide, batch, row, rows_only=True))

    def add_up(self, ours: Team) -> None:
        """Add up the densities of the rows that several processes have."""
        if ours.size > 1:
            both = np.stack([np.broadcast_to(v, (self.draws,)) for v in (self.log_joint, self.log_guide)])
            self.log_joint, self.log_guide = ours.total(torch.from_numpy(both)).numpy()

    def global_weights(self, source: Any) -> np.ndarray | None:
        """Log importance weights of the globals, all rows integrated; None where that is no use."""
        provenance = self.fit.provenance
        if provenance["fit"]["finish"].get("method") == "importance sampling":
            return None
        if source.fingerprint != provenance["data"]["fingerprint"]:
            return None
        with self._running(0):
            module = marginal.global_module(self.fit.bound)
            if module is None or module.name not in self.given:
                return None
            theta = self.given[module.name].reshape(self.draws, -1)[:WEIGHED_DRAWS]
            found = weigh_globals(self.fit.bound, source, theta, WEIGHED_NODES)
        return None if found is None else np.pad(found, (0, self.draws - len(found)), constant_values=np.nan)


def _numpy(value: Tensor) -> np.ndarray:
    return value.cpu().numpy()


def _arrays(named: Sampled) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    return {name: (dims, _numpy(value)) for name, (dims, value) in named.items()}


def _globals(bound: Bound, draws: int, theta: Tensor | None = None) -> dict[str, Tensor]:
    """Values of the guide's global sites, auxiliary ones too, over all draws; none if no latent is global.

    Those at given values of the joint normal's, (draw, D), on the unbounded scale, instead of random ones.
    """
    if all(site.row_dim is not None for site in bound.sites):
        return {}
    fixed: dict[str, Tensor] = {}
    if theta is not None:
        module = marginal.global_module(bound)
        assert module is not None
        fixed = {module.name: theta.to(module.loc).reshape(draws, *[1] * bound.nesting, -1)}
    with particle_plate(draws, bound.nesting), placed(fixed):
        trace = poutine.trace(bound.guide).get_trace(bound.example)
    rows = bound.template.row_dims
    return {name: site["value"] for name, site in sample_sites(trace) if row_dim_of(site, rows) is None}


def _run_pair(
    bound: Bound, batch: Batch, values: Mapping[str, Tensor], draws: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """Guide with some sites at these values, and model on the guide's.

    Discrete latents that the guide leaves out are drawn given the data.
    """
    with particle_plate(draws, bound.nesting), placed(values):
        guide = poutine.trace(bound.guide).get_trace(batch)
    if left_out(bound, guide):
        return complete(bound, batch, guide, draws)
    with particle_plate(draws, bound.nesting):
        return guide, poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)


def _effective_share(weight: Tensor) -> np.ndarray:
    """Effective over actual draws of each row's importance weights."""
    normal = torch.softmax(weight.double(), 0)
    return (1 / normal.square().sum(0) / len(weight)).cpu().numpy()


def _outside(fit: Fit, batch: Batch) -> np.ndarray:
    """Rows of which more lies beyond the range that the fit has seen than chance explains.

    An entry counts if it is beyond by more than a tenth of the range. Were a row of the same kind as the n of
    the fit, each of its entries would be the largest, or the smallest, with chance 1 / (n + 1): of thousands
    of genes some are in most cells. So many are allowed, and four standard deviations more.
    """
    row, template = fit.template.row_dims[0], fit.template
    beyond, expected = torch.zeros(batch.n_rows(row)), 0.0
    for name, declared in template.fields.items():
        if row not in declared.dims:
            continue
        axis = declared.dims.index(row)
        value = batch.values[name].cpu().movedim(axis, 0)
        low, high = fit.seen[f"{name}.min"], fit.seen[f"{name}.max"]
        if low.shape != value.shape[1:]:  # other entries along another dim: what was seen of all of them
            low, high = low.min(), high.max()
        margin = 0.1 * (high - low) + 1e-6 * high.abs()
        found = (value < low - margin) | (value > high + margin)
        mask = batch.observed_mask.get(name)
        if mask is not None:
            found &= mask.cpu().movedim(axis, 0)
        beyond += found.reshape(len(beyond), -1).sum(1)
        expected += value[0].numel() * 2 / (fit.sizes[row] + 1) if len(value) else 0.0
    allowed = math.floor(expected + 4 * expected**0.5) if expected > 0.5 else 0
    return (beyond > allowed).numpy()


def _replaced(
    bound: Bound, batch: Batch, guide: poutine.Trace, refined: Refined, draws: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """The traces with the refined rows' values in place, under the guide's own density."""
    values = {n: s["value"].clone() for n, s in sample_sites(guide)}
    for name, value in refined.values.items():
        axis = refined.axes[name]
        all_rows = list(value.shape)
        all_rows[axis] = values[name].shape[axis]
        values[name] = values[name].expand(all_rows).clone()
        values[name].index_copy_(value.dim() + axis, refined.rows, value)
    return _run_pair(bound, batch, values, draws)
