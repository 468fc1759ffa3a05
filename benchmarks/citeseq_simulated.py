"""On cells whose truth is known: calls, calibration and backgrounds, beside totalVI.

    python benchmarks/citeseq_simulated.py --seeds 2 --json citeseq_simulated.json

2,000 cells and 2,000 empty droplets with 24 proteins of which four are isotype controls, simulated by another
model than either side's; the program that does it, and scores what is said, is named by --simulation. Ours is
told the controls and given the empty droplets; totalVI has no place for either. A tenth of the cells steer
totalVI's learning rate and its stop. All cells are scored.

totalVI's chances are shown as it offers them (``offered``) and given the counts (``given``), its background
as draws of the background's mean.

Figures, ours_NAME_S and totalvi_NAME_S of seed S, and the worst of the seeds without S:
    auroc_mean, brier, ece: of the foreground, proteins that some cells carry and some do not.
    isotype_false: share of cells in which a control is called foreground.
    background_rmse: of the log background's posterior median; background_cover90, of its 90 % intervals.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from citeseq_scores import Cells
from citeseq_vs_totalvi import PLAN
from record import use_threads, write_json

import scivi
from domains.genomics import citeseq

ROOT = Path(__file__).resolve().parents[1]
SIMULATION = ROOT / "../shared/tools/citeseq_sim.py"
DRAWS = 200
NAMES = {  # ours: the simulation's
    "auroc_mean": "auroc_mean",
    "brier": "brier",
    "ece": "ece10",
    "isotype_false": "isotype_false_fg",
    "background_rmse": "bg_log_rmse",
    "background_cover90": "bg_cover90",
}


def loaded(path: Path) -> Any:
    """The simulation's program."""
    spec = importlib.util.spec_from_file_location("simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(cells: Any, empties: Any, isotypes: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chances of foreground (cell, protein) and draws of the background (draw, cell, protein)."""
    template, table = citeseq.from_data(cells, isotypes=isotypes, empties=empties)
    fit = scivi.fit(template, table, scivi.Plan(**PLAN, seed=seed), progress=False)
    posterior = scivi.draw(fit, table, DRAWS, seed=seed)["posterior"].to_dataset()
    return posterior["foreground"].mean(("chain", "draw")).values, np.exp(
        posterior["log_background"].values[0]
    )


def totalvi(cells: Any, seed: int, most_epochs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chances as offered and given the counts (cell, protein), draws of the background."""
    from citeseq_peer import fit_totalvi

    order = np.random.default_rng(seed).permutation(cells.n_obs)
    some = cells.n_obs // 10
    parts = np.sort(order[some:]), np.sort(order[:some]), np.array([], int)
    fit, everything = fit_totalvi(Cells(cells, *parts), seed, most_epochs), np.arange(cells.n_obs)
    return fit.foreground(everything), fit.foreground_given_counts(everything), fit.background(everything)


def scored(sim: Any, cells: Any, truth: Any, chance: np.ndarray, background: np.ndarray) -> dict[str, float]:
    """The simulation's scores by our names."""
    low, median, high = np.quantile(background, [0.05, 0.5, 0.95], axis=0)
    found = sim.score(
        chance,
        cells.obsm["true_fg"],
        median,
        low,
        high,
        cells.obsm["true_bg_rate"],
        np.asarray(truth["isotype"]),
    )
    return {name: float(found[theirs]) for name, theirs in NAMES.items()}


def compare(sim: Any, seed: int, most_epochs: int) -> dict[str, dict[str, float]]:
    """Both sides on one simulation."""
    both = sim.simulate(seed)
    cells, empties = (both[both.obs["is_empty"].to_numpy() == k].copy() for k in (False, True))
    truth, names = both.uns["truth"], list(both.obsm["protein_expression"].columns)
    isotypes = [n for n, is_isotype in zip(names, truth["isotype"], strict=True) if is_isotype]
    offered, given, background = totalvi(cells, seed, most_epochs)
    return {
        "ours": scored(sim, cells, truth, *ours(cells, empties, isotypes, seed)),
        "totalvi_offered": scored(sim, cells, truth, offered, background),
        "totalvi_given": scored(sim, cells, truth, given, background),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--simulation", type=Path, default=SIMULATION, help="the program that simulates")
    parser.add_argument("--epochs", type=int, default=2000, help="the most of totalVI; fewer only for trying")
    parser.add_argument("--json", type=Path, help="write the figures there")
    given = parser.parse_args()
    if not given.simulation.exists():
        raise SystemExit(f'there is no "{given.simulation}": name the program by --simulation.')
    use_threads()
    sim = loaded(given.simulation)
    figures: dict[str, float] = {}
    rounds = [compare(sim, seed, given.epochs) for seed in range(given.seeds)]
    sides = list(rounds[0])
    for seed, found in enumerate(rounds):
        print(f"seed {seed:<15d}" + "".join(f"{side:>17s}" for side in sides))
        for name in NAMES:
            print(f"{name:20s}" + "".join(f"{found[side][name]:17.4g}" for side in sides))
        figures |= {f"{side}_{name}_{seed}": found[side][name] for side in sides for name in NAMES}
    for side in sides:
        for name in NAMES:
            values = [found[side][name] for found in rounds]
            figures[f"{side}_{name}"] = (
                min(values) if name in ("auroc_mean", "background_cover90") else max(values)
            )
    settings = {"seeds": given.seeds, "draws": DRAWS, "steps": PLAN["steps"], "most_epochs": given.epochs}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
