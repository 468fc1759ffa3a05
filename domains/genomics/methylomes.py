"""Methylation counts of many samples gathered into one table on disk, loci by samples.

``methylome_files`` reads each file once and keeps its covered lines as numbers beside the table (14 bytes for
each, removed at the end). Then the numbers of all samples are merged, one window of a chromosome after the
other. So memory depends neither on the length of a file nor on that of the genome, files may have their
chromosomes in different orders, and every line is known to be sound before the first locus is written.
"""

from __future__ import annotations

import shutil
import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from domains.genomics.methylome_files import CONTEXTS, KINDS, STRANDS, UNKNOWN, Faults, Reader, Sample, Wanted
from scivi.errors import DataError, listed

_WINDOW, _ENTRIES = 2**20, 2**23  # positions, and positions x samples, merged at once (our choice: 0.2 GB)
_CHUNKS = 8  # chunks that are written at once (our choice)
_ZSTD = {"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1, "blocksize": 0}  # half of anndata's lz4
_GZIP = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
_SAID = 50  # faults that are told (our choice)


def gather(
    files: Mapping[str, str | Path],
    to: str | Path,
    *,
    pedigree: Any = None,
    contexts: Sequence[str] = CONTEXTS,
    chromosomes: Collection[str] | None = None,
    min_samples: int = 1,
    merge_strands: bool = False,
    kind: str | None = None,
    context: str | None = None,
    chunk_loci: int = 8192,
    progress: bool = True,
) -> Path:
    """Gather methylation counts of samples, a file each, into one table of loci by samples.

    Args:
        files: path by name of the sample; text of a kind that ``methylome_files`` lists, plain or gzipped,
            sorted by position within each chromosome.
        to: the table, .zarr or .h5ad; must not exist.
        pedigree: table of nodes, a DataFrame or columns by name, kept in ``uns["pedigree"]``. If it has a
            column "node", every sample must be one; if "observed" too, every observed node a sample.
        contexts: those to keep, of "CG", "CHG", "CHH".
        chromosomes: those to keep; None for all.
        min_samples: keep loci that so many samples cover by a read or more, >= 1.
        merge_strands: make one locus of the two cytosines of a CG, at the place of that on the + strand.
        kind: of all files; None to tell it from their first lines.
        context: of lines that do not tell it ("bismark_coverage", "bedmethyl", "modkit" without motifs).
        chunk_loci: loci in a chunk on disk, the least that is read at once.
        progress: show bars.

    Returns:
        ``to``, an AnnData. Layers "methylated" and "total" (locus, sample): unsigned integers, as narrow as
        the greatest total allows; total 0 where a sample does not cover a locus. In obs: "chrom"; "start", of
        which the first base of a chromosome is 1; "strand"; "context". Labels are as "chr1:91344+". Rows are
        in order of chromosome, as the first file and then the others have them, and of position.

    Raises:
        DataError: listing the malformed lines of all files by reason, with the numbers of the first ones, and
            the contradictions between files.

    Notes:
        A million lines take about a second. Of "modkit" the lines with code "m" count, whose reads include
        those with another modification. In "bedmethyl" methylated reads are a rounded percentage of the
        reads: exact below a coverage of 100.
    """
    paths, to = {str(name): Path(path) for name, path in files.items()}, Path(to)
    wanted = Wanted(tuple(contexts), chromosomes, merge_strands, kind, context)
    if faults := _misuse(paths, to, pedigree, wanted, {"min_samples": min_samples, "chunk_loci": chunk_loci}):
        raise DataError(listed("the samples cannot be gathered so:", faults))
    told, n_bytes = Faults(), sum(path.stat().st_size for path in paths.values())
    with _aside(to) as folder:
        with tqdm(total=n_bytes, desc="reading", unit="B", unit_scale=True, disable=not progress) as bar:
            samples = [
                Reader(name, path, folder / str(k), wanted, told).read(bar)
                for k, (name, path) in enumerate(paths.items())
            ]
        _raise([*told.sentences(), *_contradictions(samples)])
        if n_unknown := sum(sample.n_unknown for sample in samples):
            warnings.warn(f"{n_unknown} lines have no context for an N in the way; left out.", stacklevel=2)
        chroms = dict.fromkeys(chrom for sample in samples for chrom in sample.places)
        most, aside = max(sample.most for sample in samples), folder / f"table{to.suffix}"
        table = CountTable(aside, list(paths), list(chroms), wanted.contexts, most, pedigree, chunk_loci)
        n_lines = sum(sample.n_lines for sample in samples)
        with tqdm(total=n_lines, desc="gathering", unit="line", unit_scale=True, disable=not progress) as bar:
            _merge(samples, table, wanted.contexts, min_samples, bar)
        aside.replace(to)
    return to


def _raise(faults: list[str]) -> None:
    if faults:
        raise DataError(listed("the files cannot be gathered:", faults, _SAID))


def _misuse(
    paths: Mapping[str, Path], to: Path, pedigree: Any, wanted: Wanted, counts: Mapping[str, int]
) -> list[str]:
    """Faults that need no file to be read."""
    import pandas as pd

    faults = [f'"{name}": there is no "{path}"' for name, path in paths.items() if not path.is_file()]
    faults += [] if paths else ["no file is given; give a path for each sample"]
    faults += [] if to.suffix in (".zarr", ".h5ad") else [f'"{to}" must end in .zarr or .h5ad']
    faults += [f'"{to}" exists; remove it, or choose another name'] if to.exists() else []
    named = [*wanted.contexts, *([] if wanted.context is None else [wanted.context])]
    faults += [f'context "{c}" is none of {", ".join(CONTEXTS)}' for c in named if c not in CONTEXTS]
    if wanted.kind is not None and wanted.kind not in KINDS:
        faults.append(f'kind "{wanted.kind}" is none of {", ".join(KINDS)}')
    faults += [f"{name} = {n}, but it must be 1 or more" for name, n in counts.items() if n < 1]
    if counts["min_samples"] > len(paths) > 0:
        faults.append(f"min_samples = {counts['min_samples']}, but there are {len(paths)} samples")
    nodes = pd.DataFrame({} if pedigree is None else pedigree)
    if "node" in nodes:
        known = nodes["node"].astype(str)
        faults += [f'sample "{name}" is no node of the pedigree' for name in paths if name not in set(known)]
        seen = known[nodes["observed"]] if "observed" in nodes and nodes["observed"].dtype == bool else []
        faults += [f'node "{name}" is observed, but has no file' for name in seen if name not in paths]
    return faults


@contextmanager
def _aside(to: Path) -> Iterator[Path]:
    """A folder beside a file, gone afterwards; what a killed writer of the same file has left goes first."""
    folder = to.with_name(f".{to.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _contradictions(samples: Sequence[Sample]) -> list[str]:
    """What is wrong with the files side by side."""
    faults = []
    for context, word in enumerate(CONTEXTS):
        bare = [s.name for s in samples if (context, STRANDS.index(".")) in s.strands]
        both = [s.name for s in samples if {(context, 0), (context, 1)} & s.strands]
        if bare and both:
            what = f'{word} has strands in "{both[0]}" and none in "{bare[0]}"'
            faults.append(f"{what}; give files of one kind, or merge_strands=True")
    for sample in samples:
        others = {chrom for s in samples if s is not sample for chrom in s.places}
        if sample.places and others and not others & sample.places.keys():
            own, theirs = next(iter(sample.places)), min(others)
            faults.append(f'"{sample.name}" has chromosomes such as "{own}", all others such as "{theirs}"')
    return faults


def _merge(
    samples: Sequence[Sample], table: CountTable, contexts: Sequence[str], min_samples: int, bar: tqdm
) -> None:
    """Bring the lines of all samples together, window by window."""
    code = np.array([contexts.index(c) if c in contexts else 0 for c in CONTEXTS], np.uint8)
    clashes: dict[str, tuple[int, str]] = {}
    for chrom, first, parts in _windows(samples, table.chromosomes):
        keys = [len(STRANDS) * (part["start"].astype(np.int64) - first) + part["strand"] for part in parts]
        n_covering = np.zeros(1 + max(int(key[-1]) for key in keys if len(key)), np.int32)
        context = np.full(len(n_covering), UNKNOWN, np.uint8)
        for sample, part, key in zip(samples, parts, keys, strict=True):
            n_covering[key] += 1
            known = context[key]
            context[key] = part["context"]
            other = np.flatnonzero((known != UNKNOWN) & (known != part["context"]))
            if len(other):
                n, at = clashes.get(sample.name, (0, f"{chrom}:{part['start'][other[0]]}"))
                clashes[sample.name] = (n + len(other), at)
        kept = np.flatnonzero(n_covering >= min_samples)
        row = np.full(len(n_covering), -1, np.int64)
        row[kept] = np.arange(len(kept))
        layers = {name: np.zeros((len(kept), len(samples)), table.dtype) for name in ("methylated", "total")}
        for k, (part, key) in enumerate(zip(parts, keys, strict=True)):
            rows, covered = row[key], row[key] >= 0
            for name, layer in layers.items():
                layer[rows[covered], k] = part[name][covered]
        table.add(chrom, first + kept // len(STRANDS), kept % len(STRANDS), code[context[kept]], layers)
        bar.update(sum(map(len, parts)))
    faults = [
        f'"{name}": {n} loci have another context than in the samples before it, the first at {at}'
        for name, (n, at) in clashes.items()
    ]
    table.close()
    if not table.n_loci:
        faults.append(f"no locus of {', '.join(contexts)} is covered in {min_samples} samples or more")
    _raise(faults)


def _windows(
    samples: Sequence[Sample], chromosomes: Sequence[str]
) -> Iterator[tuple[str, int, list[np.ndarray]]]:
    """Chromosome, first position, and the lines of each sample; at least one has some."""
    width = min(_WINDOW, max(1, _ENTRIES // len(samples)))
    for chrom in chromosomes:
        spans = [sample.places.get(chrom, (0, 0)) for sample in samples]
        while any(at < stop for at, stop in spans):
            ahead = [sample.lines(*span) for sample, span in zip(samples, spans, strict=True)]
            starts: list[Any] = [lines["start"] for lines in ahead]
            first = min(int(start[0]) for start in starts if len(start))
            lengths = [bisect_left(start, first + width) for start in starts]
            yield chrom, first, [np.array(lines[:n]) for lines, n in zip(ahead, lengths, strict=True)]
            spans = [(at + n, stop) for (at, stop), n in zip(spans, lengths, strict=True)]


class CountTable:
    """An AnnData on disk whose rows come some at a time; whole chunks are written.

    What does not grow with the rows is written by anndata, as an AnnData without rows, whose arrays along
    the rows are then made anew.

    Args:
        path: .zarr or .h5ad; what is there is lost.
        samples: names of the columns.
        chromosomes, contexts: words of obs "chrom" and "context".
        most: the greatest count.
        pedigree: kept in ``uns``, or None.
        chunk_loci: rows in a chunk of a layer.
    """

    def __init__(
        self,
        path: Path,
        samples: Sequence[str],
        chromosomes: Sequence[str],
        contexts: Sequence[str],
        most: int,
        pedigree: Any = None,
        chunk_loci: int = 8192,
    ) -> None:
        import h5py
        import zarr

        self.path, self.chunk, self.chromosomes = path, chunk_loci, list(chromosomes)
        self.is_zarr, self.dtype = path.suffix == ".zarr", np.min_scalar_type(most)
        # format 2 is what anndata writes by default; format 3 has no settled text type yet
        self.root: Any = (
            zarr.open_group(path, mode="w", zarr_format=2) if self.is_zarr else h5py.File(path, "w")
        )
        self.arrays = {name: self._array(name) for name in self._frame(list(samples), contexts, pedigree)}
        self.waiting: dict[str, list[np.ndarray]] = {name: [] for name in self.arrays}
        self.n_waiting = self.n_loci = 0

    def _frame(self, samples: list[str], contexts: Sequence[str], pedigree: Any) -> list[str]:
        """Write the table without rows; the names of its arrays along them."""
        import pandas as pd
        from anndata import AnnData
        from anndata.io import write_elem

        words = {"chrom": self.chromosomes, "strand": STRANDS, "context": contexts}
        empty = {name: pd.Categorical([], categories=list(some)) for name, some in words.items()}
        columns = {"chrom": empty["chrom"], "start": np.empty(0, np.int64), "strand": empty["strand"]}
        obs = pd.DataFrame({**columns, "context": empty["context"]}, index=pd.Index([], dtype=str))
        var = pd.DataFrame(index=pd.Index(samples))
        layers = {name: np.empty((0, len(samples)), self.dtype) for name in ("methylated", "total")}
        uns = {}
        if pedigree is not None:
            table = pd.DataFrame(pedigree)
            # a founder's empty parent: pandas reads a missing number, which AnnData would write as "nan"
            uns["pedigree"] = table.assign(parent=table["parent"].fillna("")) if "parent" in table else table
        write_elem(self.root, "/", AnnData(obs=obs, var=var, layers=layers, uns=uns))
        codes = [f"obs/{name}/codes" for name in words]
        return ["obs/_index", *codes, "obs/start", *(f"layers/{n}" for n in layers)]

    def _array(self, name: str) -> Any:
        """The array along the rows of that name, made anew so that it can grow."""
        old = self.root[name]
        attrs, shape, dtype = dict(old.attrs), (0, *old.shape[1:]), old.dtype
        n = self.chunk if name.startswith("layers") else _CHUNKS * self.chunk
        chunks, most = (n, *shape[1:]), (None, *shape[1:])
        del self.root[name]
        if self.is_zarr:
            new = self.root.create_array(name, shape=shape, chunks=chunks, dtype=dtype, compressors=_ZSTD)
        else:
            import h5py

            kind = h5py.string_dtype() if dtype.kind == "O" else dtype
            new = self.root.create_dataset(name, shape, kind, chunks=chunks, maxshape=most, **_GZIP)
        new.attrs.update(attrs)
        return new

    def add(
        self,
        chrom: str,
        start: np.ndarray,
        strand: np.ndarray,
        context: np.ndarray,
        layers: Mapping[str, np.ndarray],
    ) -> None:
        """Append loci of one chromosome.

        Args:
            chrom: its name.
            start: their positions, from 1, in rising order.
            strand: places in ``STRANDS``.
            context: places in the contexts of the table.
            layers: "methylated" and "total", (locus, sample).
        """
        signs = [sign.replace(".", "") for sign in STRANDS]
        labels = [f"{chrom}:{at}{signs[k]}" for at, k in zip(start.tolist(), strand.tolist(), strict=True)]
        columns = {
            "obs/_index": np.array(labels, object),
            "obs/chrom/codes": np.full(len(start), self.chromosomes.index(chrom)),
            "obs/start": start,
            "obs/strand/codes": strand,
            "obs/context/codes": context,
            **{f"layers/{name}": layer for name, layer in layers.items()},
        }
        for name, values in columns.items():
            self.waiting[name].append(values)
        self.n_waiting, self.n_loci = self.n_waiting + len(start), self.n_loci + len(start)
        n_whole = self.n_waiting - self.n_waiting % (_CHUNKS * self.chunk)
        if n_whole:
            self._write(n_whole)

    def _write(self, n: int) -> None:
        for name, array in self.arrays.items():
            values, n_before = np.concatenate(self.waiting[name]), array.shape[0]
            array.resize((n_before + n, *array.shape[1:]))
            array[n_before:] = values[:n].astype(array.dtype, copy=False)
            self.waiting[name] = [values[n:]]
        self.n_waiting -= n

    def close(self) -> None:
        """Write what is left."""
        import zarr

        if self.n_waiting:
            self._write(self.n_waiting)
        if self.is_zarr:
            zarr.consolidate_metadata(self.root.store)
        else:
            self.root.close()
