from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from domains.genomics.pedigrees import Pedigree
from scivi.errors import DataError

DATA = Path(__file__).parents[4] / "shared" / "data" / "methylation"
needs_data = pytest.mark.skipif(
    not DATA.exists(), reason="waits for ../shared/data/methylation, which is not part of the repository"
)

# founder -2-> a -1-> b (read) -3-> c (read); a -0-> d -4-> e (read); founder -1-> f -1-> g, neither read
SMALL = Pedigree(
    nodes=("c", "founder", "a", "b", "d", "e", "f", "g"),
    parents=("b", "", "founder", "a", "a", "d", "founder", "f"),
    generations=(3, 0, 2, 1, 0, 4, 1, 1),
    samples=("e", "b", "c"),
)


def test_pair_times_of_a_hand_made_pedigree():
    assert SMALL.faults() == []
    # e and b, e and c meet in a, 2 generations down; b is the mother of c, so it is their ancestor itself
    assert SMALL.pair_times().tolist() == [[2, 6, 3], [2, 6, 6], [3, 3, 6]]
    assert SMALL.times() == {"founder": 0, "a": 2, "b": 3, "c": 6, "d": 2, "e": 6, "f": 1, "g": 2}


def test_ordered_puts_parents_first_and_keeps_the_edges():
    ordered = SMALL.ordered()
    assert all(p == "" or ordered.nodes.index(p) < i for i, p in enumerate(ordered.parents))
    rows = zip(SMALL.nodes, SMALL.parents, SMALL.generations, strict=True)
    assert set(zip(ordered.nodes, ordered.parents, ordered.generations, strict=True)) == set(rows)


def test_collapsed_prunes_and_merges_but_keeps_founders():
    collapsed = SMALL.collapsed()
    assert collapsed.nodes == ("founder", "a", "b", "c", "e")
    assert collapsed.parents == ("", "founder", "a", "b", "a")
    assert collapsed.generations == (0, 2, 1, 3, 4)
    assert collapsed.samples == SMALL.samples
    assert collapsed.pair_times().tolist() == SMALL.pair_times().tolist()
    # a founder without reads and with one child stays, one without descendants that were read goes
    two = Pedigree(("x", "y", "z", "w"), ("", "x", "y", ""), (0, 2, 3, 0), ("z",))
    assert two.collapsed() == Pedigree(("x", "z"), ("", "x"), (0, 5), ("z",))


def test_collapsed_leaves_a_random_pedigree_its_pair_times():
    rng = np.random.default_rng(0)
    for n in range(2, 30):
        parents = ["", *(str(rng.integers(i)) for i in range(1, n))]
        edges = [0, *rng.integers(0, 5, n - 1).tolist()]
        samples = tuple(str(i) for i in rng.choice(n, rng.integers(1, n), replace=False))
        whole = Pedigree(tuple(map(str, range(n))), tuple(parents), tuple(edges), samples)
        small = whole.collapsed()
        assert small.collapsed() == small
        assert small.pair_times().tolist() == whole.pair_times().tolist()


def test_every_fault_is_named_at_once():
    faulty = Pedigree(
        nodes=("root", "a", "a", "b", "c", "d", "e", "f"),
        parents=("", "root", "root", "nobody", "d", "c", "root", "f"),
        generations=(1, -3, 1, 1, 1, 1, 2.5, 1),  # pyright: ignore[reportArgumentType]
        samples=("a", "x", "b", "b"),
    )
    assert faulty.faults() == [
        'node "a" is listed 2 times; names are unique',
        'node "b" has the parent "nobody", which is no node; add it or correct it',
        'nodes descend from themselves: "c" -> "d" -> "c"; one of these edges is wrong',
        'nodes descend from themselves: "f" -> "f"; one of these edges is wrong',
        'founder "root" has an edge of 1 generations; set it to 0',
        'node "a" is dated before its parent "root" (-3 generations); correct one of them',
        'the edge above node "e" is 2.5 generations long; a whole number is needed',
        'sample "x" is no node of the pedigree',
        'sample "b" is listed 2 times',
    ]
    for call in (faulty.ordered, faulty.collapsed, faulty.times, faulty.pair_times):
        with pytest.raises(DataError, match="The pedigree has faults") as caught:
            call()
        assert all(fault in str(caught.value) for fault in faulty.faults())


def test_faults_of_shape():
    assert Pedigree((), (), (), ()).faults() == ["the pedigree has no nodes"]
    ragged = Pedigree(("a", "b"), ("",), (0,), ())
    assert ragged.faults() == [
        "there are 2 nodes, 1 parents, 1 generations; one of each per node is needed",
        "no node has reads: samples is empty",
    ]


def test_samples_of_two_founders_have_no_pair_times():
    apart = Pedigree(("a", "b"), ("", ""), (0, 0), ("a", "b"))
    assert apart.faults() == []
    with pytest.raises(DataError, match=r'without a common ancestor.*\n.*"a" and "b"'):
        apart.pair_times()


def test_survives_json():
    assert Pedigree.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL


