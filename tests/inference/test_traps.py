"""What would make a captured step silently wrong: each is right, or refused with the reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torchdiffeq import odeint

from scivi.errors import FitError
from scivi.inference import capture, stepper
from scivi.inference.loop import fit
from scivi.inputs.fields import Field
from tests.inference.conjugate import Shared, plan, rows, shared
from tests.inference.test_capture import assert_same


@pytest.fixture(autouse=True)
def uncompiled(request, monkeypatch):
    if "compiled" not in request.node.name:
        monkeypatch.setattr(capture, "has_compiler", lambda: False)


@pytest.mark.slow
def test_traps_a_parameter_without_dims_in_float64_compiled():
    # torch 2.13 loses in-place updates of such inputs; ours are part of a flat tensor
    assert_same(shared, rows(12), {}, "compiled")


@pytest.mark.slow
def test_traps_two_fields_that_are_one_tensor():
    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(batch.y.new_zeros(()), 2.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu * batch.x, 1.0))

    fields = {"y": Field(("row",), "observed"), "x": Field(("row",))}
    data = np.linspace(0.5, 2.0, 12)
    one = torch.as_tensor(data)
    template = replace(shared, model=model, fields=fields)
    assert_same(template, {"y": data, "x": data}, {}, "captured")
    graph = capture.captured(lambda a, b: (a * 2 + b,), [one, one])
    assert torch.equal(graph(one, torch.zeros(12))[0], 2 * one)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.1))
        self.again = self.loc
        self.inner = nn.Module()
        self.inner.loc = self.loc


def tied_guide(batch, prior, nets):
    pyro.sample("mu", dist.Normal((nets.loc + nets.again + nets.inner.loc) / 2, nets.log_scale.exp()))


@pytest.mark.slow
def test_traps_tied_parameters():
    assert_same(replace(shared, guide=tied_guide, nets=lambda *_: Tied()), rows(12), {}, "captured")


@pytest.mark.slow
def test_traps_a_batch_of_another_size():
    knobs = {"rows_per_batch": 3, "rows_per_batch_max": 12, "grow_below": 1.0}
    assert_same(shared, rows(14), knobs, "captured")


def engine(template, **knobs):
    template = replace(template)  # a copy has nothing compiled
    fitted = fit(template, rows(12), plan(steps=40, log_every=10, compile="on", **knobs), progress=False)
    return fitted.provenance["fit"]["engine"]


def test_traps_a_decision_on_a_sample_is_refused():
    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(batch.y.new_zeros(()), 2.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0))

    told = engine(replace(shared, model=model))
    assert told["steps"] == "eager"
    assert "value of a tensor" in told["why"]


def test_traps_a_refused_capture_leaves_the_random_stream_where_it_was():
    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(batch.y.new_zeros(()), 2.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0))

    assert_same(replace(shared, model=model), rows(12), {}, "eager")


@pytest.mark.parametrize("method", ["dopri5", "rk4"])  # torchdiffeq checks its times by their values
def test_traps_a_solver_inside_is_refused(method):
    times = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)

    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(batch.y.new_zeros(()), 2.0))
        end = odeint(lambda t, x: -mu * x, batch.y.new_ones(1), times, method=method)[-1]
        with batch.plate("row"):
            batch.observe("y", dist.Normal(end, 1.0))

    told = engine(replace(shared, model=model))
    assert told["steps"] == "eager"
    assert "value of a tensor" in told["why"]


def test_traps_a_parameter_outside_of_nets_is_refused():
    hidden = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def guide(batch, prior, nets):
        pyro.sample("mu", dist.Normal(nets.loc + hidden, nets.log_scale.exp()))

    def fresh(sizes, prior):
        module = Shared()
        module.hidden = hidden
        return module

    told = engine(replace(shared, guide=guide, nets=fresh))
    assert told["steps"] == "eager"
    assert "nets" in told["why"]


@pytest.mark.slow
def test_traps_a_number_outside_that_changes_is_told(monkeypatch):
    monkeypatch.setattr(stepper, "CHECK_AFTER", 10)
    outside = {"width": 1.0, "calls": 0}

    def model(batch, prior, nets):
        mu = pyro.sample("mu", dist.Normal(batch.y.new_zeros(()), 2.0))
        with batch.plate("row"):
            batch.observe("y", dist.Normal(mu, outside["width"]))

    class Changes:
        def write(self, entry):
            outside["width"] = 2.0

        def close(self):
            pass

    template = replace(shared, model=model)
    with pytest.raises(FitError, match="has changed since the fit began"):
        fit(template, rows(12), plan(steps=60, log_every=10, compile="on"), record=Changes(), progress=False)


@pytest.mark.slow
def test_a_pair_that_is_not_captured_says_why_in_its_history():
    told = engine(shared)
    assert told["steps"] == "captured"
    assert told["at_once"] == 10
