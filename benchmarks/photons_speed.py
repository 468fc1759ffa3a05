"""How long does the photon template take to be as accurate as NumPyro's mean field, and for new rows?

    python benchmarks/photons_speed.py --json photons_speed.json

1e5 sources, two cores for the whole process. The peer (`photons_numpyro`) runs until its own ELBO has
converged: the shortest schedule that one of twice as many steps improves by less than .005 nats per source.
SciVI takes --steps steps, compiled. The two are timed alternately, in one process, --repeats times,
each with its own seed.

Time is wall clock. Ours: all of `scivi.fit`, which checks the table, builds the guide, trains and finishes.
Theirs: the training loop. Tracing and compilation, which a second fit of that shape does not pay, are left
out on both sides and told apart.

Figures:
    time_ratio_to_numpyro: ours over theirs, geometric mean. Ours must be equal or better in median KL per
        source and in the errors of mu and log sigma, which is checked and printed.
    time_ratio_to_numpyro_compiled: the same with the peer's tracing and compilation in its time.
    time_ratio_to_numpyro_least, time_ratio_to_numpyro_most: over the repeats.
    kl_median_scivi, kl_median_numpyro: KL(exact || guide) of (u, v) per source, nats, at its own globals.
    mu_error_sd_scivi, mu_error_sd_numpyro: |mean - exact mean| in exact sd.
    sigma_error_sd_scivi, sigma_error_sd_numpyro: the same of log sigma. These six are means of the repeats.
    new_rows_time_fraction: `scivi.draw` of as many new sources, over the fit's time; median of the repeats.
    new_rows_time_fraction_default_plan: the same beside a fit with `Plan()` as it is.
    first_seconds_scivi: the first fit, which compiles unless torch finds the code on disk.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean, median

from photons_fit import fit_scivi, globals_of, guide_of, prior, table_of, use_threads, write_json
from photons_oracle import Catalogue, Population, population, simulate
from photons_scores import GuideOf, score, stratified, weighted_quantile
from torch import Tensor

import scivi

DATA_SEED = 20_000  # added to --seed: the data are never drawn with the seed of a fit
PER_BIN = 200  # scored sources per bin of n_on; error of the catalogue's median KL about 3 %


@dataclass(frozen=True)
class Quality:
    """How good a fit is: median KL per source, nats; errors of mu and log sigma, exact sd."""

    kl: float
    mu: float
    sigma: float

    def __str__(self) -> str:
        """One part of a printed line."""
        return f"KL median {self.kl:.4f}, error of mu {self.mu:.2f} sd, of log sigma {self.sigma:.2f} sd"


def quality(rows: Catalogue, exact: Population, theta: Tensor, guide: GuideOf) -> Quality:
    """Score a fit against the oracle."""
    some, _, weight = stratified(rows, PER_BIN)
    scores = score(some, theta, guide, draws=100)  # only the divergence is used, which takes no draws
    error = ((theta - exact.mean) / exact.sd).abs()
    return Quality(weighted_quantile(scores["kl"], weight, 0.5), float(error[0]), float(error[1]))


def timed_draw(fit: scivi.Fit, rows: Catalogue, draws: int, seed: int) -> float:
    """Seconds to draw the posteriors of sources that the fit has not seen."""
    table = table_of(rows)
    start = time.perf_counter()
    scivi.draw(fit, table, draws=draws, seed=seed)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100_000, help="sources")
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat; the data have their own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of ours; `Plan()` would stop later")
    parser.add_argument("--draws", type=int, default=1, help="per new source")
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    use_threads()
    from photons_numpyro import converged  # JAX reads the number of threads when it is imported

    rows, new = (simulate(asked.n, DATA_SEED + asked.seed + i) for i in (0, 1))
    exact = population(rows, prior().log_density)
    peer, tried = converged(rows, prior())
    print(f"{asked.n} sources. NumPyro's schedules, of which {peer.steps} steps is taken:")
    for steps, loss, fit in tried:
        told = quality(rows, exact, fit.globals()[0], fit.guide_of())
        print(f"  {steps:5d} steps {fit.seconds:6.2f} s, loss {loss:.4f} nats per source, {told}")
    print(f"  compiled in {peer.compile_seconds:.1f} s\n")
    begun = time.perf_counter()  # the first fit compiles, and neither side is charged for that
    fit_scivi(rows, asked.seed, asked.steps, compile="on")
    first = time.perf_counter() - begun
    times: dict[str, list[float]] = {"scivi": [], "numpyro": [], "draw": []}
    found: dict[str, list[Quality]] = {"scivi": [], "numpyro": []}
    for seed in range(asked.seed, asked.seed + asked.repeats):
        theirs = peer.run(seed)
        start = time.perf_counter()
        ours = fit_scivi(rows, seed, asked.steps, compile="on")
        times["scivi"].append(time.perf_counter() - start)
        times["numpyro"].append(theirs.seconds)
        times["draw"].append(timed_draw(ours, new, asked.draws, seed))
        theta = globals_of(ours)[0]
        found["scivi"].append(quality(rows, exact, theta, guide_of(ours, theta)))
        found["numpyro"].append(quality(rows, exact, theirs.globals()[0], theirs.guide_of()))
        for who in ("scivi", "numpyro"):
            print(f"{who:8s} {times[who][-1]:6.2f} s, {found[who][-1]}")
    figures = figures_of(times, found, peer.compile_seconds)
    figures["first_seconds_scivi"] = first
    begun = time.perf_counter()
    untouched = fit_scivi(rows, asked.seed)
    seconds = time.perf_counter() - begun
    figures["new_rows_time_fraction_default_plan"] = timed_draw(untouched, new, asked.draws, 0) / seconds
    print("\n" + "\n".join(f"{name:32s} {value:.4f}" for name, value in figures.items()))
    better = all(a <= b for a, b in zip(*(_means(found[who]) for who in ("scivi", "numpyro")), strict=True))
    print(f"scivi is {'equal or better' if better else 'NOT equal or better'} in all three")
    write_json(asked.json, __doc__.splitlines()[0], figures, {**vars_of(asked), "numpyro_steps": peer.steps})


def vars_of(asked: argparse.Namespace) -> dict[str, float]:
    """The numbers among the arguments."""
    return {name: value for name, value in vars(asked).items() if isinstance(value, int)}


def _means(found: list[Quality]) -> tuple[float, float, float]:
    return mean(x.kl for x in found), mean(x.mu for x in found), mean(x.sigma for x in found)


def figures_of(
    times: dict[str, list[float]], found: dict[str, list[Quality]], compile_seconds: float
) -> dict[str, float]:
    """Summarise the repeats."""
    pairs = list(zip(times["scivi"], times["numpyro"], strict=True))
    ratio = [a / b for a, b in pairs]
    figures = {
        "time_ratio_to_numpyro": geometric_mean(ratio),
        "time_ratio_to_numpyro_compiled": geometric_mean([a / (b + compile_seconds) for a, b in pairs]),
        "time_ratio_to_numpyro_least": min(ratio),
        "time_ratio_to_numpyro_most": max(ratio),
        "new_rows_time_fraction": median(a / b for a, b in zip(times["draw"], times["scivi"], strict=True)),
    }
    for who in ("scivi", "numpyro"):
        kl, mu, sigma = _means(found[who])
        figures |= {f"kl_median_{who}": kl, f"mu_error_sd_{who}": mu, f"sigma_error_sd_{who}": sigma}
        figures[f"seconds_{who}"] = geometric_mean(times[who])
    return figures


if __name__ == "__main__":
    main()
