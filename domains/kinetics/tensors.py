"""Expressions of sympy as functions of tensors that gradients and ``torch.func`` can follow."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, cast

import numpy as np
import sympy
import torch
from sympy import Expr, Symbol
from sympy.logic.boolalg import BooleanAtom
from torch import Tensor

from domains.kinetics.formulas import FLOOR, Power, symbol
from scivi.errors import Unsupported

_HARMLESS = (0.6180339887, 0.1, 1.3, 3.7)  # places where a branch not taken may be evaluated (our choice)

_CIRCULAR = ("sin", "cos", "tan", "sinh", "cosh", "tanh")
_UNARY: dict[Any, Callable[[Tensor], Tensor]] = {  # what sympy and torch call alike
    getattr(sympy, name): getattr(torch, name)
    for name in ("exp", "log", *_CIRCULAR, *(f"a{name}" for name in _CIRCULAR))
}
_COMPARISONS: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.StrictLessThan: operator.lt,
    sympy.LessThan: operator.le,
    sympy.StrictGreaterThan: operator.gt,
    sympy.GreaterThan: operator.ge,
    sympy.Equality: operator.eq,
    sympy.Unequality: operator.ne,
}


def function(
    expressions: Sequence[Expr], names: Sequence[str]
) -> Callable[[Sequence[Tensor]], list[Tensor | float]]:
    """Make one function of many expressions; what they share is worked out once.

    Args:
        expressions: in symbols of the names.
        names: of the arguments.

    Returns:
        Of one tensor for each name, of shapes that go together: a tensor for each expression, or a number
        where it is constant. A branch that is not taken is evaluated at harmless numbers, so that neither
        its value nor its gradient can be NaN.

    Raises:
        Unsupported: a function that torch has not.
    """
    tape = _Tape(names)
    results = [tape.place(each, tape.outermost) for each in expressions]
    steps = tuple(tape.steps)

    def evaluate(columns: Sequence[Tensor]) -> list[Tensor | float]:
        values: list[Any] = list(columns)
        for operation, places in steps:
            values.append(operation(*[values[k] for k in places]))
        return [values[k] for k in results]

    return evaluate


def stack(values: Sequence[Tensor | float], like: Tensor) -> Tensor:
    """Numbers and tensors side by side in a last dim, each as large as they and ``like`` together."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors and len(tensors) == len(values) and all(each.shape == like.shape for each in tensors):
        return torch.stack(tensors, -1)
    shape = torch.broadcast_shapes(like.shape, *(value.shape for value in tensors))
    if not values:
        return like.new_zeros((*shape, 0))
    return torch.stack(
        [v.expand(shape) if isinstance(v, Tensor) else like.new_full(shape, v) for v in values], -1
    )


