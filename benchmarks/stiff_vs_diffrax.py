"""How long do batches of stiff solutions and their gradients take beside diffrax, at the same error?

    python benchmarks/stiff_vs_diffrax.py --json stiff_vs_diffrax.json
    python benchmarks/stiff_vs_diffrax.py --backward

POLLU (20 states, 25 reactions, to t = 60) and Robertson (3 states, 3 reactions, to t = 1e5), 12 times each,
log coefficients scattered by .3; a weighted sum of all states, and its gradient with respect to all log
coefficients. Ours is ``scivi.ode.solve``; the peer is diffrax's Kvaerno5 under ``jit``, ``vmap`` and
``grad``, as its documentation has it. Each side takes the loosest of the tolerances 1e-3, 3e-4 ... 1e-7
(absolute ones 1e-4 of that) at which its error is below --error; the two run alternately, in one process of
two threads.

The error of a solution is its largest difference from scipy's Radau at 1e-12, over three entries of the
batch, relative to the state or to a thousandth of the largest that it is. The error of a gradient is that in
a random direction, relative, against central differences of Radau's solutions (of its own error some 1e-6).

--backward: one entry; the gradient by replay against autograd through every operation of the same steps.

Beside them, for one entry and values alone: scipy's Radau and BDF with the Jacobian given, torchdiffeq's
dopri5 as far as it comes in --patience seconds, and pydiffsol's BDF where it is installed.

Figures:
    pollu_1024, robertson_1024, pollu_1, robertson_1: diffrax's time over ours, value and gradient, batches of
        1024 and of one; the median of --repeats, NAME_low and NAME_high the extremes.
    error_max_ours, error_max_diffrax: largest error of the solutions so timed. gradient_error_NAME of ours,
        and diffrax_gradient_error_NAME.
    ours_s_NAME, diffrax_s_NAME, diffrax_compile_s_NAME: seconds.
    backward_pollu_1, backward_robertson_1: time of autograd through the steps over that of replay, backward
        pass alone.
    scipy_radau_s_PROBLEM and so on: seconds of one solution, left out where it did not come through.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import THREADS, use_threads, write_json
from scipy.integrate import solve_ivp
from stiff_problems import Problem, played_again, pollu, robertson

from scivi.ode import mass_action, solve
from scivi.ode.path import Tolerance, integrate

RTOLS = [1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7]
ATOL = 1e-4  # of rtol
SCATTER, REFERENCED = 0.3, 3
TIMES = 12


def times_of(problem: Problem) -> np.ndarray:
    """At which states are wanted (time,)."""
    return np.geomspace(0.01, problem.end, TIMES)


class Truth:
    """Reference solutions and gradients of the first entries of a batch."""

    def __init__(self, problem: Problem, log_k: np.ndarray) -> None:
        self.problem = problem
        some = log_k[:REFERENCED]
        self.values = np.stack([self.radau(np.exp(row)) for row in some])
        size = np.abs(self.values[0]).max(0)
        rng = np.random.default_rng(1)
        self.weight = rng.uniform(0.5, 1.5, self.values[0].shape) / size
        self.towards = rng.standard_normal(log_k.shape[1])
        self.slope = np.array([self.differences(row) for row in some])

    def radau(self, k: np.ndarray) -> np.ndarray:
        """(time, state)."""
        return self.problem.radau(k, times_of(self.problem), 1e-12)

    def differences(self, log_k: np.ndarray) -> float:
        """Slope of the weighted sum towards ``towards``, by steps of 1e-3 and 2e-3 on either side."""

        def total(h: float) -> float:
            return float((self.radau(np.exp(log_k + h * self.towards)) * self.weight).sum())

        near, far = ((total(h) - total(-h)) / (2 * h) for h in (1e-3, 2e-3))
        return (4 * near - far) / 3

    def error(self, values: np.ndarray) -> float:
        """Of a batch's solutions (B, time, state)."""
        truth = self.values[: len(values)]
        floor = 1e-3 * np.abs(truth).max(1, keepdims=True)
        return float((np.abs(values[: len(truth)] - truth) / (np.abs(truth) + floor)).max())

    def gradient_error(self, gradient: np.ndarray) -> float:
        """Of a batch's gradients (B, reaction), in that direction."""
        found = gradient[: len(self.slope)] @ self.towards
        truth = self.slope[: len(found)]
        return float(np.abs(found / truth - 1).max())


Side = Callable[[float], tuple[np.ndarray, np.ndarray]]


def ours(problem: Problem, log_k: np.ndarray, weight: np.ndarray) -> Side:
    """Values and gradients at a tolerance."""
    system = mass_action(problem.reactants, problem.stoichiometry)
    y0, times, by = (torch.tensor(x) for x in (problem.y0, times_of(problem), weight))

    def run(rtol: float) -> tuple[np.ndarray, np.ndarray]:
        theta = torch.tensor(log_k, requires_grad=True)
        found = solve(system, theta.exp(), y0, times, rtol=rtol, atol=ATOL * rtol, method="rodas5p")
        (gradient,) = torch.autograd.grad((found.values * by).sum(), theta)
        return found.values.detach().numpy(), gradient.numpy()

    return run


