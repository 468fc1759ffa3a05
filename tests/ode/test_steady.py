"""Steady states against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scivi.errors import DataError
from scivi.ode import Reason, equations, mass_action, steady


def double(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_an_equilibrium_keeps_its_total_and_has_its_gradients():
    """A <-> B: A = n b / (a + b), and the gradients of that."""
    system = mass_action([(0,), (1,)], np.array([[-1.0, 1.0], [1.0, -1.0]]))
    k = torch.tensor([[2.0, 3.0], [1e-3, 5.0]], dtype=torch.float64).requires_grad_(True)
    y0 = torch.tensor([[1.0, 0.5], [4.0, 0.0]], dtype=torch.float64).requires_grad_(True)
    found = steady(system, k, y0, double(1.0, 1.0)[None])
    truth = y0.sum(1) * k[:, 1] / k.sum(1)
    np.testing.assert_allclose(found.values[:, 0, 0].detach().numpy(), truth.detach().numpy(), rtol=1e-12)
    ours, exact = (torch.autograd.grad(x.sum(), (k, y0)) for x in (found.values[:, 0, 0], truth))
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-10)


def test_synthesis_and_decay_need_no_total():
    system = equations(lambda t, y, p: p[:, :1] - p[:, 1:] * y**2, ["y"], ["in", "out"])
    p = torch.tensor([[8.0, 2.0]], dtype=torch.float64).requires_grad_(True)
    found = steady(system, p, double(1.0)[None])
    np.testing.assert_allclose(found.values.detach().numpy(), 2.0, rtol=1e-12)
    (slope,) = torch.autograd.grad(found.values.sum(), p)
    np.testing.assert_allclose(slope.numpy(), [[0.125, -0.5]], rtol=1e-10)


def test_what_grows_or_turns_for_ever_fails_alone():
    """y' = p y rests at 0 for p < 0 alone; an oscillator never does."""
    system = equations(lambda t, y, p: p * y, ["y"], ["p"])
    p = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    found = steady(system, p, torch.ones(2, 1, dtype=torch.float64))
    assert found.ok.tolist() == [True, False]
    turning = equations(lambda t, y, p: torch.stack([p[:, 0] * y[:, 1], -y[:, 0]], 1), ["x", "v"], ["k"])
    never = steady(turning, double(1.0)[None], double(1.0, 0.0)[None], horizon=50.0)
    assert never.reason.tolist() == [Reason.NOT_AT_REST]
    assert never.failures() == {"came to no steady state": 1}
    assert torch.isnan(never.values).all()


def test_what_has_no_steady_state_is_refused():
    timed = equations(lambda t, y, p: -y * t[:, None], ["y"], ["p"], timed=True)
    with pytest.raises(DataError, match="depends on time"):
        steady(timed, double(1.0)[None], double(1.0)[None])
    system = equations(lambda t, y, p: -y, ["a", "b"], ["p"])
    with pytest.raises(DataError, match="2 totals are not independent"):
        steady(system, double(1.0)[None], double(1.0, 1.0)[None], double(1.0, 1.0).expand(2, -1))
