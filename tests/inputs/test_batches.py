from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from scivi.errors import PlanError, TemplateError
from scivi.inputs import feed as feeds
from scivi.inputs.batches import chunks, make_batch, take
from scivi.inputs.feed import Feed, Order
from scivi.inputs.fields import Field
from scivi.inputs.sources import open_source

CPU, ROWS = torch.device("cpu"), ("row",)
FIELDS = {"y": Field(("row", "band"), "observed"), "sd": Field(("band",)), "t": Field(("row",))}


def source(n: int, gaps: bool = False):
    y = np.arange(2.0 * n).reshape(n, 2)
    if gaps:
        y[::3, 1] = np.nan
    return open_source({"y": y, "sd": np.array([1.0, 2.0]), "t": np.arange(n) * 10.0}, FIELDS, ROWS)


def feed(n: int, size: int | None, *, resident: bool = True, seed: int = 0, gaps: bool = False) -> Feed:
    limit = 2**31 if resident else 0
    return Feed(source(n, gaps), FIELDS, ROWS, size, seed, CPU, torch.float32, resident_bytes=limit)


@pytest.fixture(params=["resident", "streamed"])
def resident(request, monkeypatch) -> bool:
    monkeypatch.setattr(feeds, "_BLOCK", 8)  # so that few rows make several groups
    monkeypatch.setattr(feeds, "_BLOCKS", 3)
    return request.param == "resident"


def test_an_order_goes_once_through_all_rows():
    order = Order(100, seed=3, block=8, blocks=3)
    rows = np.concatenate([order.group(0, g) for g in range(order.n_groups)])
    assert sorted(rows) == list(range(100))
    assert not np.array_equal(order.group(0, 0), order.group(1, 0))
    np.testing.assert_array_equal(order.group(0, 0), Order(100, seed=3, block=8, blocks=3).group(0, 0))


@pytest.mark.parametrize(("n", "block", "blocks"), [(50, 8, 3), (48, 8, 3), (50, 64, 2), (50, 7, 20)])
def test_every_row_has_the_same_chance_of_every_place(n, block, blocks):
    epochs, seen, order = 3000, np.zeros((n, n)), Order(n, 5, block, blocks)
    for epoch in range(epochs):
        rows = np.concatenate([order.group(epoch, g) for g in range(order.n_groups)])
        assert len(rows) == n
        seen[rows, np.arange(n)] += 1
    # each of the n^2 numbers is binomial with a chance of 1 / n: sd (3000 * 1/50 * 49/50)^.5 = 7.7
    assert abs(seen - epochs / n).max() < 6 * (epochs / n * (1 - 1 / n)) ** 0.5


