"""Counts from every place that users have them in, and the levels that a panel begins at, by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata.abc import CSRDataset
from scipy import sparse

from domains.genomics import cells, citeseq
from domains.genomics.cells import Counts
from domains.genomics.panels import Panel
from scivi.errors import DataError, TemplateError
from scivi.inference.opening import open_data

N, PROTEINS = 30, ("CD3", "CD4", "CD19", "IgG")
GENES = tuple(f"g{k}" for k in range(8))
NAMES = np.array([f"c{k}" for k in range(N)])


def protein_counts(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(6.0, (N, len(PROTEINS))).astype(float)


def rna_counts() -> sparse.csr_matrix:
    return sparse.csr_matrix(np.random.default_rng(1).poisson(0.8, (N, len(GENES))).astype(np.float32))


def annotated(adt: np.ndarray | None = None) -> anndata.AnnData:
    """RNA in X and in a layer, proteins as a frame and as an array in obsm, two lanes."""
    adt, rna = protein_counts() if adt is None else adt, rna_counts()
    obs = pd.DataFrame({"lane": pd.Categorical(np.where(np.arange(N) % 3, "a", "b"))}, index=NAMES)
    data = anndata.AnnData(rna, obs, pd.DataFrame(index=list(GENES)))
    data.obsm["protein_expression"] = pd.DataFrame(adt, index=data.obs_names, columns=list(PROTEINS))
    data.obsm["adt"] = adt.copy()
    data.layers["counts"] = rna.copy()
    data.layers["logs"] = rna.log1p()
    return data


def protein_only() -> anndata.AnnData:
    found = annotated()
    data = anndata.AnnData(protein_counts(), found.obs.copy(), pd.DataFrame(index=list(PROTEINS)))
    data.layers["adt"] = sparse.csr_matrix(protein_counts())
    return data


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    annotated().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def read(found: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Both matrices, dense."""
    rna = found.rna[:]
    return found.adt, rna.toarray() if sparse.issparse(rna) else rna


@pytest.mark.parametrize(
    ("place", "proteins"),
    [("protein_expression", PROTEINS), ("adt", tuple(f"protein {k}" for k in range(4)))],
    ids=["frame", "array"],
)
@pytest.mark.parametrize("rna", ["X", "layers/counts"])
@pytest.mark.parametrize("kind", ["in memory", "backed", "path", "text"])
def test_an_anndata_is_read_wherever_it_holds_the_counts(kind, rna, place, proteins, on_disk):
    data: Any = annotated() if kind == "in memory" else on_disk
    data = anndata.read_h5ad(data, backed="r") if kind == "backed" else data
    found = cells.counts(str(data) if kind == "text" else data, protein=place, rna=rna, batch="lane")
    adt, matrix = read(found)
    np.testing.assert_array_equal(adt, protein_counts())
    np.testing.assert_array_equal(matrix, rna_counts().toarray())
    assert found.adt.dtype == np.float32
    assert (found.proteins, found.genes) == (proteins, GENES)
    np.testing.assert_array_equal(found.cells, NAMES)
    np.testing.assert_array_equal(found.batch, np.where(np.arange(N) % 3, "a", "b"))
    if kind != "in memory" and rna == "X":
        assert isinstance(found.rna, CSRDataset)  # it stays on disk


def test_names_of_an_array_of_proteins_are_those_in_uns():
    data = annotated()
    data.uns["protein_names"] = np.array(PROTEINS)
    assert cells.counts(data, protein="adt").proteins == PROTEINS


@pytest.mark.parametrize("place", ["X", "layers/adt"])
def test_proteins_alone_are_read_from_a_matrix(place):
    found = cells.counts(protein_only(), protein=place, rna=None)
    np.testing.assert_array_equal(found.adt, protein_counts())
    assert (found.proteins, found.rna, found.genes) == (PROTEINS, None, ())
    assert set(found.batch) == {"1"}
    assert cells.panel(found).log_fractions == ()


