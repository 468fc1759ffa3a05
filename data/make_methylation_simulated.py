"""Make methylation_simulated.h5ad: reads of 20,000 loci of a pedigree, simulated by the methylation template.

Usage: python data/make_methylation_simulated.py [OUT]

The pedigree is ``methylation.EXAMPLE``. Rates are larger than Arabidopsis has them, so that so few loci hold
enough events to tell how far they differ from locus to locus. See data/README.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData

import scivi
from domains.genomics import methylation

LOCI, SEED = 20_000, 2  # the first seed that draws a scatter above .8 for both gain and loss
GAIN, LOSS = 2e-3, 6e-3  # 1 / generation: centres, of which the rates of each context are drawn (our choice)


def annotated(table: xr.Dataset, truth: xr.Dataset) -> AnnData:
    """The simulated table as users bring theirs: counts in layers, context in obs, the pedigree in uns.

    Args:
        table: "methylated" and "total" (locus, sample), "context" (locus,).
        truth: what the table was drawn from; what each locus has of its own goes to obs, the rest to uns.
    """
    n = table.sizes["locus"]
    by_locus = {  # rounded to 1/128, which compresses
        name: (np.round(truth[name].values * 128) / 128).astype(np.float32)
        for name in truth.data_vars
        if "locus" in truth[name].dims
    }
    obs = pd.DataFrame({"context": pd.Categorical(table["context"].values)} | by_locus)
    obs.index = pd.Index([str(k) for k in range(n)])
    pedigree = methylation.EXAMPLE
    members = {"node": pedigree.nodes, "parent": pedigree.parents, "edge_generations": pedigree.generations}
    shared = truth.drop_vars([*by_locus, "locus"], errors="ignore")
    uns = {
        "pedigree": pd.DataFrame({name: list(values) for name, values in members.items()}),
        "reproduction": "selfing",
        "truth": json.dumps(shared.to_dict()),
    }
    layers = {name: table[name].values.astype(np.uint8) for name in ("methylated", "total")}
    return AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(pedigree.samples)), layers=layers, uns=uns)


def main() -> None:
    """Simulate, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, nargs="?", default=Path(__file__).with_name("methylation_simulated.h5ad")
    )
    arguments = parser.parse_args()
    prior = replace(methylation.Prior(), gain=GAIN, loss=LOSS)
    template = replace(methylation.template, prior=prior)
    table, truth = scivi.simulate(template, {"locus": LOCI}, seed=SEED)
    annotated(table, truth).write_h5ad(arguments.out, compression="gzip", compression_opts=9)


if __name__ == "__main__":
    main()
