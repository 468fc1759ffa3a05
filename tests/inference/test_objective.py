from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO
from pyro.ops.indexing import Vindex
from torch import nn

from scivi.errors import PlanError, TemplateError, Unsupported
from scivi.inference.objective import prepare
from scivi.inference.scores import particle_plate, quiet
from scivi.inputs.fields import Field
from scivi.models.binding import bind, seeded
from scivi.models.guides import JointNormal, MeanField
from scivi.models.template import Template
from tests.inference import conjugate
from tests.inference.conjugate import (
    EXACT,
    OFF,
    bound_to,
    hierarchy,
    make_exact,
    plan,
    rows,
    shared,
    some_rows,
    whole,
)

EPS = 1e-12  # float64: a few thousand operations on numbers of order one


def mean_and_error(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values.mean(0), values.std(0) / len(values) ** 0.5


def evaluations(objective, batch, n: int, beta: float = 1.0) -> torch.Tensor:
    """The bound, in nats over all rows, n times."""
    with seeded(1), torch.no_grad(), quiet():
        return -batch.sizes["row"] * torch.stack(
            [objective.evaluate(batch, beta).objective for _ in range(n)]
        )


def gradients(objective, batch, parameters, n: int) -> torch.Tensor:
    """Gradient of the bound (not of the loss), in nats over all rows, n times: (n, parameters)."""
    out = []
    with seeded(2), quiet():
        for _ in range(n):
            found = torch.autograd.grad(objective.evaluate(batch).loss, parameters)
            out.append(-batch.sizes["row"] * torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(out)


@pytest.mark.parametrize("estimator", ["trace", "analytic", "stl"])
def test_bound_of_an_exact_guide_is_the_log_evidence(estimator):
    batch = whole(shared, rows(12))
    bound = bound_to(shared, batch)
    make_exact(bound, batch.y)
    found = evaluations(prepare(bound, batch, plan(estimator=estimator)), batch, 400)
    mean, error = mean_and_error(found)
    truth = conjugate.log_evidence(batch.y, 0.0)
    if estimator == "analytic":
        assert abs(mean - truth) < 4 * error  # 4 Monte Carlo standard errors
    else:  # log p(x, mu) - log q(mu) is the log evidence at every mu
        torch.testing.assert_close(found, truth.expand(400), rtol=EPS, atol=1e-10)


def positive_model(batch, prior, nets):
    scale = pyro.sample("scale", dist.LogNormal(batch.y.new_tensor(0.0), conjugate.PRIOR))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(scale.log(), conjugate.NOISE))


@pytest.mark.parametrize("family", [JointNormal(), JointNormal(rank=1), MeanField()])
@pytest.mark.parametrize("estimator", ["trace", "analytic", "stl"])
def test_bound_is_that_of_the_unbounded_scale_where_a_latent_is_positive(estimator, family):
    positive = replace(shared, model=positive_model, nets=None, guide=family, dims={"scale": ()})
    batch = whole(positive, rows(5))
    bound = bound_to(positive, batch)
    nets = bound.nets.guide
    if isinstance(family, MeanField):
        loc, log_scale = nets.loc["scale"], nets.log_scale["scale"]
    else:
        covariance = nets.distribution().covariance_matrix
        loc, log_scale = nets.loc, 0.5 * covariance.diagonal().log()
    with torch.no_grad():
        loc.fill_(0.7)  # so that the slope of the exponential counts
    truth = conjugate.elbo_of_shared(batch.y, loc, log_scale).detach()
    mean, error = mean_and_error(evaluations(prepare(bound, batch, plan(estimator=estimator)), batch, 400))
    assert abs(mean - truth) < 4 * error  # 4 Monte Carlo standard errors


@pytest.mark.parametrize("estimator", ["trace", "stl", "iwae", "marginal"])
def test_every_draw_gives_the_log_evidence_where_local_and_global_factors_are_exact(estimator):
    batch = whole(hierarchy(), rows(12))
    bound = bound_to(hierarchy(EXACT), batch)
    make_exact(bound, batch.y)
    knobs = {"particles": 3} if estimator == "iwae" else {}
    found = evaluations(prepare(bound, batch, plan(estimator=estimator, **knobs)), batch, 20)
    truth = conjugate.log_evidence(batch.y, conjugate.SPREAD)
    torch.testing.assert_close(
        found, truth.expand(20), rtol=0, atol=2e-6
    )  # the guide starts from float32 numbers


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("estimator", ["trace", "analytic", "stl"])
def test_bound_and_gradient_of_a_wrong_guide_are_those_of_the_closed_form(estimator, particles):
    batch = whole(hierarchy(), rows(6))
    bound = bound_to(hierarchy(OFF), batch)
    found = conjugate.parameters_of(bound)
    truth = conjugate.elbo_of_hierarchy(batch.y, **found)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(truth, list(found.values()))])
    objective = prepare(bound, batch, plan(estimator=estimator, particles=particles))
    mean, error = mean_and_error(evaluations(objective, batch, 300))
    assert abs(mean - truth.detach()) < 4 * error  # 4 Monte Carlo standard errors of 300 evaluations
    mean, error = mean_and_error(gradients(objective, batch, list(found.values()), 300))
    assert (
        (mean - slope).abs() < 4 * error + 1e-12
    ).all()  # 4 standard errors, rounding where there is no noise


