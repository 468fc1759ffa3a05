"""Every kind of data gives the same rows; every fault of a table is told at once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import sparse
from torch.distributions import constraints

from scivi.errors import DataError, Unsupported
from scivi.inputs.fields import Field
from scivi.inputs.sources import arranged, as_table, from_anndata, from_table, open_source

ROOT = Path(__file__).resolve().parents[2]
N_CELLS, N_GENES, N_PROTEINS = 40, 6, 3
FIELDS = {
    "counts": Field(("cell", "gene"), "observed", constraints.nonnegative_integer),
    "protein": Field(("cell", "protein"), "observed", constraints.nonnegative_integer),
    "size": Field(("cell",), "given", constraints.positive),
    "length": Field(("gene",), "given", constraints.positive),
    "alpha": Field((), "given", constraints.positive),
    "weight": Field(("cell", "gene"), "given", constraints.positive, default=1.0),
}


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "counts": rng.poisson(0.7, (N_CELLS, N_GENES)).astype(np.float32),
        "protein": rng.poisson(5.0, (N_CELLS, N_PROTEINS)).astype(np.float32),
        "size": rng.gamma(5.0, 1.0, N_CELLS),
        "length": rng.gamma(5.0, 1.0, N_GENES),
        "alpha": np.array(0.25),
    }


@pytest.fixture(scope="module")
def dataset(truth) -> xr.Dataset:
    arrays = {name: (FIELDS[name].dims, values) for name, values in truth.items()}
    return xr.Dataset(arrays, coords={"cell": [f"c{k}" for k in range(N_CELLS)], "gene": list("abcdef")})


def annotated(truth, *, layer=sparse.csr_matrix) -> anndata.AnnData:
    proteins = pd.DataFrame(truth["protein"], [f"c{k}" for k in range(N_CELLS)], list("PQR"))
    return anndata.AnnData(
        sparse.csr_matrix(np.zeros((N_CELLS, N_GENES), np.float32)),
        obs=pd.DataFrame({"size": truth["size"], "kind": pd.Categorical(["x"] * N_CELLS)}, proteins.index),
        var=pd.DataFrame({"length": truth["length"]}, list("abcdef")),
        layers={"counts": layer(truth["counts"])},
        obsm={"protein": proteins},
        uns={"alpha": 0.25},
    )


def write_zarr(adata: anndata.AnnData, path: Path) -> None:
    with warnings.catch_warnings():  # anndata 0.12 announces that its format will change
        warnings.simplefilter("ignore")
        adata.write_zarr(path)


KINDS = (
    "dataset", "netcdf", "netcdf3", "zarr", "transposed", "dict", "dict of pairs",
    "adata", "adata csc", "adata dense", "h5ad", "h5ad backed", "adata zarr",
)  # fmt: skip


@pytest.fixture(params=KINDS)
def data(request, truth, dataset, tmp_path):
    match request.param:
        case "dataset":
            return dataset
        case "transposed":
            return dataset.transpose("protein", "gene", "cell")
        case "netcdf" | "netcdf3":
            path, three = tmp_path / "table.nc", request.param == "netcdf3"
            form = {"engine": "scipy"} if three else {"engine": "h5netcdf"}
            dataset.to_netcdf(path, **form)
            return path
        case "zarr":
            dataset.to_zarr(tmp_path / "table.zarr", zarr_format=2)
            return tmp_path / "table.zarr"
        case "dict":
            return truth
        case "dict of pairs":
            return {name: (FIELDS[name].dims[::-1], values.T) for name, values in truth.items()}
        case "adata" | "adata csc" | "adata dense":
            layer = {"adata": sparse.csr_matrix, "adata csc": sparse.csc_matrix, "adata dense": np.array}
            return annotated(truth, layer=layer[request.param])
        case "h5ad" | "h5ad backed":
            annotated(truth).write_h5ad(tmp_path / "table.h5ad")
            path = tmp_path / "table.h5ad"
            return path if request.param == "h5ad" else anndata.read_h5ad(path, backed="r")
        case _:
            write_zarr(annotated(truth), tmp_path / "adata.zarr")
            return tmp_path / "adata.zarr"


def opened(data, fields=FIELDS, rows=("cell",), **more):
    return open_source(data, fields, rows, name="cells", **more)


def test_every_kind_gives_the_same_rows(data, truth):
    source = opened(data)
    assert dict(source.sizes) == {"cell": N_CELLS, "gene": N_GENES, "protein": N_PROTEINS}
    whole = source.read({})
    rows = np.array([17, 2, 39, 2, 0])  # unsorted, with a repetition
    some = source.read({"cell": rows})
    for name, values in truth.items():
        np.testing.assert_array_equal(whole[name], values)
        np.testing.assert_array_equal(some[name], values[rows] if "cell" in FIELDS[name].dims else values)
    assert whole["weight"].shape == (N_CELLS, N_GENES)
    assert (some["weight"] == 1.0).all()
    assert source.nbytes == 4 * (2 * N_CELLS * N_GENES + N_CELLS * N_PROTEINS + N_CELLS + N_GENES + 1)
    # the same entries have the same fingerprint, whatever holds them
    assert source.fingerprint == opened(truth).fingerprint


def test_labels_come_from_the_data(data):
    coords = opened(data).coords
    if not isinstance(data, dict):
        assert coords["cell"][[0, 39]].tolist() == ["c0", "c39"]
        assert coords["gene"].tolist() == list("abcdef")
    assert coords["protein"].tolist() in ([0, 1, 2], list("PQR"))
    assert set(coords) == {"cell", "gene", "protein"}


def test_what_is_read_can_be_changed_without_changing_the_data(truth):
    before = {name: values.copy() for name, values in truth.items()}
    arrays = opened(truth).read({})
    for values in arrays.values():
        values += 1
    for name, values in truth.items():
        np.testing.assert_array_equal(values, before[name])


def test_an_annotated_table_is_not_written_to(truth):
    adata = annotated(truth)
    before = adata.copy()
    for values in opened(adata).read({}).values():
        values += 1
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.obsm["protein"], before.obsm["protein"])
    assert (adata.layers["counts"] != before.layers["counts"]).nnz == 0
    assert list(adata.uns) == ["alpha"]


def test_fingerprint_sees_one_entry(truth):
    changed = {**truth, "counts": truth["counts"].copy()}
    changed["counts"][3, 3] += 1
    assert opened(changed).fingerprint != opened(truth).fingerprint


def test_fingerprint_does_not_depend_on_the_size_of_chunks(truth, monkeypatch):
    whole = opened(truth).fingerprint
    monkeypatch.setattr("scivi.inputs.sources._CHUNK", 7)
    assert opened(truth).fingerprint == whole


def test_an_opened_source_is_returned_as_it_is(truth):
    source = opened(truth)
    assert opened(source) is source


def test_given_fields_are_repeated_along_dims_that_they_lack():
    fields = {
        "n": Field(("source", "band"), "observed", constraints.nonnegative_integer),
        "alpha": Field(("source", "band"), "given", constraints.positive),
        "exposure": Field(("source", "band"), "given", constraints.positive),
    }
    table = xr.Dataset(
        {"n": (("source", "band"), np.ones((4, 2))), "alpha": ("band", [1.0, 2.0]), "exposure": 3.0}
    )
    arrays = opened(table, fields, ("source",)).read({"source": np.array([3, 0, 1])})
    np.testing.assert_array_equal(arrays["alpha"], [[1.0, 2.0]] * 3)
    np.testing.assert_array_equal(arrays["exposure"], np.full((3, 2), 3.0))
    assert all(values.flags.writeable for values in arrays.values())  # torch warns of others
    with pytest.raises(DataError, match=r'"n" has dims \("band",\).*An observed field must have all of them'):
        opened(table.assign(n=("band", [1, 2])), fields, ("source",))


def test_sizes_of_the_template_are_added(truth):
    source = opened(truth, sizes={"factor": 2, "gene_other": "gene"})
    assert source.sizes["factor"] == 2
    assert source.sizes["gene_other"] == N_GENES
    assert source.coords["factor"].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [bool, "u2", "u8", ">i4", ">f8", "f2", np.longdouble])
def test_types_that_torch_cannot_read_are_widened(dtype):
    import torch

    values = np.array([1, 0, 1]).astype(dtype)
    array = opened({"x": values}, {"x": Field(("row",), "observed")}, ("row",)).read({})["x"]
    np.testing.assert_array_equal(torch.as_tensor(array).to(torch.float32), [1.0, 0.0, 1.0])


# ---------------------------------------------------------------- tables of lines

LONG = pd.DataFrame(
    {
        "source": ["s1", "s1", "s2", "s2", "s3", "s3"],
        "band": ["soft", "hard"] * 3,
        "n_on": [0, 1, 2, 3, 4, 5],
        "edge": [0.5, 2.0] * 3,
        "note": list("abcdef"),
    }
)
BANDS = {
    "n_on": Field(("source", "band"), "observed", constraints.nonnegative_integer),
    "edge": Field(("band",), "given", constraints.positive),
}


@pytest.mark.parametrize("form", ["frame", "indexed", "csv", "tsv", "ecsv", "fits", "astropy"])
def test_a_long_table_is_pivoted(form, tmp_path):
    path = tmp_path / f"table.{form}"
    data = path
    if form in ("ecsv", "fits", "astropy"):
        table = pytest.importorskip("astropy.table").Table.from_pandas(LONG)
        data = table if form == "astropy" else path
        if form != "astropy":
            table.write(path)
    elif form in ("csv", "tsv"):
        LONG.to_csv(path, sep="," if form == "csv" else "\t", index=False)
    else:
        data = LONG if form == "frame" else LONG.set_index(["source", "band"])
    source = opened(data, BANDS, ("source",))
    arrays = source.read({})
    np.testing.assert_array_equal(arrays["n_on"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(arrays["edge"], [0.5, 2.0])
    assert source.coords["source"].tolist() == ["s1", "s2", "s3"]
    assert source.coords["band"].tolist() == ["soft", "hard"]


def test_combinations_that_do_not_occur_are_missing():
    table = from_table(LONG.drop(index=1), ("source", "band"), narrow={"edge": "band"})
    assert np.isnan(table.n_on.sel(source="s1", band="hard"))
    assert table.n_on.sel(source="s3", band="hard") == 5
    assert table.edge.dims == ("band",)
    assert "note" not in table


def test_a_long_table_that_cannot_be_pivoted_says_why():
    with pytest.raises(DataError, match="no column 'src'; it has band, edge, n_on, note, source"):
        from_table(LONG, ("src", "band"))
    with pytest.raises(DataError, match=r"n_on.*1 combinations occur more than once; see line 0"):
        from_table(pd.concat([LONG, LONG[:1]]), ("source", "band"))
    with pytest.raises(DataError, match=r'"n_on", \(\'source\',\): it differs within a label in 3 lines'):
        from_table(LONG, ("source", "band"), narrow={"n_on": "source"})


def test_a_wide_frame_has_one_row_a_line():
    fields = {"y": Field(("school",), "observed"), "sd": Field(("school",), support=constraints.positive)}
    frame = pd.DataFrame({"y": [28.0, 8.0], "sd": pd.array([15, 10], "Int64")}, ["A", "B"])
    source = opened(frame, fields, ("school",))
    assert source.coords["school"].tolist() == ["A", "B"]
    np.testing.assert_array_equal(source.read({"school": np.array([1])})["sd"], [10])


def test_a_dataarray_stands_for_the_observed_field():
    array = xr.DataArray([1.0, 2.0], dims="school")
    assert opened(array, {"y": Field(("school",), "observed")}, ("school",)).read({})["y"].tolist() == [
        1.0,
        2.0,
    ]


# ---------------------------------------------------------------- places, names, choices


def test_places_of_an_annotated_table_can_be_said(truth):
    fields = {"rna": FIELDS["counts"], "adt": Field(("cell", "protein"), "observed"), "depth": FIELDS["size"]}
    table = from_anndata(
        annotated(truth), {"obs": "cell"}, rna="layers/counts", adt="obsm/protein", depth="obs/size"
    )
    source = opened(table, fields)
    np.testing.assert_array_equal(source.read({})["rna"], truth["counts"])
    assert source.coords["protein"].tolist() == list("PQR")
    with pytest.raises(DataError, match=r'no dim "cells"[\s\S]*no column "obsm/adt" \(wanted for "adt"\)'):
        from_anndata(annotated(truth), {"cells": "cell"}, adt="obsm/adt")
    with pytest.raises(DataError, match="takes an AnnData, not a dict of arrays"):
        from_anndata(truth)


def test_a_place_is_never_guessed(truth):
    fields = {"rna": FIELDS["counts"]}
    with pytest.raises(DataError, match=r'"rna" is missing.*from_anndata\(adata, rna="X"\)'):
        opened(annotated(truth), fields)
    adata = annotated(truth)
    adata.obsm["counts"] = adata.obsm["protein"]
    with pytest.raises(DataError, match='"counts" could be any of layers/counts, obsm/counts'):
        opened(adata, {"counts": FIELDS["counts"]})


def test_one_axis_of_an_annotated_table_is_one_dim(truth):
    adata = annotated(truth)
    table = from_anndata(adata, counts="layers/counts", protein="X")
    words = r'"protein" has dims \("cell", "gene"\); the template needs \("cell", "protein"\)'
    with pytest.raises(DataError, match=words):
        opened(table, {name: FIELDS[name] for name in ("counts", "protein")})


@pytest.mark.parametrize("form", ["dataset", "lines"])
def test_dims_are_renamed_and_labels_chosen(form):
    wide = from_table(LONG.rename(columns={"source": "src"}), ("src", "band"), narrow={"edge": "band"})
    data = wide if form == "dataset" else LONG.rename(columns={"source": "src"})
    table = arranged(as_table(data), dims={"src": "source"}, select={"band": ["hard"], "src": ["s2", "s3"]})
    source = opened(table, BANDS, ("source",))
    assert dict(source.sizes) == {"source": 2, "band": 1}
    np.testing.assert_array_equal(source.read({"source": np.array([1, 0])})["n_on"], [[5], [3]])
    assert source.coords["source"].tolist() == ["s2", "s3"]
    with pytest.raises(DataError, match=r"no label 'broad'; it has (soft, hard|hard, soft)"):
        arranged(as_table(data), select={"band": ["broad"]})


# ---------------------------------------------------------------- faults

ONOFF = {
    "n_on": Field(("source", "band"), "observed", constraints.nonnegative_integer),
    "n_off": Field(("source", "band"), "observed", constraints.nonnegative_integer),
    "alpha": Field(("source", "band"), "given", constraints.positive),
    "exposure": Field(("source", "band"), "given", constraints.positive, default=1.0),
}


def onoff(**changed) -> xr.Dataset:
    dims = ("source", "band")
    arrays = {"n_on": np.zeros((3, 2), int), "n_off": np.zeros((3, 2), int), "alpha": np.full((3, 2), 0.1)}
    return xr.Dataset({name: (dims, values) for name, values in {**arrays, **changed}.items()})


def test_no_counts_at_all_are_data():
    assert opened(onoff(), ONOFF, ("source",)).read({})["n_on"].sum() == 0


def test_one_error_tells_every_fault():
    counts = np.array([[40_000, 2], [3, 4], [5, 6]], np.uint16).astype(np.int16)
    alpha = np.array([[0.1, 0.0], [np.nan, 0.1], [-1.0, 0.1]])
    bad = onoff(n_on=counts, alpha=alpha).rename(n_off="n_of").assign(exposure=("time", [1.0]))
    before = bad.copy(deep=True)
    with pytest.raises(DataError) as caught:
        opened(bad, ONOFF, ("source",))
    assert str(caught.value).splitlines() == [
        'the data cannot be used with template "cells":',
        '  - field "n_off" is missing (dims ("source", "band"), whole numbers >= 0). Did you mean "n_of"?',
        '  - field "exposure" has dims ("time",); the template needs ("source", "band"). '
        'Choose one entry along ("time",), or sum over it.',
        '  - field "alpha": 2 of 6 entries are not numbers > 0; the first is 0.0 at source=0, band=1.',
        '  - field "alpha": 1 of 6 entries are missing; the first at source=1, band=0. '
        "A given field may not have missing entries.",
        '  - field "n_on": 1 of 6 entries are not whole numbers >= 0; '
        "the first is -25536 at source=0, band=0. "
        "Negative 16-bit counts come from wrap-around: store the counts in a wider integer type.",
    ]
    xr.testing.assert_identical(bad, before)


FAULTS = {
    "wrong dims": (
        onoff().rename(source="src"),
        r'"n_on" has dims \("src", "band"\); the template needs \("source", "band"\)\. '
        r'Rename the dimension: data.rename\({"src": "source"}\)',
    ),
    "text": (
        onoff().assign(n_on=(("source", "band"), np.full((3, 2), "a"))),
        r'"n_on" has entries of type <U1',
    ),
    "times": (onoff().assign(n_on=(("source", "band"), np.zeros((3, 2), "M8[ns]"))), "times into floats"),
    "empty": (onoff().isel(source=slice(0, 0)), 'dim "source" is empty: the table has no entries'),
    "nothing": (xr.Dataset(), "The Dataset has no columns"),
    "sizes": (
        {"n_on": np.zeros((3, 2)), "n_off": np.zeros((4, 2)), "alpha": 1.0},
        'dim "source" has 3 entries in field "n_on" but 4 in field "n_off"',
    ),
    "shapes": ({"n_on": np.zeros(3), "n_off": np.zeros((3, 2)), "alpha": 1.0}, r'"n_on" has dims \("\?",\)'),
    "lines": (
        pd.DataFrame({"n_on": [1], "n_off": [1], "alpha": [1.0], "band": [0]}),
        r'long table \(add the column "source"\)',
    ),
    "kind": (3, "data of type int cannot be read. Give an AnnData"),
    "no file": ("nowhere.nc", 'there is no "nowhere.nc"'),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_told(case):
    data, words = FAULTS[case]
    with pytest.raises(DataError, match=words):
        opened(data, ONOFF, ("source",))


def test_files_that_cannot_be_read_are_told(tmp_path):
    for name, words in {
        "a.txt": "an ending that we do not know",
        "a.nc": "cannot be read",
        "a.h5ad": "HDF5",
    }.items():
        (tmp_path / name).write_text("nothing")
        with pytest.raises(DataError, match=words):
            opened(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a zarr group"):
        opened(tmp_path / "empty")


def test_categories_are_refused_in_memory_and_on_disk(truth, tmp_path):
    fields = {**FIELDS, "kind": Field(("cell",))}
    annotated(truth).write_h5ad(tmp_path / "table.h5ad")
    for data in (annotated(truth), tmp_path / "table.h5ad"):
        with pytest.raises(DataError, match='"kind" has entries of type object; numbers are needed'):
            opened(data, fields)


def test_a_ragged_array_is_in_nobodys_way_until_it_is_wanted(truth, tmp_path):
    path = tmp_path / "table.h5ad"
    annotated(truth).write_h5ad(path)
    with h5py.File(path, "r+") as file:  # a group, as anndata stores awkward arrays
        ragged = file["obsm"].create_group("ragged")
        ragged.attrs.update({"encoding-type": "awkward-array", "length": N_CELLS})
    assert opened(from_anndata(path, {"obs": "cell"})).sizes["cell"] == N_CELLS
    with pytest.raises(DataError, match='"ragged" has entries of type object; numbers are needed'):
        opened(path, {**FIELDS, "ragged": Field(("cell",))})


@pytest.mark.parametrize("few", [True, False])
def test_a_template_may_refuse_data(few, monkeypatch):
    monkeypatch.setattr("scivi.inputs.sources.FEW_ENTRIES", 1000 if few else 1)

    def overlapping(values, coords):
        assert set(values) == ({*BANDS} if few else {"edge"})
        return [f"bands {', '.join(coords['band'])} overlap"] if values["edge"][0] < 1 else []

    with pytest.raises(DataError, match="bands soft, hard overlap"):
        opened(LONG, BANDS, ("source",), validate=overlapping)


@pytest.mark.parametrize(
    "names", [["a", "b", "a long name"], [3, 1, 2], pd.date_range("2020-01-01", periods=3)]
)
def test_a_part_of_the_labels_has_the_type_of_all(names):
    """So that parts can follow one another in a file; words of a DataFrame have no width of their own."""
    frame = pd.DataFrame({"y": [1.0, 2.0, 3.0]}, index=pd.Index(names, name="row"))
    coords = open_source(frame, {"y": Field(("row",), role="observed")}, ("row",)).coords
    parts, whole = coords.parts("row"), coords["row"]
    assert len(parts) == 3
    assert parts[0:1].dtype == parts[1:3].dtype == whole.dtype
    np.testing.assert_array_equal(np.concatenate([parts[0:1], parts[1:3]]), whole)
    np.testing.assert_array_equal(whole, frame.index.to_numpy())


def test_repeated_row_labels_are_told_once():
    table = onoff().assign_coords(source=["b", "a", "b"])
    words = '1 labels of "source" occur more than once; the first is "b".'
    with pytest.warns(UserWarning, match=words):
        opened(table, ONOFF, ("source",))
    with pytest.raises(DataError, match=words):
        opened(table, ONOFF, ("source",), distinct=True)
    opened(onoff(), ONOFF, ("source",), distinct=True)


def test_repeated_labels_are_found_part_by_part(monkeypatch):
    monkeypatch.setattr("scivi.inputs.sources._LABELS", 7)
    monkeypatch.setattr("scivi.inputs.sources._HASHES", 5)
    fields = {"y": Field(("row",), "observed")}
    names = np.array([f"r{k}" for k in range(100)])
    opened(xr.Dataset({"y": ("row", np.zeros(100))}, {"row": names}), fields, ("row",), distinct=True)
    names[[3, 60, 99]], names[41] = "r20", "r5"
    table = xr.Dataset({"y": ("row", np.zeros(100))}, {"row": names})
    with pytest.raises(DataError, match='2 labels of "row" occur more than once; the first is "r20"'):
        opened(table, fields, ("row",), distinct=True)


READS = {
    "methylated": Field(("locus", "sample"), "observed", constraints.nonnegative_integer, at_most="total"),
    "total": Field(("locus", "sample"), "given", constraints.nonnegative_integer, default=4),
}
TOTAL = np.random.default_rng(2).integers(1, 6, (40, 3)).astype(float)


@pytest.mark.parametrize("chunk", [7, 2**21])
def test_entries_above_those_of_another_field_are_told(chunk, monkeypatch):
    monkeypatch.setattr("scivi.inputs.sources._CHUNK", chunk)
    reads = TOTAL.copy()
    opened({"methylated": reads, "total": TOTAL}, READS, ("locus",))
    reads[12, 1], reads[30, 0], reads[5, 2] = 7, 9, np.nan  # what is missing is compared with nothing
    line = r'field "methylated": 2 of 120 entries are above field "total"; the first is 7 > '
    with pytest.raises(DataError, match=rf"{line}{TOTAL[12, 1]:.0f} at locus=12, sample=1\.$"):
        opened({"methylated": reads, "total": TOTAL}, READS, ("locus",))
    sparse_too = {name: sparse.csr_array(a) for name, a in (("methylated", reads), ("total", TOTAL))}
    with pytest.raises(DataError, match=line):
        opened({n: (("locus", "sample"), a) for n, a in sparse_too.items()}, READS, ("locus",))


def test_a_bound_holds_where_columns_have_fewer_dims_or_are_left_out():
    dims = ("locus", "sample")
    reads = np.array([[4, 0], [2, 3]])
    with pytest.raises(DataError, match=r"1 of 4 entries are above .* 3 > 2 at locus=1, sample=1\.$"):
        opened({"methylated": (dims, reads), "total": (("locus",), [5, 2])}, READS, ("locus",))
    opened({"methylated": (dims, reads)}, READS, ("locus",))
    with pytest.raises(DataError, match=r"the first is 5 > 4 at locus=0, sample=0\.$"):
        opened({"methylated": (dims, reads + 1)}, READS, ("locus",))
    given = {**READS, "depth": Field(dims, support=constraints.nonnegative_integer, at_most="methylated")}
    with pytest.raises(DataError, match=r'"depth": 1 of 4 .* the first is 3 > 0 at locus=0, sample=1\.$'):
        opened({"methylated": (dims, reads), "depth": (("sample",), [2, 3])}, given, ("locus",))


def test_all_kinds_of_faults_come_in_one_error():
    fields = {
        **READS,
        "context": Field(("locus",), labels=("CG", "CHG")),
        "age": Field(("locus",), support=constraints.positive),
        "edge": Field(("sample",), support=constraints.nonnegative),
    }
    data = xr.Dataset(
        {
            "methylated": (("locus", "sample"), [[1, 2], [3, 4]]),
            "total": (("locus", "sample"), [[1, 1], [-3, 4]]),
            "context": ("locus", ["CG", "N"]),
            "edge": ("sample", [1.0, -1.0]),
        },
        {"locus": ["a", "a"]},
    )
    asked = []

    def validate(values, coords):
        asked.append((sorted(values), coords["locus"].tolist()))
        return [f"edges sum to {values['edge'].sum():g}"]

    with pytest.raises(DataError) as caught:
        opened(data, fields, ("locus",), validate=validate, distinct=True)
    lines = str(caught.value).splitlines()[1:]
    words = (
        '"age" is missing', '"context": 1 of 2', '"edge": 1 of 2', '"methylated": 2 of 4', '"total": 1 of 4',
        "edges sum to 0", '1 labels of "locus" occur more than once; the first is "a".',
    )  # fmt: skip
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))
    assert asked == [(["context", "edge", "methylated", "total"], ["a", "a"])]  # so few are seen whole


def test_a_template_is_not_asked_about_what_cannot_be_read():
    def validate(values, coords):
        raise AssertionError("asked")

    fields = {**READS, "edge": Field(("sample",), default=1.0)}
    dims = ("locus", "sample")
    for data in (
        {"methylated": (dims, np.ones((2, 3))), "edge": (("sample",), ["a", "b", "c"])},
        {"methylated": (dims, np.ones((2, 3))), "total": (dims, np.ones((2, 4)))},
        {"edge": (("sample",), [1.0])},
    ):
        with pytest.raises(DataError):
            opened(data, fields, ("locus",), validate=validate)


def test_what_cannot_be_streamed_is_refused(truth, tmp_path):
    adata = annotated(truth)
    adata.X = sparse.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "table.h5ad")
    fields = {"X": FIELDS["counts"]}
    with pytest.raises(DataError, match=r'compressed across "cell" on disk.*tocsr\(\)'):
        opened(tmp_path / "table.h5ad", fields)
    # along the other axis, the columns can be read one by one
    by_gene = {"X": Field(("gene", "cell"), "observed")}
    table = from_anndata(tmp_path / "table.h5ad", {"obs": "cell", "var": "gene"})
    assert opened(table, by_gene, ("gene",)).read({"gene": np.array([4, 1])})["X"].shape == (2, N_CELLS)
    with pytest.raises(Unsupported, match="view of a backed AnnData"):
        opened(anndata.read_h5ad(tmp_path / "table.h5ad", backed="r")[:5], fields)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "table.ecsv").write_text("")
    monkeypatch.setitem(sys.modules, "astropy.table", None)
    with pytest.raises(Unsupported, match=r'pip install "scivi\[astro\]"'):
        opened(tmp_path / "table.ecsv")


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, tracemalloc
import numpy as np
from scivi.inputs import sources
from scivi.inputs.fields import Field

sources._CHUNK = 2**16
def run(path):
    data = sources.from_anndata(path) if sys.argv[1] == "anndata" else path
    source = sources.open_source(data, {"X": Field(("row", "column"), "observed")}, ("row",))
    for seed in range(5):
        source.read({"row": np.random.default_rng(seed).integers(0, source.sizes["row"], 64)})

run(sys.argv[2])  # imports, and caches of constant size
for path in sys.argv[2:]:
    tracemalloc.start()
    run(path)
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
"""


