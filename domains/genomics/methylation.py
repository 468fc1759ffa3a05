"""DNA methylation passed on along a pedigree: rates of gain and loss from read counts, locus by locus.

For locus l with context c, pedigree node v with parent p(v) at a distance of g_v generations, and genotype
G in {UU, UM, MM} (no, one, or both copies methylated):

    ln gain_l    = gain_c + x_l . gain_effect + gain_sigma z_l1          z_l ~ Normal(0, 1), two of each locus
    ln loss_l    = loss_c + x_l . loss_effect + loss_sigma z_l2
    G_l,founder  ~ Categorical(founder_c)
    G_lv         ~ Categorical(T(gain_l, loss_l) to the power g_v, row G_l,p(v))
    m_ls         ~ BetaBinomial(n_ls; mean (nonconversion_s, 1/2, 1 - inappropriate)[G_ls], overdispersion)

gain and loss are per cytosine copy and generation, T is one generation (``transmission``), x are annotations
of the locus. Genotypes are summed out exactly (``scivi.models.sum_product``). The scatter over loci
(gain_sigma, loss_sigma) is learnt from the likelihood with each locus's z integrated on nodes: a Gaussian
guide under the ELBO makes it collapse, and neither coverage nor the bound shows it.

The guide of a locus is a normal with the mean and covariance of its own posterior given the rest, found by
quadrature: there is nothing to train, and so nothing that is wrong outside of what was trained on.

Longer than 400 lines because the simulation and the reading of a pedigree stand beside the model they are of.

References:
    Shahryary et al. 2020, Genome Biology 21, 260, doi:10.1186/s13059-020-02161-6 (AlphaBeta, selfing).
    van der Graaf et al. 2015, PNAS 112, 6676, doi:10.1073/pnas.1424254112 (rates in Arabidopsis).
    Naylor and Smith 1982, J. R. Stat. Soc. C 31, 214 (quadrature on nodes that follow the posterior).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions.constraints import softplus_positive
from torch import Tensor, nn
from torch.distributions import constraints

from domains.genomics import loci, transmission
from domains.genomics.loci import LEAST, RATES, Form, Loci
from domains.genomics.pedigrees import Pedigree
from domains.genomics.reads import PedigreeReads
from domains.genomics.transmission import Reproduction
from scivi.errors import DataError
from scivi.inputs.fields import Field
from scivi.models import Batch, Template, guides
from scivi.models.sum_product import Tree

CONTEXTS = ("CG", "CHG", "CHH")


@dataclass(frozen=True)
class Prior:
    """Numbers of the model. Rates are per cytosine copy and generation; 1 in ln is a factor of 2.7."""

    gain: float = 2e-4  # 1 / generation; centre of ln gain, near Arabidopsis CG (van der Graaf et al. 2015)
    loss: float = 8e-4  # 1 / generation; centre of ln loss, likewise
    rate_sd: float = 1.5  # ln; of both (our choice: a factor of 20 either way within 2 sd)
    effect_sd: float = 1.0  # ln; of an annotation's effect (our choice)
    sigma: float = 1.0  # ln; half-normal scale of the scatter over loci (our choice)
    founder: float = 1.0  # Dirichlet concentration of the founder's states; 1 is uniform
    nonconversion: float = 0.01  # mean of a prior that is densest at 0 (our choice: a percent)
    inappropriate: float = 0.03  # likewise; Genereux et al. 2008, Nucleic Acids Res. 36, e150, give percents
    overdispersion: float = 0.05  # likewise (our choice)


def _shrinking(mean: float, like: Tensor) -> dist.Beta:
    """Beta(1, b) with a mean: densest at zero."""
    return dist.Beta(like, (1 / mean - 1) * like)


def model(batch: Batch, prior: Prior, nets: nn.Module | None, *, form: Form) -> None:
    """The generative story of the module's docstring."""
    one = batch.total.new_ones(())
    contexts, samples = one.expand(len(form.contexts)), one.expand(batch.sizes["sample"])
    values: dict[str, Tensor] = {}
    for name, centre in (("gain", prior.gain), ("loss", prior.loss)):
        expected = math.log(centre) * contexts
        if form.heterogeneous:
            values[f"{name}_sigma"] = pyro.sample(f"{name}_sigma", dist.HalfNormal(prior.sigma * one))
            expected = expected + values[f"{name}_sigma"].square().unsqueeze(-1) / 2
        # ln of the mean over loci, not of the median: the data tell it almost apart from the scatter
        level = dist.Normal(expected, prior.rate_sd).to_event(1)
        values[f"log_mean_{name}"] = pyro.sample(f"log_mean_{name}", level)
        if form.annotations:
            none = one.new_zeros(len(form.annotations))
            effect = dist.Normal(none, prior.effect_sd * one).to_event(1)
            values[f"{name}_effect"] = pyro.sample(f"{name}_effect", effect)
    if not form.equilibrium:
        weight = one.expand(len(form.contexts), len(form.states)) * prior.founder
        values["founder"] = pyro.sample("founder", dist.Dirichlet(weight).to_event(1))
    for name, error in (
        ("nonconversion_doubled", _shrinking(2 * prior.nonconversion, samples).to_event(1)),
        ("inappropriate_doubled", _shrinking(2 * prior.inappropriate, one)),
        ("overdispersion", _shrinking(prior.overdispersion, one)),
    ):
        values[name] = pyro.sample(name, error)
    values = loci.completed(values, form)
    for name in RATES:
        pyro.deterministic(f"{name}_rate", values[f"log_{name}"].exp(), event_dim=1)
        if form.heterogeneous:
            pyro.deterministic(f"{name}_rate_mean", values[f"log_mean_{name}"].exp(), event_dim=1)
    pyro.deterministic("nonconversion", values["nonconversion"], event_dim=1)
    pyro.deterministic("inappropriate", values["inappropriate"])
    own = Loci.of(batch, form)
    with batch.plate("locus"):
        z = None
        if form.heterogeneous:
            z = pyro.sample("z", dist.Normal(one.new_zeros(2), one).to_event(1)).unbind(-1)
            for k, name in enumerate(RATES):
                pyro.deterministic(f"locus_log_{name}", own.log_rate(values, name, z[k]))
        step, root = loci.passed_on(own, values, z, form)
        reads = PedigreeReads(
            form.tree, step, root, batch.total, loci.errors_of(values), most=form.most_reads
        )
        batch.observe("methylated", reads)