@pytest.fixture
def multimodal(tmp_path: Path) -> Any:
    """A MuData; it is also written to a file."""
    mudata = pytest.importorskip("mudata", reason="waits for mudata, which is no requirement of ours")
    modalities = {"rna": annotated(), "prot": protein_only()}
    for each in modalities.values():
        each.obs = each.obs[[]]
    options = mudata.settings.override if hasattr(mudata, "settings") else mudata.set_options  # 0.4, 0.3
    with options(pull_on_update=False):  # 0.3 warns where it is left to its default
        data = mudata.MuData(modalities)
        data.obs["lane"] = annotated().obs["lane"]
        data.write(tmp_path / "cells.h5mu")
    return data


@pytest.mark.parametrize("kind", ["in memory", "path"])
def test_a_mudata_is_read_by_its_modalities(kind, multimodal, tmp_path):
    data: Any = multimodal if kind == "in memory" else tmp_path / "cells.h5mu"
    found = cells.counts(data, protein="prot", rna="rna", batch="lane")
    adt, rna = read(found)
    np.testing.assert_array_equal(adt, protein_counts())
    np.testing.assert_array_equal(rna, rna_counts().toarray())
    assert (found.proteins, found.genes) == (PROTEINS, GENES)
    np.testing.assert_array_equal(found.batch, annotated().obs["lane"])
    assert cells.counts(data, protein="prot", rna=None).rna is None


def test_a_mudata_is_told_what_it_lacks(multimodal):
    data = multimodal
    with pytest.raises(DataError, match="no modality") as caught:
        cells.counts(data, protein="adt", rna="gex")
    for words in ("adt", "gex", "rna, prot"):
        assert words in str(caught.value)
    data.mod["rna"] = data.mod["rna"][: N - 1].copy()
    with pytest.raises(DataError, match="the modalities hold different cells; take mdata") as caught:
        cells.counts(data, protein="prot", rna="rna", batch="plate")
    assert 'obs has no column "plate"; it has lane' in str(caught.value)


@pytest.mark.parametrize("place", ["protein_expression", "adt"])
def test_missing_is_what_is_told_and_nan(place):
    adt = protein_counts()
    adt[:, 2], adt[2, 1], adt[3, :] = 0, np.nan, -1
    found, untold = (cells.counts(annotated(adt), protein=place, missing=m).adt for m in (-1, None))
    missing = np.zeros(adt.shape, bool)
    missing[2, 1] = missing[3] = True
    np.testing.assert_array_equal(np.isnan(found), missing)
    assert not found[np.arange(N) != 3, 2].any()  # a column of zeros is one of zeros
    np.testing.assert_array_equal(np.isnan(untold), np.isnan(adt))
    assert (untold[3] == -1).all()


def test_every_fault_is_told_at_once():
    with pytest.raises(DataError) as caught:
        cells.counts(annotated(), protein="protein", rna="layers/raw", batch="plate")
    for words in (
        'protein: obsm has no "protein"; it has protein_expression, adt',
        'rna: there is no layer "raw"; the layers are counts, logs',
        'obs has no column "plate"; it has lane',
    ):
        assert words in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.h5ad").write_text("no HDF5")
    for name in ("none.h5ad", "bad.h5ad"):
        with pytest.raises(DataError, match=rf'{name}" cannot be read'):
            cells.counts(tmp_path / name)


def test_what_was_handed_in_stays_as_it_is():
    adt = protein_counts()
    adt[4, 1] = -1
    data, same = annotated(adt), annotated(adt)
    found = cells.counts(data, batch="lane", missing=-1)
    panel = cells.panel(found, isotypes=("IgG",))
    open_data(citeseq.make(panel), cells.table(found, panel, genes=GENES[::-1]))
    found.adt[:] = 7.0
    pd.testing.assert_frame_equal(data.obsm["protein_expression"], same.obsm["protein_expression"])
    pd.testing.assert_frame_equal(data.obs, same.obs)
    pd.testing.assert_frame_equal(data.var, same.var)
    assert (data.X != same.X).nnz == 0
    assert set(data.uns) == set(same.uns)
    assert set(data.obsm) == set(same.obsm)


