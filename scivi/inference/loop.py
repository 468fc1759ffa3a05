"""``train``: a generator that fits step by step; ``fit``: the same, run to its end and frozen.

Longer than 400 lines because the start and the finish of the globals stand beside the steps between.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from scivi.errors import DataError, FitError, PlanError, listed
from scivi.inference import marginal
from scivi.inference.adapt import adapt
from scivi.inference.gather import rows_at_once
from scivi.inference.objective import Objective, prepare
from scivi.inference.passes import Passes
from scivi.inference.plan import Plan
from scivi.inference.polish import polish
from scivi.inference.population import weigh_globals
from scivi.inference.reach import unseen
from scivi.inference.recorder import Recorder, recorder_for
from scivi.inference.scores import quiet
from scivi.inference.state import Fit, State, freeze, load_state, new_state, save_state, versions
from scivi.inference.step import diagnose, is_finite, read_window, signal_to_noise
from scivi.inference.stepper import stepper_for
from scivi.inference.stopping import levelled
from scivi.inference.team import team
from scivi.inference.trees import plain_labels
from scivi.inputs.batches import Batch, chunks, read_batch
from scivi.inputs.features import Features, Sample
from scivi.inputs.feed import Feed
from scivi.inputs.sources import open_source
from scivi.models.binding import Bound, bind, stream_seed
from scivi.models.guides import JointGuide
from scivi.models.mixtures import AdaptedGuide
from scivi.models.template import Template

EXAMPLE_ROWS = 64  # rows that a pair is bound to (our choice: enough for any shape)
START_ROWS = 1024  # rows of the Newton start (our choice: some percent in the globals, .2 s)
FEW_ROWS = 512  # rows up to which the population's posterior may be far from normal (our choice)
FINISH_ROWS = (
    2**13
)  # rows from which the finish takes curvature and fine nodes (our choice: 1 % in the globals' sd)
FINISH_NODES = 2**15  # rows x nodes of the curvature, where nodes are few (our choice, likewise)
MOST_FINE_NODES = 2**22  # rows x fine nodes of the finish (our choice: a second, 100 MB at a time)
NODES_AT_A_TIME = 2**18  # rows x nodes held at once
WEIGHED_DRAWS, WEIGHED_NODES = (
    100,
    2**24,
)  # of the globals' normal; rows x nodes x draws (our choice: seconds)
_SEEN_DRAWS = 16  # as many rows at once as of so many draws: a pass that only compares needs no more
FEWEST_NODES = 8  # as which fewer count: a row has numbers of its own


@dataclass(frozen=True)
class Progress:
    """Where a running fit stands.

    Args:
        step: steps taken.
        objective: mean negative bound since the last report, nats per row.
        grad_norm: mean gradient norm since then.
        rate: steps per second since then.
        state: the running fit's own; changes as it goes on.
    """

    step: int
    objective: float
    grad_norm: float
    rate: float
    state: State


def open_data(template: Template, data: Any) -> Any:
    """Data as a source that fits the template, checked."""
    return open_source(
        data,
        template.fields,
        template.row_dims,
        name=template.name,
        sizes=template.sizes,
        validate=template.validate,
        distinct=template.distinct,
    )


def open_measured(template: Template, data: Any) -> Any:
    """``open_data``, of data to learn from.

    Raises:
        DataError: an observed field is missing everywhere, too; that is a forecast, and no fit.
    """
    source = open_data(template, data)
    spans = getattr(source, "spans", {})  # a source that somebody wrote may have none
    empty = [n for n, span in spans.items() if span.empty and template.fields[n].role == "observed"]
    if empty:
        faults = [f'observed field "{name}": every entry is missing (NaN)' for name in empty]
        title = f'there is nothing to learn from for template "{template.name}"; look how these were read:'
        raise DataError(listed(title, faults))
    return source


def device_of(plan: Plan) -> torch.device:
    """The device that a plan names.

    Raises:
        PlanError: there is none such here.
    """
    try:
        device = torch.device(plan.device)
    except RuntimeError:
        raise PlanError(f'device = "{plan.device}" is no device; use "cpu", "cuda" or "cuda:1".') from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanError(f'device = "{plan.device}", but torch finds no CUDA device here; use "cpu".')
    return device


def begin(template: Template, source: Any, plan: Plan) -> State:
    """The state of a fit before its first step."""
    ours = team()
    device, dtype = ours.device(device_of(plan)), getattr(torch, plan.dtype)
    feed = Feed(
        source,
        template.fields,
        template.row_dims,
        plan.rows_per_batch,
        stream_seed(plan.seed, "order"),
        device,
        dtype,
        plan.resident_bytes,
        share=(ours.rank, ours.size),
    )
    read = template.fields, template.row_dims
    bound = bind(template, next(chunks(source, *read, EXAMPLE_ROWS, device, dtype)), plan.seed)
    if isinstance(bound.nets.guide, JointGuide) and not bound.amortised:  # it can be run on all rows alone
        whole = next(chunks(source, *read, source.sizes[template.row_dims[0]], device, dtype))
        bound = replace(bound, example=whole)
    return new_state(bound, feed, plan, ours)


@contextmanager
def _sampling(state: State) -> Iterator[None]:
    """Run on the state's own random stream; the process's is put back afterwards."""
    device = next(iter(state.bound.example.values.values())).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), quiet():
        if cuda:
            torch.cuda.set_rng_state(state.random, device)
        else:
            torch.set_rng_state(state.random)
        yield
        state.random = torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()


def train(template: Template, data: Any, plan: Plan, *, state: State | None = None) -> Iterator[Progress]:
    """Fit step by step; whoever wants to act in between writes a ``for`` loop.

    Args:
        template: what to fit.
        data: anything ``open_source`` takes.
        plan: how.
        state: of an earlier run, to go on from; begun afresh if None.

    Yields:
        Progress every ``plan.log_every`` steps, and whenever ``plan.save_every_s`` seconds have gone by.

    Raises:
        DataError, TemplateError, PlanError: before the first step.
        FitError: it diverged more often than ``plan.restarts`` allows; ``state`` is the last good one. Or
            another process of the fit is gone.

    Notes:
        Inside a process group of ``torch.distributed`` it is one of the processes of one fit: all of them
        call it alike, and all are told the same.
    """
    source = open_measured(template, data)
    state = begin(template, source, plan) if state is None else state
    if state.team.size > 1:
        taken_up = {"checkpoint": [state.step, state.feed.state()]}
        state.team.agree({**identity_of(template, source, plan), **taken_up})
    state.team.follow(state.bound.nets)
    if not state.learns:  # by steps
        state.stopped = "nothing to learn"
        return
    with _sampling(state):
        objective = prepare(state.bound, state.bound.example, plan)
        if objective.estimator == "marginal" and plan.newton:
            if state.step == 0:
                _by_first(state, lambda: _newton_start(state, source, plan))
            if "start" in state.finish and _globals_alone(state.bound):  # the finish finds them: few steps do
                plan = replace(plan, steps=min(plan.steps, plan.log_every))
                state.finish["alone"] = True
        stepper = stepper_for(state, objective, plan)
    if state.good is None or not state.window:  # resumed between two entries, it keeps the one before
        state.good = state.pack()
    while not (state.stopped or _ended(state, plan)):
        begun, first = time.perf_counter(), state.step
        state.team.deadline = begun + plan.save_every_s
        with _sampling(state):
            while not (_ended(state, plan) or state.stopped):
                stepper.take(state, _room(state, plan))
                if state.step % plan.log_every == 0 or state.team.due:
                    break
            stepper.settle(state)
        state.engine = stepper.told
        elapsed = time.perf_counter() - begun
        state.wall_s += elapsed
        if not is_finite(state.window):
            _go_back(state, objective, plan, state.good)
            continue
        now = read_window(state.window)
        if state.step % plan.log_every == 0 or _ended(state, plan):
            _log(state, plan, now)
            state.window = {}
            _consider(state, plan)
            state.good = state.pack()
        yield Progress(state.step, now["objective"], now["grad_norm"], (state.step - first) / elapsed, state)
    if not state.stopped:
        state.stopped = "plateau" if state.decay_from is not None else "steps"


def _by_first(state: State, work: Callable[[], None]) -> None:
    """Let the first process work on the globals, and the others take over what it has found."""
    if state.team.rank == 0:
        work()
    state.team.follow(state.bound.nets)
    state.finish = state.team.told(state.finish)


def _room(state: State, plan: Plan) -> int:
    """Steps until the next entry of the history, or the end."""
    last = plan.steps
    if state.decay_from is not None and state.decay_steps is not None:
        last = min(last, state.decay_from + state.decay_steps)
    return min(last - state.step, plan.log_every - state.step % plan.log_every)


def _ended(state: State, plan: Plan) -> bool:
    if state.decay_from is not None and state.decay_steps is not None:
        return state.step >= min(plan.steps, state.decay_from + state.decay_steps)
    return state.step >= plan.steps


def _log(state: State, plan: Plan, now: Mapping[str, float]) -> None:
    rows = state.feed.size_of(state.bound.template.row_dims[0])
    since = state.history[-1]["wall_s"] if state.history else 0.0
    extra = {
        "step": state.step,
        "lr": state.lr_factor * plan.lr_at(state.step - 1, state.decay_from, state.decay_steps),
        "beta": plan.beta_at(state.step - 1),
        "rows_per_batch": rows or state.feed.sizes[state.bound.template.row_dims[0]],
        "signal_to_noise": signal_to_noise(state.optimiser),
        "wall_s": state.wall_s,
        "loader_share": min(1.0, state.feed.waited() / (state.wall_s - since)),
    }
    state.history.append({**extra, **now})


def _consider(state: State, plan: Plan) -> None:
    """Between entries of the history: let the minibatch grow, and ask the stop rule."""
    latest, first = state.history[-1], state.bound.template.row_dims[0]
    size = state.feed.size_of(first)
    if (
        plan.rows_per_batch_max
        and size
        and size < plan.rows_per_batch_max
        and latest["signal_to_noise"] < plan.grow_below
    ):
        state.feed.rows_per_batch = min(2 * size, plan.rows_per_batch_max)
    if plan.stop is None or state.decay_from is not None:
        return
    told = ("step", "objective", "objective_sd", "window_steps")
    if levelled(plan.stop, *(np.array([e[name] for e in state.history]) for name in told)):
        state.decay_from, state.decay_steps = state.step, state.step  # as long again


def _go_back(
    state: State, objective: Objective, plan: Plan, good: tuple[dict[str, torch.Tensor], dict[str, Any]]
) -> None:
    """After a divergence: name it, go back to the last good state with half the learning rate, or give up."""
    steps, wall_s, restarts = state.step - good[1]["step"], state.wall_s, list(state.restarts)
    stopped = state.stopped
    state.unpack(*good)
    with _sampling(state):
        error = diagnose(state, objective, plan, steps)
    state.unpack(*good)
    state.wall_s, state.restarts = (
        wall_s,
        [*restarts, {"step": error.step, "site": error.site, "rows": list(error.rows[:20])}],
    )
    state.lr_factor, state.stopped = 0.5 ** len(state.restarts), stopped  # a signal to stop holds
    if len(state.restarts) > plan.restarts:
        state.stopped = "diverged"
        tried = (
            f" {plan.restarts} restarts with ever smaller learning rates did not help."
            if plan.restarts
            else ""
        )
        raise FitError(f"{error}{tried}", step=error.step, site=error.site, rows=error.rows, state=state)


def _newton_start(state: State, source: Any, plan: Plan) -> None:
    """Put the globals near the mode for some rows, before the first step; leaves them alone if that fails.

    It fails, for one, where an untrained guide puts nodes so badly that the marginal is rough.
    """
    bound = state.bound
    module = marginal.global_module(bound)
    if module is None:
        return
    some = _spread_rows(source, bound, START_ROWS)
    rows = marginal.Rows(some, some, 1.0)
    try:
        found = marginal.newton_finish(bound, rows, plan.nodes, fine=False, max_steps=40, tolerance=0.3)
    except torch.linalg.LinAlgError:  # a marginal not smooth at the prior's centre is trained from there
        return
    if found.step_sd < 0.3 and bool(
        torch.isfinite(found.loc).all() and torch.isfinite(found.covariance).all()
    ):
        module.set(found.loc, found.covariance)
        state.finish["start"] = {"steps": found.steps, "step_sd": found.step_sd}


def _globals_alone(bound: Bound) -> bool:
    """Whether there is nothing to learn but the joint normal that the finish sets."""
    module = marginal.global_module(bound)
    own = set() if module is None else set(module.parameters())
    return bool(own) and all(p in own for p in bound.nets.parameters())


def _spread_rows(source: Any, bound: Bound, most: int) -> Callable[[int], Iterator[Batch]]:
    """Passes over evenly spread rows, at most so many, in chunks that suit the number of nodes."""
    template, some = bound.template, next(iter(bound.example.values.values()))
    first, dims = template.row_dims[0], marginal.layout(bound, bound.example).dims
    n = source.sizes[first]
    count = min(most, n)

    def passes(per_dim: int) -> Iterator[Batch]:
        at_a_time = max(64, NODES_AT_A_TIME // max(FEWEST_NODES, marginal.n_nodes(dims, per_dim)))
        size = count // math.ceil(count / at_a_time)  # equal chunks, and a few rows left over
        for start in range(0, count, size):
            places = np.arange(start, min(count, start + size))
            index = {first: places if count == n else places * (n - 1) // max(1, count - 1)}
            yield read_batch(source, template.fields, template.row_dims, index, some)

    return passes


def fit(
    template: Template,
    data: Any,
    plan: Plan | None = None,
    *,
    record: str | Path | Recorder | Sequence[str | Path | Recorder] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Fit:
    """Fit a template to data.

    Args:
        template: what to fit.
        data: AnnData, xarray, DataFrame, dict of arrays, or a path (.h5ad, .nc, .zarr, .csv, .ecsv, .fits).
        plan: how; ``Plan(**template.plan)`` if None, which is ``Plan()`` for most templates.
        record: a file for the history as JSON lines, a recorder, or several of either. With ``resume`` the
            file becomes that of this fit, what a killed run wrote after its last checkpoint taken back;
            without, it is added to.
        checkpoint: file to which the running fit is saved every ``plan.save_every_s`` seconds, whole or not
            at all.
        resume: go on from ``checkpoint`` if it exists.
        progress: show a progress bar.

    Returns:
        The fit, gradients off. ``fit.provenance["fit"]["stopped"]`` says how it ended.

    Raises:
        DataError: the data do not fit; every fault is listed.
        FitError: it diverged more often than ``plan.restarts`` allows.
        CheckpointError: the checkpoint belongs to something else.

    Notes:
        On a signal to terminate (or Ctrl-C) it finishes its step, saves, and returns what it has.

        Inside a process group of ``torch.distributed`` all processes call it alike and share every minibatch,
        whose size stays ``plan.rows_per_batch``. Each returns the same fit; the first alone records, saves
        and shows progress, and all read ``checkpoint``. Steps are not compiled then. A fit may be resumed by
        another number of processes.
    """
    plan = plan or Plan.from_dict(template.plan)
    source = open_measured(template, data)
    state = begin(template, source, plan)
    identity = identity_of(template, source, plan)
    path = None if checkpoint is None else Path(checkpoint)
    if resume and path is not None and path.exists():
        load_state(state, path, identity)
    speaks = state.team.rank == 0
    record, saves_to = (record, path) if speaks else (None, None)
    recorder = recorder_for(record, state.history if resume else None)
    logged, saved = len(state.history), time.monotonic()
    shown = progress and speaks
    bar = tqdm(total=plan.steps, initial=state.step, disable=not shown, desc=template.name, unit="step")
    try:
        with _signals(state):
            for now in train(template, source, plan, state=state):
                bar.set_postfix(nats_per_row=f"{now.objective:.5g}", refresh=False)
                bar.update(now.step - bar.n)
                for entry in state.history[logged:]:
                    recorder.write(entry)
                logged = len(state.history)
                if saves_to is not None and time.monotonic() - saved >= plan.save_every_s:
                    save_state(state, saves_to, identity)
                    saved = time.monotonic()
            if saves_to is not None:
                save_state(state, saves_to, identity)
            if isinstance(state.bound.nets.guide, AdaptedGuide):
                _by_first(state, lambda: _adapt(state, source, plan, shown))
            elif state.learns and state.stopped != "signal":
                bar.total = bar.n  # of steps: what is left is no step
                bar.set_postfix_str("finishing the globals")
                _by_first(state, lambda: _finish(state, source, plan))
                bar.set_postfix_str("looking beyond the guide")
                _by_first(state, lambda: state.finish.update(unseen(state.bound, source, plan.seed)))
                if state.team.any(state.team.asked):  # too late for a step
                    state.stopped = "signal"
    finally:
        bar.close()
        state.feed.close()
        recorder.close()
    return frozen(state, source, plan, identity)


@contextmanager
def _signals(state: State) -> Iterator[None]:
    """While it lasts, the first signal to stop lets the fit finish its step; only a main thread listens."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if state.team.size > 1:  # the others have to stop at the same step
            state.team.asked = True
        else:
            state.stopped = "signal"
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _adapt(state: State, source: Any, plan: Plan, progress: bool) -> None:
    """Place a guide that takes no steps."""
    begun = time.perf_counter()
    state.finish |= adapt(state.bound, source, plan.seed, progress)
    state.stopped, state.wall_s = "weights", state.wall_s + time.perf_counter() - begun


