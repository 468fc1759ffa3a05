from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from scivi.errors import Unsupported
from scivi.inference import marginal
from scivi.inference.capture import captured, compiled
from scivi.inference.marginal import Noise, layout, log_marginal, log_prior, nodes
from scivi.inference.newton import Rows, newton_finish
from scivi.inference.polish import polish
from scivi.inputs.batches import Batch
from scivi.inputs.fields import Field
from scivi.models.binding import bind, seeded
from scivi.models.guides import global_normal
from scivi.models.template import Template
from tests.inference import conjugate
from tests.inference.conjugate import EXACT, OFF, bound_to, hierarchy, rows, shared, some_rows, whole

DOUBLE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("per_dim", [1, 2, 5, 7, 15])
def test_nodes_integrate_polynomials_exactly(per_dim):
    points, log_w = nodes(1, per_dim, DOUBLE)
    for degree in range(2 * per_dim):  # Gauss: exact up to 2 n - 1; E x**d = (d - 1)!! for even d
        moment = math.prod(range(1, degree, 2)) if degree % 2 == 0 else 0.0
        size = float((log_w.exp() * points[:, 0].abs() ** degree).sum())
        found = float((log_w.exp() * points[:, 0] ** degree).sum())
        assert found == pytest.approx(moment, abs=1e-13 * size)  # rounding of terms of this size


def test_nodes_of_more_dimensions_are_a_grid_and_then_a_net():
    points, log_w = nodes(3, 4, DOUBLE)
    assert points.shape == (64, 3)
    product = (log_w.exp() * (points[:, 0] ** 2 * points[:, 1] ** 4 * points[:, 2] ** 6)).sum()
    assert float(product) == pytest.approx(
        1 * 3 * 15, rel=1e-12
    )  # float64; degree at most 7 in each is exact
    points, log_w = nodes(5, 4, DOUBLE, n_random=4096)
    assert points.shape == (4096, 5)
    assert float(log_w.exp().sum()) == pytest.approx(1.0)
    np.testing.assert_allclose(
        points.mean(0), 0, atol=4 / 64
    )  # 4 sd of plain Monte Carlo; the net does better
    np.testing.assert_allclose(points.T.cov(), np.eye(5), atol=4 * 2**0.5 / 64)  # the same


def guide_with(*sites):
    def guide(batch, prior, nets):
        nets.globals(batch)
        with batch.plate("row"):
            for name, make in sites:
                pyro.sample(name, make(batch.y))

    return guide


def model_with(*names):
    def model(batch, prior, nets):
        pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), 1.0))
        with batch.plate("row"):
            for name in names:
                pyro.sample(name, dist.Normal(torch.zeros_like(batch.y), 1.0))
            batch.observe("y", dist.Normal(0.0, 1.0))

    return model


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (replace(hierarchy(), guide=None, nets=None), "the guide is not amortised"),
        (shared, "there is no latent per row, nor a joint normal of all globals"),
        (
            replace(hierarchy(), guide=guide_with(("z", lambda y: dist.StudentT(3.0, y, 1.0)))),
            'the guide\'s site "z" is no smooth map of normal noise',
        ),
        (
            replace(
                hierarchy(),
                model=model_with(*(f"z{k}" for k in range(17))),
                guide=guide_with(*((f"z{k}", lambda y: dist.Normal(y, 1.0)) for k in range(17))),
                dims={"mu": ()},
            ),
            "17 latents per row are too many to integrate (at most 16)",
        ),
    ],
)
def test_what_cannot_be_laid_out_says_why(template, words):
    batch = whole(template, rows(4))
    bound = bound_to(template, batch)
    assert layout(bound, batch).refusal == words
    with pytest.raises(Unsupported, match="the Newton finish cannot be had"):
        newton_finish(bound, over(batch), 7)


def over(batch) -> Rows:
    return Rows(lambda n: [batch], lambda n: [batch], 1.0)