def test_sticking_the_landing_has_no_gradient_noise_at_the_exact_posterior():
    batch = whole(shared, rows(12))
    bound = bound_to(shared, batch)
    make_exact(bound, batch.y)
    noise = {}
    for estimator in ("trace", "stl"):
        objective = prepare(bound, batch, plan(estimator=estimator))
        noise[estimator] = gradients(objective, batch, list(bound.nets.parameters()), 50).abs().max()
    assert noise["stl"] < 1e-10 < 0.1 < noise["trace"]  # float64 rounding of terms of order ten


def importance_bound_of_two(y, loc, log_scale, on_y, on_mu, shift, log_sd) -> torch.Tensor:
    """E log mean of two weights in each row, and the globals' part, by quadrature in (mu, e1, e2)."""
    x, w = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(40))
    w = w / w.sum()
    mu = (loc + log_scale.exp() * x)[:, None, None]

    def log_weight(e):
        z = on_y * y + on_mu * mu + shift + log_sd.exp() * e[:, None]
        joint = dist.Normal(mu, conjugate.SPREAD).log_prob(z) + dist.Normal(z, conjugate.NOISE).log_prob(y)
        return joint + 0.5 * e[:, None] ** 2 + log_sd + 0.5 * np.log(2 * np.pi)

    one = log_weight(x)  # (mu, e, rows)
    both = torch.logaddexp(one[:, :, None], one[:, None]) - np.log(2)
    per_row = torch.einsum("i,j,k,ijkr->", w, w, w, both)
    prior = conjugate.expected_log_normal(loc, (2 * log_scale).exp(), conjugate.PRIOR)
    return (per_row + prior + conjugate.entropy(log_scale)).sum()


def test_importance_weighted_bound_of_two_draws_is_that_of_quadrature():
    batch = whole(hierarchy(), rows(3))
    bound = bound_to(hierarchy(OFF), batch)
    found = conjugate.parameters_of(bound)
    truth = importance_bound_of_two(batch.y, **found)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(truth, list(found.values()))])
    objective = prepare(bound, batch, plan(estimator="iwae", particles=2))
    mean, error = mean_and_error(evaluations(objective, batch, 400))
    assert abs(mean - truth.detach()) < 4 * error  # 4 standard errors; 40 nodes leave less than 1e-8
    mean, error = mean_and_error(gradients(objective, batch, list(found.values()), 400))
    assert ((mean - slope).abs() < 4 * error).all()  # 4 standard errors of 400 evaluations


