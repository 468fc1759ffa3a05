"""Is the whole posterior of a published signalling problem found, with its flat and one-sided directions?

    python benchmarks/kinetics_boehm.py --json kinetics_boehm.json

Boehm et al. 2014 (nine parameters, 48 measurements, uniform priors on log scales); the data give
``k_imp_homo`` no upper bound and ``k_exp_hetero`` no lower one. Three ways to the posterior, from one mode:

    normal   ``scivi.fit`` and ``scivi.draw`` as they come
    flow     the guide "flow", by its own plan
    NUTS     ``scivi.nuts``, chains side by side, begun at draws of the flow

Distances are of each parameter's marginal from NUTS's: of means in NUTS's sd, ratios of sds, and
Kolmogorov's, the largest difference of cumulative probabilities.

Figures, the worst of the parameters, of GUIDE normal and flow:
    GUIDE_shift_max_sd, GUIDE_sd_ratio_min, GUIDE_sd_ratio_max, GUIDE_kolmogorov_max; of 1000 independent
        draws on either side Kolmogorov's distance is .05 by chance alone.
    normal_k_hat, flow_k_hat: of all importance weights. normal_s, flow_s: fit and draws; search_s before.
    nuts_rhat_max, nuts_ess_min, nuts_divergences, nuts_s.
    unidentified: how many parameters the report names as open at an end or hardly narrowed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
from arviz_stats.base import array
from record import use_threads, write_json
from scipy.stats import ks_2samp

import scivi
from domains.kinetics import kinetics
from scivi import analysis

DATA = Path(__file__).resolve().parents[1] / "data" / "kinetics" / "Boehm_JProteomeRes2014"
RTOL = 1e-4  # a solution at the optimum is wrong by 3e-6 of its largest, the measurements by 5 in 100
DRAWS = 2000
array_stats: Any = array.array_stats  # annotated as giving several arrays; of one it gives one


def distances(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Of marginals, (draw, parameter) both."""
    shift = np.abs(found.mean(0) - reference.mean(0)) / reference.std(0)
    ratio = found.std(0) / reference.std(0)
    apart = [cast(Any, ks_2samp(a, b)).statistic for a, b in zip(found.T, reference.T, strict=True)]
    return {
        "shift_max_sd": float(shift.max()),
        "sd_ratio_min": float(ratio.min()),
        "sd_ratio_max": float(ratio.max()),
        "kolmogorov_max": float(max(apart)),
    }


def drawn(tree: xr.DataTree) -> np.ndarray:
    """Parameters on their own scales (draw, parameter)."""
    theta = tree["posterior"]["theta"].stack(sample=("chain", "draw"))
    return theta.transpose("sample", "parameter").values


def row(name: str, values: np.ndarray) -> str:
    """Quantiles of each parameter."""
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95], axis=0)
    return f"{name:10s}" + " ".join(
        f"{m:6.2f} ({a:5.2f} {b:5.2f})" for a, m, b in zip(low, middle, high, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=600, help="of the flow")
    parser.add_argument("--draws", type=int, default=150, help="of each of NUTS's chains")
    parser.add_argument("--warmup", type=int, default=150, help="likewise")
    parser.add_argument("--chains", type=int, default=8, help="of NUTS; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads(1)
    options: dict[str, Any] = {"rtol": RTOL}
    begun = time.perf_counter()
    template, table = kinetics.from_data(DATA, seed=given.seed, **options)
    figures = {"search_s": time.perf_counter() - begun}
    assert template.made is not None
    start = template.made[1]["start"]
    problem = kinetics.form_of(template).problem
    flowing = kinetics.make(problem, guide="flow", start=start, **options)
    plans = {
        "normal": (template, scivi.Plan(seed=given.seed)),
        "flow": (flowing, scivi.Plan(**{**flowing.plan, "steps": given.steps, "seed": given.seed})),
    }
    samples: dict[str, np.ndarray] = {}
    fit = None
    for name, (made, plan) in plans.items():
        begun = time.perf_counter()
        fit = scivi.fit(made, table, plan)
        result = scivi.draw(fit, table, DRAWS, seed=given.seed)
        figures[f"{name}_s"] = time.perf_counter() - begun
        found = analysis.reliability(result)
        figures[f"{name}_k_hat"] = float(found["k_hat"].max())
        samples[name] = drawn(result)
        told = analysis.report(result)
        print(
            f"{name}: {figures[f'{name}_s']:.0f} s, {told.attrs['verdict']}: {told.attrs['why']}", flush=True
        )
        open_ends = [
            str(c.values)
            for c in told["sentence"]
            if "data hardly" in str(c.values) or "one side" in str(c.values)
        ]
        print("\n".join(open_ends), flush=True)
        if name == "flow":
            figures["unidentified"] = float(told["value"].sel(check="identification")) if open_ends else 0.0
    if given.chains:
        begun = time.perf_counter()
        length = {"draws": given.draws, "warmup": given.warmup, "chains": given.chains}
        sampled = scivi.nuts(flowing, table, given=fit, seed=given.seed, **length)
        theta = sampled["posterior"]["theta"]
        figures |= {
            "nuts_s": time.perf_counter() - begun,
            "nuts_rhat_max": float(array_stats.rhat(theta.values, chain_axis=0, draw_axis=1).max()),
            "nuts_ess_min": float(array_stats.ess(theta.values, chain_axis=0, draw_axis=1).min()),
            "nuts_divergences": float(np.asarray(sampled["sample_stats"]["diverging"]).sum()),
        }
        reference = drawn(sampled)
        for name, values in samples.items():
            figures |= {f"{name}_{k}": v for k, v in distances(values, reference).items()}
        samples["nuts"] = reference
    print("parameters: " + ", ".join(map(str, fit.bound.template.coords["parameter"])) if fit else "")
    for name, values in samples.items():
        print(row(name, values))
    print("\n".join(f"{name:24s} {value:.3f}" for name, value in sorted(figures.items())))
    write_json(
        given.json, (__doc__ or "").split("\n")[0], figures, {"steps": given.steps, "seed": given.seed}
    )


if __name__ == "__main__":
    main()
