from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch

from scivi.inference import capture, loop
from scivi.inference.objective import Objective
from scivi.inference.plan import Plan
from scivi.inference.state import State
from scivi.inference.stepper import Stepper


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--steps",
        choices=("off", "auto", "captured"),
        help="take the steps of every fit so, whatever its plan says; tests of the steps stay",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run where anything is asked for (a path, ``-k``, ``-m``), hundreds of fits where "sbc" is.

    Neither runs with ``pytest`` alone.
    """
    asked = config.getoption("markexpr") + config.getoption("keyword")
    everything = {config.rootpath / path for path in config.getini("testpaths")}
    alone = not asked and {config.rootpath / path for path in config.args} == everything
    left_out = [name for name, on in (("slow", alone), ("sbc", "sbc" not in asked)) if on]
    out = [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in {*out}]


@pytest.fixture(autouse=True)
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another way to take steps, if one is asked for."""
    how = request.config.getoption("--steps")
    apart = request.path.stem in ("test_capture", "test_traps") or request.node.get_closest_marker("eager")
    if how is None or apart:
        return
    real = loop.stepper_for
    choice: Any = "on" if how == "captured" else how

    def chosen(state: State, objective: Objective, plan: Plan) -> Stepper:
        return real(state, objective, replace(plan, compile=choice))

    monkeypatch.setattr(loop, "stepper_for", chosen)
    if how == "captured":
        monkeypatch.setattr(capture, "has_compiler", lambda: False)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side and on small tensors: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_param_store() -> Iterator[None]:
    """No test finds or leaves anything in the process-wide parameter store."""
    pyro.clear_param_store()
    yield
    left = sorted(pyro.get_param_store().keys())
    pyro.clear_param_store()
    assert left == [], f"left in pyro's parameter store: {left}"
