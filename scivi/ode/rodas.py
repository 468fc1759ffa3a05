"""One step of Rodas5P: a Rosenbrock method of order five for stiff equations, its error and dense output.

    (I - h gamma J) u_i = h gamma [f(t + c_i h, y + sum_j A_ij u_j) + h d_i df/dt] + gamma sum_j C_ij u_j
    y(t + h) = y + sum_j A_8j u_j + u_8,    error u_8
    y(t + x h) = (1 - x) y + x y(t + h) + x (1 - x) (k_1 + x k_2 + x^2 k_3),    k_m = sum_j H_mj u_j

References:
    Steinebach 2023, BIT 63, 27, doi:10.1007/s10543-023-00967-x; coefficients as printed in OrdinaryDiffEq.jl
    (MIT), commit b211787f.
    Hairer and Wanner 1996, Solving Ordinary Differential Equations II, section IV.7, for the form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scivi.ode.system import System

ORDER, N_STAGES = 5, 8
GAMMA = 0.21193756319429014
_A6 = (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256, 0.030198172008377946)
A = (
    (),
    (3.0,),
    (2.849394379747939, 0.45842242204463923),
    (-6.954028509809101, 2.489845061869568, -10.358996098473584),
    (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
    _A6,
    (*_A6, 1.0),  # the last two stages begin where the stage before has come to
    (*_A6, 1.0, 1.0),
)
C = (
    (),
    (-14.155112264123755,),
    (-17.97296035885952, -2.859693295451294),
    (147.12150275711716, -1.41221402718213, 71.68940251302358),
    (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
    (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125, -0.6610691825249471),
    (
        30.91273214028599,
        -3.1208243349937974,
        77.79954646070892,
        34.28646028294783,
        -19.097331116725623,
        -28.087943162872662,
    ),
    (
        37.80277123390563,
        -3.2571969029072276,
        112.26918849496327,
        66.9347231244047,
        -40.06618937091002,
        -54.66780262877968,
        -9.48861652309627,
    ),
)
H = (
    (
        25.948786856663858,
        -2.5579724845846235,
        10.433815404888879,
        -2.3679251022685204,
        0.524948541321073,
        1.1241088310450404,
        0.4272876194431874,
        -0.17202221070155493,
    ),
    (
        -9.91568850695171,
        -0.9689944594115154,
        3.0438037242978453,
        -24.495224566215796,
        20.176138334709044,
        15.98066361424651,
        -6.789040303419874,
        -6.710236069923372,
    ),
    (
        11.419903575922262,
        2.8879645146136994,
        72.92137995996029,
        80.12511834622643,
        -52.072871366152654,
        -59.78993625266729,
        -0.15582684282751913,
        4.883087185713722,
    ),
)
TIMES = (0.0, 0.6358126895828704, 0.4095798393397535, 0.9769306725060716, 0.4288403609558664, 1.0, 1.0, 1.0)
SLOPES = (
    0.21193756319429014,
    -0.42387512638858027,
    -0.3384627126235924,
    1.8046452872882734,
    2.325825639765069,
    0.0,
    0.0,
    0.0,
)


@dataclass(frozen=True, slots=True)
class Weights:
    """The coefficients as matrices that act on stages laid side by side.

    Args:
        into: for each stage but the first, rows A_i and gamma C_i over the stages before, (2, i).
        there: all rows A_i, (stage, stage).
        times, slopes: c_i and d_i, (stage, 1).
        out: what a step adds to y, then k_1 to k_3, over all stages, (4, stage).
    """

    into: tuple[Tensor, ...]
    there: Tensor
    times: Tensor
    slopes: Tensor
    out: Tensor


def weights(like: Tensor) -> Weights:
    """The coefficients in the type and on the device of a tensor."""

    def made(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=like.dtype, device=like.device)

    into = tuple(made([list(A[i]), [GAMMA * c for c in C[i]]]) for i in range(1, N_STAGES))
    there = made([[*row, *[0.0] * (N_STAGES - len(row))] for row in A])
    times, slopes = (made([[x] for x in row]) for row in (TIMES, SLOPES))
    return Weights(into, there, times, slopes, made([[*A[-1], 1.0], *map(list, H)]))


@dataclass(frozen=True, slots=True)
class Step:
    """Where steps begin and how long they are, one to an entry of the batch.

    Args:
        t: beginnings (B,).
        y: states there (B, state).
        h: lengths (B,), 0 for an entry that stands still.
        end: times that f is never asked for or beyond, (B,): where it jumps. None if it does not.
    """

    t: Tensor
    y: Tensor
    h: Tensor
    end: Tensor | None = None

    def at(self, by: Weights) -> Tensor:
        """Times at which the stages ask for f, (stage, B)."""
        time = torch.addcmul(self.t, by.times, self.h)
        return time if self.end is None else torch.minimum(time, self.end)

    def moved(self, by: Weights) -> Tensor:
        """The stages' own shares of time, d_i h, (stage, B)."""
        return by.slopes * self.h

    def there(self, u: Tensor, by: Weights) -> Tensor:
        """States at which the stages ask for f, (stage, B, state)."""
        return self.y + (by.there @ u.flatten(1)).view_as(u)


def factors(system: System, step: Step, p: Tensor) -> tuple[Tensor, Tensor]:
    """LU of I - h gamma J for each entry."""
    matrix = system.jacobian(step.t, step.y, p) * (-GAMMA * step.h)[:, None, None]
    matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    return lu, pivots


def stages(system: System, step: Step, p: Tensor, by: Weights) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """All u (stage, B, state), and the factors they were found with; autograd is not told."""
    lu, y, at = factors(system, step, p), step.y, step.at(by)
    long = (GAMMA * step.h).unsqueeze(-1)
    slope = None
    if system.slope is not None:
        slope = step.moved(by).unsqueeze(-1) * (long * system.slope(step.t, y, p))
    u = y.new_empty(N_STAGES, y.numel())
    each = u.view(N_STAGES, *y.shape, 1).unbind()
    for i in range(N_STAGES):
        if i == 0:
            right = long * system.rate(at[0], y, p)
        else:
            to_y, carried = (by.into[i - 1] @ u[:i]).view(2, *y.shape).unbind()
            right = torch.addcmul(carried, long, system.rate(at[i], y + to_y, p))
        if slope is not None:
            right = right + slope[i]
        torch.linalg.lu_solve(*lu, right.unsqueeze(-1), out=each[i])
    return u.view(N_STAGES, *y.shape), lu


def outcome(u: Tensor, by: Weights) -> Tensor:
    """What a step adds to y, and k_1 to k_3, (4, B, state)."""
    return (by.out @ u.flatten(1)).view(4, *u.shape[1:])


def within(x: Tensor) -> Tensor:
    """Weights of (y, what the step adds, k_1, k_2, k_3) at a share x of the step, (5, *x)."""
    rest = x * (1 - x)
    return torch.stack([torch.ones_like(x), x, rest, x * rest, x * x * rest])
