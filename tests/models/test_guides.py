from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch.distributions import constraints, transforms

from scivi.errors import TemplateError, Unsupported
from scivi.inputs.batches import Batch
from scivi.inputs.fields import Field
from scivi.models.binding import bind, seeded
from scivi.models.flows import FlowSpec, conditional_flow, flow_distribution
from scivi.models.guides import JointNormal, MeanField, global_normal
from scivi.models.noise import noise_shape, push
from scivi.models.normals import SinhArcsinh, TrilAffine, inverse_tril, laplace, skew_normal, solve_spd
from scivi.models.template import Template

EPS = 1e-10  # float64: rounding times condition numbers below 1e4
FIELDS = {"y": Field(("row",), "observed")}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(*batch: int, d: int, seed: int = 0) -> torch.Tensor:
    root = random(*batch, d, d, seed=seed)
    return root @ root.mT + 0.5 * torch.eye(d, dtype=torch.float64)


def tril(*batch: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.cholesky(spd(*batch, d=d, seed=seed))


def batch_of(n: int, index: list[int] | None = None) -> Batch:
    y = random(n) if index is None else random(n)[index]
    return Batch(
        {"y": y}, {}, {"row": n, "band": 2}, ("row",), {} if index is None else {"row": torch.tensor(index)}
    )


def wide_model(batch, prior, nets):
    """A site of every kind of support; globals, rows, and rows beside another plate."""
    like = batch.y
    pyro.sample("real", dist.Normal(like.new_zeros(3), 1.0).to_event(1))
    pyro.sample("positive", dist.LogNormal(like.new_tensor(0.0), 0.3))
    pyro.sample("share", dist.Dirichlet(like.new_ones(3)))
    pyro.sample("corr", dist.LKJCholesky(3, like.new_tensor(2.0)))
    pyro.sample("unit", dist.Beta(like.new_tensor(2.0), 3.0))
    with batch.plate("row", dim=-1):
        pyro.sample("local", dist.LogNormal(torch.zeros_like(like), 0.5))
        pyro.sample("mix", dist.Dirichlet(like.new_ones(len(like), 3)))
        with batch.plate("band", dim=-2):
            pyro.sample("grid", dist.Normal(like.new_zeros(2, len(like)), 1.0))
        batch.observe("y", dist.Normal(0.0, 1.0))


SITES = ("real", "positive", "share", "corr", "unit", "local", "mix", "grid")


def wide(guide=None, model=wide_model) -> Template:
    return Template(name="wide", fields=FIELDS, rows="row", model=model, dims={}, guide=guide)


def trace_of(bound, batch, seed: int = 1) -> poutine.Trace:
    with seeded(seed), torch.no_grad():
        return poutine.trace(bound.guide).get_trace(batch)


@pytest.mark.parametrize("family", [MeanField(), JointNormal(), JointNormal(rank=2)])
def test_every_site_is_drawn_inside_its_support_and_shaped_as_in_the_model(family):
    batch = batch_of(4)
    bound = bind(wide(family), batch, seed=0)
    model = poutine.trace(bound.model).get_trace(batch)
    guide = trace_of(bound, batch)
    for name in SITES:
        value = guide.nodes[name]["value"]
        assert value.shape == model.nodes[name]["value"].shape
        assert bool(model.nodes[name]["fn"].support.check(value).all()), name
    guide.compute_log_prob()
    assert bool(torch.isfinite(guide.log_prob_sum()))


def test_density_of_the_mean_field_is_that_of_scipy():
    batch = batch_of(4)
    bound = bind(wide(MeanField(scale=0.4)), batch, seed=0)
    module = bound.nets.guide
    guide = trace_of(bound, batch)
    guide.compute_log_prob()
    positive = guide.nodes["positive"]
    loc, scale = module.loc["positive"].item(), module.log_scale["positive"].exp().item()
    assert scale == pytest.approx(0.4)
    truth = stats.lognorm(scale, scale=np.exp(loc)).logpdf(float(positive["value"]))
    assert positive["log_prob_sum"].item() == pytest.approx(truth, rel=1e-10)  # float64
    unit = guide.nodes["unit"]
    logit = np.log(float(unit["value"]) / (1 - float(unit["value"])))
    loc, slope = module.loc["unit"].item(), float(unit["value"] * (1 - unit["value"]))
    truth = stats.norm(loc, 0.4).logpdf(logit) - np.log(slope)
    assert unit["log_prob_sum"].item() == pytest.approx(truth, rel=1e-10)  # float64


@pytest.mark.parametrize("family", [MeanField(scale=0.3), JointNormal(scale=0.3)])
@pytest.mark.parametrize("name", ["share", "corr"])
def test_densities_on_curved_supports_integrate_to_one(family, name):
    """E_q of p / q is one, p the model's prior of that site: a wrong slope would show."""
    batch = batch_of(2)

    def model(batch, prior, nets):
        if name == "share":
            pyro.sample(name, dist.Dirichlet(batch.y.new_tensor([30.0, 40.0, 35.0])))
        else:
            pyro.sample(name, dist.LKJCholesky(3, batch.y.new_tensor(8.0)))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(0.0, 1.0))

    bound = bind(wide(family, model), batch, seed=0)
    prior = poutine.trace(bound.model).get_trace(batch).nodes[name]["fn"]
    with seeded(2), torch.no_grad(), pyro.plate("_particle", 40_000, dim=-2):
        guide = poutine.trace(bound.guide).get_trace(batch)
    log_q = sum(
        s["fn"].log_prob(s["value"]).reshape(-1) for s in guide.nodes.values() if s["type"] == "sample"
    )
    ratio = (prior.log_prob(guide.nodes[name]["value"]).reshape(-1) - log_q).exp().detach()
    assert float(ratio.mean()) == pytest.approx(
        1.0, abs=4 * float(ratio.std()) / 200
    )  # 4 standard errors of 40 000


