"""How far from the truth are posteriors of guide="auto", and how soon, beside NUTS?

    python benchmarks/trust.py --json trust.json

Eleven posteriors of posteriordb, whose reference is ten thousand draws of Stan's NUTS. Each is fitted with
guide="auto" and ``Plan()`` as it is, and 4000 draws are taken. Beside it, in turn and on one core, run
``scivi.nuts`` by nutpie (the same density, captured) and NumPyro's NUTS on the same model in its own words: 4
chains of 1000 draws, warmed up as each does by default. Figures, P a posterior:

    mean_error_max_P: largest |mean - reference mean| of all parameters, in reference sd; at most .1 wanted.
        4000 independent draws, and the reference's own, leave an error of .018, of which the largest of some
        ten parameters is 2 to 3 times as much.
    sd_ratio_min_P, sd_ratio_max_P: smallest and largest of sd over reference sd; .9 to 1.1 is wanted.
    w1_max_P: largest Wasserstein-1 distance, in reference sd.
    khat_P, effective_share_P: of the proposals' weights.
    trusted_P: 1 if the report says trust, .5 trust with care, 0 do not trust.
    seconds_P: of fit and draws, the first time in this process.
    time_vs_nutpie_P, time_vs_numpyro_P: the peer's seconds for the whole call over ours; above 1 wins. With
        --repeats, geometric means.
    error_nutpie_P, error_numpyro_P: their mean_error_max_P: how good they were in that time.
    trusted_within_bounds: posteriors that are not told "do not trust", and within both bounds. 11 is all.
    outside_bounds_but_trusted: posteriors that are neither; 0 is wanted.
    TEMPLATE_FIGURE: of the five templates, each with its own guide and plan beside its own oracle, named by
        ``trust_templates``: mean_error (in the oracle's sd), sd_ratio_min, sd_ratio_max; of photons also
        kl_median, nats; of volatility path_rms; of citeseq auroc_mean and background_cover90.
    templates_within_bounds: templates of which all figures are within what was promised. 5 is all.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from record import use_threads, write_json

if __name__ == "__main__":
    use_threads(1)
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import posteriors
import posteriors_numpyro
import trust_templates
import xarray as xr
from numpyro.infer import MCMC, NUTS
from scipy.stats import wasserstein_distance

import scivi

DRAWS, CHAINS = 4000, 4
WANTED_MEAN, WANTED_SD = 0.1, 1.1
PARTS = ("posteriordb", *trust_templates.TEMPLATES)
WORDS = {"trust": 1.0, "trust with care": 0.5, "do not trust": 0.0}


def errors(draws: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Of draws (parameter, draw) against the reference's: the worst parameter of each kind."""
    sd = reference.std(1)
    shift, ratio = np.abs(draws.mean(1) - reference.mean(1)) / sd, draws.std(1) / sd
    pairs = zip(draws, reference, sd, strict=True)
    return {
        "mean_error_max": float(shift.max()),
        "sd_ratio_min": float(ratio.min()),
        "sd_ratio_max": float(ratio.max()),
        "w1_max": max(wasserstein_distance(a, b) / s for a, b, s in pairs),
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returns."""
    begun = time.perf_counter()
    found = run()
    return time.perf_counter() - begun, found


def ours(one: posteriors.Posterior, seed: int) -> tuple[scivi.Fit, xr.DataTree]:
    """Fit and draws."""
    fit = scivi.fit(one.template, one.data, scivi.Plan(seed=seed), progress=False)
    return fit, scivi.draw(fit, one.data, DRAWS, seed=seed)


def nutpie(one: posteriors.Posterior, seed: int) -> xr.DataTree:
    """NUTS on the captured density."""
    how: dict[str, Any] = {"chains": CHAINS, "draws": DRAWS // CHAINS, "seed": seed, "backend": "nutpie"}
    return scivi.nuts(one.template, one.data, progress=False, **how)


def numpyro(name: str, one: posteriors.Posterior, seed: int) -> dict[str, np.ndarray]:
    """NumPyro's own, chains as one batch."""
    data = {key: np.asarray(value, float) for key, value in one.data.items()}
    kernel = NUTS(posteriors_numpyro.OF[name])
    length: dict[str, Any] = {"num_warmup": 1000, "num_samples": DRAWS // CHAINS, "num_chains": CHAINS}
    run = MCMC(kernel, chain_method="vectorized", progress_bar=False, **length)
    run.run(jax.random.PRNGKey(seed), **data)
    return {key: np.asarray(value) for key, value in run.get_samples().items()}


def of_stan(found: dict[str, np.ndarray], parameters: list[str]) -> np.ndarray:
    """Draws (parameter, draw) by Stan's names."""
    out = []
    for parameter in parameters:
        name, _, place = parameter.partition("[")
        out.append(found[name][:, int(place[:-1]) - 1] if place else found[name])
    return np.stack(out)


def measured(name: str, folder: Path, repeats: int) -> dict[str, float]:
    """All figures of one posterior."""
    one = posteriors.read(name, folder)
    parameters = [str(p) for p in one.reference["parameter"].values]
    reference = one.reference.stack(sample=("chain", "draw")).transpose("parameter", "sample").values
    seconds: dict[str, list[float]] = {"auto": [], "nutpie": [], "numpyro": []}
    for seed in range(repeats):
        own, (fit, tree) = timed(lambda seed=seed: ours(one, seed))
        theirs, chains = timed(lambda seed=seed: nutpie(one, seed))
        other, found = timed(lambda seed=seed: numpyro(name, one, seed))
        for key, value in zip(seconds, (own, theirs, other), strict=True):
            seconds[key].append(value)
        if seed == 0:
            told = errors(posteriors.draws_of(tree, parameters), reference)
            table, report = scivi.analysis.reliability(tree), scivi.analysis.report(tree)
            told |= {"khat": float(table["k_hat"].max()), "trusted": WORDS[report.attrs["verdict"]]}
            told["effective_share"] = float(table["ess"].min()) / max(1, table.attrs["proposals"])
            told["parts"] = fit.provenance["fit"]["finish"]["parts"]
            told["error_nutpie"] = errors(posteriors.draws_of(chains, parameters), reference)[
                "mean_error_max"
            ]
            told["error_numpyro"] = errors(of_stan(found, parameters), reference)["mean_error_max"]
            why = report.attrs["why"] if told["trusted"] < 1 else ""
    told["seconds"] = seconds["auto"][0]
    for peer in ("nutpie", "numpyro"):
        ratios = [a / b for a, b in zip(seconds[peer], seconds["auto"], strict=True)]
        told[f"time_vs_{peer}"] = geometric_mean(ratios)
    print(f"{name:40s} " + ", ".join(f"{key} {value:.3g}" for key, value in told.items()), why, flush=True)
    return told


def of_posteriordb(given: argparse.Namespace) -> dict[str, float]:
    """Figures of the posteriors that are asked for."""
    if not given.folder.exists():
        raise SystemExit(f'there is no "{given.folder}": name it by --folder.')
    found = {name: measured(name, given.folder, given.repeats) for name in given.only}
    within = {
        name: told["mean_error_max"] <= WANTED_MEAN
        and told["sd_ratio_min"] >= 2 - WANTED_SD
        and told["sd_ratio_max"] <= WANTED_SD
        for name, told in found.items()
    }
    figures = {f"{key}_{name}": value for name, told in found.items() for key, value in told.items()}
    figures["trusted_within_bounds"] = sum(within[name] and found[name]["trusted"] > 0 for name in found)
    figures["outside_bounds_but_trusted"] = sum(not within[n] and found[n]["trusted"] > 0 for n in found)
    for key in ("trusted_within_bounds", "outside_bounds_but_trusted"):
        print(f"{key:28s} {figures[key]} of {len(found)}")
    for peer in ("nutpie", "numpyro"):
        ratios = [told[f"time_vs_{peer}"] for told in found.values()]
        print(f"time_vs_{peer:20s} {geometric_mean(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})")
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=posteriors.FOLDER, help="of posteriordb's files")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=list(posteriors.OF), default=list(posteriors.OF)
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="of the benchmark")
    parser.add_argument("--repeats", type=int, default=1, help="of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", module="jax")
    figures = of_posteriordb(given) if "posteriordb" in given.part else {}
    if templates := [name for name in given.part if name != "posteriordb"]:
        figures |= trust_templates.measured(templates)
    write_json(given.json, (__doc__ or "").splitlines()[0], figures, {"draws": DRAWS, "chains": CHAINS})


if __name__ == "__main__":
    main()
