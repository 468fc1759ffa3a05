"""How steps are taken: one by one by torch's optimiser, or several at a time by one compiled function.

The compiled function has the numbers of the eager step: it starts from the same parameters, draws the same
random numbers and follows the formulas of the same optimiser, so that a fit may pass from one to the other at
any step. It is compared with the eager step before it is trusted, and again while it runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from scivi.errors import FitError, Unsupported
from scivi.inference.capture import captured, compiled
from scivi.inference.flat import Flat
from scivi.inference.objective import Objective
from scivi.inference.plan import Plan
from scivi.inference.state import State
from scivi.inference.step import random_states, read_window, restore_random, update
from scivi.inputs.batches import Batch, take
from scivi.models.binding import seeded

PATIENCE = 1000  # steps before "auto" compiles, and at least to come (our choice: it takes 5 to 30 s, once)
MOST_OPERATIONS = 2000  # in one graph; compile time grows with them (our choice: some 20 s)
MOST_STEPS = 10  # in one graph (our choice: by then a call's overhead is shared out)
CHECK_AFTER = 500  # steps until the next comparison with the eager step, then twice as many, ... (our choice)
KEPT = 4  # compiled functions that a template keeps (our choice)
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-8}  # of objective and gradient norm, relative (our choice)


class Stepper(Protocol):
    """Takes steps of a fit."""

    @property
    def told(self) -> dict[str, Any]:
        """How, and why so, for the provenance."""
        ...

    def take(self, state: State, most: int) -> None:
        """Take at least one step and at most so many."""
        ...

    def settle(self, state: State) -> None:
        """Bring the state up to date with the steps taken."""
        ...


def stepper_for(state: State, objective: Objective, plan: Plan) -> Stepper:
    """The stepper that a plan asks for; where the pair cannot be captured, the eager one."""
    if plan.compile == "off":
        return Eager(objective, plan)
    if state.team.size > 1:
        return Eager(objective, plan, f"{state.team.size} processes take them together")
    if plan.compile == "on":
        return _compiled(state, objective, plan)
    if plan.steps < 2 * PATIENCE:
        return Eager(objective, plan, f"a plan of {plan.steps} steps does not repay compiling")
    return Patient(objective, plan)


def _compiled(state: State, objective: Objective, plan: Plan) -> Stepper:
    try:
        return Compiled(state, objective, plan)
    except Unsupported as refusal:
        return Eager(objective, plan, str(refusal))


class Eager:
    """One step at a time, by torch's optimiser.

    Args:
        objective, plan: of the fit.
        why: why it is not compiled, if that was wanted.
    """

    def __init__(self, objective: Objective, plan: Plan, why: str = "") -> None:
        self.objective, self.plan = objective, plan
        self.why = why

    @property
    def told(self) -> dict[str, Any]:
        """How, and why so."""
        return {"steps": "eager"} | ({"why": self.why} if self.why else {})

    def take(self, state: State, most: int) -> None:
        """Take one step."""
        update(state, self.objective, self.plan)

    def settle(self, state: State) -> None:
        """Every step leaves the state up to date."""


class Patient:
    """Eager at first, and compiled once a thousand steps are taken: most fits have stopped by then.

    It counts steps, and looks at no clock, so that equal fits stay equal.

    Args:
        objective, plan: of the fit.
    """

    def __init__(self, objective: Objective, plan: Plan) -> None:
        self.objective, self.plan = objective, plan
        self.eager = Eager(objective, plan, f"it stopped before {PATIENCE} steps")
        self.later: Stepper | None = None

    @property
    def told(self) -> dict[str, Any]:
        """How, so far."""
        return self.eager.told if self.later is None else self.later.told

    def take(self, state: State, most: int) -> None:
        """Take a step, or as many as the compiled function has."""
        if state.step < PATIENCE:
            self.settle(state)
            self.eager.take(state, most)
            return
        if self.later is None:
            self.later = _compiled(state, self.objective, self.plan)
        self.later.take(state, most)

    def settle(self, state: State) -> None:
        """Bring the state up to date with the steps taken."""
        if self.later is not None:
            self.later.settle(state)


@dataclass(frozen=True)
class Form:
    """A batch, or the resident table, and places of rows, as the arguments of a compiled function.

    Args:
        like: whose fields and masks are arguments.
        index: places of rows by row dim, arguments too.
    """

    like: Batch
    index: Mapping[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """The arguments: fields, masks, places."""
        return [*self.like.values.values(), *self.like.observed_mask.values(), *self.index.values()]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for forms that one function can serve."""
        names = (tuple(self.like.values), tuple(self.like.observed_mask), tuple(self.index))
        return (*names, *sorted(self.like.sizes.items()), *(kind(t) for t in self.tensors))

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Batch, dict[str, Tensor]]:
        """The batch, without an index, and the places, with other tensors in their stead."""
        rest = iter(tensors)
        values, masks, index = (
            {name: next(rest) for name in names}
            for names in (self.like.values, self.like.observed_mask, self.index)
        )
        return replace(self.like, values=values, observed_mask=masks), index


