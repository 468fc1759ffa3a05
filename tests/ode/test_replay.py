"""Gradients of solutions: against autograd through the same steps, finite differences, and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stiff_problems import PROBLEMS, Problem, hires, played_again
from torch import Tensor

from scivi.ode import equations, replay, sensitivities, solve
from scivi.ode.path import Path, Tolerance, integrate

OBSERVED = 7
ATOL = {"robertson": 1e-12, "hires": 1e-10, "pollu": 1e-14}


def prepared(problem: Problem, size: int) -> tuple[Tensor, Tensor, Tensor, Path]:
    k, y0 = torch.tensor(problem.scattered(0.3, size)), torch.tensor(problem.y0)
    times = torch.tensor(np.geomspace(problem.end * 1e-7, problem.end * 1e-3, OBSERVED)).expand(size, -1)
    tolerance = Tolerance(1e-6, torch.tensor(1e-12, dtype=torch.float64), 500)
    start = torch.zeros(size, dtype=torch.float64)
    path = integrate(problem.system(), k, y0.expand(size, -1), times, start, None, tolerance)
    return k, y0.expand(size, -1).clone(), times, path


def close(found: Tensor, truth: Tensor, rel: float) -> bool:
    """Within a share of the gradient's length, entry by entry of the batch."""
    return bool(((found - truth).norm(dim=-1) <= rel * truth.norm(dim=-1)).all())