def in_memory(**changed: Any) -> Counts:
    return replace(cells.counts(annotated(), batch="lane"), **changed)


def test_proteins_of_another_panel_are_put_in_order_and_lacking_ones_are_missing():
    panel = cells.panel(in_memory())
    other = in_memory(proteins=("CD19", "CD56", "CD3", "CD8"))
    adt = cells.table(other, panel)["adt"][1]
    np.testing.assert_array_equal(adt[:, 0], other.adt[:, 2])  # CD3
    np.testing.assert_array_equal(adt[:, 2], other.adt[:, 0])  # CD19
    assert np.isnan(adt[:, [1, 3]]).all()
    with pytest.raises(DataError, match=r"none of the proteins A, B, C, D is one of the panel's: CD3, CD4"):
        cells.table(in_memory(proteins=tuple("ABCD")), panel)


def test_genes_are_put_in_order_and_lacking_ones_count_as_zero():
    panel, found = cells.panel(in_memory()), in_memory()
    turned = cells.table(found, panel, genes=GENES[::-1])
    np.testing.assert_array_equal(turned["rna"][1].toarray(), rna_counts().toarray()[:, ::-1])
    np.testing.assert_array_equal(turned["gene"][1], GENES[::-1])
    fewer = in_memory(rna=rna_counts()[:, :5], genes=GENES[:5])
    with pytest.warns(UserWarning, match=r"3 of 8 genes are not in these cells and count as 0.*g5") as told:
        filled = cells.table(fewer, panel, genes=GENES)["rna"][1].toarray()
    assert len(told) == 1
    np.testing.assert_array_equal(filled[:, :5], rna_counts().toarray()[:, :5])
    assert not filled[:, 5:].any()
    with pytest.raises(DataError, match=r"none of the genes x0"):
        cells.table(in_memory(genes=tuple(f"x{k}" for k in range(8))), panel, genes=GENES)


@pytest.mark.parametrize("genes", [(), GENES[::-1]], ids=["as they are", "put in order"])
@pytest.mark.parametrize("kind", ["dense", "csc", "on disk"])
def test_rna_of_every_kind_gives_the_same_batch(kind, genes, on_disk):
    dense, found = rna_counts().toarray(), in_memory()
    other = {"dense": dense, "csc": rna_counts().tocsc(), "on disk": cells.counts(on_disk).rna}[kind]
    panel = cells.panel(found)
    assert cells.panel(replace(found, rna=other)) == panel
    template = citeseq.make(panel)
    one, two = (
        open_data(template, cells.table(replace(found, rna=rna), panel, genes=genes))
        for rna in (rna_counts(), other)
    )
    assert one.fingerprint == two.fingerprint
    some = {"cell": np.array([7, 2, 29])}
    for name, values in one.read(some).items():
        np.testing.assert_array_equal(two.read(some)[name], values)
    np.testing.assert_array_equal(one.read(some)["rna"], dense[some["cell"]][:, :: -1 if genes else 1])
    assert list(two.coords["gene"]) == list(genes or GENES)
    assert list(two.coords["cell"]) == list(NAMES)
    if kind == "on disk" and not genes:
        assert two.columns["rna"].sparse is not None  # rows are read as they are wanted


