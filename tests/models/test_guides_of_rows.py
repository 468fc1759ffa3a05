"""Guides that hold all rows in one vector, fitted to more rows than a pair is shown as its example."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import scivi
from scivi.inference.opening import EXAMPLE_ROWS
from scivi.models.guides import JointNormal
from tests.inference.conjugate import NOISE, SPREAD, hierarchy, plan, rows

N = EXAMPLE_ROWS + 8


@pytest.mark.parametrize(
    ("guide", "knobs"),
    [
        ("auto", {}),
        (JointNormal(), {"steps": 300, "lr": 0.05}),
        (JointNormal(rank=1), {"steps": 300, "lr": 0.05}),
    ],
)
def test_more_rows_than_an_example_has_are_fitted_drawn_and_kept(guide, knobs, tmp_path):
    template, data = replace(hierarchy(), guide=guide, nets=None), rows(N)
    fit = scivi.fit(template, data, plan(**knobs), progress=False)
    tree = scivi.draw(fit, data, 400)
    z, mu = tree["posterior"]["z"], float(tree["posterior"]["mu"].mean())
    assert z.shape == (1, 400, N)
    precision = 1 / SPREAD**2 + 1 / NOISE**2
    exact = (mu / SPREAD**2 + data["y"] / NOISE**2) / precision
    away = z.mean(("chain", "draw")).values - exact
    assert np.sqrt((away**2).mean()) < 0.3 * precision**-0.5  # of 400 draws, and of 300 steps
    again = scivi.load(scivi.save(fit, tmp_path / "fit"), template)
    np.testing.assert_array_equal(scivi.draw(again, data, 400)["posterior"]["z"], z)
    assert scivi.predict(again, data, 20)["posterior_predictive"]["y"].shape == (1, 20, N)
