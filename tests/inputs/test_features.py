from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import constraints

from scivi.inputs import features
from scivi.inputs.batches import chunks
from scivi.inputs.features import Features, Sample
from scivi.inputs.fields import Field
from scivi.inputs.sources import open_source

WHOLE = constraints.nonnegative_integer
FIELDS = {
    "reads": Field(("locus", "sample"), "observed", WHOLE, at_most="total"),
    "total": Field(("locus", "sample"), support=WHOLE),
    "signal": Field(("day", "locus"), "observed"),
    "depth": Field(("locus",), gaps=False),
    "edges": Field(("sample",)),
    "curve": Field(("day",)),
}
N, DAYS = 240, 50


def table(seed: int = 0, n: int = N, days: int = DAYS) -> dict:
    rng = np.random.default_rng(seed)
    total = rng.poisson(9, (n, 2)) + 1
    signal = rng.normal(size=(n, 3)) @ (5.0 * rng.normal(size=(3, days))) + rng.normal(size=(n, days))
    signal[rng.random(signal.shape) < 0.1] = np.nan
    columns = {
        "reads": (("locus", "sample"), rng.binomial(total, 0.3).astype(float)),
        "total": (("locus", "sample"), total),
        "signal": (("day", "locus"), signal.T),
        "depth": (("locus",), np.arange(float(n))),
        "edges": (("sample",), np.array([0.5, 2.0])),
        "curve": (("day",), np.linspace(0, 1, days)),
        "sample": (("sample",), np.array(["leaf", "root"])),
    }
    columns["reads"][1][::5, 1] = np.nan
    return columns


def source_of(columns: dict):
    import xarray as xr

    return open_source(xr.Dataset(columns), FIELDS, ("locus",))


def batches(columns: dict, size: int = 10**6):
    return list(chunks(source_of(columns), FIELDS, ("locus",), size, torch.device("cpu"), torch.float64))


def remembered(columns: dict, size: int = 10**6, seed: int = 0) -> Features:
    source = source_of(columns)
    sample = Sample(FIELDS, "locus", source.sizes, seed)
    for batch in batches(columns, size):
        sample.add(batch)
    return sample.features(source.coords)


def column(found: Features, values: np.ndarray, name: str) -> np.ndarray:
    return values[:, found.names.index(name)]


def test_every_feature_is_what_numpy_makes_of_the_entries():
    columns = table()
    found, [batch] = remembered(columns), batches(columns)
    values = found.of(batch, FIELDS, source_of(columns).coords)
    reads, total, signal = columns["reads"][1], columns["total"][1], columns["signal"][1].T
    expected = {
        "reads[leaf]": reads[:, 0],
        "reads[root]": reads[:, 1],
        "reads: missing": np.isnan(reads).mean(1),
        "reads: share of total": np.nansum(reads, 1) / np.where(np.isnan(reads), 0, total).sum(1),
        "total[root]": total[:, 1],
        "signal: mean": np.nanmean(signal, 1),
        "signal: sd": np.nanstd(signal, 1),
        "signal: smallest": np.nanmin(signal, 1),
        "signal: largest": np.nanmax(signal, 1),
        "signal: zeros": np.zeros(N),
        "signal: missing": np.isnan(signal).mean(1),
        "depth": columns["depth"][1],
    }
    for name, own in expected.items():
        np.testing.assert_allclose(column(found, values, name), own, rtol=1e-6, atol=1e-7)  # float32
    assert not any(
        name.startswith(("edges", "curve", "depth: missing", "total: missing")) for name in found.names
    )


def test_rows_that_are_kept_are_rows_of_the_table_and_those_of_directions_are_not_kept():
    columns = table()
    found, [batch] = remembered(columns), batches(columns)
    every = found.of(batch, FIELDS, source_of(columns).coords)
    places = column(found, found.values, "depth").astype(int)
    np.testing.assert_array_equal(found.values, every[places])
    assert len(set(places)) == N - N // 4  # a quarter taught the directions
    assert list(places) != sorted(places)
    assert set(places) != set(column(found, remembered(columns, seed=1).values, "depth").astype(int))


def test_chunks_do_not_matter():
    whole, parts = remembered(table()), remembered(table(), 7)
    assert whole.names == parts.names
    np.testing.assert_array_equal(whole.values, parts.values)
    coords = source_of(table()).coords
    at_once = whole.of(batches(table())[0], FIELDS, coords)
    by_parts = np.concatenate([whole.of(b, FIELDS, coords) for b in batches(table(), 7)])
    np.testing.assert_array_equal(at_once, by_parts)


