"""What an ordinary differential equation is to the solver: a few functions of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rate = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class System:
    """dy/dt = f(t, y, p) and the derivatives that solving and differentiating it needs.

    Every function takes and gives batches in float64, one solution to an entry: t (B,), y (B, state),
    p (B, parameter). Entries do not see each other. ``equations`` makes all of them from ``rate`` alone,
    ``mass_action`` in closed form.

    Args:
        states: names of the states.
        parameters: names of the parameters, in the order of p's columns.
        rate: (t, y, p) -> f (B, state).
        jacobian: (t, y, p) -> df/dy (B, state, state).
        slope: (t, y, p) -> df/dt (B, state); None if f does not depend on t.
        curvature: (t, y, p, s, u) -> change of the Jacobian along (s, u), d/de df/dy(t + e s, y + e u),
            (B, state, state). s is (B,), u is (B, state).
        back: (t, y, p, v) -> gradient of v . f(t, y, p) with respect to y, v (B, state).
        pull: (t, y, p, at, there, s, u, v) -> gradient of the sum over stages of
            v . [f(at, there, p) + d/de f(t + e s, y + e u, p)] with respect to (y, p), y apart from there.
            at and s are (stage, B), there, u and v (stage, B, state).
    """

    states: tuple[str, ...]
    parameters: tuple[str, ...]
    rate: Rate
    jacobian: Rate
    slope: Rate | None
    curvature: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    back: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    pull: Callable[..., tuple[Tensor, Tensor]]


def equations(
    rate: Rate,
    states: Sequence[str],
    parameters: Sequence[str],
    *,
    jacobian: Rate | None = None,
    slope: Rate | None = None,
    timed: bool = False,
) -> System:
    """A system from its right-hand side, differentiated by torch.

    Args:
        rate: (t, y, p) -> dy/dt (B, state), of torch operations that keep the entries of the batch apart.
        states: names of the states.
        parameters: names of the parameters.
        jacobian: df/dy (B, state, state), if it is known, of torch operations; else it costs a derivative of
            ``rate`` for each state.
        slope: df/dt (B, state), if it is known, of torch operations; else it costs about four times ``rate``.
        timed: whether ``rate`` depends on t other than through y.
    """
    n = len(states)

    def moved(f: Rate, t: Tensor, y: Tensor, p: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """d/de f(t + e s, y + e u, p), as the derivative of the pullback, which is linear."""
        if timed:
            value, back = _pullback(lambda a, b: f(a, b, p), t, y)
        else:
            value, back = _pullback(lambda b: f(t, b, p), y)
        _, forth = _pullback(back, torch.zeros_like(value))
        return forth((s, u) if timed else (u,))[0]

    def by_rows(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        _, back = _pullback(lambda b: rate(t, b, p), y)
        units = torch.eye(n, dtype=y.dtype, device=y.device)
        return torch.stack([back(unit.expand_as(y))[0] for unit in units], 1)

    found = jacobian or by_rows

    def in_time(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return moved(rate, t, y, p, torch.ones_like(t), torch.zeros_like(y))

    def curvature(t: Tensor, y: Tensor, p: Tensor, s: Tensor, u: Tensor) -> Tensor:
        return moved(found, t, y, p, s, u)

    def back(t: Tensor, y: Tensor, p: Tensor, v: Tensor) -> Tensor:
        return _pullback(lambda b: rate(t, b, p), y)[1](v)[0]

    def pull(
        t: Tensor, y: Tensor, p: Tensor, at: Tensor, there: Tensor, s: Tensor, u: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        def seen(y: Tensor, p: Tensor) -> Tensor:  # the stages of all entries are one batch
            begin, y, p = (x.expand(len(v), *x.shape).flatten(0, 1) for x in (t, y, p))
            change = moved(rate, begin, y, p, s.flatten(), u.flatten(0, 1))
            return (v.flatten(0, 1) * (rate(at.flatten(), there.flatten(0, 1), p) + change)).sum()

        return torch.func.grad(seen, (0, 1))(y, p)

    slopes = (slope or in_time) if timed else None
    return System(tuple(states), tuple(parameters), rate, found, slopes, curvature, back, pull)


def _pullback(function: Callable[..., Any], *at: Tensor) -> tuple[Any, Callable[..., Any]]:
    """Value, and the function that carries gradients of it back to the arguments."""
    found: Any = torch.func.vjp(function, *at)
    return found[0], found[1]
