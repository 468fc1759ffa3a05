"""Many fits of one template take their steps side by side, each in a slot of one batched function.

The step of one fit is captured as a graph of tensor operations (``capture``), and that graph is run for a
slot's tensors stacked along a new first axis. Slots share nothing: each has its parameters, moments, noise,
learning rate and window. A fit that has ended leaves its slot to the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scivi.errors import Unsupported
from scivi.inference.capture import captured, compiled, largest_of, stacked
from scivi.inference.flat import Flat
from scivi.inference.objective import prepare
from scivi.inference.plan import Plan
from scivi.inference.scores import quiet
from scivi.inference.sets import DataSets
from scivi.inference.step import read_window, update
from scivi.inference.stepper import CLOSE, PATIENCE
from scivi.inference.stopping import levelled
from scivi.models.binding import seeded, stream_seed

# Our choice. Of a linear regression a call takes, on one thread, 19 and 8 us a fit with 256 and 1000 slots as
# captured, 1.6 and 1.4 us compiled; slots of fits that have ended are waste once no other waits.
MOST_SLOTS = {"captured": 1024, "compiled": 256, "cuda": 2**15}
NUMBERS_AT_ONCE = 2**24  # in the largest tensor of a call (our choice: 64 MB as float32)
CHECKED = 3  # data sets on which the captured step is compared with the eager one (our choice)


@dataclass
class Course:
    """How each of many fits went; all arrays lead with the fits.

    Args:
        columns: names of the history's columns.
        history: (fit, entry, column), NaN after the last entry.
        step: steps taken, (fit,).
        decay_from: step at which the stop rule began the final fall of the learning rate, or 0.
        stopped: why each ended; empty while it runs.
        restarts: by fit, the steps at which it diverged.
        values: learnt numbers and buffers by name, (fit, *shape).
        engine: how steps were taken.
        wall_s: seconds, of all fits together.
    """

    columns: tuple[str, ...]
    history: np.ndarray
    step: np.ndarray
    decay_from: np.ndarray
    stopped: np.ndarray
    restarts: dict[int, list[int]]
    values: dict[str, Tensor] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0

    @classmethod
    def of(cls, n: int, plan: Plan, columns: Sequence[str]) -> Course:
        """Before the first step."""
        entries = math.ceil(plan.steps / plan.log_every)
        return cls(
            columns=tuple(columns),
            history=np.full((n, entries, len(columns)), np.nan),
            step=np.zeros(n, int),
            decay_from=np.zeros(n, int),
            stopped=np.full(n, "", dtype="<U16"),
            restarts={},
        )

    def column(self, name: str) -> np.ndarray:
        """A column of the history, (fit, entry)."""
        return self.history[..., self.columns.index(name)]

    def last(self, plan: Plan) -> np.ndarray:
        """Step at which each fit ends, as far as is known."""
        return np.where(self.decay_from > 0, np.minimum(plan.steps, 2 * self.decay_from), plan.steps)

    @property
    def lr_factor(self) -> np.ndarray:
        """Product of the halvings after divergences, (fit,)."""
        factor = np.ones(len(self.step))
        for fit, steps in self.restarts.items():  # few diverge
            factor[fit] = 0.5 ** len(steps)
        return factor


@dataclass
class _Run:
    """Where the slots stand.

    Args:
        at: the fit in each slot, -1 for none.
        waiting: the first fit that has had no slot yet.
        own: flat tensors and buffers of the slots.
        window: sums since each slot's last entry, (slot, name).
        good: ``own`` at that entry.
        good_step: step of that entry, (fit,).
        data: tensors of the slots' data sets.
        final: ``own`` of every fit that has ended.
    """

    at: np.ndarray
    waiting: int
    own: list[Tensor]
    window: Tensor
    good: list[Tensor]
    good_step: np.ndarray
    data: list[Tensor]
    final: list[Tensor]


class Slots:
    """A captured step of one fit, run for as many fits at once as there are slots.

    Args:
        sets: the data.
        plan: of every fit.

    Raises:
        Unsupported: the pair cannot be captured, or the captured step differs from the eager one for some of
            the data.
    """

    def __init__(self, sets: DataSets, plan: Plan) -> None:
        self.sets, self.plan = sets, plan
        self.state = sets.begin(0, plan)
        self.objective = prepare(self.state.bound, self.state.bound.example, plan)
        self.flat = Flat(self.state)
        self.device = self.flat.device
        begun = time.perf_counter()
        with seeded(0, self.device), torch.no_grad(), quiet():
            parts = self.objective.evaluate(self.state.bound.example).parts
        self.memo: dict[tuple[int, int, int], Tensor] = {}
        self.start = self.flat.read(self.state)  # of every fit
        self.names = ("objective", "square", "grad_norm", *(f"part_{name}" for name in parts), "n")
        with seeded(0, self.device), quiet():
            graph = self._capture()
            self._compare(graph)
            self._build(graph)
        self.engine["seconds"] = round(time.perf_counter() - begun, 2)
        told = [name for name in self.names if name not in ("square", "n")]
        self.course = Course.of(
            len(sets), plan, ["step", "lr", "beta", *told, "objective_sd", "window_steps"]
        )

    def _arguments(self, own: Sequence[Tensor], data: Sequence[Tensor]) -> list[Tensor]:
        window = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        return [*own, window, self._numbers(0, 0, 1)[0], *data]

    def _capture(self) -> torch.fx.GraphModule:
        n_own, form = len(self.start), self.sets.form

        def one(*arguments: Tensor) -> tuple[Tensor, ...]:
            own, (window, numbers, *data) = list(arguments[:n_own]), arguments[n_own:]
            own, told = self.flat.step(self.objective, form.filled(data)[0], own, numbers)
            return (*own, window + told)

        parameters = list(self.state.bound.nets.parameters())
        return captured(one, self._arguments(self.start, form.tensors), owned=parameters)

    def _compare(self, graph: torch.fx.GraphModule) -> None:
        """Refuse a graph that holds on to what belongs to the data set of its capture."""
        n, close = len(self.sets), CLOSE[self.flat.dtype]
        for place in sorted({*np.linspace(0, n - 1, CHECKED, dtype=int).tolist()}):
            state = self.sets.begin(place, self.plan)
            self.flat.write(self.start, state)
            data = [t if one else t[0] for t, one in self._pairs(self.sets.at(torch.tensor([place])))]
            with seeded(place, self.device):
                ours = graph(*self._arguments(self.start, data))[len(self.start)]
            with seeded(place, self.device):
                objective = prepare(state.bound, state.bound.example, self.plan)
                update(state, objective, self.plan)
            eager, found = read_window(state.window), dict(zip(self.names, ours.tolist(), strict=True))
            for name in ("objective", "grad_norm"):
                both = math.isfinite(eager[name]) or math.isfinite(found[name])
                if both and not abs(eager[name] - found[name]) <= close * (1 + abs(eager[name])):
                    raise Unsupported(
                        f"the step captured of the first data set gives {name} {found[name]:.8g} for number "
                        f"{place}, where it is {eager[name]:.8g}: model or guide keep something of the data "
                        f"that they were bound to"
                    )

    def _pairs(self, data: Sequence[Tensor]) -> list[tuple[Tensor, bool]]:
        return list(zip(data, self.sets.shared, strict=True))

    def _build(self, graph: torch.fx.GraphModule) -> None:
        """The graph for all slots together, compiled where that pays."""
        calls = self.plan.steps * math.ceil(len(self.sets) / MOST_SLOTS["captured"])
        pays = self.plan.compile == "on" or (self.plan.compile == "auto" and calls >= 2 * PATIENCE)
        how = "compiled" if pays else "captured"
        most = MOST_SLOTS["cuda" if self.device.type == "cuda" else how]
        self.n = min(len(self.sets), most, max(1, NUMBERS_AT_ONCE // largest_of(graph)))
        shared = [*[False] * (len(self.start) + 2), *self.sets.shared]
        some = self._arguments(self.start, self.sets.form.tensors)
        some = [t if one else torch.stack([t] * self.n) for t, one in zip(some, shared, strict=True)]
        function: Callable[..., Sequence[Tensor]] = stacked(graph, shared)
        batched = captured(function, some)
        self.function, how = compiled(batched, some) if pays else (batched, how)
        self.engine: dict[str, Any] = {"steps": how, "fits_at_once": self.n}

    def _numbers(self, step: int, decay_from: int, n: int) -> Tensor:
        """Step length, Adam's root and KL weight of the next steps of a fit that never diverged, (n, 3)."""
        plan, fall, key = self.plan, decay_from or None, (step, decay_from, n)
        if key not in self.memo:  # fits that begin later come to the same place
            rows = [
                (*self.flat.corrections(plan.lr_at(k, fall, fall), k), plan.beta_at(k))
                for k in range(step, step + n)
            ]
            self.memo[key] = torch.tensor(rows, dtype=torch.float64, device=self.device)
        return self.memo[key]

    def run(self, progress: bool, title: str) -> Course:
        """Fit them all."""
        begun, course = time.perf_counter(), self.course
        with (
            seeded(stream_seed(self.plan.seed, "sampling"), self.device),
            quiet(),
            tqdm(total=len(self.sets), disable=not progress, desc=title, unit="fit") as bar,
        ):
            final = self._run(bar)
        flat, *buffers = final[0], *final[self.flat.n_flat :]
        parts = flat.split(self.flat.sizes, 1)
        course.values = {
            name: part.reshape(len(part), *shape)
            for name, part, shape in zip(self.flat.names, parts, self.flat.shapes, strict=True)
        } | dict(zip(self.flat.buffers, buffers, strict=True))
        course.engine, course.wall_s = self.engine, time.perf_counter() - begun
        return course

    def _run(self, bar: Any) -> list[Tensor]:
        """The flat tensors and buffers of every fit at its end."""
        final = [t.expand(len(self.sets), *t.shape).clone() for t in self.start]
        own, at = [t[: self.n].clone() for t in final], np.arange(self.n)
        window = torch.zeros(self.n, len(self.names), dtype=torch.float64, device=self.device)
        good, data = [t.clone() for t in own], self.sets.at(torch.as_tensor(at))
        run = _Run(at, self.n, own, window, good, np.zeros(len(self.sets), int), data, final)
        while (run.at >= 0).any():
            due = self._advance(run)
            sums = run.window[self._on(due)].cpu().numpy()
            looked_at = [self.names.index(name) for name in ("objective", "grad_norm")]
            fine = np.isfinite(sums[:, looked_at]).all(1)
            self._go_back(run, due[~fine])
            self._log(run.at[due[fine]], sums[fine])
            self._keep(run, due[fine])
            run.window = run.window.index_fill(0, self._on(due), 0.0)
            free = due[self.course.stopped[run.at[due]] != ""]
            self._replace(run, free)
            bar.update(len(free))
        return run.final

    def _on(self, places: np.ndarray) -> Tensor:
        return torch.as_tensor(places, device=self.device)

    def _advance(self, run: _Run) -> np.ndarray:
        """Take steps until a fit comes to an entry of its history; the slots of all that have."""
        course, log_every = self.course, self.plan.log_every
        slots = np.flatnonzero(run.at >= 0)
        fits, ends = run.at[slots], course.last(self.plan)[run.at[slots]]
        most = int(np.minimum(log_every - course.step[fits] % log_every, ends - course.step[fits]).min())
        for numbers in self._all_numbers(run.at, most):
            *run.own, run.window = self.function(*run.own, run.window, numbers, *run.data)
        course.step[fits] += most
        return slots[(course.step[fits] % log_every == 0) | (course.step[fits] >= ends)]

    def _keep(self, run: _Run, slots: np.ndarray) -> None:
        """What a later divergence goes back to."""
        for now, before in zip(run.own, run.good, strict=True):
            before[self._on(slots)] = now[self._on(slots)]
        run.good_step[run.at[slots]] = self.course.step[run.at[slots]]

    def _go_back(self, run: _Run, slots: np.ndarray) -> None:
        """After a divergence: back to the last good entry with half the learning rate, or give up."""
        course = self.course
        for fit in run.at[slots].tolist():  # few diverge
            again = course.restarts.setdefault(fit, [])
            again.append(int(course.step[fit]))
            if len(again) > self.plan.restarts:
                course.stopped[fit] = "diverged"
        course.step[run.at[slots]] = run.good_step[run.at[slots]]
        for now, before in zip(run.own, run.good, strict=True):
            now[self._on(slots)] = before[self._on(slots)]

    def _replace(self, run: _Run, slots: np.ndarray) -> None:
        """Put the results of ended fits away, and begin others in their slots."""
        for total, now in zip(run.final, run.good, strict=True):
            total[self._on(run.at[slots])] = now[self._on(slots)]
        run.at[slots] = -1
        fits = np.arange(run.waiting, min(len(self.sets), run.waiting + len(slots)))
        if not len(fits):
            return
        run.waiting, slots = run.waiting + len(fits), slots[: len(fits)]
        run.at[slots] = fits
        for now, before, first in zip(run.own, run.good, self.start, strict=True):
            now[self._on(slots)] = before[self._on(slots)] = first
        fresh = self.sets.at(self._on(fits))
        run.data = [
            old if one else old.index_copy(0, self._on(slots), new)
            for (old, one), new in zip(self._pairs(run.data), fresh, strict=True)
        ]

    def _all_numbers(self, at: np.ndarray, n: int) -> Tensor:
        """``_numbers`` of every slot, (n, slot, 3); a slot that nobody uses stands still."""
        course = self.course
        keys = np.stack([course.step[at], course.decay_from[at]], 1)
        unique, which = np.unique(keys, axis=0, return_inverse=True)
        numbers = torch.stack([self._numbers(s, d, n) for s, d in unique.tolist()], 1)
        numbers = numbers[:, torch.as_tensor(which.reshape(-1), device=self.device)]
        factor = torch.as_tensor(np.where(at >= 0, course.lr_factor[at], 0.0), device=self.device)
        return torch.cat([numbers[..., :1] * factor[:, None], numbers[..., 1:]], -1)

    def _log(self, fits: np.ndarray, sums: np.ndarray) -> None:
        """An entry of the history for some fits, and the question whether they have reached their end."""
        course, plan = self.course, self.plan
        if not len(fits):
            return
        mean = sums / sums[:, -1:]
        square, n = mean[:, self.names.index("square")], sums[:, -1]
        spread = np.maximum(0.0, square - mean[:, self.names.index("objective")] ** 2)
        entry = (course.step[fits] - 1) // plan.log_every
        told = {name: mean[:, k] for k, name in enumerate(self.names)}
        told |= {"objective_sd": np.sqrt(spread * n / np.maximum(1.0, n - 1)), "window_steps": n}
        told |= {"step": course.step[fits], **self._rates(fits)}
        for k, name in enumerate(course.columns):
            course.history[fits, entry, k] = told[name]
        rule = plan.stop
        if rule is not None:
            asked = fits[course.decay_from[fits] == 0]
            columns = ("step", "objective", "objective_sd", "window_steps")
            level = levelled(rule, *(course.column(name)[asked] for name in columns))
            course.decay_from[asked[level]] = course.step[asked[level]]  # as long again
        ended = fits[course.step[fits] >= course.last(plan)[fits]]
        course.stopped[ended] = np.where(course.decay_from[ended] > 0, "plateau", "steps")

    def _rates(self, fits: np.ndarray) -> dict[str, np.ndarray]:
        """Learning rate and KL weight at the last step of some fits."""
        course, plan = self.course, self.plan
        keys = np.stack([course.step[fits], course.decay_from[fits]], 1)
        unique, which = np.unique(keys, axis=0, return_inverse=True)
        lr = np.array([plan.lr_at(s - 1, d or None, d or None) for s, d in unique.tolist()])
        beta = np.array([plan.beta_at(s - 1) for s, _ in unique.tolist()])
        which = which.reshape(-1)
        return {"lr": course.lr_factor[fits] * lr[which], "beta": beta[which]}
