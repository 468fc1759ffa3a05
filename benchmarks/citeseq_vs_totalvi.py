"""Is SciVI's CITE-seq better and faster than totalVI on the same cells?

    python benchmarks/citeseq_vs_totalvi.py --seeds 3 --json citeseq_vs_totalvi.json
    python benchmarks/citeseq_vs_totalvi.py --full --json citeseq_vs_totalvi_full.json

Blood of a healthy donor, 14 proteins. The reduced problem has 2,015 cells to train on, 300 to watch, 685 to
test and 1,500 genes; --full has 5,485, 685, 685 and 4,000. For each seed totalVI of scvi-tools, as it comes
and to its own end (``citeseq_peer``), then ours by a fixed plan, one after the other in one process, two
threads. Our fit never sees the validation cells; totalVI's learning rate and its stop go by them. The test
cells are looked at when both have ended.

Time is that of training alone: totalVI's from its first minibatch on, without its validation; ours from the
call on, without ours. What either does before (levels read off the counts, a mixture for each protein) is in
neither. At every LOG_EVERY steps of ours the bound on the validation cells is worked out, a mean over --seen
single draws, networks in evaluation mode: log p(x, y, z, a | globals) - log q(z, a), the globals drawn from
the guide. It is held against the highest bound that totalVI's validation ever shows (of single draws, so that
chance has raised it). The fit that is scored is that of ``scivi.fit`` with the same plan and seed, which
watching must not have changed.

The log likelihood of a test cell is that of K = 100 importance weights on either side, ours with a draw of
the globals from the guide for each, given what the training cells say; totalVI's has point estimates.
Foreground probabilities of test cells and the latent space are scored by ``citeseq_scores``, the latter on
all cells, without labels having been seen; totalVI's are shown as it offers them, and given the counts, as
ours are.

--memory also runs each side in a process of its own, ours by its plan, totalVI for 40 epochs, nothing watched
or scored; the peak is that of the whole process, libraries included, which are most of it (VmHWM of Linux;
the largest resident set of ``getrusage`` begins at that of the process that started it).

Figures:
    loglik_gain_min: test log likelihood, ours less totalVI's, nats per cell; the worst seed.
    time_ratio_median: seconds until our validation bound passes totalVI's best, over totalVI's seconds to
        that epoch; totalVI's bound with .919 nats per protein taken off its loss. NaN if it never passes.
    time_ratio_exact_median: the same with that taken off which its loss really adds (see ``citeseq_peer``).
    brier_max, ece_max: Brier score and calibration error of the foreground, mean over the labelled markers;
        the worst seed, as all that follow.
    brier_marker_max: Brier score of the worst of CD3, CD4, CD8a, CD14 and CD19.
    cd14_in_cd4_max: share of CD4+ T cells in which CD14 is called foreground.
    knn_accuracy_min, active_dims_min: of the latent space.
    memory_ratio: peak memory, ours over totalVI's; NaN without --memory. ours_peak_gb, totalvi_peak_gb, and
        ours_fit_gb, totalvi_fit_gb, by how much the fit raised it.
    watched_apart: largest difference between the parameters of the fit that was watched and the one scored.
    ours_NAME_S, totalvi_NAME_S: of seed S: loglik; s, all of the training; bound, the best on the validation
        cells (totalvi_exact_bound_S beside it), s_to_best for totalVI and s_to_pass for ours
        (s_to_pass_exact); brier, ece, ...; totalvi_given_counts_NAME_S the same given the counts.

A busy machine spoils the times: of two threads that share a core with others each waits for the other.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from citeseq_scores import FIVE, MARKERS, Cells, foreground_scores, latent_scores, read
from pyro import poutine
from record import THREADS, use_threads, write_json

import scivi
from domains.genomics import cells as readers
from domains.genomics import citeseq
from scivi.inference.loop import train
from scivi.inference.opening import open_data
from scivi.inference.scores import particle_plate, quiet, run_pair, score
from scivi.inputs.batches import Batch, chunks
from scivi.models.binding import Bound, seeded
from scivi.models.sites import value_of

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "../shared/data/citeseq/pbmc10k_citeseq.h5ad"
DRAWS = 100  # K
MEMORY_EPOCHS = 40  # of totalVI: its memory does not grow with them
LOG_EVERY = 25
PLAN: dict[str, Any] = {
    "rows_per_batch": 128,
    "steps": 450,
    "lr": 8e-3,
    "warmup": 0.15,
    "decay": 0.85,
    "kl_warmup": 135,
    "beta_start": 0.1,
    "stop": None,
    "compile": "off",
    "log_every": LOG_EVERY,
}
FULL: dict[str, Any] = {**PLAN, "steps": 1500, "kl_warmup": 450}
SHOWN = (
    "loglik",
    "brier",
    "ece",
    *(f"brier_{m}" for m in MARKERS),
    "cd14_in_cd4",
    "knn_accuracy",
    "active_dims",
)


@dataclass(frozen=True)
class Watched:
    """Our training, looked at from time to time: seconds so far, validation bound; parameters at the end."""

    seconds: np.ndarray
    bound: np.ndarray
    parameters: dict[str, torch.Tensor]

    def passes(self, level: float) -> float:
        """Seconds until the bound is above a level; NaN if it never is."""
        above = self.bound > level
        return float(self.seconds[above.argmax()]) if above.any() else math.nan


def table_of(template: scivi.Template, cells: Cells, places: np.ndarray) -> dict[str, Any]:
    """Some cells as the table that a template reads."""
    return readers.table(readers.counts(cells.adata[places].copy()), citeseq.panel_of(template))


def batch_of(template: scivi.Template, table: Any) -> Batch:
    """All rows of a table at once."""
    source, device = open_data(template, table), torch.device("cpu")
    n = source.sizes["cell"]
    return next(chunks(source, template.fields, template.row_dims, n, device, torch.float32))


@torch.no_grad()
def bound_on(bound: Bound, batch: Batch, draws: int) -> float:
    """Mean bound of the rows of a batch at the parameters as they are, nats per row."""
    was_training = bound.nets.training
    bound.nets.eval()
    total = 0.0
    with seeded(0), quiet():
        for _ in range(draws):
            scores = score(bound, run_pair(bound, batch))
            rows = [torch.as_tensor(scores.local_rows(side, "cell", 1.0)) for side in ("model", "guide")]
            total += float((rows[0] - rows[1]).mean())
    bound.nets.train(was_training)
    return total / draws


def watch(template: scivi.Template, table: Any, validation: Any, plan: scivi.Plan, draws: int) -> Watched:
    """Train, and look at the validation cells while the clock stands."""
    batch = batch_of(template, validation)
    seconds, bounds, spent, state = [], [], 0.0, None
    since = time.perf_counter()
    for now in train(template, table, plan):
        spent += time.perf_counter() - since
        state = now.state
        seconds.append(spent)
        bounds.append(bound_on(state.bound, batch, draws))
        since = time.perf_counter()
    assert state is not None  # a plan has one step at least
    state.feed.close()
    return Watched(np.array(seconds), np.array(bounds), dict(state.bound.nets.state_dict()))


@torch.no_grad()
def latent_of(fit: scivi.Fit, batch: Batch) -> np.ndarray:
    """Posterior means of the cells' states, (cell, latent): the guide alone, which costs next to nothing."""
    with seeded(0), quiet(), particle_plate(DRAWS, fit.bound.nesting):
        trace = poutine.trace(fit.bound.guide).get_trace(batch)
        z = value_of(trace, "z")
    return z.mean(0).numpy()


