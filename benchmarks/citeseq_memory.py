"""How much memory does a fit of CITE-seq take, resident and from disk, and does it grow with the cells?

    python benchmarks/citeseq_memory.py --json citeseq_memory.json

The blood cells of ``citeseq_vs_totalvi --full``, 4,000 genes and 14 proteins, five and 15 times over,
each with a name of its own, as a .h5ad with RNA in CSR. Every measurement has a process of its own, which
opens the file and fits --steps steps of 128 cells (totalVI as many of its own batches of 256): ours from the
cells in memory (``resident``), ours from the path, which leaves RNA on disk (``backed``), and totalVI from
the cells in memory. The peak is that of the whole process, libraries included (VmHWM of Linux); what
importing them took is shown beside it.

Figures, N the cells in thousands:
    SIDE_gb_N: peak memory; SIDE_import_gb, of which imports.
    SIDE_growth_gb: peak of the most cells less that of the fewest.
    backed_ratio: peak of the most cells over that of the fewest, from disk.
    resident_to_totalvi, backed_to_totalvi: peaks at the most cells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import anndata
import numpy as np
from citeseq_vs_totalvi import DATA, PLAN, peak_gb
from record import use_threads, write_json

SIDES = ("resident", "backed", "totalvi")
RESIDENT = 2**20  # bytes of rows that the plan of "backed" keeps in memory


def write(data: Path, times: int, path: Path) -> int:
    """The cells so many times over; how many there are then."""
    adata = anndata.read_h5ad(data)
    many = adata if times == 1 else anndata.concat([adata] * times)
    many.obs_names = np.array([f"cell {k}" for k in range(many.n_obs)])
    many.write_h5ad(path)
    return many.n_obs


def fit(side: str, path: Path, steps: int) -> None:
    """Fit one side, and print the peak of this process before and after."""
    if side == "totalvi":
        import logging

        import scvi

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        scvi.settings.verbosity = logging.ERROR
        before = peak_gb()
        adata = anndata.read_h5ad(path)
        scvi.model.TOTALVI.setup_anndata(adata, protein_expression_obsm_key="protein_expression")
        model = scvi.model.TOTALVI(adata)
        model.train(accelerator="cpu", max_steps=steps, enable_progress_bar=False, early_stopping=False)
    else:
        import scivi
        from domains.genomics import citeseq

        before = peak_gb()
        template, table = citeseq.from_data(path if side == "backed" else anndata.read_h5ad(path))
        options = {"resident_bytes": RESIDENT} if side == "backed" else {}
        plan = scivi.Plan(**{**PLAN, "steps": steps, "kl_warmup": 0, "log_every": steps}, **options)
        scivi.fit(template, table, plan, progress=False)
    print(before, peak_gb())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, nargs=2, default=[5, 15], help="how often the cells are taken")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--data", type=Path, default=DATA, help="the cells")
    parser.add_argument("--folder", type=Path, help="where files are made for the while")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.data.exists():
        raise SystemExit(f'there is no "{given.data}": name the cells by --data.')
    use_threads()
    warnings.simplefilter("ignore")
    if given.side is not None:
        fit(given.side, given.data, given.steps)
        return
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for times in given.times:
            path = Path(folder) / f"{times}.h5ad"
            n = write(given.data, times, path)
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--data", str(path)]
                command += ["--steps", str(given.steps)]
                imported, peak = map(
                    float, subprocess.check_output(command, text=True).splitlines()[-1].split()
                )
                peaks[side].append(peak)
                figures |= {f"{side}_gb_{n // 1000}": peak, f"{side}_import_gb": imported}
                print(f"{n:7d} cells, {side:9s} {peak:.3f} GB, imports {imported:.3f}", flush=True)
    figures |= {f"{side}_growth_gb": most - fewest for side, (fewest, most) in peaks.items()}
    figures["backed_ratio"] = peaks["backed"][1] / peaks["backed"][0]
    figures |= {f"{side}_to_totalvi": peaks[side][1] / peaks["totalvi"][1] for side in SIDES[:2]}
    print("\n".join(f"{name:22s} {value:.4g}" for name, value in figures.items()))
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, {"steps": given.steps})


if __name__ == "__main__":
    main()