def test_noise_of_several_sites_is_cut_in_order_and_put_on_its_rows():
    site = Noise("z", (2, 1, 3), start=1, row_dim="row", row_axis=-1, n_plates=2)  # plates (2, row), event 3
    points = torch.arange(4 * 8.0).reshape(4, 8)
    assert site.size == 6
    assert site.cut(points).shape == (4, 2, 1, 3)
    torch.testing.assert_close(site.cut(points).reshape(4, 6), points[:, 1:7])
    of_rows = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))  # points, rows, dims
    found = site.cut(of_rows)
    assert found.shape == (4, 2, 5, 3)
    torch.testing.assert_close(found[:, 1, 3], of_rows[:, 3, 4:7])


def test_log_marginal_of_rows_is_the_closed_form_even_with_nodes_put_badly():
    batch = whole(hierarchy(), rows(5))
    y, variance = batch.y, conjugate.SPREAD**2 + conjugate.NOISE**2
    for coefficients, n, error in (
        (EXACT, 1, 1e-6),
        (OFF, 30, 1e-5),
    ):  # exact: any node will do, to float32 of EXACT
        bound = bound_to(hierarchy(coefficients), batch)
        module, found = bound.nets.own.globals, layout(bound, batch)
        theta = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
        truth = dist.Normal(theta, variance**0.5).log_prob(y).sum()
        value = log_marginal(bound, module, theta, batch, found, n)
        assert float((value - truth).detach()) == pytest.approx(0.0, abs=error)
        (slope,) = torch.autograd.grad(value, theta)
        assert float(slope) == pytest.approx(float(((y - 0.4) / variance).sum()), abs=10 * error)
        prior = log_prior(bound, module, theta.detach(), batch)
        assert float(prior) == pytest.approx(
            float(dist.Normal(0.0 * DOUBLE, conjugate.PRIOR).log_prob(0.4 * (DOUBLE + 1)))
        )


def test_node_error_falls_geometrically_with_their_number():
    batch = whole(hierarchy(), rows(5))
    bound = bound_to(hierarchy(OFF), batch)
    theta = torch.tensor([0.4], dtype=torch.float64)
    truth = dist.Normal(theta, (conjugate.SPREAD**2 + conjugate.NOISE**2) ** 0.5).log_prob(batch.y).sum()
    module, found = bound.nets.own.globals, layout(bound, batch)
    with torch.no_grad():
        errors = [
            abs(float(log_marginal(bound, module, theta, batch, found, n) - truth)) for n in (5, 10, 20, 40)
        ]
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 20
    assert errors[3] < errors[2] / 100 or errors[3] < 1e-10


# Two measurements a row and two coefficients: y_ij ~ N(z_i + slope x_ij, NOISE), z_i ~ N(mu, SPREAD)
LINEAR = {"y": Field(("row", "visit"), "observed"), "x": Field(("row", "visit"))}


class LinearNets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        supports = {"mu": constraints.real, "slope": constraints.real}
        self.globals = global_normal(supports, dict.fromkeys(supports, torch.tensor(0.0)), scale=0.5)
        self.off = nn.Parameter(torch.tensor(0.0))


def linear_model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), conjugate.PRIOR))
    slope = pyro.sample("slope", dist.Normal(batch.y.new_tensor(0.0), conjugate.PRIOR))
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(mu, conjugate.SPREAD))
        mean = z.unsqueeze(-1) + slope.unsqueeze(-1) * batch.x
        batch.observe("y", dist.Normal(mean, conjugate.NOISE).to_event(1))


def linear_guide(batch, prior, nets):
    values = nets.globals(batch)
    residual = (batch.y - values["slope"].unsqueeze(-1) * batch.x).mean(-1)
    with batch.plate("row"):  # half way between data and population, and too wide: wrong in place and width
        pyro.sample("z", dist.Normal(0.5 * (residual + values["mu"]) + 0.2 + nets.off, 0.7))


