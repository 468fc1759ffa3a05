"""Formulas as text in the syntax of PEtab, read into expressions of sympy.

Text is read by a grammar and never evaluated as code. Every symbol is real. What is not smooth (min, max,
abs, sign) is read as a choice between smooth pieces, so that one rule for choices serves all of them.

References:
    PEtab 1.0 and 2.0, "Math expressions syntax", petab.readthedocs.io.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, reduce
from typing import Any

import sympy
from sympy import Expr, Piecewise, Symbol

from scivi.errors import DataError

# Least base of a power that is no whole number (our choice: its tenth power is still a float64).
FLOOR = 1e-30

_TOKEN = re.compile(
    r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[A-Za-z_]\w*|&&|\|\||[<>=!]=|\*\*|[-+*/^()<>!,])", re.ASCII
)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_LEVELS = {"||": 1, "&&": 1, **dict.fromkeys(("==", "!=", "<", ">", "<=", ">="), 2)}
_LEVELS |= {"+": 3, "-": 3, "*": 4, "/": 4, "^": 6, "**": 6}
_UNARY = 5
RESERVED = frozenset({"time", "true", "false", "inf", "nan"})


class Power(sympy.Function):
    """max(base, FLOOR) ** exponent, for exponents that are no whole numbers.

    It is finite and has finite derivatives at base 0 and below, where a step of a solver may end.
    """

    nargs = 2
    is_real = True
    is_nonnegative = True

    @classmethod
    def eval(cls, base: Any, exponent: Any) -> Any:
        """A power of sympy's own where the exponent is whole, a number where both are numbers."""
        if exponent.is_Float:
            exponent = number(float(exponent))
        if exponent.is_Integer:
            return base**exponent
        if base.is_number and exponent.is_number:
            if float(base) < 0:
                return sympy.nan
            return sympy.Float(max(float(base), FLOOR)) ** sympy.Float(float(exponent))
        return None

    def fdiff(self, argindex: int = 1) -> Any:
        """d/d base without a division by base; d/d exponent."""
        base, exponent = (each for each in list[Any](self.args))
        return exponent * Power(base, exponent - 1) if argindex == 1 else self * sympy.log(base)


def symbol(name: str) -> Symbol:
    """The symbol that a name is read as."""
    return Symbol(name, real=True)


TIME = symbol("time")


def number(value: float) -> Any:
    """A number as sympy keeps it: a whole one exactly, so that exponents and derivatives stay whole."""
    whole = value == int(value) if abs(value) < 2**53 else False
    return sympy.Integer(int(value)) if whole else sympy.Float(value)


@lru_cache(maxsize=4096)
def read(formula: str | float) -> Expr:
    """The expression that a formula says.

    Operators, by how tightly they bind: ``^`` (to the right; ``**`` is the same), unary ``-`` and ``!``,
    ``* /``, ``+ -``, comparisons, ``&& ||``. Functions: exp, ln, log (natural, or log(x, base)), log10, log2,
    sqrt, abs, sign, min, max, pow, the trigonometric and hyperbolic ones with their inverses (arcsin,
    arctanh, ...), and piecewise(value, condition, ..., otherwise), which may lack the last if the conditions
    leave nothing out.

    Raises:
        DataError: it is no formula, or no finite real number.

    Example:
        >>> read("k * A^2 / (K + A)")
        A**2*k/(A + K)
        >>> read("piecewise(dose, time < 10, 0)")
        Piecewise((dose, time < 10), (0, True))
    """
    if not isinstance(formula, str):
        found = number(float(formula)) if abs(formula) < float("inf") else sympy.nan
    else:
        tokens = [*_tokens(formula), ""]
        try:
            found = _as_number(_expression(tokens, 0, formula))
        except (TypeError, ZeroDivisionError) as error:
            raise DataError(f'"{formula}" cannot be read: {error}.') from None
        if tokens[0]:
            raise DataError(f'"{formula}" cannot be read: "{tokens[0]}" is not expected there.')
    if not is_finite(found):
        raise DataError(f'"{formula}" is not a finite real number.')
    return found


def is_finite(found: Any) -> bool:
    """Whether an expression has no part that is infinite, not real, or not a number."""
    return not found.has(sympy.nan, sympy.oo, sympy.zoo, -sympy.oo, sympy.I)


def names(formula: str | float) -> set[str]:
    """The names that a formula uses."""
    return {each.name for each in read(formula).free_symbols if isinstance(each, Symbol)}


def renamed(formula: str, new: Mapping[str, str]) -> str:
    """A formula with names put in place of others, as text."""
    return _NAME.sub(lambda found: new.get(found.group(), found.group()), formula)


def within(formulas: Mapping[str, Any], values: Mapping[str, Any]) -> Callable[[str], Any]:
    """Look up a name's expression with every name that has one replaced, however deep.

    Args:
        formulas: expressions of names, in other names.
        values: expressions that stand as they are, and come first.

    Raises:
        DataError: from the function returned, if a name depends on itself.
    """
    found: dict[str, Any] = dict(values)
    under_way: list[str] = []

    def value(name: str) -> Any:
        if name not in found:
            if name in under_way:
                circle = " -> ".join([*under_way[under_way.index(name) :], name])
                raise DataError(f"formulas go in a circle: {circle}")
            under_way.append(name)
            formula = formulas[name]
            inner = [s for s in formula.free_symbols if s.name in formulas or s.name in values]
            found[name] = formula.xreplace({s: value(s.name) for s in inner})
            under_way.pop()
        return found[name]

    return value


def _tokens(text: str) -> list[str]:
    found, place, text = [], 0, text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise DataError(f'"{text}" cannot be read at "{text[place : place + 12]}".')
        found.append(match.group(1))
        place = match.end()
    return found


