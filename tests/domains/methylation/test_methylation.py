"""The methylation template against simulations, quadrature, NUTS and AlphaBeta that share no code with it.

The full sizes of these checks are in ``benchmarks/methylation_accuracy.py``.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from methylation_accuracy import GAIN, LOSS, OFF, equilibrium, of_genotypes, simulated
from scipy.stats import betabinom

import scivi
from domains.genomics import divergence, genotypes, methylation
from domains.genomics.methylation import EXAMPLE
from domains.genomics.pedigrees import Pedigree
from scivi.errors import DataError
from scivi.inference.opening import open_data

WINDOW = Path(__file__).parents[4] / "shared" / "data" / "methylation" / "col0_ma3_gbm_window0.h5ad"
SCATTER = np.array([1.2, 0.8])
RATES = np.array([1e-3, 3e-3])


@pytest.mark.slow
@pytest.mark.parametrize("founder", [equilibrium(GAIN, LOSS), OFF], ids=["at equilibrium", "off"])
def test_recover_rates_of_a_founder(founder):
    """z of ln gain and ln loss is standard normal: of 2 fits x 2 rates none is beyond 3.5 (chance .002)."""
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    for seed in range(2):
        table, _ = simulated(20_000, GAIN, LOSS, founder, np.random.default_rng([seed, len(founder)]))
        fit = scivi.fit(template, table, progress=False)
        posterior = scivi.draw(fit, table.isel(locus=slice(0, 5)), 1000)["posterior"]
        for name, truth in (("gain_rate", GAIN), ("loss_rate", LOSS)):
            log = np.log(posterior[name].values / truth)
            assert abs(log.mean()) < 3.5 * log.std()
            assert log.std() < 0.3  # 20,000 loci hold some hundred events: 1 / sqrt(100) and less


@pytest.fixture(scope="module")
def scattered():
    """A fit to loci whose rates scatter, with the truth: (template, fit, drawn, log rates, states)."""
    rng = np.random.default_rng(11)
    n, held = 20_000, 1000
    log_rates = np.log(RATES) + SCATTER * rng.normal(size=(n, 2))
    founder = np.array([0.75, 0.01, 0.24])
    table, states = simulated(n, *np.minimum(np.exp(log_rates), 0.5).T, founder, rng)
    template = methylation.make(EXAMPLE, contexts=("CG",))
    fit = scivi.fit(template, table.isel(locus=slice(held, None)), progress=False)
    drawn = scivi.draw(fit, table, 200)
    return template, fit, drawn, log_rates, states, table


def learnt_as_scattered(sigma: np.ndarray) -> bool:
    """What the fit is held to: no collapse, each scatter within 25 %."""
    return bool((np.abs(sigma / SCATTER - 1) < 0.25).all())


@pytest.mark.slow
def test_heterogeneity_is_learnt_and_a_collapse_would_be_seen(scattered):
    """At this size the posterior sd of either scatter is about 8 % of it, so that 25 % is three sd."""
    posterior = scattered[2]["posterior"]
    sigma = np.array([float(posterior[f"{name}_sigma"].mean()) for name in ("gain", "loss")])
    assert learnt_as_scattered(sigma)
    assert not learnt_as_scattered(np.array([0.087, 0.028]))  # what an amortised Gaussian ELBO made of it
    for name, truth in zip(("gain", "loss"), RATES, strict=True):
        assert float(posterior[f"{name}_rate"].mean()) == pytest.approx(truth, rel=0.3)


def exact_posterior(table: xr.Dataset, shared: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    """Posterior of (z_gain, z_loss) of each locus on a grid, (locus, len(z), len(z)), by plain numpy."""
    phi = (1 - shared["overdispersion"]) / shared["overdispersion"]
    m, n = table["methylated"].values, table["total"].values
    fractions = (shared["nonconversion"], 0.5, 1 - shared["inappropriate"])
    seen = np.stack([betabinom.pmf(m, n, f * phi, (1 - f) * phi) for f in fractions], -1)
    ordered, column = EXAMPLE.ordered(), {name: k for k, name in enumerate(EXAMPLE.samples)}
    edges = list(zip(ordered.nodes, ordered.parents, ordered.generations, strict=True))
    out = np.zeros((len(m), len(z), len(z)))
    for (i, z1), (j, z2) in itertools.product(enumerate(z), repeat=2):
        gain = min(shared["gain"] * np.exp(shared["gain_sigma"] * z1), 0.5)
        loss = min(shared["loss"] * np.exp(shared["loss_sigma"] * z2), 0.5)
        q = np.array([gain, (1 + gain - loss) / 2, 1 - loss])
        step = np.stack([(1 - q) ** 2, 2 * q * (1 - q), q**2], 1)
        said = {node: seen[:, column[node]] for node in ordered.nodes}
        for node, parent, length in reversed(edges):
            if parent:
                said[parent] = said[parent] * (said[node] @ np.linalg.matrix_power(step, length).T)
        out[:, i, j] = (said[ordered.nodes[0]] @ shared["founder"]) * np.exp(-(z1**2 + z2**2) / 2)
    return out / out.sum((1, 2), keepdims=True)


@pytest.fixture(scope="module")
def loci(scattered):
    """200 loci, and the 50 best informed of all: draws of z, and the exact posterior."""
    _, fit, drawn, _, _, table = scattered
    informed = drawn["posterior"]["locus_log_gain"].std(("chain", "draw")).argsort().values[:50]
    some = table.isel(locus=np.sort(np.concatenate([np.arange(200), informed[informed >= 200]])))
    posterior = scivi.draw(fit, some, 2000)["posterior"]
    mean = posterior.mean(("chain", "draw"))
    shared = {"gain": mean["gain_rate"].values[0], "loss": mean["loss_rate"].values[0]}
    shared |= {n: mean[n].values for n in ("gain_sigma", "loss_sigma", "nonconversion", "inappropriate")}
    shared |= {"overdispersion": mean["overdispersion"].values, "founder": mean["founder"].values[0]}
    z = np.stack(
        [
            (posterior[f"locus_log_{name}"] - np.log(posterior[f"{name}_rate"][..., 0]))
            / posterior[f"{name}_sigma"]
            for name in ("gain", "loss")
        ]
    )[:, 0]
    grid = np.linspace(-5, 5, 41)
    return some, z, grid, exact_posterior(some, shared, grid)


@pytest.mark.slow
def test_heterogeneity_guide_has_the_means_of_the_exact_posterior(loci):
    """Monte Carlo error of a mean of 2000 draws: .02."""
    _, z, grid, exact = loci
    for k in range(2):
        mean = exact.sum(2 - k) @ grid
        assert np.corrcoef(z[k].mean(0), mean)[0, 1] > 0.9
        assert np.abs(z[k].mean(0) - mean).mean() < 0.05


@pytest.mark.slow
def test_heterogeneity_guide_is_within_a_fiftieth_of_a_nat(scattered):
    """row_log_weight is log p(reads, z) - log q(z): its mean falls short of log p(reads) by KL(q || p)."""
    weight = scattered[2]["sample_stats"]["row_log_weight"].values[0]
    log_evidence = np.logaddexp.reduce(weight, 0) - np.log(len(weight))
    assert (log_evidence - weight.mean(0)).mean() < 0.02


@pytest.mark.slow
def test_calibration_of_loci_against_the_exact_posterior(loci):
    """Exact mass of the guide's central intervals, on average over loci, and over those told most of.

    Of one locus it has a Monte Carlo error of .016 at 50 % (2000 draws), which is averaged over 50 or more.
    """
    _, z, grid, exact = loci
    edges = np.append(grid, grid[-1] + grid[1] - grid[0]) - (grid[1] - grid[0]) / 2
    for k in range(2):
        below = np.pad(exact.sum(2 - k).cumsum(1), ((0, 0), (1, 0)))
        informed = np.argsort(z[k].std(0))[:50]
        for level in (0.5, 0.9, 0.95):
            low, high = np.quantile(z[k], [0.5 - level / 2, 0.5 + level / 2], axis=0)
            mass = np.array(
                [
                    np.interp(h, edges, c) - np.interp(lo, edges, c)
                    for lo, h, c in zip(low, high, below, strict=True)
                ]
            )
            assert mass.mean() == pytest.approx(level, abs=0.02)
            assert mass[informed].mean() == pytest.approx(level, abs=0.02)


@pytest.mark.slow
def test_genotype_probabilities_of_held_out_loci(scattered):
    template, _, drawn, _, states, _ = scattered
    held = drawn.isel(locus=slice(0, 1000))
    found = of_genotypes(held, template, states[:1000], np.array([0.75, 0.01, 0.24]))
    assert found["genotype_calibration_error"] < 0.01
    assert found["genotype_log_loss_ours"] < found["genotype_log_loss_alone"]
    assert found["genotype_log_loss_ours_n3"] < found["genotype_log_loss_alone_n3"]


@pytest.mark.slow
def test_genotype_changes_along_edges_are_those_that_happened(scattered):
    """Expected epimutations of all edges against those of the simulation: Poisson error of their number."""
    template, _, drawn, _, states, _ = scattered
    found = genotypes.genotypes(drawn, template)
    parent = {name: k for k, name in enumerate(EXAMPLE.samples)}
    edges = [str(e).split(" to ") for e in found["edge"].values]
    change = np.stack([states[:, parent[b]] - states[:, parent[a]] for a, b in edges], 1) / 2
    for name, happened in (("gains", change.clip(0).sum()), ("losses", (-change).clip(0).sum())):
        expected = float(found[name].mean("draw").sum()) * len(states)
        assert expected == pytest.approx(happened, abs=4 * np.sqrt(happened))


@pytest.mark.slow
def test_real_window_is_not_falsely_precise():
    """8 of 744 loci vary at all: intervals hold AlphaBeta's estimates, that of gain spans a factor of 5."""
    if not WINDOW.exists():
        pytest.skip(f"{WINDOW.name} is not here; its licence (GPL-3) keeps it out of the repository")
    template, data = methylation.from_data(WINDOW, heterogeneous=False)
    fit = scivi.fit(template, data, progress=False)
    posterior = scivi.draw(fit, data, 2000)["posterior"]
    gain, loss = (np.quantile(posterior[f"{name}_rate"], [0.025, 0.975]) for name in ("gain", "loss"))
    assert gain[0] < 5.799e-5 < gain[1]
    assert loss[0] < 6.557e-3 < loss[1]
    assert gain[1] > 5 * gain[0]


