"""How fast are minibatches made of sparse counts, in memory beside scvi-tools, on disk beside random rows?

    python benchmarks/feed.py --json feed.json

Simulated counts, --cells by --genes, --density of them positive, in batches of --batch as dense float32
tensors. Everything is timed alternately, in one process of two cores, --rounds times; the model is left out.
scvi-tools is no dependency of SciVI: where it is not installed, its figures are left out.

- ours, in memory: `Feed` of an AnnData whose X is CSR, EPOCHS epochs. It is held as CSR with narrow entries.
- scvi-tools: its `AnnDataLoader` over the same AnnData, shuffled, of X alone, EPOCHS epochs.
- ours, on disk: `Feed` of the same table as .h5ad (CSR, not compressed), streamed, one epoch, with the
  opening of the first blocks; the table has been checked before.
- random rows: sorted random rows of the same file opened by `anndata.read_h5ad(backed="r")`, RANDOM batches.

Figures:
    csr_vs_scvi: cells per second in memory, ours over scvi-tools', median of the rounds' ratios.
    blocks_vs_backed_random: cells per second on disk, ours over random rows', median of the rounds' ratios.
    ..._least, ..._most: over the rounds.
    csr_cells_per_s, scvi_cells_per_s, blocks_cells_per_s, backed_random_cells_per_s: medians.
    csr_held_bytes_per_entry: memory held over positive entries (scipy's float32 CSR has a little over 8).
    wrong_entries: entries of a checked batch, of each of ours, that differ from the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import anndata
import numpy as np
import torch
from record import use_threads, write_json
from scipy.sparse import csr_matrix
from torch.distributions import constraints

from scivi.inputs.feed import Feed
from scivi.inputs.fields import Field
from scivi.inputs.sources import TableSource, from_anndata, open_source

EPOCHS = 3  # of a round in memory (our choice: about half a second)
RANDOM = 8  # batches of random rows in a round (our choice: about as long)
FIELDS = {"X": Field(("cell", "gene"), "observed", constraints.nonnegative_integer)}
CPU = torch.device("cpu")


def simulated(cells: int, genes: int, density: float, seed: int) -> anndata.AnnData:
    """Counts of cells, the positive ones geometric with mean 5, at random places."""
    rng = np.random.default_rng(seed)
    lengths = rng.binomial(genes, density, cells)
    places = [np.sort(rng.choice(genes, n, replace=False, shuffle=False)) for n in lengths]
    indices = np.concatenate(places).astype(np.int32)
    data = rng.geometric(0.2, len(indices)).astype(np.float32)
    matrix = csr_matrix((data, indices, np.concatenate([[0], np.cumsum(lengths)])), shape=(cells, genes))
    adata = anndata.AnnData(matrix)
    adata.obs_names = [str(k) for k in range(cells)]
    return adata


def opened(data: Any) -> TableSource:
    """X of an AnnData or of a .h5ad as rows."""
    return open_source(from_anndata(data, dims={"obs": "cell", "var": "gene"}), FIELDS, ("cell",))


def feed_of(source: TableSource, batch: int, resident: bool) -> Feed:
    """Batches of a source, held in memory (not as a table, whatever its size) or streamed."""
    limit = 2**31 if resident else 0
    return Feed(source, FIELDS, ("cell",), batch, 0, CPU, torch.float32, limit, table_bytes=0)


def wrong_entries(feed: Feed, adata: anndata.AnnData) -> int:
    """Entries of the next batch that differ from the table."""
    batch = feed.next()
    exact = adata.X[batch.index["cell"].numpy()].toarray()
    return int((batch.X.numpy() != exact).sum())


def loader_of(adata: anndata.AnnData, batch: int) -> Callable[[], Any] | None:
    """What makes an iterator over an epoch of scvi-tools' batches of X; None if it is not installed."""
    try:
        from scvi.dataloaders import AnnDataLoader
        from scvi.model import SCVI
    except ImportError:
        return None
    SCVI.setup_anndata(adata)
    loader = AnnDataLoader(
        SCVI(adata).adata_manager, batch_size=batch, shuffle=True, drop_last=True, data_and_attributes=["X"]
    )
    return lambda: iter(loader)


def speed(batch: int, steps: int, take: Callable[[], Any]) -> float:
    """Cells per second of so many batches."""
    begun = time.perf_counter()
    for _ in range(steps):
        take()
    return batch * steps / (time.perf_counter() - begun)


def epochs_of(loader: Callable[[], Any], steps: int) -> Callable[[], Any]:
    """One batch after the other, epoch after epoch."""

    def batches() -> Any:
        while True:
            some = loader()
            for _ in range(steps):
                yield next(some)

    stream = batches()
    return lambda: next(stream)


def streamed(source: TableSource, batch: int, steps: int) -> float:
    """Cells per second of an epoch from disk, from the first reading on."""
    feed = feed_of(source, batch, resident=False)
    found = speed(batch, steps, feed.next)
    feed.close()
    while feed.reading:  # what was read ahead is not to burden what is timed next
        time.sleep(0.01)
    return found


def compared(
    adata: anndata.AnnData, path: Path, batch: int, rounds: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Cells per second by way and round, and the figures that are no speeds."""
    memory, disk = opened(adata), opened(path)
    backed, rng = anndata.read_h5ad(path, backed="r"), np.random.default_rng(seed)
    steps, held = adata.n_obs // batch, feed_of(memory, batch, resident=True)
    stream = feed_of(disk, batch, resident=False)
    told = {
        "wrong_entries": float(wrong_entries(held, adata) + wrong_entries(stream, adata)),
        "csr_held_bytes_per_entry": held.held_nbytes / adata.X.nnz,
    }
    stream.close()

    def random_rows() -> torch.Tensor:
        rows = np.sort(rng.choice(adata.n_obs, batch, replace=False))
        return torch.from_numpy(backed.X[rows].toarray())

    ways: dict[str, Callable[[], float]] = {
        "csr": lambda: speed(batch, EPOCHS * steps, held.next),
        "blocks": lambda: streamed(disk, batch, steps),
        "backed_random": lambda: speed(batch, RANDOM, random_rows),
    }
    if (loader := loader_of(adata, batch)) is not None:
        take = epochs_of(loader, steps)
        ways["scvi"] = lambda: speed(batch, EPOCHS * steps, take)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            value = ways[name]()
            if turn:  # the first warms up
                found[name].append(value)
    return found, told


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_threads()
    adata = simulated(args.cells, args.genes, args.density, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counts.h5ad"
        adata.write_h5ad(path)
        found, figures = compared(adata, path, args.batch, args.rounds, args.seed)
    for name, values in found.items():
        figures[f"{name}_cells_per_s"] = round(median(values))
        print(f"{name:14s} {median(values):10.0f} cells/s ({min(values):.0f} to {max(values):.0f})")
    for name, (ours, theirs) in {
        "csr_vs_scvi": ("csr", "scvi"),
        "blocks_vs_backed_random": ("blocks", "backed_random"),
    }.items():
        if theirs in found:
            ratios = [a / b for a, b in zip(found[ours], found[theirs], strict=True)]
            figures |= {name: median(ratios), f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
            print(f"{name:24s} {median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    write_json(args.json, __doc__.splitlines()[0], figures, settings)


if __name__ == "__main__":
    main()
