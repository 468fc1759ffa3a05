"""Are proteins that were not measured imputed, and cells of another panel mapped, as well as by totalVI?

    python benchmarks/citeseq_panels.py --json citeseq_panels.json

The reduced problem of ``citeseq_vs_totalvi.py``. Four proteins, drawn by seed, are hidden in every other
training cell: missing for us, a second batch without them for totalVI, as it wants it. Both are fitted; what
they impute, background and foreground, is held against the withheld counts. Then our fit to all training
cells reads the test cells with eight of the 14 proteins, drawn by seed, its weights as they are, and labels
are passed on to them.

Figures:
    spearman_S, totalvi_spearman_S: rank correlation over the cells of imputed protein and withheld count,
        mean of the four, of seed S.
    spearman_gain_min: ours less totalVI's, the worst seed.
    transfer_min: share of labelled test cells that get their label, the worst seed.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from citeseq_scores import Cells, read
from citeseq_vs_totalvi import PLAN
from record import arguments, use_threads, write_json
from scipy.stats import spearmanr

import scivi
from domains.genomics import cells as readers
from domains.genomics import citeseq, expression

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "../shared/data/citeseq/pbmc10k_citeseq.h5ad"
HIDDEN, SHARED, DRAWS = 4, 8, 50


def imputed_by_us(adata: Any, blind: np.ndarray, hidden: list[str], seed: int) -> np.ndarray:
    """Protein counts of the blind cells, (cell, hidden protein)."""
    measured = adata.obsm["protein_expression"].astype(float)
    measured.loc[blind, hidden] = np.nan
    partial = adata.copy()
    partial.obsm["protein_expression"] = measured
    template, table = citeseq.from_data(partial)
    fit = scivi.fit(template, table, scivi.Plan(**PLAN, seed=seed), progress=False)
    result = scivi.draw(fit, table, DRAWS, seed=seed)
    return expression.expected_counts(result).sel(protein=hidden).values[blind]


def imputed_by_totalvi(adata: Any, blind: np.ndarray, hidden: list[str], seed: int) -> np.ndarray:
    """The same by totalVI: a batch in which proteins have no count at all is one that lacks them."""
    import scvi

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = seed
    partial = adata.copy()
    measured = partial.obsm["protein_expression"].copy()
    measured.loc[blind, hidden] = 0
    partial.obsm["protein_expression"] = measured
    partial.obs["half"] = np.where(blind, "blind", "seen")
    scvi.model.TOTALVI.setup_anndata(
        partial, protein_expression_obsm_key="protein_expression", batch_key="half"
    )
    model = scvi.model.TOTALVI(partial)
    model.train(accelerator="cpu", enable_progress_bar=False)
    _, found = model.get_normalized_expression(
        indices=np.flatnonzero(blind).tolist(),
        transform_batch="seen",
        n_samples=25,
        return_mean=True,
        include_protein_background=True,  # the withheld counts have it
    )
    return found[hidden].to_numpy()


def compare(cells: Cells, seed: int) -> dict[str, float]:
    """Both sides on one choice of proteins."""
    adata, rng = cells.adata[cells.train].copy(), np.random.default_rng(seed)
    names = [str(name) for name in adata.obsm["protein_expression"].columns]
    hidden = [names[k] for k in np.sort(rng.choice(len(names), HIDDEN, replace=False))]
    shared = [names[k] for k in np.sort(rng.choice(len(names), SHARED, replace=False))]
    blind = np.arange(adata.n_obs) % 2 == 0
    withheld = adata.obsm["protein_expression"].loc[blind, hidden].to_numpy()
    found: dict[str, float] = {}
    for side, impute in (("", imputed_by_us), ("totalvi_", imputed_by_totalvi)):
        guess = impute(adata, blind, hidden, seed)
        each = [float(spearmanr(guess[:, k], withheld[:, k])[0]) for k in range(HIDDEN)]
        found |= {f"{side}spearman_{name}": value for name, value in zip(hidden, each, strict=True)}
        found[f"{side}spearman"] = float(np.mean(each))
    template, table = citeseq.from_data(adata)
    fit = scivi.fit(template, table, scivi.Plan(**PLAN, seed=seed), progress=False)
    new = cells.adata[cells.test].copy()
    new.obsm["protein_expression"] = new.obsm["protein_expression"][shared]
    query = readers.table(readers.counts(new), citeseq.panel_of(template), genes=fit.coords["gene"])
    reference, mapped = (scivi.draw(fit, t, DRAWS, seed=seed) for t in (table, query))
    labels, truth = (np.asarray(a.obs["cell_type"]).astype(str) for a in (adata, new))
    known = truth != "unknown"
    label = expression.transfer(reference, labels, mapped)["label"].values
    return found | {"transfer": float((label == truth)[known].mean())}


def main() -> None:
    given = arguments(__doc__, DATA, seeds=1)
    use_threads()
    cells, figures, rounds = read(given.data, full=False), {}, []
    for seed in range(given.seeds):
        rounds.append(compare(cells, seed))
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in rounds[-1].items()), flush=True)
        figures |= {f"{name}_{seed}": value for name, value in rounds[-1].items()}
    figures["spearman_gain_min"] = min(r["spearman"] - r["totalvi_spearman"] for r in rounds)
    figures["transfer_min"] = min(r["transfer"] for r in rounds)
    settings = {"seeds": given.seeds, "draws": DRAWS, "steps": PLAN["steps"]}
    write_json(given.json, "Are unmeasured proteins imputed, and other panels mapped?", figures, settings)


if __name__ == "__main__":
    main()
