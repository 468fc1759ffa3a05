"""Are populations of rates, and the rates of each of 200 similar experiments, right? And those of new ones?

Robertson's three reactions (A -> B, 2 B -> B + C, B + C -> A + C), their rates made milder, in 200
experiments. The logs of the three rates scatter by .5 from experiment to experiment. Of B and C there are 12
measurements each, at times spaced geometrically from .3 to 100 and shifted in each experiment, with an error
of 8 %; 15 % are missing. The truth is solved by SciPy's Radau at rtol 1e-7. Each seed has a population of
its own, about the centre of the prior, which is uniform over six decades of each rate.

50 more experiments are held out: the encoder says in one pass, without solving anything, what their rates are
(``held``); beside it stands the best normal of each one, fitted to it alone by solving (``refined``).

Figures, over all seeds:
    population_covered_90, population_of: means, scatters and noise in the central 90 % interval, of how many.
    population_rms_z: root mean square of (posterior mean - truth) / posterior sd of these.
    local_covered_90: share of the rates of the 200 experiments in their central 90 % interval.
    local_rms_z: as above, of these.
    local_effective_share: median over experiments of the effective share of the encoder's draws.
    held_covered_90, refined_covered_90: the share for held-out experiments.
    shift_mean_sd, shift_p95_sd: |mean by the encoder - refined mean| in refined sd.
    sd_ratio_median, sd_ratio_p05, sd_ratio_p95: sd by the encoder over refined sd.
    gap_median, gap_mean, gap_p95: rise of the ELBO of an experiment by refining it, nats.
    evidence_gap_mean: log evidence (importance sampling from the refined normal) less encoder's ELBO, nats.
    refined_effective_share: median effective share of the refined draws.
    encoder_ms, refined_ms: per held-out experiment, a normal by either way.
    rehearsal_s, fit_s: of a seed, mean.

    python benchmarks/kinetics_population.py [--seeds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro import poutine
from record import use_threads, write_json
from scipy.integrate import solve_ivp
from scipy.special import logsumexp

import scivi
from domains.kinetics import populations
from domains.kinetics.networks import network
from domains.kinetics.petab_problems import Observable, Parameter, Problem
from scivi.inference.opening import open_data
from scivi.inference.refine import refine_rows
from scivi.inference.scores import particle_plate, quiet
from scivi.inputs.batches import read_batch, some_field
from scivi.models.binding import seeded
from scivi.models.sites import row_dim_of, sample_sites

RATES = {"k1": 0.1, "k2": 1e3, "k3": 1e2}  # centre of the prior; Robertson's are .04, 3e7, 1e4
SCATTER, NOISE, MISSING, MOMENTS = 0.5, 0.08, 0.15, 12
SEEN, HELD, DRAWS = 200, 50, 400
DATA_SEED = 40_000  # the data are never drawn with the seed of the fit


def problem() -> Problem:
    """One experiment."""
    net = network(
        {"A -> B": "k1", "2 B -> B + C": "k2", "B + C -> A + C": "k3"},
        initial={"A": 1.0, "B": 0.0, "C": 0.0},
        parameters=RATES,
        name="Robertson, milder",
    )
    rates = [Parameter(name, "log", value / 1e3, value * 1e3, value) for name, value in RATES.items()]
    seen = tuple(Observable(f"{s} seen", s, "sd", "log") for s in ("B", "C"))
    parameters = (*rates, Parameter("sd", "log", 0.01, 1.0, 0.1))
    return Problem(net, parameters, seen, {"c": {}}, (("c", ""),), net.name)


@dataclass(frozen=True)
class Truth:
    """What made the data: log rates of the population (3,) and of each experiment (experiment, 3)."""

    mean: np.ndarray
    theta: np.ndarray


def solved(theta: np.ndarray, times: np.ndarray) -> np.ndarray:
    """B and C (time, 2) by SciPy."""
    k = np.exp(theta)

    def rate(_: float, y: np.ndarray) -> list[float]:
        forth, on, back = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
        return [back - forth, forth - back - on, on]

    found = solve_ivp(rate, (0, times[-1]), [1.0, 0.0, 0.0], "Radau", t_eval=times, rtol=1e-7, atol=1e-11)
    return found.y[1:].T


def simulated(n: int, rng: np.random.Generator) -> tuple[dict[str, Any], Truth]:
    """Measurements of n experiments, and the truth."""
    mean = np.log(list(RATES.values())) + 0.3 * rng.standard_normal(3)
    theta = mean + SCATTER * rng.standard_normal((n, 3))
    times = np.geomspace(0.3, 100.0, MOMENTS) * np.exp(0.1 * rng.standard_normal((n, 1)))
    exact = np.stack([solved(each, when) for each, when in zip(theta, times, strict=True)])
    measured = exact * np.exp(NOISE * rng.standard_normal(exact.shape))
    measured[rng.random(exact.shape) < MISSING] = np.nan
    dims = populations.DIMS
    return {"measured": (dims["measured"], measured), "time": (dims["time"], times)}, Truth(mean, theta)


def rows(table: dict[str, Any], some: slice) -> dict[str, Any]:
    """Some experiments of a table."""
    return {name: (dims, values[some]) for name, (dims, values) in table.items()}


def inside(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Whether the truth is in the central 90 % of draws (draw, ...)."""
    low, high = np.quantile(draws, [0.05, 0.95], axis=0)
    return (low <= truth) & (truth <= high)


