"""Are rates, scatter, loci and genotypes right on simulated pedigrees, and what does AlphaBeta make of them?

Reads are simulated by a few lines of numpy that share nothing with the template: binomial gametes, generation
by generation, beta-binomial reads of coverage 9. Parts, each of which can be left out:

    rates          one pair of rates for all loci, founders at and off equilibrium, --seeds fits of --loci,
                   with AlphaBeta (given the true error rates and founder) on the same reads
    large          the same, once, at a million loci
    nuts           the same at 2000 loci, beside NUTS
    heterogeneity  rates that scatter over loci (ln sd 1.2 and .8) at five times --loci: scatter, medians,
                   per-locus posteriors against the truth, genotypes of loci that the fit has not seen
    estimators     scatter at 20,000 loci, learnt on guide-placed nodes, on prior-placed ones (rate classes),
                   by the importance-weighted bound of each locus (16 draws), and by the ELBO

    python benchmarks/methylation_accuracy.py [--seeds 20] [--loci 100000] [--part rates ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import xarray as xr
from record import use_threads, write_json

import scivi
from domains.genomics import alphabeta, genotypes, methylation
from domains.genomics.methylation import EXAMPLE

GAIN, LOSS = 2.43e-4, 8.29e-4  # 1 / generation, Arabidopsis Col-0 (data: Zhang 2025, as AlphaBeta estimates)
ERRORS = {"nonconversion": 0.005, "inappropriate": 0.03, "overdispersion": 0.02}
PARTS = ("rates", "large", "nuts", "heterogeneity", "estimators")
OFF = np.array([0.9, 0.002, 0.098])  # a founder with too little methylation to be at equilibrium


def simulated(
    n: int, gain: np.ndarray, loss: np.ndarray, founder: np.ndarray, rng: np.random.Generator
) -> tuple[xr.Dataset, np.ndarray]:
    """Reads of EXAMPLE's samples at n loci, and their genotypes (locus, sample)."""
    pedigree = EXAMPLE.ordered()
    copies = {}
    for node, parent, length in zip(pedigree.nodes, pedigree.parents, pedigree.generations, strict=True):
        x = copies[parent] if parent else rng.choice(3, n, p=founder)
        for _ in range(length):
            methylated = gain + (1 - gain - loss) * x / 2  # chance that a gamete is
            x = rng.binomial(2, methylated)
        copies[node] = x
    states = np.stack([copies[s] for s in pedigree.samples], 1)
    low, high, rho = ERRORS.values()
    mean, phi = np.choose(states, [low, 0.5, 1 - high]), (1 - rho) / rho
    total = rng.poisson(9.0, states.shape)
    reads = rng.binomial(total, rng.beta(mean * phi, (1 - mean) * phi))
    dims = ("locus", "sample")
    table = {"methylated": (dims, reads), "total": (dims, total), "context": (("locus",), np.full(n, "CG"))}
    return xr.Dataset(table, {"locus": np.arange(n), "sample": list(pedigree.samples)}), states


def equilibrium(gain: float, loss: float) -> np.ndarray:
    """Founder's genotypes after very many generations of selfing, by plain powers."""
    q = np.array([gain, (1 + gain - loss) / 2, 1 - loss])
    step = np.stack([(1 - q) ** 2, 2 * q * (1 - q), q**2], 1)
    return np.linalg.matrix_power(step, 2**20)[0]


def by_alphabeta(table: xr.Dataset, founder: np.ndarray) -> tuple[float, float]:
    """Log ratios to the truth of AlphaBeta's gain and loss, from calls with the true errors and founder."""
    states = alphabeta.calls(
        table["methylated"].values,
        table["total"].values,
        founder,
        false_methylated=ERRORS["nonconversion"],
        false_unmethylated=ERRORS["inappropriate"],
    )
    pairs = alphabeta.divergences(states, EXAMPLE)
    found = alphabeta.fit_alphabeta(pairs, pairs.attrs["p0uu"], starts=5)
    return float(np.log(found.gain / GAIN)), float(np.log(found.loss / LOSS))


