"""How near is the fitted photon template to the exact posterior, of every source and of the population?

    python benchmarks/photons_accuracy.py --n 100000 --seed 0 --json photons_accuracy.json
    python benchmarks/photons_accuracy.py --n 100000 --seed 0 --extrapolate

The catalogue is simulated (its truth and seed of its own), fitted with the default plan, and compared with
quadrature in float64 that shares no code with the engine (`photons_oracle`, `photons_scores`).

Figures:
    kl_median, kl_p95: KL(exact || guide) of (u, v) per source, nats, over the catalogue, at its globals.
    kl_worst_bin: the largest median of a bin of n_on.
    sd_ratio_min, sd_ratio_max: of the bins' median sd(u), guide over exact.
    mu_error_sd, sigma_error_sd: |guide's mean - exact mean| of mu and of log sigma, in exact sd.
    global_sd_ratio_min, global_sd_ratio_max: the guide's sd of the four globals over the exact one.
    coverage90_gap_max: over bins, the largest |fraction of true u in the guide's central 90 % interval - that
        in the exact one|, on the same sources.

With --extrapolate also, over 600 new sources with 3e3 to 3e6 expected counts, at the fit's globals:
    bias_sd_max: the largest |mean of u, guide - exact| in exact sd, of all sources.
    extrapolated_sd_ratio_min, extrapolated_sd_ratio_max: the extremes of sd(u), guide over exact, of all.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from photons_fit import fit_scivi, globals_of, guide_of, prior, use_threads, write_json
from photons_oracle import GLOBALS, Catalogue, population, simulate
from photons_scores import BINS, GuideOf, by_bin, score, stratified, weighted_quantile
from torch import Tensor

DATA_SEED = 20_000  # added to --seed: the data are never drawn with the seed of the fit
PER_BIN = 500
EXTRAPOLATED = (math.log(3e3), math.log(3e6))
EXTRAPOLATED_DRAWS = 20_000  # error of a source's bias .007 sd, of its sd ratio .005


def source_figures(rows: Catalogue, theta: Tensor, guide: GuideOf, seed: int) -> dict[str, float]:
    """Score a stratified subset and print it by bin of n_on."""
    some, bins, weight = stratified(rows, PER_BIN, seed)
    scores = score(some, theta, guide)
    table = by_bin(scores, bins)
    print("     n_on  sources  KL median    p95   bias(sd)  sd ratio  cover 90 %  exact  mass of the 90 %")
    for row in table:
        low, high = BINS[int(row["bin"])]
        print(
            f"{low:4.0f}-{high:<4.0f} {row['n']:8.0f} {row['kl_median']:10.4f} {row['kl_p95']:6.4f} "
            f"{row['bias_median']:+10.3f} {row['sd_ratio']:9.3f} {row['coverage90']:11.3f} "
            f"{row['exact_coverage90']:6.3f} {row['mass90']:8.3f}"
        )
    return {
        "kl_median": weighted_quantile(scores["kl"], weight, 0.5),
        "kl_p95": weighted_quantile(scores["kl"], weight, 0.95),
        "kl_worst_bin": max(row["kl_median"] for row in table),
        "sd_ratio_min": min(row["sd_ratio"] for row in table),
        "sd_ratio_max": max(row["sd_ratio"] for row in table),
        "coverage90_gap_max": max(abs(row["coverage90"] - row["exact_coverage90"]) for row in table),
    }


def population_figures(rows: Catalogue, mean: Tensor, sd: Tensor) -> dict[str, float]:
    """Compare the guide's globals with their exact posterior."""
    start = time.perf_counter()
    exact = population(rows, prior().log_density)
    seconds = time.perf_counter() - start
    error, ratio = (mean - exact.mean) / exact.sd, sd / exact.sd
    print(f"\nexact population in {seconds:.1f} s; last correction {exact.correction_sd:.4f} sd")
    print("global                 exact mean   exact sd   error (sd)   guide sd / exact")
    for i, name in enumerate(GLOBALS):
        print(f"{name:20s} {exact.mean[i]:12.5f} {exact.sd[i]:10.5f} {error[i]:+12.3f} {ratio[i]:18.3f}")
    return {
        "mu_error_sd": abs(float(error[0])),
        "sigma_error_sd": abs(float(error[1])),
        "global_sd_ratio_min": float(ratio.min()),
        "global_sd_ratio_max": float(ratio.max()),
    }


def extrapolated_figures(theta: Tensor, guide: GuideOf, seed: int, n: int = 600) -> dict[str, float]:
    """Score new sources far brighter than any in the fit, printed by half decade of expected counts."""
    rows = simulate(n, seed + 1, EXTRAPOLATED)
    scores = score(rows, theta, guide, EXTRAPOLATED_DRAWS, chunk=50)
    bias, ratio = scores["bias"], scores["sd_ratio"]
    edges = torch.linspace(*EXTRAPOLATED, 7, dtype=torch.float64)
    bins = torch.bucketize(rows.u + rows.log_exposure, edges[1:-1].contiguous())
    print(
        "\nexpected counts      sources  bias(sd) median  largest   sd ratio median    min    max  KL median"
    )
    for i in range(6):
        one, b, r = bins == i, bias[bins == i], ratio[bins == i]
        print(
            f"{edges[i].exp():8.2g}-{edges[i + 1].exp():<8.2g} {len(b):8d} {b.median():+12.3f} "
            f"{b.abs().max():11.3f} {r.median():15.3f} {r.min():8.3f} {r.max():6.3f} "
            f"{scores['kl'][one].median():8.4f}"
        )
    return {
        "bias_sd_max": float(bias.abs().max()),
        "extrapolated_sd_ratio_min": float(ratio.min()),
        "extrapolated_sd_ratio_max": float(ratio.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="sources")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the fit; the data have their own, derived from it"
    )
    parser.add_argument("--steps", type=int, help="instead of the default plan's")
    parser.add_argument(
        "--extrapolate", action="store_true", help="score sources beyond the range of training too"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    use_threads()
    rows = simulate(asked.n, DATA_SEED + asked.seed)
    start = time.perf_counter()
    fit = fit_scivi(rows, asked.seed, asked.steps)
    print(f"{asked.n} sources, {float((rows.n_on <= 2).double().mean()):.0%} with 0-2 counts; ", end="")
    print(f"fitted in {time.perf_counter() - start:.1f} s\n")
    torch.manual_seed(asked.seed)
    theta, sd = globals_of(fit)
    guide = guide_of(fit, theta)
    figures = source_figures(rows, theta, guide, asked.seed) | population_figures(rows, theta, sd)
    if asked.extrapolate:
        figures |= extrapolated_figures(theta, guide, DATA_SEED + asked.seed)
    print("\n" + "\n".join(f"{name:28s} {value:.5f}" for name, value in figures.items()))
    write_json(asked.json, __doc__.splitlines()[0], figures, {"n": asked.n, "seed": asked.seed})


if __name__ == "__main__":
    main()