def effective(log_weight: np.ndarray) -> np.ndarray:
    """Effective share of draws (draw, row)."""
    weight = np.exp(log_weight - logsumexp(log_weight, 0))
    return 1 / (weight**2).sum(0) / len(weight)


def of_population(posterior: Any, truth: Truth) -> tuple[np.ndarray, np.ndarray]:
    """Of means, scatters and noise: z, and whether they are covered."""
    exact = {"mean": truth.mean, "scatter": np.full(3, SCATTER), "shared": np.log([NOISE])}
    draws = np.concatenate([posterior[name].values[0] for name in exact], 1)
    true = np.concatenate(list(exact.values()))
    return (draws.mean(0) - true) / draws.std(0), inside(draws, true)


def of_held(fit: scivi.Fit, held: dict[str, Any], theta: np.ndarray) -> dict[str, np.ndarray]:
    """The encoder's posterior of experiments that the fit has not seen, and the refined one."""
    tree: Any = scivi.draw(fit, held, DRAWS, seed=1)
    by_encoder, weight = (
        tree["posterior"]["theta"].values[0],
        tree["sample_stats"]["row_log_weight"].values[0],
    )
    bound, template = fit.bound, fit.template
    some = some_field(bound.example)
    batch = read_batch(open_data(template, held), template.fields, template.row_dims, {}, some)
    with seeded(1), torch.no_grad(), quiet():
        began = time.perf_counter()
        poutine.trace(bound.guide).get_trace(batch)
        encoder_s = time.perf_counter() - began
        with particle_plate(DRAWS, bound.nesting):
            trace = poutine.trace(bound.guide).get_trace(batch)
        given = {n: s["value"] for n, s in sample_sites(trace) if row_dim_of(s, template.row_dims) is None}
        began = time.perf_counter()
        refined = refine_rows(bound, batch, given, torch.arange(len(theta)), DRAWS)
        refined_s = time.perf_counter() - began
    assert refined is not None
    alone, log_weight = refined.values["theta"].numpy(), refined.log_weight.numpy()
    evidence = logsumexp(log_weight, 0) - np.log(len(log_weight))
    return {
        "held": inside(by_encoder, theta),
        "refined": inside(alone, theta),
        "shift": np.abs(by_encoder.mean(0) - alone.mean(0)) / alone.std(0),
        "ratio": by_encoder.std(0) / alone.std(0),
        "gap": refined.gap.numpy(),
        "evidence": evidence - weight.mean(0),
        "share": effective(log_weight),
        "ms": 1e3 * np.array([encoder_s, refined_s]) / len(theta),
    }


