"""Refined rows: linear normal models, whose posterior is known, and the best normal for a skewed one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor, nn

from scivi.analysis.pareto import smooth
from scivi.inference import refine
from scivi.inference.refine import Refined, refine_rows
from scivi.inputs.batches import Batch
from scivi.inputs.fields import Field
from scivi.models.binding import Bound, seeded
from scivi.models.template import Template
from tests.inference.conjugate import bound_to, whole

DRAWS, ROWS = 4000, 6
OBSERVED = Field(("row", "entry"), "observed")


class Guide(nn.Module):
    """One normal for all rows, with independent coordinates."""

    def __init__(self, loc: Tensor, sd: Tensor) -> None:
        super().__init__()
        self.loc, self.log_sd = nn.Parameter(loc), nn.Parameter(sd.log())


def guide(batch, prior, nets):
    with batch.plate("row"):
        pyro.sample("z", dist.Normal(nets.loc, nets.log_sd.exp()).to_event(1))


def bound(likelihood, y: Tensor, loc: Tensor, sd: Tensor) -> tuple[Bound, Batch]:
    """A pair with z ~ Normal(0, 1) and y ~ likelihood(z), and its rows."""

    def model(batch, prior, nets):
        with batch.plate("row"):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0).to_event(1))
            batch.observe("y", likelihood(z).to_event(1))

    template = Template(
        name="rows", fields={"y": OBSERVED}, rows="row", model=model, guide=guide,
        nets=lambda sizes, prior: Guide(loc, sd), dims={"z": ("row", "latent")}, sizes={"latent": len(loc)},
    )  # fmt: skip
    batch = whole(template, {"y": y.numpy()})
    return bound_to(template, batch), batch


def refined(pair: Bound, batch: Batch, draws: int = DRAWS) -> Refined:
    with torch.no_grad(), seeded(3):
        found = refine_rows(pair, batch, {}, torch.arange(batch.n_rows()), draws)
    assert found is not None
    return found


class Linear:
    """y ~ Normal(load z, NOISE), whose posterior is Normal(mean_i, covariance)."""

    NOISE = 0.4

    def __init__(self, d: int) -> None:
        rng = torch.Generator().manual_seed(d)
        self.load = torch.randn(d + 1, d, generator=rng, dtype=torch.float64) + 2.0  # correlates the latents
        self.y = 2 * torch.randn(ROWS, d + 1, generator=rng, dtype=torch.float64)
        precision = torch.eye(d, dtype=torch.float64) + self.load.mT @ self.load / self.NOISE**2
        self.covariance = torch.linalg.inv(precision)
        self.mean = self.y @ self.load @ self.covariance / self.NOISE**2

    def likelihood(self, z: Tensor) -> dist.Normal:
        return dist.Normal(z @ self.load.mT, self.NOISE)

    def divergence(self, loc: Tensor, sd: Tensor) -> Tensor:
        """KL of Normal(loc, sd**2) to the posterior, (rows,)."""
        away, precision = loc - self.mean, torch.linalg.inv(self.covariance)
        square = torch.einsum("ri,ij,rj->r", away, precision, away)
        trace, d = (precision.diagonal() * sd.square()).sum(), len(sd)
        return 0.5 * (trace + square - d - torch.logdet(precision)) - sd.log().sum()


def k_hat(log_weight: Tensor) -> np.ndarray:
    return smooth(log_weight.mT.numpy())[1]


@pytest.mark.parametrize(
    ("d", "away", "width"),
    [(1, 0.5, 1.0), (2, 1.0, 1.0), (5, 0.0, 0.1), (12, 0.3, 1.0), (2, 24.0, 1.0), (5, -2.4, 0.1)],
)
def test_a_correlated_normal_posterior_is_found_exactly(d, away, width):
    truth = Linear(d)
    loc, sd = torch.full((d,), away).double(), torch.full((d,), width).double()
    pair, batch = bound(truth.likelihood, truth.y, loc, sd)
    found = refined(pair, batch)
    if d > 1:  # the best independent normal has the precision's diagonal, and is nats away
        independent = torch.linalg.inv(truth.covariance).diagonal().rsqrt()
        assert truth.divergence(truth.mean, independent).min() > 0.5
    # points of mean square 1 are exact for a quadratic: rounding of steps from up to 200 posterior sd away
    np.testing.assert_allclose(found.gap, truth.divergence(loc, sd), rtol=1e-6)
    # what was drawn from: the posterior, widened, at every draw
    wider = refine.wider(d)
    z = found.values["z"]
    posterior = stats.multivariate_normal(np.zeros(d), wider**2 * truth.covariance.numpy())
    prior = stats.norm.logpdf(z).sum(-1)
    evidence = prior + truth.likelihood(z).log_prob(truth.y).sum(-1).numpy() - found.log_weight.numpy()
    np.testing.assert_allclose(
        evidence, posterior.logpdf(z - truth.mean).reshape(DRAWS, ROWS), atol=1e-5
    )  # the same rounding
    # 5 standard errors of 4000 draws: of a mean, and of a covariance of whitened draws
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(truth.covariance), (z - truth.mean).mT / wider, upper=False
    ).mT
    assert white.mean(0).abs().max() < 5 / DRAWS**0.5
    square = torch.einsum("sri,srj->rij", white, white) / DRAWS - torch.eye(d)
    assert square.abs().max() < 5 * (2 / DRAWS) ** 0.5
    assert k_hat(found.log_weight).max() < 0.1  # bounded weights; its own error is .1


COUNTS = torch.tensor([[0.0], [3.0], [40.0], [1e5]]).double()


def elbo(of: np.ndarray, y: float) -> float:
    """ELBO, up to a constant, of z ~ Normal(of[0], exp(of[1])**2): y ~ Poisson(exp(z)), z ~ Normal(0, 1)."""
    mean, variance = of[0], np.exp(2 * of[1])
    return y * mean - np.exp(mean + variance / 2) - (mean**2 + variance) / 2 + of[1]


@pytest.mark.parametrize("away", [0.0, -24.0, 24.0])
def test_the_best_normal_is_found_for_a_skewed_posterior(away):
    start = torch.full((1,), away).double()
    found = refined(*bound(lambda z: dist.Poisson(z.exp()), COUNTS, start, torch.ones(1).double()))
    assert (found.gap > 0).all()
    for z, y in zip(found.values["z"][..., 0].mT.numpy(), COUNTS[:, 0].numpy(), strict=True):
        mode = [np.log(y + 0.5), -0.5 * np.log(y + 1)]
        best = -optimize.minimize(lambda of, y=y: -elbo(of, y), mode, method="Nelder-Mead").fun
        own = elbo(np.array([z.mean(), np.log(z.std() / refine.wider(1))]), y)
        # nats: two numbers from 4000 draws cost 2 / 8000 on average, the 64 points and the stop about .001
        assert -1e-6 < best - own < 5e-3


def test_rows_do_not_depend_on_the_block_they_are_in(monkeypatch):
    truth = Linear(3)
    pair, batch = bound(truth.likelihood, truth.y, torch.ones(3).double(), torch.ones(3).double())
    at_once = refined(pair, batch)
    monkeypatch.setattr(refine, "AT_ONCE", 4 * 64 * 2)  # entries x points x rows
    in_blocks = refined(pair, batch)
    np.testing.assert_allclose(in_blocks.gap, at_once.gap, rtol=1e-10)  # rounding
    assert in_blocks.values["z"].shape == at_once.values["z"].shape == (DRAWS, ROWS, 3)


def test_latents_along_another_row_dim_change_nothing():
    truth = Linear(2)
    start = torch.ones(2).double()
    pair, batch = bound(truth.likelihood, truth.y, start, start)

    def also(run):
        def both(batch, prior, nets):
            with batch.plate("other"):
                pyro.sample("a", dist.Normal(batch.x, 1.0))
            run(batch, prior, nets)

        return both

    fields = {"y": OBSERVED, "x": Field(("other",))}
    template = replace(
        pair.template, fields=fields, rows=("row", "other"),
        model=also(pair.template.model), guide=also(guide),
    )  # fmt: skip
    wider = whole(template, {"y": truth.y.numpy(), "x": np.arange(3.0)})
    found = refined(bound_to(template, wider), wider)
    assert list(found.values) == ["z"]
    np.testing.assert_allclose(found.gap, refined(pair, batch).gap, rtol=1e-10)  # rounding


def test_a_single_draw_and_rows_already_right():
    truth = Linear(1)
    pair, batch = bound(truth.likelihood, truth.y[:1], truth.mean[0], truth.covariance[0].sqrt())
    found = refined(pair, batch, draws=1)
    assert found.log_weight.shape == (1, 1)
    assert float(found.gap) == 0