def kind(tensor: Tensor) -> tuple[Any, ...]:
    """What compiled code fixes of an argument: shape, dtype and device."""
    return (tuple(tensor.shape), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Ready:
    """A function that takes steps.

    Args:
        function: of flat tensors, window, numbers and data, to flat tensors and window.
        how: "compiled" or "captured".
        at_once: steps that a call takes.
        form: key of the data's form.
    """

    function: Callable[..., Sequence[Tensor]]
    how: str
    at_once: int
    form: tuple[Any, ...]


class Compiled:
    """Steps as one compiled function of flat tensors; rows of resident data are taken inside.

    Args:
        state: of the fit, before the next step; left as it is.
        objective, plan: of the fit.

    Raises:
        Unsupported: the pair cannot be captured, or the compiled steps differ from the eager ones.
    """

    def __init__(self, state: State, objective: Objective, plan: Plan) -> None:
        self.objective, self.plan, self.feed = objective, plan, state.feed
        self.eager, self.flat = Eager(objective, plan), Flat(state)
        self.own: list[Tensor] | None = None  # the flat tensors, while they are ahead of the state
        self.window = torch.zeros(())
        self.names = self._names(state)
        begun = time.perf_counter()
        self._build(state)
        self.check_at = state.step + CHECK_AFTER
        self.seconds = round(time.perf_counter() - begun, 2)

    @property
    def told(self) -> dict[str, Any]:
        """How, how many at once, and how long it took to compile."""
        return {"steps": self.ready.how, "at_once": self.ready.at_once, "compile_s": self.seconds}

    def _names(self, state: State) -> list[str]:
        """What the window takes in at each step."""
        before = state.pack()  # a run may change buffers
        with seeded(0, self.flat.device), torch.no_grad():
            parts = self.objective.evaluate(self.objective.bound.example).parts
        state.unpack(*before)
        return ["objective", "square", "grad_norm", *(f"part_{name}" for name in parts), "n"]

    def _build(self, state: State) -> None:
        """Have a function for the present size of batch: the template's, if it serves, or a new one."""
        memo, key = state.bound.template.memo, self._key(state)
        if key in memo:
            self.ready = memo[key]
            if not self._differences(state):
                return
        memo.pop(key, None)
        self.ready = self._compile(state)
        if found := self._differences(state):
            raise Unsupported(f"the compiled steps differ from the eager ones: {'; '.join(found)}")
        memo[key] = self.ready
        while len(memo) > KEPT:
            del memo[next(iter(memo))]

    def _key(self, state: State) -> tuple[Any, ...]:
        """All that a graph fixes and that may differ between fits of one template."""
        cursor = self.feed.state()
        form = Form(*self.feed.ahead(1))
        self.feed.restore(cursor)
        batch = (form.key, self.feed.resident)
        knobs = ("particles", "nodes", "clip", "optimiser", "dtype", "device", "log_every")
        plan = tuple(getattr(self.plan, name) for name in knobs)
        parameters = (*self.flat.names, *self.flat.shapes, *self.flat.buffers)
        return (batch, plan, parameters, self.objective.estimator, self.objective.layout)

    def _compile(self, state: State) -> Ready:
        """Capture and compile."""
        owned, at_once = list(state.bound.nets.parameters()), 1
        random = random_states(self.flat.device)
        try:
            while True:  # the first graph tells how large one step is
                form, arguments = self._peek(state, at_once)
                graph = captured(self._function(form, at_once), arguments, owned=owned)
                if at_once > 1 or not self.feed.resident:
                    break
                at_once = _steps_at_once(len(graph.graph.nodes), self.plan.log_every)
                if at_once == 1:
                    break
            function, how = compiled(graph, arguments)
        finally:
            restore_random(random)  # a capture is a run, which draws, also when it is refused
        return Ready(function, how, at_once, form.key)

    def _peek(self, state: State, steps: int) -> tuple[Form, list[Tensor]]:
        """The arguments for the next steps; the feed stays where it is."""
        cursor = self.feed.state()
        own = self.flat.read(state)
        form = Form(*self.feed.ahead(steps))
        self.feed.restore(cursor)
        window = torch.zeros(len(self.names), dtype=torch.float64, device=self.flat.device)
        return form, [*own, window, self._numbers(state, steps), *form.tensors]

    def _numbers(self, state: State, steps: int) -> Tensor:
        """Step length, Adam's root and KL weight of the next steps, (steps, 3)."""
        rows = []
        for step in range(state.step, state.step + steps):
            lr = state.lr_factor * self.plan.lr_at(step, state.decay_from, state.decay_steps)
            rows.append((*self.flat.corrections(lr, step), self.plan.beta_at(step)))
        return torch.tensor(rows, dtype=torch.float64, device=self.flat.device)

    def _function(self, form: Form, steps: int) -> Callable[..., Sequence[Tensor]]:
        """So many steps as a function of tensors alone."""
        n_own = self.flat.n_flat + len(self.flat.buffers)

        def function(*arguments: Tensor) -> tuple[Tensor, ...]:
            own, (window, numbers, *data) = list(arguments[:n_own]), arguments[n_own:]
            table, places = form.filled(data)
            for k in range(steps):
                index = {row: of[k] for row, of in places.items()}
                batch = take(table, index, self.feed.fields) if self.feed.resident and index else table
                batch = replace(batch, index=index)
                own, told = self.flat.step(self.objective, batch, own, numbers[k])
                window = window + told
            return (*own, window)

        return function

    def take(self, state: State, most: int) -> None:
        """Take as many steps as the function has; one eager one where that is too many."""
        if most < self.ready.at_once or state.step % self.ready.at_once:
            self.settle(state)
            self.eager.take(state, most)
            return
        if state.step >= self.check_at:
            self._check(state)
        self._run(state)

    def _run(self, state: State) -> None:
        cursor = self.feed.state()
        form = Form(*self.feed.ahead(self.ready.at_once))
        if form.key != self.ready.form:  # another size of batch, or other fields with missing entries
            self.feed.restore(cursor)
            self.settle(state)
            self._build(state)
            form = Form(*self.feed.ahead(self.ready.at_once))
        if self.own is None:
            self.own = self.flat.read(state)
            self.window = torch.zeros(len(self.names), dtype=torch.float64, device=self.flat.device)
            if state.window:
                self.window = torch.stack([state.window[name] for name in self.names])
        numbers = self._numbers(state, self.ready.at_once)
        *self.own, self.window = self.ready.function(*self.own, self.window, numbers, *form.tensors)
        state.step += self.ready.at_once

    def settle(self, state: State) -> None:
        """Copy what the function changed back into modules, optimiser and window."""
        if self.own is not None:
            self.flat.write(self.own, state)
            state.window = dict(zip(self.names, self.window.unbind(), strict=True))
            self.own = None

    def _check(self, state: State) -> None:
        self.settle(state)
        if found := self._differences(state):
            raise FitError(
                f"at step {state.step} the compiled steps differ from the eager ones: {'; '.join(found)}. "
                f"Something other than batch, prior and nets has changed since the fit began, which a "
                f'compiled step does not see. Make it a field or a prior, or use Plan(compile="off").',
                step=state.step,
                state=state,
            )
        self.check_at = 2 * state.step

    def _differences(self, state: State) -> list[str]:
        """How the next steps differ when they are taken in both ways from here; the state stays as it is."""
        (eager, eager_buffers), (ours, our_buffers) = self._trial(state, True), self._trial(state, False)
        close = CLOSE[self.flat.dtype]
        found = [
            f"{name} {eager[name]:.8g} against {ours[name]:.8g}"
            for name in ("objective", "grad_norm")
            if math.isfinite(eager[name]) or math.isfinite(ours[name])  # a fit that diverges does so in both
            if not abs(eager[name] - ours[name]) <= close * (1 + abs(eager[name]))
        ]
        pairs = zip(eager_buffers, our_buffers, strict=True)
        return found + ["a buffer of the nets" for a, b in pairs if not torch.allclose(a, b, rtol=close)][:1]

    def _trial(self, state: State, eagerly: bool) -> tuple[dict[str, float], list[Tensor]]:
        """The next steps' numbers and the buffers after them; state and random stream are put back."""
        tensors, plain = state.pack()
        random = random_states(self.flat.device)
        state.window = {}
        if eagerly:
            for _ in range(self.ready.at_once):
                update(state, self.objective, self.plan)
        else:
            self._run(state)
            self.settle(state)
        found = read_window(state.window), [b.clone() for b in state.bound.nets.buffers()]
        state.unpack(tensors, plain)
        restore_random(random)
        return found


def _steps_at_once(operations: int, log_every: int) -> int:
    """How many steps go into one graph: a divisor of ``log_every``, so that entries end with a call."""
    most = min(MOST_STEPS, max(1, MOST_OPERATIONS // operations))
    return max(k for k in range(1, most + 1) if log_every % k == 0)