def rates(seeds: int, loci: int) -> dict[str, float]:
    """Homogeneous rates, at and off equilibrium."""
    figures: dict[str, float] = {}
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    for where, founder in (("at", equilibrium(GAIN, LOSS)), ("off", OFF)):
        ratios, z, inside, theirs = [], [], [], []
        for seed in range(seeds):
            table, _ = simulated(loci, GAIN, LOSS, founder, np.random.default_rng([seed, where == "off"]))
            began = time.perf_counter()
            fit = scivi.fit(template, table, scivi.Plan(seed=seed), progress=False)
            seconds = time.perf_counter() - began
            posterior = scivi.draw(fit, table.isel(locus=slice(0, 10)), 2000, seed=seed)["posterior"]
            for name, truth in (("gain_rate", GAIN), ("loss_rate", LOSS)):
                log = np.log(posterior[name].values.ravel() / truth)
                ratios.append(log.mean())
                z.append(log.mean() / log.std())
                low, high = np.quantile(log, [0.025, 0.975])
                inside.append(low <= 0 <= high)
            theirs.append(by_alphabeta(table, founder))
            print(
                f"  {where} equilibrium, seed {seed}: log ratios {ratios[-2]:+.3f} {ratios[-1]:+.3f}, "
                f"z {z[-2]:+.2f} {z[-1]:+.2f}; AlphaBeta {theirs[-1][0]:+.3f} "
                f"{theirs[-1][1]:+.3f}; {seconds:.1f} s",
                flush=True,
            )
        pairs = np.reshape(ratios, (-1, 2))
        figures |= {
            f"{where}_mean_log_ratio_gain": float(pairs[:, 0].mean()),
            f"{where}_mean_log_ratio_loss": float(pairs[:, 1].mean()),
            f"{where}_rms_z": float(np.sqrt(np.mean(np.square(z)))),
            f"{where}_covered_95": float(np.sum(inside)),
            f"{where}_of": float(len(inside)),
            f"{where}_alphabeta_log_ratio_gain": float(np.mean(theirs, 0)[0]),
            f"{where}_alphabeta_log_ratio_loss": float(np.mean(theirs, 0)[1]),
        }
    return figures


def large(loci: int = 1_000_000) -> dict[str, float]:
    """Homogeneous rates at a million loci."""
    table, _ = simulated(loci, GAIN, LOSS, equilibrium(GAIN, LOSS), np.random.default_rng(1000))
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    began = time.perf_counter()
    fit = scivi.fit(template, table, scivi.Plan(), progress=False)
    seconds = time.perf_counter() - began
    posterior = scivi.draw(fit, table.isel(locus=slice(0, 10)), 1000)["posterior"]
    return {
        "large_gain_ratio": float(posterior["gain_rate"].mean()) / GAIN,
        "large_loss_ratio": float(posterior["loss_rate"].mean()) / LOSS,
        "large_seconds": seconds,
    }