def write_large(folder: Path, form: str, n: int) -> Path:
    rng = np.random.default_rng(n)
    path = folder / f"{n}.{form.split()[-1]}"
    if "adata" in form:
        x = sparse.random(n, 100, 0.1, "csr", np.float32, random_state=rng, data_rvs=np.ones)
        adata = anndata.AnnData(x.toarray() if "dense" in form else x)
        adata.write_h5ad(path) if form.endswith("h5ad") else write_zarr(adata, path)
        return path
    table = xr.Dataset({"X": (("row", "column"), rng.poisson(0.1, (n, 100)).astype(np.float32))})
    if form == "nc":
        table.to_netcdf(path, engine="h5netcdf", encoding={"X": {"chunksizes": (500, 100)}})
    else:
        table.to_zarr(path, encoding={"X": {"chunks": (500, 100)}}, consolidated=False)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adata h5ad", "adata dense h5ad", "adata zarr", "nc", "zarr"])
def test_memory_does_not_grow_with_rows_on_disk(form, tmp_path):
    paths = [str(write_large(tmp_path, form, n)) for n in (5_000, 40_000)]
    kind = "anndata" if "adata" in form else "plain"
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, kind, *paths], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    small, large = map(int, run.stdout.split())
    # all entries would be 14 MB more; labels of 35 000 rows, looked at once for repetitions, are under 6 MB
    assert large < small + 6e6, (small, large)