def faulty() -> tuple[scivi.Template, xr.Dataset]:
    pedigree = Pedigree(
        ("a", "b", "c", "d", "e"), ("", "a", "nobody", "e", "d"), (0, -2, 1, 1, 1), ("a", "b", "c")
    )
    table = xr.Dataset(
        {
            "methylated": (("locus", "sample"), np.array([[1, 2, 9], [0, 0, 0]])),
            "total": (("locus", "sample"), np.array([[3, 3, 3], [4, 4, 4]])),
            "context": (("locus",), np.array(["CG", "CX"])),
        },
        {"locus": ["1:10", "1:10"], "sample": ["a", "b", "c"]},
    )
    return methylation.make(pedigree), table


def test_bad_input_is_named_all_at_once():
    template, table = faulty()
    with pytest.raises(DataError) as caught:
        open_data(template, table)
    told = str(caught.value)
    for fault in ("-2 generations", "nobody", "descend from themselves", "9 > 3", '"CX"', '"1:10"'):
        assert fault in told


def test_samples_in_another_order_than_the_pedigree_are_refused():
    template = methylation.make(EXAMPLE, contexts=("CG",))
    table, _ = simulated(20, GAIN, LOSS, OFF, np.random.default_rng(0))
    with pytest.raises(DataError, match="in the order"):
        open_data(template, table.isel(sample=slice(None, None, -1)))


