"""How long does one training step take, beside Pyro's and NumPyro's on the same model and rows?

    python benchmarks/svi_step.py --json svi_step.json

Five models (`svi_models`), all rows at every step, float32, Adam at 1e-3, one sample of the bound, whose KL
part is sampled too (Pyro's and NumPyro's ``Trace_ELBO``, SciVI's "trace"). Two threads for each side, one
process; the sides take turns, --rounds times; medians of the rounds.

Pyro: ``SVI.step`` as it comes, validation on. NumPyro: ``jax.jit(svi.update)``, called step by step, and
``lax.scan`` over 50 steps. SciVI: the compiled steps of ``scivi.fit`` over a whole window of 50 steps, with
the window's numbers read. Every 500 steps the compiled steps are compared with the eager ones: windows in
which that happens are left out of the medians, and its cost is a figure.

Before the timing the maths is compared, at the same parameters: SciVI's loss with Pyro's on the same random
numbers, and their mean over some hundred draws with NumPyro's.

Figures, of each model M:
    speedup_M: Pyro's time per step over ours.
    vs_numpyro_update_M, vs_numpyro_scan_M: NumPyro's over ours; above 1 ours is faster.
    ms_M, ms_pyro_M, ms_numpyro_update_M, ms_numpyro_scan_M: milliseconds per step.
    speedup_least_M, speedup_most_M: over the rounds.
    at_once_M: steps in one call of ours.
    check_share_M: time of comparing with the eager steps, over that of the first 500 steps; later ones come
        whenever the steps have doubled.
    compile_s_M, compile_s_numpyro_update_M, compile_s_numpyro_scan_M: seconds until the first step, of ours
        with what torch keeps on disk from earlier runs.
    loss_difference_M: of ours from Pyro's, relative, same random numbers.
    loss_z_numpyro_M: of the mean of ours from NumPyro's mean, in standard errors.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from pyro import infer, optim
from record import THREADS, use_threads, write_json
from svi_models import CASES, Case

import scivi
from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.scores import quiet
from scivi.inference.state import State
from scivi.inference.step import read_window
from scivi.inference.stepper import CHECK_AFTER, Compiled

WINDOW = 50
LR = 1e-3
PLAN = scivi.Plan(
    estimator="trace",
    rows_per_batch=None,
    lr=LR,
    schedule="constant",
    clip=None,
    compile="on",
    log_every=WINDOW,
    stop=None,
)


@dataclass
class Side:
    """One way to take steps.

    Args:
        window: takes ``steps`` steps.
        steps: of one call.
        compile_s: seconds until the first step was taken.
        seconds: per step, by round.
    """

    window: Callable[[], None]
    steps: int
    compile_s: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One round."""
        begun = time.perf_counter()
        self.window()
        self.seconds.append((time.perf_counter() - begun) / self.steps)


@contextmanager
def parameter_store(held: dict[str, Any]) -> Iterator[None]:
    """Pyro's process-wide parameters are those of one model, kept in ``held``."""
    store = pyro.get_param_store()
    names = ("_params", "_param_to_name", "_constraints")
    before = {name: getattr(store, name) for name in names}
    for name in names:
        setattr(store, name, held.setdefault(name, {}))
    try:
        yield
    finally:
        for name in names:
            setattr(store, name, before[name])


class Ours:
    """SciVI's windows of steps."""

    def __init__(self, case: Case) -> None:
        self.state = begin(case.template, open_data(case.template, case.table), PLAN)
        self.objective = prepare(self.state.bound, self.state.bound.example, PLAN)
        self.batch = self.state.feed.next()
        self.n = self.batch.sizes[case.template.row_dims[0]]
        self.checked: list[float] = []

    def loss(self) -> float:
        """One draw of the loss, nats in all."""
        with quiet(), torch.no_grad():
            return self.n * float(self.objective.evaluate(self.batch).loss)

    def side(self) -> Side:
        """Compile, and take the first steps."""
        begun = time.perf_counter()
        with quiet():
            self.stepper = Compiled(self.state, self.objective, PLAN)
        side = Side(self._window, WINDOW, time.perf_counter() - begun)
        for _ in range(3):
            self._window()
        return side

    def _window(self) -> None:
        with quiet():
            last = self.state.step + WINDOW
            while self.state.step < last:
                self.stepper.take(self.state, last - self.state.step)
            self.stepper.settle(self.state)
        read_window(self.state.window)
        self.state.window = {}

    def measure(self, side: Side) -> None:
        """One round; a window with a comparison is put aside and another one measured."""
        before = self.stepper.check_at
        side.measure()
        if self.stepper.check_at != before:
            self.checked.append(side.seconds.pop())
            side.measure()


def pyro_side(case: Case, state: State) -> tuple[Side, Callable[[], float]]:
    """SVI.step as it comes, and one draw of its loss at the parameters of ``state``."""
    held: dict[str, Any] = {}
    with parameter_store(held):
        model, guide, data = case.of_pyro(state)
        adam = optim.Adam({"lr": LR})  # type: ignore[attr-defined]
        svi = infer.SVI(model, guide, adam, infer.Trace_ELBO())

    def loss() -> float:
        with parameter_store(held):
            value: Any = svi.evaluate_loss(*data)
            return float(value)

    steps = 5

    def window() -> None:
        with parameter_store(held), pyro.validation_enabled(True):
            for _ in range(steps):
                svi.step(*data)

    return Side(window, steps), loss