def test_a_table_is_read_from_frame_columns_and_file(tmp_path):
    columns = {
        "node": [1, 2, 3],
        "parent": [np.nan, 1, 1],
        "edge_generations": [np.nan, 2, 3],
        "observed": [False, True, True],
    }
    wanted = Pedigree(("1", "2", "3"), ("", "1", "1"), (0, 2, 3), ("2", "3"))
    assert Pedigree.from_table(columns) == wanted
    frame = pd.DataFrame(columns)
    assert Pedigree.from_table(frame) == wanted
    frame.astype({"parent": "Int64"}).to_csv(tmp_path / "pedigree.csv", index=False)
    assert Pedigree.from_table(tmp_path / "pedigree.csv") == wanted
    dated = frame.drop(columns=["edge_generations", "observed"]).assign(generation=[4, 6, 7])
    assert Pedigree.from_table(dated, samples=["3", "2"]).to_dict() == wanted.to_dict() | {
        "samples": ["3", "2"]
    }


def test_what_cannot_be_read_is_listed():
    with pytest.raises(DataError) as caught:
        Pedigree.from_table({"node": ["a"], "generation": [0]})
    assert 'no column "parent"; it has "node", "generation"' in str(caught.value)
    assert 'no column "observed"' in str(caught.value)
    with pytest.raises(DataError, match=r"edge_generations \(or generation\)"):
        Pedigree.from_table({"node": ["a"], "parent": [""], "observed": [True]})
    table = {"node": ["a", "b"], "parent": ["", "a"], "edge_generations": [0, "old"], "observed": [1, 1]}
    with pytest.raises(DataError, match='row 1 has edge_generations "old"; a number is needed'):
        Pedigree.from_table(table)
    with pytest.raises(DataError, match='row 0 has observed "perhaps"; true or false is needed'):
        Pedigree.from_table(table | {"edge_generations": [0, 1], "observed": ["perhaps", "N"]})
    with pytest.raises(DataError, match='edge list has no column "to"'):
        Pedigree.from_alphabeta({"node": ["a"], "gen": [0], "meth": ["Y"]}, {"from": []})


def test_edges_that_do_not_fit_the_nodes_are_refused():
    nodes = {"node": ["a", "b", "c"], "gen": [0, 0, 1], "meth": ["N", "N", "Y"]}
    with pytest.raises(DataError) as caught:
        Pedigree.from_alphabeta(nodes, {"from": ["a", "b", "a"], "to": ["c", "c", "z"]})
    assert 'edge "a" to "z": "z" is not in the node list' in str(caught.value)
    assert 'node "c" has 2 parents: "a", "b"' in str(caught.value)


def test_a_child_dated_before_its_parent_is_refused(tmp_path):
    # The fault of one of AlphaBeta's poplar lists, made anew: branch points in years, a tip 2 too early.
    nodes, edges = tmp_path / "nodelist.fn", tmp_path / "edgelist.fn"
    nodes.write_text("filename,node,Branchpoint_date,meth\n-,7,0,N\nx,8,30,Y\n-,9,40,N\nx,10,38,Y\n")
    edges.write_text("from\tto\tStem\n7\t8\t1\n7\t9\t1\n9\t10\t1\n")
    with pytest.raises(DataError, match='node "10" is dated before its parent "9" \\(-2 generations\\)'):
        Pedigree.from_alphabeta(nodes, edges)
    # Unchecked, it can be held, and tells its fault beside those of the data.
    assert len(Pedigree.from_alphabeta(nodes, edges, check=False).faults()) == 1


def test_blanks_may_separate(tmp_path):
    (tmp_path / "edges").write_text("from to\n0_0 1_2\n")
    nodes = {"node": ["0_0", "1_2"], "gen": [0, 1], "WGBS": ["Y", "Y"]}
    assert Pedigree.from_alphabeta(nodes, tmp_path / "edges").pair_times().tolist() == [[0, 0, 1]]


@needs_data
def test_the_lists_of_ma1_1_are_its_pedigree():
    table = Pedigree.from_table(DATA / "ma1_1_pedigree.csv")
    with pytest.warns(UserWarning, match="2 of 40 edges: gendiff is not the difference of gen") as warned:
        lists = Pedigree.from_alphabeta(DATA / "ma1_1_nodelist.txt", DATA / "ma1_1_edgelist.txt")
    assert lists == table
    assert '"0_0" to "2_26_r1": gendiff 1, difference of generations 2' in str(warned[0].message)
    assert (len(table.nodes), len(table.samples), len(table.collapsed().nodes)) == (
        41,
        27,
        40,
    )  # 2_26_r1 has one child
    pairs = xr.load_dataset(DATA / "ma1_1_cg_divergence.nc", engine="h5netcdf")
    published = np.stack([pairs.time0, pairs.time1, pairs.time2], axis=1)
    assert table.pair_times().tolist() == published.tolist()


@needs_data
def test_a_pedigree_is_read_from_anndata():
    import anndata

    uns = anndata.read_h5ad(DATA / "col0_ma3_gbm_window0.h5ad").uns
    pedigree = Pedigree.from_table(uns["pedigree"])
    assert pedigree == Pedigree.from_table(DATA / "col0_ma3_pedigree.csv")
    assert len(pedigree.samples) == 13
