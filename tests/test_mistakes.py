"""Ten common mistakes with the templates of ``domains``: each is told in words that say what to do.

The page is docs/common-mistakes.md. Nothing is fitted: each mistake is told when the data are opened.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from typer.testing import CliRunner

from domains.astrophysics import photons
from domains.finance import returns, volatility
from domains.genomics import citeseq, methylation
from domains.kinetics import kinetics
from scivi.cli import app
from scivi.errors import DataError, SciVIError, Unsupported
from scivi.inference.opening import open_data

DATA = Path(__file__).resolve().parents[1] / "data"
COUNTS = ("n_on", "n_off", "alpha", "exposure")


@pytest.fixture
def field() -> xr.Dataset:
    """Thirty X-ray sources in three bands."""
    with xr.open_dataset(DATA / "chandra_ic2395.nc") as table:
        return table[[*COUNTS]].isel(source=slice(0, 30)).load()


@pytest.fixture
def cells() -> anndata.AnnData:
    """Sixty blood cells: RNA in X, proteins in obsm."""
    return anndata.read_h5ad(DATA / "citeseq_pbmc10k.h5ad")[:60].copy()


@pytest.fixture
def reads() -> anndata.AnnData:
    """Sixty loci of thirteen plants."""
    return anndata.read_h5ad(DATA / "methylation_simulated.h5ad")[:60].copy()


@pytest.fixture
def daily() -> pd.DataFrame:
    """Returns of two series, percent, sd 1."""
    days = pd.date_range("2024-01-01", periods=250)
    return pd.DataFrame(np.random.default_rng(0).normal(size=(250, 2)), days, pd.Index(["a", "b"]))


@pytest.fixture
def problem(tmp_path) -> Path:
    """A copy of a PEtab problem, to be broken."""
    return Path(shutil.copytree(DATA / "kinetics/Boehm_JProteomeRes2014", tmp_path / "boehm"))


def arrays(field: xr.Dataset) -> dict[str, np.ndarray]:
    return {name: field[name].values for name in COUNTS}


def refused(template, data, *words: str) -> None:
    """The data are refused, with one line for the fault that holds these words."""
    with pytest.raises(SciVIError) as caught:
        open_data(template, data)
    lines = str(caught.value).splitlines()
    assert any(all(word in line for word in words) for line in lines), str(caught.value)


def opened(maker, data, **options):
    template, table = maker(data, **options)
    return open_data(template, table)


def edited(problem: Path, table: str, edit) -> Path:
    (path,) = problem.glob(f"{table}*.tsv")
    edit(pd.read_csv(path, sep="\t")).to_csv(path, sep="\t", index=False)
    return problem


def test_1_a_dim_of_another_name(field):
    words = (
        'has dims ("src", "band")',
        'needs ("source", "band")',
        'rename({"src": "source"})',
        "--dim src=source",
    )
    refused(photons.template, field.rename(source="src"), *words)


def test_2_a_transposed_matrix(field):
    plain = arrays(field)
    table = {**plain, "n_on": plain["n_on"].T}
    refused(photons.template, table, 'field "n_on" is 3 x 30', "one of them is transposed", "Pass its .T")
    every = {name: values.T for name, values in plain.items()}
    refused(photons.template, every, "there are 30 bands of 3 sources", "pass their .T")


def test_2_transposed_reads(reads):
    template, table = methylation.from_data(reads.T.copy())
    refused(template, table, "the rows are nodes of the pedigree", "pass the transpose, .T")


def test_2_one_of_two_matrices_is_transposed(reads):
    template, _ = methylation.from_data(reads)
    names = {
        d: ((d,), np.asarray(x, str)) for d, x in (("locus", reads.obs_names), ("sample", reads.var_names))
    }
    table = {n: reads.layers[n].astype(float) for n in ("methylated", "total")}
    table |= names | {"context": reads.obs["context"].to_numpy(str), "total": table["total"].T}
    refused(template, table, "one of them is transposed", "Pass its .T")


@pytest.mark.parametrize("how", [np.log1p, lambda x: x / x.sum(), lambda x: x - x.mean()])
def test_3_normalised_counts(cells, how):
    words = ('field "rna"', "not whole numbers >= 0", "not normalised, not in logs, with nothing subtracted")
    cells.X = np.asarray(how(np.asarray(cells.X.todense(), float)))
    with pytest.raises(DataError) as caught:
        opened(citeseq.from_data, cells)
    assert all(word in str(caught.value) for word in words)


def test_3_net_counts_and_shares_of_reads(field, reads):
    net = field.assign(n_on=field["n_on"] - field["alpha"] * field["n_off"])
    refused(photons.template, net, 'field "n_on"', "with nothing subtracted")
    reads.layers["methylated"] = reads.layers["methylated"] / np.maximum(reads.layers["total"], 1)
    refused(*methylation.from_data(reads), 'field "methylated"', "not normalised")


def test_4_returns_as_fractions(daily):
    with pytest.warns(
        UserWarning, match=r"sd of 0\.01 percent a day: if they are fractions, multiply by 100"
    ):
        open_data(volatility.template, returns.from_returns(daily / 100))
    assert (
        open_data(volatility.template, returns.from_returns(daily)).sizes["day"] == 250
    )  # without a warning


def test_4_prices_given_as_returns_and_returns_as_prices(daily):
    prices = 100 * np.exp(daily.cumsum() / 100)
    refused(volatility.template, returns.from_returns(prices), "are these prices?", "from_prices")
    with pytest.raises(DataError, match="a price is positive and finite"):
        returns.from_prices(daily)


def test_5_a_number_that_stands_for_missing(field, reads):
    masked = field.assign(n_on=field["n_on"].where(field["n_on"] > 3, -99).astype("i8"))
    refused(photons.template, masked, "the first is -99 at source=", "was not measured, make it NaN")
    reads.layers["methylated"] = np.where(
        reads.layers["total"] > 6, reads.layers["methylated"].astype("i8"), -1
    )
    refused(*methylation.from_data(reads), 'field "methylated"', "make it NaN")


def test_5_counts_that_wrapped_around(field):
    wrapped = field.assign(n_on=field["n_on"].astype("i2") - np.int16(40))
    refused(photons.template, wrapped, "store the counts in a wider integer type")


@pytest.mark.parametrize(
    ("table", "edit", "words"),
    [
        ("observables", lambda t: t.drop(columns="noiseFormula"), 'has no column "noiseFormula"'),
        ("observables", lambda t: t.assign(noiseFormula=""), "line 2: noiseFormula is empty"),
        ("measurementData", lambda t: t.drop(columns="noiseParameters"), '"pSTAT5A_rel" needs 1'),
    ],
)
def test_6_petab_without_noise(problem, table, edit, words):
    pytest.importorskip("petab", reason="waits for the extra kinetics")
    with pytest.raises(DataError) as caught:
        kinetics.from_data(edited(problem, table, edit))
    assert words in str(caught.value)


def test_7_too_few_rows(field, daily):
    refused(photons.template, field.isel(source=slice(0, 0)), 'dim "source" is empty')
    refused(volatility.template, returns.from_returns(daily[:6]), 'series "a" has 6 returns', "10 at least")


def test_8_a_constant_column(daily):
    table = returns.from_returns(daily.assign(c=0.0))
    refused(volatility.template, table, 'series "c" is constant at 0', "no volatility to be found")


def test_9_a_misspelt_template(tmp_path):
    command = ["fit", "domains.astrophysics.photons:templat", str(DATA / "chandra_ic2395.nc")]
    found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "fit")])
    assert found.exit_code == 1
    assert 'no template "templat"' in found.output
    assert "template" in found.output.partition("has")[2]  # what it has instead
    assert not (tmp_path / "fit").exists()


def test_10_an_extra_that_is_not_installed(tmp_path, monkeypatch):
    catalogue = tmp_path / "field.ecsv"
    catalogue.write_text("# %ECSV 1.0\n")
    monkeypatch.setitem(sys.modules, "astropy.table", None)
    with pytest.raises(Unsupported, match=r'"astropy" is not installed.*pip install "scivi\[astro\]"'):
        open_data(photons.template, catalogue)
    monkeypatch.setitem(sys.modules, "petab.v1", None)
    with pytest.raises(Unsupported, match=r'"petab" is not installed.*pip install "scivi\[kinetics\]"'):
        kinetics.from_data(DATA / "kinetics/Boehm_JProteomeRes2014")


def test_a_missing_column_is_named_with_what_there_is(field):
    words = ('field "n_on" is missing', "The Dataset has counts", "--column n_on=COLUMN")
    refused(photons.template, field.rename(n_on="counts"), *words)