class Nets(nn.Module):
    """The guide's own: one joint normal for everything that loci share."""

    def __init__(self, shared: guides.JointNormalGuide) -> None:
        super().__init__()
        self.globals = shared


def nets(sizes: Mapping[str, int], prior: Prior, *, form: Form) -> Nets:
    """The joint normal, started at the prior's centre."""
    c, s = len(form.contexts), sizes["sample"]
    supports: dict[str, constraints.Constraint] = {}
    start: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], support: constraints.Constraint, value: float) -> None:
        supports[name], start[name] = support, torch.full(shape, value)

    for name, centre in (("gain", prior.gain), ("loss", prior.loss)):
        add(f"log_mean_{name}", (c,), constraints.real, math.log(centre))
        if form.annotations:
            add(f"{name}_effect", (len(form.annotations),), constraints.real, 0.0)
        if form.heterogeneous:
            add(f"{name}_sigma", (), softplus_positive, math.sqrt(2 / math.pi) * prior.sigma)
    if not form.equilibrium:
        add("founder", (c, len(form.states)), constraints.simplex, 1 / len(form.states))
    add("nonconversion_doubled", (s,), constraints.unit_interval, 2 * prior.nonconversion)
    add("inappropriate_doubled", (), constraints.unit_interval, 2 * prior.inappropriate)
    add("overdispersion", (), constraints.unit_interval, prior.overdispersion)
    return Nets(guides.global_normal(supports, start, scale=0.05))


def guide(batch: Batch, prior: Prior, nets: Nets, *, form: Form) -> None:
    """Joint normal for what loci share; for each locus a normal with the moments of its posterior."""
    values = loci.completed(nets.globals(batch), form)
    if not form.heterogeneous:
        return
    with torch.no_grad():
        mean, tril = loci.moments(batch, values, form)
    with batch.plate("locus"):
        pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))


