"""Does memory stay the same from a million loci on disk to ten million, and how fast do the loci come?

    python benchmarks/methylation_memory.py --json methylation_memory.json

Simulated counts, loci by --samples with a coverage of --coverage, are written as gather writes them: an
AnnData zarr store in chunks of --chunk loci. Each size has a process of its own, of one thread, that opens
the store (which reads and checks every entry once) and takes all minibatches of --batch loci of one epoch,
streamed. The peak is that of the whole process, libraries included (VmHWM of Linux).

Figures:
    rss_ratio_1e7_to_1e6: peak memory with the most loci over that with the fewest.
    rss_gb: peak memory with the most loci.
    loader_loci_per_s: loci per second of the stream of the most loci, the first reading included.
    open_loci_per_s: loci per second while the store is opened and checked.
    wrong_loci: loci that came twice in the epoch, or in its last batch with counts that are not those stored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from record import use_threads, write_json
from torch.distributions import constraints

from domains.genomics.methylomes import CONTEXTS, CountTable
from scivi.inputs.batches import Batch
from scivi.inputs.feed import Feed
from scivi.inputs.fields import Field
from scivi.inputs.sources import open_source

PIECE = 2**18  # loci simulated at a time
CPU = torch.device("cpu")
FIELDS = {
    "methylated": Field(("locus", "sample"), "observed", constraints.nonnegative_integer),
    "total": Field(("locus", "sample"), "given", constraints.nonnegative_integer),
}


def simulated(loci: int, samples: int, coverage: float, seed: int) -> dict[str, np.ndarray]:
    """Counts of some loci."""
    rng = np.random.default_rng(seed)
    total = rng.poisson(coverage, (loci, samples)).astype(np.uint8)
    methylated = (rng.random((loci, samples), np.float32) * (total + 1)).astype(np.uint8)
    return {"methylated": np.minimum(methylated, total), "total": total}


def write(path: Path, loci: int, samples: int, coverage: float, chunk: int) -> None:
    """A store of so many loci on one chromosome."""
    names = [f"s{k}" for k in range(samples)]
    table = CountTable(path, names, ["chr1"], CONTEXTS, most=255, chunk_loci=chunk)
    for first in range(0, loci, PIECE):
        start = np.arange(first, min(loci, first + PIECE))
        layers = simulated(len(start), samples, coverage, seed=first)
        table.add("chr1", 1 + start, start % 2, start % 3, layers)
    table.close()


def run(path: Path, batch: int) -> dict[str, float]:
    """What is measured: open the store, then take every minibatch of an epoch."""
    begun = time.perf_counter()
    source = open_source(path, FIELDS, ("locus",))
    opened = time.perf_counter()
    feed = Feed(source, FIELDS, ("locus",), batch, 0, CPU, torch.float32, resident_bytes=0, table_bytes=0)
    loci, steps = source.sizes["locus"], source.sizes["locus"] // batch
    seen = np.zeros(loci, bool)
    for _ in range(steps):
        some = feed.next()
        seen[some.index["locus"].numpy()] = True
    ended = time.perf_counter()
    feed.close()
    wrong = steps * batch - int(seen.sum()) + differing(path, some)
    return {
        "open_loci_per_s": loci / (opened - begun),
        "loader_loci_per_s": steps * batch / (ended - opened),
        "wrong_loci": float(wrong),
    }


def differing(path: Path, batch: Batch) -> int:
    """Loci of a batch whose counts are not those that are stored."""
    layers: Any = zarr.open_group(path, mode="r")["layers"]
    rows, order = np.unique(batch.index["locus"].numpy(), return_inverse=True)
    wrong = [(layers[name].oindex[rows][order] != batch.values[name].numpy()).any(1) for name in FIELDS]
    return int(np.any(wrong, axis=0).sum())


def peak_gb() -> float:
    """Most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def apart(path: Path, batch: int) -> dict[str, float]:
    """The same in a process of its own, with its peak."""
    command = [sys.executable, __file__, "--measure", str(path), "--batch", str(batch)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    """Write stores, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loci", type=float, nargs=2, default=[1e6, 1e7])
    parser.add_argument("--samples", type=int, default=13)
    parser.add_argument("--coverage", type=float, default=9.0)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument(
        "--folder", type=Path, help="where stores are made, and found again; a new one if left out"
    )
    parser.add_argument("--measure", type=Path, help="only measure this store, and print the figures")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_threads(1)
    if args.measure is not None:
        print(json.dumps({**run(args.measure, args.batch), "rss_gb": peak_gb()}))
        return
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for loci in map(int, args.loci):
            path = Path(folder) / f"{loci}.zarr"
            write(path, loci, args.samples, args.coverage, args.chunk)
            found.append(apart(path, args.batch))
            print(f"{loci:9d} loci:", ", ".join(f"{name} {value:.4g}" for name, value in found[-1].items()))
    figures = {"rss_ratio_1e7_to_1e6": found[1]["rss_gb"] / found[0]["rss_gb"], **found[1]}
    figures["wrong_loci"] += found[0]["wrong_loci"]
    settings = {"samples": args.samples, "coverage": args.coverage, "chunk": args.chunk, "batch": args.batch}
    settings |= {"fewest_loci": args.loci[0], "most_loci": args.loci[1], "threads": 1}
    write_json(args.json, __doc__.splitlines()[0], figures, settings)


if __name__ == "__main__":
    main()
