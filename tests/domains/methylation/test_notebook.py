"""The notebook runs from top to bottom, on fewer loci and draws, and its fit can be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "methylation.ipynb"
PARAMETERS = {"every": 8, "draws": 60}  # 2500 loci; below 50 draws the population would not be weighed


@pytest.mark.slow
def test_notebook_runs_to_its_end_and_its_fit_is_believed(monkeypatch):
    """What the cell tagged "parameters" sets is replaced; all others run as they are."""
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1
    names: dict[str, Any] = dict(PARAMETERS)
    with plt.rc_context():
        plt.switch_backend("agg")
        for cell in cells:
            if cell not in tagged:
                exec("".join(cell["source"]), names)
        plt.close("all")
    assert set(PARAMETERS) <= names.keys()
    assert names["report"].attrs["verdict"] in ("trust", "trust with care")
