"""Of a CITE-seq result: expression without noise, what differs between groups of cells, labels passed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from domains.genomics.citeseq import form_of
from domains.genomics.panels import Form
from scivi.analysis.figures import BLUE, MIDDLE, Panels
from scivi.errors import DataError

if TYPE_CHECKING:
    from scivi.analysis.figures import Where

_PAIRS_AT_ONCE = 256  # pairs of cells whose genes are held at once (our choice: a few tens of MB)
_LEAST_FRACTION = 1e-5  # added to a gene's share before logs (our choice: a tenth of a count in ten thousand)
_LEAST_COUNT = 0.1  # added to a protein's level, likewise


def expression(
    result: xr.DataTree, fit: Any, genes: Sequence[str] | None = None, *, batch: str | None = None
) -> xr.DataArray:
    """Each gene's share of a cell's RNA, free of the noise of counting.

    Args:
        result: from ``draw`` or ``predict`` on the cells.
        fit: with which the result was drawn.
        genes: names of the genes wanted; all if None, which takes cells x genes x 4 bytes.
        batch: as if all cells were of this batch; None leaves each in its own.

    Returns:
        (cell, gene), the mean over draws. ``1e4 *`` it is the usual counts per ten thousand.

    Raises:
        DataError: a gene or a batch that the fit does not know.
    """
    nets, form = fit.nets.own, form_of(fit.template)
    names = [str(g) for g in fit.coords["gene"]]
    wanted = names if genes is None else [str(g) for g in genes]
    if absent := [g for g in wanted if g not in names]:
        raise DataError(f"the fit has no gene {', '.join(absent[:10])}.")
    at = torch.tensor([names.index(g) for g in wanted])
    z = _draws(result, "z")
    place = _places(result, form, batch)
    found = np.empty((z.shape[1], len(wanted)), np.float32)
    with torch.no_grad():
        for start in range(0, z.shape[1], step := max(1, 4 * _PAIRS_AT_ONCE // len(z))):
            cells = slice(start, start + step)
            fractions = nets.fractions(torch.as_tensor(z[:, cells]), place[cells])
            found[cells] = fractions[..., at].mean(0).numpy()
    coords = {"cell": result["posterior"]["cell"].values, "gene": wanted}
    return xr.DataArray(found, coords, ("cell", "gene"), "expression", {"units": "1 / cell"})


def expected_counts(result: xr.DataTree) -> xr.DataArray:
    """Protein counts that are expected of each cell, background and foreground: what imputes a missing count.

    "denoised" leaves the background out, which orders the cells that do not carry the protein.

    Args:
        result: from ``draw`` or ``predict`` on the cells.

    Returns:
        (cell, protein), the mean over draws, without the batch's efficiency.
    """
    posterior = result["posterior"]
    background = (1 - posterior["foreground"]) * np.exp(posterior["log_background"])
    found = (posterior["denoised"] + background).mean(("chain", "draw")).transpose("cell", "protein")
    return found.rename("expected_counts").assign_attrs(units="count")


def differential_genes(
    result: xr.DataTree,
    fit: Any,
    first: np.ndarray,
    second: np.ndarray,
    *,
    least: float = 0.25,
    fdr: float = 0.05,
    pairs: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Genes whose share of the RNA differs between two groups of cells.

    A pair takes a cell of each group, and a draw of the posterior: its log2 ratio is a draw of the fold
    change between a cell of the one and a cell of the other.

    Args:
        result: from ``draw`` or ``predict`` on the cells.
        fit: with which the result was drawn.
        first: True for the cells of the one group, (cell,).
        second: True for those of the other.
        least: a log2 fold change that is as good as none.
        fdr: share of those called that may be none.
        pairs: drawn.
        seed: of the pairs.

    Returns:
        By gene ``log2_fold`` (mean over pairs, first over second), ``log2_fold_sd``, ``prob_different``, the
        share of pairs beyond ``least``, and ``called``, True for the largest set whose mean probability of
        being no more than ``least`` apart is at most ``fdr``.

    Notes:
        It speaks of cells, not of people: pairs are no replicates. Of the decoder one set of weights is
        known, so what its own uncertainty adds is left out.

    References:
        Boyeau et al. 2023, PNAS 120, e2209124120, doi:10.1073/pnas.2209124120.
    """
    form, nets = form_of(fit.template), fit.nets.own
    z = _draws(result, "z")
    places = _places(result, form, None)
    rng, moments = np.random.default_rng(seed), _Moments(least)
    groups = [_members(group, z.shape[1]) for group in (first, second)]
    for start in range(0, pairs, _PAIRS_AT_ONCE):
        n = min(_PAIRS_AT_ONCE, pairs - start)
        draw, logs = rng.integers(0, len(z), n), []
        for group in groups:
            cell = rng.choice(group, n)
            with torch.no_grad():
                fractions = nets.fractions(torch.as_tensor(z[draw, cell]), places[cell])
            logs.append(np.log2(fractions.numpy() + _LEAST_FRACTION))
        moments.add(logs[0] - logs[1])
    return moments.told({"gene": np.asarray(fit.coords["gene"])}, fdr)


