from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import nn

from scivi.errors import TemplateError
from scivi.inputs.batches import Batch
from scivi.inputs.fields import Field
from scivi.models.binding import bind, seeded, stream_seed
from scivi.models.sites import central
from scivi.models.template import Template


@dataclass(frozen=True)
class Prior:
    width: float = 2.0


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2)


def model(batch, prior, nets) -> None:
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), prior.width))
    scale = pyro.sample("scale", dist.HalfNormal(batch.y.new_ones(2)).to_event(1))
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(mu, scale[..., :1].expand(batch.y.shape)))
        pyro.deterministic("double", 2 * z)
        batch.observe("y", dist.Normal(z, 1.0))


DIMS = {"mu": (), "scale": ("part",), "z": ("row",), "double": ("row",)}
template = Template(
    name="t",
    fields={"y": Field(("row",), "observed")},
    rows="row",
    model=model,
    dims=DIMS,
    prior=Prior(),
    sizes={"part": 2},
)


def batch_of(n: int, size: int | None = None, dtype=torch.float32) -> Batch:
    index = {} if size is None else {"row": torch.arange(size)}
    return Batch(
        {"y": torch.linspace(0, 1, size or n, dtype=dtype)}, {}, {"row": n, "part": 2}, ("row",), index
    )


def test_sites_are_known_in_the_size_of_the_full_data():
    bound = bind(template, batch_of(100, 8), seed=0)
    found = {s.name: s for s in bound.sites}
    assert list(found) == ["mu", "scale", "z"]
    assert found["z"].shape == (100,)
    assert found["z"].row_dim == "row"
    assert found["z"].plates == (("row", -1),)
    assert (found["scale"].shape, found["scale"].event_dim, found["scale"].row_dim) == ((2,), 1, None)
    assert bound.nesting == 1
    assert [s.name for s in bound.local] == ["z"]
    assert not bound.amortised


def test_seeds_decide_the_start_and_nothing_else_is_moved():
    torch.manual_seed(3)
    one, other, third = (
        bind(replace(template, nets=lambda s, p: Own()), batch_of(9), seed) for seed in (0, 0, 1)
    )
    after = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(2))
    states = [b.nets.state_dict() for b in (one, other, third)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["own.net.weight"], states[2]["own.net.weight"])
    assert one.nets.own is not other.nets.own


def test_streams_of_a_seed_differ_and_seeds_do_too():
    seeds = {stream_seed(seed, name) for seed in range(50) for name in ("init", "order", "sampling", "draws")}
    assert len(seeds) == 200
    assert all(0 <= s < 2**63 for s in seeds)


def test_two_bound_pairs_of_one_template_share_nothing():
    one, other = (bind(template, batch_of(9), seed=0) for _ in range(2))
    with torch.no_grad():
        one.nets.guide.loc["mu"].fill_(7.0)
    assert float(other.nets.guide.loc["mu"].detach()) != 7.0
    assert dict(pyro.get_param_store()) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_have_the_type_of_the_data(dtype):
    bound = bind(replace(template, nets=lambda s, p: Own()), batch_of(9, dtype=dtype), seed=0)
    assert {p.dtype for p in bound.nets.parameters()} == {dtype}


def test_the_prior_is_closed_over():
    wide = bind(replace(template, prior=Prior(100.0)), batch_of(9), seed=0)
    trace = poutine.trace(wide.model).get_trace(batch_of(9))
    assert float(trace.nodes["mu"]["fn"].scale) == 100.0


def test_other_values_hold_only_while_a_function_runs():
    bound = bind(template, batch_of(9), seed=0)

    def place() -> float:
        return float(
            poutine.trace(bound.guide).get_trace(batch_of(9)).nodes["mu"]["fn"].base_dist.loc.detach()
        )

    before = place()
    assert bound.holding({"guide.loc.mu": torch.tensor(5.0)}, place) == 5.0
    assert place() == before


def test_no_gradient_passes_through_frozen_parameters():
    bound = bind(template, batch_of(9), seed=0)

    def density() -> torch.Tensor:
        return poutine.trace(bound.guide).get_trace(batch_of(9)).log_prob_sum()

    assert density().requires_grad
    assert not bound.frozen(density).requires_grad


def test_a_guide_starts_at_the_prior_medians():
    bound = bind(template, batch_of(9), seed=0)
    loc = bound.nets.guide.loc["scale"].exp().mean().item()
    assert loc == pytest.approx(
        0.674, abs=3 * 0.2
    )  # median of a half-normal; sd of a median of 15 is about .2


def test_a_central_value_stays_inside_the_support():
    draws = [
        torch.tensor([0.98, 0.01, 0.01]),
        torch.tensor([0.01, 0.98, 0.01]),
        torch.tensor([0.01, 0.01, 0.98]),
    ]
    found = central(draws, torch.distributions.constraints.simplex)
    assert float(found.sum()) == pytest.approx(1.0)
    assert float(
        central([torch.tensor(x) for x in (0.1, 2.0, 50.0)], torch.distributions.constraints.positive)
    ) == pytest.approx(2.0)


