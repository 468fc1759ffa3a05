"""A notebook run as a script, with other parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"


def run(name: str, parameters: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the names of a notebook stand for at its end.

    What the cell tagged "parameters" sets is replaced; all others run as they are.
    """
    monkeypatch.chdir(FOLDER)
    written = json.loads((FOLDER / name).read_text("utf-8"))["cells"]
    cells = [c for c in written if c["cell_type"] == "code"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1
    names: dict[str, Any] = dict(parameters)
    with plt.rc_context():
        plt.switch_backend("agg")
        for cell in cells:
            if cell not in tagged:
                exec("".join(cell["source"]), names)
        plt.close("all")
    return names
