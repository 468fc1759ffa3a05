"""The notebook runs from top to bottom, on fewer loci and draws, and its fit can be believed."""

from __future__ import annotations

import pytest

from tests import notebooks

PARAMETERS = {"every": 8, "draws": 60}  # 2500 loci; below 50 draws the population would not be weighed


@pytest.mark.slow
def test_notebook_runs_to_its_end_and_its_fit_is_believed(monkeypatch):
    names = notebooks.run("methylation.ipynb", PARAMETERS, monkeypatch)
    assert names["report"].attrs["verdict"] in ("trust", "trust with care")
