"""Published stiff problems as reactions, where they end, and their steps played again under autograd.

Sources:
    Mazzia and Magherini 2008, Test Set for Initial Value Problem Solvers, release 2.4 (all three).
    Hairer and Wanner 1996, Solving Ordinary Differential Equations II, sections IV.1 and IV.10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from scivi.ode import System, equations, mass_action
from scivi.ode.path import Path
from scivi.ode.rodas import GAMMA, A, C, H, Step, weights, within


@dataclass(frozen=True)
class Problem:
    """Reactions, their coefficients k, where they begin, how long they last, and the published end.

    Args:
        reactants: of each reaction, two at most.
        stoichiometry: (state, reaction).
        k: rate coefficients (reaction,).
        y0: states at the start (state,).
        end: the last time.
        published: states then (state,).
    """

    reactants: list[tuple[int, ...]]
    stoichiometry: np.ndarray
    k: np.ndarray
    y0: np.ndarray
    end: float
    published: np.ndarray

    def system(self) -> System:
        """The system of ``scivi.ode``."""
        return mass_action(self.reactants, self.stoichiometry)

    def generic(self) -> System:
        """The same by a right-hand side alone."""
        first, second = (torch.tensor(places) for places in self.factors())

        def rate(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
            extended = torch.cat([y, torch.ones_like(y[:, :1])], 1)
            return (k * extended[:, first] * extended[:, second]) @ torch.as_tensor(self.stoichiometry.T)

        names = [str(i) for i in range(len(self.y0))]
        return equations(rate, names, [f"k{r + 1}" for r in range(len(self.k))])

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of each reaction's two factors; that after the last state stands for 1."""
        n = len(self.y0)
        filled = np.array([(*places, n, n)[:2] for places in self.reactants])
        return filled[:, 0], filled[:, 1]

    def rate(self, t: float, y: np.ndarray, k: np.ndarray) -> np.ndarray:
        """dy/dt by numpy, for scipy."""
        extended, (first, second) = np.append(y, 1.0), self.factors()
        return self.stoichiometry @ (k * extended[first] * extended[second])

    def jacobian(self, t: float, y: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Of the same (state, state)."""
        extended, (first, second) = np.append(y, 1.0), self.factors()
        slopes, rows = np.zeros((len(k), len(y) + 1)), np.arange(len(k))
        np.add.at(slopes, (rows, first), k * extended[second])
        np.add.at(slopes, (rows, second), k * extended[first])
        return self.stoichiometry @ slopes[:, :-1]

    def scattered(self, scatter: float = 0.0, size: int = 1, seed: int = 0) -> np.ndarray:
        """Coefficients whose logs scatter, the first not, (size, reaction)."""
        noise = scatter * np.random.default_rng(seed).standard_normal((size, len(self.k)))
        noise[0] = 0.0
        return self.k * np.exp(noise)

    def radau(self, k: np.ndarray, times: np.ndarray, rtol: float = 1e-11) -> np.ndarray:
        """States by scipy's Radau (time, state)."""
        over, atol = (0.0, times[-1]), 1e-7 * rtol
        made = solve_ivp(
            self.rate, over, self.y0, "Radau", times, args=(k,), jac=self.jacobian, rtol=rtol, atol=atol
        )
        return made.y.T

    def diffsl(self) -> str:
        """The equations in the language of diffsol."""
        n, (first, second) = len(self.y0), self.factors()
        names = [f"k{r + 1}" for r in range(len(self.k))]
        lines = [f"in_i {{ {', '.join(f'{name} = 1' for name in names)} }}", "u_i {"]
        lines += [f"  y{i} = {float(self.y0[i])!r}," for i in range(n)]
        lines += ["}", "F_i {"]
        for i in range(n):
            terms = []
            for r in np.flatnonzero(self.stoichiometry[i]):
                parts = [f"({float(self.stoichiometry[i, r])!r})", names[r]]
                parts += [f"y{j}" for j in (first[r], second[r]) if j < n]
                terms.append(" * ".join(parts))
            lines.append(f"  {' + '.join(terms) or '0.0'},")
        return "\n".join([*lines, "}"])


def problem(
    reactions: list[tuple[tuple[int, ...], tuple[int, ...], float]],
    y0: np.ndarray,
    end: float,
    published: list[float],
) -> Problem:
    change = np.zeros((len(y0), len(reactions)))
    for r, (used, made, _) in enumerate(reactions):
        np.subtract.at(change[:, r], list(used), 1.0)
        np.add.at(change[:, r], list(made), 1.0)
    k = np.array([k for _, _, k in reactions])
    return Problem([used for used, _, _ in reactions], change, k, y0, end, np.array(published))


def robertson() -> Problem:
    reactions = [((0,), (1,), 0.04), ((1, 1), (1, 2), 3e7), ((1, 2), (0, 2), 1e4)]
    end = [0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050]
    return problem(reactions, np.array([1.0, 0.0, 0.0]), 1e11, end)


def hires() -> Problem:
    reactions = [
        ((0,), (1,), 1.71),
        ((1,), (0,), 0.43),
        ((1,), (3,), 8.32),
        ((2,), (0,), 8.32),
        ((2,), (3,), 1.71),
        ((), (0,), 0.0007),
        ((3,), (2,), 0.43),
        ((3,), (5,), 0.69),
        ((4,), (2,), 0.035),
        ((4,), (5,), 1.71),
        ((5,), (4,), 0.43),
        ((6,), (4, 7), 0.43),
        ((6,), (5, 7), 0.69),
        ((6,), (7,), 0.69),
        ((5, 7), (6,), 280.0),
    ]
    start = np.zeros(8)
    start[[0, 7]] = 1.0, 0.0057
    end = [0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2]
    end += [0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2]
    return problem(reactions, start, 321.8122, end)


POLLU_K = [0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4, 1.88]
POLLU_K += [1.63e4, 4.8e6, 3.5e-4, 0.0175, 1e8, 4.44e11, 1240.0, 2.1, 5.78, 0.0474, 1780.0, 3.12]
POLLU_USED = [(1,), (2, 4), (5, 2), (7,), (7,), (7, 6), (9,), (9, 6), (11, 2), (11, 1), (13,), (10, 2), (14,)]
POLLU_USED += [(1, 6), (3,), (4,), (4,), (16,), (16,), (17, 6), (19,), (19,), (1, 4), (19, 1), (20,)]
POLLU_MADE = {  # species: reactions that make it
    1: [2, 3, 9, 11, 12, 22, 25],
    2: [1, 21],
    3: [1, 17, 19, 22],
    4: [15],
    5: [4, 4, 6, 7, 13, 20],
    6: [3, 18, 18],
    7: [13],
    8: [4, 5, 6, 7],
    10: [7, 9],
    11: [8, 11],
    12: [9],
    13: [10],
    14: [12],
    15: [14],
    16: [16],
    18: [20],
    19: [23, 25],
    20: [24],
}
POLLU_LOST = {  # and those that use it up; not all that it takes part in
    1: [1, 10, 14, 23, 24],
    2: [2, 3, 9, 12],
    3: [15],
    4: [2, 16, 17, 23],
    5: [3],
    6: [6, 8, 14, 20],
    7: [4, 5, 6],
    9: [7, 8],
    10: [12],
    11: [9, 10],
    13: [11],
    14: [13],
    16: [18, 19],
    17: [20],
    19: [21, 22, 24],
    20: [25],
}


def pollu() -> Problem:
    change = np.zeros((20, 25))
    for sign, table in ((1.0, POLLU_MADE), (-1.0, POLLU_LOST)):
        for species, reactions in table.items():
            np.add.at(change[species - 1], np.array(reactions) - 1, sign)
    start = np.zeros(20)
    start[[1, 3, 6, 7, 8, 16]] = 0.2, 0.04, 0.1, 0.3, 0.01, 0.007
    end = [0.5646255480022769e-1, 0.1342484130422339, 0.4139734331099427e-8, 0.5523140207484359e-2]
    end += [0.2018977262302196e-6, 0.1464541863493966e-6, 0.7784249118997964e-1, 0.3245075353396018]
    end += [0.7494013383880406e-2, 0.1622293157301561e-7, 0.1135863833257075e-7, 0.2230505975721359e-2]
    end += [0.2087162882798630e-3, 0.1396921016840158e-4, 0.8964884856898295e-2, 0.4352846369330103e-17]
    end += [0.6899219696263405e-2, 0.1007803037365946e-3, 0.1772146513969984e-5, 0.5682943292316392e-4]
    used = [tuple(i - 1 for i in places) for places in POLLU_USED]
    return Problem(used, change, np.array(POLLU_K), start, 60.0, np.array(end))


PROBLEMS: dict[str, Callable[[], Problem]] = {"robertson": robertson, "hires": hires, "pollu": pollu}


def played_again(system: System, p: Tensor, y0: Tensor, path: Path) -> Tensor:
    """The states at the observations by the formula of the method, for autograd; sizes of steps as taken."""
    y, begins, mades, by = y0, [], [], weights(y0)
    for s in range(len(path.steps.h)):
        end = None if path.steps.end is None else path.steps.end[s]
        step = Step(path.steps.t[s], y, path.steps.h[s], end)
        h, at, moved = step.h.unsqueeze(-1), step.at(by), step.moved(by)
        matrix = torch.eye(y.shape[-1], dtype=y.dtype) - GAMMA * h.unsqueeze(-1) * system.jacobian(
            step.t, y, p
        )
        u: list[Tensor] = []
        for i in range(8):
            there = y + sum((a * x for a, x in zip(A[i], u, strict=True)), torch.zeros_like(y))
            right = GAMMA * h * system.rate(at[i], there, p)
            right = right + GAMMA * sum((c * x for c, x in zip(C[i], u, strict=True)), torch.zeros_like(y))
            if system.slope is not None:
                right = right + GAMMA * h * moved[i].unsqueeze(-1) * system.slope(step.t, y, p)
            u.append(torch.linalg.solve(matrix, right))
        made = sum((a * x for a, x in zip([*A[7], 1.0], u, strict=True)), torch.zeros_like(y))
        inner = [sum((w * x for w, x in zip(row, u, strict=True)), torch.zeros_like(y)) for row in H]
        begins.append(y)
        mades.append(torch.stack([made, *inner]))
        y = y + made
    who = torch.arange(len(y0)).unsqueeze(-1)
    parts = torch.cat([torch.stack(begins)[None], torch.stack(mades, 1)])[:, path.place, who]
    return (within(path.share).unsqueeze(-1) * parts).sum(0)
