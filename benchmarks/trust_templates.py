"""How far from the truth are the five templates, each with its own guide and plan, beside its own oracle?

Run by ``trust.py``. Each function returns figures by name, each with the bounds that were promised.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scivi

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, tuple[float, float, float]]  # value, and the range in which it is wanted


def photons() -> Figures:
    """20,000 simulated sources beside quadrature: KL of a source in nats, the population in exact sd."""
    from photons_accuracy import population_figures, source_figures
    from photons_fit import fit_scivi, globals_of, guide_of
    from photons_oracle import simulate

    rows = simulate(20_000, seed=50_000)
    fit = fit_scivi(rows, seed=0)
    theta, sd = globals_of(fit)
    torch.manual_seed(0)
    found = source_figures(rows, theta, guide_of(fit, theta), 0) | population_figures(rows, theta, sd)
    return {
        "kl_median": (found["kl_median"], 0.0, 0.008),
        "kl_worst_bin": (found["kl_worst_bin"], 0.0, 0.012),
        "mean_error": (max(found["mu_error_sd"], found["sigma_error_sd"]), 0.0, 0.3),
        "sd_ratio_min": (found["global_sd_ratio_min"], 0.9, 1.1),
        "sd_ratio_max": (found["global_sd_ratio_max"], 0.9, 1.1),
    }


def methylation() -> Figures:
    """What 500 loci share beside NUTS, genotypes summed out by both."""
    from methylation_accuracy import nuts

    found = nuts(500)
    return {
        "mean_error": (found["nuts_worst_shift_sd"], 0.0, 0.3),
        "sd_ratio_min": (found["nuts_sd_ratio_min"], 0.8, 1.25),
        "sd_ratio_max": (found["nuts_sd_ratio_max"], 0.8, 1.25),
    }


def volatility() -> Figures:
    """1000 days of the S&P 500 beside NumPyro's NUTS: parameters, and the path."""
    sys.path.insert(0, str(ROOT))
    from tests.domains.finance.sv_oracles import by_nuts, sp500
    from tests.domains.finance.test_volatility import BASIC, corrected, drawn

    data = sp500(1000)
    theirs = by_nuts(data["returns"].values[0], leverage=False)
    tree, weight, _, _ = drawn(BASIC, data, 4000)
    shift, ratio = [], []
    for name in ("mu", "phi", "sigma"):
        mean, sd = corrected(tree["posterior"][name].values[0, :, 0], weight)
        shift.append(abs(mean - theirs[name].mean()) / theirs[name].std())
        ratio.append(sd / theirs[name].std())
    mean, _ = corrected(tree["posterior"]["log_variance"].values[0, :, 0], weight)
    path = np.sqrt((((mean - theirs["h"].mean(0)) / theirs["h"].std(0)) ** 2).mean())
    return {
        "mean_error": (float(max(shift)), 0.0, 0.2),
        "sd_ratio_min": (float(min(ratio)), 0.93, 1.07),
        "sd_ratio_max": (float(max(ratio)), 0.93, 1.07),
        "path_rms": (float(path), 0.0, 0.05),
    }


def kinetics() -> Figures:
    """Predator and prey beside posteriordb's ten thousand draws, logarithms of eight parameters."""
    from kinetics_predators import REFERENCE, reference_draws, svi

    _, run, _, _ = svi(seed=0)
    found = run.against(reference_draws(REFERENCE))
    return {
        "mean_error": (found["shift_max_sd"], 0.0, 0.2),
        "sd_ratio_min": (found["sd_ratio_min"], 0.8, 1.25),
        "sd_ratio_max": (found["sd_ratio_max"], 0.8, 1.25),
    }


def citeseq() -> Figures:
    """2000 cells that another program simulated: calls, and intervals of the background, beside the truth."""
    from citeseq_simulated import SIMULATION, loaded, ours, scored

    sim = loaded(SIMULATION)
    both = sim.simulate(0)
    cells, empties = (both[both.obs["is_empty"].to_numpy() == k].copy() for k in (False, True))
    truth, names = both.uns["truth"], list(both.obsm["protein_expression"].columns)
    isotypes = [n for n, is_isotype in zip(names, truth["isotype"], strict=True) if is_isotype]
    found = scored(sim, cells, truth, *ours(cells, empties, isotypes, 0))
    return {
        "auroc_mean": (found["auroc_mean"], 0.957, 1.0),  # within .02 of the simulation's own
        "background_cover90": (found["background_cover90"], 0.85, 0.95),
    }


TEMPLATES: Mapping[str, Callable[[], Figures]] = {
    one.__name__: one for one in (photons, methylation, volatility, kinetics, citeseq)
}


def measured(names: Any) -> dict[str, float]:
    """Print each figure beside what is wanted; all of them, and how many templates are within."""
    figures, within = {}, 0
    for name in names:
        found = TEMPLATES[name]()
        good = {key: low <= value <= high for key, (value, low, high) in found.items()}
        for key, (value, low, high) in found.items():
            print(
                f"{name:12s} {key:20s} {value:8.4f}  wanted {low:g} to {high:g}{'' if good[key] else '  <-'}"
            )
        figures |= {f"{name}_{key}": value for key, (value, _, _) in found.items()}
        within += all(good.values())
    figures["templates_within_bounds"] = float(within)
    print(f"templates_within_bounds      {within} of {len(names)} (scivi {scivi.__version__})", flush=True)
    return figures
