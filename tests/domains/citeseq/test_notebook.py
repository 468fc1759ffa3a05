"""The notebook runs from top to bottom, with fewer steps and draws, and finds the kinds of cells."""

from __future__ import annotations

import pytest

from tests import notebooks

PARAMETERS = {"steps": 120, "draws": 30}  # fewer draws say nothing about the tails of weights


@pytest.mark.slow
def test_notebook_runs_to_its_end_and_tells_cells_apart(monkeypatch):
    names = notebooks.run("citeseq.ipynb", PARAMETERS, monkeypatch)
    found = names["foreground"].groupby(names["kinds"]).mean()
    assert found.loc["CD4 T", "CD14"] < 0.05
    assert found.loc["CD14 monocyte", "CD3"] < 0.05
    assert float(names["carried"].mean()) < 0.02  # isotype controls
