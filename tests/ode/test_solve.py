"""Stiff problems against their published ends, and what a solution promises to a batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from stiff_problems import PROBLEMS, Problem, hires, robertson
from torch import Tensor

from scivi.errors import DataError, TemplateError, Unsupported
from scivi.ode import Reason, equations, mass_action, solve, stiffness
from scivi.ode.path import Tolerance, integrate
from scivi.ode.rodas import Step, outcome, stages, weights

ATOL = {"robertson": 1e-18, "hires": 1e-12, "pollu": 1e-22}  # far below each state that matters


def begun(problem: Problem, scatter: float = 0.0, size: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Coefficients (size, reaction) and states at the start (state,)."""
    return torch.tensor(problem.scattered(scatter, size, seed)), torch.tensor(problem.y0)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_stiff_reference_ends_are_reached(name):
    """At rtol 1e-5 an error of 1e-4 relative to each state is ten times what a step may add."""
    problem = PROBLEMS[name]()
    k, y0 = begun(problem)
    found = solve(problem.system(), k, y0, [problem.end], rtol=1e-5, atol=ATOL[name], method="rodas5p")
    assert found.ok.all()
    end = found.values[0, 0].numpy()
    np.testing.assert_allclose(end, problem.published, rtol=1e-4, atol=0)


def test_stiff_reference_between_the_steps():
    """Dense output on the way against Radau at 1e-11; its own order is four."""
    problem = hires()
    k, y0 = begun(problem)
    times = np.geomspace(0.01, problem.end, 40)
    found = solve(problem.system(), k, y0, torch.tensor(times), rtol=1e-6, atol=1e-10, method="rodas5p")
    truth = problem.radau(problem.k, times)
    np.testing.assert_allclose(found.values[0].numpy(), truth, rtol=1e-4, atol=1e-7)