def simulate(
    sizes: Mapping[str, int],
    prior: Prior,
    generator: torch.Generator,
    *,
    form: Form,
    samples: tuple[str, ...],
) -> tuple[xr.Dataset, xr.Dataset]:
    """Read counts of about nine reads a sample, and the truth behind them.

    Rates are drawn near the prior's centre, errors within the range that protocols report.

    Args:
        sizes: number of loci ("locus").
        prior: its rates are read.
        generator: whose seed starts numpy's.
        form: of the template.
        samples: names of the columns.
    """
    rng = np.random.default_rng(generator.initial_seed())
    n, c, s, k = sizes["locus"], len(form.contexts), len(samples), len(form.states)
    context = rng.integers(0, c, n)
    truth: dict[str, Any] = {}
    annotation = {name: rng.integers(0, 2, n) for name in form.annotations}
    rates = []
    for name, centre in (("gain", prior.gain), ("loss", prior.loss)):
        log_rate = math.log(centre) + rng.normal(0.0, 0.5, c)
        truth[f"{name}_rate"] = (("context",), np.exp(log_rate))
        log_rate = log_rate[context]
        if form.annotations:
            effect = rng.normal(0.0, 0.5, len(form.annotations))
            truth[f"{name}_effect"] = (("annotation",), effect)
            log_rate = log_rate + effect @ np.stack(list(annotation.values()))
        if form.heterogeneous:
            sigma = rng.uniform(0.5, 1.2)
            truth[f"{name}_sigma"] = ((), sigma)
            truth[f"{name}_rate_mean"] = (("context",), truth[f"{name}_rate"][1] * math.exp(sigma**2 / 2))
            log_rate = log_rate + sigma * rng.normal(size=n)
            truth[f"locus_log_{name}"] = (("locus",), log_rate)
        rates.append(np.exp(np.minimum(log_rate, -LEAST)))
    if form.equilibrium:
        ends = transmission.equilibrium(form.reproduction, *map(torch.as_tensor, rates))
        founder = torch.stack(ends, -1).numpy()
    else:
        by_context = rng.dirichlet([15.0, *[0.2] * (k - 2), 5.0], c)
        truth["founder"] = (("context", "genotype"), by_context)
        founder = by_context[context]
    states = _descended(form, founder, rates, rng)
    nonconversion, inappropriate = rng.uniform(0.002, 0.01, s), rng.uniform(0.01, 0.04)
    overdispersion = rng.uniform(0.01, 0.03)
    truth |= {"nonconversion": (("sample",), nonconversion), "inappropriate": ((), inappropriate)}
    truth["overdispersion"] = ((), overdispersion)
    total = np.minimum(rng.poisson(rng.uniform(6.0, 13.0, s), (n, s)), form.most_reads)
    mean = np.where(states == 0, nonconversion, np.where(states == k - 1, 1 - inappropriate, 0.5))
    phi = (1 - overdispersion) / overdispersion
    methylated = rng.binomial(total, rng.beta(mean * phi, (1 - mean) * phi))
    dims, coords = ("locus", "sample"), {"locus": np.arange(n), "sample": np.array(samples)}
    table = {"methylated": (dims, methylated), "total": (dims, total)}
    table["context"] = (("locus",), np.array(form.contexts)[context])
    table |= {name: (("locus",), values) for name, values in annotation.items()}
    coords |= {"context": np.array(form.contexts), "genotype": np.array(form.states)}
    return xr.Dataset(table, {d: coords[d] for d in dims}), xr.Dataset(truth, coords)


def _descended(form: Form, founder: np.ndarray, rates: Sequence[np.ndarray], rng: Any) -> np.ndarray:
    """Genotypes of the samples (loci, samples), drawn from the founder on, generation by generation."""
    rows = transmission.step(form.reproduction, *map(torch.as_tensor, rates))
    below = torch.stack([torch.stack(row) for row in rows]).cumsum(1).numpy()  # before, after, locus
    places = np.arange(len(founder))
    states: list[np.ndarray] = []
    for parent, length in zip(form.tree.parent, form.tree.length, strict=True):
        if parent < 0:
            states.append((rng.random(len(places))[:, None] > founder.cumsum(1)[:, :-1]).sum(1))
            continue
        now = states[parent]
        for _ in range(length):
            now = (rng.random(len(places)) > below[now, :-1, places].T).sum(0)
        states.append(now)
    return np.stack([states[v] for v in form.tree.seen], 1)


