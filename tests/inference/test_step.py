from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.step import diagnose, random_states, restore_random
from tests.inference.conjugate import plan
from tests.inference.test_loop import limited

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def needs(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, whose own random stream is meant")
    return torch.device(device)


@pytest.mark.parametrize("name", DEVICES)
def test_the_streams_of_cpu_and_device_go_back_to_where_they_stood(name):
    device = needs(name)

    def drawn() -> list[list[float]]:
        return [torch.rand(4, device=d).tolist() for d in ("cpu", device)]

    with torch.random.fork_rng():
        states = random_states(device)
        first, second = drawn(), drawn()
        restore_random(states)
        assert drawn() == first != second


def wide_guide(batch, prior, nets):
    pyro.sample("mu", dist.Normal(nets.loc, 1.0))


cliff = replace(limited, guide=wide_guide)
# The draw of the bad step exceeds a random share of the limits: only that very draw tells the same rows.
DATA = {"y": np.zeros(200), "limit": np.linspace(0.5, 4.0, 200)}


@pytest.mark.parametrize("name", DEVICES)
def test_the_rows_of_a_divergence_are_those_of_its_own_draw(name):
    device = needs(name)
    knobs = replace(plan(steps=50, estimator="trace", lr=1e-9), device=name)
    state = begin(cliff, open_data(cliff, DATA), knobs)
    seen: list[float] = []

    def watched(batch, prior, nets):
        seen.append(float(pyro.sample("mu", dist.Normal(nets.loc, 1.0)).detach()))

    state.bound = replace(state.bound, template=replace(cliff, guide=watched))
    with state.sampling():
        error = diagnose(state, prepare(state.bound, state.bound.example, knobs), knobs, 50)
    assert error.site == "y"
    assert seen[-1] == seen[-2] > 0.5  # the draw of the step, and the one by which the rows were found
    assert error.rows == tuple(np.flatnonzero(DATA["limit"] < seen[-1]))
    assert state.bound.nets.own.loc.device.type == device.type
