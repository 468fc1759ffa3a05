"""Formulas against PEtab's own reader; functions of tensors where they could be NaN."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sympy
import torch

from domains.kinetics import formulas, tensors
from domains.kinetics.formulas import read, symbol
from scivi.errors import DataError, Unsupported

FORMULAS = [
    "lambda * E + I / S - beta * pi",
    "-x^2",
    "2^-3*4",
    "-x^2^y",
    "1 - 2^-x^2",
    "2*-x - -y/3/x",
    "(100 * x + 200*y)/(y + 1e-3)",
    "1.25e-07*exp(-k*time)",
    "x^n/(K^n + x^n)",
    "piecewise(k, x < 2, n, x < 4 && y > 1, K)",
    "piecewise(1, x < y || x > K && y < n, 2)",
    "piecewise(1, !(x < y), 0)",
    "log(x) + log10(y) + log2(x) + ln(y) + log(x, 3)",
    "min(x, y) + max(x, 2)*abs(x - y) + sign(y - x)",
    "sqrt(x)*arctan(y) + sech(x) + tanh(k) - pow(x, 3)",
    "arccot(x) + arccsc(1.5 + x) + arcsech(x/9) + arccoth(x + 1.1) + coth(x) + csch(x) + cot(x) + sec(x)",
    "arcsin(x/9) + arccos(x/9) + arctanh(x/9) + arcsinh(x) + arccosh(x + 1) + arcsec(x + 1) + arccsch(x)",
]


def columns(names: list[str], n: int = 7) -> dict[str, torch.Tensor]:
    values = np.random.default_rng(0).uniform(0.3, 3.0, (n, len(names)))
    return dict(zip(names, torch.tensor(values).unbind(-1), strict=True))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_means_what_petab_says_it_does(text):
    math = pytest.importorskip("petab.v1.math", reason="petab reads the reference")
    reference = math.sympify_petab(text)
    at = columns(sorted(s.name for s in reference.free_symbols))
    (ours,) = tensors.function([read(text)], list(at))(list(at.values()))
    for k in range(7):
        expected = float(reference.subs({s: float(at[s.name][k]) for s in reference.free_symbols}))
        found = float(ours[k]) if isinstance(ours, torch.Tensor) else ours
        assert found == pytest.approx(expected, rel=1e-12)  # rounding of a few operations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", '"b" is not expected there'),
        ("(a", '")" is missing before "the end"'),
        ("a +", '"the end" is not expected'),
        ("f(x)", 'there is no function "f"'),
        ("exp(a, b)", '"exp" cannot take 2 arguments'),
        ("piecewise(1, a)", "a value for all else"),
        ("piecewise(1, a > 0, 2, a < 0)", "a value for all else"),
        ("__import__('os')", "cannot be read at"),
        ("a.b", "cannot be read at"),
        ("1 / 0", "is not a finite real number"),
        ("log(0)", "is not a finite real number"),
        ("sqrt(-1)", "is not a finite real number"),
        ("nan", "cannot be the name"),
        (float("inf"), "is not a finite real number"),
    ],
)
def test_what_is_no_formula_is_refused(text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read(text)


def test_whole_numbers_stay_whole():
    assert read("x^2.0") == symbol("x") ** 2
    assert sympy.diff(read("x^2"), symbol("x")) == 2 * symbol("x")
    assert read("1e3") == 1000
    assert float(read("1.25e-07")) == 1.25e-07


def test_pieces_that_leave_nothing_out_need_no_value_for_all_else():
    (found,) = tensors.function([read("piecewise(1, a < 0, 2, a >= 0)")], ["a"])(
        [torch.tensor([-1.0, 0.0, 1.0])]
    )
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [1, 2, 2]


def test_names_are_found_and_put_in_place_of_others():
    assert formulas.names("piecewise(a*time, b > 1, exp(c))") == {"a", "b", "c", "time"}
    assert formulas.renamed("k1 * k10 + k1", {"k1": "kcat"}) == "kcat * k10 + kcat"


def derivatives(text: str, at: dict[str, float]) -> tuple[float, dict[str, float]]:
    """Value and gradient by torch."""
    leaves = {k: torch.tensor([v], dtype=torch.float64, requires_grad=True) for k, v in at.items()}
    (found,) = tensors.function([read(text)], list(at))(list(leaves.values()))
    assert isinstance(found, torch.Tensor)
    slopes = torch.autograd.grad(found.sum(), list(leaves.values()), allow_unused=True)
    return float(found.detach()), {k: 0.0 if g is None else float(g) for k, g in zip(at, slopes, strict=True)}


@pytest.mark.parametrize(
    ("text", "at", "value", "slope"),
    [
        ("x^n / (K^n + x^n)", {"x": 0.0, "n": 2.5, "K": 1.0}, 0.0, 0.0),
        ("x^n / (K^n + x^n)", {"x": -1e-12, "n": 2.5, "K": 1.0}, 0.0, 0.0),
        ("x^2 + x^3", {"x": 0.0}, 0.0, 0.0),
        ("piecewise(log(x), x > 0, 0)", {"x": -1.0}, 0.0, 0.0),
        ("piecewise(exp(-k * (x - 5)), x > 5, 2 * x)", {"x": 0.0, "k": 1e5}, 0.0, 2.0),
        ("piecewise(0, x < 1, piecewise(1 / (x - 2), x > 2, x))", {"x": 1.5}, 1.5, 1.0),
        ("min(x, 1 / x) + max(x, 0)", {"x": 0.5}, 1.0, 2.0),
        ("abs(x) * sign(x)", {"x": -2.0}, -2.0, 1.0),
    ],
)
def test_values_and_gradients_are_finite_where_a_formula_could_break(text, at, value, slope):
    found, slopes = derivatives(text, at)
    assert found == pytest.approx(value, abs=1e-12)  # FLOOR to the power of 2.5
    assert slopes["x"] == pytest.approx(slope, abs=1e-12)
    assert all(np.isfinite(each) for each in slopes.values())


def test_the_derivative_of_a_power_has_no_division_by_its_base():
    slope = sympy.diff(read("x^n"), symbol("x"))
    found = tensors.function([slope], ["x", "n"])(
        [torch.zeros(2, dtype=torch.float64), torch.tensor([2.0, 1.5])]
    )
    assert torch.isfinite(found[0]).all()  # type: ignore[arg-type]
    assert read("10^x").xreplace({symbol("x"): sympy.Integer(2)}) == 100


def test_what_is_shared_is_worked_out_once():
    function = tensors.function([read("exp(x) + y"), read("exp(x) * y"), read("exp(x)")], ["x", "y"])
    steps = next(c.cell_contents for c in function.__closure__ if isinstance(c.cell_contents, tuple))  # type: ignore
    assert len(steps) == 3


# torch's own: what it loads for jvp is deprecated by it
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_functions_can_be_followed_by_torch_func():
    text = ["piecewise(x^n, time < 3, log(x) * n)", "x * n / (1 + x)", "2"]
    function = tensors.function([read(each) for each in text], ["time", "x", "n"])
    time, x, n = torch.linspace(0, 5, 6).double(), torch.rand(6).double() + 0.1, torch.rand(6).double() + 1

    def one(time: torch.Tensor, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return tensors.stack(function([time, x, n]), time)

    assert torch.equal(torch.func.vmap(one)(time, x, n), one(time, x, n))
    _, moved = torch.func.jvp(lambda x: one(time, x, n), (x,), (torch.ones_like(x),))
    h = 1e-6
    by_hand = (one(time, x + h, n) - one(time, x - h, n)) / (2 * h)
    torch.testing.assert_close(moved, by_hand, rtol=1e-6, atol=1e-6)  # h^2, and rounding / h


def test_a_function_that_torch_has_not_is_refused_by_name():
    with pytest.raises(Unsupported, match="LambertW"):
        tensors.function([sympy.LambertW(symbol("x"))], ["x"])


def test_no_values_stack_to_an_empty_dim():
    assert tensors.stack([], torch.zeros(4, 2)).shape == (4, 2, 0)
