"""How near are SVI and NUTS to posteriordb's reference on predator and prey, and how long do they take?

    python benchmarks/kinetics_predators.py --json kinetics_predators.json

The problem is ``domains.kinetics.predators``, the reference 10,000 draws of Stan. All is said of the
logarithms of the eight parameters, in standard deviations of the reference. Three ways to the posterior:

    SVI      ``kinetics.from_data``, ``scivi.fit`` and ``scivi.draw`` as they come
    NUTS     ``scivi.nuts`` on the same problem at rtol 1e-5, eight chains side by side, started from that fit
    NumPyro  its NUTS on its own Lotka-Volterra example (examples/ode.py): the same priors and likelihood, a
             dense mass matrix, equations by ``jax.experimental.ode.odeint`` at rtol 1e-6 and atol 1e-5, or by
             diffrax's Tsit5 at the same; four chains, in turn or vectorised, in float64. They start at values
             near the mode: from medians of the prior, one in four stayed in another mode (R-hat 1.5). The way
             with the most effective draws per second counts

NUTS and NumPyro run alternately in one process on one core, --repeats times with different seeds. Effective
draws are the smallest bulk ESS over the parameters. Seconds are those of the processor, which a busy machine
disturbs less; of one thread on an idle core they are those of the clock, which are printed beside them.

Figures:
    svi_shift_max_sd: largest |difference of means|. Its own error: 4000 draws, .016, and the reference's .01.
    svi_sd_ratio_min, svi_sd_ratio_max: sd over the reference's, least and largest over the parameters.
    svi_k_hat: of all importance weights.
    svi_search_s, svi_fit_s, svi_draw_s, svi_s: from the files to draws; the last is their sum.
    nuts_shift_max_sd, nuts_sd_ratio_min, nuts_sd_ratio_max, nuts_rhat_max, nuts_ess_min: the worst of the
        repeats. nuts_s (whole call), nuts_s_per_1000, nuts_gradients (of one chain or more at once): medians.
    numpyro_WAY_s and so on: the same of each of NumPyro's ways, without compiling; numpyro_WAY_compile_s:
        seconds of a first run, which compiles, less the median of the others.
    numpyro_best_s_per_1000: of its best way.
    nuts_over_numpyro: NumPyro's seconds per effective draw over ours (above 1: ours is faster), median, with
        _low and _high, the extremes.
    svi_over_nuts, svi_over_numpyro: seconds of NUTS, and of NumPyro's best way without compiling, for a
        thousand effective draws over those of the whole SVI, search and draws included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from record import use_threads, write_json

if __name__ == "__main__":
    use_threads(1)
    os.environ["JAX_PLATFORMS"] = "cpu"

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from arviz_stats.base import array
from jax.experimental.ode import odeint

import scivi
from domains.kinetics import kinetics, predators

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "kinetics" / "lynx_hare" / "hudson_lynx_hare.json"
REFERENCE = ROOT.parent / "shared/data/kinetics/posteriordb/hudson_lynx_hare-lotka_volterra.draws.zip"
THEIRS = {"a": "theta[1]", "b": "theta[2]", "g": "theta[3]", "d": "theta[4]"}
THEIRS |= {"u0": "z_init[1]", "v0": "z_init[2]", "sd_u": "sigma[1]", "sd_v": "sigma[2]"}
array_stats: Any = array.array_stats  # annotated as giving several arrays; of one it gives one
WAYS = [f"{how}_{method}" for how in ("odeint", "diffrax") for method in ("sequential", "vectorized")]
SVI_DRAWS, CHAINS, NUTS_RTOL = 4000, 8, 1e-5
RTOL, ATOL, MOST_STEPS = 1e-6, 1e-5, 1000  # of NumPyro's example
START = {  # the nominal values of ours: from medians of the prior one chain in four stays in another mode
    "theta": np.array([0.5, 0.03, 0.8, 0.03]),
    "z_init": np.array([30.0, 5.0]),
    "sigma": np.array([0.3, 0.3]),
}


@dataclass(frozen=True)
class Run:
    """Draws of the log parameters (chain, draw, parameter), and the seconds that they took.

    Args:
        draws: of the logarithms.
        seconds: of the processor.
        clock: by the clock.
    """

    draws: np.ndarray
    seconds: float
    clock: float

    @property
    def ess(self) -> float:
        """The smallest bulk effective number of draws."""
        return min(float(array_stats.ess(x, method="bulk")) for x in np.moveaxis(self.draws, 2, 0))

    @property
    def rhat(self) -> float:
        """The largest R-hat."""
        return max(float(array_stats.rhat(x, method="rank")) for x in np.moveaxis(self.draws, 2, 0))

    @property
    def s_per_1000(self) -> float:
        """Seconds for a thousand effective draws."""
        return 1000 * self.seconds / self.ess

    def against(self, reference: np.ndarray) -> dict[str, float]:
        """How far means and scatter are from those of reference draws (draw, parameter)."""
        own, centre, spread = self.draws.reshape(-1, self.draws.shape[2]), reference.mean(0), reference.std(0)
        ratio = own.std(0) / spread
        return {
            "shift_max_sd": float(np.abs((own.mean(0) - centre) / spread).max()),
            "sd_ratio_min": float(ratio.min()),
            "sd_ratio_max": float(ratio.max()),
        }

    def line(self, name: str, reference: np.ndarray) -> str:
        """The run in words."""
        far = self.against(reference)
        return (
            f"  {name:28s} {self.seconds:7.1f} s ({self.clock:.1f} by the clock), smallest bulk ESS "
            f"{self.ess:.0f}, {self.s_per_1000:.1f} s "
            f"for 1000; R-hat {self.rhat:.4f}; shift {far['shift_max_sd']:.3f} sd, sd ratios "
            f"{far['sd_ratio_min']:.3f} to {far['sd_ratio_max']:.3f}"
        )


def reference_draws(path: Path) -> np.ndarray:
    """Log parameters of posteriordb's draws, in our order (draw, parameter)."""
    if not path.exists():
        raise SystemExit(
            f'there is no "{path}": name posteriordb\'s hudson_lynx_hare-lotka_volterra draws by --reference.'
        )
    with zipfile.ZipFile(path) as packed:
        chains = json.loads(packed.read(packed.namelist()[0]))
    return np.log([np.concatenate([chain[name] for chain in chains]) for name in THEIRS.values()]).T


