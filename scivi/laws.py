"""``check``: the laws that every template obeys, each tried on a small table and reported, never raised.

Longer than 400 lines because each law stands beside the words in which it fails.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from scipy.stats import binomtest
from torch import Tensor

from scivi.errors import SciVIError, Unsupported
from scivi.inference.draws import draw
from scivi.inference.loop import fit
from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.plan import Plan
from scivi.inference.recorder import CLOCKED
from scivi.inference.scores import Placed, by_particle, log_prob, quiet, run_pair
from scivi.inference.simulate import simulate
from scivi.inference.state import load, save
from scivi.inference.step import update
from scivi.inference.trees import dataset, units_of
from scivi.inputs.batches import Batch, read_batch, take
from scivi.inputs.subset import evenly
from scivi.models.binding import Bound, bind, seeded
from scivi.models.sites import sample_sites, value_of
from scivi.models.template import Template

# Entries of a row dim and of any other, where there are no data (our choice: quick, uneven).
ROWS, OTHERS = 24, 2
RECOVERY_ROWS = 100
REPEATS = 40  # random partitions into minibatches
WORST_Z = 4.0  # standard errors; by chance once in 15 000 templates
LEVEL, WORST_P = 0.9, 1e-3  # nominal coverage, and the smallest p value of the binomial test
RECOVERY = Plan(steps=1000, lr=3e-2, rows_per_batch=None, compile="off")

# What a template's functions raise when they are at fault: ours, torch's and pyro's, and a slip of the pen.
FAULTS = (
    SciVIError,
    RuntimeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    NameError,
    TypeError,
    LookupError,
)


STILL = "not applicable: nothing is learnt"


class Broken(SciVIError):
    """A law does not hold; the message says where."""


def check(template: Template, like: Any = None, seed: int = 0, *, recovery: int = 0) -> xr.Dataset:
    """Hold a template to the laws that every template obeys.

    Args:
        template: what is checked.
        like: data; at most 24 of their rows are used. Without it the template's ``simulate``, or its model
            run forward on feasible given fields, makes a small table.
        seed: of everything.
        recovery: so many simulated data sets are also fitted, and the truth must lie in 90 % of the central
            90 % intervals of the reported global sites. Intervals of a lone global that are half as wide as
            they should be are told by 20 in half of the cases, by 50 in nearly all.

    Returns:
        Dim law (its names are the coordinate): ``ok``, and ``detail`` in words. ``attrs["ok"]`` is 1 if all
        hold. ``.to_pandas()`` prints it as a table.

    Raises:
        DataError: ``like`` does not fit the template's fields.

    Notes:
        A few seconds; ``recovery`` adds a fit of 1000 steps for each data set. A law that does not apply to a
        template holds, and its detail begins with "not applicable".
    """
    store = pyro.get_param_store()
    subject = Subject(template, like, seed)
    laws = dict(LAWS)
    if recovery:
        laws["recovery"] = lambda one: _recovery(one, recovery)
    found: dict[str, tuple[bool, str]] = {}
    try:
        for name, law in laws.items():
            if name != "sites" and found["sites"][1].startswith("cannot be bound"):
                found[name] = (False, "not tried: the template cannot be bound")
            else:
                found[name] = _tried(law, subject)
    finally:
        for name in set(store.keys()) - set(subject.store):
            del store[name]
    ok = np.array([held for held, _ in found.values()])
    columns = {"ok": ("law", ok), "detail": ("law", np.array([detail for _, detail in found.values()]))}
    return xr.Dataset(columns, {"law": list(found)}, {"template": template.name, "ok": int(ok.all())})


def _tried(law: Callable[[Subject], str], subject: Subject) -> tuple[bool, str]:
    try:
        with seeded(subject.seed):
            return True, law(subject)
    except Broken as broken:
        return False, str(broken)
    except FAULTS as error:
        return False, f"{type(error).__name__}: {error}"


class Subject:
    """A template and a small table of its own, made once for all laws."""

    def __init__(self, template: Template, like: Any, seed: int) -> None:
        self.template, self.seed = template, seed
        store = pyro.get_param_store()
        self.store = {name: store[name].detach().clone() for name in store.keys()}
        dims = (d for f in template.fields.values() for d in f.dims)
        self.sizes: dict[str, int] = dict.fromkeys(dims, OTHERS)
        self.sizes |= dict.fromkeys(template.row_dims, ROWS)
        self.sizes |= {d: n for d, n in template.sizes.items() if isinstance(n, int)}
        self.like = None if like is None else _few_rows(template, like)
        if self.like is not None:
            self.sizes |= {str(d): n for d, n in self.like.sizes.items()}

    @cached_property
    def table(self) -> xr.Dataset:
        """The data: those given, else simulated, else feasible values."""
        if self.like is not None:
            return self.like
        try:
            return self.simulated(self.seed)[0]
        except FAULTS:  # the law "simulate" tells; the others can do without
            return self.invented()

    def simulated(
        self, seed: int, sizes: Mapping[str, int] = MappingProxyType({})
    ) -> tuple[xr.Dataset, xr.Dataset]:
        """Data and truth from the template."""
        wanted = {**self.sizes, **sizes}
        like = self.like if self.like is not None else self.invented(sizes)
        return simulate(self.template, wanted, seed=seed, like=like)

    def invented(self, sizes: Mapping[str, int] = MappingProxyType({})) -> xr.Dataset:
        """Feasible values: given numbers spread about 1 where their support has that."""
        template, rng = self.template, np.random.default_rng(self.seed)
        wanted, named = {**self.sizes, **sizes}, {}
        for name, field in template.fields.items():
            values = rng.uniform(0.5, 1.5, [wanted[d] for d in field.dims])
            inside = field.support.check(torch.as_tensor(values)).all()
            if field.role == "observed" or field.default is not None or field.is_count or not bool(inside):
                values = np.full(values.shape, field.assumed)
            named[name] = (field.dims, values)
        for name, field in template.fields.items():
            most = named[field.at_most][1] if field.at_most else np.inf
            named[name] = (field.dims, field.as_stored(np.minimum(named[name][1], most)))
        coords = {d: np.arange(n) for d, n in wanted.items()}
        return dataset(named, coords, units_of(template), sampled=False)

    @cached_property
    def batch(self) -> Batch:
        """All rows."""
        template, like = self.template, torch.empty(0, dtype=torch.float32)
        return read_batch(open_data(template, self.table), template.fields, template.row_dims, {}, like)

    @cached_property
    def bound(self) -> Bound:
        """The pair, untrained."""
        return bind(self.template, self.batch, self.seed)

    @property
    def still(self) -> bool:
        """Whether the pair has nothing to learn."""
        return not any(p.requires_grad for p in self.bound.nets.parameters())

    @cached_property
    def refusal(self) -> str | None:
        """Why the guide needs all rows at once, if it does."""
        row = self.template.row_dims[0]
        half = {row: torch.arange(self.batch.n_rows(row) // 2)}
        if not len(half[row]):
            return "there is a single row"
        try:
            with torch.no_grad(), quiet():
                self.bound.guide(take(self.batch, half, self.template.fields))
        except Unsupported as refusal:
            return str(refusal)
        return None

    @property
    def plan(self) -> Plan:
        """A short fit."""
        rows = self.batch.n_rows()
        size = None if self.refusal else -(-rows // 2)
        return Plan(
            steps=6,
            log_every=2,
            rows_per_batch=size,
            particles=2,
            newton=False,
            compile="off",
            seed=self.seed,
        )


def _few_rows(template: Template, like: Any) -> xr.Dataset:
    """At most ``ROWS`` rows of the first row dim, as a table of its own."""
    source, row = open_data(template, like), template.row_dims[0]
    some = evenly(source, row, min(ROWS, source.sizes[row]))
    values = some.read({})
    named = {name: (field.dims, field.as_stored(values[name])) for name, field in template.fields.items()}
    return dataset(named, some.coords, units_of(template), sampled=False)


def _sites(one: Subject) -> str:
    """Sites and dims are as declared."""
    template = one.template
    try:
        bound = one.bound
    except FAULTS as error:
        raise Broken(f"cannot be bound: {error}") from None
    with torch.no_grad():
        trace: Any = poutine.trace(bound.model).get_trace(one.batch)
    sizes, values = template.all_sizes(one.batch.sizes), bound.values(one.batch, trace)
    wrong = []
    for name, dims in template.dims.items():
        got, wanted = tuple(values[name].shape), tuple(sizes[d] for d in dims)
        if [n for n in got if n > 1] != [n for n in wanted if n > 1]:
            wrong.append(f'site "{name}" has shape {got}; dims says {dims} = {wanted}')
    if wrong:
        raise Broken("; ".join(wrong))
    auxiliary = [s.name for s in bound.sites if s.name not in template.dims]
    return f"{len(template.dims)} reported" + (f"; auxiliary: {', '.join(auxiliary)}" if auxiliary else "")


def _coverage(one: Subject) -> str:
    """The guide has a factor for each latent of the model, and none besides."""
    with torch.no_grad():
        guide = poutine.trace(one.bound.guide).get_trace(one.batch)
    factors = {name for name, site in sample_sites(guide) if not site["infer"].get("is_auxiliary")}
    latents = {site.name: site.discrete for site in one.bound.sites}
    summed = [name for name, discrete in latents.items() if discrete and name not in factors]
    missing = [name for name in latents if name not in factors and name not in summed]
    extra = sorted(factors - set(latents))
    faults = [f"the guide has no factor for {missing}"] if missing else []
    faults += [f"the guide samples {extra}, which the model does not have"] if extra else []
    if faults:
        raise Broken("; ".join(faults))
    return f"{len(factors)} factors" + (f"; to be summed: {', '.join(summed)}" if summed else "")


def _store(one: Subject) -> str:
    """Pyro's process-wide parameter store is left as it was."""
    store = pyro.get_param_store()
    for run in (one.bound.guide, one.bound.model):
        poutine.trace(run).get_trace(one.batch)
    if added := sorted(set(store.keys()) - set(one.store)):
        raise Broken(f"pyro.param or pyro.module put {added} into the process-wide store; make them in nets")
    if changed := [name for name, value in one.store.items() if not torch.equal(store[name], value)]:
        raise Broken(f"{changed} of the process-wide store were changed")
    return "untouched"