linear = Template(
    name="linear", fields=LINEAR, rows="row", model=linear_model, guide=linear_guide,
    nets=lambda sizes, prior: LinearNets(), dims={"mu": (), "slope": (), "z": ("row",)},
)  # fmt: skip


def linear_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 2))
    z = 0.7 + conjugate.SPREAD * rng.normal(size=(80, 1))
    return {"x": x, "y": z + 1.5 * x + conjugate.NOISE * rng.normal(size=(80, 2))}


ROW_PRECISION = np.linalg.inv(conjugate.SPREAD**2 * np.ones((2, 2)) + conjugate.NOISE**2 * np.eye(2))


def linear_posterior(data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and covariance of mu and slope, with the design (row, visit, coefficient)."""
    design = np.stack([np.ones_like(data["x"]), data["x"]], -1)
    precision = np.eye(2) / conjugate.PRIOR**2 + np.einsum("rva,vw,rwb->ab", design, ROW_PRECISION, design)
    covariance = np.linalg.inv(precision)
    return covariance @ np.einsum("rva,vw,rw->a", design, ROW_PRECISION, data["y"]), covariance, design


def test_newton_lands_on_the_exact_posterior_of_a_linear_gaussian_model_from_a_poor_guide():
    data = linear_data()
    batch = whole(linear, data)
    found = newton_finish(bound_to(linear, batch), over(batch), 12)
    mode, covariance, design = linear_posterior(data)
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(
        (found.loc.numpy() - mode) / sd, 0, atol=0.02
    )  # sd: 25 nodes, curvature from 12
    scale = np.outer(sd, sd)
    np.testing.assert_allclose(found.covariance.numpy() / scale, covariance / scale, atol=0.02)
    flat, within = design.reshape(160, 2), np.kron(np.eye(80), np.linalg.inv(ROW_PRECISION))
    whole_of = torch.as_tensor(conjugate.PRIOR**2 * flat @ flat.T + within)
    evidence = dist.MultivariateNormal(whole_of.new_zeros(160), whole_of).log_prob(batch.y.reshape(-1))
    assert found.log_evidence == pytest.approx(
        float(evidence), abs=0.1
    )  # nats: 80 rows of node error 1e-3 at most
    assert found.nodes == 25


@pytest.mark.slow
def test_few_rows_are_polished_until_their_weights_are_good_however_far_training_has_ended():
    data = linear_data()
    batch = whole(linear, data)
    bound = bound_to(linear, batch)
    module = marginal.global_module(bound)
    assert module is not None
    mode, covariance, _ = linear_posterior(data)
    sd = np.sqrt(np.diag(covariance))
    module.set(torch.as_tensor(mode + 12 * sd).float(), torch.as_tensor(np.diag(sd**2)).float())
    with seeded(4):
        found = polish(bound, over(batch), 12)
    assert len(found.points) > 4 * 160  # four rounds are too few from there
    assert found.ess > 200
    # Four standard errors of 200 effective draws: of a mean .28 sd, of an sd 20 %.
    np.testing.assert_allclose((found.loc.numpy() - mode) / sd, 0, atol=4 / 200**0.5)
    np.testing.assert_allclose(found.covariance.diagonal().sqrt().numpy() / sd, 1, atol=4 / 400**0.5)


def test_newton_over_chunks_and_from_some_rows():
    batch = whole(hierarchy(), rows(400))
    bound = bound_to(hierarchy(EXACT), batch)
    parts = [some_rows(batch, list(range(k, k + 100))) for k in range(0, 400, 100)]
    every_fourth = some_rows(batch, list(range(0, 400, 4)))
    chunked = newton_finish(bound, Rows(lambda n: parts, lambda n: [every_fourth], 4.0), 7)
    mean, variance = conjugate.posterior_of_mu(batch.y, conjugate.SPREAD)
    torch.testing.assert_close(
        chunked.loc, mean.reshape(1), rtol=0, atol=1e-5
    )  # exact nodes; EXACT is in float32
    torch.testing.assert_close(
        chunked.covariance, variance.reshape(1, 1), rtol=1e-4, atol=0
    )  # the curvature is constant
    assert chunked.log_evidence == pytest.approx(
        float(conjugate.log_evidence(batch.y, conjugate.SPREAD)), abs=1e-3
    )


def with_another_latent(off: float) -> Template:
    """The linear model with a latent that says nothing; the guide is off by so many sd in half the rows."""

    def model(batch, prior, nets):
        linear_model(batch, prior, nets)
        with batch.plate("row"):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide(batch, prior, nets):
        values = nets.globals(batch)
        residual = (batch.y - values["slope"].unsqueeze(-1) * batch.x).sum(-1) / conjugate.NOISE**2
        precision = 1 / conjugate.SPREAD**2 + 2 / conjugate.NOISE**2
        with batch.plate("row"):
            loc = (residual + values["mu"] / conjugate.SPREAD**2) / precision
            wrong = off * precision**-0.5 * (batch.y[..., 0] > batch.y[..., 1])
            pyro.sample("z", dist.Normal(loc + wrong, precision**-0.5))
            pyro.sample("w", dist.Normal(0.0 * nets.off, 1.0))

    dims = {"mu": (), "slope": (), "z": ("row",), "w": ("row",)}
    return replace(linear, model=model, guide=guide, dims=dims)


@pytest.mark.parametrize(("off", "chunks", "asked"), [(0.0, 4, {4}), (3.0, 4, {4, 7}), (0.0, 1, {4, 7})])
def test_all_rows_get_more_nodes_where_some_do_not_tell_what_fine_ones_add(off, chunks, asked):
    """Chunks alike tell that it is little; chunks that differ, or one alone, do not."""
    data, seen = linear_data(), set()
    template = with_another_latent(off)
    batch = whole(template, data)
    some = [some_rows(batch, [*range(k, 80, 4 * chunks)]) for k in range(0, 4 * chunks, 4)]

    def all_rows(per_dim: int) -> list[Batch]:
        seen.add(per_dim)
        return [batch]

    found = newton_finish(bound_to(template, batch), Rows(all_rows, lambda n: some, 4.0), 7)
    mode, covariance, _ = linear_posterior(data)
    sd = np.sqrt(np.diag(covariance))
    assert seen == asked
    np.testing.assert_allclose((found.loc.numpy() - mode) / sd, 0, atol=0.1)  # sd: the error allowed to some


def test_only_a_full_rank_normal_of_all_globals_can_be_finished():
    batch = whole(hierarchy(), rows(5))
    assert marginal.global_module(bound_to(hierarchy(), batch)) is not None

    class LowRank(conjugate.Amortised):
        def __init__(self) -> None:
            super().__init__(*EXACT)
            self.globals = global_normal({"mu": constraints.real}, {"mu": torch.tensor(0.0)}, rank=1)

    low = replace(hierarchy(), nets=lambda sizes, prior: LowRank())
    assert marginal.global_module(bind(low, batch, 0)) is None
    with pytest.raises(Unsupported, match="no full-rank joint normal holds all globals"):
        newton_finish(bind(low, batch, 0), over(batch), 5)


@pytest.mark.slow
def test_random_nodes_compile():
    def function(like, shift):
        points, log_weight = nodes(4, 7, like, n_random=64, shift=shift)
        return points, log_weight

    arguments = [torch.randn(3), torch.rand(4, dtype=torch.float64)]
    run, _ = compiled(captured(function, arguments), arguments)
    other = [arguments[0], torch.rand(4, dtype=torch.float64)]
    for ours, eager in zip(run(*other), function(*other), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)  # float32; normal quantiles to 4.8
