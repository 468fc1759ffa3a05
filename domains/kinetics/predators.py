"""Predator and prey: a problem written by hand, with priors and initial values of its own.

    du/dt = (a - b v) u,    dv/dt = (d u - g) v                         hares u, lynxes v, thousands of pelts
    a, g ~ Normal(1, .5),    b, d ~ Normal(.05, .05),    all above 0
    u0, v0 ~ LogNormal(ln 10, 1),    sd_u, sd_v ~ LogNormal(-1, 1)
    pelts ~ LogNormal(ln u, sd_u), LogNormal(ln v, sd_v)    in each year, the first included

References:
    Carpenter 2018, Predator-prey population dynamics: the Lotka-Volterra model in Stan (model, priors).
    Hewitt 1921, The Conservation of the Wild Life of Canada (the counts).
    Magnusson et al. 2025, posteriordb, arXiv:2407.04967 (reference draws of this posterior).
"""

from __future__ import annotations

import json
import os

import numpy as np
import xarray as xr

from domains.kinetics.networks import network
from domains.kinetics.petab_problems import Observable, Parameter, Problem


def problem() -> Problem:
    """The problem of the module's docstring."""
    reactions = {"u -> 2 u": "a", "u + v -> v": "b", "v -> 0": "g", "u + v -> u + 2 v": "d"}
    values = {"a": 0.5, "b": 0.03, "g": 0.8, "d": 0.03, "u0": 30.0, "v0": 5.0, "sd_u": 0.3, "sd_v": 0.3}
    moving = {name: value for name, value in values.items() if not name.startswith("sd")}
    made = network(reactions, initial={"u": "u0", "v": "v0"}, parameters=moving, name="predator and prey")
    kinds = {
        **dict.fromkeys(("a", "g"), ("normal", (1.0, 0.5))),
        **dict.fromkeys(("b", "d"), ("normal", (0.05, 0.05))),
        **dict.fromkeys(("u0", "v0"), ("logNormal", (float(np.log(10.0)), 1.0))),
        **dict.fromkeys(("sd_u", "sd_v"), ("logNormal", (-1.0, 1.0))),
    }
    parameters = tuple(
        Parameter(name, "log", 1e-4, 1e3, values[name], prior=kind, prior_parameters=numbers)
        for name, (kind, numbers) in kinds.items()
    )
    seen = tuple(Observable(f"pelts of {s}", s, f"sd_{s}", "log") for s in ("u", "v"))
    return Problem(made, parameters, seen, {"Hudson Bay": {}}, (("Hudson Bay", ""),), "predator and prey")


def read(path: str | os.PathLike[str]) -> xr.Dataset:
    """The measurements, as ``kinetics.table`` takes them, from posteriordb's file."""
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    time, pelts = np.array([0.0, *found["ts"]]), np.array([found["y_init"], *found["y"]])
    dims = ("condition", "moment", "observable")
    coords = {"condition": ["Hudson Bay"], "observable": ["pelts of u", "pelts of v"]}
    return xr.Dataset({"time": (dims[:2], time[None]), "measured": (dims, pelts[None])}, coords)
