"""Files of every kind against counts written by hand; one table whatever the pieces; all faults at once."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from torch.distributions import constraints

from domains.genomics import methylome_files, methylomes
from domains.genomics.methylomes import gather
from scivi.errors import DataError
from scivi.inputs.fields import Field
from scivi.inputs.sources import open_source

FIELDS = {
    "methylated": Field(("locus", "sample"), "observed", constraints.nonnegative_integer),
    "total": Field(("locus", "sample"), "given", constraints.nonnegative_integer),
}

# Three loci, chr1:5+ CG 3 of 4, chr1:6- CG 0 of 2, chr2:9+ CHH 1 of 3, and one without reads, as each
# pipeline writes them. Files that tell no context have the CG only.
KINDS = {
    "bismark_report": """
        chr1 5 + 3 1 CG CGA
        chr1 6 - 0 2 CG CGT
        chr1 8 + 0 0 CHG CAG
        chr2 9 + 1 2 CHH CTT""",
    "bismark_coverage": """
        chr1 5 5 75.0 3 1
        chr1 6 6 0 0 2""",
    "allc": """
        chr1 5 + CGN 3 4 1
        chr1 6 - CGT 0 2 0
        chr1 8 + CAG 0 0 0
        chr2 9 + CTT 1 3 0""",
    "bedmethyl": """
        chr1 4 5 . 4 + 4 5 255,0,0 4 75
        chr1 5 6 . 2 - 5 6 0,255,0 2 0""",
    "modkit": """
        chr1 4 5 h,CG,0 4 + 4 5 255,0,0 4 0.00 0 3 1 0 0 0 0
        chr1 4 5 m,CG,0 4 + 4 5 255,0,0 4 75.00 3 1 0 0 0 0 0
        chr1 5 6 m,CG,0 2 - 5 6 255,0,0 2 0.00 0 2 0 0 0 0 0
        chr2 8 9 m,CHH,0 3 + 8 9 255,0,0 3 33.33 1 2 0 0 0 0 0""",
    "methimpute": """
        seqnames start strand context counts.methylated counts.total posteriorMax status rc.meth.lvl
        chr1 5 + CG 3 4 0.99 M 0.7
        chr1 6 - CG 0 2 0.98 U 0.1
        chr1 8 + CHG 0 0 0.97 U 0.1
        chr2 9 + CHH 1 3 0.96 U 0.1""",
}
BARE = {"bismark_coverage", "bedmethyl"}


def written(path: Path, text: str) -> Path:
    """A file of lines, columns with tabs between them; gzipped if its name says so."""
    lines = "".join("\t".join(line.split()) + "\n" for line in text.strip().splitlines())
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def gathered(folder: Path, texts: dict[str, str], to: str = "table.zarr", **how: Any) -> anndata.AnnData:
    """The table of samples whose files have these lines."""
    files = {name: written(folder / f"{name}.txt", text) for name, text in texts.items()}
    return read(gather(files, folder / to, progress=False, **how))


def read(path: Path) -> anndata.AnnData:
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


def counts(table: anndata.AnnData) -> dict[str, list[tuple[int, int]]]:
    """Methylated and all reads of each sample, by locus."""
    pairs = np.stack([table.layers["methylated"], table.layers["total"]], -1)
    return {
        label: [tuple(pair) for pair in row]
        for label, row in zip(table.obs_names, pairs.tolist(), strict=True)
    }


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_recognised_and_read(kind, ending, tmp_path):
    path, context = written(tmp_path / f"a.{ending}", KINDS[kind]), "CG" if kind in BARE else None
    table = read(gather({"a": path}, tmp_path / "table.zarr", context=context, progress=False))
    wanted = {"chr1:5+": [(3, 4)], "chr1:6-": [(0, 2)], "chr2:9+": [(1, 3)]}
    if kind in BARE:
        del wanted["chr2:9+"]
    if kind == "bismark_coverage":
        wanted = {label[:-1]: pair for label, pair in wanted.items()}
    assert counts(table) == wanted
    assert list(table.obs["context"]) == ["CG", "CG", "CHH"][: len(wanted)]
    assert list(table.obs["start"]) == [5, 6, 9][: len(wanted)]
    assert list(table.obs["chrom"]) == ["chr1", "chr1", "chr2"][: len(wanted)]


def test_blanks_in_old_files_of_modkit_are_tabs(tmp_path):
    head, tail = "chr1\t4\t5\tm\t4\t+\t4\t5\t255,0,0\t", "4 75.00 3 1 0 0 0 0 0"
    (tmp_path / "a.bed").write_text(head + tail + "\n")
    to = gather({"a": tmp_path / "a.bed"}, tmp_path / "t.zarr", context="CHG", progress=False)
    assert counts(read(to)) == {"chr1:5+": [(3, 4)]}
    assert list(read(to).obs["context"]) == ["CHG"]


A = """
    chr1 5 + 3 1 CG CGA
    chr1 6 - 0 2 CG CGT
    chr1 12 + 1 0 CHG CAG
    chr2 3 - 0 300 CHH CTT"""
B = """
    chr2 3 - CTT 0 4 1
    chr2 8 + CG 2 2 1
    chr1 6 - CGN 4 5 1
    chr1 9 + CAA 2 2 1"""


def test_a_missing_parent_is_that_of_a_founder(tmp_path):
    """As pandas reads the empty cell of a CSV."""
    pedigree = pd.DataFrame({"node": ["a", "b"], "parent": [np.nan, "a"], "observed": [True, True]})
    table = gathered(tmp_path, {"a": A, "b": B}, "table.zarr", pedigree=pedigree)
    assert list(table.uns["pedigree"]["parent"]) == ["", "a"]


@pytest.mark.parametrize("to", ["table.zarr", "table.h5ad"])
def test_the_union_of_loci_is_read_by_anndata_and_by_open_source(to, tmp_path):
    pedigree = pd.DataFrame({"node": ["a", "b"], "parent": ["", "a"], "observed": [True, True]})
    table = gathered(tmp_path, {"a": A, "b": B}, to, pedigree=pedigree)
    assert counts(table) == {
        "chr1:5+": [(3, 4), (0, 0)],
        "chr1:6-": [(0, 2), (4, 5)],
        "chr1:9+": [(0, 0), (2, 2)],
        "chr1:12+": [(1, 1), (0, 0)],
        "chr2:3-": [(0, 300), (0, 4)],
        "chr2:8+": [(0, 0), (2, 2)],
    }
    assert table.layers["total"].dtype == table.layers["methylated"].dtype == np.uint16
    pd.testing.assert_frame_equal(
        table.uns["pedigree"], pedigree, check_index_type=False, check_column_type=False
    )
    source = open_source(tmp_path / to, FIELDS, ("locus",))
    assert source.coords["locus"].tolist() == list(table.obs_names)
    assert source.coords["sample"].tolist() == ["a", "b"]
    entries = source.read({"locus": np.array([4, 1])})
    assert entries["total"].tolist() == [[300, 4], [2, 5]]
    assert entries["methylated"].tolist() == [[0, 0], [0, 4]]


def test_loci_are_chosen_by_coverage_context_and_chromosome(tmp_path):
    both = gathered(tmp_path, {"a": A, "b": B}, "both.zarr", min_samples=2)
    assert list(both.obs_names) == ["chr1:6-", "chr2:3-"]
    some = gathered(tmp_path, {"a": A, "b": B}, "some.zarr", contexts=("CHH", "CG"), chromosomes=["chr1"])
    assert list(some.obs_names) == ["chr1:5+", "chr1:6-", "chr1:9+"]
    assert list(some.obs["context"]) == ["CG", "CG", "CHH"]
    assert list(some.obs["context"].cat.categories) == ["CHH", "CG"]  # in the order asked for
    assert some.layers["total"].dtype == np.uint8


def test_strands_of_a_symmetric_pair_are_merged_if_wanted(tmp_path):
    table = gathered(tmp_path, {"a": A, "b": B}, merge_strands=True)
    assert counts(table) == {
        "chr1:5": [(3, 6), (4, 5)],
        "chr1:9+": [(0, 0), (2, 2)],
        "chr1:12+": [(1, 1), (0, 0)],
        "chr2:3-": [(0, 300), (0, 4)],
        "chr2:8": [(0, 0), (2, 2)],
    }
    assert list(table.obs["strand"]) == [".", "+", "+", "-", "."]


def simulated(rng: np.random.Generator) -> str:
    """Lines of a cytosine report, three chromosomes with CG on both strands."""
    lines = []
    for chrom in ("chr1", "chr2", "scaffold"):
        for start in np.flatnonzero(rng.random(1000) < 0.2):
            total, (word, strand) = rng.poisson(2), [("CG", "+"), ("CG", "-"), ("CHH", "+")][start % 3]
            methylated = rng.binomial(total, 0.4)
            lines.append(f"{chrom} {start + 1} {strand} {methylated} {total - methylated} {word} {word}")
    return "\n".join(lines)


@pytest.mark.parametrize("merge_strands", [False, True])
def test_the_sizes_of_pieces_windows_and_chunks_do_not_matter(merge_strands, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    texts = {name: simulated(rng) for name in "abc"}
    whole = gathered(tmp_path, texts, "whole.zarr", merge_strands=merge_strands)
    monkeypatch.setattr(methylome_files, "_PIECE", 401)
    monkeypatch.setattr(methylomes, "_WINDOW", 37)
    table = gathered(tmp_path, texts, "pieces.zarr", merge_strands=merge_strands, chunk_loci=11)
    assert counts(whole) == counts(table)
    pd.testing.assert_frame_equal(whole.obs, table.obs)
    assert whole.obs_names.is_unique
    lines = [line.split() for text in texts.values() for line in text.splitlines()]
    assert table.layers["total"].sum() == sum(int(m) + int(u) for _, _, _, m, u, _, _ in lines)


def refusal(folder: Path, texts: dict[str, str], **how: Any) -> str:
    """What is said; nothing but the files may be left."""
    with pytest.raises(DataError) as caught:
        gathered(folder, texts, **how)
    assert {path.name for path in folder.iterdir()} == {f"{name}.txt" for name in texts}
    return str(caught.value).replace(f"{folder}/", "")


def test_all_malformed_lines_are_named_at_once(tmp_path):
    bad = """
        # a comment
        chr1 5 + 3 1 CG CGA
        chr1 5 + 3 1 CG CGA
        chr1 x - 0 2 CG CGT
        chr1 9 + -1 0 CHH CAA
        chr1 10 + 1 -2 CHH CAA
        chr1 12 + 1 0 CHZ CAG
        chr1 8 + 1.5 0 CHG CAG
        chr1 4 + 1 0 CHG CAG
        chr2 3 - 0 300 CHH
        chr2 0 - 1 0 CG CGT
        chr2 3 ? 0 300 CHH CAA
        chr1 300 + 1 2 CHH CAA"""
    reads = """
        chr1 5 + CGA 7 2 1
        chr1 6 + CGA 8 5000000000 1"""
    said = refusal(tmp_path, {"a": A, "bad": bad, "reads": reads})
    for line in (
        '"bad.txt", line 4: the number in column 2 (start) is not a whole one; it reads "chr1\tx',
        '"bad.txt", line 8: the number in column 4 (methylated) is not a whole one',
        '"bad.txt", line 10: 7 columns with tabs between them are expected',
        '"bad.txt", 2 lines (5, 6): a count is negative; the first reads "chr1\t9\t+\t-1\t0\tCHH\tCAA"',
        '"bad.txt", line 7: the context is no word for CG, CHG, CHH',
        '"bad.txt", line 11: a position is below the first base',
        '"bad.txt", line 12: the strand is none of +, -, .',
        '"bad.txt", line 3: the locus stands on a line above',
        '"bad.txt", line 9: the position is before that of the line above; sort the file (sort -k1,1 -k2,2n)',
        '"reads.txt", line 1: more reads are methylated than there are; it reads "chr1\t5\t+\tCGA\t7',
        '"reads.txt", line 2: a position or a count is above 4294967294',
    ):
        assert line in said
    assert "a.txt" not in said
    assert said.count("\n") == 11


def test_a_fault_of_many_lines_names_the_first_ones(tmp_path):
    bad = "\n".join(f"chr1 {k} + CGA 2 1 1" for k in range(1, 1000))
    assert '"bad.txt", 999 lines (1, 2, 3, 4, 5, ...): more reads' in refusal(tmp_path, {"bad": bad})


def test_a_chromosome_that_stands_apart_is_unsorted(tmp_path):
    text = "chr1 5 + 3 1 CG CGA\nchr2 5 + 3 1 CG CGA\nchr1 9 + 3 1 CG CGA"
    assert "line 3: the chromosome stands above, apart from this line" in refusal(tmp_path, {"a": text})


@pytest.mark.parametrize(
    ("texts", "how", "words"),
    [
        ({"a": A, "b": "1 5 + 3 1 CG CGA"}, {}, '"b" has chromosomes such as "1", all others such as "chr1"'),
        ({"a": A, "b": "chr1 5 + 3 1 CHG CAG"}, {}, '"b": 1 loci have another context .* first at chr1:5'),
        ({"a": KINDS["bismark_coverage"]}, {}, 'kind "bismark_coverage" does not tell the context; give'),
        ({"a": KINDS["modkit"].replace(",CG,0", "")}, {}, "2 lines .2, 3.: the line does not tell the"),
        (
            {"a": A, "b": KINDS["bismark_coverage"]},
            {"context": "CG"},
            'CG has strands in "a" and none in "b"; give files of one kind',
        ),
        (
            {"a": KINDS["bismark_coverage"]},
            {"context": "CG", "merge_strands": True},
            'kind "bismark_coverage" does not tell strands, so they cannot be merged',
        ),
        ({"a": "chr1 5 6 75 3 1"}, {"context": "CG"}, "start and end differ; a line must be one cytosine"),
        ({"a": "some other 5 words"}, {}, 'line 1: the lines are of no kind that is known; give kind='),
        ({"a": A}, {"kind": "allc"}, r"4 lines \(1, 2, 3, 4\): the number in column 6 \(total\) is not"),
        ({"a": A}, {"kind": "modkit"}, 'the lines are not of kind "modkit"'),
        ({"a": "chrom start"}, {}, "the file has no lines"),
        ({"a": "", "b": A}, {}, '"a.txt": the file has no lines'),
        ({"a": "chr1 5 + 0 0 CG CGA"}, {}, "no locus of CG, CHG, CHH is covered in 1 samples or more"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(texts, how, words, tmp_path):
    assert re.search(words, refusal(tmp_path, texts, **how))


def test_wrong_calls_are_named_at_once(tmp_path):
    taken = tmp_path / "taken.csv"
    taken.touch()
    with pytest.raises(DataError) as caught:
        gather(
            {"a": tmp_path / "none.txt", "b": taken},
            taken,
            pedigree={"node": ["a", "c"], "observed": [True, True]},
            contexts=("CpG",),
            kind="bsmap",
            min_samples=3,
            chunk_loci=0,
        )
    for line in (
        'there is no "',
        "must end in .zarr or .h5ad",
        "exists; remove it",
        'context "CpG" is none of CG, CHG, CHH',
        'kind "bsmap" is none of bismark_report',
        "chunk_loci = 0, but it must be 1 or more",
        "min_samples = 3, but there are 2 samples",
        'sample "b" is no node of the pedigree',
        'node "c" is observed, but has no file',
    ):
        assert line in str(caught.value)


def test_a_damaged_file_is_named(tmp_path):
    path = written(tmp_path / "a.txt.gz", "\n".join([A.strip()] * 1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r'a.txt.gz": the file is damaged after line \d+: '):
        gather({"a": path}, tmp_path / "table.zarr", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt.gz"]


def test_lines_without_a_context_for_an_n_are_left_out_and_counted(tmp_path):
    text = "chr1 5 + CGA 1 2 1\nchr1 9 + CNN 1 2 1\nchr1 11 + C 1 2 1"
    with pytest.warns(UserWarning, match="2 lines have no context for an N in the way; left out"):
        table = gathered(tmp_path, {"a": text})
    assert list(table.obs_names) == ["chr1:5+"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(table: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(methylomes.CountTable, "close", fail)
    files = {"a": written(tmp_path / "a.txt", A)}
    with pytest.raises(OSError, match="no space left"):
        gather(files, tmp_path / "table.zarr", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be killed so there")
def test_a_killed_write_leaves_nothing_under_the_name_and_is_swept_by_the_next(tmp_path):
    written(tmp_path / "a.txt", A)
    code = (
        "import os, signal; from domains.genomics import methylomes as m\n"
        "m.CountTable.close = lambda table: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"m.gather({{'a': {str(tmp_path / 'a.txt')!r}}}, {str(tmp_path / 'table.zarr')!r}, progress=False)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False
    )
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "table.zarr").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".table.zarr.part"}
    gather({"a": tmp_path / "a.txt"}, tmp_path / "table.zarr", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "table.zarr"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="waits for a system that tells the peak")
def test_memory_does_not_grow_with_the_files(tmp_path):
    rng, n, peaks = np.random.default_rng(0), 200_000, []
    for times in (2, 6):
        total = rng.poisson(9, n * times)
        start = np.tile(np.arange(1, n + 1) * 3, times)
        frame = pd.DataFrame({"chrom": np.repeat(np.arange(times), n), "start": start, "strand": "+"})
        frame = frame.assign(word="CGA", methylated=total // 2, total=total, call=1)
        path, runs = tmp_path / f"{times}.txt", []
        frame.to_csv(path, sep="\t", header=False, index=False)
        for k in range(2):
            to = tmp_path / f"{times}-{k}.zarr"
            code = (
                "from domains.genomics.methylomes import gather\n"
                f"gather(dict.fromkeys('abc', {str(path)!r}), {str(to)!r}, progress=False)\n"
                "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
            )
            run = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            )  # fmt: skip
            runs.append(int(run.stdout))
        peaks.append(min(runs))  # what the allocator keeps varies, and only adds
    assert peaks[1] < 1.1 * peaks[0], peaks  # three times the lines