@pytest.mark.slow
def test_importance_weighted_bound_tightens_with_draws_as_one_over_their_number():
    batch = whole(hierarchy(), rows(8))
    bound = bound_to(hierarchy((EXACT[0], EXACT[1], 0.2, EXACT[3])), batch)  # local factors off, in place
    make_exact(bound, batch.y)
    truth, gaps, errors = conjugate.log_evidence(batch.y, conjugate.SPREAD), [], []
    for particles in (8, 32):
        objective = prepare(bound, batch, plan(estimator="iwae", particles=particles))
        mean, error = mean_and_error(evaluations(objective, batch, 1000))
        gaps.append(float(truth - mean)), errors.append(float(error))
    # weights are log-normal: exp of a normal of variance (.2 / sd)**2; to first order in 1/K a row's gap is
    # (exp((.2 / sd)**2) - 1) / 2K (Domke and Sheldon 2018, arXiv:1808.09034, theorem 3)
    first_order = 8 * np.expm1((0.2 / conjugate.ROW_SD) ** 2) / 2
    for gap, error, particles in zip(gaps, errors, (8, 32), strict=True):
        assert gap * particles == pytest.approx(
            first_order, abs=4 * error * particles, rel=2 / particles
        )  # next order
    assert gaps[1] < gaps[0]


def test_weights_are_per_row_and_not_of_the_whole_batch_as_in_pyro():
    """Pyro's RenyiELBO has one weight for all rows: of many rows its bound is little better than the ELBO."""
    batch = whole(hierarchy(), rows(60))
    bound = bound_to(hierarchy(OFF), batch)
    make_exact(bound, batch.y)
    ours, _ = mean_and_error(
        evaluations(prepare(bound, batch, plan(estimator="iwae", particles=16)), batch, 100)
    )
    plain, _ = mean_and_error(evaluations(prepare(bound, batch, plan(estimator="trace")), batch, 400))
    with seeded(3), torch.no_grad():
        renyi = RenyiELBO(alpha=0.0, num_particles=16, vectorize_particles=True, max_plate_nesting=1)
        theirs = -np.mean([renyi.loss(bound.model, bound.guide, batch) for _ in range(100)])
    truth = float(conjugate.log_evidence(batch.y, conjugate.SPREAD))
    gap_plain, gap_ours, gap_theirs = truth - float(plain), truth - float(ours), truth - theirs
    assert gap_ours < 0.1 * gap_plain < 0.3 * gap_plain < gap_theirs < gap_plain


@pytest.mark.parametrize("estimator", ["trace", "analytic", "stl", "iwae", "marginal"])
def test_parts_sum_to_the_bound_and_beta_weighs_the_latents(estimator):
    batch = whole(hierarchy(), rows(6))
    objective = prepare(bound_to(hierarchy(OFF), batch), batch, plan(estimator=estimator, particles=4))
    found = {}
    for beta in (1.0, 0.25):
        with seeded(4), quiet():
            found[beta] = objective.evaluate(batch, beta)
    parts = found[1.0].parts
    assert -sum(parts.values()) == pytest.approx(float(found[1.0].objective), abs=EPS)
    data = {"y", "importance_weighted", "marginal"} & set(parts)
    weighed = sum(float(v) * (1.0 if k in data else 0.25) for k, v in parts.items())
    assert -weighed == pytest.approx(float(found[0.25].objective), abs=EPS)


def cross_entropy(y, loc, log_scale, on_y, on_mu, shift, log_sd) -> torch.Tensor:
    """E log q(z_i | y_i, mu) over z_i given y_i and mu, and over mu."""
    a, b = conjugate.SHRINK - on_y, 1 - conjugate.SHRINK - on_mu
    square = (a * y + b * loc - shift) ** 2 + b**2 * (2 * log_scale).exp() + conjugate.ROW_SD**2
    return -0.5 * (square * (-2 * log_sd).exp()).sum() - len(y) * log_sd


