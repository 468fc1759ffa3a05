"""Blood cells of a CITE-seq experiment, and scores of what a model says of them. Imports nothing of ours.

The cells' labels come from markers, protein and RNA together, so that they are not independent of the protein
counts. A probability of the foreground is held against them, protein by protein, in cells of those types of
which immunology says that they carry the marker or that they do not (``MARKERS``); other types are left out,
for instance CD14+ monocytes where CD4 is asked for, which carry some.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np

T_CELLS = ("CD4+ T cells", "CD8+ T cells")
MONOCYTES = ("CD14+ monocytes", "CD16+ monocytes")
MARKERS = {  # protein: types that carry it, types that do not
    "CD3": (T_CELLS, ("B cells", "NK cells", *MONOCYTES)),
    "CD19": (("B cells",), ("NK cells", *T_CELLS, *MONOCYTES)),
    "CD14": (("CD14+ monocytes",), ("B cells", "NK cells", *T_CELLS)),
    "CD4": (("CD4+ T cells",), ("CD8+ T cells", "B cells", "NK cells")),
    "CD8a": (("CD8+ T cells",), ("CD4+ T cells", "B cells", "CD14+ monocytes")),
    "CD16": (("NK cells", "CD16+ monocytes"), ("CD4+ T cells", "B cells")),
    "CD56": (("NK cells",), ("CD4+ T cells", "B cells", "CD14+ monocytes")),
}
FIVE = ("CD3", "CD4", "CD8a", "CD14", "CD19")  # that must be right one by one
TRAIN, VALIDATION, GENES = 2015, 300, 1500  # of the reduced problem; all test cells
NEIGHBOURS, FOLDS, FEWEST = 15, 5, 20  # of the neighbour classifier; cells of a type that it is asked for
ACTIVE = 0.05  # variance of a latent dimension's posterior mean over cells, from which the dimension is used
BINS = 10  # of the calibration error


@dataclass(frozen=True)
class Cells:
    """Counts and labels of cells, and the places of those to train on, to watch and to test."""

    adata: anndata.AnnData
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def read(path: Path, full: bool) -> Cells:
    """The cells of a file with ``cell_type`` and ``split`` in obs, or the reduced problem.

    Reduced, it has the genes of highest variance of log(1 + count) over the training cells, and a random few
    of the cells to train on and to watch.
    """
    adata = anndata.read_h5ad(path)
    split = np.asarray(adata.obs["split"]).astype(str)
    places = {name: np.flatnonzero(split == name) for name in ("train", "val", "test")}
    if not full:
        logs = adata.X[places["train"]].log1p()  # type: ignore[index]
        spread = np.asarray(logs.power(2).mean(0) - np.square(logs.mean(0))).ravel()
        genes = np.sort(np.argsort(-spread, kind="stable")[:GENES])
        rng = np.random.RandomState(7)  # whose stream never changes
        some = [rng.permutation(places[name])[:n] for name, n in (("train", TRAIN), ("val", VALIDATION))]
        kept = np.sort(np.concatenate([*some, places["test"]]))
        adata, split = adata[kept, genes].copy(), split[kept]
    return Cells(adata, *(np.flatnonzero(split == name) for name in ("train", "val", "test")))


def foreground_scores(cells: Cells, foreground: np.ndarray) -> dict[str, float]:
    """Brier score and calibration error of the test cells' probabilities (cell, protein).

    Returns:
        brier, ece: means over the labelled markers; brier_CD3 and so on; cd14_in_cd4: share of the CD4+ T
        cells in which CD14 is called foreground.
    """
    proteins = list(cells.adata.obsm["protein_expression"].columns)  # type: ignore[union-attr]
    kinds = np.asarray(cells.adata.obs["cell_type"]).astype(str)[cells.test]
    briers, errors = {}, []
    for marker, (carriers, others) in MARKERS.items():
        known = np.isin(kinds, carriers + others)
        prob = foreground[known, proteins.index(marker)]
        carried = np.isin(kinds[known], carriers)
        briers[marker] = float(np.square(prob - carried).mean())
        errors.append(calibration_error(prob, carried))
    called = foreground[kinds == "CD4+ T cells", proteins.index("CD14")] > 0.5
    return {
        "brier": float(np.mean(list(briers.values()))),
        "ece": float(np.mean(errors)),
        **{f"brier_{marker}": brier for marker, brier in briers.items()},
        "cd14_in_cd4": float(called.mean()),
    }


def calibration_error(prob: np.ndarray, happened: np.ndarray) -> float:
    """Mean distance of the frequency from the probability, in bins of equal width weighed by their cells."""
    bins = np.clip((prob * BINS).astype(int), 0, BINS - 1)
    gaps = [abs(float((prob - happened)[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / len(prob)


def latent_scores(cells: Cells, latent: np.ndarray) -> dict[str, float]:
    """Scores of the states' posterior means of all cells (cell, latent), found without labels.

    Returns:
        knn_accuracy: of the labels that the nearest neighbours vote for, cross-validated; active_dims.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    kinds = np.asarray(cells.adata.obs["cell_type"]).astype(str)
    names, counts = np.unique(kinds, return_counts=True)
    asked = np.isin(kinds, names[(counts >= FEWEST) & (names != "unknown")])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    voted = cross_val_predict(KNeighborsClassifier(NEIGHBOURS), latent[asked], kinds[asked], cv=folds)
    return {
        "knn_accuracy": float(np.mean(voted == kinds[asked])),
        "active_dims": float((latent.var(0) > ACTIVE).sum()),
    }