def one(seed: int) -> dict[str, np.ndarray]:
    """All that is told of a seed."""
    table, truth = simulated(SEEN + HELD, np.random.default_rng([DATA_SEED, seed]))
    seen, held = rows(table, slice(0, SEEN)), rows(table, slice(SEEN, None))
    marks = [time.perf_counter()]
    template, columns = populations.from_data(
        (problem(), seen), varying=tuple(RATES), seed=seed, progress=False
    )
    marks.append(time.perf_counter())
    fit = scivi.fit(template, columns, scivi.Plan(seed=seed, **template.plan), progress=False)
    marks.append(time.perf_counter())
    tree: Any = scivi.draw(fit, columns, DRAWS, seed=seed)
    posterior, theta = tree["posterior"], truth.theta[:SEEN]
    draws = posterior["theta"].values[0]
    z, covered = of_population(posterior, truth)
    found = {"z": z, "covered": covered, "seconds": np.diff(marks), "local": inside(draws, theta)}
    found["local_z"] = (draws.mean(0) - theta) / draws.std(0)
    found["effective"] = effective(tree["sample_stats"]["row_log_weight"].values[0])
    found |= of_held(fit, held, truth.theta[SEEN:])
    print(
        f"  seed {seed}: population covered {covered.sum()} of {len(z)}, z {z.round(2)}; "
        f"experiments covered {found['local'].mean():.3f}, held out {found['held'].mean():.3f}; "
        f"gap {found['gap'].mean():.3f} nats; rehearsal and fit {found['seconds'].round(0)} s",
        flush=True,
    )
    return found


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads(1)
    each = [one(seed) for seed in range(given.first, given.first + given.seeds)]
    all_of = {name: np.concatenate([np.ravel(found[name]) for found in each]) for name in each[0]}
    shift, ratio, gap = all_of["shift"], all_of["ratio"], all_of["gap"]
    seconds, ms = (np.mean([found[name] for found in each], 0) for name in ("seconds", "ms"))
    figures = {
        "population_covered_90": float(all_of["covered"].sum()),
        "population_of": float(len(all_of["covered"])),
        "population_rms_z": rms(all_of["z"]),
        "local_covered_90": float(all_of["local"].mean()),
        "local_rms_z": rms(all_of["local_z"]),
        "local_effective_share": float(np.median(all_of["effective"])),
        "held_covered_90": float(all_of["held"].mean()),
        "refined_covered_90": float(all_of["refined"].mean()),
        "shift_mean_sd": float(shift.mean()),
        "shift_p95_sd": float(np.quantile(shift, 0.95)),
        "sd_ratio_median": float(np.median(ratio)),
        "sd_ratio_p05": float(np.quantile(ratio, 0.05)),
        "sd_ratio_p95": float(np.quantile(ratio, 0.95)),
        "gap_median": float(np.median(gap)),
        "gap_mean": float(gap.mean()),
        "gap_p95": float(np.quantile(gap, 0.95)),
        "evidence_gap_mean": float(all_of["evidence"].mean()),
        "refined_effective_share": float(np.median(all_of["share"])),
        "encoder_ms": float(ms[0]),
        "refined_ms": float(ms[1]),
        "rehearsal_s": float(seconds[0]),
        "fit_s": float(seconds[1]),
    }
    print("\n" + "\n".join(f"{name:28s} {value:.4f}" for name, value in figures.items()))
    settings = {"seeds": given.seeds, "first": given.first, "experiments": SEEN, "held": HELD, "threads": 1}
    write_json(given.json, __doc__.splitlines()[0], figures, settings)


if __name__ == "__main__":
    main()