def test_stiff_reference_order_is_five():
    """Fixed steps on HIRES up to t = 2, against steps an eighth as long."""
    problem = hires()
    system, (k, y0) = problem.system(), begun(problem)
    by = weights(y0)

    def end(n: int) -> Tensor:
        y, h = y0[None], torch.tensor([2.0 / n], dtype=torch.float64)
        for s in range(n):
            u, _ = stages(system, Step(h * s, y, h), k, by)
            y = y + outcome(u, by)[0]
        return y

    finest = end(1280)
    errors = [float((end(n) - finest).norm()) for n in (40, 80, 160)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert min(orders) >= 4.7


def forced(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """y' = -p (y - cos t): stiff for a large p, and depends on time."""
    return -p * (y - torch.cos(t).unsqueeze(-1))


def exact_forced(t: np.ndarray, p: float) -> np.ndarray:
    """Of y(0) = 0."""
    steady = p * (p * np.cos(t) + np.sin(t)) / (1 + p**2)
    return steady - p**2 / (1 + p**2) * np.exp(-p * t)


@pytest.mark.parametrize("method", ["rodas5p", "dopri5", "dopri8"])
def test_time_enters_the_right_hand_side(method):
    system = equations(forced, ["y"], ["p"], timed=True)
    p, times = torch.tensor([[50.0]], dtype=torch.float64), np.linspace(0.1, 5, 20)
    y0 = torch.zeros(1, dtype=torch.float64)
    found = solve(system, p, y0, torch.tensor(times), rtol=1e-7, atol=1e-9, method=method)
    assert found.method == method
    np.testing.assert_allclose(found.values[0, :, 0].numpy(), exact_forced(times, 50.0), atol=2e-6)


def test_an_input_that_jumps_is_met_exactly():
    """y' = -y + [t >= 1] + 3 [t >= 1.5]: with stops the steps end where it jumps."""

    def rate(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return -p * y + ((t >= 1.0).double() + 3.0 * (t >= 1.5).double()).unsqueeze(-1)

    system = equations(rate, ["y"], ["p"], timed=True)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    times = np.array([0.5, 1.0, 1.2, 1.5, 2.0, 4.0])
    truth = np.where(times > 1, 1 - np.exp(-(times - 1)), 0.0)
    truth = truth + np.where(times > 1.5, 3 * (1 - np.exp(-(times - 1.5))), 0.0)
    met = solve(system, one, zero, torch.tensor(times), stops=[1.0, 1.5], rtol=1e-8, method="rodas5p")
    np.testing.assert_allclose(met.values[0, :, 0].numpy(), truth, atol=1e-9)
    assert int(met.n_rejected) <= 4
    tried = met.n_steps + met.n_rejected
    blind = solve(system, one, zero, torch.tensor(times), rtol=1e-8, method="rodas5p")
    assert blind.n_steps + blind.n_rejected > 1.5 * tried


def scattered(problem: Problem, size: int, scatter: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    k, y0 = begun(problem, scatter, size, seed)
    return k, y0, torch.tensor(np.geomspace(problem.end * 1e-6, problem.end, 12))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_stiff_batch_entry_is_what_it_is_alone(name):
    problem = PROBLEMS[name]()
    k, y0, times = scattered(problem, 1024, 0.3)
    options = {"rtol": 1e-5, "atol": ATOL[name], "method": "rodas5p"}
    together = solve(problem.system(), k, y0, times, **options)
    for row in (0, 500, 1023):
        alone = solve(problem.system(), k[row : row + 1], y0, times, **options)
        assert int(alone.n_steps) == int(together.n_steps[row])
        # rounding, in matrix products of another shape, is relative to the largest of the states
        gap = (together.values[row] - alone.values[0]).abs()
        assert float(gap.max()) <= 1e-12 * float(y0.abs().max())


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_stiff_robust_against_rates_off_by_orders_of_magnitude(name):
    problem = PROBLEMS[name]()
    k, y0, times = scattered(problem, 128, 4.0, seed=1)
    found = solve(problem.system(), k, y0, times, rtol=1e-5, atol=1e-9, method="rodas5p")
    assert found.failures() == {}
    assert torch.isfinite(found.values).all()
    assert (found.values > -1e-4).all()  # of concentrations up to 1


def test_stiff_failure_is_a_result():
    """Of two entries one is through in five steps; the other keeps what it came to, and gives no gradient."""
    problem = robertson()
    k, y0 = begun(problem, size=2)
    k[1] = 1e-9
    k.requires_grad_(True)
    times = torch.tensor([1e-6, 10.0], dtype=torch.float64)
    found = solve(problem.system(), k, y0, times, max_steps=5, rtol=1e-6, method="rodas5p")
    assert found.ok.tolist() == [False, True]
    assert found.reason.tolist() == [Reason.MAX_STEPS, Reason.SOLVED]
    assert found.failures() == {"took more steps than max_steps": 1}
    assert torch.isfinite(found.values[0, 0]).all()
    assert torch.isnan(found.values[0, 1]).all()
    safe = torch.where(found.ok[:, None, None], found.values, 1.0)
    safe.square().sum().backward()
    assert torch.isfinite(k.grad).all()
    assert (k.grad[0] == 0).all()


def test_a_solution_that_leaves_the_numbers_is_told():
    """y' = y^2 is infinite at t = 1."""
    system = equations(lambda t, y, p: p * y**2, ["y"], ["p"])
    one = torch.ones(1, 1, dtype=torch.float64)
    found = solve(system, one, one[0], [0.5, 2.0], method="rodas5p")
    assert not found.ok.any()
    assert Reason(int(found.reason)) in (Reason.STEP_TOO_SMALL, Reason.NOT_FINITE)
    np.testing.assert_allclose(found.values[0, 0].numpy(), 2.0, rtol=1e-5)
    assert torch.isnan(found.values[0, 1]).all()


def test_what_starts_infinite_fails_alone():
    system = equations(lambda t, y, p: p * y, ["y"], ["p"])
    p = torch.tensor([[1.0], [torch.nan]], dtype=torch.float64)
    found = solve(system, p, torch.ones(1, dtype=torch.float64), [1.0], method="rodas5p")
    assert found.reason.tolist() == [Reason.SOLVED, Reason.NOT_FINITE]
    np.testing.assert_allclose(found.values[0].numpy(), math.e, rtol=1e-5)


def test_the_choice_goes_by_stiffness_and_is_told():
    """Robertson is stiff only later; an oscillator is not."""
    stiff = robertson()
    k, y0 = begun(stiff)
    assert stiffness(stiff.system(), k, y0, [1e4]) > 1e5
    assert solve(stiff.system(), k, y0, [1e4]).method == "rodas5p"
    turning = equations(lambda t, y, p: torch.stack([y[:, 1], -p[:, 0] * y[:, 0]], 1), ["x", "v"], ["k"])
    one = torch.ones(1, 1, dtype=torch.float64)
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = solve(turning, one, start, [1.0, 10.0])
    assert found.method == "dopri5"
    np.testing.assert_allclose(found.values[0, :, 0].numpy(), np.cos([1.0, 10.0]), atol=1e-4)
    assert stiffness(turning, one, start, [10.0]) == pytest.approx(10.0, rel=1e-6)


def test_entries_may_have_times_and_starts_of_their_own():
    system = equations(lambda t, y, p: -p * y, ["y"], ["p"])
    p, start = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([0.0, 1.0])
    times = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 4.0]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = solve(system, p, one, times, start=start.double(), rtol=1e-8, method="rodas5p")
    truth = np.exp([[0.0, -1.0, -2.0], [0.0, 0.0, -6.0]])
    np.testing.assert_allclose(found.values[..., 0].numpy(), truth, atol=1e-8)
    still = solve(system, p, one, [0.0], method="rodas5p")
    assert still.ok.all()
    assert (still.values == 1).all()


def test_bad_arguments_are_one_error():
    system = equations(lambda t, y, p: -p * y, ["y"], ["p"])
    with pytest.raises(DataError) as told:
        solve(system, torch.ones(2, 3), torch.ones(4), [1.0, 0.5], rtol=0.0)
    for words in ("p is (2, 3); the system has 1 parameters", "need float64", "y0 is (4,)", "out of order"):
        assert words in str(told.value)
    assert "rtol and atol" in str(told.value)
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(DataError, match="before the start"):
        solve(system, one, one[0], [-1.0, 2.0])
    with pytest.raises(Unsupported, match='no method "euler"'):
        solve(system, one, one[0], [1.0], method="euler")  # type: ignore[arg-type]


def test_bad_reactions_are_one_error():
    with pytest.raises(TemplateError) as told:
        mass_action([(0, 1, 1), (7,)], np.array([[1.0, np.nan], [0.0, 1.0]]))
    for words in ("reaction 0 has 3 reactants", "reaction 1 has reactants [7]; there are 2", "not finite"):
        assert words in str(told.value)


@pytest.mark.slow
def test_a_large_batch_is_solved_in_pieces():
    """More entries than are held at once, each as alone."""
    problem = hires()
    k, y0 = begun(problem, 0.1, 5000)
    times = torch.tensor([1.0, 10.0], dtype=torch.float64)
    found = solve(problem.system(), k, y0, times, method="rodas5p")
    tolerance = Tolerance(1e-6, torch.tensor(1e-10, dtype=torch.float64), 500)
    zero = torch.zeros(1, dtype=torch.float64)
    alone = integrate(problem.system(), k[4500:4501], y0[None], times[None], zero, None, tolerance)
    np.testing.assert_allclose(found.values[4500].numpy(), alone.values[0].numpy(), rtol=1e-10)
