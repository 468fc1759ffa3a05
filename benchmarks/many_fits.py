"""How much faster are two thousand small fits as one batched computation than one by one?

    python benchmarks/many_fits.py --json many_fits.json

Bayesian linear regressions, y ~ N(x b, .5) with three slopes b ~ N(0, 2) and 30 rows each, whose posterior is
known: a joint normal guide holds it exactly. One side is `fit_many` of all, in this process, on one thread.
The other is `scivi.train` on --some of them in a pool of two processes of one thread each, spawned and warm:
`scivi.fit` less the look beyond the guide (half a second), which `fit_many` does not take either.
Both take the same plan, a stated number of steps without a stop rule, and both compile their steps (unless
--compile says otherwise): a process of the pool has done so in a first fit, which is not counted, and takes
the compiled steps from there. `fit_many` captures its step anew each time, which is counted, and finds the
compiled code on disk. Tables are checked and guides made on both sides. They run in turn, --repeats times.

Figures:
    vs_process_pool: fits per second, batched over pool; geometric mean. At least 10 is wanted.
    vs_process_pool_least, vs_process_pool_most: over the repeats.
    fits_per_s, fits_per_s_pool: rates, geometric means.
    fits_per_s_first: the same of the first batched run, which compiles unless torch finds the code on disk.
    draws_per_s: fits drawn per second, with a thousand draws each.
    posterior_mean_error_mcse: largest |mean of a thousand draws - exact mean| of all slopes of all fits, in
        Monte Carlo standard errors (sd / sqrt(1000)). Of draws from the exact posterior it would be about 4.
    posterior_mean_error_mcse_typical: root mean square of the same; 1 of exact draws.
    guide_mean_error_sd, guide_mean_error_sd_pool: largest |guide's mean - exact mean| in exact sd, without
        Monte Carlo error: how good either side's optimum is.
    guide_sd_ratio_least, guide_sd_ratio_most: of the guide's sd over the exact one; with _pool the pool's.
    trusted_share: fits whose own verdict is "trust".
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from record import write_json

import scivi
from scivi.analysis.each import each
from scivi.inference.many import fit_many
from scivi.models.guides import JointNormal

N_ROWS, N_SLOPES = 30, 3
SLOPE_SD, NOISE_SD = 2.0, 0.5
DATA_SEED = 4000
DRAWS = 1000
PROCESSES = 2


def model(batch: Any, prior: Any, nets: Any) -> None:
    slopes = pyro.sample("slopes", dist.Normal(batch.y.new_zeros(N_SLOPES), SLOPE_SD).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Normal((batch.x * slopes).sum(-1), NOISE_SD))


template = scivi.Template(
    name="regression", rows="row", model=model, guide=JointNormal(), dims={"slopes": ("slope",)},
    fields={
        "y": scivi.Field(("row",), role="observed"),
        "x": scivi.Field(("row", "slope")),
    },
)  # fmt: skip


def plan_of(steps: int, how: Any) -> scivi.Plan:
    """Of either side: the gradient of "stl" vanishes at the optimum, so that few steps reach it."""
    return scivi.Plan(steps=steps, lr=0.05, estimator="stl", stop=None, rows_per_batch=None, compile=how)


def simulate(n: int) -> tuple[xr.Dataset, np.ndarray, np.ndarray]:
    """Data, and exact posterior means and sds of the slopes, (well, slope)."""
    rng = np.random.default_rng(DATA_SEED)
    x = rng.normal(size=(n, N_ROWS, N_SLOPES))
    y = np.einsum("nrk,nk->nr", x, SLOPE_SD * rng.normal(size=(n, N_SLOPES)))
    y += NOISE_SD * rng.normal(size=y.shape)
    covariance = np.linalg.inv(np.eye(N_SLOPES) / SLOPE_SD**2 + x.swapaxes(1, 2) @ x / NOISE_SD**2)
    mean = np.einsum("nij,nrj,nr->ni", covariance, x, y) / NOISE_SD**2
    table = xr.Dataset({"y": (("well", "row"), y), "x": (("well", "row", "slope"), x)})
    return table, mean, np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))


def guide_of(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of a joint normal guide, from its parameters by name, (..., slope)."""
    loc, log_diag, factor = (values[f"guide.{name}"].detach() for name in ("loc", "log_diag", "factor"))
    tril = log_diag.exp().unsqueeze(-1) * (factor.tril(-1) + torch.eye(N_SLOPES))
    return loc.numpy(), tril.square().sum(-1).sqrt().numpy()