def differential_proteins(
    result: xr.DataTree,
    first: np.ndarray,
    second: np.ndarray,
    *,
    least: float = 0.25,
    fdr: float = 0.05,
    pairs: int = 2000,
    seed: int = 0,
) -> xr.Dataset:
    """Proteins whose foreground differs between two groups of cells.

    Arguments, and what comes back by protein, are as ``differential_genes`` has them.
    """
    level = _draws(result, "denoised")
    rng, moments = np.random.default_rng(seed), _Moments(least)
    draw = rng.integers(0, len(level), pairs)
    cells = [rng.choice(_members(group, level.shape[1]), pairs) for group in (first, second)]
    one, other = (np.log2(level[draw, cell] + _LEAST_COUNT) for cell in cells)
    moments.add(one - other)
    return moments.told({"protein": result["posterior"].to_dataset()["protein"].values}, fdr)


class _Moments:
    """Sums over pairs of cells, and what they say."""

    def __init__(self, least: float) -> None:
        self.least, self.n = least, 0
        self.total: Any = 0.0
        self.squares: Any = 0.0
        self.beyond: Any = 0.0

    def add(self, change: np.ndarray) -> None:
        """Take in log2 fold changes (pair, feature)."""
        self.n += len(change)
        self.total = self.total + change.sum(0, dtype=float)
        self.squares = self.squares + np.square(change, dtype=float).sum(0)
        self.beyond = self.beyond + (np.abs(change) > self.least).sum(0)

    def told(self, labels: dict[str, np.ndarray], fdr: float) -> xr.Dataset:
        """The features, those that differ most surely first."""
        mean, prob = self.total / self.n, self.beyond / self.n
        sd = np.sqrt(np.maximum(self.squares / self.n - mean**2, 0.0))
        order = np.lexsort((-np.abs(mean), -prob))
        wrong = np.cumsum(1 - prob[order]) / np.arange(1, len(order) + 1)
        called = np.zeros(len(order), bool)
        called[order[: int((wrong <= fdr).sum())]] = True  # the mean of a rising sequence rises
        columns = {"log2_fold": mean, "log2_fold_sd": sd, "prob_different": prob, "called": called}
        dim = next(iter(labels))
        found = xr.Dataset({name: (dim, values) for name, values in columns.items()}, labels)
        return found.isel({dim: order})


def transfer(
    reference: xr.DataTree, labels: Sequence[Any], query: xr.DataTree, *, neighbours: int = 15
) -> xr.Dataset:
    """Labels of reference cells passed on to query cells that lie among them.

    Args:
        reference: drawn for the labelled cells.
        labels: of them, in order.
        query: drawn with the same fit, or one mapped onto it.
        neighbours: nearest reference cells, in the mean states, that vote.

    Returns:
        ``label`` (cell,), and ``share`` (cell,), that of the votes for it.
    """
    from scipy.spatial import KDTree

    one, other = (_mean_state(tree) for tree in (reference, query))
    names, codes = np.unique(np.asarray(labels, str), return_inverse=True)
    if len(codes) != len(one):
        raise DataError(f"{len(codes)} labels were given for {len(one)} reference cells.")
    _, near = KDTree(one).query(other, k=min(neighbours, len(one)))
    votes = np.stack([(codes[near] == k).mean(-1) for k in range(len(names))], -1)
    columns = {"label": ("cell", names[votes.argmax(-1)]), "share": ("cell", votes.max(-1))}
    return xr.Dataset(columns, {"cell": query["posterior"]["cell"].values})