def test_marginal_gives_globals_the_marginal_and_the_guide_the_divergence_from_each_posterior():
    batch = whole(hierarchy(), rows(6))
    bound = bound_to(hierarchy(OFF), batch)
    found = conjugate.parameters_of(bound)
    loc, log_scale = found["loc"], found["log_scale"]
    variance = conjugate.SPREAD**2 + conjugate.NOISE**2
    rest = (2 * log_scale).exp()
    exact = conjugate.expected_log_normal(batch.y - loc, rest, variance**0.5).sum()
    exact = (
        exact
        + (conjugate.expected_log_normal(loc, rest, conjugate.PRIOR) + conjugate.entropy(log_scale)).sum()
    )
    slope = {"loc": torch.autograd.grad(exact, loc, retain_graph=True)[0]}
    slope["log_scale"] = torch.autograd.grad(exact, log_scale)[0]
    own = cross_entropy(batch.y, **found).sum()
    slope |= {
        n: torch.autograd.grad(own, found[n], retain_graph=True)[0]
        for n in ("on_y", "on_mu", "shift", "log_sd")
    }
    objective = prepare(bound, batch, plan(estimator="marginal", nodes=15))
    mean, error = mean_and_error(evaluations(objective, batch, 400))
    assert abs(mean - exact.detach()) < 4 * error  # 4 standard errors; 15 nodes leave 1e-5
    mean, error = mean_and_error(gradients(objective, batch, list(found.values()), 300))
    truth = torch.cat([slope[n].reshape(-1) for n in found])
    assert (
        (mean - truth).abs() < 4 * error + 1e-4
    ).all()  # 4 standard errors; 15 nodes leave 1e-5 of a nat per row


def test_minibatches_average_to_the_full_objective():
    batch = whole(hierarchy(), rows(24))
    objective = prepare(bound_to(hierarchy(OFF), batch), batch, plan(estimator="marginal"))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()

    def at_one_seed(some):  # rows are integrated, so that mu is the only thing drawn for the bound
        with seeded(5), quiet():
            return float(objective.evaluate(some).objective)

    parts = [at_one_seed(some_rows(batch, order[k : k + 4])) for k in range(0, 24, 4)]
    assert np.mean(parts) == pytest.approx(at_one_seed(batch), abs=EPS)


@pytest.mark.parametrize(
    "estimator", ["trace", "analytic", *(pytest.param(e, marks=pytest.mark.slow) for e in ("stl", "iwae"))]
)
def test_minibatches_are_unbiased_for_sampled_rows_too(estimator):
    batch = whole(hierarchy(), rows(8))
    objective = prepare(bound_to(hierarchy(OFF), batch), batch, plan(estimator=estimator, particles=4))
    full, error = mean_and_error(evaluations(objective, batch, 300))
    halves = [some_rows(batch, [0, 3, 5, 6]), some_rows(batch, [1, 2, 4, 7])]
    means, errors = zip(*[mean_and_error(evaluations(objective, half, 300)) for half in halves], strict=True)
    spread = (error**2 + (errors[0] ** 2 + errors[1] ** 2) / 4) ** 0.5
    assert abs(sum(means) / 2 - full) < 4 * spread  # 4 standard errors of the difference


WEIGHTS, PLACES, WIDTH = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 2.0]).double(), 0.8