def begin_worker(how: str) -> None:
    """One thread, and one fit to have everything loaded and compiled."""
    torch.set_num_threads(1)
    table, _, _ = simulate(1)
    scivi.fit(template, table.isel(well=0), plan_of(100, how), progress=False)


def ready(_: int) -> int:
    """Whether the worker has begun: its number."""
    time.sleep(1.0)
    return os.getpid()


def fit_alone(work: tuple[dict[str, np.ndarray], scivi.Plan]) -> tuple[np.ndarray, np.ndarray]:
    """Guide's mean and sd of one fit."""
    table, plan = work
    *_, last = scivi.train(template, table, plan)
    return guide_of(dict(last.state.bound.nets.named_parameters()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=2000, help="fits")
    parser.add_argument("--some", type=int, default=30, help="of them in the pool, each time")
    parser.add_argument("--steps", type=int, default=1000, help="of each fit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="the steps of both sides")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    asked = parser.parse_args()
    plan = plan_of(asked.steps, asked.compile)
    torch.set_num_threads(1)
    table, mean, sd = simulate(asked.n)
    begun = time.perf_counter()
    fits = fit_many(template, table, "well", plan, progress=False)
    first = time.perf_counter() - begun
    print(f"first run {first:.1f} s, {fits.course.engine}")
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"batched": [], "pool": []}
    errors, ratios = [], []
    with ProcessPoolExecutor(PROCESSES, context, begin_worker, (asked.compile,)) as pool:
        assert len(set(pool.map(ready, range(2 * PROCESSES)))) == PROCESSES
        for repeat in range(asked.repeats):
            some = (np.arange(asked.some) + repeat * asked.some) % asked.n
            work = [({"y": table.y.values[k], "x": table.x.values[k]}, plan) for k in some.tolist()]
            begun = time.perf_counter()
            found = list(pool.map(fit_alone, work))
            seconds["pool"].append((time.perf_counter() - begun) / len(work))
            loc, scale = (np.stack(part) for part in zip(*found, strict=True))
            errors.append(np.abs((loc - mean[some]) / sd[some]).max())
            ratios.append(scale / sd[some])
            begun = time.perf_counter()
            fits = fit_many(template, table, "well", plan, progress=False)
            seconds["batched"].append((time.perf_counter() - begun) / asked.n)
            rates = {who: 1 / taken[-1] for who, taken in seconds.items()}
            print(f"batched {rates['batched']:8.1f} fits/s, pool {rates['pool']:6.2f} fits/s", flush=True)
    begun = time.perf_counter()
    tree = fits.draw(DRAWS)
    drawn = time.perf_counter() - begun
    score = (tree.posterior.slopes.mean(("chain", "draw")).values - mean) / (sd / DRAWS**0.5)
    loc, scale = guide_of(fits.course.values)
    pairs = [p / b for p, b in zip(seconds["pool"], seconds["batched"], strict=True)]
    figures = {
        "vs_process_pool": geometric_mean(pairs),
        "vs_process_pool_least": min(pairs),
        "vs_process_pool_most": max(pairs),
        "fits_per_s": 1 / geometric_mean(seconds["batched"]),
        "fits_per_s_pool": 1 / geometric_mean(seconds["pool"]),
        "fits_per_s_first": asked.n / first,
        "draws_per_s": asked.n / drawn,
        "posterior_mean_error_mcse": float(np.abs(score).max()),
        "posterior_mean_error_mcse_typical": float(np.sqrt((score**2).mean())),
        "guide_mean_error_sd": float(np.abs((loc - mean) / sd).max()),
        "guide_mean_error_sd_pool": float(max(errors)),
        "guide_sd_ratio_least": float((scale / sd).min()),
        "guide_sd_ratio_most": float((scale / sd).max()),
        "guide_sd_ratio_least_pool": float(min(r.min() for r in ratios)),
        "guide_sd_ratio_most_pool": float(max(r.max() for r in ratios)),
        "trusted_share": float(each(tree).ok.mean()),
    }
    print("\n" + "\n".join(f"{name:36s} {value:.4f}" for name, value in figures.items()))
    asked_numbers = {name: value for name, value in vars(asked).items() if isinstance(value, int)}
    settings = {**asked_numbers, "threads_batched": 1, "processes": PROCESSES}
    write_json(asked.json, (__doc__ or "").splitlines()[0], figures, settings)


if __name__ == "__main__":
    main()
