"""What other tools read of a posterior of rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from domains.kinetics import kinetics
from domains.kinetics.estimates import parameter_table
from scivi.errors import DataError

petab = pytest.importorskip("petab.v1", reason="petab reads the table")
pytest.importorskip("libsbml", reason="python-libsbml reads SBML")

BOEHM = Path(__file__).resolve().parents[3] / "data" / "kinetics" / "Boehm_JProteomeRes2014"


def drawn(theta: np.ndarray) -> xr.DataTree:
    """A posterior of theta (draw, parameter)."""
    return xr.DataTree.from_dict(
        {"posterior": xr.Dataset({"theta": (("chain", "draw", "parameter"), theta[None])})}
    )


def test_a_posterior_at_the_published_optimum_gives_the_published_table(tmp_path):
    """Draws spread evenly on their scale about PEtab's own nominal values: their medians are these."""
    template, _ = kinetics.from_data(BOEHM, starts=0)
    published = petab.get_parameter_df(str(BOEHM / "parameters_Boehm_JProteomeRes2014.tsv"))
    estimated = published[published["estimate"] == 1]
    assert set(estimated["parameterScale"]) == {"log10"}
    centre = np.log10(estimated["nominalValue"].to_numpy(float))
    result = drawn(centre + np.linspace(-0.5, 0.5, 101)[:, None])
    parameter_table(template, result, prob=0.8).to_csv(tmp_path / "found.tsv", sep="\t")
    read = petab.get_parameter_df(str(tmp_path / "found.tsv"))
    petab.check_parameter_df(read)
    assert set(read.index) == set(published.index)
    for column in ("nominalValue", "lowerBound", "upperBound"):
        ours = read.loc[estimated.index, column].to_numpy(float)
        np.testing.assert_allclose(ours, estimated[column].to_numpy(float), rtol=1e-9)
    low, high = (read.loc[estimated.index, f"posterior{end}"].to_numpy(float) for end in ("Lower", "Upper"))
    np.testing.assert_allclose(np.log10(high / low), 0.8, rtol=1e-9)


def test_a_posterior_of_other_parameters_is_refused():
    template, _ = kinetics.from_data(BOEHM, starts=0)
    with pytest.raises(DataError, match='no "theta" of 9 parameters'):
        parameter_table(template, drawn(np.zeros((3, 2))))
