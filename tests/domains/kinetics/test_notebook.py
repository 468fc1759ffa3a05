"""The notebook runs from top to bottom with few starts and steps, and its curves follow the measurements."""

from __future__ import annotations

import numpy as np
import pytest

from tests import notebooks

PARAMETERS = {"starts": 12, "steps": 40, "draws": 100}  # too few to be trusted, enough to be near


@pytest.mark.slow
def test_notebook_runs_to_its_end_and_follows_the_measurements(monkeypatch):
    names = notebooks.run("kinetics.ipynb", PARAMETERS, monkeypatch)
    result = names["result"]
    expected = result["posterior"]["expected"].median(("chain", "draw")).isel(condition=0).values
    measured = result["observed_data"]["measured"].isel(condition=0).values
    for curve, seen in zip(expected.T, measured.T, strict=True):
        assert np.corrcoef(curve, seen)[0, 1] > 0.9
    assert names["directions"].sizes["direction"] == 9
    assert names["report"].attrs["verdict"] in ("trust", "trust with care", "do not trust")
