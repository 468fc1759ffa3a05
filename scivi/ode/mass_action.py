"""Reaction networks of mass action, whose derivatives are products of matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scivi.errors import TemplateError, listed
from scivi.ode.system import System

MOST_REACTANTS = 2


def mass_action(
    reactants: Sequence[Sequence[int]],
    stoichiometry: np.ndarray,
    states: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
) -> System:
    """A network of reactions, each as fast as the product of its reactants.

        dy/dt = sum_r S_r k_r prod_(i in reactants of r) y_i

    Args:
        reactants: places of each reaction's reactants among the states, none, one or two; twice the same is a
            square. A third molecule that meets two others needs ``equations``.
        stoichiometry: S, net change of each state by each reaction, (state, reaction).
        states: names; "0", "1" and so on if not given.
        parameters: names of the reactions' rate coefficients k, which are the system's parameters.

    Raises:
        TemplateError: listing reactions that are none, and names that are too few or too many.
    """
    try:
        stoichiometry = np.asarray(stoichiometry, float)
    except (TypeError, ValueError) as error:
        raise TemplateError(
            f"the stoichiometry is no table of numbers, (state, reaction): {error}."
        ) from None
    faults = _faults(reactants, stoichiometry)
    if stoichiometry.ndim == 2:
        wanted = {
            "states": (states, stoichiometry.shape[0]),
            "parameters": (parameters, stoichiometry.shape[1]),
        }
        faults += [
            f"there are {len(named)} names of {what}; the stoichiometry has {size}"
            for what, (named, size) in wanted.items()
            if named is not None and len(named) != size
        ]
    if faults:
        raise TemplateError(listed("the reactions are none:", faults))
    n, count = stoichiometry.shape
    names = tuple(states) if states is not None else tuple(map(str, range(n)))
    coefficients = tuple(parameters) if parameters is not None else tuple(f"k{r + 1}" for r in range(count))
    net = _Network(reactants, stoichiometry)
    return System(
        names, coefficients, net.rate, net.jacobian, None, net.curvature, back=net.back, pull=net.pull
    )


def _faults(reactants: Sequence[Sequence[int]], stoichiometry: np.ndarray) -> list[str]:
    if stoichiometry.ndim != 2:
        return [f"the stoichiometry has {stoichiometry.ndim} dims; it needs (state, reaction)"]
    n, count = stoichiometry.shape
    faults = []
    if len(reactants) != count:
        faults.append(f"there are reactants of {len(reactants)} reactions, and {count} columns")
    if not np.isfinite(stoichiometry).all():
        faults.append("some of the stoichiometry is not finite")
    for r, places in enumerate(reactants):
        if len(places) > MOST_REACTANTS:
            faults.append(f"reaction {r} has {len(places)} reactants; two are the most")
        if any(not isinstance(i, int | np.integer) or not 0 <= i < n for i in places):
            faults.append(f"reaction {r} has reactants {list(places)}; there are {n} states")
    return faults


class _Network:
    """Constant matrices. A factor of a reaction that has fewer than two is 1.

    ``factors`` gives (B, 2 reaction): first factors, then second ones.
    """

    def __init__(self, reactants: Sequence[Sequence[int]], stoichiometry: np.ndarray) -> None:
        n, count = stoichiometry.shape
        of = np.zeros((2, count, n))  # which state a factor is
        for r, places in enumerate(reactants):
            for side, place in enumerate(places):
                of[side, r, place] = 1.0
        bare = 1.0 - of.sum(-1)
        # of df_a/dy_b: by the derivative of the first factors, then of the second
        blocks = np.einsum("ar,srb->srab", stoichiometry, of).reshape(2 * count, n * n)
        self.n = n
        self.kept: dict[torch.device, tuple[Tensor, ...]] = {}
        of = of.reshape(2 * count, n)
        self.arrays = (stoichiometry, stoichiometry.T.copy(), of, of.T.copy(), bare.reshape(-1), blocks)

    def on(self, y: Tensor) -> tuple[Tensor, ...]:
        """The arrays: stoichiometry (state, reaction), states of factors (2 reaction, state) and so on."""
        if y.device not in self.kept:
            self.kept[y.device] = tuple(torch.tensor(a, dtype=y.dtype, device=y.device) for a in self.arrays)
        return self.kept[y.device]

    def factors(self, y: Tensor) -> tuple[Tensor, Tensor]:
        _, _, _, states, bare, _ = self.on(y)
        first, second = torch.addmm(bare, y, states).chunk(2, 1)
        return first, second

    def rate(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        first, second = self.factors(y)
        return (k * first * second) @ self.on(y)[1]

    def jacobian(self, t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        first, second = self.factors(y)
        return self._by_blocks(k * second, k * first)

    def curvature(self, t: Tensor, y: Tensor, k: Tensor, s: Tensor, u: Tensor) -> Tensor:
        first, second = self._moves(u)
        return self._by_blocks(k * second, k * first)

    def back(self, t: Tensor, y: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stoichiometry, _, of, *_ = self.on(y)
        first, second = self.factors(y)
        weight = (v @ stoichiometry) * k
        return torch.cat([weight * second, weight * first], 1) @ of

    def pull(
        self, t: Tensor, y: Tensor, k: Tensor, at: Tensor, there: Tensor, s: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        stoichiometry, _, of, *_ = self.on(y)
        first, second = self.factors(y)
        first_there, second_there = (x.view(*v.shape[:2], -1) for x in self.factors(there.flatten(0, 1)))
        first_moves, second_moves = (x.view(*v.shape[:2], -1) for x in self._moves(u.flatten(0, 1)))
        seen = v @ stoichiometry  # what a unit of each reaction is worth
        of_k = seen * (first_there * second_there + first_moves * second + first * second_moves)
        to_first, to_second = (seen * second_moves).sum(0), (seen * first_moves).sum(0)
        return torch.cat([k * to_first, k * to_second], 1) @ of, of_k.sum(0)

    def _moves(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """How the factors move with the states."""
        first, second = (u @ self.on(u)[3]).chunk(2, 1)
        return first, second

    def _by_blocks(self, of_first: Tensor, of_second: Tensor) -> Tensor:
        blocks = self.on(of_first)[-1]
        return (torch.cat([of_first, of_second], 1) @ blocks).view(-1, self.n, self.n)