@pytest.mark.parametrize(("n", "block", "blocks"), [(1000, 20, 6), (1007, 20, 6), (1007, 21, 5)])
def test_blocks_lie_where_they_are_stored(n, block, blocks):
    order, n_blocks = Order(n, 5, block, blocks), -(-n // block)
    for epoch in range(50):
        groups = [order.group(epoch, g) for g in range(order.n_groups)]
        n_parts = sum(len(np.unique(rows // block)) for rows in groups)
        assert n_blocks <= n_parts <= n_blocks + order.n_groups  # the ends of a group lie within a block


def test_the_order_of_rows_in_memory_is_what_it_was():
    rng, places = np.random.default_rng([3, 2]), np.arange(50)  # only our own code says so: a regression test
    rng.permutation(1)
    rows = np.random.default_rng([3, 2, 0]).permutation((places + rng.integers(50)) % 50)
    np.testing.assert_array_equal(Order(50, seed=3, block=50, blocks=1).group(2, 0), rows)


def test_batches_hold_the_rows_that_they_name(resident):
    stream = feed(50, 7, resident=resident, gaps=True)
    for _ in range(20):
        batch = stream.next()
        rows = batch.index["row"]
        assert len(rows.unique()) == 7
        torch.testing.assert_close(batch.t, rows * 10.0)
        mask = batch.observed_mask.get("y", torch.ones(7, 2, dtype=torch.bool))
        whole = torch.stack([2.0 * rows, 2.0 * rows + 1], -1)
        torch.testing.assert_close(batch.y[mask], whole[mask].float())
        torch.testing.assert_close(mask[:, 1], rows % 3 != 0)
        assert batch.sizes["row"] == 50
        assert batch.sd.tolist() == [1.0, 2.0]
    stream.close()


def counts_of_rows(n: int, size: int, resident: bool, epochs: int = 400) -> np.ndarray:
    stream, seen = feed(n, size, resident=resident), np.zeros(n)
    for _ in range(n // size * epochs):
        np.add.at(seen, stream.next().index["row"].numpy(), 1)
    stream.close()
    return seen


def test_every_row_comes_equally_often(resident):
    # each epoch leaves two of 56 rows out: sd of a row's count (400 * 1/28 * 27/28)^.5 = 3.7
    seen = counts_of_rows(56, 9, resident)
    assert abs(seen - seen.mean()).max() < 5 * 3.7


def test_rows_of_an_incomplete_block_come_as_often_as_others(monkeypatch):
    monkeypatch.setattr(feeds, "_BLOCK", 8)
    monkeypatch.setattr(feeds, "_BLOCKS", 3)
    # each epoch leaves one of 50 rows out: sd of a row's count (400 * 1/50 * 49/50)^.5 = 2.8
    seen = counts_of_rows(50, 7, resident=False)
    assert abs(seen - seen.mean()).max() < 5 * 2.8


def test_a_restored_feed_goes_on_as_if_it_had_not_stopped(resident):
    first, second = (feed(50, 7, resident=resident, seed=4) for _ in range(2))
    for _ in range(11):
        first.next()
    second.restore(first.state())
    for _ in range(15):
        torch.testing.assert_close(first.next().index["row"], second.next().index["row"], rtol=0, atol=0)
    first.close(), second.close()


def test_seeds_give_different_orders():
    rows = [feed(50, 10, seed=seed).next().index["row"].tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_all_rows_are_taken_if_wanted_and_refused_if_too_many(monkeypatch):
    assert feed(50, None).next().index == {}
    assert feed(50, 80).next().y.shape == (50, 2)
    monkeypatch.setattr(feeds, "_FULL_LIMIT", 49)
    with pytest.raises(PlanError, match="rows_per_batch=None would take all of 50 rows at every step"):
        feed(50, None)


def test_two_row_dims_are_minibatched_each_on_its_own(resident):
    fields = {"y": Field(("cell", "drop"), "observed"), "t": Field(("drop",))}
    table = {"y": np.arange(40.0 * 30).reshape(40, 30), "t": np.arange(30.0)}
    rows = ("cell", "drop")
    stream = Feed(
        open_source(table, fields, rows),
        fields,
        rows,
        6,
        0,
        CPU,
        torch.float32,
        resident_bytes=2**31 * resident,
    )
    for _ in range(12):
        batch = stream.next()
        torch.testing.assert_close(batch.y, batch.index["cell"][:, None] * 30.0 + batch.index["drop"])
        torch.testing.assert_close(batch.t, batch.index["drop"].float())
    stream.close()


def log_joint(batch) -> float:
    def model():
        with pyro.plate("band", 2, dim=-1), batch.plate("row", dim=-2):
            batch.observe("y", dist.Normal(1.0, batch.sd))

    trace = poutine.trace(model).get_trace()
    return float(trace.log_prob_sum())


def test_minibatches_are_scaled_to_the_whole_and_gaps_do_not_count():
    # 48 rows in batches of 12: the mean over an epoch is the full sum, to float32 rounding
    stream = feed(48, 12, gaps=True)
    parts = [log_joint(stream.next()) for _ in range(4)]
    y = source(48, gaps=True).read({})["y"]
    density = -0.5 * ((y - 1.0) / [1.0, 2.0]) ** 2 - np.log([1.0, 2.0]) - 0.5 * np.log(2 * np.pi)
    assert np.mean(parts) == pytest.approx(np.nansum(density), rel=1e-5)


def test_a_plate_can_be_entered_twice_and_names_only_dims():
    batch = feed(50, 10).next()

    def model():
        for name in ("a", "b"):
            with batch.plate("row"):
                pyro.sample(name, dist.Normal(0.0, 1.0))

    trace = poutine.trace(model).get_trace()
    assert [trace.nodes[name]["scale"] for name in ("a", "b")] == [5.0, 5.0]
    with pytest.raises(
        TemplateError, match=r'no dim "cell" .* have \[.band., .row.\].*sizes=\{"cell": ...\}'
    ):
        batch.plate("cell")


def test_an_event_with_a_gap_is_left_out_whole():
    fields = {"y": Field(("row", "band"), "observed")}
    batch = make_batch(
        {"y": np.array([[1.0, np.nan], [0.0, 0.0]])},
        fields,
        {"row": 2, "band": 2},
        ROWS,
        {},
        CPU,
        torch.float64,
    )

    def model():
        with batch.plate("row"):
            batch.observe("y", dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()))

    value = float(poutine.trace(model).get_trace().log_prob_sum())
    assert value == pytest.approx(-np.log(2 * np.pi))  # of the second row alone


def test_observed_sites_are_free_when_predicting():
    batch = feed(50, None).next().predict()

    def model():
        with pyro.plate("band", 2, dim=-1), batch.plate("row", dim=-2):
            return batch.observe("y", dist.Normal(torch.zeros(50, 2), 1.0))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert float(model().abs().max()) < 6  # the data reach 99


def test_chunks_go_once_through_all_rows_in_order():
    parts = list(chunks(source(50), FIELDS, ROWS, 16, CPU, torch.float32))
    assert torch.cat([p.t for p in parts]).tolist() == [10.0 * k for k in range(50)]
    assert torch.cat([p.index["row"] for p in parts]).tolist() == list(range(50))
    assert next(iter(chunks(source(50), FIELDS, ROWS, 50, CPU, torch.float32))).index == {}


def test_rows_of_a_batch_can_be_taken():
    batch = next(iter(chunks(source(50, gaps=True), FIELDS, ROWS, 50, CPU, torch.float32)))
    some = take(batch, {"row": torch.tensor([4, 3])}, FIELDS)
    assert some.t.tolist() == [40.0, 30.0]
    assert some.observed_mask["y"].tolist() == [[True, True], [True, False]]
    with pytest.raises(AttributeError, match=r'has no field "counts"; it has \[.sd., .t., .y.\]'):
        _ = some.counts