def of_tree(tree: xr.DataTree) -> np.ndarray:
    """Draws of the log parameters of a result, (chain, draw, parameter)."""
    theta = tree["posterior"]["theta"].transpose("chain", "draw", "parameter")
    return theta.sel(parameter=[f"log {name}" for name in THEIRS]).values.astype(float)


def svi(seed: int) -> tuple[dict[str, float], Run, scivi.Fit, Any]:
    """The fit and its draws: figures, run, fit, table."""
    begun, marks = time.perf_counter(), [time.process_time()]
    measured = predators.read(DATA)
    template, table = kinetics.from_data((predators.problem(), measured), seed=seed, progress=False)
    marks.append(time.process_time())
    fit = scivi.fit(template, table, scivi.Plan(seed=seed), progress=False)
    marks.append(time.process_time())
    result = scivi.draw(fit, table, SVI_DRAWS, seed=seed)
    marks.append(time.process_time())
    figures: dict[str, float] = dict(
        zip(("svi_search_s", "svi_fit_s", "svi_draw_s"), map(float, np.diff(marks)), strict=True)
    )
    figures["svi_s"], clock = marks[-1] - marks[0], time.perf_counter() - begun
    figures["svi_k_hat"] = float(scivi.analysis.reliability(result)["k_hat"].max())
    return figures, Run(of_tree(result), figures["svi_s"], clock), fit, table


def nuts(fit: scivi.Fit, table: Any, seed: int, draws: int, warmup: int) -> tuple[Run, int]:
    """SciVI's chains side by side, started from a fit; and how many gradients of one chain they took."""
    template = kinetics.make(predators.problem(), rtol=NUTS_RTOL)
    begun, clock = time.process_time(), time.perf_counter()
    tree = scivi.nuts(
        template, table, given=fit, draws=draws, warmup=warmup, chains=CHAINS, seed=seed, progress=False
    )
    seconds, clock = time.process_time() - begun, time.perf_counter() - clock
    told = json.loads(tree.attrs["provenance"])["sampler"]
    return Run(of_tree(tree), seconds, clock), told["gradients"]


def slope(z: jax.Array, t: jax.Array, theta: jax.Array) -> jax.Array:
    """The equations of NumPyro's example: du/dt = (a - b v) u, dv/dt = (d u - g) v."""
    u, v = z
    a, b, g, d = theta
    return jnp.stack([(a - b * v) * u, (d * u - g) * v])


def by_odeint(z0: Any, times: Any, theta: Any) -> Any:
    """The solution as the example has it, (time, state)."""
    return odeint(slope, z0, times, theta, rtol=RTOL, atol=ATOL, mxstep=MOST_STEPS)


def by_diffrax(z0: Any, times: Any, theta: Any) -> Any:
    """The same by diffrax, with its default adjoint; (time, state)."""
    found = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, theta: slope(z, cast(jax.Array, t), theta)),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=z0,
        args=theta,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=ATOL),
        max_steps=MOST_STEPS,
        throw=False,
    )
    return found.ys


def model(times: Any, pelts: Any, solved: Callable[[Any, Any, Any], Any]) -> None:
    """The story of ``domains.kinetics.predators``, as in NumPyro's example."""
    z0 = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1.0).expand([2]))
    centre, spread = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = numpyro.sample("theta", dist.TruncatedNormal(centre, spread, low=0.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]))
    numpyro.sample("pelts", dist.LogNormal(jnp.log(solved(z0, times, theta)), sigma), obs=pelts)