def heterogeneity(loci: int) -> dict[str, float]:
    """Scatter over loci, per-locus posteriors, genotypes."""
    rng = np.random.default_rng(5)
    gain, loss, sigma = 1e-3, 3e-3, np.array([1.2, 0.8])
    z = rng.normal(size=(loci, 2))
    log_rates = np.log([gain, loss]) + sigma * z
    founder = np.array([0.75, 0.01, 0.24])
    table, states = simulated(loci, *np.minimum(np.exp(log_rates), 0.5).T, founder, rng)
    held = slice(0, loci // 50)  # loci that the fit does not see
    seen = table.isel(locus=slice(loci // 50, None))
    template = methylation.make(EXAMPLE, contexts=("CG",))
    began = time.perf_counter()
    fit = scivi.fit(template, seen, scivi.Plan(), progress=False)
    seconds = time.perf_counter() - began
    drawn = scivi.draw(fit, seen.isel(locus=slice(0, min(40_000, loci // 2))), 1000)
    posterior = drawn["posterior"]
    figures = {"heterogeneity_loci": float(loci), "heterogeneity_seconds": seconds}
    for k, (name, truth) in enumerate((("gain", gain), ("loss", loss))):
        figures[f"{name}_sigma_ratio"] = float(posterior[f"{name}_sigma"].mean()) / sigma[k]
        figures[f"{name}_median_ratio"] = float(posterior[f"{name}_rate"].mean()) / truth
    figures |= coverage(posterior, log_rates[loci // 50 :], sigma)
    new = scivi.draw(fit, table.isel(locus=held), 200)
    return figures | of_genotypes(new, template, states[held], founder)


def at_the_prior(batch: Any, prior: Any, nets: Any, *, form: Any) -> None:
    """A guide that puts every locus's nodes where its prior is: the same rates for all, as rate classes."""
    nets.globals(batch)
    one = batch.total.new_ones(())
    with batch.plate("locus"):
        pyro.sample("z", dist.Normal(0 * one, one).expand([2]).to_event(1))


def estimators(loci: int = 20_000) -> dict[str, float]:
    """Scatter over loci as four ways of integrating them learn it, from the same start."""
    rng = np.random.default_rng(5)
    sigma = np.array([1.2, 0.8])
    log_rates = np.log([1e-3, 3e-3]) + sigma * rng.normal(size=(loci, 2))
    founder = np.array([0.75, 0.01, 0.24])
    table, _ = simulated(loci, *np.minimum(np.exp(log_rates), 0.5).T, founder, rng)
    template = methylation.make(EXAMPLE, contexts=("CG",))
    rate_classes = replace(template, guide=partial(at_the_prior, form=methylation.form_of(template)))
    long = {"steps": 2000, "newton": False, "rows_per_batch": 1024, "lr": 0.02}
    ways = {
        "guide_placed": (template, scivi.Plan()),
        "prior_placed": (rate_classes, scivi.Plan()),
        "importance_weighted": (template, scivi.Plan(estimator="iwae", particles=16, **long)),
        "elbo": (template, scivi.Plan(estimator="trace", **long)),
    }
    figures = {}
    for name, (which, plan) in ways.items():
        began = time.perf_counter()
        fit = scivi.fit(which, table, plan, progress=False)
        figures[f"{name}_seconds"] = time.perf_counter() - began
        posterior = scivi.draw(fit, table.isel(locus=slice(0, 5)), 1000)["posterior"]
        for k, rate in enumerate(("gain", "loss")):
            draws = posterior[f"{rate}_sigma"].values
            figures[f"{name}_{rate}_sigma_ratio"] = float(draws.mean()) / sigma[k]
            figures[f"{name}_{rate}_sigma_sd"] = float(draws.std()) / sigma[k]
        print(name, {k: round(v, 3) for k, v in figures.items() if k.startswith(name)}, flush=True)
    return figures


def nuts(loci: int = 2000) -> dict[str, float]:
    """What loci share beside NUTS on the same marginal likelihood, genotypes summed out."""
    rng = np.random.default_rng(7)
    table, _ = simulated(loci, 1e-3, 3e-3, np.array([0.75, 0.01, 0.24]), rng)
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    fit = scivi.fit(template, table, progress=False)
    ours = scivi.draw(fit, table.isel(locus=slice(0, 5)), 4000)["posterior"]
    theirs = scivi.nuts(template, table, draws=600, warmup=400, chains=4, seed=1, progress=False)["posterior"]
    shift, ratio = [], []
    for name in theirs.data_vars:
        a, b = (p[name].stack(sample_=("chain", "draw")).transpose(..., "sample_") for p in (ours, theirs))
        a, b = np.atleast_2d(a.values), np.atleast_2d(b.values)
        shift += list((np.abs(a.mean(-1) - b.mean(-1)) / b.std(-1)).ravel())
        ratio += list((a.std(-1) / b.std(-1)).ravel())
    r_hat = azs.rhat(theirs.to_dataset())
    return {
        "nuts_worst_shift_sd": float(np.max(shift)),
        "nuts_sd_ratio_min": float(np.min(ratio)),
        "nuts_sd_ratio_max": float(np.max(ratio)),
        "nuts_worst_r_hat": max(float(r_hat[name].max()) for name in r_hat.data_vars),
    }


def coverage(posterior: xr.Dataset, truth: np.ndarray, sigma: np.ndarray) -> dict[str, float]:
    """Distance of coverage from nominal, overall and among the best informed twentieth of loci.

    Which loci those are is told by every other draw, and the intervals by the rest: chosen by the draws that
    make them, intervals are those that chance made narrow.
    """
    figures = {}
    for k, name in enumerate(("gain", "loss")):
        every = posterior[f"locus_log_{name}"].values.reshape(-1, posterior.sizes["locus"])
        chosen, draws = every[::2].std(0), every[1::2]
        true = truth[: draws.shape[1], k]
        informed = chosen <= np.quantile(chosen, 0.05)
        for level in (0.5, 0.9, 0.95):
            low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], axis=0)
            hit = (low <= true) & (true <= high)
            figures[f"{name}_coverage_gap_{level:g}"] = float(hit.mean() - level)
            figures[f"{name}_coverage_gap_{level:g}_informed"] = float(hit[informed].mean() - level)
        figures[f"{name}_informed_sd"] = float(draws.std(0)[informed].mean() / sigma[k])
    return figures


def of_genotypes(
    result: xr.DataTree, template: scivi.Template, states: np.ndarray, founder: np.ndarray
) -> dict[str, float]:
    """Posterior genotypes of new loci against the truth, beside calls sample by sample."""
    ours = genotypes.genotypes(result, template)["genotype_prob"].sel(node=list(EXAMPLE.samples))
    ours = ours.transpose("locus", "node", "genotype").values
    methylated, total = result["observed_data"]["methylated"].values, result["constant_data"]["total"].values
    alone = single(methylated, total, founder)
    true = np.eye(3)[states]
    figures = {}
    for name, p in (("ours", ours), ("alone", alone)):
        log = np.log(np.maximum((p * true).sum(-1), 1e-12))
        figures[f"genotype_log_loss_{name}"] = float(-log.mean())
        figures[f"genotype_log_loss_{name}_n3"] = float(-log[total <= 3].mean())
    bins = np.clip((ours * 10).astype(int), 0, 9)
    gaps = [
        (bins == b).mean() * abs(ours[bins == b].mean() - true[bins == b].mean())
        for b in range(10)
        if (bins == b).any()
    ]
    return figures | {"genotype_calibration_error": float(np.sum(gaps))}


def single(methylated: np.ndarray, total: np.ndarray, founder: np.ndarray) -> np.ndarray:
    """Genotype probabilities from one sample's reads alone, with the true errors, (locus, sample, 3)."""
    from scipy.stats import betabinom

    low, high, rho = ERRORS.values()
    phi = (1 - rho) / rho
    p = [
        f * betabinom.pmf(methylated, total, m * phi, (1 - m) * phi)
        for f, m in zip(founder, (low, 0.5, 1 - high), strict=True)
    ]
    return np.stack(p, -1) / np.sum(p, 0)[..., None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--loci", type=int, default=100_000)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads()
    parts: dict[str, Any] = {
        "rates": lambda: rates(given.seeds, given.loci),
        "large": large,
        "nuts": nuts,
        "estimators": estimators,
        "heterogeneity": lambda: heterogeneity(5 * given.loci),
    }
    figures: dict[str, float] = {}
    for part in given.part:
        found = parts[part]()
        figures |= found
        for name, value in found.items():
            print(f"{name:42s} {value:.4g}", flush=True)
    settings = {"seeds": given.seeds, "loci": given.loci}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
