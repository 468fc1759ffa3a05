"""Do many seeds agree, are all their numbers finite, and how even are the weights of single cells?

    python benchmarks/citeseq_seeds.py --seeds 20 --json citeseq_seeds.json

The reduced problem and the plan of ``citeseq_vs_totalvi``. Each seed has a fit of its own and K = 100 draws
of the test cells, with rows refined and without. The weights that Pareto's k-hat is taken of are those of the
draws of a cell, globals drawn with them.

Figures:
    finite_seeds: share of seeds in which objective, draws, weights and scores are all finite.
    khat_above_max: share of test cells with k-hat > .7 after refinement; the worst seed. khat_above_mean over
        seeds; khat_above_encoder_mean of the encoder's own draws.
    outside_max: share of test cells that are told to be unlike those of the fit.
    loglik_sd: sd over seeds of the test log likelihood, nats per cell; loglik_min.
    foreground_apart_mean, foreground_apart_max: mean absolute difference of a cell and protein's chance of
        foreground between two seeds; all pairs of seeds.
    calls_differ_max: share of cells and proteins that are called differently by two seeds.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
from citeseq_scores import Cells, foreground_scores, read
from citeseq_vs_totalvi import DATA, PLAN, table_of
from record import arguments, use_threads, write_json

import scivi
from domains.genomics import citeseq
from scivi.analysis import row_reliability

DRAWS = 100
STATS = ("lp", "log_q", "row_log_weight")


def all_finite(tree: Any) -> bool:
    """Whether every number of a result is, but for what says by NaN that it does not apply."""
    arrays = [*tree["posterior"].values(), *(tree["sample_stats"][name] for name in STATS)]
    arrays.append(tree["history"]["objective"])
    return all(bool(np.isfinite(a).all()) for a in arrays if a.dtype.kind == "f")


def one(cells: Cells, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """A fit of a seed: its figures, and the chances of foreground of the test cells (cell, protein)."""
    template, table = citeseq.from_data(cells.adata[cells.train].copy())
    fit = scivi.fit(template, table, scivi.Plan(**PLAN, seed=seed), progress=False)
    test = table_of(template, cells, cells.test)
    own, refined = (scivi.draw(fit, test, DRAWS, seed=seed, refine=refine) for refine in (False, True))
    weights = refined["sample_stats"]["row_log_weight"].to_numpy()[0]
    foreground = refined["posterior"]["foreground"].mean(("chain", "draw")).transpose("cell", "protein")
    of_encoder, of_refined = row_reliability(own), row_reliability(refined)
    found = {
        "loglik": float((np.logaddexp.reduce(weights, 0) - math.log(DRAWS)).mean()),
        "khat_above": float((of_refined["k_hat"] > 0.7).mean()),
        "khat_above_encoder": float((of_encoder["k_hat"] > 0.7).mean()),
        "outside": float(of_refined["outside"].mean()),
        "brier": foreground_scores(cells, foreground.values)["brier"],
    }
    finite = all_finite(own) and all_finite(refined) and all(map(math.isfinite, found.values()))
    return found | {"finite": float(finite)}, foreground.values


def main() -> None:
    given = arguments(__doc__, DATA, seeds=20)
    use_threads()
    cells, rounds, chances = read(given.data, full=False), [], []
    for seed in range(given.seeds):
        found, foreground = one(cells, seed)
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
        rounds.append(found)
        chances.append(foreground)
    of = {name: np.array([r[name] for r in rounds]) for name in rounds[0]}
    pairs = list(combinations(chances, 2)) or [(chances[0], chances[0])]
    apart = [float(abs(a - b).mean()) for a, b in pairs]
    figures = {
        "finite_seeds": of["finite"].mean(),
        "khat_above_max": of["khat_above"].max(),
        "khat_above_mean": of["khat_above"].mean(),
        "khat_above_encoder_mean": of["khat_above_encoder"].mean(),
        "outside_max": of["outside"].max(),
        "loglik_sd": of["loglik"].std(),
        "loglik_min": of["loglik"].min(),
        "brier_max": of["brier"].max(),
        "foreground_apart_mean": np.mean(apart),
        "foreground_apart_max": max(apart),
        "calls_differ_max": max(float(((a > 0.5) != (b > 0.5)).mean()) for a, b in pairs),
    }
    figures = {name: float(value) for name, value in figures.items()}
    print("\n".join(f"{name:26s} {value:.4g}" for name, value in figures.items()))
    figures |= {f"{name}_{seed}": v for seed, r in enumerate(rounds) for name, v in r.items()}
    settings = {"seeds": given.seeds, "draws": DRAWS, "steps": PLAN["steps"]}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