def test_directions_span_what_a_singular_value_decomposition_finds(monkeypatch):
    monkeypatch.setattr(features, "DIRECTIONS", 3)
    for n, days in ((N, DAYS), (100, 70)):  # more rows than entries, and fewer
        columns = table(n=n, days=days)
        found = remembered(columns)
        basis, kept = found.bases["signal"], column(found, found.values, "depth").astype(int)
        taught = np.setdiff1d(np.arange(n), kept)
        signal = columns["signal"][1].T
        s = np.sign(signal) * np.log1p(np.abs(signal))
        z = np.nan_to_num((s - np.nanmean(s[taught], 0)) / np.nanstd(s[taught], axis=0))
        theirs = np.linalg.svd(z[taught], full_matrices=False)[2][:3]
        cosines = np.linalg.svd(theirs @ basis.directions)[1]
        np.testing.assert_allclose(cosines, 1.0, atol=1e-5)  # loadings are float32
        along = (z @ theirs.T)[kept]
        off = np.sqrt(((z[kept] - along @ theirs) ** 2).mean(1))
        np.testing.assert_allclose(column(found, found.values, "signal: off its directions"), off, atol=1e-4)
        last = [name for name in found.names if name.startswith("signal: entries ")][-1]
        first = int(last.split()[2])
        assert last.endswith(f" to {days - 1}")
        np.testing.assert_allclose(column(found, found.values, last), z[kept, first:].mean(1), atol=1e-4)


def test_new_rows_spread_along_directions_as_much_as_kept_ones():
    # noise in 300 entries, so that directions fit the 60 rows that taught them and nothing else
    rng = np.random.default_rng(0)
    columns = table() | {
        "signal": (("day", "locus"), rng.normal(size=(300, N))),
        "curve": (("day",), np.zeros(300)),
    }
    new = columns | {"signal": (("day", "locus"), rng.normal(size=(300, N)))}
    found = remembered(columns)
    theirs = found.of(batches(new)[0], FIELDS, source_of(new).coords)
    ratio = (
        column(found, theirs, "signal: direction 1").std()
        / column(found, found.values, "signal: direction 1").std()
    )
    # sd are known to (2 x 180)^-.5 and (2 x 240)^-.5; rows that taught it spread 1 + (300/60)^.5 times as far
    assert abs(np.log(ratio)) < 4 * (1 / 360 + 1 / 480) ** 0.5


def test_constants_are_told_entry_by_entry_or_by_a_hash():
    found, other = remembered(table()), table()
    assert {"edges[leaf]": 0.5, "edges[root]": 2.0}.items() <= found.constants.items()
    assert set(found.constants) == {"edges[leaf]", "edges[root]", "curve: hash"}
    other["curve"][1][7] += 1e-6
    assert remembered(other).constants["curve: hash"] != found.constants["curve: hash"]


def test_entries_that_are_not_there_are_told_from_missing_ones():
    found, other = remembered(table()), table(days=40)
    other["sample"] = (("sample",), np.array(["leaf", "stem"]))
    values = found.of(batches(other)[0], FIELDS, source_of(other).coords)
    absent = {n for n, infinite in zip(found.names, np.isinf(values).all(0), strict=True) if infinite}
    directions = {f"signal: direction {k}" for k in range(1, 9)}
    others = {n for n in found.names if n.startswith("signal: entries ")}
    assert len(others) == features.PARTS
    assert absent == directions | others | {"signal: off its directions", "reads[root]", "total[root]"}
    assert not np.isinf(column(found, values, "signal: mean")).any()


@pytest.mark.parametrize("n", [1, 2, 30])
def test_few_rows_are_all_kept_and_teach_no_directions(n):
    found = remembered(table(n=n))
    assert len(found.values) == n
    assert not found.bases


def test_many_rows_and_wide_ones_are_sampled(monkeypatch):
    monkeypatch.setattr(features, "KEPT", 50)
    monkeypatch.setattr(features, "LEARNT_FROM", 40)
    assert len(remembered(table()).values) == 50
    monkeypatch.setattr(features, "MOST_NUMBERS", (DAYS + 5) * 80)
    assert len(remembered(table()).values) == 50  # 80 were sampled, 20 of them taught
    monkeypatch.setattr(features, "KEPT", 200)
    monkeypatch.setattr(features, "MOST_NUMBERS", 0)
    assert len(remembered(table()).values) == features.FEWEST_ROWS  # too few to spare any


def test_every_row_is_as_likely_to_be_chosen(monkeypatch):
    monkeypatch.setattr(features, "KEPT", 70)
    monkeypatch.setattr(features, "LEARNT_FROM", 0)
    sizes, first, seen = source_of(table(n=100)).sizes, np.zeros(100), np.zeros(100)
    for seed in range(400):
        chosen = Sample(FIELDS, "locus", sizes, seed).chosen
        assert len(set(chosen)) == 70
        seen[chosen] += 1
        first[chosen[:20]] += 1  # as which directions are learnt
    for found, share in ((seen, 0.7), (first, 0.2)):  # binomial; the largest of 100 is within 4.5 sd
        assert abs(found / 400 - share).max() < 4.5 * (share * (1 - share) / 400) ** 0.5
