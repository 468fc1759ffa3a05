"""MathML of an SBML model as formulas in the syntax of PEtab, with its functions put in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

_CALLED = (
    *("exp", "ln", "abs", "sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh", "sech"),
    *("csch", "coth", "arcsin", "arccos", "arctan", "arcsec", "arccsc", "arccot", "arcsinh", "arccosh"),
    *("arctanh", "arcsech", "arccsch", "arccoth", "min", "max", "piecewise"),
)
_SIGNS = ({"PLUS": "+", "MINUS": "-"}, {"TIMES": "*", "DIVIDE": "/"})
_JOINED = {"LOGICAL_AND": ("&&", "true"), "LOGICAL_OR": ("||", "false")}
_COMPARED = {"EQ": "==", "NEQ": "!=", "LT": "<", "GT": ">", "LEQ": "<=", "GEQ": ">="}
_WORDS = {"NAME_TIME": "time", "CONSTANT_TRUE": "true", "CONSTANT_FALSE": "false"}
_COUNTS = {"POWER": (2,), "ROOT": (1, 2), "LOG": (1, 2), "LOGICAL_NOT": (1,)}
_NUMBERS = {"CONSTANT_E": math.e, "CONSTANT_PI": math.pi, "NAME_AVOGADRO": 6.02214179e23}  # SBML L3V1, 3.4.6


class Writer:
    """Formulas of one model.

    Args:
        libsbml: the module.
        model: whose function definitions are used.

    Attributes:
        refused: what formulas have used that cannot be written.
    """

    def __init__(self, libsbml: Any, model: Any) -> None:
        self.libsbml, self.refused = libsbml, dict[str, None]()
        self.under_way: list[str] = []
        self.functions = {each.getId(): each for each in model.getListOfFunctionDefinitions()}
        kinds = [name for name in dir(libsbml) if name.startswith("AST_")]
        self.kinds = {getattr(libsbml, name): name.removeprefix("AST_") for name in kinds}

    def write(self, node: Any, names: Mapping[str, str]) -> str:
        """The formula of a node; names found in ``names`` are replaced by what stands there."""
        kind = self._kind(node)
        if kind in ("INTEGER", "REAL", "REAL_E", "RATIONAL"):
            return self._number(node)
        if kind == "NAME":
            return str(names.get(node.getName(), node.getName()))
        if kind in _WORDS:
            return _WORDS[kind]
        if kind in _NUMBERS:
            return repr(_NUMBERS[kind])
        if kind == "FUNCTION":
            return self._inlined(node, names)
        if any(kind in signs for signs in _SIGNS):
            return self._chained(node, names)
        parts = [self.write(node.getChild(k), names) for k in range(node.getNumChildren())]
        return self._operation(kind, parts, node)

    def _kind(self, node: Any) -> str:
        return self.kinds.get(node.getType(), "UNKNOWN")

    def _chained(self, node: Any, names: Mapping[str, str]) -> str:
        """Sums and products in one bracket: libsbml nests one of a thousand terms a thousand deep."""
        signs = next(signs for signs in _SIGNS if self._kind(node) in signs)
        if node.getNumChildren() < 2:
            inner = (
                self.write(node.getChild(0), names) if node.getNumChildren() else str(int("TIMES" in signs))
            )
            return f"(-{inner})" if self._kind(node) == "MINUS" else inner
        parts: list[str] = []
        while self._kind(node) in signs and node.getNumChildren() > 1:
            sign = signs[self._kind(node)]
            right = [self.write(node.getChild(k), names) for k in range(1, node.getNumChildren())]
            parts += [f" {sign} {each}" for each in reversed(right)]
            node = node.getChild(0)
        return f"({self.write(node, names)}{''.join(reversed(parts))})"

    def _number(self, node: Any) -> str:
        value = node.getValue()
        if not math.isfinite(value):
            return self._refuse(f'the number "{value}" in a formula')
        text = f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else repr(float(value))
        return text if value >= 0 else f"({text})"

    def _inlined(self, node: Any, names: Mapping[str, str]) -> str:
        name = node.getName()
        definition = self.functions.get(name)
        arguments = [self.write(node.getChild(k), names) for k in range(node.getNumChildren())]
        if definition is None or definition.getBody() is None:
            return self._refuse(f'function "{name}", which the model does not define')
        if definition.getNumArguments() != len(arguments):
            return self._refuse(f'function "{name}" of {len(arguments)} arguments')
        if name in self.under_way:
            return self._refuse(f'function "{name}", which calls itself')
        own = {definition.getArgument(k).getName(): text for k, text in enumerate(arguments)}
        self.under_way.append(name)
        body = self.write(definition.getBody(), own)
        self.under_way.pop()
        return body

    def _operation(self, kind: str, parts: list[str], node: Any) -> str:
        kind = kind.removeprefix("FUNCTION_").removeprefix("RELATIONAL_")
        if len(parts) not in _COUNTS.get(kind, (len(parts),)):
            return self._refuse(f'"{kind.lower()}" of {len(parts)} arguments')
        if kind == "POWER":
            return f"(({parts[0]})^({parts[1]}))"
        if kind == "ROOT":
            degree, value = parts if len(parts) == 2 else ("2.0", parts[0])
            return f"(({value})^(1 / {degree}))"
        if kind == "LOG":
            base, value = parts if len(parts) == 2 else ("10.0", parts[0])
            return f"log({value}, {base})"
        if kind in _JOINED:
            sign, empty = _JOINED[kind]
            return f"({f' {sign} '.join(parts)})" if parts else empty
        if kind in _COMPARED:
            pairs = [f"({a} {_COMPARED[kind]} {b})" for a, b in pairwise(parts)] or ["true"]
            return pairs[0] if len(pairs) == 1 else f"({' && '.join(pairs)})"
        if kind == "LOGICAL_NOT":
            return f"(!{parts[0]})"
        if kind.lower() in _CALLED:
            return f"{kind.lower()}({', '.join(parts)})"
        if kind == "UNKNOWN" or "DELAY" in kind:
            kind = "delay" if "DELAY" in kind else self.libsbml.formulaToL3String(node)
        return self._refuse(f'"{kind.lower().replace("_", " ")}" in a formula')

    def _refuse(self, what: str) -> str:
        self.refused[what] = None
        return "0"
