"""Does memory stay the same, however many rows there are on disk, and how long do steps wait for them?

    python benchmarks/out_of_core.py --json out_of_core.json

Catalogues of 1e5, 1e6 and 4e6 sources in one band, simulated by the photon template (the same 65,536 sources
again and again, each with a name of its own), are written a piece at a time to a zarr store in chunks of 8192
sources, and others of --h5ad sources to .h5ad files, whose layers hold the counts. The plan keeps no more
than 1 MiB of rows, so that all are streamed. Three stages, each in a process of its own: ``fit`` opens the
catalogue (every entry is read and checked) and takes --steps steps of --batch sources, without the Newton
finish, whose passes over all sources would take most of the time; ``draw`` opens it again and writes --draws
draws of every source to a zarr store; ``report`` judges that store and writes the page. The peak is that of
the whole process, libraries included (VmHWM of Linux); what importing them took is told beside it.

Figures, N the rows:
    rss_spread: largest less smallest peak over the sizes, over the largest; of the stage where it is worst.
    STAGE_rss_spread: of each stage.
    STAGE_gb_N: peak memory. h5ad_STAGE_gb_N: that of the .h5ad file.
    STAGE_bytes_per_row: what memory grows by with every row, between the fewest and the most.
    import_gb: peak memory after the imports alone.
    loader_share_max: of the time of the steps, what they waited for their batches; at the size where it is
        largest. The first reading counts.
    loader_share_N, STAGE_s_N: likewise, and seconds of each stage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import torch
from citeseq_vs_totalvi import peak_gb
from record import use_threads, write_json

import scivi
from domains.astrophysics.photons import template
from scivi.files import opened as read
from scivi.inference.opening import open_data
from scivi.inputs.sources import from_anndata

STAGES = ("fit", "draw", "report")
PIECE = 2**16  # sources simulated
CHUNK = 8192  # sources of a chunk
RESIDENT = 2**20  # bytes of rows that may stay in memory
COUNTS = ("n_on", "n_off", "alpha", "exposure")


def write(path: Path, n: int) -> None:
    """A catalogue of n sources as a zarr store, a piece at a time."""
    assert template.simulate is not None
    some, _ = template.simulate(
        {"source": PIECE, "band": 1}, template.prior, torch.Generator().manual_seed(0)
    )
    for first in range(0, n, PIECE):
        piece = some.isel(source=slice(0, min(PIECE, n - first)))
        names = [f"source {k:08d}" for k in range(first, first + piece.sizes["source"])]
        piece = piece.assign_coords(source=names)
        if first:
            piece.to_zarr(path, append_dim="source", zarr_format=2, consolidated=False)
        else:
            chunks = {name: {"chunks": (CHUNK, 1)} for name in COUNTS} | {"source": {"chunks": (CHUNK,)}}
            piece.to_zarr(path, encoding=chunks, zarr_format=2, consolidated=False)


def write_h5ad(path: Path, n: int) -> None:
    """A catalogue of n sources as a .h5ad file; it is small enough to be made at once."""
    assert template.simulate is not None
    some, _ = template.simulate(
        {"source": PIECE, "band": 1}, template.prior, torch.Generator().manual_seed(0)
    )
    layers = {name: np.resize(some[name].to_numpy(), (n, 1)) for name in COUNTS}
    adata = anndata.AnnData(shape=(n, 1), layers=layers)
    adata.obs_names = np.array([f"source {k:08d}" for k in range(n)])
    adata.write_h5ad(path)


def opened(path: Path) -> Any:
    """The catalogue, checked, its rows on disk."""
    if path.suffix != ".h5ad":
        return open_data(template, path)
    places: dict[str, Any] = {name: f"layers/{name}" for name in COUNTS}
    return open_data(template, from_anndata(path, {"obs": "source", "var": "band"}, **places))


def run(stage: str, path: Path, beside: Path, given: argparse.Namespace) -> dict[str, float]:
    """One stage in this process: peak memory before and after, seconds, and the loader's share of a fit."""
    before, begun, told = peak_gb(), time.perf_counter(), {}
    if stage == "fit":
        plan = scivi.Plan(
            steps=given.steps, stop=None, newton=False, rows_per_batch=given.batch, resident_bytes=RESIDENT
        )
        fit = scivi.fit(template, opened(path), plan, progress=False)
        scivi.save(fit, beside / "fit")
        wall = np.diff(fit.history["wall_s"].values, prepend=0.0)
        told["loader_share"] = float(np.average(fit.history["loader_share"].values, weights=wall))
    elif stage == "draw":
        fit = scivi.load(beside / "fit", template=template)
        scivi.draw(fit, opened(path), given.draws, to=beside / "posterior.zarr")
    else:
        scivi.analysis.report(read(beside / "posterior.zarr"), to=beside / "report.html")
    return {"import_gb": before, "gb": peak_gb(), "s": time.perf_counter() - begun, **told}