def run_ours(cells: Cells, plan: scivi.Plan, draws: int) -> tuple[Watched, dict[str, float]]:
    """Our training, watched; and the scores of the same fit."""
    template, table = citeseq.from_data(cells.adata[cells.train].copy())
    watched = watch(template, table, table_of(template, cells, cells.validation), plan, draws)
    fit = scivi.fit(template, table, plan, progress=False)
    apart = [
        float((value - watched.parameters[name]).abs().max())
        for name, value in fit.nets.state_dict().items()
        if value.is_floating_point()
    ]
    result = scivi.draw(fit, table_of(template, cells, cells.test), DRAWS)
    weights = result["sample_stats"]["row_log_weight"].to_numpy()[0]  # (draw, cell)
    foreground = result["posterior"]["foreground"].mean(("chain", "draw"))
    everything = batch_of(template, table_of(template, cells, np.arange(cells.adata.n_obs)))
    scores = {"loglik": float((np.logaddexp.reduce(weights, 0) - math.log(DRAWS)).mean())}
    scores |= foreground_scores(cells, foreground.transpose("cell", "protein").to_numpy())
    scores |= latent_scores(cells, latent_of(fit, everything))
    return watched, scores | {"s": float(watched.seconds[-1]), "apart": max(apart)}


def run_totalvi(cells: Cells, seed: int, most_epochs: int) -> tuple[Any, dict[str, float]]:
    """A fit of totalVI and its scores."""
    from citeseq_peer import fit_totalvi

    fit = fit_totalvi(cells, seed, most_epochs)
    scores = {"loglik": fit.log_likelihood(cells.test, DRAWS)}
    scores |= foreground_scores(cells, fit.foreground(cells.test))
    scores |= latent_scores(cells, fit.latent())
    given = foreground_scores(cells, fit.foreground_given_counts(cells.test))
    scores |= {f"given_counts_{name}": value for name, value in given.items()}
    best = int(fit.bound.argmax())
    scores |= {"s": float(fit.seconds[-1]), "epochs": float(len(fit.seconds)), "best_epoch": float(best)}
    return fit, scores | {"s_to_best": float(fit.seconds[best]), "bound": float(fit.bound[best])}


