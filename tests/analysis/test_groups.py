from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from scivi.analysis import groups
from scivi.errors import DataError


def test_missing_group_and_variable_are_named(catalogue):
    tree = catalogue(rows=5, draws=30, extra=False)
    with pytest.raises(DataError, match=r'no group "history".*Make one with scivi.draw'):
        groups.group(tree, "history")
    with pytest.raises(DataError, match=r"""group "posterior" lacks \['nu'\]; it has \['mu', 'z'\]"""):
        groups.group(tree, "posterior", "nu")


def test_rows_are_found_from_weights_provenance_or_likelihood(catalogue):
    tree = catalogue(rows=5, draws=30)
    assert groups.row_dim(tree) == "source"
    assert groups.local_rows(tree) == 5
    assert groups.population_names(tree) == ["mu"]
    nuts = catalogue(rows=5, draws=30, method="nuts", extra=False)
    assert groups.row_dim(nuts) == "source"
    assert groups.local_rows(nuts) == 0


def test_entrywise_in_blocks_equals_whole():
    array = xr.DataArray(
        np.random.default_rng(0).normal(size=(2, 5, 7, 3)),
        dims=("chain", "draw", "band", "source"),
        coords={"band": list("abcdefg"), "source": [10, 11, 12]},
        name="u",
    ).transpose("source", "draw", "band", "chain")
    small = groups.entrywise(array, groups.moments, block=20)
    np.testing.assert_allclose(small["mean"], array.mean(("chain", "draw")), rtol=1e-12)  # float64 sum of ten
    np.testing.assert_allclose(small["sd"], array.std(("chain", "draw")), rtol=1e-12)
    assert groups.labels(small["mean"].rename("u"))[1] == "u[10, b]"


@pytest.mark.parametrize(
    ("time", "told"),
    [
        ("2015-01-12", "v[2015-01-12]"),
        ("2015-01-12T09:30", "v[2015-01-12T09:30:00]"),
        ("2015-01-12T00:00:00.5", "v[2015-01-12T00:00:00.500000000]"),
        ("NaT", "v[NaT]"),
    ],
)
def test_days_are_named_by_their_date(time, told):
    at = np.array([time, "2015-01-13"], "datetime64[ns]")
    assert groups.labels(xr.DataArray(np.zeros(2), {"day": at}, ("day",), name="v")) == [
        told,
        "v[2015-01-13]",
    ]


def test_worst_entry_is_named():
    array = xr.DataArray(
        np.zeros((1, 2, 3)), dims=("chain", "draw", "source"), coords={"source": ["a", "b", "c"]}, name="z"
    )
    assert groups.worst(array, np.array([0.1, np.nan, 0.3])) == (0.3, "z[c]")
    assert np.isnan(groups.worst(array, np.full(3, np.nan))[0])