def tree_of(pedigree: Pedigree, *, collapsed: bool = True) -> Tree:
    """A pedigree as the tree that is summed over; one with faults, which ``validate`` names, as a node."""
    if pedigree.faults():
        return Tree((-1,), (0,), (0,))
    sound = pedigree.collapsed() if collapsed else pedigree.ordered()
    place = {node: v for v, node in enumerate(sound.nodes)} | {"": -1}
    return Tree(
        tuple(place[p] for p in sound.parents), sound.generations, tuple(place[s] for s in sound.samples)
    )


def form_of(template: Template) -> Form:
    """What was fixed when a template was made by ``make``."""
    return cast(Any, template.model).keywords["form"]


def pedigree_of(template: Template) -> Pedigree:
    """The pedigree of a template made by ``make``."""
    return cast(Any, template.validate).keywords["pedigree"]


def validate(
    values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray], *, pedigree: Pedigree
) -> list[str]:
    """What is wrong with the pedigree, and where it and the columns of the data disagree."""
    columns, names = [str(s) for s in coords["sample"]], list(pedigree.samples)
    nodes = {*pedigree.nodes}
    if not {*columns} <= nodes and {*map(str, coords["locus"])} <= nodes:
        return ["the rows are nodes of the pedigree and the columns are not: pass the transpose, .T"]
    faults = pedigree.faults()
    if columns != names:
        unknown, absent = sorted({*columns} - {*names}), sorted({*names} - {*columns})
        if unknown:
            faults.append(f"samples that the pedigree does not name as sequenced: {', '.join(unknown)}")
        if absent:
            faults.append(f"samples of the pedigree that the data lack: {', '.join(absent)}")
        if not unknown and not absent:
            faults.append(
                f"the data have the samples in the order {', '.join(columns)}, the pedigree in the order "
                f"{', '.join(names)}: make the pedigree with samples= in the order of the data"
            )
    return faults


def make(
    pedigree: Pedigree | Mapping[str, Any],
    *,
    reproduction: Reproduction = "selfing",
    contexts: Sequence[str] = CONTEXTS,
    annotations: Sequence[str] = (),
    heterogeneous: bool = True,
    equilibrium: bool = False,
    most_reads: int = 1000,
    prior: Prior | None = None,
) -> Template:
    """A template of methylation passed on along a pedigree.

    Args:
        pedigree: who descends from whom, and who was sequenced, in the order of the data's columns; or its
            ``to_dict``.
        reproduction: "selfing" (a sexual generation), "clonal" (trees, somatic lines), "haploid", or
            "division" (of cells; the rates are per strand: loss is failed maintenance).
        contexts: of the loci; the data's ``context`` must be one of them. Each has rates and a founder of its
            own.
        annotations: names of fields, numbers of each locus (0 or 1 for belonging to a window or a kind of
            element), that shift both log rates.
        heterogeneous: whether loci of one context differ in their rates.
        equilibrium: tie the founder's genotypes to where the rates lead in the end, instead of learning them.
        most_reads: the most reads of a sample at a locus; a larger table is slower.
        prior: numbers of the model.
    """
    if isinstance(pedigree, Mapping):
        pedigree = Pedigree.from_dict(pedigree)
    form = Form(
        tree_of(pedigree),
        reproduction,
        tuple(contexts),
        tuple(annotations),
        heterogeneous,
        equilibrium,
        most_reads,
    )
    settings = {field.name: getattr(form, field.name) for field in fields(form) if field.name != "tree"}
    coords = {"context": form.contexts, "genotype": form.states}
    coords |= {"annotation": form.annotations} if form.annotations else {}
    dims = _dims(form)
    rate = {name: "1 / generation" for name in dims if "_rate" in name}
    return Template(
        name=f"methylation, {reproduction}, {len(pedigree.samples)} samples",
        fields=_fields(form),
        rows="locus",
        model=partial(model, form=form),
        dims=dims,
        guide=partial(guide, form=form),
        nets=partial(nets, form=form),
        prior=prior or Prior(),
        simulate=partial(simulate, form=form, samples=pedigree.samples),
        units=rate | {name: "ln(1 / generation)" for name in dims if name.startswith("locus_")},
        sizes={dim: len(labels) for dim, labels in coords.items()},
        coords=coords,
        validate=partial(validate, pedigree=pedigree),
        distinct=True,
        made=("domains.genomics.methylation:make", {"pedigree": pedigree.to_dict(), **settings}),
    )