def test_a_minibatch_takes_its_rows_from_the_table():
    bound = bind(wide(MeanField()), batch_of(6), seed=0)
    module, rows = bound.nets.guide, [4, 1, 5]
    with torch.no_grad():
        for table in module.loc.values():
            table.copy_(random(*table.shape, seed=3))
    guide = trace_of(bound, batch_of(6, rows))
    local = guide.nodes["local"]["fn"].base_dist
    torch.testing.assert_close(local.loc, module.loc["local"][rows])
    assert guide.nodes["grid"]["value"].shape == (2, 3)
    torch.testing.assert_close(guide.nodes["grid"]["fn"].base_dist.loc, module.loc["grid"][:, rows])
    torch.testing.assert_close(guide.nodes["mix"]["fn"].base_dist.base_dist.loc, module.loc["mix"][rows])
    assert guide.nodes["local"]["scale"] == 2.0


def test_a_guide_bound_to_a_few_rows_has_a_factor_for_all():
    few = batch_of(50, [7, 8, 9])
    bound = bind(wide(MeanField()), few, seed=0)
    assert bound.nets.guide.loc["local"].shape == (50,)
    assert not bound.amortised
    assert not bound.nets.guide.amortised


def test_a_joint_normal_over_rows_needs_them_all():
    bound = bind(wide(JointNormal()), batch_of(6), seed=0)
    with pytest.raises(
        Unsupported, match=r"every row of \['row'\] in one vector .* Plan\(rows_per_batch=None\)"
    ):
        bound.guide(batch_of(6, [1, 2]))


def globals_of(rank: int | None = None):
    supports = {"a": constraints.real, "s": constraints.positive}
    start = {"a": torch.tensor([0.5, -1.0]), "s": torch.tensor(2.0)}
    return global_normal(supports, start, rank=rank).double()


def test_a_joint_normal_holds_the_mean_and_covariance_it_is_given():
    module, covariance, loc = globals_of(), spd(d=3), random(3)
    module.set(loc, covariance)
    torch.testing.assert_close(module.scale_tril, torch.linalg.cholesky(covariance), rtol=EPS, atol=EPS)
    with seeded(4), torch.no_grad(), pyro.plate("_particle", 50_000, dim=-2):
        values = module(batch_of(2))
    joint = torch.cat([values["a"], values["s"].log().unsqueeze(-1)], -1).reshape(-1, 3)
    error = (covariance.diagonal() / 50_000) ** 0.5
    assert bool(((joint.mean(0) - loc).abs() < 4 * error).all())  # 4 standard errors
    sd = covariance.diagonal().sqrt()
    torch.testing.assert_close(
        joint.T.cov() / sd / sd[:, None], covariance / sd / sd[:, None], rtol=0, atol=0.026
    )  # the same


