"""The Python on the pages runs, with fits of a few steps; what a page takes for granted is made here.

Cells of executed pages run when the documentation is built, and ``tests/slurm`` follows the cluster page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import scivi
from tests.test_docs import TEXTS, blocks

ROOT = Path(__file__).resolve().parents[1]
STEPS, DRAWS = 2, 50


def sources() -> dict[str, Any]:
    """A template, its table, and small tables of three stars; and what an example before has imported."""
    from domains.astrophysics import photons as domain

    table = xr.open_dataset(ROOT / "data/chandra_ic2395.nc")
    some = table.isel(source=slice(0, 60), band=0, drop=True)
    names = pd.Index(["HD 1", "HD 1234", "HD 3"], name="star")
    parts = [
        some.isel(source=slice(20 * k, 20 * k + 20)).drop_vars("source", errors="ignore") for k in range(3)
    ]
    stars = xr.concat([part.expand_dims("band") for part in parts], names)
    return {"scivi": scivi, "template": domain.template, "table": table, "stars": stars}


def reactions() -> dict[str, Any]:
    """Two lots of decays along a chain of three reactions, at rates that differ from one to the next."""
    from domains.kinetics.networks import network
    from domains.kinetics.petab_problems import Observable, Parameter, Problem

    rates = {"k1": 1.0, "k2": 0.5, "k3": 0.25}
    made = network(
        {"A -> B": "k1", "B -> C": "k2", "C -> D": "k3"},
        initial={"A": 1.0, "B": 0.0, "C": 0.0, "D": 0.0},
        parameters=rates,
    )
    unknown = tuple(Parameter(name, "log10", 1e-2, 1e2, value) for name, value in rates.items())
    seen = tuple(Observable(f"{species} seen", species, "0.05") for species in "ABC")
    time, rng = np.linspace(0.1, 6.0, 6), np.random.default_rng(0)
    a = np.exp(-time)[:, None] * np.ones(3)

    def measured(n: int) -> dict[str, Any]:
        values = a + 0.05 * rng.normal(size=(n, 6, 3))
        return {"measured": (("experiment", "moment", "observable"), values), "time": (("moment",), time)}

    problem = Problem(made, unknown, seen, {"c": {}}, (("c", ""),), "chain")
    return {"problem": problem, "measurements": measured(12), "other_measurements": measured(3)}


def prices() -> dict[str, Any]:
    """Prices of two currencies that walk at random."""
    days = pd.bdate_range("2015-11-02", "2018-01-12")
    walk = np.random.default_rng(0).normal(0, 0.006, (len(days), 2)).cumsum(0)
    return {"prices": pd.DataFrame(100 * np.exp(walk), days, ["CHF", "USD"])}


NEEDS: dict[str, Callable[[], dict[str, Any]]] = {
    "README": dict,
    "start-here": dict,
    "photons": dict,
    "gpu": sources,
    "cluster": sources,
    "kinetics": reactions,
    "volatility": prices,
}


def test_every_page_with_python_is_run():
    assert {
        path.stem for path in TEXTS if blocks(path, "python") and "{code-cell}" not in path.read_text()
    } == set(NEEDS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Pareto k-hat")  # of fits of a few steps
@pytest.mark.parametrize("name", NEEDS)
def test_python_on_a_page_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    plt.switch_backend("agg")
    fit, fit_many, draw = scivi.fit, scivi.fit_many, scivi.draw

    def brief(plan: scivi.Plan | None, template: scivi.Template) -> scivi.Plan:
        plan = scivi.Plan(**template.plan) if plan is None else plan
        steps = STEPS if plan.steps is None else min(plan.steps, STEPS)
        return replace(
            plan, steps=steps, newton=False, device=plan.device if torch.cuda.is_available() else "cpu"
        )

    def briefly(template: scivi.Template, data: Any, plan: scivi.Plan | None = None, **how: Any) -> scivi.Fit:
        return fit(template, data, brief(plan, template), progress=False, **how)

    def many(template: scivi.Template, data: Any, over: str, **how: Any) -> Any:
        return fit_many(template, data, over, brief(None, template), progress=False, **how)

    def few(fit: scivi.Fit, data: Any, draws: int = DRAWS, **how: Any) -> xr.DataTree:
        return draw(fit, data, min(draws, DRAWS), **how)

    from domains.kinetics import kinetics, populations

    monkeypatch.setattr(kinetics, "from_data", partial(kinetics.from_data, starts=0))
    monkeypatch.setattr(populations, "from_data", partial(populations.from_data, rounds=0))
    monkeypatch.setattr(scivi, "fit", briefly)
    monkeypatch.setattr(scivi, "draw", few)
    monkeypatch.setattr(scivi, "fit_many", many)
    path = next(path for path in TEXTS if path.stem == name)
    names = NEEDS[name]()
    for block in blocks(path, "python"):
        if "gathered.zarr" not in block:  # follows commands, and is run after them in tests/slurm
            exec(block, names)
    plt.close("all")
