"""Does memory stay the same from a million loci on disk to ten million, and how fast do the loci come?

    python benchmarks/methylation_memory.py --json methylation_memory.json

Counts simulated by the template of methylation on its example (13 samples, three contexts, rates that differ
between loci; the same 262,144 loci again and again, each with a name of its own) are written as gather
writes them: an AnnData zarr store in chunks of --chunk loci. Each size has a process of its own, which opens
the store (every entry is read and checked, every name compared), and fits --steps steps of --batch loci,
streamed: the plan keeps no more than 1 MiB of rows. The peak is that of the whole process, libraries
included (VmHWM of Linux). Afterwards all minibatches of an epoch are taken, and looked at.

The fit ends without the Newton finish, whose passes over all loci would take a quarter of an hour.

Figures:
    rss_ratio_1e7_to_1e6: peak memory of opening and fitting the most loci over that of the fewest.
    rss_gb: peak memory of opening and fitting the most loci.
    open_rss_gb: peak memory of opening them.
    loader_loci_per_s: loci per second of the stream of the most loci alone, the first reading included; the
        fastest of --repeats epochs, each of a stream of its own.
    open_loci_per_s: loci per second while the store is opened and checked.
    fit_loci_per_s: loci per second of the steps of the fit, which are too few to be compiled.
    wrong_loci: loci that came twice in an epoch, or in its last batch with counts that are not those stored.
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

from domains.genomics.methylation import EXAMPLE, Prior, make
from domains.genomics.methylomes import CONTEXTS, CountTable
from scivi.inference.loop import fit
from scivi.inference.opening import open_data
from scivi.inference.plan import Plan
from scivi.inputs.batches import Batch
from scivi.inputs.feed import Feed
from scivi.inputs.sources import TableSource

PIECE = 2**18  # loci simulated
RESIDENT = 2**20  # bytes of rows that may stay in memory
LAYERS = ("methylated", "total")
TEMPLATE = make(EXAMPLE, contexts=CONTEXTS)


def write(path: Path, loci: int, chunk: int) -> None:
    """A store of so many loci on one chromosome."""
    assert TEMPLATE.simulate is not None
    some, _ = TEMPLATE.simulate({"locus": PIECE}, Prior(), torch.Generator().manual_seed(0))
    layers = {name: some[name].to_numpy().astype(np.uint8) for name in LAYERS}
    context = np.array([CONTEXTS.index(word) for word in some["context"].values], np.uint8)
    table = CountTable(path, EXAMPLE.samples, ["chr1"], CONTEXTS, most=255, chunk_loci=chunk)
    for first in range(0, loci, PIECE):
        start = np.arange(first, min(loci, first + PIECE))
        n = len(start)
        table.add("chr1", 1 + start, start % 2, context[:n], {name: layers[name][:n] for name in LAYERS})
    table.close()


def run(path: Path, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """What is measured: open the store and fit; then the loader alone."""
    begun = time.perf_counter()
    source = open_data(TEMPLATE, path)
    opened, open_rss_gb = time.perf_counter(), peak_gb()
    plan = Plan(steps=steps, stop=None, newton=False, rows_per_batch=batch, resident_bytes=RESIDENT)
    found = fit(TEMPLATE, source, plan, progress=False)
    rss_gb = peak_gb()
    speeds, wrong = zip(*[epoch(path, source, batch) for _ in range(repeats)], strict=True)
    return {
        "rss_gb": rss_gb,
        "open_rss_gb": open_rss_gb,
        "open_loci_per_s": source.sizes["locus"] / (opened - begun),
        "fit_loci_per_s": steps * batch / found.provenance["fit"]["wall_s"],
        "loader_loci_per_s": max(speeds),
        "wrong_loci": float(sum(wrong)),
    }


def epoch(path: Path, source: TableSource, batch: int) -> tuple[float, int]:
    """Take every minibatch of an epoch: loci per second, and how many are wrong."""
    device, dtype = torch.device("cpu"), torch.float32
    feed = Feed(source, TEMPLATE.fields, TEMPLATE.row_dims, batch, 0, device, dtype, RESIDENT)
    loci, steps = source.sizes["locus"], source.sizes["locus"] // batch
    times = np.zeros(loci, np.uint8)
    begun = time.perf_counter()
    for _ in range(steps):
        some = feed.next()
        times[some.index["locus"].numpy()] += 1
    elapsed = time.perf_counter() - begun
    feed.close()
    return steps * batch / elapsed, steps * batch - int((times == 1).sum()) + differing(path, some)


def differing(path: Path, batch: Batch) -> int:
    """Loci of a batch whose counts are not those that are stored."""
    layers: Any = zarr.open_group(path, mode="r")["layers"]
    rows, order = np.unique(batch.index["locus"].numpy(), return_inverse=True)
    wrong = [(layers[name].oindex[rows][order] != batch.values[name].numpy()).any(1) for name in LAYERS]
    return int(np.any(wrong, axis=0).sum())


def peak_gb() -> float:
    """Most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def apart(path: Path, batch: int, steps: int, repeats: int) -> dict[str, float]:
    """The same in a process of its own."""
    command: list[object] = [sys.executable, __file__, "--measure", path, "--batch", batch]
    command += ["--steps", steps, "--repeats", repeats]
    told = subprocess.check_output(list(map(str, command)), text=True)
    return json.loads(told.splitlines()[-1])


def main() -> None:
    """Write stores, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loci", type=float, nargs=2, default=[1e6, 1e7])
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40, help="so many that a stream comes to its 2nd group")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where stores are made for the while")
    parser.add_argument("--measure", type=Path, help="only measure this store, and print the figures")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_threads(1)
    if args.measure is not None:
        print(json.dumps(run(args.measure, args.batch, args.steps, args.repeats)))
        return
    found = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for loci in map(int, args.loci):
            path = Path(folder) / f"{loci}.zarr"
            write(path, loci, args.chunk)
            found.append(apart(path, args.batch, args.steps, args.repeats))
            print(f"{loci:9d} loci:", ", ".join(f"{name} {value:.4g}" for name, value in found[-1].items()))
    figures = {"rss_ratio_1e7_to_1e6": found[1]["rss_gb"] / found[0]["rss_gb"], **found[1]}
    figures["wrong_loci"] += found[0]["wrong_loci"]
    settings = {
        "samples": len(EXAMPLE.samples),
        "chunk": args.chunk,
        "batch": args.batch,
        "steps": args.steps,
    }
    settings |= {
        "resident_bytes": RESIDENT,
        "fewest_loci": args.loci[0],
        "most_loci": args.loci[1],
        "threads": 1,
    }
    write_json(args.json, __doc__.splitlines()[0], figures, settings)


if __name__ == "__main__":
    main()