def test_a_joint_normal_of_one_number_learns_no_correlation():
    one = global_normal({"s": constraints.positive}, {"s": torch.tensor(2.0)}).double()
    assert {n: tuple(p.shape) for n, p in one.named_parameters()} == {"loc": (1,), "log_diag": (1,)}
    assert set(one.state_dict()) == {"loc", "log_diag"}
    assert one.factor.dtype == torch.float64  # it moves with the module
    covariance, loc = torch.tensor([[0.04]]).double(), random(1)
    one.set(loc, covariance)
    torch.testing.assert_close(one.distribution().covariance_matrix, covariance, rtol=EPS, atol=EPS)
    one.distribution().log_prob(loc + 0.1).backward()
    assert all(p.grad is not None for p in one.parameters())
    low = global_normal({"s": constraints.positive}, {"s": torch.tensor(2.0)}, rank=1)
    assert "factor" in dict(low.named_parameters())
    assert "factor" in dict(globals_of().named_parameters())


def test_a_low_rank_covariance_is_factor_plus_diagonal_and_cannot_be_set():
    module = globals_of(rank=1)
    with torch.no_grad():
        module.factor.copy_(random(3, 1))
    truth = module.factor @ module.factor.T + torch.diag((2 * module.log_diag).exp())
    torch.testing.assert_close(module.distribution().covariance_matrix, truth)
    with pytest.raises(Unsupported, match="low-rank normal cannot hold a given covariance; use rank=None"):
        module.set(random(3), spd(d=3))


def test_sites_of_a_joint_normal_carry_its_density_to_their_supports():
    module = globals_of()
    module.set(random(3), spd(d=3))
    guide = poutine.trace(module).get_trace(batch_of(2))
    total = sum(s["fn"].log_prob(s["value"]).sum() for s in guide.nodes.values() if s["type"] == "sample")
    s, joint = guide.nodes["s"]["value"], guide.nodes["_joint"]["value"]
    lower = module.scale_tril.detach().numpy()
    truth = stats.multivariate_normal(module.loc.detach().numpy(), lower @ lower.T)
    assert float(total.detach()) == pytest.approx(
        truth.logpdf(joint.detach().numpy()) - float(s.detach().log()), abs=1e-9
    )
    assert float(s.detach()) == pytest.approx(float(joint.detach()[2].exp()))


@pytest.mark.parametrize("family", [MeanField(), JointNormal()])
def test_discrete_latents_are_refused_with_what_to_do(family):
    def model(batch, prior, nets):
        with batch.plate("row"):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            batch.observe("y", dist.Normal(z, 1.0))

    with pytest.raises(TemplateError, match=r"no factor for the discrete latents \['z'\].*enumerate"):
        bind(wide(family, model), batch_of(3), seed=0)


@pytest.mark.parametrize("skew", [-1.5, 0.0, 0.7])
@pytest.mark.parametrize("tail", [0.5, 1.0, 1.8])
def test_sinh_arcsinh_is_inverted_and_has_the_slope_that_autograd_finds(skew, tail):
    bend = SinhArcsinh(torch.tensor(skew).double(), torch.tensor(tail).double(), cache_size=0)
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    y = bend(x)
    torch.testing.assert_close(bend.inv(y), x, rtol=1e-9, atol=1e-9)  # float64, sinh of 10 loses 4 digits
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(bend.log_abs_det_jacobian(x, y), slope.log(), rtol=EPS, atol=EPS)
    assert float(y.detach()[50]) == pytest.approx(0.0, abs=1e-12)  # the point 0 stays
    assert float(slope[50]) == pytest.approx(1.0)  # and the slope there


def test_sinh_arcsinh_of_no_skew_and_no_tail_is_the_identity():
    x = random(20)
    torch.testing.assert_close(SinhArcsinh(torch.zeros(()).double(), torch.ones(()).double())(x), x)