def compare(cells: Cells, plan: dict[str, Any], seed: int, most_epochs: int, draws: int) -> dict[str, float]:
    """Both sides on one seed; names without the seed."""
    fit, theirs = run_totalvi(cells, seed, most_epochs)
    watched, ours = run_ours(cells, scivi.Plan(**plan, seed=seed), draws)
    exact = int(fit.exact_bound.argmax())
    theirs |= {"exact_bound": float(fit.exact_bound[exact]), "s_to_best_exact": float(fit.seconds[exact])}
    ours |= {"bound": float(watched.bound.max()), "s_to_pass": watched.passes(theirs["bound"])}
    ours |= {"s_to_pass_exact": watched.passes(theirs["exact_bound"])}
    show(seed, ours, theirs)
    return {f"ours_{k}": v for k, v in ours.items()} | {f"totalvi_{k}": v for k, v in theirs.items()}


def show(seed: int, ours: dict[str, float], theirs: dict[str, float]) -> None:
    """The table of a seed."""
    print(f"\nseed {seed:<17d} {'ours':>9s} {'totalVI':>9s} {'given counts':>13s}")
    for name in SHOWN:
        given = theirs.get(f"given_counts_{name}")
        print(f"{name:22s} {ours[name]:9.4g} {theirs[name]:9.4g} {'' if given is None else f'{given:13.4g}'}")
    print(f"{'validation bound':22s} {ours['bound']:9.4g} {theirs['bound']:9.4g}")
    print(f"{'  exact':22s} {'':9s} {theirs['exact_bound']:9.4g}")
    print(f"{'s of training':22s} {ours['s']:9.4g} {theirs['s']:9.4g}   {theirs['epochs']:.0f} epochs")
    print(f"{'s to its best bound':22s} {ours['s_to_pass']:9.4g} {theirs['s_to_best']:9.4g}")
    print(f"{'  exact':22s} {ours['s_to_pass_exact']:9.4g} {theirs['s_to_best_exact']:9.4g}", flush=True)


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Figures over the seeds."""
    table = {name: np.array([r[name] for r in rounds]) for name in rounds[0]}
    figures = {
        "loglik_gain_min": (table["ours_loglik"] - table["totalvi_loglik"]).min(),
        "time_ratio_median": np.median(table["ours_s_to_pass"] / table["totalvi_s_to_best"]),
        "time_ratio_exact_median": np.median(
            table["ours_s_to_pass_exact"] / table["totalvi_s_to_best_exact"]
        ),
        "brier_max": table["ours_brier"].max(),
        "ece_max": table["ours_ece"].max(),
        "brier_marker_max": max(table[f"ours_brier_{marker}"].max() for marker in FIVE),
        "cd14_in_cd4_max": table["ours_cd14_in_cd4"].max(),
        "knn_accuracy_min": table["ours_knn_accuracy"].min(),
        "active_dims_min": table["ours_active_dims"].min(),
        "watched_apart": table["ours_apart"].max(),
    }
    return {name: float(value) for name, value in figures.items()}


def peak_gb() -> float:
    """Most memory that this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def side(name: str, cells: Cells, plan: dict[str, Any]) -> None:
    """Fit one side, and print the peak of this process before and after."""
    if name == "ours":
        before = peak_gb()
        template, table = citeseq.from_data(cells.adata[cells.train].copy())
        scivi.fit(template, table, scivi.Plan(**plan), progress=False)
    else:
        from citeseq_peer import fit_totalvi

        before = peak_gb()
        fit_totalvi(cells, 0, MEMORY_EPOCHS)
    print(before, peak_gb())


