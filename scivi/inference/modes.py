"""Modes of a density of one flat vector, and its shape at each: where the search for a guide begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scivi.models.mixtures import StudentMixture

Density = Callable[[Tensor], tuple[Tensor, Tensor]]  # points (point, D) to log density and gradient

NEGLIGIBLE = 10.0  # nats by which a mode may hold less than another and be left out (our choice)
APART = 3.0  # sd by which modes differ (our choice)


def modes(density: Density, starts: Sequence[Tensor], freedom: float) -> StudentMixture:
    """One part at each mode that holds something, shares by Laplace's approximation."""
    kept: list[tuple[float, Tensor, Tensor]] = []
    for start in starts:
        value, x, tril = mode(density, start)
        holds = value + float(tril.diagonal().log().sum())
        away = [torch.linalg.solve_triangular(t, (x - m)[:, None], upper=False).norm() for _, m, t in kept]
        if all(float(a) > APART for a in away):
            kept.append((holds, x, tril))
    most = max(holds for holds, _, _ in kept)
    kept = [one for one in kept if one[0] > most - NEGLIGIBLE]
    holding, loc, tril = zip(*kept, strict=True)
    log_share = torch.log_softmax(torch.tensor(holding, dtype=torch.float64), 0)
    return StudentMixture(log_share, torch.stack(loc), torch.stack(tril), freedom)


def mode(density: Density, x: Tensor, steps: int = 100) -> tuple[float, Tensor, Tensor]:
    """Newton's method, many lengths of a step tried at once; log density, place and lower triangle there.

    Coordinates are scaled by the curvature at each step, so that units do not matter, and directions in which
    the density curves upwards are climbed.
    """
    unit, lengths = 1e-2 * (1 + x.abs()), 2.0 ** torch.arange(-12, 9).double()
    value, slope = (part[0] for part in density(x[None]))
    root = torch.diag(unit)
    for _ in range(steps):
        for _ in range(2):
            bend = _bend(density, x, torch.diag(unit))
            unit = unit * bend.diagonal().abs().clamp(1e-6, 1e6).rsqrt()
        values, vectors = torch.linalg.eigh(-_bend(density, x, torch.diag(unit)))
        root = unit[:, None] * vectors * values.abs().clamp_min(1e-6).rsqrt()
        ahead = slope @ root
        if float(ahead.norm()) < 1e-3 and bool((values > 0).all()):
            break
        moves = torch.cat([lengths[:, None] * (root @ ahead), lengths[:, None] * (unit**2 * slope)])
        there, slopes = density(x + moves)
        ends = (_end_of_rise(there[: len(lengths)]), len(lengths) + _end_of_rise(there[len(lengths) :]))
        at = max(ends, key=lambda place: float(there[place]))
        if not there[at] > value:
            break
        x, value, slope = x + moves[at], there[at], slopes[at]
    r = torch.linalg.qr(root.mT).R  # of root root', which may be all but singular, the Cholesky factor
    return float(value), x, (r * r.diagonal().sign()[:, None]).mT


def _end_of_rise(values: Tensor) -> int:
    """Where values first fall: beyond may be another mode, which is for another start."""
    falls = values[1:] < values[:-1] - 1e-12 * values[:-1].abs()
    return int(falls.int().argmax()) if bool(falls.any()) else len(values) - 1


def _bend(density: Density, x: Tensor, root: Tensor, apart: float = 0.1) -> Tensor:
    """Second derivatives along the columns of a matrix, by differences."""
    slopes = density(torch.cat([x + apart * root.mT, x - apart * root.mT]))[1] @ root
    bend = (slopes[: len(x)] - slopes[len(x) :]) / (2 * apart)
    return 0.5 * (bend + bend.mT)
