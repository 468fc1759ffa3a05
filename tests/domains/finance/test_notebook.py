"""The notebook runs from top to bottom on fewer days, and its forecasts are those of the days."""

from __future__ import annotations

import numpy as np
import pytest

from tests import notebooks

# of fewer days the guide is farther from the posterior; of fewer draws one cannot tell how far
PARAMETERS = {"days": 1000, "draws": 400, "tested": 60}


@pytest.mark.slow
def test_notebook_runs_to_its_end_and_forecasts_its_days(monkeypatch):
    pytest.importorskip("arch", reason="the package arch holds the S&P 500")
    names = notebooks.run("volatility.ipynb", PARAMETERS, monkeypatch)
    one = names["one"]
    assert one.sizes["day"] == 60
    assert np.isfinite(one["log_score"].values).all()
    hits = float((one["returns"] < one["value_at_risk"].sel(level=0.05)).mean())
    assert hits < 0.2  # the last months of 2018 were wild; 5 % are due, and .2 is five of their sd away
    assert names["report"].attrs["verdict"] in ("trust", "trust with care")