class Places(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_sd = nn.Parameter(PLACES.float() + 0.3), nn.Parameter(torch.tensor([-1.0, -0.5]))
        self.logit = nn.Parameter(torch.tensor([0.2, 0.7]))


def mixture_model(batch, prior, nets):
    places = pyro.sample("places", dist.Normal(torch.zeros(2).to(batch.y), 3.0).to_event(1))
    with batch.plate("row"):
        which = pyro.sample("which", dist.Categorical(WEIGHTS.to(batch.y)))
        batch.observe("y", dist.Normal(Vindex(places)[..., which], WIDTH))


def places_guide(batch, prior, nets):
    pyro.sample("places", dist.Normal(nets.loc, nets.log_sd.exp()).to_event(1))


mixture = Template(
    name="mixture",
    fields=conjugate.FIELDS,
    rows="row",
    model=mixture_model,
    guide=places_guide,
    nets=lambda sizes, prior: Places(),
    dims={"places": ("component",), "which": ("row",)},
    sizes={"component": 2},
)


@pytest.mark.parametrize("particles", [1, 6])
@pytest.mark.parametrize("index", [None, [4, 1, 2]])
def test_enumeration_is_the_sum_by_hand(particles, index):
    batch = whole(mixture, rows(6))
    bound = bound_to(mixture, batch)
    some = batch if index is None else some_rows(batch, index)
    objective = prepare(bound, batch, plan(estimator="enumerate", particles=particles))
    with seeded(6), quiet():
        found = objective.evaluate(some)
    with seeded(6), quiet(), particle_plate(particles, 1):
        guide = poutine.trace(bound.guide).get_trace(some).nodes["places"]
    places = guide["value"].reshape(particles, 1, 2)
    rows_of = (dist.Normal(places, WIDTH).log_prob(some.y[:, None]) + WEIGHTS.log()).logsumexp(-1)
    log_q = guide["fn"].log_prob(guide["value"]).reshape(-1)
    log_p = dist.Normal(places.new_tensor(0.0), 3.0).log_prob(places.squeeze(1)).sum(-1)
    truth = (6 / len(some.y) * rows_of.sum(1) + log_p - log_q).mean() / 6
    assert float(-found.objective) == pytest.approx(float(truth.detach()), abs=EPS)
    assert -sum(found.parts.values()) == pytest.approx(float(found.objective), abs=EPS)
    parameters = list(bound.nets.own.parameters())[:2]
    ours = torch.autograd.grad(-found.loss, parameters)
    for one, other in zip(ours, torch.autograd.grad(truth, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=EPS)


def responsible_guide(batch, prior, nets):
    places_guide(batch, prior, nets)
    with batch.plate("row"):
        one = torch.sigmoid(nets.logit[0] + nets.logit[1] * batch.y)
        pyro.sample("which", dist.Categorical(torch.stack([1 - one, one], -1)))


responsible = replace(mixture, guide=responsible_guide)


def elbo_of_responsible(y, nets) -> torch.Tensor:
    """All in closed form: normal factors of the places, the sum over both values of every row."""
    one = torch.sigmoid(nets.logit[0] + nets.logit[1] * y)
    q = torch.stack([1 - one, one], -1)
    sd2 = (2 * nets.log_sd).exp()
    data = conjugate.expected_log_normal(y[:, None] - nets.loc, sd2, WIDTH)
    local = (q * (data + WEIGHTS.log() - q.log())).sum()
    return local + (conjugate.expected_log_normal(nets.loc, sd2, 3.0) + conjugate.entropy(nets.log_sd)).sum()


@pytest.mark.parametrize("index", [None, [0, 2, 3]])
def test_score_function_gradient_is_that_of_the_exact_sum(index):
    batch = whole(responsible, rows(4))
    bound = bound_to(responsible, batch)
    parameters = list(bound.nets.own.parameters())
    truth = elbo_of_responsible(batch.y, bound.nets.own)
    if index is not None:  # the rows in the batch stand for all
        some = elbo_of_responsible(batch.y[index], bound.nets.own)
        none = elbo_of_responsible(batch.y[:0], bound.nets.own)
        truth = none + (some - none) * 4 / 3
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(truth, parameters)])
    some = batch if index is None else some_rows(batch, index)
    objective = prepare(bound, batch, plan(estimator="trace", particles=20))
    mean, error = mean_and_error(gradients(objective, some, parameters, 300))
    assert ((mean - slope).abs() < 4 * error).all()  # 4 standard errors of 300 x 20 draws
    mean, error = mean_and_error(evaluations(objective, some, 300))
    assert abs(mean - truth.detach()) < 4 * error


def switch_model(batch, prior, nets):
    on = pyro.sample("on", dist.Bernoulli(batch.y.new_tensor(0.4)))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(on, 1.0))


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.5))


def switch_guide(batch, prior, nets):
    pyro.sample("on", dist.Bernoulli(logits=nets.logit))


switch = Template(
    name="switch", fields=conjugate.FIELDS, rows="row", model=switch_model, guide=switch_guide,
    nets=lambda sizes, prior: Switch(), dims={"on": ()},
)  # fmt: skip