@pytest.mark.parametrize("way", ["_at_once", "_step_by_step"])
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_stiff_gradient_is_that_of_autograd_through_the_steps(name, way):
    """1e-10: rounding times the condition of the stages, whose weights reach 165."""
    problem = PROBLEMS[name]()
    system = problem.system()
    k, y0, _, path = prepared(problem, 4)
    k, y0 = k.requires_grad_(True), y0.requires_grad_(True)
    values = played_again(system, k, y0, path)
    np.testing.assert_allclose(values.detach().numpy(), path.values.numpy(), rtol=1e-9, atol=1e-12)
    seen = torch.rand(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # each coefficient and state by its own size
    truth = torch.autograd.grad((values * seen / y0.detach().abs().max()).sum(), (k, y0))
    with torch.no_grad():
        found = getattr(replay, way)(system, k, path, seen / y0.abs().max())
    assert close(found[0] * k, truth[0] * k, 1e-10)
    assert close(found[1], truth[1], 1e-10)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_stiff_gradient_forward_is_the_same(name):
    problem = PROBLEMS[name]()
    k, _, _, path = prepared(problem, 3)
    system = problem.system()
    of_p, of_y = replay.sensitivities(system, k, path)
    seen = torch.rand(path.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = replay.gradient(system, k, path, seen)
    assert close(torch.einsum("bti,btip->bp", seen, of_p) * k, found[0] * k, 1e-10)
    assert close(torch.einsum("bti,btip->bp", seen, of_y), found[1], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PROBLEMS))
def test_stiff_gradient_against_finite_differences(name):
    """At a tolerance so tight that the steps' own choice does not matter."""
    problem = PROBLEMS[name]()
    k, y0 = torch.tensor(problem.scattered()), torch.tensor(problem.y0)
    times = torch.tensor(np.geomspace(problem.end * 1e-9, problem.end * 1e-6, 5))
    weight = 1 / torch.tensor(problem.radau(problem.k, times.numpy())).abs().amax(0).clamp_min(1e-30)

    def value(log_k: Tensor) -> Tensor:
        found = solve(
            problem.system(),
            log_k.exp(),
            y0,
            times,
            rtol=1e-10,
            atol=1e-20,
            max_steps=20000,
            method="rodas5p",
        )
        return (found.values * weight).sum()

    log_k = k.log().requires_grad_(True)
    (slope,) = torch.autograd.grad(value(log_k), log_k)
    towards = torch.tensor(np.random.default_rng(3).standard_normal(k.shape))
    h = 1e-3
    with torch.no_grad():
        near, far = ((value(log_k + e * towards) - value(log_k - e * towards)) / (2 * e) for e in (h, 2 * h))
    difference = float((4 * near - far) / 3)  # Richardson: an error of h^4
    assert float((slope * towards).sum()) == pytest.approx(difference, rel=1e-5)


def test_stiff_gradient_of_equations_without_a_closed_form():
    """The generic system gives the derivatives that mass action has in closed form."""
    problem = hires()
    k, _, _, path = prepared(problem, 3)
    seen = torch.rand(path.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = replay.gradient(problem.system(), k, path, seen)
    for way in (replay._at_once, replay._step_by_step):
        with torch.no_grad():
            found = way(problem.generic(), k, path, seen)
        for a, b in zip(found, truth, strict=True):
            assert close(a, b, 1e-10)


def test_stiff_gradient_where_time_enters_and_f_jumps():
    def rate(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        push = torch.sin(p[:, 1] * t) + (t >= 0.7).double()
        return torch.stack([-p[:, 0] * y[:, 0] * y[:, 1] + push, y[:, 0] - y[:, 1] ** 2], 1)

    system = equations(rate, ["a", "b"], ["p", "q"], timed=True)
    p = torch.tensor([[30.0, 2.0], [3.0, 5.0]], dtype=torch.float64).requires_grad_(True)
    y0 = torch.tensor([[1.0, 0.5], [0.3, 2.0]], dtype=torch.float64).requires_grad_(True)
    times, stops = torch.tensor([[0.3, 0.7, 1.5]] * 2, dtype=torch.float64), torch.tensor([[0.7]] * 2)
    tolerance = Tolerance(1e-6, torch.tensor(1e-9, dtype=torch.float64), 500)
    start = torch.zeros(2, dtype=torch.float64)
    path = integrate(system, p, y0, times, start, stops.double(), tolerance)
    seen = torch.rand(path.values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth = torch.autograd.grad((played_again(system, p, y0, path) * seen).sum(), (p, y0))
    for way in (replay._at_once, replay._step_by_step):
        with torch.no_grad():
            found = way(system, p, path, seen)
        assert close(found[0], truth[0], 1e-10)
        assert close(found[1], truth[1], 1e-10)
    found, of_p, of_y0 = sensitivities(
        system, p.detach(), y0.detach(), times, stops=stops.double(), rtol=1e-6, atol=1e-9
    )
    assert found.ok.all()
    assert close(torch.einsum("bti,btip->bp", seen, of_p), truth[0], 1e-10)
    assert close(torch.einsum("bti,btip->bp", seen, of_y0), truth[1], 1e-10)


def test_gradient_in_pieces_is_the_same(monkeypatch):
    problem = hires()
    k, _, _, path = prepared(problem, 6)
    seen = torch.ones_like(path.values)
    whole = replay.gradient(problem.system(), k, path, seen)
    monkeypatch.setattr(replay, "NUMBERS", 4 * 8 * len(path.steps.h) * 64 * 2)
    pieces = replay.gradient(problem.system(), k, path, seen)
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12)


@pytest.mark.slow
def test_stiff_gradient_can_be_differentiated_again():
    """The Hessian of a sum of squares, against autograd through the steps; differences are good to 1e-6."""
    problem = hires()
    k, y0 = torch.tensor(problem.scattered(0.3, 2)), torch.tensor(problem.y0)
    times = torch.tensor([0.2, 1.0], dtype=torch.float64)
    system, options = problem.system(), {"rtol": 1e-3, "atol": 1e-7}
    tolerance = Tolerance(1e-3, torch.tensor(1e-7, dtype=torch.float64), 500)
    zero = torch.zeros(2, dtype=torch.float64)
    path = integrate(system, k, y0.expand(2, -1), times.expand(2, -1), zero, None, tolerance)

    def solved(log_k: Tensor) -> Tensor:
        return solve(system, log_k.exp(), y0, times, method="rodas5p", **options).values.square().sum()

    def through(log_k: Tensor) -> Tensor:
        return played_again(system, log_k.exp(), y0.expand(2, -1), path).square().sum()

    found, truth = (
        torch.autograd.functional.hessian(f, k.log(), vectorize=False).flatten(0, 1).flatten(1)
        for f in (solved, through)
    )
    assert float((found - truth).norm()) <= 1e-6 * float(truth.norm())