def diffrax(problem: Problem, log_k: np.ndarray, weight: np.ndarray) -> tuple[Side, float]:
    """The same by the peer, and the seconds of its compiling."""
    import diffrax as dfx
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    first, second = (jnp.array(places) for places in problem.factors())
    change, times, y0, by = (
        jnp.array(x) for x in (problem.stoichiometry, times_of(problem), problem.y0, weight)
    )

    def rate(t: Any, y: Any, k: Any) -> Any:
        extended = jnp.append(y, 1.0)
        return change @ (k * extended[first] * extended[second])

    def one(theta: Any, rtol: Any) -> Any:
        control = dfx.PIDController(rtol=rtol, atol=rtol * ATOL)
        found = dfx.diffeqsolve(
            dfx.ODETerm(rate),
            dfx.Kvaerno5(),
            0.0,
            times[-1],
            None,
            y0,
            args=jnp.exp(theta),
            saveat=dfx.SaveAt(ts=times),
            stepsize_controller=control,
            max_steps=1024,
            throw=False,
        )
        return found.ys

    def total(theta: Any, rtol: Any) -> tuple[Any, Any]:
        values = jax.vmap(one, (0, None))(theta, rtol)
        return (values * by).sum(), values

    theta = jnp.array(log_k)
    begun = time.perf_counter()
    both = jax.jit(jax.value_and_grad(total, has_aux=True)).lower(theta, jnp.asarray(1e-4)).compile()
    compiling = time.perf_counter() - begun

    def run(rtol: float) -> tuple[np.ndarray, np.ndarray]:
        (_, values), gradient = jax.block_until_ready(both(theta, jnp.asarray(rtol)))
        return np.asarray(values), np.asarray(gradient)

    return run, compiling


def loosest(side: Side, truth: Truth, most: float) -> float:
    """The loosest tolerance with an error below ``most``, by the entries that have a reference."""
    for rtol in RTOLS:
        if truth.error(side(rtol)[0]) <= most:
            return rtol
    raise SystemExit(f"no tolerance down to {RTOLS[-1]} has an error below {most}.")


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def compare(
    problem: Problem, truth: Truth, log_k: np.ndarray, rtols: tuple[float, float], repeats: int
) -> dict[str, float]:
    """Both sides on one batch, each at its tolerance; names without the batch."""
    own = ours(problem, log_k, truth.weight)
    peer, compiling = diffrax(problem, log_k, truth.weight)
    rtol, peer_rtol = rtols
    found, peer_found = own(rtol), peer(peer_rtol)
    error, peer_error = truth.error(found[0]), truth.error(peer_found[0])
    slope_error, peer_slope_error = truth.gradient_error(found[1]), truth.gradient_error(peer_found[1])
    rounds = [(seconds(lambda: own(rtol)), seconds(lambda: peer(peer_rtol))) for _ in range(repeats)]
    own_s, peer_s = np.array(rounds).T
    ratio = peer_s / own_s
    return {
        "ratio": float(np.median(ratio)),
        "low": float(ratio.min()),
        "high": float(ratio.max()),
        "error": error,
        "peer_error": peer_error,
        "gradient_error": slope_error,
        "peer_gradient_error": peer_slope_error,
        "s": float(np.median(own_s)),
        "peer_s": float(np.median(peer_s)),
        "compile_s": compiling,
        "rtol": rtol,
        "peer_rtol": peer_rtol,
    }


def backward(problem: Problem, truth: Truth, log_k: np.ndarray, repeats: int) -> float:
    """Seconds of autograd through the steps over those of replay, backward passes of one entry."""
    system = mass_action(problem.reactants, problem.stoichiometry)
    y0, times, by = (torch.tensor(x) for x in (problem.y0, times_of(problem), truth.weight))
    rtol, ratios = 1e-5, []
    for _ in range(repeats):
        theta = torch.tensor(log_k[:1], requires_grad=True)
        found = solve(system, theta.exp(), y0, times, rtol=rtol, atol=ATOL * rtol, method="rodas5p")
        total = (found.values * by).sum()
        replayed = seconds(lambda: torch.autograd.grad(total, theta))  # noqa: B023
        tolerance = Tolerance(rtol, torch.tensor(ATOL * rtol, dtype=torch.float64), 2000)
        zero = torch.zeros(1, dtype=torch.float64)
        path = integrate(system, theta.detach().exp(), y0[None], times[None], zero, None, tolerance)
        values = played_again(system, theta.exp(), y0[None], path)
        total = (values * by).sum()
        through = seconds(lambda: torch.autograd.grad(total, theta))  # noqa: B023
        ratios.append(through / replayed)
    return float(np.median(ratios))