def test_tril_affine_is_inverted_and_has_the_determinant_of_its_matrix():
    loc, lower, x = random(4, 3), tril(4, d=3), random(7, 4, 3, seed=1)
    carry = TrilAffine(loc, lower, cache_size=0)
    y = carry(x)
    torch.testing.assert_close(
        carry.inv(y), x, rtol=1e-8, atol=1e-8
    )  # float64 times the condition of the matrices
    truth = torch.linalg.det(lower).log().expand(7, 4)
    torch.testing.assert_close(carry.log_abs_det_jacobian(x, y), truth, rtol=EPS, atol=EPS)


def cases():
    loc, scale = random(4), random(4, seed=1).exp()
    yield "normal", dist.Normal(loc, scale), ()
    yield "independent", dist.Normal(random(4, 3), random(4, 3, seed=1).exp()).to_event(1), (3,)
    yield "twice", dist.Normal(random(4, 2, 3), 1.0).to_event(2), (2, 3)
    yield "joint", dist.MultivariateNormal(random(4, 3), scale_tril=tril(4, d=3)), (3,)
    yield "positive", dist.LogNormal(loc, scale), ()
    yield "unit", dist.TransformedDistribution(dist.Normal(loc, scale), [transforms.SigmoidTransform()]), ()
    chain = [transforms.AffineTransform(1.0, 2.0), transforms.TanhTransform()]
    yield "chain", dist.TransformedDistribution(dist.Normal(loc, 0.3), chain).to_event(1), (4,)
    simplex = [transforms.StickBreakingTransform()]
    yield "simplex", dist.TransformedDistribution(dist.Normal(random(4, 2), 1.0).to_event(1), simplex), (2,)
    yield "masked", dist.Normal(loc, scale).mask(torch.tensor(True)), ()
    for d in (1, 2, 3):
        bend = skew_normal(
            random(4, d), tril(4, d=d), 0.3 * random(4, d, seed=2), random(4, d, seed=3).mul(0.2).exp()
        )
        yield f"skew {d}", bend, (d,)


CASES = {name: (fn, shape) for name, fn, shape in cases()}


@pytest.mark.parametrize("name", CASES)
def test_pushed_noise_is_the_draw_that_rsample_makes_with_its_density(name):
    fn, shape = CASES[name]
    assert noise_shape(fn) == shape
    torch.manual_seed(0)
    value = fn.rsample((6,))
    torch.manual_seed(0)
    noise = torch.randn(6, *fn.batch_shape, *shape, dtype=torch.float64)
    pushed, density = push(fn, noise)
    torch.testing.assert_close(pushed, value, rtol=EPS, atol=EPS)
    assert density.shape == (6, *fn.batch_shape)
    unmasked = fn.base_dist if name == "masked" else fn
    torch.testing.assert_close(
        density, unmasked.log_prob(value), rtol=1e-8, atol=1e-8
    )  # inverting loses digits


def test_what_is_no_map_of_normal_noise_is_told():
    for fn in (
        dist.Gamma(1.0, 1.0),
        dist.StudentT(3.0),
        dist.Bernoulli(0.5),
        dist.Gamma(torch.ones(2), 1.0).to_event(1),
    ):
        assert noise_shape(fn) is None


@pytest.mark.parametrize("d", [1, 2, 3])
def test_a_skew_normal_without_skew_is_normal(d):
    loc, lower = random(5, d), tril(5, d=d)
    plain = skew_normal(loc, lower, torch.zeros(5, d).double(), torch.ones(5, d).double())
    x = loc + random(5, d, seed=4)
    truth = dist.MultivariateNormal(loc, scale_tril=lower).log_prob(x)
    torch.testing.assert_close(plain.log_prob(x), truth, rtol=1e-9, atol=1e-9)


