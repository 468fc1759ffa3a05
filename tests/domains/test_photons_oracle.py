"""The references that the photon template is held against: are they right themselves?"""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from photons_oracle import TRUTH, Prior, laplace, log_joint, marginal, population, simulate
from photons_scores import exact_posterior, score, stratified, weighted_quantile
from scipy import integrate, stats

from tests.domains.aprates_oracle import SourceCounts

CHANDRA = Path(__file__).parents[3] / "shared" / "data" / "photons" / "chandra_ic2395_21137.nc"


@pytest.fixture(scope="module")
def rows():
    return simulate(300, seed=1)


def test_derivatives_of_the_marginal_match_differences(rows):
    mean, covariance = laplace(rows, TRUTH)
    step = 1e-4 * torch.eye(4, dtype=torch.float64)
    at = marginal(rows, TRUTH, mean, covariance, 11)
    sides = [[marginal(rows, TRUTH + sign * h, mean, covariance, 11) for sign in (1, -1)] for h in step]
    gradient = torch.tensor([(a.value - b.value) / 2e-4 for a, b in sides])
    hessian = torch.stack([(a.gradient - b.gradient) / 2e-4 for a, b in sides])
    # Differences: step**2 times third derivatives of order 300; the rule's own error varies with theta too.
    torch.testing.assert_close(gradient.double(), at.gradient, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(hessian, at.hessian, rtol=1e-3, atol=0.1)


def test_nodes_converge_to_the_evidence_on_a_dense_grid(rows):
    exact = float(exact_posterior(rows, TRUTH).log_evidence.sum())
    start = laplace(rows, TRUTH)
    errors = [abs(marginal(rows, TRUTH, *start, nodes).value - exact) for nodes in (7, 13, 25)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 1e-3  # nats over all sources; 2e-4 seen on 3000


def test_population_is_right_at_a_size_where_the_posterior_is_not_normal():
    few = simulate(40, seed=2)
    log_prior = Prior().log_density
    found = population(few, log_prior, nodes=7)
    mean, covariance = laplace(few, found.mode)
    proposal = torch.distributions.MultivariateNormal(found.mean, 1.3 * found.covariance)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theta = proposal.sample((1000,))
    log_post = torch.tensor(
        [marginal(few, t, mean, covariance, 7).value + float(log_prior(t)) for t in theta]
    )
    weight = torch.softmax(log_post.double() - proposal.log_prob(theta), 0)
    expected = weight @ theta
    error = ((weight[:, None] * (theta - expected)).square().sum(0)).sqrt()  # of the weighted mean
    assert ((found.mean - expected).abs() < 4 * error).all()
    shifted = (found.mode - expected).abs() / found.sd
    assert shifted.max() > 0.1, "the expansion is not tried where mode and mean agree"
    sd = (weight @ (theta - expected).square()).sqrt()
    torch.testing.assert_close(found.sd, sd, rtol=0.1, atol=0)  # 1 / sqrt(2 ESS) = .03, three times


def test_exact_posteriors_are_calibrated():
    many = simulate(800, seed=4)
    posterior = exact_posterior(many, TRUTH, 81, 61)
    assert stats.kstest(posterior.mass_below(many.u).numpy(), "uniform").pvalue > 0.01


def test_quantiles_invert_the_distribution(rows):
    posterior = exact_posterior(rows, TRUTH)
    for prob in (0.05, 0.5, 0.95):
        below = posterior.mass_below(posterior.quantile(prob))
        # Trapezoids and linear cells differ at third order of a spacing of a seventh of a sd.
        torch.testing.assert_close(below, torch.full_like(below, prob), rtol=0, atol=2e-3)


class LaplaceGuide:
    """The normal at the mode of each source."""

    def __init__(self, rows):
        mode, covariance = laplace(rows, TRUTH)
        self.normal = torch.distributions.MultivariateNormal(mode, covariance)

    def log_density(self, u, v):
        return self.normal.log_prob(torch.stack([u, v], -1).transpose(0, 1)).T

    def sample(self, draws):
        return self.normal.sample((draws,))[..., 0]


def test_scores_of_a_normal_guide_are_those_of_its_grid(rows):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        scores = score(rows, TRUTH, LaplaceGuide, draws=4000)
    mean, sd = exact_posterior(rows, TRUTH).moments()
    mode, covariance = laplace(rows, TRUTH)
    assert (scores["kl"] > 0).all()
    assert (scores["guide_mass"] - 1).abs().max() < 1e-4
    # Monte Carlo error of 4000 draws: .016 and .011, times 4.5 for the largest of 300 sources.
    torch.testing.assert_close(scores["bias"], (mode[:, 0] - mean) / sd, rtol=0, atol=0.07)
    torch.testing.assert_close(scores["sd_ratio"], covariance[:, 0, 0].sqrt() / sd, rtol=0, atol=0.05)
    assert abs(float(scores["exact_covers"].mean()) - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 300)


def test_log_joint_is_a_density():
    one = simulate(1, seed=6)
    u = torch.zeros(1, 1, dtype=torch.float64)
    counts = [
        stats.poisson(float(one.log_exposure.exp()) + 1.0),
        stats.poisson(1.0 / float(one.log_alpha.exp())),
    ]
    normals = [stats.norm(float(TRUTH[i]), float(TRUTH[i + 1].exp())) for i in (0, 2)]
    expected = sum(c.logpmf(float(n)) for c, n in zip(counts, (one.n_on, one.n_off), strict=True))
    expected += sum(normal.logpdf(0.0) for normal in normals)
    assert float(log_joint(u, u, one, TRUTH)) == pytest.approx(expected, rel=1e-12)


def test_strata_stand_for_the_catalogue():
    many = simulate(5000, seed=7)
    some, bins, weight = stratified(many, 50)
    assert float(weight.sum()) == pytest.approx(5000)
    assert bins.unique().tolist() == [0, 1, 2, 3, 4, 5]
    exact = float(many.n_on.median())
    assert weighted_quantile(some.n_on, weight, 0.5) == pytest.approx(exact, rel=0.25)  # 50 of the bin 6-20


def test_aprates_without_counts_is_exponential():
    posterior = SourceCounts.of(0, 3, 0.1)
    assert posterior.mode() == 0.0
    assert posterior.interval() == pytest.approx((0.0, -np.log(0.32)), rel=1e-9)


@pytest.mark.parametrize(("n_on", "n_off", "alpha"), [(1, 1, 0.0416), (4, 64, 0.0431), (30, 200, 0.05)])
def test_aprates_sum_matches_integration_over_the_background(n_on, n_off, alpha):
    posterior = SourceCounts.of(n_on, n_off, alpha)

    def joint(b, s):
        return stats.poisson.pmf(n_on, s + b) * stats.poisson.pmf(n_off, b / alpha)

    most = alpha * (n_off + 12 * np.sqrt(n_off) + 30)
    mode = max(posterior.mode(), 0.5)
    at = [integrate.quad(joint, 0, most, args=(s,), epsabs=0, epsrel=1e-10)[0] for s in (mode, 2 * mode)]
    assert at[1] / at[0] == pytest.approx(posterior.density(2 * mode) / posterior.density(mode), rel=1e-7)
    low, high = posterior.interval()
    assert posterior.cdf(high) - posterior.cdf(low) == pytest.approx(0.68, abs=1e-9)
    assert posterior.cdf(posterior._far()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(
    not CHANDRA.exists(), reason="waits for ../shared/data/photons, which is not part of the repository"
)
def test_aprates_sum_matches_the_published_chandra_intervals():
    """Yang et al. 2022, ApJ 941, 104: ends of the 68 % interval over the mode, where both are published."""
    table = xr.load_dataset(CHANDRA)
    published = (
        np.isfinite(table.flux) & (table.flux > 0) & np.isfinite(table.flux_lo) & np.isfinite(table.flux_hi)
    )
    errors = []
    for src, band in zip(*np.nonzero(published.transpose("src", "band").values), strict=True):
        row = table.isel(src=src, band=band)
        posterior = SourceCounts.of(int(row.n_on), int(row.n_off), float(row.alpha))
        ours = np.array(posterior.interval()) / posterior.mode()
        errors.append(np.abs(np.array([row.flux_lo, row.flux_hi]) / float(row.flux) - ours))
    assert len(errors) == 647
    low, high = np.array(errors).T
    # Measured: medians .0016 and .0030, 95th percentiles .0054 and .0149, most of it for one or two counts.
    assert np.median(low) < 0.005
    assert np.median(high) < 0.005
    assert np.quantile(low, 0.95) < 0.02
    assert np.quantile(high, 0.95) < 0.02
