"""One sample's methylation counts, a text file as pipelines write them: every line checked, kept as numbers.

    kind                 columns of a line, from 1                                        first base
    "bismark_report"     1 chrom, 2 position, 3 strand, 4 methylated, 5 not, 6 context    1
    "bismark_coverage"   1 chrom, 2 start, 3 end, 5 methylated, 6 not                     1
    "allc"               1 chrom, 2 position, 3 strand, 4 word, 5 methylated, 6 reads     1
    "bedmethyl"          1 chrom, 2 start, 6 strand, 10 reads, 11 percent (ENCODE)        0
    "modkit"             1 chrom, 2 start, 4 code, 6 strand, 10 reads, 12 modified        0
    "methimpute"         1 chrom, 2 position, 3 strand, 4 context, 5 methylated, 6 reads  1

Columns have tabs between them; the file may be gzipped. A word is a context, or the letters of the cytosine
and those after it: CGN, CAG. The text is parsed by pandas, some megabytes at a time; only a piece that it
refuses is looked at line by line.

References:
    Krueger and Andrews 2011, doi:10.1093/bioinformatics/btr167 (Bismark).
    Schultz et al. 2015, doi:10.1038/nature14465 (methylpy, allc).
    ENCODE, whole-genome bisulfite sequencing, https://www.encodeproject.org/data-standards/wgbs (bedMethyl).
    Oxford Nanopore, https://nanoporetech.github.io/modkit (its bedMethyl).
    Taudt et al. 2018, doi:10.1186/s12864-018-4641-x (methimpute).

Longer than 400 lines because every way in which a line can be wrong is told beside what reads it.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from scivi.errors import DataError

CONTEXTS = ("CG", "CHG", "CHH")
STRANDS = ("+", "-", ".")  # ".": not told, or both strands of a CG as one locus

UNKNOWN, _WRONG, _ABSENT = 200, 201, 202  # contexts: with an N in the way; no such word; not on the line
_WORD = re.compile("C[ACGTNHRYSWKMBDV]{0,2}")  # letters of IUPAC, to the end of the chromosome
_MOST = 2**32 - 2  # position and count (our choice: a covered line in 14 bytes)
_PIECE = 2**22  # bytes of text that are checked at once (our choice: some 10^5 lines, 50 MB meanwhile)
_SHOWN = 5  # lines that are named for a fault (our choice)

_LINE = np.dtype(
    [(name, "i8") for name in ("number", "chrom", "start", "strand", "context", "methylated", "total")]
)
KEPT = np.dtype(
    [("start", "<u4"), ("strand", "u1"), ("context", "u1"), ("methylated", "<u4"), ("total", "<u4")]
)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a line of a kind of file reads.

    Args:
        columns: number of the column, from 0, by what it holds.
        widths: how many columns a line may have.
        first: number of the first base of a chromosome.
    """

    columns: Mapping[str, int]
    widths: range
    first: int = 1


