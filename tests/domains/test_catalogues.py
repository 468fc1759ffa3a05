"""What other programs read of a posterior of sources."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr

from domains.astrophysics.catalogues import catalogue
from scivi.errors import DataError

Table = pytest.importorskip("astropy.table", reason='comes with the extra "astro"').Table

N, DRAWS = 4, 4001


def result() -> xr.DataTree:
    """Log fluxes whose quantiles are known: draws are evenly spaced quantiles of a uniform."""
    place = np.arange(N)[:, None] + np.array([0.0, 10.0])  # source, band
    draws = place + np.linspace(-1, 1, DRAWS)[:, None, None]
    posterior = xr.Dataset(
        {"log_brightness": (("chain", "draw", "source", "band"), draws[None])},
        {"source": [f"X{k}" for k in range(N)], "band": ["soft", "hard"]},
    )
    stats = {
        "outside": (("source",), np.arange(N) == 2),
        "row_log_weight": (("chain", "draw", "source"), np.zeros((1, DRAWS, N))),
    }
    tree = xr.DataTree.from_dict({"posterior": posterior, "sample_stats": xr.Dataset(stats)})
    tree.attrs = {"verdict": "trust", "why": json.dumps(["All is well."])}
    tree.attrs["provenance"] = json.dumps({"template": "photons"})
    return tree


@pytest.mark.parametrize("ending", ["fits", "ecsv"])
def test_a_catalogue_is_read_back_as_it_was(tmp_path, ending):
    catalogue(result(), prob=0.5).write(tmp_path / f"sky.{ending}")
    read = Table.read(tmp_path / f"sky.{ending}")
    assert [str(name) for name in read["source"]] == ["X0", "X1", "X2", "X3"]
    for name, offset in (("soft_lower", -0.5), ("soft", 0.0), ("soft_upper", 0.5), ("hard", 10.0)):
        np.testing.assert_allclose(read[f"flux_{name}"], np.exp(np.arange(N) + offset), rtol=1e-6)
    assert list(read["outside"]) == [False, False, True, False]
    told = {key.lower(): value for key, value in read.meta.items()}
    assert told["verdict"] == "trust"
    assert told["prob"] == 0.5
    assert "All is well." in str(told["comments"])


def test_a_posterior_of_something_else_is_refused():
    other = xr.DataTree.from_dict({"posterior": xr.Dataset({"mu": (("chain", "draw"), np.zeros((1, 3)))})})
    with pytest.raises(DataError, match='no "log_brightness" by source and band'):
        catalogue(other)
