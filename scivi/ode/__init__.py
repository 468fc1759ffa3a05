"""Ordinary differential equations, stiff or not, in batches, with gradients."""

from scivi.ode.mass_action import mass_action
from scivi.ode.path import Reason
from scivi.ode.solve import Solution, sensitivities, solve, stiffness
from scivi.ode.steady import steady
from scivi.ode.system import System, equations

__all__ = [
    "Reason",
    "Solution",
    "System",
    "equations",
    "mass_action",
    "sensitivities",
    "solve",
    "steady",
    "stiffness",
]