def _expression(tokens: list[str], level: int, text: str) -> Any:
    """Read operands joined by operators that bind at least so tightly."""
    left = _operand(tokens, text)
    while (binding := _LEVELS.get(tokens[0], -1)) >= max(level, 1):
        operator = tokens.pop(0)
        right = _expression(tokens, binding if binding == _LEVELS["^"] else binding + 1, text)
        left = _joined(operator, left, right)
    return left


def _operand(tokens: list[str], text: str) -> Any:
    token = tokens.pop(0)
    if token in {"-", "+", "!"}:
        inner = _expression(tokens, _UNARY, text)
        if token == "!":
            return sympy.Not(_as_condition(inner))
        return -_as_number(inner) if token == "-" else _as_number(inner)
    if token == "(":
        inner = _expression(tokens, 0, text)
        _expect(tokens, ")", text)
        return inner
    if token[:1].isdigit() or token.startswith("."):
        return number(float(token))
    if not _NAME.fullmatch(token):
        raise DataError(f'"{text}" cannot be read: "{token or "the end"}" is not expected there.')
    if tokens[0] == "(":
        tokens.pop(0)
        return _called(token, list(_arguments(tokens, text)), text)
    if token in {"true", "false"}:
        return sympy.true if token == "true" else sympy.false
    if token.lower() in RESERVED - {"time"}:
        raise DataError(f'"{text}" cannot be read: "{token}" cannot be the name of a quantity.')
    return symbol(token)


def _arguments(tokens: list[str], text: str) -> Iterable[Any]:
    yield _expression(tokens, 0, text)
    while tokens[0] == ",":
        tokens.pop(0)
        yield _expression(tokens, 0, text)
    _expect(tokens, ")", text)


def _expect(tokens: list[str], token: str, text: str) -> None:
    if tokens[0] != token:
        raise DataError(f'"{text}" cannot be read: "{token}" is missing before "{tokens[0] or "the end"}".')
    tokens.pop(0)


def _joined(operator: str, left: Any, right: Any) -> Any:
    if operator in {"&&", "||"}:
        joined = sympy.And if operator == "&&" else sympy.Or
        return joined(_as_condition(left), _as_condition(right))
    return _ARITHMETIC[operator](_as_number(left), _as_number(right))


def _called(name: str, arguments: list[Any], text: str) -> Any:
    if name == "piecewise":
        values = [_as_number(each) for each in arguments[::2]]
        conditions = [*map(_as_condition, arguments[1::2]), *[sympy.true] * (len(arguments) % 2)]
        if sympy.simplify(sympy.Or(*conditions)) != sympy.true:
            raise DataError(f'"{text}": piecewise needs value, condition, ..., and a value for all else.')
        return Piecewise(*zip(values, conditions, strict=True))
    if name not in _FUNCTIONS:
        raise DataError(
            f'"{text}": there is no function "{name}". There are {", ".join(sorted(_FUNCTIONS))}.'
        )
    counts, function = _FUNCTIONS[name]
    if len(arguments) not in counts:
        raise DataError(f'"{text}": "{name}" cannot take {len(arguments)} arguments.')
    return function(*map(_as_number, arguments))


def _as_number(found: Any) -> Any:
    if isinstance(found, Expr):
        return found
    return Piecewise((sympy.Integer(1), found), (sympy.Integer(0), True))


def _as_condition(found: Any) -> Any:
    return sympy.Ne(found, 0) if isinstance(found, Expr) else found


def _largest(*values: Any) -> Any:
    return reduce(lambda a, b: Piecewise((a, a >= b), (b, True)), values)


def _smallest(*values: Any) -> Any:
    return reduce(lambda a, b: Piecewise((a, a <= b), (b, True)), values)


def _log(value: Any, base: Any = None) -> Any:
    return sympy.log(value) if base is None else sympy.log(value) / sympy.log(base)


def _absolute(value: Any) -> Any:
    return Piecewise((value, value >= 0), (-value, True))


def _sign(value: Any) -> Any:
    return Piecewise((1, value > 0), (-1, value < 0), (0, True))


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": Power,
    "**": Power,
    "==": sympy.Eq,
    "!=": sympy.Ne,
    "<": sympy.Lt,
    ">": sympy.Gt,
    "<=": sympy.Le,
    ">=": sympy.Ge,
}
_PLAIN = ("sin", "cos", "tan", "sinh", "cosh", "tanh")
_RECIPROCALS = {"sec": "cos", "csc": "sin", "cot": "tan", "sech": "cosh", "csch": "sinh", "coth": "tanh"}
_ONE: dict[str, Callable[[Any], Any]] = {
    "exp": sympy.exp,
    "ln": sympy.log,
    "log10": lambda x: _log(x, 10),
    "log2": lambda x: _log(x, 2),
    "sqrt": lambda x: Power(x, sympy.Rational(1, 2)),
    "abs": _absolute,
    "sign": _sign,
    **{name: getattr(sympy, name) for name in _PLAIN},
    **{f"arc{name}": getattr(sympy, f"a{name}") for name in _PLAIN},
    **{name: lambda x, of=of: 1 / getattr(sympy, of)(x) for name, of in _RECIPROCALS.items()},
    **{f"arc{name}": lambda x, of=of: getattr(sympy, f"a{of}")(1 / x) for name, of in _RECIPROCALS.items()},
}
_FUNCTIONS: dict[str, tuple[range, Callable[..., Any]]] = {
    **{name: (range(1, 2), function) for name, function in _ONE.items()},
    "log": (range(1, 3), _log),
    "pow": (range(2, 3), Power),
    "min": (range(1, 100), _smallest),
    "max": (range(1, 100), _largest),
}