def _finish(state: State, source: Any, plan: Plan) -> None:
    """Finish the globals on the full marginal, where estimator and guide allow it.

    Many rows make their posterior normal: Newton finds its mode and covariance. Of few rows it is skewed, and
    an evaluation is cheap: adaptive importance sampling finds its mean and covariance.
    """
    bound = state.bound
    with _sampling(state), torch.no_grad():
        module = marginal.global_module(bound)
        if not plan.newton or module is None or prepare(bound, bound.example, plan).estimator != "marginal":
            return
    rows, n = _rows_of(bound, source, plan), source.sizes[bound.template.row_dims[0]]
    with _sampling(state):
        if n <= FEW_ROWS:
            found = polish(bound, rows, plan.nodes)
            told: dict[str, Any] = {"method": "importance sampling", "draws": len(found.points)}
            told |= {"ess": found.ess, "log_weight": list(found.log_weight), "points": found.points.tolist()}
        else:
            dims = marginal.layout(bound, bound.example).dims
            work = n * marginal.n_nodes(dims, marginal.summing_nodes(dims, plan.nodes))
            gradient = Passes(bound, module, plan, work)
            found = marginal.newton_finish(bound, rows, plan.nodes, gradient=gradient)
            told = {"method": "newton", "steps": found.steps, "step_sd": found.step_sd, "nodes": found.nodes}
            told |= {"node_error_sd": found.node_error_sd, "log_evidence": found.log_evidence}
    moved = (found.loc - module.loc.detach()) / found.covariance.diagonal().sqrt()
    module.set(found.loc, found.covariance)
    if "log_weight" not in told:
        with _sampling(state), torch.no_grad():
            theta = module.distribution().sample((WEIGHED_DRAWS,))
            weight = weigh_globals(bound, source, theta, WEIGHED_NODES)
        told |= {} if weight is None else {"log_weight": weight.tolist()}
    state.finish |= {**told, "moved_sd": float(moved.abs().max())}