def test_a_skew_normal_integrates_to_one():
    one = torch.ones(1, 1, dtype=torch.float64)
    fn = skew_normal(0 * one, 0.7 * one.unsqueeze(-1), 0.6 * one, 1.3 * one)
    x = torch.linspace(-15, 40, 200_001, dtype=torch.float64)
    density = fn.log_prob(x.reshape(-1, 1, 1)).exp().reshape(-1)
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=1e-6)  # tails beyond the ends


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_solving_and_inverting_matrices_is_that_of_lapack(d):
    matrix, vector = spd(6, d=d), random(6, d, seed=1)
    truth = torch.linalg.solve(matrix, vector.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        solve_spd(matrix, vector), truth, rtol=1e-8, atol=1e-8
    )  # float64 times condition 1e2
    lower = inverse_tril(matrix)
    torch.testing.assert_close(lower @ lower.mT, torch.linalg.inv(matrix), rtol=1e-8, atol=1e-8)
    assert bool((lower.triu(1) == 0).all())
    assert bool((lower.diagonal(dim1=-2, dim2=-1) > 0).all())


@pytest.mark.parametrize("d", [1, 2, 3])
def test_laplace_of_a_quadratic_is_exact_after_one_step(d):
    precision, mode = spd(5, d=d), 0.3 * random(5, d)

    def derivatives(point):
        return ((mode - point).unsqueeze(-2) @ precision).squeeze(-2), precision

    found, lower = laplace(derivatives, torch.zeros(5, d).double(), steps=1, max_step=10.0)
    torch.testing.assert_close(found, mode, rtol=1e-8, atol=1e-8)  # float64 times condition 1e2
    torch.testing.assert_close(lower @ lower.mT, torch.linalg.inv(precision), rtol=1e-8, atol=1e-8)
    assert not found.requires_grad


def test_laplace_steps_are_bounded_and_converge_quadratically():
    """The mode of x log rate - rate, counts x, flat prior in log rate, is log x; the curvature there is x."""
    counts = torch.tensor([[1.0], [30.0], [1000.0]]).double()

    def derivatives(point):
        return counts - point.exp(), point.exp().unsqueeze(-1)

    near, _ = laplace(derivatives, counts.log() + 1.5, steps=2, max_step=0.25)
    torch.testing.assert_close(near, counts.log() + 1.0)  # two bounded steps
    found, lower = laplace(derivatives, counts.log() + 0.3, steps=5)
    torch.testing.assert_close(found, counts.log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lower.squeeze(-1), counts.rsqrt(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["spline", "affine"])
def test_density_and_draws_of_a_conditional_flow_agree(kind):
    with seeded(0):
        flow = conditional_flow(2, 3, FlowSpec(kind, transforms=1, hidden=(16,)))
        context = torch.randn(4, 3)
        fn = flow_distribution(flow, context)
        value = fn(torch.Size((500,)))
    assert value.shape == (500, 4, 2)
    assert value.requires_grad
    with torch.no_grad():
        log_prob = fn.log_prob(value)
        assert log_prob.shape == (500, 4)
        # E_q of p / q is one for any density p: here a narrower normal fitted to the draws
        centre, sd = value.mean(0), 0.6 * value.std(0)
        ratio = (dist.Normal(centre, sd).to_event(1).log_prob(value) - log_prob).exp()
    error = ratio.std(0) / 500**0.5
    assert bool(((ratio.mean(0) - 1).abs() < 4 * error).all())  # 4 standard errors of 500 draws
    gradients = torch.autograd.grad(
        fn.log_prob(value.detach()).sum(), list(flow.parameters()), allow_unused=True
    )
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


def test_a_flow_can_be_a_guides_factor_of_rows():
    with seeded(0):
        flow = conditional_flow(2, 1, FlowSpec("affine", 1, (8,)))

    def model(batch, prior, nets):
        with batch.plate("row"):
            z = pyro.sample("z", dist.Normal(batch.y.new_zeros(2), 1.0).to_event(1))
            batch.observe("y", dist.Normal(z[..., 0], 1.0))

    def guide(batch, prior, nets):
        with batch.plate("row"):
            pyro.sample("z", flow_distribution(nets.flow, batch.y.unsqueeze(-1)))

    holder = SimpleNamespace(flow=flow)
    batch = Batch({"y": torch.zeros(3)}, {}, {"row": 3}, ("row",), {})
    drawn = poutine.trace(guide).get_trace(batch, None, holder)
    scored = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(batch, None, None)
    assert bool(torch.isfinite(scored.log_prob_sum() - drawn.log_prob_sum()))