def _gradients(one: Subject) -> str:
    """A finite gradient reaches every parameter within a few steps."""
    if one.still:
        return STILL
    source = open_data(one.template, one.table)
    plan = replace(one.plan, rows_per_batch=None, clip=None)
    state = begin(one.template, source, plan)
    reached: set[str] = set()
    parameters = dict(state.bound.nets.named_parameters())
    with quiet():
        objective = prepare(state.bound, state.bound.example, plan)
        for step in range(plan.steps):
            update(state, objective, plan)
            slopes = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            if bad := [name for name, slope in slopes.items() if not bool(torch.isfinite(slope).all())]:
                raise Broken(f"at step {step} the gradient of {bad} is not finite")
            reached |= {name for name, slope in slopes.items() if bool((slope != 0).any())}
    unreached = [n for n, p in parameters.items() if p.requires_grad and n not in reached]
    if unreached:
        raise Broken(f"no gradient reaches {unreached}")
    return f'{len(reached)} parameters, estimator "{objective.estimator}"'


def _unbiased(one: Subject) -> str:
    """The mean of the minibatch objective over a partition of the rows is the full objective."""
    if one.still:
        return STILL
    if one.refusal:
        return f"not applicable: {one.refusal}"
    template, plan = one.template, one.plan
    chosen = prepare(one.bound, one.batch, plan)
    several = [chosen] + ([replace(chosen, estimator="trace")] if chosen.estimator == "marginal" else [])
    scores = {}
    for objective in several:
        for row in template.row_dims:
            with torch.no_grad(), quiet():
                gaps = [_gap(objective, one, row, one.seed + k) for k in range(REPEATS)]
            gap, scale = np.array([g for g, _ in gaps]), max(abs(full) for _, full in gaps)
            if not np.isfinite(gap).all():
                raise Broken(f'the "{objective.estimator}" objective is not finite')
            error = gap.std(ddof=1) / REPEATS**0.5 + 1e-6 * scale  # the second is float32's rounding
            scores[objective.estimator, row] = (gap.mean(), error)
    worst = max(scores, key=lambda key: abs(scores[key][0]) / scores[key][1])
    mean, error = scores[worst]
    said = f'"{worst[0]}" over "{worst[1]}": minibatches less full {mean:.3g} +- {error:.2g} nats per row'
    if abs(mean) > WORST_Z * error:
        raise Broken(f"{said}; is every site of a row inside batch.plate, and nothing scaled twice?")
    return said