# ---------------------------------------------------------------- real tables

SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not (SHARED / "photons").exists(), reason="waits for ../shared/data/photons")
def test_a_published_table_is_the_same_in_three_formats():
    keep = {"band": ["hard", "medium", "soft"]}
    sources = [
        opened(arranged(as_table(path), dims={"src": "source"}, select=keep), ONOFF, ("source",))
        for path in sorted((SHARED / "photons").glob("chandra_ic2395_21137.*"))
    ]
    assert len(sources) == 3
    assert dict(sources[0].sizes) == {"source": 142, "band": 3}
    for other in sources[1:]:
        assert other.fingerprint == sources[0].fingerprint


@pytest.mark.skipif(not (SHARED / "citeseq").exists(), reason="waits for ../shared/data/citeseq")
def test_a_real_annotated_table_is_read_from_disk_as_in_memory():
    path = SHARED / "citeseq" / "dsb_pbmc_87ab_cells_and_empty.h5ad"
    fields = {"X": Field(("droplet", "protein"), "observed", constraints.nonnegative_integer)}
    disk, memory = (opened(data, fields, ("droplet",)) for data in (path, anndata.read_h5ad(path)))
    assert disk.fingerprint == memory.fingerprint
    assert disk.coords["protein"].tolist() == memory.coords["protein"].tolist()