class NumPyro:
    """A sampler of NumPyro's: its first run compiles, later ones run the same code."""

    def __init__(self, solved: Callable[..., Any], method: str, draws: int, warmup: int) -> None:
        measured = predators.read(DATA)
        self.data = [jnp.asarray(measured[name].values[0]) for name in ("time", "measured")]
        kernel = numpyro.infer.NUTS(
            lambda times, pelts: model(times, pelts, solved),
            dense_mass=True,
            init_strategy=numpyro.infer.init_to_value(values=START),
        )
        how: dict[str, Any] = {"num_chains": 4, "chain_method": method, "progress_bar": False}
        self.chains = numpyro.infer.MCMC(kernel, num_warmup=warmup, num_samples=draws, **how)
        self.first_s = 0.0

    def run(self, seed: int) -> Run:
        """Sample."""
        begun, clock = time.process_time(), time.perf_counter()
        self.chains.run(jax.random.PRNGKey(seed), *self.data)
        found = jax.block_until_ready(self.chains.get_samples(group_by_chain=True))
        seconds, clock = time.process_time() - begun, time.perf_counter() - clock
        parts = [np.asarray(found[name]) for name in ("theta", "z_init", "sigma")]
        return Run(np.log(np.concatenate(parts, 2)), seconds, clock)


def alternated(
    ways: Mapping[str, Callable[[int], Run]], repeats: int, reference: np.ndarray
) -> dict[str, list[Run]]:
    """Runs of each way, one after the other, with other seeds each time."""
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for seed in range(repeats):
        for name, way in ways.items():
            found[name].append(way(seed))
            print(found[name][-1].line(name, reference), flush=True)
    return found


def summary(name: str, runs: list[Run], reference: np.ndarray) -> dict[str, float]:
    """Worst agreement and median times."""
    far = [run.against(reference) for run in runs]
    return {
        f"{name}_shift_max_sd": max(each["shift_max_sd"] for each in far),
        f"{name}_sd_ratio_min": min(each["sd_ratio_min"] for each in far),
        f"{name}_sd_ratio_max": max(each["sd_ratio_max"] for each in far),
        f"{name}_rhat_max": max(run.rhat for run in runs),
        f"{name}_ess_min": min(run.ess for run in runs),
        f"{name}_s": float(np.median([run.seconds for run in runs])),
        f"{name}_s_per_1000": float(np.median([run.s_per_1000 for run in runs])),
    }


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """All figures."""
    reference = reference_draws(asked.reference)
    figures, fitted, fit, table = svi(0)
    print(fitted.line("SVI", reference), flush=True)
    figures |= {f"svi_{name}": value for name, value in fitted.against(reference).items()}
    peers = {
        f"numpyro_{how}_{method}": NumPyro(solved, method, asked.peer_draws, asked.peer_draws)
        for how, solved in (("odeint", by_odeint), ("diffrax", by_diffrax))
        for method in ("sequential", "vectorized")
        if f"{how}_{method}" in asked.ways
    }
    for name, peer in peers.items():
        peer.first_s = peer.run(1000).seconds
        print(f"  {name}: {peer.first_s:.1f} s of the first run, which compiles", flush=True)
    counts: list[int] = []

    def ours(seed: int) -> Run:
        run, gradients = nuts(fit, table, seed, asked.draws, asked.warmup)
        counts.append(gradients)
        return run

    ways: dict[str, Callable[[int], Run]] = {"nuts": ours, **{k: v.run for k, v in peers.items()}}
    found = alternated(ways, asked.repeats, reference)
    for name, runs in found.items():
        figures |= summary(name, runs, reference)
    figures |= {f"{name}_compile_s": peer.first_s - figures[f"{name}_s"] for name, peer in peers.items()}
    best = min(peers, key=lambda name: figures[f"{name}_s_per_1000"])
    ratios = [b.s_per_1000 / a.s_per_1000 for a, b in zip(found["nuts"], found[best], strict=True)]
    print(f"NumPyro's best way: {best}")
    return figures | {
        "nuts_gradients": float(np.median(counts)),
        "numpyro_best_s_per_1000": figures[f"{best}_s_per_1000"],
        "nuts_over_numpyro": float(np.median(ratios)),
        "nuts_over_numpyro_low": min(ratios),
        "nuts_over_numpyro_high": max(ratios),
        "svi_over_nuts": figures["nuts_s_per_1000"] / figures["svi_s"],
        "svi_over_numpyro": figures[f"{best}_s_per_1000"] / figures["svi_s"],
    }


def main() -> None:
    """Measure, print, and write what was found."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--reference", type=Path, default=REFERENCE, help="posteriordb's draws, zipped")
    reader.add_argument("--repeats", type=int, default=3)
    reader.add_argument("--draws", type=int, default=300, help="of each of our chains")
    reader.add_argument("--warmup", type=int, default=200, help="of each of our chains")
    reader.add_argument("--peer-draws", type=int, default=1000, help="and warm-up, of each of NumPyro's")
    reader.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of NumPyro")
    reader.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    asked = reader.parse_args()
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    figures = measure(asked)
    for name, value in figures.items():
        print(f"{name:44s} {value:.4g}", flush=True)
    settings = {"threads": 1, "repeats": asked.repeats, "draws": asked.draws, "chains": CHAINS}
    write_json(asked.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
