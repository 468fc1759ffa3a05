"""Does NUTS on a template give as many effective draws per second as NumPyro, and the same posterior?

    python benchmarks/nuts.py --json nuts.json

Three models, each written as a template and for its peers: eight schools (10 dims), logistic regression (25
dims, 1000 rows), and stochastic volatility (1000 dims: the innovations of 997 steps, and three parameters).
``scivi.nuts`` and NumPyro, with chains in turn and with chains vectorised, run alternately in one process on
one core, with the same numbers of draws. Figures, M a model:

- ``ess_ratio_numpyro_M``: smallest effective draws per second of sampling over those of NumPyro's better way,
  median over repeats. Compiling is left out on both sides, and is printed with the time of the whole call, in
  which ``scivi.nuts`` also works out likelihoods and the prior;
- ``ess_ratio_numpyro_M_cpu``: the same by seconds of the processor, over the whole call, which a busy machine
  disturbs less;
- ``ess_ratio_pyro_M``: over those of Pyro's NUTS. One short chain for the smaller two. For the volatility
  that would take an hour: its gradient is timed, and granted the effective draws of one of NumPyro's;
- ``rhat_max_M``: the largest R-hat; ``shift_M``: the largest difference between the means of SciVI and of
  NumPyro, in Monte Carlo standard errors of the difference;
- ``warmstart_M``: gradients until every R-hat is below 1.01, without a fit over those with one.

Longer than 400 lines because each model is written for three libraries.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import use_threads, write_json

if __name__ == "__main__":
    use_threads(1)
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from arviz_stats.base import array
from pyro.infer.mcmc import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad

import scivi

array_stats: Any = (
    array.array_stats
)  # its functions are annotated as giving several arrays; of one they give one
STEPS = 997  # of the volatility: 1000 dims with its three parameters


@dataclass(frozen=True)
class Case:
    """One model, in three writings.

    Args:
        template, table: for SciVI.
        numpyro, pyro: as functions of the table's arrays.
        draws: of each chain; half as many before them.
        pyro_draws: of Pyro's one chain, and as many before them; None if its gradient is timed instead.
        warmups: lengths of warm-up that are tried with and without a fit.
        short: draws of each chain then.
    """

    template: scivi.Template
    table: xr.Dataset
    numpyro: Callable[..., None]
    pyro: Callable[..., None]
    draws: int
    pyro_draws: int | None
    warmups: tuple[int, ...]
    short: int


def schools() -> Case:
    """Rubin 1981, table 1; the effects from standard normals."""

    def model(batch: Any, prior: Any, nets: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with batch.plate("school"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("effect", dist.Normal(mu + tau * z, batch.sd))

    def in_numpyro(effect: Any, sd: Any) -> None:
        mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
        with numpyro.plate("school", len(sd)):
            z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
            numpyro.sample("effect", ndist.Normal(mu + tau * z, sd), obs=effect)

    def in_pyro(effect: Any, sd: Any) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", len(sd)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("effect", dist.Normal(mu + tau * z, sd), obs=effect)

    template = scivi.Template(
        name="eight schools",
        rows="school",
        model=model,
        fields={"effect": scivi.Field(("school",), role="observed"), "sd": scivi.Field(("school",))},
        dims={"mu": (), "tau": (), "z": ("school",)},
    )
    table = xr.Dataset(
        {
            "effect": ("school", [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
            "sd": ("school", [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
        }
    )
    return Case(template, table, in_numpyro, in_pyro, 1000, 200, (25, 100, 400), 1000)


def logistic() -> Case:
    """25 coefficients with standard normal priors."""

    def model(batch: Any, prior: Any, nets: Any) -> None:
        b = pyro.sample("b", dist.Normal(batch.x.new_zeros(25), 1.0).to_event(1))
        with batch.plate("row"):
            logits = (b @ batch.x.T).reshape(*b.shape[:-2], -1)  # draws come as (draw, 1, covariate)
            batch.observe("y", dist.Bernoulli(logits=logits))

    def in_numpyro(x: Any, y: Any) -> None:
        b = numpyro.sample("b", ndist.Normal(jnp.zeros(25), 1.0).to_event(1))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", ndist.Bernoulli(logits=x @ b), obs=y)

    def in_pyro(x: Any, y: Any) -> None:
        b = pyro.sample("b", dist.Normal(x.new_zeros(25), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)

    template = scivi.Template(
        name="logistic regression",
        rows="row",
        model=model,
        fields={"x": scivi.Field(("row", "covariate")), "y": scivi.Field(("row",), role="observed")},
        dims={"b": ("covariate",)},
    )
    random = np.random.default_rng(1)
    x = np.concatenate([np.ones((1000, 1)), random.normal(size=(1000, 24))], 1)
    y = random.binomial(1, 1 / (1 + np.exp(-x @ (0.5 * random.normal(size=25))))).astype(float)
    table = xr.Dataset({"x": (("row", "covariate"), x), "y": ("row", y)})
    return Case(template, table, in_numpyro, in_pyro, 1000, 200, (25, 100, 400), 1000)


def recurrence(phi: Any, e: Any, lagged: Callable[[Any, int], Any]) -> Any:
    """x[t] = phi x[t-1] + e[t] in log2(n) sums over the series: after k of them, the last 2^k terms."""
    lag = 1
    while lag < e.shape[-1]:
        e, phi, lag = e + phi * lagged(e, lag), phi * phi, 2 * lag
    return e


def lagged_torch(x: torch.Tensor, lag: int) -> torch.Tensor:
    return torch.nn.functional.pad(x[..., :-lag], (lag, 0))


def volatility() -> Case:
    """y[t] ~ N(0, exp(h[t] / 2)), h - mu the autoregression of standard normal innovations z."""

    def model(batch: Any, prior: Any, nets: Any) -> None:
        phi, sigma, mu = _volatility_prior(pyro, dist)
        with batch.plate("time"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("y", dist.Normal(0.0, torch.exp(0.5 * _log_variance(phi, sigma, mu, z))))

    def in_pyro(y: Any) -> None:
        phi, sigma, mu = _volatility_prior(pyro, dist)
        with pyro.plate("time", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, torch.exp(0.5 * _log_variance(phi, sigma, mu, z))), obs=y)

    def in_numpyro(y: Any) -> None:
        phi, sigma, mu = _volatility_prior(numpyro, ndist)
        with numpyro.plate("time", len(y)):
            z: Any = numpyro.sample("z", ndist.Normal(0.0, 1.0))
            e = sigma * z.at[0].divide(jnp.sqrt(1 - phi**2))

            def step(last: Any, new: Any) -> Any:
                now = phi * last + new
                return now, now

            h = mu + jax.lax.scan(step, 0.0, e)[1]  # faster here than the sums of ``recurrence``
            numpyro.sample("y", ndist.Normal(0.0, jnp.exp(0.5 * h)), obs=y)

    template = scivi.Template(
        name="stochastic volatility",
        rows="time",
        model=model,
        fields={"y": scivi.Field(("time",), role="observed")},
        dims={"phi": (), "sigma": (), "mu": (), "z": ("time",)},
    )
    random = np.random.default_rng(1)
    h = np.full(STEPS, -1.0)
    for t in range(1, STEPS):
        h[t] = -1 + 0.95 * (h[t - 1] + 1) + 0.25 * random.normal()
    table = xr.Dataset({"y": ("time", np.exp(h / 2) * random.normal(size=STEPS))})
    return Case(template, table, in_numpyro, in_pyro, 1500, None, (50, 150, 500), 1500)


def _volatility_prior(library: Any, laws: Any) -> tuple[Any, Any, Any]:
    """Phi, sigma and mu; priors in the manner of Kim, Shephard and Chib 1998."""
    phi = library.sample("phi", laws.Beta(20.0, 1.5))
    sigma = library.sample("sigma", laws.HalfNormal(1.0))
    return phi, sigma, library.sample("mu", laws.Normal(0.0, 5.0))


def _log_variance(phi: Any, sigma: Any, mu: Any, z: torch.Tensor) -> torch.Tensor:
    begins = torch.arange(z.shape[-1]) == 0
    e = sigma * torch.where(begins, z / (1 - phi**2).sqrt(), z)
    return mu + recurrence(phi, e, lagged_torch)


CASES: dict[str, Callable[[], Case]] = {"schools": schools, "logistic": logistic, "volatility": volatility}


@dataclass(frozen=True)
class Run:
    """What a sampler gave: draws (chain, draw, entry), and what they took."""

    draws: np.ndarray
    sampling_s: float
    compile_s: float
    total_s: float
    cpu_s: float
    gradients: int
    n_steps: np.ndarray

    @property
    def ess(self) -> float:
        """The smallest effective number of draws of any entry."""
        return min(float(array_stats.ess(self.draws[..., k])) for k in range(self.draws.shape[-1]))

    @property
    def rhat(self) -> float:
        """The largest R-hat of any entry."""
        return max(float(array_stats.rhat(self.draws[..., k])) for k in range(self.draws.shape[-1]))

    def line(self, name: str) -> str:
        """The run in words."""
        return (
            f"  {name:24s} {self.ess / self.sampling_s:8.1f} effective draws/s (smallest {self.ess:.0f} in "
            f"{self.sampling_s:.2f} s; compile {self.compile_s:.1f} s, whole call {self.total_s:.1f} s, "
            f"{self.cpu_s:.1f} s of the processor); "
            f"{self.gradients} gradients, {1e6 * self.sampling_s / self.gradients:.0f} us each; "
            f"R-hat {self.rhat:.4f}"
        )


def flat(named: Any, names: Mapping[str, Any]) -> np.ndarray:
    """Draws (chain, draw, entry) from arrays by name."""
    parts = [np.asarray(named[name]) for name in names]
    return np.concatenate([p.reshape(*p.shape[:2], -1) for p in parts], 2)


def run_scivi(case: Case, seed: int, draws: int, warmup: int, given: scivi.Fit | None = None) -> Run:
    begun, cpu = time.perf_counter(), time.process_time()
    how = {"draws": draws, "warmup": warmup, "seed": seed, "progress": False}
    tree = scivi.nuts(case.template, case.table, given=given, backend="nutpie", **how)
    total, cpu = time.perf_counter() - begun, time.process_time() - cpu
    told = json.loads(tree.attrs["provenance"])["sampler"]
    found, steps = (
        flat(tree["posterior"].to_dataset(), case.template.dims),
        np.asarray(tree["sample_stats"]["n_steps"]),
    )
    return Run(found, told["sampling_s"], told["compile_s"], total, cpu, told["gradients"], steps)


class NumPyro:
    """A NumPyro sampler: its first run compiles, later ones run the same code."""

    def __init__(self, case: Case, method: str) -> None:
        self.case, self.compile_s = case, 0.0
        self.data = [jnp.asarray(case.table[name].values) for name in case.template.fields]
        kernel = numpyro.infer.NUTS(case.numpyro)
        how = {"num_chains": 4, "chain_method": method, "progress_bar": False}
        self.chains = numpyro.infer.MCMC(kernel, num_warmup=case.draws // 2, num_samples=case.draws, **how)
        first = self.run(-1)
        self.compile_s = max(0.0, first.total_s - self.run(0).total_s)

    def run(self, seed: int) -> Run:
        """Sample."""
        begun, cpu = time.perf_counter(), time.process_time()
        self.chains.run(jax.random.PRNGKey(seed + 1), *self.data, extra_fields=("num_steps",))
        found = jax.block_until_ready(self.chains.get_samples(group_by_chain=True))
        total, cpu = time.perf_counter() - begun, time.process_time() - cpu
        steps = np.asarray(self.chains.get_extra_fields()["num_steps"]).reshape(4, -1)
        gradients = int(1.5 * steps.sum())  # the warm-up's are not told
        return Run(flat(found, self.case.template.dims), total, self.compile_s, total, cpu, gradients, steps)


def pyro_rate(case: Case, name: str, ess_per_gradient: float) -> float:
    """Smallest effective draws per second of Pyro's NUTS."""
    data = [torch.as_tensor(case.table[n].values) for n in case.template.fields]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        if case.pyro_draws is None:
            first, energy, *_ = initialize_model(case.pyro, data)
            begun = time.perf_counter()
            for _ in range(50):
                potential_grad(energy, first)
            seconds = (time.perf_counter() - begun) / 50
            print(f"  Pyro: {1e6 * seconds:.0f} us a gradient, granted NumPyro's effective draws for each")
            return ess_per_gradient / seconds
        kernel = NUTS(case.pyro)
        n = case.pyro_draws
        chain = MCMC(kernel, num_samples=n, warmup_steps=n, disable_progbar=True)
        begun = time.perf_counter()
        chain.run(*data)
        run = Run(flat(chain.get_samples(group_by_chain=True), case.template.dims), 1, 0, 1, 1, 1, np.ones(n))
        seconds = time.perf_counter() - begun
        print(f"  Pyro, one chain of {n} draws: smallest effective {run.ess:.0f} in {seconds:.1f} s")
        return run.ess / seconds
    finally:
        torch.set_default_dtype(before)