def _gap(objective: Any, one: Subject, row: str, seed: int) -> tuple[float, float]:
    """Objective over a random partition less the full one; and the full one.

    All with the same noise for the globals.
    """
    n = one.batch.n_rows(row)
    order = torch.as_tensor(np.random.default_rng(seed).permutation(n))
    total = 0.0
    for index in order.split(-(-n // 3)):
        with seeded(seed):
            part = objective.evaluate(take(one.batch, {row: index}, one.template.fields))
        total += len(index) / n * float(part.objective)
    with seeded(seed):
        full = float(objective.evaluate(one.batch).objective)
    return total - full, full


def _same_bits(one: Subject) -> str:
    """Two fits with one seed have equal histories."""
    histories = [fit(one.template, one.table, one.plan, progress=False).history for _ in range(2)]
    first, second = (h.drop_vars(CLOCKED, errors="ignore") for h in histories)
    different = [str(n) for n in first.data_vars if not np.array_equal(first[n], second[n], equal_nan=True)]
    if different:
        raise Broken(f"two fits with one seed differ in {different}: something draws from an unseeded stream")
    return f"{one.plan.steps} steps twice"


def _stored(one: Subject) -> str:
    """A saved and loaded fit draws the same."""
    fitted = fit(one.template, one.table, one.plan, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        again = load(save(fitted, folder), one.template)
    first, second = (
        draw(f, one.table, 5, seed=one.seed, progress=False)["posterior"].to_dataset()
        for f in (fitted, again)
    )
    different = [str(n) for n in first.data_vars if not np.array_equal(first[n], second[n], equal_nan=True)]
    if different:
        raise Broken(f"after save and load the draws of {different} differ: is all that was learnt in nets?")
    return f"{len(first.data_vars)} variables equal"


def _particles(one: Subject) -> str:
    """Leading dims of draws pass through model and guide, and change no density."""
    bound, batch, template = one.bound, one.batch, one.template
    training = bound.nets.training
    bound.nets.eval()  # what is left out at random while fitting is no part of a density
    try:
        return _two_draws(bound, batch, template)
    finally:
        bound.nets.train(training)


def _two_draws(bound: Bound, batch: Batch, template: Template) -> str:
    with torch.no_grad():
        factors = {name for name, _ in sample_sites(poutine.trace(bound.guide).get_trace(batch))}
    if summed := [site.name for site in bound.sites if site.discrete and site.name not in factors]:
        return f"not applicable: {summed} are summed"
    with torch.no_grad(), quiet():
        like = run_pair(bound, batch)
        two = run_pair(bound, batch, particles=2)
        sizes, values = template.all_sizes(batch.sizes), bound.values(batch, two.model)
        for name, dims in template.dims.items():
            value, n = values[name], int(np.prod([sizes[d] for d in dims]))
            if value.numel() not in (n, 2 * n):
                raise Broken(
                    f'site "{name}" has shape {tuple(value.shape)} with two draws; dims says {dims}: {n} each'
                )
        for k in range(2):
            single = _placed(bound, batch, two.guide, like.guide, k)
            for side, both in (("guide", two.guide), ("model", two.model)):
                _compare_densities(side, single[side], both, bound.nesting, k)
    return "two draws at once score as two single ones"


def _placed(
    bound: Bound, batch: Batch, two: poutine.Trace, like: poutine.Trace, k: int
) -> dict[str, poutine.Trace]:
    """Traces of a single run on the values of the k-th of two draws."""
    values: dict[str, Tensor] = {
        name: site["value"][k].reshape(value_of(like, name).shape) for name, site in sample_sites(two)
    }
    with Placed(values, lambda name, _: values[name]):
        guide = poutine.trace(bound.guide).get_trace(batch)
    return {"guide": guide, "model": poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)}


def _compare_densities(side: str, single: poutine.Trace, both: poutine.Trace, nesting: int, k: int) -> None:
    for name, site in sample_sites(both):
        got = by_particle(log_prob(site), nesting)
        wanted, got = float(log_prob(single.nodes[name]).sum()), float(got[min(k, len(got) - 1)])
        if not abs(got - wanted) <= 1e-4 * (1 + abs(wanted)):  # float32 epsilon times some hundred terms
            raise Broken(
                f'the {side}\'s site "{name}" scores {got:.6g} in a run of two draws and {wanted:.6g} alone: '
                f"write the {side} so that leading dims are left alone (sum over -1, not over all)"
            )


def _unchanged(one: Subject) -> str:
    """Values handed in are not changed."""
    table, before = one.table, one.table.copy(deep=True)
    tensors = {name: value.clone() for name, value in one.batch.values.items()}
    run_pair(one.bound, one.batch)
    fitted = fit(one.template, table, one.plan, progress=False)
    draw(fitted, table, 2, seed=one.seed, progress=False)
    changed = [n for n, value in one.batch.values.items() if not torch.equal(value, tensors[n])]
    changed += [str(n) for n in before.variables if not before[n].identical(table[n])]
    if changed:
        raise Broken(f"{sorted(set(changed))} were written to")
    return "data as they were"


def _simulate(one: Subject) -> str:
    """Simulated data are such as the template accepts, with the truth of reported sites."""
    table, truth = one.simulated(one.seed + 1)
    open_data(one.template, table)
    unknown = sorted(str(name) for name in truth.data_vars if name not in one.template.dims)
    wrong = [f'truth "{name}" is not in dims' for name in unknown]
    wrong += [
        f'truth "{name}" has dims {truth[name].dims}; declared are {dims}'
        for name, dims in one.template.dims.items()
        if name in truth and truth[name].dims != dims
    ]
    if wrong:
        raise Broken("; ".join(wrong))
    return f"accepted; truth of {', '.join(str(n) for n in truth.data_vars) or 'nothing'}"


def _recovery(one: Subject, repeats: int) -> str:
    """Central 90 % intervals of the reported global sites cover the truth at their nominal rate."""
    template = one.template
    rows = {} if one.like is not None else dict.fromkeys(template.row_dims, RECOVERY_ROWS)
    inside: dict[str, list[np.ndarray]] = {}
    for k in range(repeats):
        table, truth = one.simulated(one.seed + 100 + k, rows)
        fitted = fit(template, table, replace(RECOVERY, seed=one.seed + k), progress=False)
        posterior = draw(fitted, table, 400, seed=k, progress=False)["posterior"].to_dataset()
        for name, dims in template.dims.items():
            if name not in truth or set(dims) & set(template.row_dims):
                continue
            low, high = (posterior[name].quantile(q, ("chain", "draw")).values for q in (0.05, 0.95))
            covers = (truth[name].values >= low) & (truth[name].values <= high)
            fixed = posterior[name].values.std((0, 1)) == 0  # such as the diagonal of a correlation
            inside.setdefault(name, []).append(np.where(fixed, np.nan, covers).reshape(-1))
    covered = {
        f"{name}[{j}]": column
        for name, each in inside.items()
        for j, column in enumerate(np.array(each).T)
        if not np.isnan(column).any()
    }
    if not covered:
        return "not applicable: no global site has a truth"
    p = {name: binomtest(int(column.sum()), repeats, LEVEL).pvalue for name, column in covered.items()}
    worst = min(p, key=lambda name: p[name])
    said = f"{worst} covered {int(covered[worst].sum())} of {repeats} times at {LEVEL:.0%}"
    if p[worst] * len(p) < WORST_P:
        raise Broken(f"{said}, p = {p[worst]:.1g}")
    return f"{said}, the worst of {len(p)}"


LAWS: Mapping[str, Callable[[Subject], str]] = {
    "sites": _sites,
    "guide": _coverage,
    "parameter store": _store,
    "gradients": _gradients,
    "minibatch": _unbiased,
    "same seed": _same_bits,
    "save and load": _stored,
    "particles": _particles,
    "untouched data": _unchanged,
    "simulate": _simulate,
}