class Constants:
    """Arrays that go where the states are, once for each device."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.kept: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, y: Tensor) -> tuple[Tensor, ...]:
        """The arrays as tensors on the device of y."""
        if y.device not in self.kept:
            self.kept[y.device] = tuple(torch.tensor(each, device=y.device) for each in self.arrays)
        return self.kept[y.device]


class _Tape:
    """Operations in the order in which they are carried out; the arguments hold the first places.

    A scope says where the symbols are. There is another one within a branch, of guarded symbols.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.n_arguments = len(names)
        self.steps: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
        self.outermost: Mapping[Symbol, int] = {symbol(name): k for k, name in enumerate(names)}
        self.known: dict[tuple[Any, tuple[int, ...]], int] = {}

    def add(self, operation: Callable[..., Any], *places: int) -> int:
        self.steps.append((operation, places))
        return self.n_arguments + len(self.steps) - 1

    def place(self, found: Any, scope: Mapping[Symbol, int]) -> int:
        """Where the value of an expression or condition will be."""
        if isinstance(found, Symbol):
            return scope[found]
        used = tuple(scope[s] for s in sorted(found.free_symbols, key=str))
        key = (found, used)
        if key not in self.known:
            self.known[key] = self.carried_out(found, scope)
        return self.known[key]

    def carried_out(self, found: Any, scope: Mapping[Symbol, int]) -> int:
        if not found.free_symbols:
            value = bool(found) if isinstance(found, BooleanAtom) else float(found)
            return self.add(lambda: value)
        if isinstance(found, sympy.Piecewise):
            return self.chosen(found, scope)
        if isinstance(found, sympy.Add):
            return self.sum(found, scope)
        if isinstance(found, sympy.Mul):
            return self.product(found, scope)
        places = [self.place(each, scope) for each in found.args]
        if isinstance(found, sympy.Pow) and found.exp.is_Integer:
            return self.add(_whole_power(int(found.exp)), places[0])
        if isinstance(found, Power | sympy.Pow):
            return self.add(_power, *places)
        if found.func in _COMPARISONS:
            return self.add(_COMPARISONS[found.func], *places)
        if isinstance(found, sympy.And | sympy.Or):
            join = operator.and_ if isinstance(found, sympy.And) else operator.or_
            return reduce(lambda a, b: self.add(join, a, b), places)
        if isinstance(found, sympy.Not):
            return self.add(torch.logical_not, *places)
        if isinstance(found, sympy.ITE):
            return self.add(lambda c, yes, no: (c & yes) | (~c & no), *places)
        if found.func in _UNARY:
            return self.add(_UNARY[found.func], *places)
        raise Unsupported(f'torch has no "{found.func.__name__}", which is in {found}.')

    def sum(self, found: Any, scope: Mapping[Symbol, int]) -> int:
        first, *others = sorted(found.args, key=lambda each: each.could_extract_minus_sign())
        place = self.place(first, scope)
        for each in others:
            if each.could_extract_minus_sign():
                place = self.add(operator.sub, place, self.place(-each, scope))
            else:
                place = self.add(operator.add, place, self.place(each, scope))
        return place

    def product(self, found: Any, scope: Mapping[Symbol, int]) -> int:
        below = [1 / each for each in found.args if _is_divisor(each)]
        if below:
            above = sympy.Mul(*(each for each in found.args if not _is_divisor(each)))
            return self.add(operator.truediv, self.place(above, scope), self.place(sympy.Mul(*below), scope))
        factors = found.args
        if factors[0] == -1:
            return self.add(operator.neg, self.place(sympy.Mul(*factors[1:]), scope))
        return reduce(
            lambda a, b: self.add(operator.mul, a, b), [self.place(each, scope) for each in factors]
        )

    def chosen(self, found: Any, scope: Mapping[Symbol, int]) -> int:
        """The first piece whose condition holds; NaN if none does."""
        pieces: list[tuple[int | None, int]] = []
        before = sympy.false
        for value, condition in found.args:
            active = sympy.And(condition, sympy.Not(before))
            inner = self.guarded(value, self.place(active, scope), scope) if _is_risky(value) else scope
            where = None if condition == sympy.true else self.place(condition, scope)
            pieces.append((where, self.place(value, inner)))
            before = sympy.Or(before, condition)
        where, place = pieces.pop()
        if where is not None:
            place = self.add(_choose, where, place, self.add(lambda: math.nan))
        for where, value in reversed(pieces):
            place = value if where is None else self.add(_choose, where, value, place)
        return place

    def guarded(self, value: Any, active: int, scope: Mapping[Symbol, int]) -> Mapping[Symbol, int]:
        """Symbols that are what they are where a piece is chosen, and harmless elsewhere."""
        inner = sorted(value.free_symbols, key=str)
        harmless = next((x for x in _HARMLESS if _is_finite_at(value, inner, x)), _HARMLESS[0])

        def guard(condition: Any, x: Tensor) -> Tensor:
            return torch.where(condition, x, harmless) if isinstance(condition, Tensor) else x

        return {**scope, **{s: self.add(guard, active, scope[s]) for s in inner}}


def _is_divisor(factor: Any) -> bool:
    return bool(factor.is_Pow and factor.exp.is_Integer and factor.exp < 0)


def _is_risky(value: Any) -> bool:
    """Whether a value may be infinite or NaN, or have such a derivative, at some finite number."""
    nodes = cast(Iterable[Any], sympy.preorder_traversal(value))
    return any(
        not (each.is_Symbol or each.is_number or each.is_Add or each.is_Mul)
        and not (each.is_Pow and each.exp.is_Integer and each.exp > 0)
        for each in nodes
    )


def _is_finite_at(value: Any, symbols: Sequence[Symbol], x: float) -> bool:
    at = value.xreplace({s: sympy.Float(x) for s in symbols})
    return bool(at.is_number and at.is_real and abs(at) < 1e100)


def _whole_power(exponent: int) -> Callable[[Tensor], Tensor]:
    if exponent == 2:
        return lambda x: x * x
    if exponent == -1:
        return torch.reciprocal
    return lambda x: torch.pow(x, exponent)


def _power(base: Any, exponent: Any) -> Tensor:
    return torch.pow(base.clamp_min(FLOOR) if isinstance(base, Tensor) else max(base, FLOOR), exponent)


def _choose(condition: Tensor, value: Any, otherwise: Any) -> Tensor:
    pair = [
        each if isinstance(each, Tensor) else torch.full_like(condition, each, dtype=torch.float64)
        for each in (value, otherwise)
    ]
    return torch.where(condition, *pair)
