"""What became of each locus: genotypes of every member of a pedigree, and the changes along every edge."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from domains.genomics import transmission
from domains.genomics.loci import LEAST, RATES, Form
from domains.genomics.methylation import form_of, pedigree_of, tree_of
from domains.genomics.reads import Errors, seen
from scivi.models import Template, sum_product
from scivi.models.sum_product import Posterior, Tree

AT_A_TIME = 2**16  # draws x loci held at once (our choice)


def genotypes(
    result: xr.DataTree, template: Template, *, draws: int = 40, progress: bool = False
) -> xr.Dataset:
    """Posterior genotypes of all members of the pedigree, sequenced or not, and expected changes.

    The genotypes' probabilities given rates and reads are exact; they are averaged over draws.

    Args:
        result: from ``draw`` or ``predict``, with posterior, observed and constant data of the loci.
        template: from ``methylation.make``, of the same pedigree.
        draws: evenly spread draws that are averaged over.
        progress: show a progress bar.

    Returns:
        ``genotype_prob`` (locus, node, genotype); ``gains`` and ``losses`` (edge, draw), expected changes of
        methylated copies from one end of an edge to the other, per locus and copy; ``locus_changes``
        (locus,), the expected number of edges along which a locus changed.

    Notes:
        A change is any net difference of genotype between the two ends of an edge: in a selfing line that
        includes what a heterozygote's offspring inherit, which is no epimutation; and what was undone before
        the edge's end is not seen. Of each draw the changes are expectations, which vary with what loci
        share alone: their spread is not that of the number of changes. It takes about a second for ten
        million loci x draws x edges.
    """
    form, pedigree = form_of(template), pedigree_of(template).ordered()
    tree = tree_of(pedigree, collapsed=False)
    posterior = result["posterior"].to_dataset().stack(sample_=("chain", "draw"))
    kept = np.unique(np.linspace(0, posterior.sizes["sample_"] - 1, draws).astype(int))
    posterior = posterior.isel(sample_=kept).transpose("sample_", ...)
    names, n = form.states, result["observed_data"].sizes["locus"]
    per_block = max(1, AT_A_TIME // len(kept))
    probabilities = np.empty((n, len(pedigree.nodes), len(names)), np.float32)
    changes, locus_changes = np.zeros((2, len(tree.edges), len(kept))), np.empty(n, np.float32)
    copies = torch.arange(len(names), dtype=torch.float32) / (len(names) - 1)
    moved = copies - copies[:, None]  # methylated share after less before
    for start in tqdm(range(0, n, per_block), disable=not progress, desc="genotypes", unit="block"):
        loci = slice(start, start + per_block)
        found = _posterior_of(result, posterior, loci, tree, form)
        probabilities[loci] = found.states.mean(2).permute(2, 0, 1).numpy()
        for k, sign in enumerate((1.0, -1.0)):
            weight = (sign * moved).clamp_min(0.0)[..., None, None]
            changes[k] += (found.pairs * weight).sum((1, 2)).sum(-1).double().numpy()
        stayed = torch.stack([found.pairs[:, k, k] for k in range(len(names))]).sum(0)
        locus_changes[loci] = (1 - stayed).sum(0).mean(0).numpy()
    edges = [f"{pedigree.parents[v]} to {pedigree.nodes[v]}" for v in tree.edges]
    return xr.Dataset(
        {
            "genotype_prob": (("locus", "node", "genotype"), probabilities),
            "gains": (("edge", "draw"), changes[0] / n, {"units": "1 / copy"}),
            "losses": (("edge", "draw"), changes[1] / n, {"units": "1 / copy"}),
            "locus_changes": (("locus",), locus_changes),
        },
        {
            "locus": result["observed_data"]["locus"].values,
            "node": list(pedigree.nodes),
            "genotype": list(names),
            "edge": edges,
            "generations": ("edge", [tree.length[v] for v in tree.edges]),
        },
    )


def _posterior_of(
    result: xr.DataTree, posterior: xr.Dataset, loci: slice, tree: Tree, form: Form
) -> Posterior:
    """States and pairs of some loci: (nodes or edges, states, ..., draws, loci)."""
    given = result["constant_data"].to_dataset().isel(locus=loci)
    counts = result["observed_data"].to_dataset().isel(locus=loci)
    total, read = _tensor(given["total"]), _tensor(counts["methylated"])
    total = torch.where(read.isnan(), 0.0, total)
    methylated = torch.where(read.isnan(), 0.0, torch.minimum(read, total))
    context = _tensor(given["context"]).long()
    annotation = [_tensor(given[name]) for name in form.annotations]

    def rate(name: str) -> Tensor:
        if form.heterogeneous:
            return _tensor(posterior[f"locus_log_{name}"].isel(locus=loci)).clamp_max(-LEAST).exp()
        log_rate = _tensor(posterior[f"{name}_rate"]).log()[:, context]
        if annotation:
            log_rate = log_rate + _tensor(posterior[f"{name}_effect"]) @ torch.stack(annotation)
        return log_rate.clamp_max(-LEAST).exp()

    gain, loss = (rate(name) for name in RATES)
    if form.equilibrium:
        root = transmission.equilibrium(form.reproduction, gain, loss)
    else:
        root = _tensor(posterior["founder"])[:, context].unbind(-1)
    shared = (_tensor(posterior[name])[:, None] for name in ("inappropriate", "overdispersion"))
    with torch.no_grad():
        errors = Errors(_tensor(posterior["nonconversion"]), *shared)
        reads = seen(methylated, total, errors, len(root), form.most_reads)
        return sum_product.posterior(tree, reads, transmission.step(form.reproduction, gain, loss), root)


def _tensor(array: xr.DataArray) -> Tensor:
    return torch.as_tensor(np.asarray(array.values, np.float32))
