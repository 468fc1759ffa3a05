"""A network as a system of differential equations, and what can be read off its formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from sympy import Expr
from sympy.core.relational import Relational
from torch import Tensor

from domains.kinetics import formulas, tensors
from domains.kinetics.formulas import TIME, symbol
from domains.kinetics.networks import Network
from scivi.errors import DataError, Unsupported, listed
from scivi.ode.mass_action import MOST_REACTANTS, mass_action
from scivi.ode.system import System, equations


@dataclass(frozen=True, slots=True)
class Fluxes:
    """Rates as expressions: dy/dt = change @ rates / volumes.

    Args:
        states: names of the states.
        rates: of each reaction, in symbols of time, states and parameters.
        change: of each state by each reaction, (state, reaction).
        volumes: of each state.
    """

    states: tuple[str, ...]
    rates: tuple[Expr, ...]
    change: np.ndarray
    volumes: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class MassAction:
    """Reactions of no, one or two molecules, dy/dt = stoichiometry @ (coefficients * product of reactants).

    Args:
        reactants: places of each reaction's reactants among the states.
        stoichiometry: (state, reaction), per volume.
        coefficients: of each reaction, in symbols of parameters.
    """

    reactants: tuple[tuple[int, ...], ...]
    stoichiometry: np.ndarray
    coefficients: tuple[Expr, ...]


def fluxes(network: Network, parameters: Sequence[str] | None = None) -> Fluxes:
    """Rates of a network in its states and some of its parameters, with the others at their values.

    Args:
        network: without faults.
        parameters: that stay symbols; all if not given.

    Raises:
        DataError: naming reactions whose rate divides by 0 or is otherwise not finite at these values.
    """
    kept = {*network.parameters} if parameters is None else {*parameters}
    free = {name: symbol(name) for name in (*network.species, *kept, "time")}
    formed = {**network.assignments, **{k: v for k, v in network.parameters.items() if k not in kept}}
    value = formulas.within({name: formulas.read(text) for name, text in formed.items()}, free)

    def put(formula: float | str) -> Any:
        found: Any = formulas.read(formula)
        return found.xreplace({each: value(each.name) for each in found.free_symbols})

    rates = tuple(put(reaction.rate) for reaction in network.reactions)
    broken = [
        r.name for r, rate in zip(network.reactions, rates, strict=True) if not formulas.is_finite(rate)
    ]
    if broken:
        raise DataError(listed("rates are not finite at the values of the parameters:", broken))
    change = np.array(
        [[reaction.change.get(s, 0.0) for reaction in network.reactions] for s in network.species]
    ).reshape(len(network.species), len(rates))
    acts = [r for r, rate in enumerate(rates) if rate != 0 and change[:, r].any()]
    volumes = tuple(put(network.volumes.get(s, 1.0)) for s in network.species)
    return Fluxes(network.species, tuple(rates[r] for r in acts), change[:, acts], volumes)


def compiled(network: Network, parameters: Sequence[str] | None = None) -> System:
    """The system of a network, with its Jacobian in closed form.

    Args:
        network: without faults.
        parameters: that are the system's, in this order; the others keep their values. All if not given.
    """
    names = tuple(network.parameters) if parameters is None else tuple(parameters)
    return system_of(fluxes(network, names), names)


def system_of(found: Fluxes, parameters: Sequence[str]) -> System:
    """The system of some rates in symbols of time, states and parameters."""
    arguments = ("time", *found.states, *parameters)
    rates = tensors.function(found.rates, arguments)
    volumes = tensors.function(found.volumes, arguments)
    slopes: dict[tuple[int, int], Any] = {}
    for r, each in enumerate(found.rates):
        used = each.free_symbols
        for s, state in enumerate(map(symbol, found.states)):
            if state in used and (slope_of := sympy.diff(each, state)) != 0:
                slopes[r, s] = slope_of
    of_rates = tensors.function([*slopes.values()], arguments)
    n, fixed = len(found.states), not any(v.free_symbols for v in found.volumes)
    change = found.change / np.array([float(v) for v in found.volumes])[:, None] if fixed else found.change
    entries = [
        (i * n + s, k, change[i, r]) for k, (r, s) in enumerate(slopes) for i in np.flatnonzero(change[:, r])
    ]
    target, source = (np.array([e[c] for e in entries], dtype=np.int64) for c in (0, 1))
    weight = np.array([e[2] for e in entries])
    moving = [r for r, each in enumerate(found.rates) if TIME in each.free_symbols]
    in_time = tensors.function([sympy.diff(found.rates[r], TIME) for r in moving], arguments)
    constants = tensors.Constants(change.T.copy(), target, source, weight, change.T[moving])

    def columns(t: Tensor, y: Tensor, p: Tensor) -> list[Tensor]:
        return [t, *y.unbind(-1), *p.unbind(-1)]

    def rate(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        given = columns(t, y, p)
        total = tensors.stack(rates(given), t) @ constants.on(y)[0]
        return total if fixed else total / tensors.stack(volumes(given), t)

    def jacobian(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        given, (_, to, of, by, _) = columns(t, y, p), constants.on(y)
        parts = tensors.stack(of_rates(given), t).index_select(-1, of) * by
        flat = y.new_zeros((*y.shape[:-1], n * n)).index_add(-1, to, parts)
        total = flat.unflatten(-1, (n, n))
        return total if fixed else total / tensors.stack(volumes(given), t).unsqueeze(-1)

    def slope(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        given = columns(t, y, p)
        total = tensors.stack(in_time(given), t) @ constants.on(y)[-1]
        return total if fixed else total / tensors.stack(volumes(given), t)

    timed = bool(moving)
    return equations(rate, found.states, parameters, jacobian=jacobian, slope=slope, timed=timed)


def mass_action_of(found: Fluxes) -> MassAction | None:
    """Rates as reactions, if all are coefficient x product of at most two species; else None.

    A rate that is a sum, as of a reversible reaction, makes several. Coefficients may be any formula of
    parameters, and change sides with their sign, but not depend on time.
    """
    place = {symbol(name): i for i, name in enumerate(found.states)}
    if not all(rate.is_polynomial(*place) for rate in list[Any](found.rates)):
        return None
    made: dict[tuple[tuple[int, ...], Any], np.ndarray] = {}
    for r, rate in enumerate(found.rates):
        for term in sympy.Add.make_args(sympy.expand(rate, power_exp=False, power_base=False, log=False)):
            reactants, coefficient = _monomial(term, place)
            if TIME in coefficient.free_symbols or len(reactants) > MOST_REACTANTS:
                return None
            size, formula = coefficient.as_coeff_Mul()
            for i in np.flatnonzero(found.change[:, r]):
                volume, part = found.volumes[i].as_coeff_Mul()
                key = (reactants, formula / part)
                column = made.setdefault(key, np.zeros(len(found.states)))
                column[i] += found.change[i, r] * float(size) / float(volume)
    return MassAction(
        tuple(reactants for reactants, _ in made),
        np.stack([*made.values()], 1) if made else np.zeros((len(found.states), 0)),
        tuple(coefficient for _, coefficient in made),
    )


def rates_in(network: Network, parameters: Sequence[str]) -> tuple[System, tuple[Expr, ...]]:
    """The fastest system of a network, and its parameters as formulas of those of the network.

    By ``scivi.ode.mass_action`` where all reactions are such; else with every part that depends on neither
    time nor states taken out of the rates, so that it is worked out once for a solution.
    """
    found = fluxes(network, parameters)
    simple = mass_action_of(found)
    if simple is not None and simple.coefficients:
        meeting = [" + ".join(found.states[i] for i in places) or "0" for places in simple.reactants]
        names = [f"{who}: {how}" for who, how in zip(meeting, simple.coefficients, strict=True)]
        return mass_action(simple.reactants, simple.stoichiometry, found.states, names), simple.coefficients
    moving = {symbol(name) for name in (*found.states, "time")}
    taken: dict[Any, Any] = {}
    rates = tuple(_taken_out(rate, moving, taken) for rate in found.rates)
    volumes = tuple(_taken_out(volume, moving, taken) for volume in found.volumes)
    bare = Fluxes(found.states, rates, found.change, volumes)
    return system_of(bare, [each.name for each in taken.values()]), tuple(taken)


def discontinuities(network: Network, parameters: Sequence[str] | None = None) -> tuple[Expr, ...]:
    """Times at which a rate jumps or bends, as formulas of parameters.

    They are where conditions of ``piecewise``, ``min``, ``max``, ``abs`` and ``sign`` change that depend on
    time and not on states. A condition on states changes where it may, and no step ends there.

    Args:
        network: without faults.
        parameters: that stay symbols; the others keep their values. All if not given.

    Raises:
        Unsupported: listing conditions that are not linear in time.
    """
    found = fluxes(network, parameters)
    states = {symbol(name) for name in found.states}
    conditions = {c for rate in list[Any](found.rates) for c in rate.atoms(Relational)}
    times, faults = set[Any](), []
    for condition in sorted(conditions, key=str):
        if TIME not in condition.free_symbols or condition.free_symbols & states:
            continue
        line = sympy.expand(condition.lhs - condition.rhs)
        slope = sympy.diff(line, TIME)
        if TIME in slope.free_symbols or slope == 0:
            faults.append(f"{condition} is not linear in time, so that its moments cannot be found")
        else:
            times.add(-line.xreplace({TIME: sympy.Integer(0)}) / slope)
    if faults:
        raise Unsupported(listed("the conditions on time are not all understood:", faults))
    return tuple(sorted(times, key=str))


def conserved(network: Network) -> np.ndarray:
    """Weights of the totals that no reaction changes, whole numbers where they can be, (total, species).

    They are weights of amounts: where species are concentrations, multiply each by its volume.
    """
    rows = [
        [sympy.nsimplify(r.change.get(s, 0), rational=True) for s in network.species]
        for r in network.reactions
    ]
    if not rows:
        return np.eye(len(network.species))
    found = []
    for vector in sympy.Matrix(rows).nullspace():
        scale = math.lcm(*(int(each.q) for each in vector))
        whole = [int(each * scale) for each in vector]
        sign = math.copysign(1.0, next(each for each in whole if each))
        found.append([sign * each / math.gcd(*whole) for each in whole])
    return np.array(found, dtype=float).reshape(-1, len(network.species)) + 0.0  # no -0.0


def _monomial(term: Any, place: Mapping[Any, int]) -> tuple[tuple[int, ...], Any]:
    """Reactants, each as often as its power says, and what is left."""
    reactants, left = [], []
    for factor in sympy.Mul.make_args(term):
        base, exponent = factor.as_base_exp()
        if base in place and exponent.is_Integer and exponent > 0:
            reactants += [place[base]] * int(exponent)
        else:
            left.append(factor)
    return tuple(sorted(reactants)), sympy.Mul(*left)


def _taken_out(found: Any, moving: set[Any], taken: dict[Any, Any]) -> Any:
    """A formula with each part that does not move put by a symbol."""
    if not found.free_symbols or found in moving:
        return found
    if not found.free_symbols & moving and isinstance(found, Expr):
        named = found if isinstance(found, sympy.Symbol) else symbol(f"{found} ({len(taken)})")
        return taken.setdefault(found, named)
    if isinstance(found, sympy.Add | sympy.Mul):
        still = [each for each in found.args if not each.free_symbols & moving]
        rest = [_taken_out(each, moving, taken) for each in found.args if each.free_symbols & moving]
        return found.func(_taken_out(found.func(*still), moving, taken), *rest)
    return found.func(*(_taken_out(each, moving, taken) for each in found.args))
