from __future__ import annotations

import gc
import threading
import tracemalloc
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
import xarray as xr
from scipy import sparse
from torch.distributions import constraints

from scivi.inputs import feed as feeds
from scivi.inputs.batches import Batch
from scivi.inputs.columns import Table, from_disk
from scivi.inputs.feed import Feed
from scivi.inputs.fields import Field
from scivi.inputs.narrow import Span
from scivi.inputs.sources import TableSource, arranged, as_table, from_anndata, open_source

N, GENES, ROWS = 300, 40, ("cell",)
FIELDS = {
    "X": Field(("cell", "gene"), "observed", constraints.nonnegative_integer),
    "depth": Field(("cell",)),
    "length": Field(("gene",)),
}
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def counts(n: int = N, most: int = 9, density: float = 0.1) -> sparse.csr_matrix:
    rng = np.random.default_rng(1)
    return sparse.random(
        n,
        GENES,
        density,
        "csr",
        np.float32,
        random_state=rng,
        data_rvs=lambda k: rng.integers(1, most + 1, k),
    )


def with_zeros(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    matrix = matrix.copy()
    matrix.data[::3] = 0
    return matrix


def in_halves(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Every entry stored twice, as half of it: only the sums are counts."""
    parts = (np.repeat(matrix.data / 2, 2), np.repeat(matrix.indices, 2), matrix.indptr * 2)
    return sparse.csr_matrix(parts, shape=matrix.shape)


FORMS = {
    "CSR": lambda m: m,
    "CSC": lambda m: m.tocsc(),
    "COO": lambda m: m.tocoo(),
    "CSR array": sparse.csr_array,
    "explicit zeros": with_zeros,
    "stored twice": in_halves,
}


def table(x) -> dict:
    n = x.shape[0]
    depth = np.arange(n) * 0.5
    return {"X": (("cell", "gene"), x), "depth": (("cell",), depth), "length": (("gene",), np.arange(40.0))}


def feed(data, size: int | None = 32, fields=FIELDS, dtype=torch.float32, seed: int = 0, **limits) -> Feed:
    rows = ("cell",) if "drop" not in fields["X"].dims else ("cell", "drop")
    source = open_source(data, fields, rows)
    return Feed(source, fields, rows, size, seed, torch.device("cpu"), dtype, **limits)


def held(data, **more) -> Feed:
    stream = feed(data, table_bytes=0, **more)
    assert not stream.resident
    return stream


def streamed(data, **more) -> Feed:
    stream = feed(data, resident_bytes=0, **more)
    assert not stream.resident
    assert stream.held_nbytes == 0  # nothing is read before it is wanted
    return stream


def assert_same(one: Batch, other: Batch) -> None:
    assert list(one.values) == list(other.values)
    assert list(one.observed_mask) == list(other.observed_mask)
    for ours, theirs in ((one.values, other.values), (one.observed_mask, other.observed_mask)):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert one.index.keys() == other.index.keys()
    assert all(torch.equal(one.index[row], other.index[row]) for row in one.index)
    assert one.sizes == other.sizes


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(feeds, "_BLOCK", 16)
    monkeypatch.setattr(feeds, "_BLOCKS", 5)


def written(folder: Path, x, name: str = "a") -> Path:
    adata = anndata.AnnData(x)
    adata.obs["depth"], adata.var["length"] = np.arange(x.shape[0]) * 0.5, np.arange(float(x.shape[1]))
    adata.write_h5ad(folder / f"{name}.h5ad")
    return folder / f"{name}.h5ad"


def of_h5ad(path: Path):
    return from_anndata(path, dims={"obs": "cell", "var": "gene"}, depth="obs/depth", length="var/length")


# ---------------------------------------------------------------- the same batches, however rows are held


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_a_sparse_field_are_those_of_the_dense_one(form):
    x = FORMS[form](counts())
    ours, table_of = held(table(x)), feed(table(x.toarray()))
    assert table_of.resident
    for _ in range(25):
        assert_same(ours.next(), table_of.next())


@pytest.mark.parametrize("place", ["X", "layers/raw"])
def test_a_csc_layer_of_an_anndata_is_read_by_rows(place):
    x = counts()
    adata = anndata.AnnData(x.tocsc(), layers={"raw": x.tocsc()})
    data = from_anndata(adata, dims={"obs": "cell", "var": "gene"}, X=place)
    fields = {"X": FIELDS["X"]}
    ours, dense = held(data, fields=fields), feed({"X": x.toarray()}, fields=fields)
    for _ in range(10):
        assert_same(ours.next(), dense.next())


@pytest.mark.parametrize("form", ["CSR", "explicit zeros", "stored twice", "dense"])
def test_a_streamed_file_gives_the_batches_of_a_streamed_array(form, tmp_path, small_blocks):
    x = counts().toarray() if form == "dense" else FORMS[form](counts())
    dense = x if form == "dense" else x.toarray()
    ours, theirs = streamed(of_h5ad(written(tmp_path, x))), streamed(table(dense))
    for _ in range(40):
        assert_same(ours.next(), theirs.next())
    ours.close(), theirs.close()


def test_an_epoch_of_a_file_holds_each_row_once(tmp_path, small_blocks):
    x = counts()
    stream, seen = streamed(of_h5ad(written(tmp_path, x)), size=30), []
    for _ in range(N // 30):
        batch = stream.next()
        rows = batch.index["cell"].numpy()
        np.testing.assert_array_equal(batch.X.numpy(), x[rows].toarray())
        seen.extend(rows)
    stream.close()
    assert sorted(seen) == list(range(N))


@pytest.mark.parametrize("way", [held, streamed])
def test_masks_of_missing_entries_are_those_of_a_table(way, small_blocks):
    x = counts().toarray() + 0.25
    x[::7, 3] = np.nan
    sparsely = sparse.csr_matrix(np.where(x == 0.25, 0, x))
    fields = {**FIELDS, "X": Field(("cell", "gene"), "observed", constraints.real)}
    ours, dense = way(table(sparsely), fields=fields), feed(table(sparsely.toarray()), fields=fields)
    for _ in range(12):
        batch = ours.next()
        assert "X" in batch.observed_mask  # in every batch: their form does not change
        if way is held:
            assert_same(batch, dense.next())
        rows = batch.index["cell"]
        torch.testing.assert_close(batch.observed_mask["X"][:, 3], rows % 7 != 0)
        assert bool(batch.X.isfinite().all())
    ours.close()


@pytest.mark.parametrize("way", [held, streamed])
@pytest.mark.parametrize("form", ["CSR", "dense"])
def test_two_row_dims(way, form, small_blocks):
    fields = {"X": Field(("cell", "drop"), "observed"), "t": Field(("drop",))}
    x = counts()
    data = {"X": x if form == "CSR" else x.toarray().astype(int), "t": np.arange(40.0)}
    ours = way(data, fields=fields, size=20)
    for _ in range(20):
        batch = ours.next()
        rows, drops = (batch.index[row].numpy() for row in ("cell", "drop"))
        np.testing.assert_array_equal(batch.X.numpy(), x.toarray()[np.ix_(rows, drops)])
        np.testing.assert_array_equal(batch.t.numpy(), drops)
    ours.close()


@pytest.mark.parametrize("way", [held, streamed])
def test_batches_may_grow_to_all_rows(way):
    x = counts()
    stream = way(table(x))
    stream.next()
    stream.rows_per_batch = N
    batch = stream.next()
    assert batch.index == {}
    np.testing.assert_array_equal(batch.X.numpy(), x.toarray())
    stream.close()
    assert feed(
        table(x), size=None, table_bytes=0
    ).resident  # to make all rows dense each time would be a waste


@pytest.mark.parametrize("way", [held, streamed])
def test_a_restored_feed_goes_on_to_the_bit(way, small_blocks):
    first, second = (way(table(counts()), seed=5) for _ in range(2))
    for _ in range(13):
        first.next()
    second.restore(first.state())
    for _ in range(13):
        assert_same(first.next(), second.next())
    first.close(), second.close()


@pytest.mark.parametrize("form", ["CSR", "dense"])
def test_a_batch_is_not_overwritten_by_the_next(form):
    x = counts() if form == "CSR" else counts().toarray().astype(int)
    for dtype in (torch.float32, torch.float64):
        stream = held(table(x), dtype=dtype)
        batch = stream.next()
        before = batch.X.clone()
        stream.next()
        assert torch.equal(batch.X, before)


def test_a_held_feed_looks_one_batch_ahead():
    ours, other = (held(table(counts())) for _ in range(2))
    batch, index = ours.ahead(1)
    assert_same(batch, other.next())
    assert torch.equal(index["cell"], batch.index["cell"][None])


class Plain:
    """A source that somebody wrote: arrays by name, nothing known of their types."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.sizes, self.nbytes = x, {"cell": len(x), "gene": x.shape[1]}, x.size * 4

    def read(self, index) -> dict[str, np.ndarray]:
        return {"X": self.x[index["cell"]] if "cell" in index else self.x.copy()}


def test_a_source_of_another_kind_is_streamed_too(small_blocks):
    x = counts().toarray()
    x[::7, 3] = np.nan
    fields = {"X": Field(("cell", "gene"), "observed")}
    stream = Feed(Plain(x), fields, ROWS, 32, 0, torch.device("cpu"), torch.float32, resident_bytes=0)
    for _ in range(12):
        batch = stream.next()
        mask = batch.observed_mask["X"]
        assert torch.equal(mask[:, 3], batch.index["cell"] % 7 != 0)
        torch.testing.assert_close(batch.X[mask], torch.from_numpy(x)[batch.index["cell"]][mask])
    stream.close()


# ---------------------------------------------------------------- rows that are stored together

READS = {
    "methylated": Field(("locus", "sample"), "observed", constraints.nonnegative_integer, at_most="total"),
    "total": Field(("locus", "sample"), "given", constraints.nonnegative_integer),
    "start": Field(("locus",)),
}


def chunked(n: int, chunk: int) -> tuple[TableSource, np.ndarray, list[int]]:
    """A source that writes down which chunks of "methylated" are read, and what is in it."""
    reads, starts = np.arange(3 * n).reshape(n, 3) % 200, np.arange(n) * 10.0
    read: list[int] = []

    def block(key: tuple[slice, ...]) -> np.ndarray:
        read.extend(range(key[0].start // chunk, (key[0].stop - 1) // chunk + 1))
        return reads[key].astype(np.uint8)

    dims = ("locus", "sample")
    columns = {
        "methylated": from_disk(block, dims, (n, 3), np.dtype(np.uint8), chunk=chunk),
        "total": from_disk(lambda key: reads[key], dims, (n, 3), reads.dtype, chunk=chunk),
        "start": from_disk(lambda key: starts[key], ("locus",), (n,), starts.dtype, chunk=5 * chunk),
    }
    return open_source(Table(columns), READS, ("locus",)), reads, read


def stream_of(source: TableSource, size: int, seed: int = 0) -> Feed:
    cpu = torch.device("cpu")
    return Feed(source, READS, ("locus",), size, seed, cpu, torch.float32, resident_bytes=0)


@pytest.mark.parametrize("n", [700, 713])
def test_a_chunk_is_read_once_an_epoch_but_where_groups_share_it(n, small_blocks):
    source, reads, read = chunked(n, chunk=20)
    stream, epochs, seen = stream_of(source, size=n // 20), 10, []
    order = stream.orders["locus"]
    assert (order.block, order.n_groups) == (20, -(-n // 100))
    read.clear()
    for _ in range(20 * epochs):
        batch = stream.next()
        rows = batch.index["locus"].numpy()
        np.testing.assert_array_equal(batch.methylated.numpy(), reads[rows])
        np.testing.assert_array_equal(batch.start.numpy(), rows * 10.0)
        seen.append(rows)
    stream.close()
    for epoch in range(epochs):
        rows = np.concatenate(seen[20 * epoch : 20 * epoch + 20])
        assert len(set(rows.tolist())) == len(rows) == n - n % 20  # the incomplete batch is left out
    n_chunks, a_group = -(-n // 20), 6 + 1
    assert n_chunks * epochs <= len(read) <= (n_chunks + order.n_groups) * epochs + a_group


def test_blocks_are_several_small_chunks_and_no_chunk_that_is_too_large(small_blocks, monkeypatch):
    assert stream_of(chunked(700, chunk=7)[0], 35).orders["locus"].block == 21
    monkeypatch.setattr(feeds, "_GROUP", 4 * 20 * 8)  # 4 chunks of 20 rows, each of 6 counts and a place
    order = stream_of(chunked(700, chunk=20)[0], 35).orders["locus"]
    assert (order.block, order.blocks) == (20, 4)
    order = stream_of(chunked(700, chunk=100)[0], 35).orders["locus"]
    assert (order.block, order.blocks) == (16, 5)


def test_a_restored_stream_of_chunks_goes_on_to_the_bit(small_blocks):
    first, second = (stream_of(chunked(713, chunk=20)[0], 35, seed=5) for _ in range(2))
    for _ in range(33):
        first.next()
    second.restore(first.state())
    for _ in range(33):
        assert_same(first.next(), second.next())
    first.close(), second.close()


def test_entries_are_checked_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("scivi.inputs.sources._CHUNK", 3 * 90)
    read = chunked(700, chunk=20)[2]
    assert sorted(read) == sorted([*range(35)])


@pytest.mark.parametrize("kind", ["h5ad", "adata zarr", "zarr", "nc", "memory"])
def test_chunks_of_every_kind_of_store_are_known(kind, tmp_path):
    x, depth = counts().toarray(), np.arange(N) * 0.5
    table = xr.Dataset({"X": (("cell", "gene"), x), "depth": ("cell", depth), "length": ("gene", x[0])})
    adata = anndata.AnnData(x, {"depth": depth}, {"length": x[0]})
    path: object = tmp_path / f"a.{kind[-4:].strip()}"
    chunk = {"X": {"chunks": (48, GENES)}}
    match kind:
        case "h5ad":
            adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
            import h5py

            with h5py.File(tmp_path / "a.h5ad", "r+") as file:
                del file["X"]
                new = file.create_dataset("X", data=x, chunks=(48, GENES))
                new.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        case "adata zarr":
            with warnings.catch_warnings():  # anndata 0.12 announces that its format will change
                warnings.simplefilter("ignore")
                adata.write_zarr(tmp_path / "a.zarr", chunks=(48, GENES))
        case "zarr":
            table.to_zarr(tmp_path / "a.zarr", encoding=chunk, zarr_format=2)
        case "nc":
            chunk = {"X": {"chunksizes": (48, GENES)}}
            table.to_netcdf(tmp_path / "a.nc", encoding=chunk, engine="h5netcdf")
        case _:
            path = table
    data = of_h5ad(path) if "ad" in kind else path
    assert open_source(data, FIELDS, ROWS).chunk("cell") == (1 if kind == "memory" else 48)
    some = arranged(as_table(data), select={"cell": np.arange(0, N, 2).astype(str)})
    assert open_source(some, FIELDS, ROWS).chunk("cell") == 1


# ---------------------------------------------------------------- as narrow as the entries allow


@pytest.mark.parametrize(
    ("values", "wanted", "dtype"),
    [
        ([0, 255], F32, np.uint8),
        ([0, 256], F32, np.uint16),
        ([0, 65535], F32, np.uint16),
        ([0, 65536], F32, np.float32),
        ([-1, 127], F32, np.int8),
        ([-1, 128], F32, np.int16),
        ([0, 2**24 + 1], F64, np.float64),
        ([0.0, 1.5], F64, np.float64),
        (np.float32([0.0, 0.1]), F64, np.float32),
        ([0.0, np.nan], F32, np.float32),
        ([0.0, np.inf], F32, np.float32),
        (np.int32([0, 70_000]), F64, np.int32),
        ([True, False], F32, np.uint8),
    ],
)
@pytest.mark.parametrize("form", ["CSR", "dense"])
def test_narrow_types_are_exact(values, wanted, dtype, form):
    values = np.asarray(values)
    span = Span()
    for value in values:
        span.add(np.array([value]))
    assert span.dtype(values.dtype, wanted) == dtype
    x = np.zeros((N, GENES), values.dtype)
    x[:: N // 2, 1] = values
    fields = {**FIELDS, "X": Field(("cell", "gene"), "given")}
    data = table(sparse.csr_matrix(x) if form == "CSR" else x)
    if not np.isfinite(values.astype(float)).all():
        return  # a given field may not have them; masks are tested above
    source = open_source(data, fields, ROWS)
    kept = source.kept("cell", None, wanted)["X"]
    assert kept.dtype == dtype
    assert sparse.issparse(kept) == (form == "CSR")
    exact = x.astype(wanted)
    np.testing.assert_array_equal(kept.toarray() if form == "CSR" else kept, exact)


def test_a_sparse_field_takes_the_memory_of_its_entries():
    x = counts()
    stream = held(table(x))
    places = 4 * (x.nnz + N + 1)
    assert stream.held_nbytes == x.nnz + places + 4 * N  # one byte an entry; the depths as float32
    assert stream.held_nbytes == stream.source.kept_nbytes("cell", F32) - GENES  # the lengths


def test_a_full_sparse_field_is_kept_dense():
    assert held(table(counts(density=0.6))).held_nbytes == N * GENES + 4 * N


def test_a_dense_field_of_counts_is_kept_narrow():
    assert held(table(counts().toarray())).held_nbytes == N * GENES + 4 * N
    assert held(table(counts(most=300).toarray().astype(int))).held_nbytes == 2 * N * GENES + 4 * N


def test_what_is_small_or_cannot_be_narrowed_stays_a_table():
    assert feed(table(counts())).resident
    fields = {**FIELDS, "X": Field(("cell", "gene"), "observed", constraints.real)}
    assert feed(table(counts().toarray() + 0.5), fields=fields, table_bytes=0).resident


def test_a_sparse_field_that_fits_is_not_streamed():
    x = counts()
    dense, kept = 4 * N * GENES, held(table(x)).held_nbytes + GENES
    assert kept < dense / 2  # so that it is not the table that fits
    stream = feed(table(x), resident_bytes=kept)
    assert (stream.resident, stream.held_nbytes) == (False, kept - GENES)  # without reading ahead
    stream = feed(table(x), resident_bytes=kept - 1)
    assert stream.held_nbytes == 0
    stream.close()


@pytest.mark.parametrize("way", [held, streamed])
def test_chosen_rows_and_columns_are_narrow_whatever_the_others_hold(way, tmp_path, small_blocks):
    x = counts().toarray()
    x[5], x[:, 7] = 1e6, np.nan
    fields = {"X": FIELDS["X"]}
    rows, columns = np.delete(np.arange(N), 5), np.delete(np.arange(GENES), 7)
    labels = {"obs": [str(k) for k in rows], "var": [str(k) for k in columns]}
    path = written(tmp_path, sparse.csr_matrix(x))
    for data in (path, anndata.read_h5ad(path)):
        some = arranged(as_table(data), dims={"obs": "cell", "var": "gene"}, select=labels)
        ours = way(some, fields=fields)
        for _ in range(12):
            batch = ours.next()
            exact = x[np.ix_(rows[batch.index["cell"].numpy()], columns)]
            np.testing.assert_array_equal(batch.X.numpy(), exact)
        ours.close()


def test_a_user_s_matrix_is_left_as_it_is():
    x = in_halves(counts())
    before = x.copy()
    stream = held(table(x))
    stream.next()
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x.data, before.data)
    np.testing.assert_array_equal(x.indices, before.indices)


# ---------------------------------------------------------------- reading ahead


def test_the_reading_thread_ends_with_the_feed(tmp_path, small_blocks):
    before = set(threading.enumerate())
    stream = streamed(of_h5ad(written(tmp_path, counts())))
    stream.next()
    (thread,) = set(threading.enumerate()) - before
    assert thread.name.startswith("scivi-feed")
    stream.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.slow
def test_memory_of_a_streamed_epoch_does_not_grow_with_rows(tmp_path, small_blocks):
    peaks = []
    for k, n in enumerate((400, 400, 40_000)):  # the first pays for imports and caches
        path = written(tmp_path, counts(n), str(k))
        stream = streamed(of_h5ad(path))
        tracemalloc.start()
        for step in range(n // 32):
            stream.next()
            if step % 50 == 0:
                gc.collect()  # small cycles, which would be collected at a time of their own
            # two groups of 80 rows: entries (a quarter more than the mean), places, pointers, depths
            assert stream.held_nbytes < 2 * (80 * (1.25 * GENES * 0.1 * 5 + 4 + 8) + 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        stream.close()
    # an order of 2500 blocks is 20 kB; the entries of all rows would be 800 kB as narrow CSR, dense 6 MB
    assert peaks[2] < peaks[1] + 3e5, peaks
