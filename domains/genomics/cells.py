"""AnnData and MuData of CITE-seq as the table that ``citeseq`` reads, and the levels to begin at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domains.genomics.panels import Panel, Prior
from scivi.errors import DataError, listed, missing_extra

_CELLS = 20_000  # from which the modes of proteins are taken (our choice: a percent of a mode's sd)
_ROWS = 4096  # of RNA on disk that are read at a time (our choice)
_LEAST_SHARE = 0.02  # of a mode to begin at (our choice)


@dataclass(frozen=True)
class Counts:
    """Counts of some droplets, in the user's own matrices wherever these can be read as they are.

    Args:
        adt: protein counts (cell, protein), NaN where missing.
        proteins: their names.
        cells: names of the droplets.
        batch: the batch of each as text.
        rna: RNA counts (cell, gene), dense, sparse, or sparse on disk; None if there are none.
        genes: their names.
    """

    adt: np.ndarray
    proteins: tuple[str, ...]
    cells: np.ndarray
    batch: np.ndarray
    rna: Any = None
    genes: tuple[str, ...] = ()


def counts(
    data: Any,
    *,
    protein: str = "protein_expression",
    rna: str | None = "X",
    batch: str | None = None,
    missing: float | None = None,
) -> Counts:
    """Read protein and RNA counts out of an AnnData or MuData, which stays as it is.

    Args:
        data: AnnData, in memory or backed; MuData; or the path of a .h5ad or .h5mu.
        protein: where the proteins are: a key of obsm, "X", or "layers/..."; of a MuData the modality.
        rna: where the RNA is: "X" or "layers/..."; of a MuData the modality. None if there is none.
        batch: a column of obs that says of which batch a cell is.
        missing: an entry that stands for "not measured", such as -1; NaN always does. A column of zeros is
            never taken for missing.

    Raises:
        DataError: listing all that is not there.
    """
    opened = _opened(data)
    faults: list[str] = []
    modalities, places = getattr(opened, "mod", None), [protein, *([rna] if rna is not None else [])]
    if len(set(places)) < len(places):
        faults.append(f'protein and rna are both "{rna}"; give rna=None if there are proteins alone')
    if modalities is not None:
        absent = [name for name in places if name not in modalities]
        faults += [f'there is no modality "{n}"; there are {", ".join(modalities)}' for n in absent]
        parts = [modalities[name] for name in places if name not in absent]
        if any(list(each.obs_names) != list(opened.obs_names) for each in parts):
            faults.append(
                "the modalities hold different cells; take mdata[mdata.obs_names.intersection(...)]"
            )
        found: list[tuple[Any, Sequence[str]]] = [(each.X, each.var_names) for each in parts]
    else:
        parts = []
        found = [_matrix(opened, p, faults, w) for p, w in zip(places, ("protein", "rna"), strict=False)]
    frame = next((f.obs for f in (opened, *parts) if batch in f.obs), opened.obs)
    if batch is not None and batch not in frame:
        faults.append(f'obs has no column "{batch}"; it has {", ".join(map(str, frame.columns))}')
    elif batch is not None and frame[batch].isna().any():
        faults.append(f'obs "{batch}" is missing for {int(frame[batch].isna().sum())} of {len(frame)} cells')
    if faults:
        raise DataError(listed("the counts cannot be read:", dict.fromkeys(faults)))
    (adt, names), (matrix, gene_names) = [*found, (None, ())][:2]
    dense = np.asarray(adt.toarray() if hasattr(adt, "toarray") else adt, dtype=np.float32).copy()
    if missing is not None:
        dense[dense == missing] = np.nan
    words = np.asarray(frame[batch].astype(str)) if batch is not None else np.full(len(dense), "1")
    cells = np.asarray(opened.obs_names, dtype=str)
    return Counts(dense, tuple(map(str, names)), cells, words, matrix, tuple(map(str, gene_names)))


def _opened(data: Any) -> Any:
    if not isinstance(data, str) and not hasattr(data, "__fspath__"):
        if not (hasattr(data, "obs_names") and (hasattr(data, "mod") or hasattr(data, "obsm"))):
            raise DataError(f"counts are read from an AnnData or a MuData, not a {type(data).__name__}.")
        return data
    if str(data).endswith(".h5mu"):
        try:
            import mudata
        except ImportError:
            raise missing_extra("mudata", "cells") from None
        with warnings.catch_warnings():  # of what will change in mudata 0.4
            warnings.simplefilter("ignore", FutureWarning)
            return mudata.read_h5mu(data)
    import anndata

    try:
        return anndata.read_h5ad(data, backed="r")
    except OSError as error:
        raise DataError(f'"{data}" cannot be read as .h5ad: {error}') from None


def _matrix(adata: Any, place: str, faults: list[str], what: str) -> tuple[Any, Sequence[str]]:
    """A matrix of an AnnData and the names of its columns."""
    if place == "X":
        if adata.X is None:
            faults.append(f"{what}: there is no X")
        return adata.X, adata.var_names
    if place.startswith("layers/"):
        key = place.removeprefix("layers/")
        if key in adata.layers:
            return adata.layers[key], adata.var_names
        faults.append(
            f'{what}: there is no layer "{key}"; the layers are {", ".join(adata.layers) or "none"}'
        )
        return np.zeros((0, 0)), ()
    if place not in adata.obsm:
        faults.append(f'{what}: obsm has no "{place}"; it has {", ".join(adata.obsm) or "nothing"}')
        return np.zeros((0, 0)), ()
    found = adata.obsm[place]
    names = getattr(found, "columns", None)
    if names is None:
        names = adata.uns.get("protein_names", [f"protein {k}" for k in range(found.shape[1])])
    return found.to_numpy() if hasattr(found, "to_numpy") else found, list(names)


def table(
    found: Counts, panel: Panel, empties: Counts | None = None, *, genes: Sequence[str] = ()
) -> dict[str, Any]:
    """The table that a template of a panel reads.

    Args:
        found: of the cells. Proteins of the panel that they lack are missing; others are left out.
        panel: of the template.
        empties: of empty droplets. A template that knows some and is given none gets one droplet of which
            nothing was counted.
        genes: names of the template's genes, in order, if those of the cells may be others; a gene that the
            cells lack counts as 0, which is told by a warning.
    """
    columns: dict[str, Any] = {
        "cell": (("cell",), found.cells),
        "protein": (("protein",), np.array(panel.proteins)),
        "adt": (("cell", "protein"), _aligned(found, panel.proteins)),
        "batch": (("cell",), found.batch),
    }
    if panel.log_fractions:
        if found.rna is None:
            raise DataError("the template reads RNA, and these cells have none. Say where it is: rna=...")
        names = tuple(genes) or found.genes
        rna = found.rna if names == found.genes else _taken(found, names)
        columns |= {"rna": (("cell", "gene"), rna), "gene": (("gene",), np.array(names))}
    if panel.has_empties:
        adt, batch = np.full((1, len(panel.proteins)), np.nan), np.array(panel.batches[:1])
        if empties is not None:
            adt, batch = _aligned(empties, panel.proteins), empties.batch
        columns |= {"empty_adt": (("droplet", "protein"), adt), "empty_batch": (("droplet",), batch)}
    return columns


def _aligned(found: Counts, proteins: Sequence[str]) -> np.ndarray:
    """Counts of these proteins in this order, NaN where the droplets lack one."""
    place = {name: k for k, name in enumerate(found.proteins)}
    if not set(place) & set(proteins):
        raise DataError(
            f"none of the proteins {', '.join(found.proteins[:10])} is one of the panel's: "
            f"{', '.join(proteins[:10])}."
        )
    gap = np.full(len(found.adt), np.nan, np.float32)
    return np.stack([found.adt[:, place[p]] if p in place else gap for p in proteins], 1)


def _taken(found: Counts, genes: Sequence[str]) -> Any:
    """RNA counts of the genes named, 0 where the cells lack one."""
    from scipy.sparse import csr_array

    place = {name: k for k, name in enumerate(found.genes)}
    lacking = [name for name in genes if name not in place]
    if len(lacking) == len(genes):
        raise DataError(f"none of the genes {', '.join(found.genes[:5])} ... is one of the template's.")
    if lacking:
        warnings.warn(
            f"{len(lacking)} of {len(genes)} genes are not in these cells and count as 0: {lacking[0]}, ...",
            stacklevel=3,
        )
    columns = [k for k, name in enumerate(genes) if name in place]
    rows = [place[genes[k]] for k in columns]
    turn = csr_array((np.ones(len(rows), np.float32), (rows, columns)), (len(found.genes), len(genes)))
    return csr_array(csr_array(found.rna[:]) @ turn)


def panel(found: Counts, empties: Counts | None = None, *, isotypes: Sequence[str] = ()) -> Panel:
    """The panel of an experiment, its levels read off the counts.

    Args:
        found: of the cells.
        empties: of empty droplets, whose mean counts are then the level of the ambient; without them it is
            the low mode of the cells.
        isotypes: names of the isotype controls.
    """
    batches = tuple(sorted({*found.batch} | ({*empties.batch} if empties is not None else set())))
    low, high, share = np.array([_modes(column) for column in found.adt.T]).T
    ambient = np.empty((len(batches), len(found.proteins)))
    for k, name in enumerate(batches):
        ambient[k] = low if empties is None else low - Prior().kappa  # cells see less than empties
        if empties is not None and (empties.batch == name).any():
            counted = _aligned(empties, found.proteins)[empties.batch == name]
            told = np.isfinite(counted).any(0)
            ambient[k, told] = np.log(_means(counted[:, told]) + 0.1)
        elif empties is None and len(batches) > 1:
            own = found.adt[found.batch == name]
            ambient[k] = [
                _modes(column)[0] if np.isfinite(column).any() else low[t] for t, column in enumerate(own.T)
            ]
    fractions = () if found.rna is None else tuple(_log_fractions(found.rna).round(4).tolist())
    return Panel(
        proteins=found.proteins,
        batches=tuple(map(str, batches)),
        log_ambient=tuple(tuple(row) for row in ambient.round(4).tolist()),
        log_fold=tuple((high - low).round(4).tolist()),
        share=tuple(share.round(4).tolist()),
        log_fractions=fractions,
        isotypes=tuple(isotypes),
        has_empties=empties is not None,
    )


def _means(counted: np.ndarray) -> np.ndarray:
    present = counted >= 0  # neither missing nor, untold, -1
    return np.where(present, counted, 0.0).sum(0) / np.maximum(present.sum(0), 1)


def _modes(column: np.ndarray) -> tuple[float, float, float]:
    """Log counts of the low and the high mode of a protein, and the share of cells in the high one."""
    from scipy.cluster.vq import kmeans2

    present = column[column >= 0]  # neither missing nor, untold, -1: the data's check tells
    logs = np.log1p(present[:: max(1, len(present) // _CELLS)].astype(float))
    if len(np.unique(logs)) < 2:
        level = float(np.log(np.expm1(logs.mean()) + 0.1)) if len(logs) else 0.0
        return level, level + 1.0, _LEAST_SHARE
    start = np.quantile(logs, [[0.1], [0.9]])
    if start[0] == start[1]:  # nearly all are alike
        start = np.array([[logs.min()], [logs.max()]])
    centres, of = kmeans2(logs[:, None], start, minit="matrix", missing="raise")
    low, high = np.log(np.expm1(np.sort(centres.ravel())) + 0.1)
    share = float((of == centres.ravel().argmax()).mean())
    return float(low), float(high), float(np.clip(share, _LEAST_SHARE, 1 - _LEAST_SHARE))


def _log_fractions(rna: Any) -> np.ndarray:
    """Log of each gene's share of all counts; rows on disk are read some at a time."""
    total = np.zeros(rna.shape[1])
    for start in range(0, rna.shape[0], _ROWS):
        total += np.asarray(rna[start : start + _ROWS].sum(0)).ravel()
    total[~(np.isfinite(total) & (total > 0))] = 0.0  # what is no count is told by the data's check
    return np.log((total + 1) / (total + 1).sum())
