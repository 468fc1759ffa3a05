"""Does the model make data like these? Divergence over time, loci and samples that do not fit.

All three compare a statistic of the reads with the same statistic of reads that the fitted model makes
(``predict``), so that thresholds and errors of calling weigh on both sides alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from domains.genomics import alphabeta
from domains.genomics.methylation import form_of, pedigree_of
from scivi.analysis.figures import BLUE, MIDDLE, Panels
from scivi.models import Template

if TYPE_CHECKING:
    from scivi.analysis.figures import Where


def _called(result: xr.DataTree, template: Template, methylated: np.ndarray) -> np.ndarray:
    """States 0, 1, 2 of reads by sample (locus, sample), -1 for none, with the fit's own error rates."""
    if len(form_of(template).states) != 3:
        raise ValueError("divergences are of diploid genotypes; this template is haploid")
    mean = result["posterior"].to_dataset().mean(("chain", "draw"))
    given = result["constant_data"].to_dataset()
    context, total = given["context"].values.astype(int), _counts(result)[1]
    states = np.empty(total.shape, np.int8)
    for c, name in enumerate(mean["context"].values):
        own = context == c
        if own.any():
            proportions = mean["founder"].sel(context=name).values if "founder" in mean else np.full(3, 1 / 3)
            states[own] = alphabeta.calls(
                methylated[own],
                total[own],
                proportions / proportions.sum(),
                false_methylated=float(mean["nonconversion"].mean()),
                false_unmethylated=float(mean["inappropriate"]),
            )
    return states


def _replicates(result: xr.DataTree, draws: int) -> list[np.ndarray]:
    """Methylated reads of evenly spread draws, (locus, sample) each, 0 where nothing was covered."""
    if "posterior_predictive" not in result.children:
        raise ValueError('the result has no "posterior_predictive": make it with scivi.predict, not draw')
    made = result["posterior_predictive"].to_dataset()["methylated"].stack(sample_=("chain", "draw"))
    kept, total = np.unique(np.linspace(0, made.sizes["sample_"] - 1, draws).astype(int)), _counts(result)[1]
    return [np.minimum(made.isel(sample_=k).transpose("locus", "sample").values, total) for k in kept]


def _counts(result: xr.DataTree) -> tuple[np.ndarray, np.ndarray]:
    """Methylated and total reads (locus, sample); a missing count is an uncovered one, as in the fit."""
    read = result["observed_data"].to_dataset()["methylated"].values
    missing = np.isnan(read)
    total = np.where(missing, 0, result["constant_data"].to_dataset()["total"].values)
    return np.where(missing, 0, read), total


def divergence_over_time(result: xr.DataTree, template: Template, *, draws: int = 50) -> xr.Dataset:
    """Divergence of every pair of samples, observed and as the fitted model makes it (AlphaBeta's plot).

    All contexts together; pass ``result.isel(locus=...)`` for those of one.

    Args:
        result: from ``predict``.
        template: from ``methylation.make``, diploid.
        draws: evenly spread posterior predictive draws.

    Returns:
        By pair: ``generations`` that separate the two, ``observed`` divergence, and of the replicates
        ``expected`` and ``interval`` (pair, bound), 5 to 95 %. ``attrs["outside"]`` is the share of pairs
        outside, which share ancestors and so fall out together.
    """
    pedigree = pedigree_of(template)
    seen = alphabeta.divergences(_called(result, template, _counts(result)[0]), pedigree)
    made = np.stack(
        [
            alphabeta.divergences(_called(result, template, reads), pedigree)["divergence"].values
            for reads in _replicates(result, draws)
        ]
    )
    interval = np.quantile(made, [0.05, 0.95], axis=0).T
    observed = seen["divergence"].values
    labels = [f"{a} and {b}" for a, b in zip(seen["first"].values, seen["second"].values, strict=True)]
    between = (seen["time1"] + seen["time2"] - 2 * seen["time0"]).values
    outside = float(((observed < interval[:, 0]) | (observed > interval[:, 1])).mean())
    return xr.Dataset(
        {
            "generations": (("pair",), between, {"units": "generation"}),
            "observed": (("pair",), observed),
            "expected": (("pair",), made.mean(0)),
            "interval": (("pair", "bound"), interval),
        },
        {"pair": labels, "bound": ["lower", "upper"]},
        {"outside": outside},
    )