def numpyro_sides(case: Case, state: State, draws: int) -> tuple[Side, Side, list[float]]:
    """``update`` step by step and ``scan``, and draws of the loss at the parameters of ``state``."""
    import jax
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.optim import Adam

    model, guide, data = case.of_numpyro(state)
    svi = SVI(model, guide, Adam(LR), Trace_ELBO())
    first = svi.init(jax.random.PRNGKey(0), *data)
    params = svi.get_params(first)
    one = jax.jit(lambda key: svi.loss.loss(key, params, svi.model, svi.guide, *data))
    losses = [float(one(key)) for key in jax.random.split(jax.random.PRNGKey(1), draws)]
    update = jax.jit(svi.update)
    scan = jax.jit(lambda s: jax.lax.scan(lambda s, _: svi.update(s, *data), s, None, length=WINDOW))
    held = {"update": first, "scan": first}

    def window() -> None:
        loss = None
        for _ in range(WINDOW):
            held["update"], loss = update(held["update"], *data)
        jax.block_until_ready((held["update"], loss))

    def scanned() -> None:
        held["scan"], losses = scan(held["scan"])
        jax.block_until_ready((held["scan"], losses))

    begun = time.perf_counter()
    jax.block_until_ready(update(first, *data))
    between = time.perf_counter()
    scanned()
    last = time.perf_counter()
    window()
    return Side(window, WINDOW, between - begun), Side(scanned, WINDOW, last - between), losses


def same_maths(ours: Ours, of_pyro: Callable[[], float], of_numpyro: list[float]) -> tuple[float, float]:
    """Relative difference from Pyro on the same random numbers; from NumPyro in standard errors."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        here = ours.loss()
        torch.manual_seed(1)
        there = of_pyro()
        draws = torch.tensor([ours.loss() for _ in of_numpyro], dtype=torch.float64)
    theirs = torch.tensor(of_numpyro, dtype=torch.float64)
    error = math.sqrt(float(draws.var() + theirs.var()) / len(draws))
    return abs(here - there) / abs(there), float(draws.mean() - theirs.mean()) / error


def measure(name: str, rounds: int, draws: int) -> dict[str, float]:
    """Figures of one model."""
    torch.manual_seed(0)
    case = CASES[name]()
    ours = Ours(case)
    pyros, loss = pyro_side(case, ours.state)
    update, scan, losses = numpyro_sides(case, ours.state, draws)
    difference, z = same_maths(ours, loss, losses)
    print(f"{name:9s} loss: {difference:.1e} from Pyro's (relative), {z:+.1f} standard errors from NumPyro's")
    own = ours.side()
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        ours.measure(own)
        for side in (pyros, update, scan):
            side.measure()
    gc.enable()
    ratios = [a / b for a, b in zip(pyros.seconds, own.seconds, strict=True)]
    ms, ms_pyro, ms_update, ms_scan = (1e3 * median(s.seconds) for s in (own, pyros, update, scan))
    figures = {
        "speedup": ms_pyro / ms,
        "vs_numpyro_update": ms_update / ms,
        "vs_numpyro_scan": ms_scan / ms,
        "ms": ms,
        "ms_pyro": ms_pyro,
        "ms_numpyro_update": ms_update,
        "ms_numpyro_scan": ms_scan,
        "speedup_least": min(ratios),
        "speedup_most": max(ratios),
        "at_once": ours.stepper.told["at_once"],
        "compile_s": own.compile_s,
        "compile_s_numpyro_update": update.compile_s,
        "compile_s_numpyro_scan": scan.compile_s,
        "loss_difference": difference,
        "loss_z_numpyro": z,
    }
    if ours.checked:
        more = WINDOW * (1e3 * median(ours.checked) - ms)
        figures["check_share"] = max(0.0, more) / (CHECK_AFTER * ms)
    print(
        f"{name:9s} ours {ms:.4f} ms, {figures['at_once']} a call, compiled in {own.compile_s:.1f} s\n"
        f"{name:9s} Pyro {ms_pyro:.3f} ms, x {ms_pyro / ms:.1f} ({min(ratios):.1f} to {max(ratios):.1f})\n"
        f"{name:9s} NumPyro update {ms_update:.4f} ms, x {ms_update / ms:.2f}; "
        f"scan {ms_scan:.4f} ms, x {ms_scan / ms:.2f}",
        flush=True,
    )
    return {f"{key}_{name}": value for key, value in figures.items()}


def main() -> None:
    arguments = argparse.ArgumentParser(description="Time per training step, beside Pyro and NumPyro.")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--draws", type=int, default=200, help="of the loss, when the maths is compared")
    given = arguments.parse_args()
    use_threads(THREADS)
    warnings.filterwarnings("ignore", category=UserWarning)  # of Pyro, on sites that the guide does not use
    figures: dict[str, float] = {}
    for name in given.models:
        figures |= measure(name, given.rounds, given.draws)
    question = "How long does one training step take, beside Pyro's and NumPyro's on the same model and rows?"
    settings = {"rounds": float(given.rounds), "window": float(WINDOW)}
    write_json(given.json, question, figures, settings)


if __name__ == "__main__":
    main()
