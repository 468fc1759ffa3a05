"""Make citeseq_pbmc10k.h5ad and citeseq_dsb.h5ad: parts of two public CITE-seq experiments.

Usage: python data/make_citeseq_slices.py [PBMC10K.h5ad DSB.h5ad] [--out FOLDER]

The two are the whole experiments as AnnData; left out, they are looked for beside the checkout, in
../shared/data/citeseq. See data/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "shared" / "data" / "citeseq"
SEED = 0
CELLS, GENES = 1000, 500
DROPLETS = 600  # of each kind


def some_of(places: np.ndarray, n: int) -> np.ndarray:
    """So many of these places by chance, in the order in which they stand."""
    return np.sort(np.random.default_rng(SEED).choice(places, n, replace=False))


def pbmc10k(whole: AnnData) -> AnnData:
    """Training cells, the genes whose log counts vary most among them, all proteins; no labels of the cells.

    Args:
        whole: cells by genes; ``obs["split"]`` is "train", "val" or "test".
    """
    cells = whole[some_of(np.flatnonzero(whole.obs["split"] == "train"), CELLS)]
    genes = np.argsort(-np.log1p(cells.X.toarray()).var(0))[:GENES]
    some = cells[:, np.sort(genes)]
    return AnnData(
        integers(some.X),
        pd.DataFrame(index=some.obs_names),
        pd.DataFrame(index=some.var_names),
        obsm={"protein_expression": some.obsm["protein_expression"].astype(np.int32)},
    )


def dsb(whole: AnnData) -> AnnData:
    """As many empty droplets as cells, all antibodies.

    Args:
        whole: droplets by antibodies, with ``obs["is_empty"]``, ``obs["lane"]`` and ``var["is_isotype"]``.
    """
    empty = whole.obs["is_empty"].to_numpy(bool)
    chosen = [some_of(np.flatnonzero(kind), DROPLETS) for kind in (~empty, empty)]
    some = whole[np.concatenate(chosen)]
    return AnnData(integers(some.X), some.obs[["is_empty", "lane"]].copy(), some.var[["is_isotype"]].copy())


def integers(counts: csr_matrix) -> csr_matrix:
    """The same counts as whole numbers."""
    same = csr_matrix(counts).astype(np.int32)
    if (same != counts).nnz:
        raise SystemExit("the table holds no counts: some entries are not whole numbers.")
    return same


def main() -> None:
    """Read the whole tables, write the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pbmc10k", type=Path, nargs="?", default=SOURCES / "pbmc10k_citeseq.h5ad")
    parser.add_argument("dsb", type=Path, nargs="?", default=SOURCES / "dsb_pbmc_87ab_cells_and_empty.h5ad")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    if absent := [str(path) for path in (arguments.pbmc10k, arguments.dsb) if not path.exists()]:
        raise SystemExit(f"there is no {' and no '.join(absent)}; give the paths of the whole experiments.")
    for make, path in ((pbmc10k, arguments.pbmc10k), (dsb, arguments.dsb)):
        part = make(anndata.read_h5ad(path))
        part.write_h5ad(
            arguments.out / f"citeseq_{make.__name__}.h5ad", compression="gzip", compression_opts=9
        )


if __name__ == "__main__":
    main()