def test_score_function_gradient_of_a_global_switch_and_the_need_for_a_control_variate():
    batch = whole(switch, rows(5))
    bound = bound_to(switch, batch)
    logit = bound.nets.own.logit
    q = torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)])
    value = torch.tensor([0.0, 1.0]).double()
    prior = torch.tensor([0.6, 0.4]).double()
    data = dist.Normal(value, 1.0).log_prob(batch.y[:, None]).sum(0)
    (slope,) = torch.autograd.grad((q * (data + prior.log() - q.log())).sum(), logit)
    objective = prepare(bound, batch, plan(estimator="trace", particles=10))
    mean, error = mean_and_error(gradients(objective, batch, [logit], 300))
    assert abs(mean - slope) < 4 * error  # 4 standard errors of 300 x 10 draws
    with pytest.raises(
        PlanError, match=r"sites \['on'\] have no pathwise derivative .* use Plan\(particles=2\)"
    ):
        prepare(bound, batch, plan(estimator="trace")).evaluate(batch)


@pytest.mark.parametrize(
    ("template", "estimator"),
    [(mixture, "enumerate"), (responsible, "trace"), (shared, "trace"), (hierarchy(), "marginal")],
)
def test_auto_takes_the_estimator_that_the_guide_calls_for(template, estimator):
    batch = whole(template, rows(5))
    assert prepare(bound_to(template, batch), batch, plan()).estimator == estimator


def test_what_cannot_be_estimated_is_refused_with_what_to_do():
    batch = whole(shared, rows(5))
    drawn = bound_to(responsible, batch)
    with pytest.raises(
        Unsupported,
        match=r'"marginal" cannot be used: there is no latent per row, nor a joint .* Use "trace"',
    ):
        prepare(bound_to(shared, batch), batch, plan(estimator="marginal"))
    with pytest.raises(Unsupported, match=r'this guide has no latent per row; use "trace"'):
        prepare(bound_to(shared, batch), batch, plan(estimator="iwae", particles=2)).evaluate(batch)
    with pytest.raises(Unsupported, match=r"the guide draws \['which'\] without a pathwise derivative"):
        prepare(drawn, batch, plan(estimator="iwae", particles=2)).evaluate(batch)
    with pytest.raises(
        Unsupported, match=r"enumerate.: the guide draws \['which'\] without .*Leave them out"
    ):
        prepare(drawn, batch, plan(estimator="enumerate")).evaluate(batch)
    lazy = replace(hierarchy(), guide=lambda batch, prior, nets: nets.globals(batch))
    with pytest.raises(TemplateError, match=r"the guide has no factor for \['z'\]"):
        prepare(bind(lazy, batch, 0), batch, plan(estimator="trace")).evaluate(batch)


def test_missing_entries_weigh_nothing():
    data = rows(6)
    data["y"][[1, 4]] = np.nan
    holes, kept = whole(hierarchy(), data), whole(hierarchy(), {"y": data["y"][[0, 2, 3, 5]]})
    bound = bound_to(hierarchy(EXACT), holes)
    truth = conjugate.log_evidence(kept.y, conjugate.SPREAD)
    make_exact(bound, kept.y)
    found = evaluations(prepare(bound, holes, plan(estimator="marginal", nodes=21)), holes, 5)
    # the guide of a missing row is that of the value in its place: nodes that far away leave 1e-3
    torch.testing.assert_close(found, truth.expand(5), rtol=0, atol=1e-3)


def test_two_row_dims_are_scaled_each_on_its_own():
    fields = {"y": Field(("cell", "drop"), "observed")}

    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.plate("cell", dim=-2), batch.plate("drop", dim=-1):
            batch.observe("y", dist.Normal(mu, 1.0))

    grid = replace(shared, fields=fields, rows=("cell", "drop"), model=model)
    data = {"y": np.random.default_rng(0).normal(size=(4, 6))}
    batch = whole(grid, data)
    objective = prepare(bound_to(grid, batch), batch, plan(estimator="trace"))

    def at_one_seed(cells, drops):
        index = {"cell": torch.tensor(cells), "drop": torch.tensor(drops)}
        some = replace(batch, values={"y": batch.y[cells][:, drops]}, index=index)
        with seeded(7), quiet():
            return float(objective.evaluate(some).objective)

    parts = [at_one_seed(c, d) for c in ([0, 2], [1, 3]) for d in ([0, 1, 2], [3, 4, 5])]
    assert np.mean(parts) == pytest.approx(at_one_seed([0, 1, 2, 3], [0, 1, 2, 3, 4, 5]), abs=EPS)