def _kind(columns: str, widths: range, first: int = 1) -> Kind:
    named = {name: k for k, name in enumerate(columns.split()) if name != "-"}
    return Kind(MappingProxyType(named), widths, first)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "bismark_report": _kind("chrom start strand methylated unmethylated context", range(7, 8)),
        "bismark_coverage": _kind("chrom start end - methylated unmethylated", range(6, 7)),
        "allc": _kind("chrom start strand context methylated total", range(7, 8)),
        "bedmethyl": _kind("chrom start - - - strand - - - total percent", range(11, 18), 0),
        "modkit": _kind("chrom start - code - strand - - - total - methylated", range(18, 19), 0),
        "methimpute": _kind("chrom start strand context methylated total", range(6, 20)),
    }
)
_TEXT = frozenset({"chrom", "strand", "context", "code"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is kept of a line, and what its file does not tell."""

    contexts: tuple[str, ...]
    chromosomes: Collection[str] | None
    merge_strands: bool
    kind: str | None
    context: str | None


class Faults:
    """Malformed lines by file and reason: how many, and which came first."""

    def __init__(self) -> None:
        self._found: dict[tuple[Path, str], tuple[list[int], str]] = {}
        self._count: dict[tuple[Path, str], int] = {}

    def add(self, path: Path, reason: str, numbers: Any = (), text: bytes = b"") -> None:
        """Lines of a file that are malformed for one reason, and what the first of them reads."""
        found, _ = self._found.setdefault((path, reason), ([], text.decode(errors="replace").strip()))
        self._count[path, reason] = self._count.get((path, reason), 0) + len(numbers)
        found += [int(number) for number in numbers[: _SHOWN - len(found)]]

    def sentences(self) -> list[str]:
        """A line for each file and reason."""
        said = []
        for (path, reason), (numbers, text) in self._found.items():
            n = self._count[path, reason]
            shown = ", ".join(map(str, numbers)) + (", ..." if n > len(numbers) else "")
            where = f", line {shown}" if n == 1 else f", {n} lines ({shown})" if n else ""
            reads = "; it reads" if n == 1 else "; the first reads"
            said.append(f'"{path}"{where}: {reason}' + (f'{reads} "{text[:80]}"' if text else ""))
        return said


@dataclass(slots=True)
class Sample:
    """The covered lines of a file, in order, on disk; and what was learnt from them."""

    name: str
    kept: Path
    n_lines: int = 0
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # of a chromosome's lines among them
    most: int = 0  # reads of a locus
    strands: set[tuple[int, int]] = field(default_factory=set)  # (context, strand) that occur
    n_unknown: int = 0

    def lines(self, start: int, stop: int) -> np.ndarray:
        """Some of them; in memory for as long as they are in use."""
        if start == stop:
            return np.empty(0, KEPT)
        return np.memmap(self.kept, KEPT, "r", start * KEPT.itemsize, (stop - start,))


class Reader:
    """The text of one file, checked piece by piece and kept as numbers in another file."""

    def __init__(self, name: str, path: Path, to: Path, wanted: Wanted, faults: Faults) -> None:
        self.path, self.wanted, self.faults, self.sample = path, wanted, faults, Sample(name, to)
        self.kind, self.width = KINDS["allc"], 0  # until the first lines are seen
        self.chroms: dict[str, int] = {}
        self.contexts = [CONTEXTS.index(c) for c in wanted.contexts]

    def read(self, bar: tqdm) -> Sample:
        """All of it."""
        held, number = np.empty(0, _LINE), 1
        with self.path.open("rb") as raw, self.sample.kept.open("wb") as out:
            try:
                for block in _blocks(raw, bar):
                    if not self.width:
                        block, number = self._recognised(block)
                        if not self.width:
                            return self.sample
                    lines = np.concatenate([held, self._checked(block, number)])
                    number += block.count(b"\n")
                    n_held = self._in_order(lines)
                    lines, held = lines[: len(lines) - n_held], lines[len(lines) - n_held :]
                    self._keep(self._settled(lines), out)
            except (EOFError, OSError, zlib.error) as error:
                self.faults.add(self.path, f"the file is damaged after line {number - 1}: {error}")
            self._keep(self._settled(held), out)
        if not self.width:
            self.faults.add(self.path, "the file has no lines")
        return self.sample

    def _recognised(self, block: bytes) -> tuple[bytes, int]:
        """Learn kind and width; the block without what stands above the first line, whose number it is."""
        texts = block.splitlines(True)
        n_above = next((k for k, text in enumerate(texts) if not _is_heading(text)), len(texts))
        is_methimpute = b"counts.total" in b"".join(texts[:n_above])
        below = [text.decode(errors="replace").split() for text in texts[n_above : n_above + 100]]
        kinds = [(self.wanted.kind or _kind_of(fields, is_methimpute), len(fields)) for fields in below]
        name, width = next(((k, w) for k, w in kinds if k and w in KINDS[k].widths), (None, 0))
        if name is None:
            known = f'kind "{self.wanted.kind}"' if self.wanted.kind else "no kind that is known; give kind="
            fault = f"the lines are of {known}".replace("of kind", "not of kind")
        elif self.wanted.context is None and not {"context", "code"} & KINDS[name].columns.keys():
            fault = f'a file of kind "{name}" does not tell the context; give context="CG" or another'
        elif self.wanted.merge_strands and "strand" not in KINDS[name].columns:
            fault = f'a file of kind "{name}" does not tell strands, so they cannot be merged'
        else:
            fault, self.kind, self.width = "", KINDS[name], width
        if fault and below:
            self.faults.add(self.path, fault, [n_above + 1], texts[n_above])
        elif fault:
            self.faults.add(self.path, "the file has no lines")
        return b"".join(texts[n_above:]), n_above + 1

    def _checked(self, block: bytes, number: int) -> np.ndarray:
        """The lines of a block, from that number on, that are sound and wanted."""
        if self.kind is KINDS["modkit"]:
            block = block.replace(b" ", b"\t")  # versions before 0.3 have blanks from the tenth column on
        numbers = np.arange(number, number + block.count(b"\n"))
        columns = self._parsed(block)
        if columns is None:
            block, numbers = self._sound(block, number)
            columns = self._parsed(block)
        if columns is None:
            raise DataError(f'"{self.path}": the text after line {number} cannot be read as a table.')
        lines, present = np.empty(len(numbers), _LINE), np.ones(len(numbers), bool)
        lines["number"], lines["start"] = numbers, columns["start"] + (1 - self.kind.first)
        lines["chrom"] = _coded(columns["chrom"], self._chrom)
        lines["strand"] = _coded(columns["strand"], _strand) if "strand" in columns else STRANDS.index(".")
        lines["methylated"], lines["total"] = _counts(columns)
        if "code" in columns:
            present = _coded(columns["code"], lambda word: int(word.split(",")[0] == "m")) == 1
        words = columns.get("context", columns.get("code"))
        if words is None:
            lines["context"] = CONTEXTS.index(self.wanted.context or "")
        else:
            lines["context"] = _coded(words, self._motif if "code" in columns else _context)
        sound = self._without_faults(lines, columns, present, block)
        self.sample.n_unknown += int((sound & (lines["context"] == UNKNOWN)).sum())
        if self.wanted.chromosomes is not None:
            sound &= _coded(columns["chrom"], lambda word: int(word in (self.wanted.chromosomes or ()))) == 1
        lines = lines[sound & np.isin(lines["context"], self.contexts)]
        if self.wanted.merge_strands:  # to the place of the partner; no other cytosine is in between
            lines["start"] -= (lines["context"] == CONTEXTS.index("CG")) & (lines["strand"] == 1)
        return lines

    def _parsed(self, block: bytes) -> dict[str, Any] | None:
        """Columns by what they hold; None if a line has another form."""
        import pandas as pd

        places, n = self.kind.columns, block.count(b"\n")
        if block.count(b"\t") != n * (self.width - 1):
            return None
        types = {place: "category" if name in _TEXT else "int64" for name, place in places.items()}
        if "percent" in places:
            types[places["percent"]] = "float64"
        if not n:
            return {name: pd.Series([], dtype=types[place]) for name, place in places.items()}
        form: dict[str, Any] = {"sep": "\t", "header": None, "usecols": list(types), "dtype": types}
        form |= {"na_filter": False, "quoting": csv.QUOTE_NONE, "skip_blank_lines": False, "engine": "c"}
        try:
            frame = pd.read_csv(io.BytesIO(block), low_memory=False, **form)
        except (ValueError, OverflowError):  # pandas' ParserError is a ValueError
            return None
        return {name: frame[place] for name, place in places.items()} if len(frame) == n else None

    def _sound(self, block: bytes, number: int) -> tuple[bytes, np.ndarray]:
        """The lines of a block that have the right form, and their numbers; the others are faults."""
        texts, numbers = [], []
        for at, text in enumerate(block.split(b"\n")[:-1], number):
            text = text.removesuffix(b"\r")
            if (reason := self._malformed(text)) is None:
                texts.append(text + b"\n")
                numbers.append(at)
            elif text:
                self.faults.add(self.path, reason, [at], text)
        return b"".join(texts), np.array(numbers, np.int64)

    def _malformed(self, text: bytes) -> str | None:
        fields = text.split(b"\t")
        if len(fields) != self.width:
            return f"{self.width} columns with tabs between them are expected"
        if b"\r" in text or not text.isascii():
            return "a line may only have ASCII letters"
        for name in [name for name in self.kind.columns if name not in _TEXT]:
            value = fields[self.kind.columns[name]]
            if name == "percent" and not re.fullmatch(rb"\d{1,3}(\.\d{0,15})?", value):
                return "the percentage is not a number"
            if name != "percent" and not re.fullmatch(rb"-?\d{1,18}", value):
                return f"the number in column {self.kind.columns[name] + 1} ({name}) is not a whole one"
        return None

    def _chrom(self, word: str) -> int:
        return self.chroms.setdefault(word, len(self.chroms))

    def _motif(self, word: str) -> int:
        """Context of a code of modkit, "m" or "m,CG,0"."""
        told = word.split(",")[1] if "," in word else self.wanted.context
        return _ABSENT if told is None else _context(told)

    def _without_faults(
        self, lines: np.ndarray, columns: Mapping[str, Any], present: np.ndarray, block: bytes
    ) -> np.ndarray:
        """Where lines are sound and count; tell the others."""
        methylated, total = lines["methylated"], lines["total"]
        faults = {
            "a position is below the first base": lines["start"] < 1,
            "a count is negative": (methylated < 0) | (total < methylated) & ("unmethylated" in columns),
            "more reads are methylated than there are": (total < methylated) & ("total" in columns),
            f"a position or a count is above {_MOST}": np.maximum(total, lines["start"]) > _MOST,
            "the strand is none of +, -, .": lines["strand"] == _WRONG,
            f"the context is no word for {', '.join(CONTEXTS)}": lines["context"] == _WRONG,
            'the line does not tell the context; give context="CG" or another': lines["context"] == _ABSENT,
        }
        if "end" in columns:
            faults["start and end differ; a line must be one cytosine, the first base 1"] = (
                columns["end"].to_numpy() != lines["start"]
            )
        if "percent" in columns:
            faults["the percentage is above 100"] = columns["percent"].to_numpy() > 100
        sound = present.copy()
        for reason, wrong in faults.items():
            if (wrong := wrong & present).any():
                places = np.flatnonzero(wrong)
                self.faults.add(self.path, reason, lines["number"][places], block.split(b"\n")[places[0]])
                sound &= ~wrong
        return sound

    def _in_order(self, lines: np.ndarray) -> int:
        """Tell lines that are out of order; how many at the end wait for what comes next."""
        same, back = np.diff(lines["chrom"]) == 0, np.diff(lines["start"]) < 0
        if (wrong := np.flatnonzero(same & back)).size:
            reason = "the position is before that of the line above; sort the file (sort -k1,1 -k2,2n)"
            self.faults.add(self.path, reason, lines["number"][wrong + 1])
        if not len(lines):
            return 0
        other = np.flatnonzero(
            (lines["chrom"] != lines["chrom"][-1]) | (lines["start"] != lines["start"][-1])
        )
        return len(lines) - (int(other[-1]) + 1 if len(other) else 0)

    def _settled(self, lines: np.ndarray) -> np.ndarray:
        """A line for each locus: strands merged if wanted, repeated loci told."""
        if not len(lines):
            return lines
        merged = (lines["context"] == CONTEXTS.index("CG")) & self.wanted.merge_strands
        strand = np.where(merged, STRANDS.index("."), lines["strand"])
        run = np.cumsum(np.diff(lines["chrom"], prepend=lines["chrom"][0]) != 0)
        key = (run * (_MOST + 1) + lines["start"]) * len(STRANDS) + strand
        if (np.diff(key) < 0).any():  # two strands at one place stand in any order
            order = np.argsort(key, kind="stable")
            lines, merged, strand, key = lines[order], merged[order], strand[order], key[order]
        new = np.diff(key, prepend=-1) != 0
        first = np.flatnonzero(new)
        if len(first) < len(lines):
            partner = merged & ~new & np.roll(new, 1) & (lines["strand"] != np.roll(lines["strand"], 1))
            if (repeated := np.flatnonzero(~new & ~partner)).size:
                self.faults.add(self.path, "the locus stands on a line above", lines["number"][repeated])
        loci = lines[first]
        loci["strand"] = strand[first]
        for name in ("methylated", "total"):
            loci[name] = np.add.reduceat(lines[name], first)
        return loci

    def _keep(self, loci: np.ndarray, out: BinaryIO) -> None:
        """Write the covered ones, and remember where each chromosome stands."""
        sample, names = self.sample, list(self.chroms)
        loci = loci[loci["total"] > 0]
        starts = np.flatnonzero(np.diff(loci["chrom"], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(loci)][: len(starts)], strict=True):
            name = names[loci["chrom"][start]]
            span = (sample.n_lines + int(start), sample.n_lines + int(stop))
            before = sample.places.get(name, (span[0], span[0]))
            if before[1] != span[0]:
                reason = "the chromosome stands above, apart from this line; sort the file"
                self.faults.add(self.path, reason, [loci["number"][start]])
            sample.places[name] = (before[0], span[1])
        sample.most = max(sample.most, int(loci["total"].max(initial=0)))
        sample.strands |= {divmod(int(k), 4) for k in np.unique(4 * loci["context"] + loci["strand"])}
        out.write(loci[list(KEPT.names or ())].astype(KEPT).tobytes())
        sample.n_lines += len(loci)


def _blocks(raw: BinaryIO, bar: tqdm) -> Iterator[bytes]:
    """Whole lines of a file, gzipped or not, some megabytes at a time."""
    is_gzipped, rest, at = raw.read(2) == b"\x1f\x8b", b"", 0
    raw.seek(0)
    text: Any = gzip.GzipFile(fileobj=raw) if is_gzipped else raw
    while piece := text.read(_PIECE):
        bar.update(raw.tell() - at)
        at, end = raw.tell(), piece.rfind(b"\n") + 1
        if end:
            yield rest + piece[:end]
        rest = piece[end:] if end else rest + piece
    if rest:
        yield rest + b"\n"


def _is_heading(text: bytes) -> bool:
    return text.startswith((b"#", b"track", b"browser")) or not re.search(rb"\d", text)


def _kind_of(fields: Sequence[str], is_methimpute: bool) -> str | None:
    """Kind of a line, by its columns."""
    if is_methimpute or len(fields) < 6:
        return "methimpute" if is_methimpute else None
    if len(fields) == 6:
        return "bismark_coverage" if fields[2].isdecimal() else None
    if len(fields) > 7:
        kind = "modkit" if len(fields) == 18 else "bedmethyl"
        return kind if fields[5] in STRANDS and fields[9].isdecimal() else None
    if fields[2] in STRANDS and fields[4].isdecimal():
        return "bismark_report" if fields[3].isdecimal() else "allc"
    return None


def _context(word: str) -> int:
    """Place in ``CONTEXTS`` of a word: a context, or the letters of C and what follows."""
    word = word.upper()
    if word in CONTEXTS:
        return CONTEXTS.index(word)
    if not _WORD.fullmatch(word):
        return _WRONG
    if word[1:2] == "G":
        return 0
    if len(word) < 3 or word[1] not in "ACTH" or word[2] not in "ACGTH":
        return UNKNOWN
    return 1 if word[2] == "G" else 2


def _strand(word: str) -> int:
    return STRANDS.index(word) if word in STRANDS else _WRONG


def _coded(column: Any, code: Callable[[str], int]) -> np.ndarray:
    """Number of each word of a column of categories."""
    return np.array([code(word) for word in column.cat.categories], np.int64)[column.cat.codes]


def _counts(columns: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Methylated reads and all reads."""
    if "unmethylated" in columns:
        methylated, unmethylated = columns["methylated"].to_numpy(), columns["unmethylated"].to_numpy()
        return methylated, np.where((unmethylated < 0) | (methylated < 0), -1, methylated + unmethylated)
    total = columns["total"].to_numpy()
    if "percent" in columns:
        return np.rint(total * columns["percent"].to_numpy() / 100).astype(np.int64), total
    return columns["methylated"].to_numpy(), total