def shift(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Difference of the means in its Monte Carlo standard errors, by entry."""
    errors = [
        np.array([float(array_stats.mcse(x[..., k], method="mean")) for k in range(x.shape[-1])])
        for x in (ours, theirs)
    ]
    return (ours.mean((0, 1)) - theirs.mean((0, 1))) / np.hypot(*errors)


def warm_start(case: Case) -> float:
    """Gradients until R-hat stays below 1.01, without a fit over those with one; medians of three seeds."""
    fit = scivi.fit(case.template, case.table, scivi.Plan(rows_per_batch=None), progress=False)
    best = []
    for given in (None, fit):
        needed = [np.median([needed_by(case, s, w, given) for s in range(100, 103)]) for w in case.warmups]
        told = ", ".join(f"{n:.0f} after {w}" for n, w in zip(needed, case.warmups, strict=True))
        print(f"  gradients {'without' if given is None else 'with'} a fit, by warm-up: {told}", flush=True)
        best.append(min(needed))
    return float(best[0] / best[1])


def needed_by(case: Case, seed: int, warmup: int, given: scivi.Fit | None) -> float:
    """Gradients of warm-up and draws from which on R-hat is below 1.01; infinite if it never is."""
    run = run_scivi(case, seed, case.short, warmup, given)
    needed = np.inf
    for draws in range(case.short, 0, -case.short // 20):
        part = replace(run, draws=run.draws[:, :draws])
        if part.rhat >= 1.01:
            break
        needed = run.gradients - run.n_steps[:, draws:].sum()
    return float(needed)


def measure(name: str, repeats: int, warm: bool) -> dict[str, float]:
    """The figures of one model."""
    case = CASES[name]()
    print(f"{name}: {case.template.name}", flush=True)
    peers = {method: NumPyro(case, method) for method in ("sequential", "vectorized")}
    run_scivi(
        case, 0, case.draws, case.draws // 2
    )  # its code is on disk from here, as NumPyro's is in memory
    ratios, ours, theirs = [], [], []
    for seed in range(repeats):
        ours.append(run_scivi(case, seed, case.draws, case.draws // 2))
        found = {method: peer.run(seed) for method, peer in peers.items()}
        theirs.append(max(found.values(), key=lambda run: run.ess / run.sampling_s))
        ratios.append(ours[-1].ess / ours[-1].sampling_s / (theirs[-1].ess / theirs[-1].sampling_s))
        print(ours[-1].line("SciVI"))
        for method, run in found.items():
            print(run.line(f"NumPyro {method}"), flush=True)
    busy = [a.ess / a.cpu_s / (b.ess / b.cpu_s) for a, b in zip(ours, theirs, strict=True)]
    rate = float(np.median([run.ess / run.sampling_s for run in ours]))
    per_gradient = float(np.median([run.ess / run.gradients for run in theirs]))
    gaps = [shift(a.draws, b.draws) for a, b in zip(ours, theirs, strict=True)]
    figures = {
        f"ess_ratio_numpyro_{name}": float(np.median(ratios)),
        f"ess_ratio_numpyro_{name}_least": min(ratios),
        f"ess_ratio_numpyro_{name}_cpu": float(np.median(busy)),
        f"ess_ratio_pyro_{name}": rate / pyro_rate(case, name, per_gradient),
        f"rhat_max_{name}": max(run.rhat for run in ours),
        f"shift_{name}": max(float(np.abs(gap).max()) for gap in gaps),
        f"ess_per_s_{name}": rate,
    }
    if warm:
        figures[f"warmstart_{name}"] = warm_start(case)
    return figures


def main() -> None:
    """Measure each model, print, and write what was found."""
    reader = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    reader.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    reader.add_argument("--repeats", type=int, default=5)
    reader.add_argument("--no-warm", action="store_true", help="leave out the starts from a fit")
    reader.add_argument("--json", type=Path)
    asked = reader.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    jax.config.update("jax_enable_x64", True)
    figures: dict[str, float] = {}
    for name in asked.models:
        found = measure(name, asked.repeats, not asked.no_warm)
        figures |= found
        for figure, number in found.items():
            print(f"{figure:36s} {number:.4g}", flush=True)
        settings = {"threads": 1, "repeats": asked.repeats, "chains": 4}
        write_json(asked.json, "effective draws per second of NUTS", figures, settings)


if __name__ == "__main__":
    main()