def plot_divergence(table: xr.Dataset, ax: Where = None) -> Any:
    """Draw ``divergence_over_time``: observed pairs as dots, the model's as bars.

    Args:
        table: from ``divergence_over_time``.
        ax: one of matplotlib's Axes; a new figure's if None.

    Returns:
        The Axes.
    """
    panel = Panels(ax, 1, (6.0, 4.0)).told
    time, (low, high) = table["generations"].values, table["interval"].values.T
    panel.vlines(time, low, high, color="0.75", linewidth=4, label="model, 90 %", zorder=1)
    panel.plot(time, table["expected"], ".", color="0.45", markersize=4, label="model, mean", zorder=2)
    panel.plot(time, table["observed"], "o", color="C0", markersize=4, label="observed", zorder=3)
    panel.set_xlabel("generations between the two samples")
    panel.set_ylabel("divergence per copy")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)
    return panel


def plot_rates(result: xr.DataTree, *, ax: Where = None) -> Any:
    """Mean rates of gain and of loss over the loci of each context, with 90 % intervals, beside their prior.

    Args:
        result: from ``draw``, with group prior.
        ax: two of matplotlib's Axes; those of a new figure if None.

    Returns:
        An array of both Axes.
    """
    panels = Panels(ax, 2, (7.0, 3.0))
    contexts = result["posterior"].to_dataset()["context"].values
    for panel, name in zip(panels.each, ("gain_rate_mean", "loss_rate_mean"), strict=True):
        for group, shift, colour in (("prior", -0.12, MIDDLE), ("posterior", 0.12, BLUE)):
            found = result[group].to_dataset()[name].quantile([0.05, 0.5, 0.95], ("chain", "draw")).values
            at = np.arange(contexts.size) + shift
            panel.vlines(at, found[0], found[2], color=colour)
            panel.plot(at, found[1], "o", ms=4, color=colour, label=group)
        panel.set(yscale="log", title=name.replace("_", " "), xlim=(-0.5, contexts.size - 0.5))
        panel.set_xticks(np.arange(contexts.size), [str(context) for context in contexts])
    panels.each[0].set_ylabel("1 / generation and copy")
    panels.each[0].legend(frameon=False, fontsize=8)
    return panels.told


def misfits(result: xr.DataTree, template: Template, *, draws: int = 100) -> xr.Dataset:
    """Loci and samples whose reads the fitted model would hardly make.

    Args:
        result: from ``predict``.
        template: from ``methylation.make``, diploid.
        draws: evenly spread posterior predictive draws.

    Returns:
        ``locus_p`` (locus,), the share of replicates with at least as many calls that differ from the
        sample's nearest sequenced ancestor or else the first sample; at least 1 / (draws + 1), so that a
        small one asks for more draws. ``sample_z`` (statistic, sample), by how many replicate sd a sample is
        off in its share of methylated reads, of loci called UM, and of calls unlike its ancestor's.

    Notes:
        With n loci about n p of them have a p below p by chance: compare numbers, not single loci.
    """
    pedigree = pedigree_of(template)
    ancestor = _ancestors(pedigree)
    observed, total = _counts(result)

    def statistics(methylated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        states = _called(result, template, methylated)
        called = states >= 0
        both = called & called[:, ancestor]
        differs = both & (states != states[:, ancestor])
        by_sample = np.stack(
            [
                methylated.sum(0) / np.maximum(total.sum(0), 1),
                (states == 1).sum(0) / np.maximum(called.sum(0), 1),
                differs.sum(0) / np.maximum(both.sum(0), 1),
            ]
        )
        return differs.sum(1), by_sample

    changes, by_sample = statistics(observed)
    made = [statistics(reads) for reads in _replicates(result, draws)]
    as_many = np.sum([c >= changes for c, _ in made], 0)
    replicas = np.stack([s for _, s in made])
    sd = np.maximum(replicas.std(0, ddof=1), 1e-12)
    return xr.Dataset(
        {
            "locus_p": (("locus",), (1 + as_many) / (1 + len(made))),
            "sample_z": (("statistic", "sample"), (by_sample - replicas.mean(0)) / sd),
        },
        {
            "locus": result["observed_data"]["locus"].values,
            "statistic": ["methylated", "intermediate", "unlike ancestor"],
            "sample": list(pedigree.samples),
        },
    )


def _ancestors(pedigree: Any) -> list[int]:
    """Place of the nearest sequenced ancestor of each sample; of the first sample where there is none."""
    parent = dict(zip(pedigree.nodes, pedigree.parents, strict=True))
    place = {name: k for k, name in enumerate(pedigree.samples)}
    found = []
    for name in pedigree.samples:
        above = parent[name]
        while above and above not in place:
            above = parent[above]
        found.append(place.get(above, 0))
    return found