HOLDERS = ("csr", "csc", "csr array", "csr on disk", "dense on disk")


def held(counts: np.ndarray, how: str, path: Path):
    """A matrix as scipy holds it, or as the X of a backed AnnData."""
    match how.split():
        case ["csr", "array"]:
            return sparse.csr_array(counts)
        case [form]:
            return {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[form](counts)
        case [form, *_]:
            x = counts if form == "dense" else held(counts, form, path)
            anndata.AnnData(x).write_h5ad(path)
            return anndata.read_h5ad(path, backed="r").X


@pytest.mark.parametrize("how", HOLDERS)
def test_a_dict_of_arrays_may_hold_sparse_matrices_and_those_on_disk(how, truth, tmp_path):
    arrays = {name: (FIELDS[name].dims, values) for name, values in truth.items()}
    labels = {
        "cell": (("cell",), np.array([f"c{k}" for k in range(N_CELLS)])),
        "gene": (["gene"], list("abcdef")),
    }
    counts = held(truth["counts"], how, tmp_path / "table.h5ad")
    source = opened({**arrays, **labels, "counts": (("cell", "gene"), counts)})
    assert source.fingerprint == opened(truth).fingerprint
    rows = np.array([17, 2, 39, 2, 0])
    np.testing.assert_array_equal(source.read({"cell": rows})["counts"], truth["counts"][rows])
    assert source.coords["cell"][[0, 39]].tolist() == ["c0", "c39"]
    assert source.coords["gene"].tolist() == list("abcdef")
    assert source.coords["protein"].tolist() == [0, 1, 2]
    # sparse rows are read without making the matrix dense
    assert (source.columns["counts"].sparse is not None) == (how != "dense on disk")


def test_a_matrix_on_disk_that_is_compressed_across_its_rows_is_refused(truth, tmp_path):
    arrays = {name: (FIELDS[name].dims, values) for name, values in truth.items()}
    counts = held(truth["counts"], "csc on disk", tmp_path / "table.h5ad")
    with pytest.raises(DataError, match='field "counts" is compressed across "cell" on disk'):
        opened({**arrays, "counts": (("cell", "gene"), counts)})


def test_labels_of_a_dict_are_the_entry_with_the_name_of_its_dim():
    fields = {"row": Field(("row",), "observed"), "sd": Field(("row",), support=constraints.positive)}
    source = open_source({"row": (("row",), [3.0, 1.0, 2.0]), "sd": (("row",), np.ones(3))}, fields, ("row",))
    assert source.coords["row"].tolist() == source.read({})["row"].tolist() == [3.0, 1.0, 2.0]
    other = {"y": (("row",), np.zeros(3)), "band": (("row",), np.arange(3.0))}  # a column like any other
    source = open_source(other, {"y": Field(("row",), "observed")}, ("row",))
    assert source.coords["row"].tolist() == [0, 1, 2]


def test_labels_of_a_dict_must_be_as_many_as_the_entries():
    short = {"cell": (("cell",), ["a", "b"]), "y": (("cell",), np.zeros(3))}
    with pytest.raises(DataError, match="cell"):
        open_source(short, {"y": Field(("cell",), "observed")}, ("cell",))