def test_missing_reads_are_uncovered_ones():
    """A missing count and a total of 0 give the same log likelihood."""
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    table, _ = simulated(600, GAIN, LOSS, OFF, np.random.default_rng(0))
    gap = table.assign(methylated=table["methylated"].astype(float).copy())
    gap["methylated"][3, 4] = np.nan
    none = table.copy(deep=True)
    none["methylated"][3, 4], none["total"][3, 4] = 0, 0
    fit = scivi.fit(template, table, scivi.Plan(steps=5, newton=False), progress=False)
    first, second = (scivi.draw(fit, t, 20)["log_likelihood"]["methylated"].values for t in (gap, none))
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_a_missing_count_is_an_uncovered_one_in_divergences_too():
    """Not no methylated reads out of many, which would be called UU."""
    template = methylation.make(EXAMPLE, contexts=("CG",), heterogeneous=False)
    table, _ = simulated(600, GAIN, LOSS, OFF, np.random.default_rng(0))
    gap = table.assign(methylated=table["methylated"].astype(float))
    gap["methylated"][:300, 4] = np.nan
    none = table.copy(deep=True)
    none["methylated"][:300, 4], none["total"][:300, 4] = 0, 0
    fit = scivi.fit(template, table, scivi.Plan(steps=5, newton=False), progress=False)
    first, second = (
        divergence.divergence_over_time(scivi.predict(fit, t, 5), template)["observed"] for t in (gap, none)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_divergence_over_time_of_data_that_the_model_made(scattered):
    """Of 78 pairs, which share samples, more than 40 % outside of a 90 % interval would be a wrong model."""
    template, fit, _, _, _, table = scattered
    result = scivi.predict(fit, table.isel(locus=slice(0, 4000)), 60)
    found = divergence.divergence_over_time(result, template)
    assert found.attrs["outside"] < 0.4
    assert found["expected"].values == pytest.approx(found["observed"].values, rel=0.5)
    assert divergence.plot_divergence(found).get_ylabel().startswith("divergence")


@pytest.mark.slow
def test_misfits_name_a_sample_that_was_swapped(scattered):
    template, fit, _, _, _, table = scattered
    wrong = table.isel(locus=slice(0, 3000)).copy(deep=True)
    rng = np.random.default_rng(0)
    for name in ("methylated", "total"):  # reads of other loci: a sample that is no kin
        wrong[name][:, 6] = wrong[name].values[rng.permutation(3000), 6]
    wrong["methylated"][:, 6] = np.minimum(wrong["methylated"][:, 6], wrong["total"][:, 6])
    found = divergence.misfits(scivi.predict(fit, wrong, 60), template)
    z = found["sample_z"].sel(statistic="unlike ancestor")
    assert int(np.abs(z).argmax("sample")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("reproduction", ["clonal", "haploid", "division"])
def test_other_ways_of_passing_on_are_fitted(reproduction):
    """Data of the template's own simulation; z of both rates below 4."""
    template = methylation.make(
        EXAMPLE, reproduction=reproduction, contexts=("CG",), heterogeneous=False, prior=FAST
    )
    table, truth = scivi.simulate(template, {"locus": 3000}, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = scivi.fit(template, table, progress=False)
    posterior = scivi.draw(fit, table.isel(locus=slice(0, 5)), 1000)["posterior"]
    for name in ("gain_rate", "loss_rate"):
        log = np.log(posterior[name].values / truth[name].values)
        assert abs(log.mean()) < 4 * log.std()


FAST = methylation.Prior(gain=5e-3, loss=1e-2)