def in_two_modes(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Counts with 30 % of the cells in a high mode, and which they are."""
    rng = np.random.default_rng(0)
    high = rng.random(n) < 0.3
    return rng.poisson(np.where(high, 120.0, 6.0)).astype(np.float32), high


def counted(adt: np.ndarray, batch: np.ndarray | None = None) -> Counts:
    n, t = adt.shape
    of = np.full(n, "1") if batch is None else batch
    return Counts(adt, tuple(f"P{k}" for k in range(t)), np.arange(n).astype(str), of)


def test_levels_without_empties_are_those_of_the_modes():
    """Modes far apart are told apart without a mistake; levels are kept to four places."""
    adt, high = in_two_modes()
    panel = cells.panel(counted(adt[:, None]))
    low, top = (np.log(np.expm1(np.log1p(adt[of]).mean()) + 0.1) for of in (~high, high))
    np.testing.assert_allclose(panel.log_ambient, [[low]], atol=1e-4)
    np.testing.assert_allclose(panel.log_fold, [top - low], atol=1e-4)
    np.testing.assert_allclose(panel.share, [high.mean()], atol=1e-4)
    assert low == pytest.approx(np.log(6), abs=0.15)  # mean of a log is less than log of the mean
    assert not panel.has_empties


def test_levels_of_batches_without_empties_are_their_own():
    adt, _ = in_two_modes()
    batch = np.where(np.arange(len(adt)) % 2, "b", "a")
    both = np.where(batch == "b", 3 * adt, adt)
    panel = cells.panel(counted(both[:, None], batch))
    assert panel.batches == ("a", "b")
    (low,), (top,) = panel.log_ambient
    assert top - low == pytest.approx(np.log(3), abs=0.1)  # and the + .1 and + 1 of a count of zero
    gap = np.stack([both, both], 1)
    gap[batch == "b", 1] = np.nan  # batch b has no P1: its level is that of all cells
    panel = cells.panel(counted(gap, batch))
    assert panel.log_ambient[1][1] == panel.log_ambient[0][1] == pytest.approx(low, abs=1e-4)


def test_levels_of_empties_are_their_mean_counts():
    adt, _ = in_two_modes(400)
    found = counted(np.stack([adt, adt + 1], 1), np.where(np.arange(400) < 200, "a", "b"))
    droplets = np.random.default_rng(1).poisson([3.0, 0.2], (50, 2)).astype(np.float32)
    droplets[4, 0] = np.nan
    empties = Counts(droplets, ("P0", "P1"), np.arange(50).astype(str), np.full(50, "b"))
    panel = cells.panel(found, empties)
    told = np.log(np.nanmean(droplets, 0) + 0.1)
    np.testing.assert_allclose(panel.log_ambient[1], told, atol=1e-4)
    alone = cells.panel(counted(found.adt))
    assert panel.has_empties
    assert panel.log_fold == alone.log_fold  # between the modes of cells, whatever the empties hold


def test_empties_alone_may_have_a_batch():
    found, droplets = in_memory(), in_memory(batch=np.full(N, "c"), rna=None, genes=())
    assert cells.panel(found, droplets).batches == ("a", "b", "c")


def test_proteins_without_two_modes_have_a_level():
    """All zero, all the same, never measured: a level, a fold that is no claim, and the least share."""
    adt = np.stack([np.zeros(50), np.full(50, 4.0), np.full(50, np.nan)], 1).astype(np.float32)
    panel = cells.panel(counted(adt))
    np.testing.assert_allclose(panel.log_ambient[0][:2], np.log([0.1, 4.1]), atol=1e-4)
    assert panel.log_fold == (1.0, 1.0, 1.0)
    assert panel.share == (0.02, 0.02, 0.02)
    assert panel.faults() == []
    assert np.isfinite(panel.log_ambient).all()


def test_fractions_of_genes_are_their_shares_of_all_counts(monkeypatch):
    total = rna_counts().toarray().sum(0) + 1
    monkeypatch.setattr(cells, "_ROWS", 7)  # some rows at a time
    panel = cells.panel(in_memory())
    np.testing.assert_allclose(panel.log_fractions, np.log(total / total.sum()), atol=1e-4)


def test_a_panel_survives_json():
    panel = cells.panel(in_memory(), in_memory(rna=None, genes=()), isotypes=("IgG",))
    again = Panel.from_dict(json.loads(json.dumps(panel.to_dict())))
    assert again == panel
    assert hash(again) == hash(panel)
    assert citeseq.make(panel.to_dict()).made == citeseq.make(panel).made


def test_a_table_without_empties_has_one_of_which_nothing_was_counted():
    panel = cells.panel(in_memory(), in_memory(rna=None, genes=()))
    table = cells.table(in_memory(), panel)
    assert table["empty_adt"][1].shape == (1, 4)
    assert np.isnan(table["empty_adt"][1]).all()
    assert open_data(citeseq.make(panel), table).sizes["droplet"] == 1
    full = cells.table(in_memory(), panel, in_memory(proteins=PROTEINS[::-1], rna=None, genes=()))
    np.testing.assert_array_equal(full["empty_adt"][1], protein_counts()[:, ::-1])
    np.testing.assert_array_equal(full["empty_batch"][1], in_memory().batch)


def test_a_panel_that_contradicts_itself_is_told_all_at_once():
    bad = replace(
        cells.panel(in_memory()),
        proteins=("CD3", "CD3", "CD19", "IgG"),
        batches=(),
        log_ambient=((1.0, 2.0),),
        log_fold=(1.0,),
        share=(0.5, 0.5, 0.0, 0.5),
        isotypes=("IgM", "IgA"),
    )
    with pytest.raises(TemplateError) as caught:
        citeseq.make(bad)
    told = str(caught.value)
    for words in (
        "the panel cannot be used:",
        "log_ambient does not fit 0 batches and 4 proteins",
        "log_fold does not fit",
        "share does not fit",
        "the names of the proteins must be different",
        "the names of the batches must be different",
        "isotype controls that are no protein of the panel: IgA, IgM",
    ):
        assert words in told
    assert told.count("\n") == 6


def test_data_of_another_panel_are_told_where_they_differ():
    panel = cells.panel(in_memory())
    template, table = citeseq.make(panel), cells.table(in_memory(), panel)
    names = np.array(["CD3", "CD4", "CD8", "IgG"])
    wrong = table | {"protein": (("protein",), names), "batch": (("cell",), np.full(N, "z"))}
    with pytest.raises(DataError) as caught:
        open_data(template, wrong)
    for words in (
        "the proteins are not those of the panel: the data lack CD19; the panel has no CD8",
        'field "batch": 30 of 30 entries are none of a, b; the first is "z" at cell=0',
    ):
        assert words in str(caught.value)
    fewer = {"rna": (("cell", "gene"), rna_counts()[:, :5]), "gene": (("gene",), np.array(GENES[:5]))}
    with pytest.raises(DataError, match='dim "gene" has 8 entries in the template but 5 in field "rna"'):
        open_data(template, table | fewer)
    turned = table | {"protein": (("protein",), np.array(PROTEINS[::-1]))}
    with pytest.raises(DataError, match=re.escape("not those of the panel: they are in another order")):
        open_data(template, turned)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.06])
def test_a_protein_of_few_cells_has_levels(share):
    """More than nine of ten counts are alike, so that both tenths of the counts are."""
    rng, n = np.random.default_rng(0), 2000
    high = rng.random(n) < share
    adt = np.where(high, rng.poisson(60.0, n), rng.poisson(0.02, n)).astype(np.float32)
    panel = cells.panel(counted(adt[:, None]))
    low, top = panel.log_ambient[0][0], panel.log_ambient[0][0] + panel.log_fold[0]
    assert low < np.log(0.2)
    assert top > low
    assert panel.share[0] < 0.07
    if share:
        assert panel.share[0] == pytest.approx(high.mean(), abs=1e-4)
        assert top == pytest.approx(np.log(60), abs=0.1)  # mean of the logs of 60 counts and more


def test_levels_that_empties_do_not_tell_are_those_of_the_cells_over_kappa():
    """Of a batch without empties, and of a protein that was not counted in them."""
    adt, _ = in_two_modes(400)
    found = counted(np.stack([adt, adt], 1), np.where(np.arange(400) < 200, "a", "b"))
    droplets = np.full((50, 2), np.nan, np.float32)
    droplets[:, 0] = 3.0
    empties = Counts(droplets, ("P0", "P1"), np.arange(50).astype(str), np.full(50, "b"))
    panel, alone = cells.panel(found, empties), cells.panel(counted(found.adt))
    wanted = alone.log_ambient[0][0] + 0.5  # a cell sees exp(-.5) of what an empty droplet holds
    np.testing.assert_allclose(panel.log_ambient, [[wanted] * 2, [np.log(3.1), wanted]], atol=1e-4)


def test_proteins_and_rna_are_not_the_same_matrix():
    with pytest.raises(DataError, match='protein and rna are both "X"'):
        cells.counts(protein_only(), protein="X")


def test_an_x_that_is_not_there_is_told():
    data = annotated()
    data.X = None
    with pytest.raises(DataError, match="there is no X"):
        cells.counts(data)


def test_a_cell_without_a_batch_is_told():
    data = annotated()
    data.obs["lane"] = data.obs["lane"].astype(object)
    data.obs.iloc[[3, 7], 0] = np.nan
    with pytest.raises(DataError, match='obs "lane" is missing for 2 of 30 cells'):
        cells.counts(data, batch="lane")


def test_data_of_another_kind_are_refused():
    with pytest.raises(DataError, match="an AnnData or a MuData, not a ndarray"):
        cells.counts(np.zeros((3, 3)))


def test_cells_without_rna_are_refused_by_a_template_that_reads_it():
    panel = cells.panel(in_memory())
    for genes in ((), GENES):
        with pytest.raises(DataError, match="the template reads RNA, and these cells have none"):
            cells.table(in_memory(rna=None, genes=()), panel, genes=genes)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"log_ambient": ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0))}, "log_ambient does not fit 2 batches"),
        ({"log_ambient": ((1.0, 2.0, 3.0, np.nan),) * 2}, "log_ambient is not finite"),
        ({"log_fold": (1.0, np.inf, 1.0, 1.0)}, "log_fold is not finite"),
        ({"log_fractions": (np.nan,) * 8}, "log_fractions is not finite"),
    ],
)
def test_levels_that_cannot_be_are_told(changed, words):
    with pytest.raises(TemplateError, match=words):
        citeseq.make(replace(cells.panel(in_memory()), **changed))


def test_a_panel_of_other_names_is_refused():
    plain = cells.panel(in_memory()).to_dict()
    plain["shares"] = plain.pop("share")
    with pytest.raises(TemplateError, match=r'no "shares" in a panel(.|\n)*"share" is missing'):
        Panel.from_dict(plain)


DATA = Path(__file__).parents[3] / "data"


def test_cells_in_the_repository_are_read_without_labels():
    """The labels that others have published of them are not free."""
    adata = anndata.read_h5ad(DATA / "citeseq_pbmc10k.h5ad")
    assert list(adata.obs) == []
    template, table = citeseq.from_data(DATA / "citeseq_pbmc10k.h5ad")
    sizes = open_data(template, table).sizes
    assert (sizes["cell"], sizes["gene"], sizes["protein"]) == (1000, 500, 14)


def test_empties_in_the_repository_hold_more_ambient_than_cells():
    """The cells' low mode over the empties' mean is .75 in the median protein; the prior has .6."""
    adata = anndata.read_h5ad(DATA / "citeseq_dsb.h5ad")
    empty, isotypes = adata.obs["is_empty"].to_numpy(), list(adata.var_names[adata.var["is_isotype"]])
    found, empties = (cells.counts(adata[of], protein="X", rna=None) for of in (~empty, empty))
    assert (len(found.cells), len(empties.cells), len(isotypes)) == (600, 600, 4)
    low, ambient = (
        np.array(cells.panel(found, e, isotypes=isotypes).log_ambient[0]) for e in (None, empties)
    )
    assert 0.6 / 1.6 < np.exp(np.median(low - ambient)) < 0.9
    assert np.corrcoef(low, ambient)[0, 1] > 0.9  # .93 over 87 proteins
