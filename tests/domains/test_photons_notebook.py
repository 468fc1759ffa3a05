"""The notebook runs from top to bottom on half of the sources, and its fluxes are the published ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests import notebooks

PARAMETERS = {"steps": 1500, "every": 2, "draws": 300}  # 71 sources are fitted, 71 are new


@pytest.mark.slow
def test_notebook_runs_to_its_end_and_agrees_with_published_fluxes(monkeypatch):
    names = notebooks.run("photons.ipynb", PARAMETERS, monkeypatch)
    assert names["report"].attrs["verdict"] in ("trust", "trust with care")
    for tree, table in ((names["result"], names["known"]), (names["later"], names["new"])):
        flux = np.exp(tree["posterior"]["log_brightness"].median(("chain", "draw")))
        bright = (table["n_on"] > 15) & table["model_flux_lo"].notnull()
        # Yang et al. 2022 by aprates, without a population: a 68 % interval of either side of the mode
        low, high = (table[f"model_flux_{end}"] for end in ("lo", "hi"))
        inside = ((flux > low) & (flux < high)).where(bright)
        assert int(bright.sum()) > 15
        assert float(inside.mean()) > 0.8  # medians of both hardly differ where counts are many