def memory(data: Path, full: bool) -> dict[str, float]:
    """Peak memory of both sides, each in a process of its own."""
    figures = {}
    for name in ("ours", "totalvi"):
        command = [sys.executable, __file__, "--side", name, "--data", str(data)]
        told = subprocess.check_output(command + ["--full"] * full, text=True).splitlines()[-1]
        before, peak = map(float, told.split())
        figures |= {f"{name}_peak_gb": peak, f"{name}_fit_gb": peak - before}
    return {"memory_ratio": figures["ours_peak_gb"] / figures["totalvi_peak_gb"], **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, help="how many; 3, with --full 1. 0 leaves only --memory")
    parser.add_argument("--full", action="store_true", help="all cells and genes")
    parser.add_argument("--memory", action="store_true", help="compare peak memory too")
    parser.add_argument("--data", type=Path, default=DATA, help="the cells, as .h5ad")
    parser.add_argument("--epochs", type=int, default=2000, help="the most of totalVI; fewer only for trying")
    parser.add_argument("--seen", type=int, default=8, help="draws of our bound on the validation cells")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--side", choices=("ours", "totalvi"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.data.is_file():
        sys.exit(f'there is no file "{given.data}"; give the path of pbmc10k_citeseq.h5ad by --data.')
    use_threads(THREADS)
    warnings.simplefilter("ignore")
    plan = FULL if given.full else PLAN
    cells = read(given.data, given.full)
    if given.side is not None:
        side(given.side, cells, plan)
        return
    seeds = given.seeds if given.seeds is not None else (1 if given.full else 3)
    rounds = [compare(cells, plan, seed, given.epochs, given.seen) for seed in range(seeds)]
    figures = {**(summary(rounds) if rounds else {}), "memory_ratio": math.nan}
    if given.memory:
        figures |= memory(given.data, given.full)
    print()
    for name, value in figures.items():
        print(f"{name:26s} {value:.4g}")
    for seed, found in enumerate(rounds):
        figures |= {f"{name}_{seed}": value for name, value in found.items()}
    settings = {
        "seeds": seeds,
        "full": given.full,
        "most_epochs": given.epochs,
        "draws": DRAWS,
        "seen": given.seen,
    }
    settings |= {
        "n_train": len(cells.train),
        "n_validation": len(cells.validation),
        "n_test": len(cells.test),
    }
    settings |= {"genes": cells.adata.n_vars, **{k: v for k, v in plan.items() if isinstance(v, int | float)}}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
