"""Priors on scales of their own: against densities of scipy, and their own draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import biject_to

from domains.kinetics.petab_problems import Parameter
from domains.kinetics.priors import ParameterPrior

LOW, HIGH = 0.05, 20.0
ON_LINE = {  # of the value x itself, unbounded
    "uniform": stats.uniform(0.1, 4.9),
    "normal": stats.norm(1.0, 2.0),
    "laplace": stats.laplace(1.0, 2.0),
    "logNormal": stats.lognorm(0.7, scale=math.exp(0.3)),
}
NUMBERS = {"uniform": (0.1, 5.0), "normal": (1.0, 2.0), "laplace": (1.0, 2.0), "logNormal": (0.3, 0.7)}
TO_VALUE = {"lin": lambda s: s, "log": np.exp, "log10": lambda s: 10.0**s}
SLOPE = {"lin": lambda s: 1.0 + 0 * s, "log": np.exp, "log10": lambda s: math.log(10) * 10.0**s}


def made(kind: str, scale: str, numbers: tuple[float, ...] = ()) -> ParameterPrior:
    parameter = Parameter("k", scale, LOW, HIGH, prior=kind, prior_parameters=numbers)
    return ParameterPrior([parameter], torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("scale", ["lin", "log", "log10"])
@pytest.mark.parametrize("kind", list(ON_LINE))
def test_density_is_that_of_scipy_cut_at_the_bounds(kind, scale):
    prior, line = made(kind, scale, NUMBERS[kind]), ON_LINE[kind]
    low, high = float(prior.low), float(prior.high)
    s = np.linspace(low, high, 101)[1:-1]
    x = TO_VALUE[scale](s)
    inside = line.pdf(x) > 0
    truth = (
        line.logpdf(x[inside]) - math.log(line.cdf(HIGH) - line.cdf(LOW)) + np.log(SLOPE[scale](s[inside]))
    )
    found = prior.log_prob(torch.tensor(s[inside])[:, None]).numpy()
    np.testing.assert_allclose(found, truth, rtol=1e-9)


@pytest.mark.parametrize("scale", ["lin", "log", "log10"])
@pytest.mark.parametrize(
    "kind", ["", "parameterScaleUniform", "parameterScaleNormal", "parameterScaleLaplace"]
)
def test_a_prior_on_its_own_scale_has_a_total_of_one_and_draws_that_follow(kind, scale):
    """The p-value of 2000 draws; by chance one such test in a thousand would fail, and the seed is fixed."""
    prior = made(kind, scale, (0.2, 0.9) if kind else ())
    low, high = float(prior.low), float(prior.high)
    if kind == "parameterScaleUniform":
        low, high = 0.2, 0.9

    def density(s: float) -> float:
        return float(prior.log_prob(torch.tensor([s], dtype=torch.float64)).exp())

    total, _ = integrate.quad(density, low, high, limit=200, points=[0.2])
    assert total == pytest.approx(1.0, abs=1e-7)
    torch.manual_seed(0)
    draws = prior.expand(torch.Size([2000])).sample()[:, 0].numpy()
    grid = np.linspace(low, high, 4001)
    heights = np.exp(prior.log_prob(torch.tensor(grid)[:, None]).numpy())
    cdf = np.concatenate([[0.0], np.cumsum((heights[1:] + heights[:-1]) / 2 * np.diff(grid))])
    assert stats.kstest(draws, lambda s: np.interp(s, grid, cdf / cdf[-1])).pvalue > 1e-3


def test_several_parameters_and_their_support():
    parameters = [Parameter("a", "log10", 1e-5, 1e5), Parameter("b", "lin", -1.0, 3.0)]
    prior = ParameterPrior(parameters, torch.zeros(()))
    assert prior.support.base_constraint.lower_bound.tolist() == [-5.0, -1.0]
    assert prior.support.base_constraint.upper_bound.tolist() == [5.0, 3.0]
    np.testing.assert_allclose(float(prior.log_prob(torch.zeros(2))), -math.log(40.0), rtol=1e-6)
    inside = biject_to(prior.support)(torch.randn(7, 2))
    assert bool(prior.support.check(inside).all())
    assert prior.log_prob(inside).shape == (7,)
