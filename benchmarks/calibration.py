"""Are posteriors right on average over the prior? Simulation-based calibration of every template.

    python benchmarks/calibration.py --json calibration.json --figure docs/_static/sbc.png

Of each template 300 data sets are made from its prior, fitted by its own guide and plan, and the true values
ranked among 999 draws: population parameters, and of sites along rows those of one random row. Where rows
share nothing, each is a fit of its own, and the ranks are those of 300 rows after one run. Ranks fall into 20
bins, and a chi-square test asks whether these are equally full. `tests/test_sbc.py` runs the same settings.

Priors are narrowed where a template's own makes data that nobody has: see ``SETTINGS``.

Figures:
    p_TEMPLATE_VARIABLE: chi-square p of a variable's ranks.
    p_TEMPLATE: the smallest of a template, times the number of its variables (Bonferroni), at most 1.
    trusted_TEMPLATE: share of the fits whose verdict is "trust".
    p_trusted_TEMPLATE: as p_TEMPLATE, of these fits alone, if there are a hundred.
    seconds_TEMPLATE: of it all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from record import use_threads, write_json
from scipy.stats import chisquare

import scivi
from scivi.analysis import plot_ranks, sbc

FITS, BINS, FEWEST = 300, 20, 100


@dataclass(frozen=True)
class Setting:
    """What is calibrated, and on what.

    Args:
        template: with the prior from which its parameters are drawn.
        data: a table whose given fields and sizes are used, or sizes.
        options: more of ``scivi.calibrate``.
    """

    template: scivi.Template
    data: Any
    options: Mapping[str, Any] = field(default_factory=dict)


def photons() -> Setting:
    """100 sources in a band, exposures and area ratios as in a real field.

    The template's prior for the mean log brightness has an sd of 5, and 10 for the sum with that of the
    backgrounds: e^10 counts in one catalogue and e^-10 in the next. Here sources have some 1 to 100 counts.
    """
    from domains.astrophysics import photons as domain

    prior = domain.Prior(
        brightness_mean=2.0, brightness_sd=1.0, scatter=1.0, background_sd=1.0, background_scatter=0.5
    )
    return Setting(
        domain.make(prior=prior), scivi.simulate(domain.template, {"source": 100, "band": 1}, seed=1)[0]
    )


def volatility() -> Setting:
    """Series of 200 days; skew-t errors, leverage and drift, as the template comes.

    Series share nothing: each row of a table is a fit of its own, and one fit serves all.

    The template's prior of the level of log variance has an sd of 10 (a day's return from 0.01 to 20,000 %)
    and is narrowed to 2. The path is summed out; the data are made by the template that samples it.
    """
    from domains.finance import volatility as domain

    prior = domain.Prior(mu_sd=2.0)
    return Setting(
        domain.make(prior=prior),
        {"series": FITS + 1, "day": 200},
        {"simulator": domain.make(prior=prior, path="sampled"), "new_rows": FITS, "draws": 199},
    )


def _pedigree() -> Any:
    """Two lines of descent of 10 and 30 generations from an ancestor, all five plants sequenced."""
    from domains.genomics.pedigrees import Pedigree

    return Pedigree(
        nodes=("0", "10a", "30a", "10b", "30b"),
        parents=("", "0", "10a", "0", "10b"),
        generations=(0, 10, 20, 10, 20),
        samples=("0", "10a", "30a", "10b", "30b"),
    )


def _methylation(heterogeneous: bool, loci: int) -> Setting:
    from domains.genomics import methylation as domain

    prior = domain.Prior(gain=2e-3, loss=5e-3, rate_sd=0.7, sigma=0.7)
    template = domain.make(
        _pedigree(), contexts=("CG",), most_reads=30, heterogeneous=heterogeneous, prior=prior
    )
    return Setting(template, scivi.simulate(template, {"locus": loci}, seed=1)[0])


def methylation() -> Setting:
    """200 loci of one context with common rates, five plants of a pedigree.

    The template's rates are so low, and its prior so wide (a factor of 20 either way), that most data sets of
    200 loci hold no change at all. Here rates are about 2 and 5 in a thousand, within a factor of 4.
    """
    return _methylation(heterogeneous=False, loci=200)


def methylation_loci() -> Setting:
    """100 loci with rates of their own; otherwise as above."""
    return _methylation(heterogeneous=True, loci=100)


def kinetics() -> Setting:
    """A to B and back, both seen eight times; two rates and an error, each known to a factor of two.

    Solved to 1e-4 in place of 1e-6, as ``populations`` is: a hundredth of the error of measurement.
    """
    from domains.kinetics import kinetics as domain
    from domains.kinetics.networks import network
    from domains.kinetics.petab_problems import Observable, Parameter, Problem

    centre, sd = {"k1": 1.0, "k2": 0.5, "sd": 0.1}, {"k1": 0.7, "k2": 0.7, "sd": 0.5}
    rates = {name: centre[name] for name in ("k1", "k2")}
    made = network(
        {"A -> B": "k1", "B -> A": "k2"}, initial={"A": 1.0, "B": 0.0}, parameters=rates, name="conversion"
    )
    parameters = tuple(
        Parameter(n, "log", 1e-4, 1e4, c, prior="logNormal", prior_parameters=(float(np.log(c)), sd[n]))
        for n, c in centre.items()
    )
    seen = tuple(Observable(f"{s} seen", s, "sd", "log") for s in "AB")
    problem = Problem(made, parameters, seen, {"c": {}}, (("c", ""),), "conversion")
    dims = ("condition", "moment", "observable")
    table = xr.Dataset(
        {"time": (dims[:2], np.linspace(0.25, 3.0, 8)[None]), "measured": (dims, np.ones((1, 8, 2)))},
        {"condition": ["c"], "observable": ["A seen", "B seen"]},
    )
    return Setting(domain.make(problem, rtol=1e-4, atol=1e-7), table)


def citeseq() -> Setting:
    """100 cells of one batch, six proteins; all 300 fits are made at once.

    The decoders are learnt, not sampled, and begin so that a cell's state hardly matters: the cells that the
    prior makes differ by the factor of their droplets. Narrow networks, for a hundred cells.
    """
    from dataclasses import replace

    from domains.genomics import citeseq as domain

    panel = replace(
        domain.EXAMPLE,
        batches=("1",),
        log_ambient=domain.EXAMPLE.log_ambient[:1],
        log_fractions=(),
        has_empties=False,
        isotypes=(),
    )
    template = domain.make(panel, hidden=16)
    return Setting(template, scivi.simulate(template, {"cell": 100}, seed=1)[0])


SETTINGS: dict[str, Callable[[], Setting]] = {
    one.__name__: one for one in (photons, volatility, methylation, methylation_loci, kinetics, citeseq)
}


def calibrated(name: str, fits: int = FITS, *, seed: int = 0, progress: bool = False) -> xr.Dataset:
    """Ranks of a template by its name in ``SETTINGS``."""
    made = SETTINGS[name]()
    return scivi.calibrate(made.template, made.data, fits=fits, seed=seed, progress=progress, **made.options)


def p_values(ranks: xr.Dataset, bins: int = BINS) -> dict[str, float]:
    """Chi-square p of every entry of every variable, by its label; ranks of diverged fits are left out."""
    found = {}
    names = sbc(ranks)["variable"].values
    entries = [row for a in ranks.data_vars.values() for row in _rows(a)]
    for name, row in zip(names, entries, strict=True):
        rank = row[np.isfinite(row)]
        counts = np.bincount((rank * bins // (ranks.attrs["draws"] + 1)).astype(int), minlength=bins)
        found[str(name)] = float(chisquare(counts).pvalue)
    return found


def _rows(array: xr.DataArray) -> np.ndarray:
    return array.transpose(..., "simulation").values.reshape(-1, array.sizes["simulation"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--templates", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--fits", type=int, default=FITS, help="of each template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=Path, help="folder for the ranks; those that are there are read")
    parser.add_argument("--figure", type=Path, help="write the curves of all ranks there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads(1)
    figures: dict[str, float] = {}
    shown: dict[str, xr.Dataset] = {}
    for name in given.templates:
        kept = given.ranks and given.ranks / f"{name}.nc"
        begun = time.perf_counter()
        if kept and kept.exists():
            ranks = xr.load_dataset(kept, engine="h5netcdf")
        else:
            ranks = calibrated(name, given.fits, seed=given.seed, progress=True)
            figures[f"seconds_{name}"] = time.perf_counter() - begun
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                ranks.to_netcdf(kept, engine="h5netcdf")
        shown[name] = ranks
        figures |= told(name, ranks)
    for key, value in figures.items():
        print(f"{key:50s} {value:10.4g}")
    if given.figure:
        figure = Figure()
        plot_ranks(shown, ax=figure)
        figure.savefig(given.figure, dpi=120)
    settings = {"fits": given.fits, "seed": given.seed, "bins": BINS}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


def told(name: str, ranks: xr.Dataset) -> dict[str, float]:
    """The figures of a template."""
    p = p_values(ranks)
    trusted = ranks["verdict"].values == "trust"
    found = {f"p_{name}_{variable}": value for variable, value in p.items()}
    found[f"p_{name}"] = min(1.0, len(p) * min(p.values()))
    found[f"trusted_{name}"] = float(trusted.mean())
    if trusted.sum() >= FEWEST:
        of_trusted = p_values(ranks.isel(simulation=trusted))
        found[f"p_trusted_{name}"] = min(1.0, len(p) * min(of_trusted.values()))
    return found


if __name__ == "__main__":
    main()
