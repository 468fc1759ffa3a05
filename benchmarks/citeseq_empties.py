"""What do empty droplets tell of cells, and are isotype controls told to be background?

    python benchmarks/citeseq_empties.py --json citeseq_empties.json

Blood cells and empty droplets of Mule, Martins and Tsang 2022, 87 antibodies of which four are isotype
controls, no RNA. The template is fitted to 70 % of the cells (a split of our own, by seed) with the empty
droplets and without them, by one plan, and both are held against the other cells.

Figures, the worst or the least of the seeds:
    gain_min: log likelihood of held-out cells with empties less without, nats per cell, K = 100 importance
        weights of rows refined. gain_S and its standard error over cells, gain_error_S, are of seed S.
    isotype_foreground_max: share of held-out cells in which an isotype control is called foreground, all
        controls together, of the fit with empties.
    isotype_unnamed_max: the same where the template was not told which proteins are controls.
    kappa_S: background of a cell over that of an empty droplet, posterior median.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from citeseq_vs_totalvi import PLAN
from record import arguments, use_threads, write_json

import scivi
from domains.genomics import cells, citeseq

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "../shared/data/citeseq/dsb_pbmc_87ab_cells_and_empty.h5ad"
HELD_OUT, DRAWS = 0.3, 100


def held_out(train: Any, test: Any, seed: int, **options: Any) -> tuple[np.ndarray, Any]:
    """Log likelihood of each test cell after a fit to the others, and the posterior of the test cells."""
    template, table = citeseq.from_data(train, protein="X", rna=None, **options)
    fit = scivi.fit(template, table, scivi.Plan(**PLAN, seed=seed), progress=False)
    new = cells.table(cells.counts(test, protein="X", rna=None), citeseq.panel_of(template))
    result = scivi.draw(fit, new, DRAWS, seed=seed, refine=True)
    weights = result["sample_stats"]["row_log_weight"].to_numpy()[0]
    return np.logaddexp.reduce(weights, 0) - math.log(DRAWS), result["posterior"].to_dataset()


def compare(droplets: Any, seed: int) -> dict[str, float]:
    """Both fits on one split."""
    empty = droplets.obs["is_empty"].to_numpy()
    isotypes = [str(name) for name in droplets.var_names[droplets.var["is_isotype"]]]
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(~empty))
    n_test = round(HELD_OUT * len(chosen))
    train, test = (droplets[np.sort(part)].copy() for part in (chosen[n_test:], chosen[:n_test]))
    empties = droplets[empty].copy()
    told, posterior = held_out(train, test, seed, isotypes=isotypes, empties=empties)
    alone, _ = held_out(train, test, seed, isotypes=isotypes)
    _, unnamed = held_out(train, test, seed, empties=empties)
    called = [
        p["foreground"].mean(("chain", "draw")).sel(protein=isotypes) > 0.5 for p in (posterior, unnamed)
    ]
    gain = told - alone
    return {
        "loglik": float(told.mean()),
        "gain": float(gain.mean()),
        "gain_error": float(gain.std() / len(gain) ** 0.5),
        "isotype_foreground": float(called[0].mean()),
        "isotype_unnamed": float(called[1].mean()),
        "kappa": float(np.exp(posterior["log_kappa"]).median()),
    }


def main() -> None:
    given = arguments(__doc__, DATA, seeds=2)
    use_threads()
    droplets = anndata.read_h5ad(given.data)
    figures: dict[str, float] = {}
    rounds = []
    for seed in range(given.seeds):
        rounds.append(compare(droplets, seed))
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in rounds[-1].items()), flush=True)
        figures |= {f"{name}_{seed}": value for name, value in rounds[-1].items()}
    figures |= {
        "gain_min": min(r["gain"] for r in rounds),
        "isotype_foreground_max": max(r["isotype_foreground"] for r in rounds),
        "isotype_unnamed_max": max(r["isotype_unnamed"] for r in rounds),
    }
    settings = {"seeds": given.seeds, "draws": DRAWS, "steps": PLAN["steps"]}
    write_json(given.json, "What do empty droplets tell of cells?", figures, settings)


if __name__ == "__main__":
    main()
