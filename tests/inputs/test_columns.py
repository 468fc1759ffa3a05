"""Words that a field knows become their places, whatever holds them."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from torch.distributions import constraints

from scivi.errors import DataError
from scivi.inputs.columns import arranged
from scivi.inputs.fields import Field
from scivi.inputs.sources import TableSource, from_table, open_source
from scivi.inputs.tables import as_table

CONTEXTS = ("CG", "CHG", "CHH")
WORDS = np.array(CONTEXTS)[np.random.default_rng(0).integers(0, 3, 30)]
PLACES = np.array([CONTEXTS.index(word) for word in WORDS])
FIELDS = {
    "n": Field(("locus",), "observed", constraints.nonnegative_integer),
    "context": Field(("locus",), labels=CONTEXTS),
}


def opened(data, fields=FIELDS) -> TableSource:
    return open_source(data, fields, ("locus",), name="loci")


def annotated(words) -> anndata.AnnData:
    frame = pd.DataFrame({"n": np.arange(30), "context": words}, [f"l{k}" for k in range(30)])
    return anndata.AnnData(obs=frame)


def written(kind: str, words, path: Path):
    """The words in one kind of data."""
    table = xr.Dataset({"n": ("locus", np.arange(30)), "context": ("locus", np.asarray(words))})
    kind, _, held = kind.partition(", ")
    column = pd.Categorical(words, ["unused", *CONTEXTS][::-1]) if held == "categories" else words
    path = path / f"table.{kind.rpartition(' ')[2]}"
    match kind:
        case "dict":
            return {"n": np.arange(30), "context": words.astype(object if held else "S")}
        case "dataset":
            return table
        case "nc":
            table.to_netcdf(path, engine="h5netcdf")
        case "zarr":
            table.to_zarr(path, zarr_format=2)
        case "frame":
            return pd.DataFrame({"n": np.arange(30), "context": column})
        case "csv":
            table.to_dataframe().to_csv(path, index=False)
        case "ecsv":
            pytest.importorskip("astropy.table").Table({"n": np.arange(30), "context": words}).write(path)
        case "adata":
            return annotated(column)
        case "adata h5ad":
            annotated(column).write_h5ad(path, convert_strings_to_categoricals=held == "categories")
        case _:
            with warnings.catch_warnings():  # anndata 0.12 announces that its format will change
                warnings.simplefilter("ignore")
                annotated(column).write_zarr(path, convert_strings_to_categoricals=held == "categories")
    return path


KINDS = (
    "dict", "dict, objects", "dataset", "nc", "zarr", "frame", "frame, categories", "csv", "ecsv",
    "adata", "adata, categories", "adata h5ad", "adata h5ad, categories",
    "adata zarr", "adata zarr, categories",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_every_kind_are_read_as_places(kind, tmp_path):
    source = opened(written(kind, WORDS, tmp_path))
    rows = np.array([17, 2, 29, 2, 0])
    np.testing.assert_array_equal(source.read({})["context"], PLACES)
    np.testing.assert_array_equal(source.read({"locus": rows})["context"], PLACES[rows])
    assert source.kept("locus", None, np.dtype(np.float32))["context"].dtype == np.uint8
    assert source.fingerprint == opened({"n": np.arange(30), "context": WORDS}).fingerprint


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "categories" in kind])
def test_of_categories_the_codes_alone_are_read(kind, tmp_path, monkeypatch):
    def refused(places, words):
        raise AssertionError("a word was made for each row")

    data = written(kind, WORDS, tmp_path)
    monkeypatch.setattr("scivi.inputs.columns.words_at", refused)
    opened(data).read({"locus": np.array([3, 1])})


@pytest.mark.parametrize("kind", ["adata h5ad, categories", "adata, categories", "adata h5ad"])
def test_some_labels_of_a_dim_can_be_chosen(kind, tmp_path):
    table = as_table(written(kind, WORDS, tmp_path))
    chosen = arranged(table, dims={"obs": "locus"}, select={"obs": ["l7", "l3", "l4"]})
    again = arranged(chosen, select={"locus": ["l4", "l7"]})
    np.testing.assert_array_equal(opened(chosen).read({})["context"], PLACES[[7, 3, 4]])
    np.testing.assert_array_equal(opened(again).read({})["context"], PLACES[[4, 7]])


def test_whole_numbers_and_booleans_may_be_labels():
    fields = {
        "n": FIELDS["n"],
        "batch": Field(("locus",), labels=("10", "2")),
        "treated": Field(("locus",), labels=("False", "True")),
    }
    for number in (np.int16, np.float32, float, object):  # floats are what whole numbers with gaps become
        data = {"n": [0, 0, 0], "batch": np.array([2, 10, 2], number), "treated": [True, False, True]}
        arrays = opened({name: np.array(values) for name, values in data.items()}, fields).read({})
        assert arrays["batch"].tolist() == [1, 0, 1]
        assert arrays["treated"].tolist() == [1, 0, 1]


STRANGE = np.array(["CG", "CX", "CHH", "", "N", "CX", "CHN", "M", "W", "CG"])


@pytest.mark.parametrize("held", ["text", "categories", "h5ad"])
def test_strange_and_missing_words_are_told(held, tmp_path):
    words = pd.Series(STRANGE).where(STRANGE != "", None)
    words = words if held == "text" else words.astype("category")
    data = pd.DataFrame({"n": np.zeros(10), "context": words})
    if held == "h5ad":
        data = tmp_path / "table.h5ad"
        frame = pd.DataFrame({"n": np.zeros(10), "context": words.values}, [str(k) for k in range(10)])
        anndata.AnnData(obs=frame).write_h5ad(data)
    with pytest.raises(DataError) as caught:
        opened(data)
    assert str(caught.value).splitlines()[1:] == [
        '  - field "context": 6 of 10 entries are none of CG, CHG, CHH; the first is "CX" at locus=1. '
        'Others are "N", "CHN", "M".',
        '  - field "context": 1 of 10 entries are missing; the first at locus=3. '
        "A given field may not have missing entries.",
    ]


def test_one_strange_word_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr("scivi.inputs.sources._CHUNK", 7)
    words = np.where(np.isin(np.arange(30), [17, 20, 29]), "CX", WORDS)
    line = 'field "context": 3 of 30 entries are none of CG, CHG, CHH; the first is "CX" at locus=17.'
    with pytest.raises(DataError, match=f"{line}$"):
        opened({"n": np.arange(30), "context": words})


def test_a_missing_word_of_an_observed_field_is_a_gap():
    fields = {"call": Field(("locus",), "observed", labels=("U", "M"))}
    source = opened({"call": np.array(["M", "", "U"])}, fields)
    np.testing.assert_array_equal(source.read({})["call"], [1, np.nan, 0])
    assert source.spans["call"].gaps


def test_a_column_of_words_that_is_missing_takes_its_default_or_is_told():
    fields = {**FIELDS, "strand": Field(("locus",), labels=("+", "-"), default="-")}
    source = opened({"n": np.arange(30), "context": WORDS}, fields)
    assert (source.read({})["strand"] == 1).all()
    with pytest.raises(DataError, match=r'"context" is missing \(dims \("locus",\), one of CG, CHG, CHH\)'):
        opened({"n": np.arange(30)})


LONG = pd.DataFrame(
    {
        "locus": np.repeat(["a", "b", "c"], 2),
        "sample": ["s1", "s2"] * 3,
        "n": np.arange(6),
        "context": np.repeat(["CHH", "CG", "CG"], 2),
        "call": ["U", "M", "M", "M", "U", "U"],
        "note": list("uvwxyz"),
    }
)


@pytest.mark.parametrize("held", ["text", "categories"])
def test_a_long_table_keeps_its_words(held):
    fields = {
        "n": Field(("locus", "sample"), "observed"),
        "context": FIELDS["context"],
        "call": Field(("locus", "sample"), "observed", labels=("U", "M")),
    }
    data = LONG.astype({"context": "category", "call": "category"}) if held == "categories" else LONG
    arrays = opened(data, fields).read({})
    assert arrays["context"].tolist() == [2, 0, 0]
    assert arrays["call"].tolist() == [[0, 1], [1, 1], [0, 0]]
    gap = opened(data.drop(index=4), fields).read({})["call"]
    np.testing.assert_array_equal(gap, [[0, 1], [1, 1], [np.nan, 0]])
    with pytest.raises(DataError, match=r"context.*differs within a label in 1 lines; the first is line 5"):
        opened(data.assign(context=[*LONG.context[:5], "CHG"]), fields)


def test_text_is_pivoted_where_it_is_wanted():
    table = from_table(LONG, ("locus", "sample"), narrow={"context": "locus"})
    assert table.context.dims == ("locus",)
    assert table.context.values.tolist() == ["CHH", "CG", "CG"]
    assert "note" not in table