def others(problem: Problem, truth: Truth, most: float, patience: float) -> dict[str, float]:
    """Seconds of one solution, values alone, by what else there is."""
    k = problem.k
    found: dict[str, float] = {}
    for name in ("Radau", "BDF"):
        for rtol in RTOLS:
            begun = time.perf_counter()
            made = solve_ivp(
                problem.rate,
                (0, times_of(problem)[-1]),
                problem.y0,
                name,
                times_of(problem),
                args=(k,),
                jac=problem.jacobian,
                rtol=rtol,
                atol=ATOL * rtol,
            )
            spent = time.perf_counter() - begun
            if truth.error(made.y.T[None]) <= most:
                found[f"scipy_{name.lower()}_s"] = spent
                break
    found["torchdiffeq_dopri5_s"] = explicit(problem, patience)
    found["pydiffsol_bdf_s"] = compiled(problem, truth, most)
    return found


def explicit(problem: Problem, patience: float) -> float:
    """Of torchdiffeq; NaN if it needs more than some seconds."""
    from torchdiffeq import odeint

    system = mass_action(problem.reactants, problem.stoichiometry)
    k, y0, times = (
        torch.tensor(x) for x in (problem.k[None], problem.y0[None], np.r_[0.0, times_of(problem)])
    )
    begun = time.perf_counter()

    def rate(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if time.perf_counter() - begun > patience:
            raise TimeoutError
        return system.rate(t.expand(1), y, k)

    try:
        odeint(rate, y0, times, rtol=1e-4, atol=1e-8, method="dopri5")
    except (TimeoutError, AssertionError):
        return math.nan
    return time.perf_counter() - begun


def compiled(problem: Problem, truth: Truth, most: float) -> float:
    """Of pydiffsol, its compiling left out; NaN where it is not installed."""
    try:
        import pydiffsol
    except ImportError:
        return math.nan
    ode = pydiffsol.Ode(problem.diffsl())
    for rtol in RTOLS:
        ode.rtol, ode.atol = rtol, ATOL * rtol
        begun = time.perf_counter()
        values = np.asarray(ode.solve_dense(problem.k, times_of(problem)).ys)
        spent = time.perf_counter() - begun
        if truth.error(values.T[None]) <= most:
            return spent
    return math.nan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--error", type=float, default=1e-4, help="that both sides must keep below")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 1], help="their sizes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--patience", type=float, default=20.0, help="seconds given to torchdiffeq")
    parser.add_argument("--backward", action="store_true", help="time backward passes too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads(THREADS)
    figures: dict[str, float] = {}
    for name, problem in (("pollu", pollu()), ("robertson", replace(robertson(), end=1e5))):
        log_k = np.log(problem.scattered(SCATTER, max(*given.batches, REFERENCED)))
        truth = Truth(problem, log_k)
        some = log_k[:REFERENCED]
        rtols = (
            loosest(ours(problem, some, truth.weight), truth, given.error),
            loosest(diffrax(problem, some, truth.weight)[0], truth, given.error),
        )
        for size in given.batches:
            found = compare(problem, truth, log_k[:size], rtols, given.repeats)
            print(
                f"{name:10s} {size:5d}: {found['ratio']:6.2f} ({found['low']:.2f} to {found['high']:.2f}), "
                f"{found['s']:.4f} s at error {found['error']:.1e} (rtol {found['rtol']:.0e}), diffrax "
                f"{found['peer_s']:.4f} s at {found['peer_error']:.1e} ({found['peer_rtol']:.0e}) and "
                f"{found['compile_s']:.1f} s of compiling; gradients {found['gradient_error']:.1e}, "
                f"{found['peer_gradient_error']:.1e}",
                flush=True,
            )
            key = f"{name}_{size}"
            figures |= {key: found["ratio"], f"{key}_low": found["low"], f"{key}_high": found["high"]}
            figures |= {f"ours_s_{key}": found["s"], f"diffrax_s_{key}": found["peer_s"]}
            figures |= {f"error_{key}": found["error"], f"diffrax_error_{key}": found["peer_error"]}
            figures |= {f"gradient_error_{key}": found["gradient_error"]}
            figures |= {f"diffrax_gradient_error_{key}": found["peer_gradient_error"]}
            figures |= {f"diffrax_compile_s_{key}": found["compile_s"]}
        beside = others(problem, truth, given.error, given.patience)
        print(f"{name:10s} one solution: " + ", ".join(f"{k} {v:.4g}" for k, v in beside.items()), flush=True)
        figures |= {f"{k}_{name}": v for k, v in beside.items()}
        if given.backward:
            figures[f"backward_{name}_1"] = backward(problem, truth, log_k, given.repeats)
            print(f"{name:10s} backward: {figures[f'backward_{name}_1']:.1f} times faster", flush=True)
    figures["error_max_ours"] = max(v for k, v in figures.items() if k.startswith("error_"))
    figures["error_max_diffrax"] = max(v for k, v in figures.items() if k.startswith("diffrax_error_"))
    print(f"error_max_ours {figures['error_max_ours']:.2e}, diffrax {figures['error_max_diffrax']:.2e}")
    settings = {"repeats": given.repeats, "error": given.error, "threads": THREADS}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