def _rows_of(bound: Bound, source: Any, plan: Plan) -> marginal.Rows:
    """Passes over all rows, and over as many as curvature and fine nodes are worth."""
    n = source.sizes[bound.template.row_dims[0]]
    dims = marginal.layout(bound, bound.example).dims
    coarse = marginal.n_nodes(dims, marginal.summing_nodes(dims, plan.nodes))
    most = MOST_FINE_NODES // marginal.n_nodes(dims, 2 * plan.nodes + 1)
    some = min(n, max(1, most), max(FINISH_ROWS, FINISH_NODES // coarse))
    return marginal.Rows(_spread_rows(source, bound, n), _spread_rows(source, bound, some), n / some)


def identity_of(template: Template, source: Any, plan: Plan) -> dict[str, Any]:
    """What a resumed fit must share with the one that was begun."""
    free = {"save_every_s", "device"}
    made = template.made and [template.made[0], dict(template.made[1])]
    return {
        "template": template.name,
        "made": made,
        "prior": template.prior_numbers(),
        "plan": {k: v for k, v in plan.to_dict().items() if k not in free},
        "data": {"fingerprint": source.fingerprint, "sizes": dict(source.sizes)},
    }


def frozen(state: State, source: Any, plan: Plan, identity: Mapping[str, Any]) -> Fit:
    """The finished fit of a state that has taken its last step."""
    template, finish = state.bound.template, dict(state.finish)
    points = finish.pop("points", None)  # too many for the provenance, which every posterior carries
    ended = {
        "stopped": state.stopped,
        "steps": state.step,
        "wall_s": round(state.wall_s, 3),
        "restarts": state.restarts,
        "finish": finish,
        "engine": state.engine,
        "processes": state.team.size,
        "estimator": prepare(state.bound, state.bound.example, plan).estimator if state.learns else None,
    }
    provenance = {
        **identity,
        "weights": dict(state.bound.weights),
        "plan": plan.to_dict(),
        "seed": plan.seed,
        "device": plan.device,
        "versions": versions(),
        "fit": ended,
    }
    coords = {d: plain_labels(source.coords[d]) for d in source.sizes if d not in template.row_dims}
    coords |= {d: list(labels) for d, labels in template.coords.items()}
    seen, features = _seen(state, source, plan)
    population = None if points is None else torch.tensor(points).double()
    history = _history(state.history)
    return Fit(freeze(state.bound), coords, plan, history, provenance, seen, features, population)


def _history(entries: list[dict[str, float]]) -> xr.Dataset:
    """The history as a dataset over "log"; a part that came later is NaN before."""
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    columns = {n: ("log", np.array([e.get(n, np.nan) for e in entries])) for n in names}
    history = xr.Dataset(columns, {"log": np.arange(len(entries))})
    for name in history.data_vars:
        if str(name).startswith(("part_", "objective")):
            history[name].attrs["units"] = "nat / row"
    return history


def _seen(state: State, source: Any, plan: Plan) -> tuple[dict[str, torch.Tensor], Features]:
    """Smallest and largest value of each field along the rows, and features of some rows."""
    template, seen = state.bound.template, {}
    seed = stream_seed(plan.seed, "sampling")  # numpy's generator: torch's of that stream is another
    sample = Sample(template.told, template.row_dims[0], source.sizes, seed)
    some = next(iter(state.bound.example.values.values()))
    size = rows_at_once(state.bound, template.row_dims[0], _SEEN_DRAWS)
    for batch in chunks(source, template.fields, template.row_dims, size, torch.device("cpu"), some.dtype):
        sample.add(batch)
        for name, declared in template.fields.items():
            axes = [i for i, d in enumerate(declared.dims) if d in template.row_dims]
            if not axes:
                continue
            mask = batch.observed_mask.get(name)
            value = batch.values[name]
            low = value if mask is None else value.masked_fill(~mask, torch.inf)
            high = value if mask is None else value.masked_fill(~mask, -torch.inf)
            low, high = low.amin(axes), high.amax(axes)
            seen[f"{name}.min"] = torch.minimum(seen.get(f"{name}.min", low), low)
            seen[f"{name}.max"] = torch.maximum(seen.get(f"{name}.max", high), high)
    return seen, sample.features(source.coords)