def _fields(form: Form) -> dict[str, Field]:
    counts, matrix = constraints.integer_interval(0, form.most_reads), ("locus", "sample")
    return {
        "methylated": Field(matrix, "observed", counts, "read", "methylated reads", at_most="total"),
        "total": Field(matrix, "given", counts, "read", "all reads, 0 if not covered"),
        "context": Field(("locus",), doc="cytosine context", labels=form.contexts),
        **{name: Field(("locus",), doc="annotation") for name in form.annotations},
    }


def _dims(form: Form) -> dict[str, tuple[str, ...]]:
    dims: dict[str, tuple[str, ...]] = {"gain_sigma": (), "loss_sigma": ()} if form.heterogeneous else {}
    dims |= {"gain_rate": ("context",), "loss_rate": ("context",)}
    if form.annotations:
        dims |= {"gain_effect": ("annotation",), "loss_effect": ("annotation",)}
    if form.heterogeneous:
        dims |= {"gain_rate_mean": ("context",), "loss_rate_mean": ("context",)}
        dims |= {"locus_log_gain": ("locus",), "locus_log_loss": ("locus",)}
    if not form.equilibrium:
        dims["founder"] = ("context", "genotype")
    return dims | {"nonconversion": ("sample",), "inappropriate": (), "overdispersion": ()}


def from_data(data: Any, pedigree: Pedigree | None = None, **options: Any) -> tuple[Template, Any]:
    """The template that fits an AnnData of counts which brings its pedigree, and the data for ``fit``.

    From the command line: ``scivi fit domains.genomics.methylation:from_data counts.h5ad --out results``.

    Args:
        data: AnnData, or the path of one (.h5ad, .zarr), with layers "methylated" and "total", the column
            "context" in obs, and in uns "pedigree" (columns node, parent, edge_generations) and perhaps
            "reproduction".
        pedigree: in place of the one in uns.
        **options: of ``make``; contexts are by default those that occur.

    Raises:
        DataError: there is no pedigree. What else is wrong is told when the data are fitted.
    """
    uns, samples, contexts = _described(data)
    if pedigree is None:
        if "pedigree" not in uns:
            raise DataError('the data have no pedigree in uns["pedigree"]: from_data(data, pedigree).')
        pedigree = Pedigree.from_table(uns["pedigree"], samples=samples, check=False)
    if "reproduction" in uns:
        options.setdefault("reproduction", str(uns["reproduction"]))
    options.setdefault("contexts", [c for c in CONTEXTS if c in contexts] or CONTEXTS)
    return make(pedigree, **options), data


def _described(data: Any) -> tuple[Mapping[str, Any], list[str], set[str]]:
    """Of an AnnData: uns, names of the samples, contexts that occur. Of one on disk no counts are read."""
    import anndata.io

    read_elem: Any = anndata.io.read_elem
    if hasattr(data, "obs_names"):
        contexts = data.obs["context"] if "context" in data.obs else []
        return data.uns, [str(name) for name in data.var_names], set(map(str, np.unique(contexts)))
    if str(data).endswith(".h5ad"):
        import h5py

        with h5py.File(data, "r") as file:
            return _stored(file, read_elem)
    import zarr

    return _stored(zarr.open_group(data, mode="r"), read_elem)


def _stored(stored: Any, read_elem: Any) -> tuple[Mapping[str, Any], list[str], set[str]]:
    """As ``_described``, of an open HDF5 file or zarr group."""
    uns = {key: read_elem(stored["uns"][key]) for key in ("pedigree", "reproduction") if key in stored["uns"]}
    samples = [str(name) for name in read_elem(stored["var"]).index]
    contexts = read_elem(stored["obs"]["context"]) if "context" in stored["obs"] else []
    return uns, samples, set(map(str, np.unique(contexts)))


# Two lines of descent by single seeds, one plant of each sequenced in six generations, and their ancestor.
EXAMPLE = Pedigree(
    nodes=("0", *(f"{g}_{line}" for line in "ab" for g in (1, 2, 4, 6, 8, 11))),
    parents=("", *(p for line in "ab" for p in ("0", *(f"{g}_{line}" for g in (1, 2, 4, 6, 8))))),
    generations=(0, *(1, 1, 2, 2, 2, 3) * 2),
    samples=("0", *(f"{g}_{line}" for line in "ab" for g in (1, 2, 4, 6, 8, 11))),
)
template = make(EXAMPLE)
