"""``train``: a generator that fits step by step; ``fit``: the same, run to its end and frozen."""

from __future__ import annotations

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
from tqdm.auto import tqdm

from scivi.errors import FitError
from scivi.inference.adapt import adapt
from scivi.inference.ending import frozen, identity_of
from scivi.inference.finish import finish_globals, globals_alone, start_globals
from scivi.inference.objective import Objective, prepare
from scivi.inference.opening import begin, open_measured
from scivi.inference.plan import Plan
from scivi.inference.reach import unseen
from scivi.inference.recorder import Recorder, recorder_for
from scivi.inference.state import Fit, State, load_state, save_state
from scivi.inference.step import diagnose, is_finite, read_window, signal_to_noise
from scivi.inference.stepper import stepper_for
from scivi.inference.stopping import levelled
from scivi.models.mixtures import AdaptedGuide
from scivi.models.template import Template


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
    with state.sampling():
        objective = prepare(state.bound, state.bound.example, plan)
        if objective.estimator == "marginal" and plan.newton:
            if state.step == 0:
                _by_first(state, lambda: start_globals(state, source, plan))
            if "start" in state.finish and globals_alone(state.bound):  # the finish finds them: few steps do
                plan = replace(plan, steps=min(plan.steps, plan.log_every))
                state.finish["alone"] = True
        stepper = stepper_for(state, objective, plan)
    if state.good is None or not state.window:  # resumed between two entries, it keeps the one before
        state.good = state.pack()
    waited = 0.0
    while not (state.stopped or _ended(state, plan)):
        state.feed.waited()  # for batches that were read beside the steps, which their time does not hold
        begun, first = time.perf_counter(), state.step
        state.team.deadline = begun + plan.save_every_s
        with state.sampling():
            while not (_ended(state, plan) or state.stopped):
                stepper.take(state, _room(state, plan))
                if state.step % plan.log_every == 0 or state.team.due:
                    break
            stepper.settle(state)
        state.engine = stepper.told
        elapsed = time.perf_counter() - begun
        state.wall_s += elapsed
        waited += state.feed.waited()
        if not is_finite(state.window):
            _go_back(state, objective, plan, state.good)
            continue
        now = read_window(state.window)
        if state.step % plan.log_every == 0 or _ended(state, plan):
            _log(state, plan, now, waited)
            state.window, waited = {}, 0.0
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


def _last(state: State, plan: Plan) -> int:
    """Step at which the fit ends, as far as is known."""
    if state.decay_from is not None and state.decay_steps is not None:
        return min(plan.steps, state.decay_from + state.decay_steps)
    return plan.steps


def _room(state: State, plan: Plan) -> int:
    """Steps until the next entry of the history, or the end."""
    return min(_last(state, plan) - state.step, plan.log_every - state.step % plan.log_every)


def _ended(state: State, plan: Plan) -> bool:
    return state.step >= _last(state, plan)


def _log(state: State, plan: Plan, now: Mapping[str, float], waited: float) -> None:
    first = state.bound.template.row_dims[0]
    since = state.history[-1]["wall_s"] if state.history else 0.0
    extra = {
        "step": state.step,
        "lr": state.lr_factor * plan.lr_at(state.step - 1, state.decay_from, state.decay_steps),
        "beta": plan.beta_at(state.step - 1),
        "rows_per_batch": state.feed.size_of(first) or state.feed.sizes[first],
        "signal_to_noise": signal_to_noise(state.optimiser),
        "wall_s": state.wall_s,
        "loader_share": waited / (state.wall_s - since),
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
    with state.sampling():
        error = diagnose(state, objective, plan, steps)
    state.unpack(*good)
    state.wall_s = wall_s
    state.restarts = [*restarts, {"step": error.step, "site": error.site, "rows": list(error.rows[:20])}]
    state.lr_factor, state.stopped = 0.5 ** len(state.restarts), stopped  # a signal to stop holds
    if len(state.restarts) > plan.restarts:
        state.stopped = "diverged"
        what = str(error)
        if plan.restarts:
            what += f" {plan.restarts} restarts with ever smaller learning rates did not help."
        raise FitError(what, step=error.step, site=error.site, rows=error.rows, state=state)


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
                begun = time.perf_counter()
                _by_first(state, lambda: finish_globals(state, source, plan))
                bar.set_postfix_str("looking beyond the guide")
                _by_first(state, lambda: state.finish.update(unseen(state.bound, source, plan.seed)))
                state.wall_s += time.perf_counter() - begun
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