def test_a_model_and_dims_that_disagree_are_told_all_at_once():
    def silent(batch, prior, nets):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with batch.plate("row"):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(TemplateError) as caught:
        bind(replace(template, model=silent, dims={"mu": ("row",), "absent": ()}), batch_of(4), seed=0)
    assert str(caught.value).splitlines() == [
        'template "t" and its model disagree:',
        '  - dims lists "absent", but the model has no such site',
        '  - observed field "y" is never scored: call batch.observe("y", ...)',
        "  - site \"mu\" has shape (), but dims says ('row',): name one dim for each axis",
    ]


def test_a_guide_that_is_none_is_refused():
    with pytest.raises(
        TemplateError, match=r"guide is int; it must be a function .* a family such as MeanField"
    ):
        bind(replace(template, guide=3), batch_of(4), seed=0)


def test_the_process_stream_is_put_back():
    torch.manual_seed(1)
    first = torch.rand(1)
    torch.manual_seed(1)
    with seeded(99):
        torch.rand(5)
    assert torch.equal(torch.rand(1), first)


class Coder(nn.Module):
    """A decoder of the model and an encoder of the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 1), nn.Linear(1, 2)


def plain_model(batch, prior, nets) -> None:
    """Every number of the prior is plain, and every draw goes through a net or a matrix."""
    width = pyro.sample("width", dist.LogNormal(0.0, 0.5))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        on = pyro.sample("on", dist.Bernoulli(0.5)) if batch.predicting else 0.0
        middle = nets.decoder(z.unsqueeze(-1)).squeeze(-1) + slope @ weights + on
        batch.observe("y", dist.Normal(middle, width))


def plain_guide(batch, prior, nets) -> None:
    pyro.sample("width", dist.LogNormal(0.0, 0.1))
    pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with batch.plate("row"):
        loc, log_scale = nets.encoder(batch.y.unsqueeze(-1)).unbind(-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


PLAIN_DIMS = {"width": (), "weights": ("part",), "slope": ("part",), "z": ("row",)}
plain = replace(template, model=plain_model, guide=plain_guide, nets=lambda s, p: Coder(), dims=PLAIN_DIMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [plain_guide, None])
def test_plain_numbers_in_a_model_have_the_type_of_the_data(family, dtype):
    batch = batch_of(5, dtype=dtype)
    bound = bind(replace(plain, guide=family), batch, seed=0)
    with seeded(1):
        guide = poutine.trace(bound.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(batch)
        free = poutine.trace(bound.model).get_trace(batch.predict())
    for trace in (guide, model, free):
        trace.compute_log_prob()
        for name in (*PLAIN_DIMS, *(("y",) if trace is not guide else ())):
            node = trace.nodes[name]
            assert (node["value"].dtype, node["log_prob"].dtype) == (dtype, dtype), name
    assert free.nodes["on"]["value"].dtype == dtype
    z, width = (model.nodes[name]["value"].detach().double().numpy() for name in ("z", "width"))
    eps = torch.finfo(dtype).eps
    found = [float(model.nodes[name]["log_prob"].sum().detach()) for name in ("z", "width")]
    truth = [stats.norm.logpdf(z).sum(), stats.lognorm.logpdf(width, 0.5)]
    np.testing.assert_allclose(found, truth, rtol=20 * eps)  # rounding of a sum of five


def test_a_distribution_of_the_right_type_is_left_as_it_is():
    fn = dist.Normal(torch.zeros(2).double(), torch.ones(2).double()).to_event(1)
    bend = torch.distributions.transforms.ExpTransform()
    given = dist.TransformedDistribution(fn, [bend])
    seen = []

    def kept(batch, prior, nets) -> None:
        seen.append(pyro.sample("mu", given))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(seen[-1].sum(), 1.0))

    batch = batch_of(5, dtype=torch.float64)
    bound = bind(replace(template, model=kept, dims={"mu": ("part",)}), batch, seed=0)
    assert poutine.trace(bound.model).get_trace(batch).nodes["mu"]["fn"] is given
    assert torch.get_default_dtype() == torch.float32


def test_an_inverse_transform_keeps_its_way_back():
    """An inverse holds its transform, which may hold the inverse: neither is lost, nor followed for ever."""
    shift = torch.distributions.transforms.AffineTransform(torch.tensor(0.5), torch.tensor(2.0))

    def turned(batch, prior, nets) -> None:
        mu = pyro.sample("mu", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [shift.inv]))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu, 1.0))

    batch = batch_of(5, dtype=torch.float64)
    bound = bind(replace(template, model=turned, dims={"mu": ()}), batch, seed=0)
    node = poutine.trace(bound.model).get_trace(batch).nodes["mu"]
    found = node["fn"].log_prob(node["value"])
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(
        stats.norm.logpdf(float(node["value"]), -0.25, 0.5), rel=1e-14
    )  # eps
    assert node["fn"].transforms[0].inv.loc.dtype == torch.float64
    assert shift.loc.dtype == torch.float32
