"""What does a GPU gain: a training step, a fit and draws, beside the same on the CPU of the same machine?

    python benchmarks/gpu.py --json gpu.json

Needs a CUDA device; meant to take under eight minutes on one. Five models (`svi_models.py`) are stepped
eagerly and compiled on both devices, windows of 50 steps in turn; the photon template is fitted to 100,000
sources, and new ones are drawn. That every window has noise of its own is checked.

Figures:
    step_gain_M: CPU's time per compiled step over the GPU's, medians; eager_step_gain_M: the same, eager.
    compiled_gain_M: eager over compiled, on the GPU.
    objective_z_M: difference of the objectives after the same number of steps, in standard errors.
    photons_fit_gain, photons_draw_gain: CPU's time over the GPU's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import median

import torch
from photons_fit import table_of
from photons_oracle import simulate
from record import use_threads, write_json
from svi_models import CASES, Case

import scivi
from domains.astrophysics import photons
from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.scores import quiet
from scivi.inference.state import State
from scivi.inference.step import read_window
from scivi.inference.stepper import Compiled, Eager, Stepper

WINDOW, ROUNDS, SOURCES = 50, 15, 100_000


def stepper_on(case: Case, device: str, compiled: bool) -> tuple[State, Stepper]:
    """A fit of a model at its start, and how its steps are taken."""
    plan = scivi.Plan(steps=10**6, rows_per_batch=None, estimator="trace", lr=1e-3, device=device, stop=None)
    state = begin(case.template, open_data(case.template, case.table), plan)
    with quiet():
        objective = prepare(state.bound, state.bound.example, plan)
        return state, Compiled(state, objective, plan) if compiled else Eager(objective, plan)


def window(state: State, stepper: Stepper) -> tuple[float, dict[str, float]]:
    """Milliseconds per step of a window, waiting for the device once, and the window's means."""
    state.window = {}
    start, last = time.perf_counter(), state.step + WINDOW
    with quiet():
        while state.step < last:
            stepper.take(state, last - state.step)
        stepper.settle(state)
    told = read_window(state.window)
    return 1e3 * (time.perf_counter() - start) / WINDOW, told


def steps_of(name: str, case: Case) -> dict[str, float]:
    """Times of a model's step in four ways, and whether both devices come to the same objective."""
    ways = {(d, c): stepper_on(case, d, c) for d in ("cpu", "cuda") for c in (False, True)}
    times: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    last: dict[tuple[str, bool], list[dict[str, float]]] = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for way, (state, stepper) in ways.items():
            ms, told = window(state, stepper)
            if round_:  # the first is a warm-up
                times[way].append(ms)
                last[way].append(told)
    if len({told["objective"] for told in last["cuda", True]}) == 1:
        raise RuntimeError(f"{name}: every window on the GPU has the same noise.")
    ms = {way: median(values) for way, values in times.items()}
    one, other = last["cpu", True][-1], last["cuda", True][-1]
    error = math.hypot(one["objective_sd"], other["objective_sd"]) / WINDOW**0.5
    found = {
        "step_gain": ms["cpu", True] / ms["cuda", True],
        "eager_step_gain": ms["cpu", False] / ms["cuda", False],
        "compiled_gain": ms["cuda", False] / ms["cuda", True],
        "objective_z": (one["objective"] - other["objective"]) / max(error, 1e-12),
    }
    return {f"{key}_{name}": value for key, value in found.items()}


def photons_on(device: str, compiled: str) -> tuple[float, float]:
    """Seconds of a second fit, whose code is there, and of a draw for as many new sources."""
    rows, new = (table_of(simulate(SOURCES, seed)) for seed in (20_000, 20_001))
    plan = scivi.Plan(steps=100, device=device, compile=compiled)  # type: ignore[arg-type]
    scivi.fit(photons.template, rows, plan, progress=False)
    start = time.perf_counter()
    fit = scivi.fit(photons.template, rows, plan, progress=False)
    middle = time.perf_counter()
    scivi.draw(fit, new, draws=1)
    return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: not measured.")
        sys.exit(0)
    use_threads()
    figures: dict[str, float] = {}
    for name, make in CASES.items():
        figures |= steps_of(name, make())
        print("\n".join(f"{k:32s} {v:.3f}" for k, v in figures.items() if k.endswith(name)), flush=True)
    (cpu_fit, cpu_draw), (gpu_fit, gpu_draw) = photons_on("cpu", "on"), photons_on("cuda", "on")
    figures |= {"photons_fit_gain": cpu_fit / gpu_fit, "photons_draw_gain": cpu_draw / gpu_draw}
    print(f"photons_fit_gain {cpu_fit / gpu_fit:.3f}, photons_draw_gain {cpu_draw / gpu_draw:.3f}")
    write_json(asked.json, __doc__.splitlines()[0], figures, {"rounds": ROUNDS})


if __name__ == "__main__":
    main()