def apart(stage: str, path: Path, beside: Path, given: argparse.Namespace) -> dict[str, float]:
    """The same in a process of its own."""
    command: list[object] = [sys.executable, __file__, "--stage", stage, "--data", path, "--beside", beside]
    command += ["--steps", given.steps, "--batch", given.batch, "--draws", given.draws]
    return json.loads(subprocess.check_output(list(map(str, command)), text=True).splitlines()[-1])


def measured(path: Path, n: int, given: argparse.Namespace, label: str = "") -> dict[str, dict[str, float]]:
    """All stages of one catalogue, printed as they come; what they leave is removed."""
    found, beside = {}, path.with_suffix(".out")
    for stage in given.stages:
        found[stage] = apart(stage, path, beside, given)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in found[stage].items())
        print(f"{n:9d} rows, {label}{stage}: {numbers}", flush=True)
    shutil.rmtree(beside, ignore_errors=True)
    return found


def main() -> None:
    """Write catalogues, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=float, nargs="+", default=[1e5, 1e6, 4e6])
    parser.add_argument("--h5ad", type=float, nargs="*", default=[1e5, 1e6], help="rows of the .h5ad files")
    parser.add_argument("--steps", type=int, default=600, help="so many that a stream comes to its 3rd group")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=32, help="fewer than 25 cannot be judged")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--folder", type=Path, help="where stores are made for the while")
    parser.add_argument("--json", type=Path)
    for hidden in ("--data", "--beside"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    use_threads(1)
    if given.stage is not None:
        print(json.dumps(run(given.stage, given.data, given.beside, given)))
        return
    found: dict[int, dict[str, dict[str, float]]] = {}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for n in map(int, given.rows):
            path = Path(folder) / f"{n}.zarr"
            write(path, n)
            found[n] = measured(path, n, given)
            shutil.rmtree(path)
        for n in map(int, given.h5ad):
            path = Path(folder) / f"{n}.h5ad"
            write_h5ad(path, n)
            others = measured(path, n, given, "h5ad ")
            figures |= {f"h5ad_{stage}_gb_{n}": told["gb"] for stage, told in others.items()}
            path.unlink()
    fewest, most = min(found), max(found)
    for stage in given.stages:
        peaks = {n: stages[stage]["gb"] for n, stages in found.items()}
        figures[f"{stage}_rss_spread"] = 1 - min(peaks.values()) / max(peaks.values())
        figures[f"{stage}_bytes_per_row"] = 1e9 * (peaks[most] - peaks[fewest]) / max(1, most - fewest)
        figures |= {f"{stage}_gb_{n}": peak for n, peak in peaks.items()}
        figures |= {f"{stage}_s_{n}": stages[stage]["s"] for n, stages in found.items()}
    figures["rss_spread"] = max(figures[f"{stage}_rss_spread"] for stage in given.stages)
    figures["import_gb"] = max(told["import_gb"] for stages in found.values() for told in stages.values())
    if "fit" in given.stages:
        shares = {n: stages["fit"]["loader_share"] for n, stages in found.items()}
        figures |= {f"loader_share_{n}": share for n, share in shares.items()}
        figures["loader_share_max"] = max(shares.values())
    print("\n".join(f"{name:24s} {value:.4g}" for name, value in figures.items()))
    settings = {"steps": given.steps, "batch": given.batch, "draws": given.draws}
    write_json(
        given.json, (__doc__ or "").splitlines()[0], figures, {**settings, "chunk": CHUNK, "threads": 1}
    )


if __name__ == "__main__":
    main()
