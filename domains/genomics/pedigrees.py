"""Pedigrees: who descends from whom, over how many generations, and who was sequenced.

A ``Pedigree`` is a forest written as a table, one row per individual: its name, its parent, and the length
of the edge between the two in generations. Two formats are read: one table (``from_table``), and the node
and edge lists of AlphaBeta (``from_alphabeta``).

References:
    Shahryary et al. 2020, Genome Biology 21, 260, doi:10.1186/s13059-020-02161-6 (node and edge lists;
    the times of a pair of samples).
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scivi.errors import DataError, listed

if TYPE_CHECKING:
    import pandas

    # A table: in memory, as columns by name, or the path of a text file.
    Table = pandas.DataFrame | Mapping[str, Sequence[Any]] | str | os.PathLike[str]

FIELDS = ("nodes", "parents", "generations", "samples")
GEN, METH = ("gen", "Branchpoint_date"), ("meth", "WGBS")  # AlphaBeta's own node lists use either name
YES = {"true", "1", "1.0", "y", "yes"}
NO = {"false", "0", "0.0", "n", "no"}


@dataclass(frozen=True, slots=True)
class Pedigree:
    """Individuals, their parents, and those with reads. Making one never fails: ask ``faults``.

    Args:
        nodes: names of the individuals, unique; at least one.
        parents: name of the parent of each, "" for a founder. There may be several founders.
        generations: length of the edge from the parent of each, in generations, whole, >= 0; 0 for a founder.
        samples: the nodes with reads, in the order of the data's columns.

    Example:
        >>> mutants = Pedigree(("founder", "line 1", "line 2"), ("", "founder", "founder"), (0, 30, 31),
        ...                    samples=("line 1", "line 2"))
        >>> mutants.faults()
        []
        >>> mutants.pair_times()
        array([[ 0., 30., 31.]])
    """

    nodes: tuple[str, ...]
    parents: tuple[str, ...]
    generations: tuple[int, ...]
    samples: tuple[str, ...]

    @classmethod
    def from_table(
        cls, table: Table, samples: Sequence[str] | None = None, *, check: bool = True
    ) -> Pedigree:
        """Read a table with a row per individual.

        Args:
            table: a DataFrame, columns by name, or the path of a text file. Columns ``node``; ``parent``,
                empty for a founder; ``edge_generations``, or else ``generation`` of the node, from which the
                edges are differences; ``observed``, whether the node has reads.
            samples: the nodes with reads, in the order of the data's columns; from ``observed`` if None.
            check: refuse a pedigree with faults; False leaves them to ``faults``.

        Raises:
            DataError: columns are missing, entries cannot be read, or the pedigree has faults.
        """
        columns = _read(table)
        dated = "edge_generations" if "edge_generations" in columns else "generation"
        needed = ["node", "parent", dated] + ["observed"] * (samples is None)
        _need({"pedigree": (columns, needed)}, {"generation": "edge_generations (or generation)"})
        nodes, parents = columns["node"], columns["parent"]
        edges: list[Any] = _numbers(columns[dated], dated)
        if dated == "generation":
            edges = _differences(nodes, parents, edges)
        # A founder has no edge: some tables leave its length empty.
        edges = [0 if n is None and not above else n for n, above in zip(edges, parents, strict=True)]
        if samples is None:
            samples = _flagged(nodes, columns["observed"], "observed")
        return _checked(cls(tuple(nodes), tuple(parents), tuple(edges), tuple(map(str, samples))), check)

    @classmethod
    def from_alphabeta(
        cls, nodelist: Table, edgelist: Table, samples: Sequence[str] | None = None, *, check: bool = True
    ) -> Pedigree:
        """Read the two lists of AlphaBeta.

        The length of an edge is the difference of its nodes' ``gen``. The edge list's ``gendiff`` is not
        always that: in AlphaBeta's own MA1_1 files it reads 1 where generation 2 descends from generation 0.
        AlphaBeta takes its times from the node list; so do we, and warn of every edge that says otherwise.

        Args:
            nodelist: columns ``node``; ``gen``, or ``Branchpoint_date`` of a tree; ``meth``, or ``WGBS``, Y
                where the node has reads. A path is of a text file with tabs, commas or blanks.
            edgelist: columns ``from``, ``to``, and ``gendiff`` if given.
            samples: the nodes with reads, in the order of the data's columns; from ``meth`` if None.
            check: refuse a pedigree with faults; False leaves them to ``faults``.

        Raises:
            DataError: columns are missing, entries cannot be read, edges do not make a pedigree of the nodes,
                or the pedigree has faults.
        """
        listing, edges = _read(nodelist), _read(edgelist)
        gen, meth = (next((name for name in names if name in listing), names[0]) for names in (GEN, METH))
        needed = ["node", gen] + [meth] * (samples is None)
        _need({"node list": (listing, needed), "edge list": (edges, ["from", "to"])}, {})
        nodes = listing["node"]
        arrows = list(zip(edges["from"], edges["to"], strict=True))
        known, n_parents = set(nodes), Counter(child for _, child in arrows)
        faults = [f'edge "{a}" to "{b}": "{b}" is not in the node list' for a, b in arrows if b not in known]
        faults += [
            f'node "{node}" has {n} parents: ' + ", ".join(f'"{a}"' for a, b in arrows if b == node)
            for node, n in n_parents.items()
            if n > 1
        ]
        if faults:
            raise DataError(listed("The edge list does not fit the node list:", faults))
        parent = {child: above for above, child in arrows}
        parents = [parent.get(node, "") for node in nodes]
        lengths = _differences(nodes, parents, _numbers(listing[gen], gen))
        if "gendiff" in edges:
            _warn_of_gendiff(dict(zip(nodes, lengths, strict=True)), arrows, edges["gendiff"])
        if samples is None:
            samples = _flagged(nodes, listing[meth], meth)
        return _checked(cls(tuple(nodes), tuple(parents), tuple(lengths), tuple(map(str, samples))), check)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Sequence[Any]]) -> Pedigree:
        """The pedigree that ``to_dict`` wrote."""
        return cls(*(tuple(fields[name]) for name in FIELDS))

    def to_dict(self) -> dict[str, list[Any]]:
        """The four fields as lists, fit for JSON."""
        return {name: list(getattr(self, name)) for name in FIELDS}

    def faults(self) -> list[str]:
        """Everything that is wrong, a sentence each; empty for a sound pedigree."""
        if not self.nodes:
            return ["the pedigree has no nodes"]
        faults = []
        lengths = {name: len(getattr(self, name)) for name in FIELDS[:3]}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{n} {name}" for name, n in lengths.items())
            faults.append(f"there are {counts}; one of each per node is needed")
        faults += [
            f'node "{node}" is listed {n} times; names are unique' for node, n in _repeated(self.nodes)
        ]
        if "" in self.nodes:
            faults.append('a node has the empty name, which stands for "no parent"; name it')
        known = set(self.nodes)
        faults += [
            f'node "{node}" has the parent "{parent}", which is no node; add it or correct it'
            for node, parent in zip(self.nodes, self.parents, strict=False)
            if parent and parent not in known
        ]
        faults += self._cycles()
        for node, parent, edge in zip(self.nodes, self.parents, self.generations, strict=False):
            faults += _edge_faults(node, parent, edge)
        if not self.samples:
            faults.append("no node has reads: samples is empty")
        faults += [
            f'sample "{s}" is no node of the pedigree' for s in dict.fromkeys(self.samples) if s not in known
        ]
        faults += [f'sample "{s}" is listed {n} times' for s, n in _repeated(self.samples)]
        return faults

    def ordered(self) -> Pedigree:
        """The same pedigree with every parent before its children.

        Raises:
            DataError: the pedigree has faults.
        """
        _checked(self, True)
        parent = dict(zip(self.nodes, self.parents, strict=True))
        edge = dict(zip(self.nodes, self.generations, strict=True))
        order: dict[str, None] = {}
        for node in self.nodes:
            chain = []
            while node and node not in order:
                chain.append(node)
                node = parent[node]
            order.update(dict.fromkeys(reversed(chain)))
        return Pedigree(
            tuple(order), tuple(parent[n] for n in order), tuple(edge[n] for n in order), self.samples
        )

    def collapsed(self) -> Pedigree:
        """The smallest pedigree with the same distribution of the samples, parents before children.

        Nodes without reads leave it if they have no descendants with reads, or a single child, whose edge
        then takes in theirs. Founders of samples stay: the distribution of the founder is set at that node,
        and does not hold some generations later.

        Raises:
            DataError: the pedigree has faults.
        """
        whole = self.ordered()
        parent = dict(zip(whole.nodes, whole.parents, strict=True))
        edge = dict(zip(whole.nodes, whole.generations, strict=True))
        sampled, n_children = set(self.samples), Counter[str]()
        for node in reversed(whole.nodes):
            if node in sampled or n_children[node]:
                n_children[parent[node]] += 1
        kept = {
            node: None
            for node in whole.nodes
            if node in sampled or n_children[node] > 1 or (n_children[node] and not parent[node])
        }
        parents, edges = [], []
        for node in kept:
            above, length = parent[node], edge[node]
            while above and above not in kept:
                above, length = parent[above], length + edge[above]
            parents.append(above)
            edges.append(length)
        return Pedigree(tuple(kept), tuple(parents), tuple(edges), self.samples)

    def times(self) -> dict[str, int]:
        """Generations from its founder to each node, parents before children.

        Raises:
            DataError: the pedigree has faults.
        """
        whole, times = self.ordered(), {"": 0}
        for node, parent, edge in zip(whole.nodes, whole.parents, whole.generations, strict=True):
            times[node] = times[parent] + edge
        del times[""]
        return times

    def pair_times(self) -> np.ndarray:
        """Times of every pair of samples: AlphaBeta's time0, time1 and time2.

        Returns:
            Generations from the founder to the most recent common ancestor, to the first and to the second of
            the pair, dims (pair, 3); the pairs (0, 1), (0, 2), ..., (1, 2), ... of ``samples``. A sample that
            is an ancestor of the other is the common ancestor.

        Raises:
            DataError: the pedigree has faults, or two samples have no common ancestor.
        """
        times, parent = self.times(), dict(zip(self.nodes, self.parents, strict=True))
        lines: dict[str, dict[str, None]] = {}  # of each sample: itself, its parent, ... up to the founder
        for sample in self.samples:
            node, lines[sample] = sample, {}
            while node:
                lines[sample][node] = None
                node = parent[node]
        rows, strangers = [], []
        for i, a in enumerate(self.samples):
            for b in self.samples[i + 1 :]:
                common = next((node for node in lines[a] if node in lines[b]), None)
                if common is None:
                    strangers.append(f'"{a}" and "{b}"')
                else:
                    rows.append((times[common], times[a], times[b]))
        if strangers:
            title = "Samples without a common ancestor have no times as a pair; split them by founder:"
            raise DataError(listed(title, strangers))
        return np.array(rows, dtype=np.float64).reshape(-1, 3)

    def _cycles(self) -> list[str]:
        parent = dict(zip(self.nodes, self.parents, strict=False))
        faults, done = [], set()
        for node in parent:
            path: dict[str, None] = {}
            while node in parent and node not in done and node not in path:
                path[node] = None
                node = parent[node]
            if node in path:
                cycle = list(path)[list(path).index(node) :]
                names = " -> ".join(f'"{name}"' for name in [node, *reversed(cycle)])
                faults.append(f"nodes descend from themselves: {names}; one of these edges is wrong")
            done.update(path)
        return faults


def _repeated(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, n) for name, n in Counter(names).items() if n > 1]


def _edge_faults(node: str, parent: str, edge: Any) -> list[str]:
    number = isinstance(edge, int | np.integer | float) and not isinstance(edge, bool)
    if not number or not float(edge).is_integer():
        return [f'the edge above node "{node}" is {edge} generations long; a whole number is needed']
    if not parent:
        return [f'founder "{node}" has an edge of {edge} generations; set it to 0'] * (edge != 0)
    if edge < 0:
        return [
            f'node "{node}" is dated before its parent "{parent}" ({edge} generations); correct one of them'
        ]
    return []


def _checked(pedigree: Pedigree, check: bool) -> Pedigree:
    if check and (faults := pedigree.faults()):
        raise DataError(listed("The pedigree has faults:", faults))
    return pedigree


def _read(table: Table) -> dict[str, list[str]]:
    """Columns as text without outer blanks; a missing entry is "". So a node "NA" or "007" keeps its name."""
    import pandas

    if isinstance(table, str | os.PathLike):
        with open(table, encoding="utf-8-sig") as file:
            header = file.readline()
        separator = next((mark for mark in ("\t", ",") if mark in header), r"\s+")
        table = pandas.read_csv(
            table, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False
        )
    frame = pandas.DataFrame(table)
    return {str(name).strip(): [_text(value) for value in frame[name]] for name in frame.columns}


def _text(value: Any) -> str:
    if value is None or value != value:  # not a number, or pandas' missing values
        return ""
    if isinstance(value, float) and value.is_integer():  # whole numbers beside a missing one become floats
        return str(int(value))
    return str(value).strip()


def _need(tables: Mapping[str, tuple[Mapping[str, Any], Sequence[str]]], say: Mapping[str, str]) -> None:
    faults = [
        f'the {title} has no column "{say.get(name, name)}"; it has ' + ", ".join(f'"{c}"' for c in columns)
        for title, (columns, needed) in tables.items()
        for name in needed
        if name not in columns
    ]
    if faults:
        raise DataError(listed("Columns are missing:", faults))


def _numbers(texts: Sequence[str], name: str) -> list[Any]:
    """Numbers, whole ones as int; None for an empty entry. Fractions are left for ``faults`` to name."""
    numbers, faults = [], []
    for row, text in enumerate(texts):
        try:
            number = float(text) if text else None
        except ValueError:
            faults.append(f'row {row} has {name} "{text}"; a number is needed')
            continue
        numbers.append(int(number) if number is not None and number.is_integer() else number)
    if faults:
        raise DataError(listed("Entries cannot be read:", faults))
    return numbers


def _flagged(nodes: Sequence[str], texts: Sequence[str], name: str) -> list[str]:
    wrong = [
        f'row {row} has {name} "{text}"; true or false is needed'
        for row, text in enumerate(texts)
        if text.lower() not in YES | NO
    ]
    if wrong:
        raise DataError(listed("Entries cannot be read:", wrong))
    return [node for node, text in zip(nodes, texts, strict=True) if text.lower() in YES]


def _differences(nodes: Sequence[str], parents: Sequence[str], dates: Sequence[Any]) -> list[Any]:
    """Edge lengths from the generations of the nodes; 0 for founders, and below a parent that is no node."""
    date = dict(zip(nodes, dates, strict=True))
    undated = [f'node "{node}" has no generation' for node, when in date.items() if when is None]
    if undated:
        raise DataError(listed("Entries cannot be read:", undated))
    return [
        date[node] - date[above] if above in date else 0 for node, above in zip(nodes, parents, strict=True)
    ]


def _warn_of_gendiff(
    lengths: Mapping[str, Any], arrows: Sequence[tuple[str, str]], gendiff: Sequence[str]
) -> None:
    told = _numbers(gendiff, "gendiff")
    wrong = [
        f'"{above}" to "{child}": gendiff {says}, difference of generations {lengths[child]}'
        for (above, child), says in zip(arrows, told, strict=True)
        if says is not None and says != lengths[child]
    ]
    if wrong:
        title = f"{len(wrong)} of {len(arrows)} edges: gendiff is not the difference of gen, which is used:"
        warnings.warn(listed(title, wrong), stacklevel=3)
