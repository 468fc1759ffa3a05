"""A compiled step against the eager one, and that against Pyro: 100 optimiser steps in float64.

Rounding alone separates them: 1e-12 in the loss and 1e-10 in the parameters, which are of order one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn

from scivi.inference import capture, finish, stepper
from scivi.inference.loop import fit, train
from scivi.inference.opening import begin, open_data
from scivi.models.flows import conditional_flow, flow_distribution
from scivi.models.guides import JointNormal, MeanField
from scivi.models.networks import perceptron
from tests.inference.conjugate import OFF, hierarchy, plan, rows, shared, shared_model
from tests.inference.test_objective import mixture, positive_model, responsible, switch

STEPS = 100


class Heads(nn.Module):
    def __init__(self, *, normalised: bool = False, flow: bool = False) -> None:
        super().__init__()
        layers = [nn.BatchNorm1d(1), nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 2)]
        self.net = nn.Sequential(*layers) if normalised else perceptron(1, 2, (8,))
        self.flow = conditional_flow(2, 1) if flow else None


def local_model(batch, prior, nets):
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(batch.y.new_zeros(()), 0.8))
        batch.observe("y", dist.Normal(z, 0.6))


def encoder_guide(batch, prior, nets):
    loc, log_sd = nets.net(batch.y.unsqueeze(-1)).unbind(-1)
    with batch.plate("row"):
        pyro.sample("z", dist.Normal(loc, log_sd.exp()))


def plane_model(batch, prior, nets):
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(batch.y.new_zeros(2), 0.8).to_event(1))
        batch.observe("y", dist.Normal(z.sum(-1), 0.6))


def flow_guide(batch, prior, nets):
    with batch.plate("row"):
        pyro.sample("z", flow_distribution(nets.flow, batch.y.unsqueeze(-1)))


def gamma_model(batch, prior, nets):
    rate = pyro.sample("rate", dist.Gamma(batch.y.new_tensor(2.0), 2.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(0.0, rate))


class Shape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.tensor([0.7, 0.6]))


def gamma_guide(batch, prior, nets):
    shape, rate = nets.logs.exp()
    pyro.sample("rate", dist.Gamma(shape, rate))


encoder = replace(
    shared, model=local_model, guide=encoder_guide, nets=lambda *_: Heads(), dims={"z": ("row",)}
)
# Large steps of large nets are chaotic: rounding grows tenfold every few steps, and Adam adds to it.
SGD = {"optimiser": "sgd", "lr": 0.001}
CASES = {
    "mean field": (replace(shared, guide=MeanField(), nets=None), {}),
    "full rank": (
        replace(shared, model=positive_model, guide=JointNormal(), nets=None, dims={"scale": ()}), {}
    ),
    "low rank": (replace(shared, guide=JointNormal(rank=1), nets=None), {}),
    "subsampled": (hierarchy(OFF), {"rows_per_batch": 5, "estimator": "trace", "particles": 2}),
    "marginal": (hierarchy(OFF), {"rows_per_batch": 5, "estimator": "marginal"}),
    "rows' own factors": (replace(hierarchy(), guide=MeanField(), nets=None), {"rows_per_batch": 5}),
    "sticking the landing": (hierarchy(OFF), {"estimator": "stl"}),
    "closed-form KL": (hierarchy(OFF), {"estimator": "analytic"}),
    "importance weighted": (hierarchy(OFF), {"estimator": "iwae", "particles": 3}),
    "encoder": (encoder, {"rows_per_batch": 5, "estimator": "trace"}),
    "enumeration": (mixture, {"estimator": "enumerate", "rows_per_batch": 5}),
    "score function": (switch, {"particles": 2}),
    "score function of rows": (responsible, {"particles": 2, "rows_per_batch": 5}),
    "implicit gradient": (
        replace(shared, model=gamma_model, guide=gamma_guide, nets=lambda *_: Shape(), dims={"rate": ()}), {}
    ),
    "flow": (
        replace(encoder, model=plane_model, guide=flow_guide, nets=lambda *_: Heads(flow=True),
                dims={"z": ("row", "side")}, sizes={"side": 2}), {"estimator": "trace", **SGD, "lr": 2e-4}
    ),
    "batch norm": (
        replace(encoder, nets=lambda *_: Heads(normalised=True)),
        {"rows_per_batch": 6, "estimator": "trace", **SGD},
    ),
    "sgd, warm-up of the KL": (
        hierarchy(OFF), {"optimiser": "sgd", "lr": 0.02, "kl_warmup": 60, "estimator": "trace"}
    ),
}  # fmt: skip
MISSING = {"y": np.where(np.arange(12) % 5 == 0, np.nan, rows(12)["y"])}


def run(template, data, knobs):
    """Parameters and buffers after the steps, the history, and how steps were taken."""
    the_plan = plan(steps=STEPS, **{"log_every": 10, "lr": 0.02, **knobs})
    state = begin(template, open_data(template, data), the_plan)
    for _ in train(template, data, the_plan, state=state):
        pass
    return state.bound.nets.state_dict(), state.history, state.engine


def assert_same(template, data, knobs, how, *, keep=False):
    template = template if keep else replace(template)  # a copy has nothing compiled
    eager, history, _ = run(template, data, {**knobs, "compile": "off"})
    ours, our_history, engine = run(template, data, {**knobs, "compile": "on"})
    assert engine["steps"] == how, engine
    for one, other in zip(history, our_history, strict=True):
        assert other["objective"] == pytest.approx(one["objective"], rel=1e-12, abs=1e-12)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-10, abs=1e-10)
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_the_eager_one(case, monkeypatch):
    monkeypatch.setattr(capture, "has_compiler", lambda: False)
    template, knobs = CASES[case]
    assert_same(template, rows(12), knobs, "captured")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["subsampled", "batch norm"])
def test_a_capture_that_is_compiled_is_the_eager_step(case):
    template, knobs = CASES[case]
    assert_same(template, MISSING if case == "subsampled" else rows(12), knobs, "compiled")


@pytest.mark.slow
def test_a_template_is_captured_once_for_fits_that_differ_in_numbers_alone(monkeypatch):
    monkeypatch.setattr(capture, "has_compiler", lambda: False)
    graphs, real = [], stepper.captured
    monkeypatch.setattr(stepper, "captured", lambda *a, **k: graphs.append(1) or real(*a, **k))
    template = hierarchy(OFF)
    assert_same(template, rows(12), {"estimator": "trace"}, "captured", keep=True)
    n = len(graphs)
    other = {"estimator": "trace", "seed": 3, "lr": 0.01, "kl_warmup": 20}
    assert_same(template, rows(12, seed=5), other, "captured", keep=True)
    assert len(graphs) == n
    assert_same(template, rows(13), {"estimator": "trace"}, "captured", keep=True)
    assert len(graphs) > n


def test_a_capture_does_equal_work_once_but_draws_and_changes_in_place_as_often_as_they_are_written():
    def function(x):
        changed, untouched = torch.zeros_like(x), torch.zeros_like(x)
        before = changed.sum()
        changed.add_(x.exp())
        return changed, untouched, before, changed.sum(), x.exp() + torch.rand(3), torch.rand(3)

    graph = capture.captured(function, [torch.randn(3)])
    assert sum(node.target is torch.ops.aten.exp.default for node in graph.graph.nodes) == 1
    x = torch.randn(3)
    for ours, written in zip(*(_seeded(run, x) for run in (graph, function)), strict=True):
        torch.testing.assert_close(ours, written, rtol=0, atol=0)


def _seeded(function, x):
    torch.manual_seed(1)
    return function(x)


@pytest.mark.slow
def test_constants_of_another_fit_are_noticed(monkeypatch):
    monkeypatch.setattr(capture, "has_compiler", lambda: False)

    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.fixed = nn.Parameter(torch.tensor(0.0)), torch.randn(()).double()

    def guide(batch, prior, nets):
        pyro.sample("mu", dist.Normal(nets.loc + nets.fixed, 0.3))

    template = replace(shared, guide=guide, nets=lambda *_: Start())
    for seed in (0, 1):
        assert_same(template, rows(12), {"seed": seed}, "captured", keep=True)


@pytest.mark.slow
def test_a_captured_step_is_that_of_pyro(monkeypatch):
    monkeypatch.setattr(capture, "has_compiler", lambda: False)
    data, n = rows(12), 12
    y, found = torch.as_tensor(data["y"]), {}
    _, history, engine = run(shared, data, {"compile": "on", "schedule": "constant", "clip": None})
    assert engine["steps"] == "captured"
    state = begin(shared, open_data(shared, data), plan())

    def model():
        shared_model(cast(Any, Whole(y)), None, None)

    def guide():
        found["loc"] = pyro.param("loc", y.new_zeros(()))
        found["log_scale"] = pyro.param("log_scale", y.new_zeros(()))
        pyro.sample("mu", dist.Normal(found["loc"], found["log_scale"].exp()))

    class Whole:
        def __init__(self, y):
            self.y = y

        def plate(self, name):
            return pyro.plate(name, n)

        def observe(self, name, fn):
            pyro.sample(name, fn, obs=self.y)

    # Adam is blind to the scale of the loss, but for eps: ours is per row, Pyro's the sum.
    svi = SVI(model, guide, Adam({"lr": 0.02, "eps": 1e-8 * n}), Trace_ELBO())
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.set_rng_state(state.random)
        losses = [cast(float, svi.step()) / n for _ in range(STEPS)]
    means = np.reshape(losses, (-1, 10)).mean(1)
    np.testing.assert_allclose([e["objective"] for e in history], means, rtol=1e-12)


@pytest.mark.slow
def test_a_finish_by_captured_passes_is_the_eager_one_in_either_precision(monkeypatch):
    monkeypatch.setattr(capture, "has_compiler", lambda: False)
    monkeypatch.setattr(finish, "FEW_ROWS", 4)
    template, found = hierarchy(OFF), {}
    for dtype, close in (("float32", 1e-4), ("float64", 1e-10)):  # rounding of a few dozen terms
        for how in ("on", "off", "on"):
            the_plan = plan(steps=20, estimator="marginal", newton=True, compile=how, dtype=dtype)
            nets = fit(template, rows(40), the_plan, progress=False).nets.own
            mine = torch.cat([nets.globals.loc, nets.globals.scale_tril.reshape(-1)])
            torch.testing.assert_close(mine, found.setdefault(dtype, mine), rtol=close, atol=close)
    passes = [key for key in template.memo if key[0] == "pass"]
    assert len(passes) == 4  # coarse and fine nodes, in two precisions


@pytest.mark.slow
def test_a_long_fit_is_captured_after_a_thousand_steps_wherever_it_is_stopped(monkeypatch):
    monkeypatch.setattr(capture, "has_compiler", lambda: False)
    monkeypatch.setattr(stepper, "PATIENCE", 30)
    knobs = {"compile": "auto", "estimator": "trace", "dtype": "float32", "rows_per_batch": 5}
    template, the_plan = hierarchy(OFF), plan(steps=80, log_every=10, **knobs)
    whole = fit(template, rows(12), the_plan, progress=False)
    assert whole.provenance["fit"]["engine"]["steps"] == "captured"
    for stop in (20, 40):
        state = begin(template, open_data(template, rows(12)), the_plan)
        for now in train(template, rows(12), the_plan, state=state):
            if now.step == stop:
                break
        other = begin(template, open_data(template, rows(12)), the_plan)
        other.unpack(*state.pack())
        for _ in train(replace(template), rows(12), the_plan, state=other):
            pass
        assert [e["objective"] for e in other.history] == whole.history.objective.values.tolist()
    short = fit(template, rows(12), plan(steps=50, log_every=10, **knobs), progress=False)
    assert "does not repay" in short.provenance["fit"]["engine"]["why"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_steps_on_a_gpu_are_the_eager_ones_and_each_has_noise_of_its_own():
    assert_same(hierarchy(OFF), rows(12), {"device": "cuda", "estimator": "trace", "lr": 1e-3}, "compiled")
    knobs = {"device": "cuda", "estimator": "trace", "lr": 1e-12, "schedule": "constant", "compile": "on"}
    _, history, _ = run(hierarchy(OFF), rows(12), knobs)
    assert len({entry["objective"] for entry in history}) == len(history)