def plot_foreground(result: xr.DataTree, proteins: Sequence[str], *, ax: Where = None) -> Any:
    """Counts of proteins over cells, each cell's split by the chance that its protein is foreground.

    Args:
        result: from ``draw`` or ``predict``.
        proteins: names; a panel for each.
        ax: so many of matplotlib's Axes; those of a new figure if None.

    Returns:
        The Axes, or an array of them; x is log10(1 + count).

    Raises:
        DataError: a protein is not in the result.
    """
    present = result["posterior"].to_dataset()["foreground"].mean(("chain", "draw"))
    counts = result["observed_data"].to_dataset()["adt"]
    known = [str(name) for name in present["protein"].values]
    if absent := sorted({*proteins} - {*known}):
        raise DataError(f"the result has no protein {', '.join(absent)}; it has {', '.join(known)}.")
    panels = Panels(ax, len(proteins), (2.8 * len(proteins), 2.6))
    for panel, name in zip(panels.each, proteins, strict=True):
        y = counts.isel(protein=known.index(name)).values
        seen, chance = np.isfinite(y), present.isel(protein=known.index(name)).values
        x, p = np.log10(1 + y[seen]), chance[seen]
        kinds = {"background": (MIDDLE, 1 - p), "foreground": (BLUE, p)}
        colours, weights = zip(*kinds.values(), strict=True)
        panel.hist([x, x], 40, weights=weights, stacked=True, color=colours, label=list(kinds))
        panel.set(title=name, xlabel="log10(1 + count)")
    panels.each[0].set_ylabel("cells")
    panels.each[0].legend(frameon=False, fontsize=8)
    return panels.told


def annotated(adata: Any, result: xr.DataTree) -> Any:
    """A copy of an AnnData with what was found about its cells; the original stays as it is.

    Args:
        adata: with the cells of the result, in order.
        result: from ``draw`` or ``predict``.

    Returns:
        AnnData with obsm "scivi_z" (mean state), and as data frames "scivi_foreground" (probability),
        "scivi_denoised" and "scivi_background" (counts; of the latter the median); obs "scivi_outside".
    """
    import pandas as pd

    posterior = result["posterior"].to_dataset()
    if list(map(str, adata.obs_names)) != list(map(str, posterior["cell"].values)):
        raise DataError("the cells of the AnnData are not those of the result, or not in its order.")
    found, mean = adata.copy(), posterior.mean(("chain", "draw"))
    found.obsm["scivi_z"] = _mean_state(result)
    background = np.exp(posterior["log_background"].median(("chain", "draw")))
    tables = {"foreground": mean["foreground"], "denoised": mean["denoised"], "background": background}
    for name, table in tables.items():
        values = table.transpose("cell", "protein").values
        found.obsm[f"scivi_{name}"] = pd.DataFrame(
            values, index=found.obs_names, columns=posterior["protein"].values
        )
    found.obs["scivi_outside"] = result["sample_stats"].to_dataset()["outside"].values
    return found


def _draws(result: xr.DataTree, name: str) -> np.ndarray:
    """Draws of all chains, (sample, cell, latent or protein)."""
    stacked = result["posterior"].to_dataset()[name].stack(sample_=("chain", "draw"))
    return stacked.transpose("sample_", "cell", ...).values


def _mean_state(result: xr.DataTree) -> np.ndarray:
    return result["posterior"].to_dataset()["z"].mean(("chain", "draw")).transpose("cell", "latent").values


def _places(result: xr.DataTree, form: Form, batch: str | None) -> torch.Tensor:
    """The batch of each cell, as a place among the batches of the fit."""
    own = result["constant_data"].to_dataset()["batch"].values
    if batch is None:
        return torch.as_tensor(own.astype(np.int64))
    if batch not in form.panel.batches:
        raise DataError(f'the fit has no batch "{batch}"; it has {", ".join(form.panel.batches)}.')
    return torch.full((len(own),), form.panel.batches.index(batch))


def _members(group: np.ndarray, n_cells: int) -> np.ndarray:
    group = np.asarray(group)
    if group.shape != (n_cells,) or group.dtype != bool or not group.any():
        raise DataError(f"a group of cells is an array of {n_cells} booleans, True for at least one.")
    return np.flatnonzero(group)
