"""CITE-seq: RNA and surface proteins of single cells, protein foreground told apart from background.

For cell n with state z_n in batch s, gene g and protein t:

    z_n       ~ Normal(0, I)
    x_ng      ~ NB(l_n rho_ng, theta_g),            rho_n = softmax(log fraction + f(z_n, s)), l_n = sum x_n
    v_nt      ~ Bernoulli(pi_nt),                   logit pi_n = f_pi(z_n, s); 1e-3 for isotype controls
    a_n       ~ Normal(0, tau)                      what all proteins of a droplet share
    log b_nt  = m_st + a_n + scatter_t eps_nt,      eps ~ Normal(0, 1)
    y_nt      ~ NB(b_nt e_st,            phi_t)     if v_nt = 0
              ~ NB(b_nt e_st d_nt,       phi'_t)    if v_nt = 1,   log d_n = log 1.5 + softplus(f_d(z_n, s))

and for an empty droplet, which holds what floats about and nothing else,

    log b_nt  = h_st + a_n + scatter_t eps_nt,     y_nt ~ NB(b_nt e_st, phi_t),
    m_st      = h_st + log kappa_s + log k_t.

A cell sees the share kappa k of what an empty droplet holds, k near 1 and each protein's own. The efficiency
e of capture differs between batches, and is left out of what is reported; with one batch nothing tells it
from m, and it is 1. Both v and eps are integrated out (``scivi.models.foreground``). A foreground is at least
half as bright again as the background: without that floor the mixture may call "foreground" what differs from
background in nothing.

Entries of y may be missing, protein by protein and cell by cell. While fitting, proteins are hidden from the
encoder at random, so that cells of other panels can be read too.

Longer than 400 lines because model, guide and the making of both from data are to be read in one place.

References:
    Gayoso et al. 2021, Nature Methods 18, 272, doi:10.1038/s41592-020-01050-x (the mixture, joint with RNA).
    Lopez et al. 2018, Nature Methods 15, 1053, doi:10.1038/s41592-018-0229-2 (RNA).
    Mule, Martins and Tsang 2022, Nat. Commun. 13, 2099, doi:10.1038/s41467-022-29356-8 (empty droplets, and
    the factor that proteins of a droplet share).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from domains.genomics import cells
from domains.genomics.cell_networks import ISOTYPE_LOGIT, LEAST_LOG_FOLD, Nets
from domains.genomics.cell_simulation import simulate
from domains.genomics.panels import Form, Panel, Prior
from scivi.errors import TemplateError, listed
from scivi.inputs.fields import Field
from scivi.models import Batch, Template, normals
from scivi.models.counts import NegativeBinomialMean
from scivi.models.foreground import ForegroundBackground, ScatteredCounts

SETTINGS = ("n_latent", "hidden", "dropout", "reference")  # of ``make`` besides the panel
FACTOR_STEPS = 2  # in which foreground and droplet factor are told apart (our choice)


def _of_batch(table: Tensor, place: Tensor) -> Tensor:
    """Rows of a table (*draw, batch, protein) for each droplet, (*draw, droplet, protein)."""
    picked = table.index_select(-2, place)
    return picked if table.dim() == 2 else picked.squeeze(-3)  # a draw has a dim in place of the plate


def proteins(batch: Batch, values: Mapping[str, Tensor], nets: Nets, form: Form) -> ForegroundBackground:
    """Distribution of the cells' protein counts (*draw, cell, protein)."""
    place = batch.batch.long()
    log_fold, logits = nets.proteins(values["z"], place)
    is_isotype = torch.tensor([p in form.panel.isotypes for p in form.panel.proteins], device=place.device)
    level = _of_batch(ambient(values), place) + values["droplet_factor"].unsqueeze(-1)
    if form.has_efficiency:
        level = level + _of_batch(values["log_efficiency"], place)
    return ForegroundBackground(
        level,
        values["scatter"],
        LEAST_LOG_FOLD + softplus(log_fold),
        torch.where(is_isotype, torch.full_like(logits, ISOTYPE_LOGIT), logits),
        values["log_background_dispersion"].exp(),
        values["log_foreground_dispersion"].exp(),
        validate_args=False,
    )


def model(batch: Batch, prior: Prior, nets: Nets, *, form: Form) -> None:
    """The generative story of the module's docstring."""
    like = batch.adt
    n_proteins, n_batches = len(form.panel.proteins), form.n_batches
    values: dict[str, Tensor] = {}

    def normal(name: str, shape: tuple[int, ...], centre: float | Tensor, sd: float) -> Tensor:
        centre = torch.as_tensor(centre, dtype=like.dtype, device=like.device)
        family = dist.Normal(centre.expand(torch.broadcast_shapes(centre.shape, shape)), sd)
        values[name] = pyro.sample(name, family.to_event(len(shape)))
        return values[name]

    def half_normal(name: str, shape: tuple[int, ...]) -> None:
        family = dist.HalfNormal(like.new_full(shape, prior.scatter))
        values[name] = pyro.sample(name, family.to_event(len(shape)))

    level = torch.tensor(form.panel.log_ambient, dtype=like.dtype, device=like.device)
    if form.panel.has_empties:
        normal("log_empty", (n_batches, n_proteins), level, prior.ambient_sd)
        normal("log_kappa", (n_batches,), prior.kappa, prior.kappa_sd)
        normal("log_kappa_protein", (n_proteins,), 0.0, prior.kappa_protein_sd)
        values["log_ambient"] = pyro.deterministic("log_ambient", ambient(values), event_dim=2)
    else:
        normal("log_ambient", (n_batches, n_proteins), level, prior.ambient_sd)
    half_normal("scatter", (n_proteins,))
    half_normal("droplet_scatter", ())
    for kind in ("background", "foreground"):
        centre = math.log(prior.protein_dispersion)
        normal(f"log_{kind}_dispersion", (n_proteins,), centre, prior.protein_dispersion_sd)
    if form.has_efficiency:
        normal("log_efficiency", (n_batches, n_proteins), 0.0, prior.efficiency_sd)
    pyro.factor("networks", nets.log_prior(prior))
    if form.has_rna:
        theta = normal("log_theta", (len(form.panel.log_fractions),), 0.0, prior.dispersion_sd).exp()
    factor = dist.Normal(torch.zeros_like(values["droplet_scatter"]), values["droplet_scatter"])
    with batch.plate("cell"):
        zero = like.new_zeros(form.n_latent)
        values["z"] = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
        values["droplet_factor"] = pyro.sample("droplet_factor", factor)
        if form.has_rna:
            fractions = nets.fractions(values["z"], batch.batch.long())
            mean = batch.rna.sum(-1, keepdim=True) * fractions
            batch.observe("rna", NegativeBinomialMean(mean, theta).to_event(1))
        batch.observe("adt", proteins(batch, values, nets, form).to_event(1))
    if form.panel.has_empties:  # together they weigh no more than the cells
        with poutine.scale(scale=_weight_of_empties(batch)), batch.plate("droplet"):
            empty_factor = pyro.sample("empty_factor", factor)
            batch.observe("empty_adt", empties(batch, values, empty_factor).to_event(1))


def ambient(values: Mapping[str, Tensor]) -> Tensor:
    """Log background of a cell by batch and protein, (*draw, batch, protein).

    With empty droplets it is made of what they hold and of the share of it that a cell sees: the droplets
    tell the one and the cells the other, so that the two are hardly correlated.
    """
    if "log_empty" not in values:
        return values["log_ambient"]
    share = values["log_kappa"].unsqueeze(-1) + values["log_kappa_protein"].unsqueeze(-2)
    return values["log_empty"] + share


def empties(batch: Batch, values: Mapping[str, Tensor], factor: Tensor) -> ScatteredCounts:
    """Distribution of the empty droplets' counts (*draw, droplet, protein), given their factors."""
    place = batch.empty_batch.long()
    level = _of_batch(values["log_empty"], place)
    if "log_efficiency" in values:
        level = level + _of_batch(values["log_efficiency"], place)
    dispersion = values["log_background_dispersion"].exp()
    return ScatteredCounts(level + factor.unsqueeze(-1), values["scatter"], dispersion, validate_args=False)


def _weight_of_empties(batch: Batch) -> float:
    return min(1.0, batch.sizes["cell"] / batch.sizes["droplet"])


def guide(batch: Batch, prior: Prior, nets: Nets, *, form: Form) -> None:
    """Independent normals for what cells share; for each a joint normal of z, and a normal of a given z."""
    values = nets.globals(batch)
    with batch.plate("cell"):
        loc, tril, shift, stretch = nets.encoder(batch)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        values["z"] = pyro.sample("z", dist.TransformedDistribution(noise, [normals.TrilAffine(loc, tril)]))
        centre, width = factor_of_cells(batch, values, nets, form)
        pyro.sample("droplet_factor", dist.Normal(centre + width * shift, width * stretch.exp()))
    if form.panel.has_empties:
        with poutine.scale(scale=_weight_of_empties(batch)), batch.plate("droplet"):
            counts = empties(batch, values, values["droplet_scatter"].new_zeros(()))
            mask = batch.observed_mask.get("empty_adt")
            centre, width = factor_given(batch.empty_adt, counts, values["droplet_scatter"], mask)
            shift, stretch = nets.of_empties
            pyro.sample("empty_factor", dist.Normal(centre + width * shift, width * stretch.exp()))


def factor_of_cells(
    batch: Batch, values: Mapping[str, Tensor], nets: Nets, form: Form
) -> tuple[Tensor, Tensor]:
    """Place and width of the cells' droplet factors given their states, (*draw, cell).

    What the cell carries itself is told apart by the chances of the foreground at the factor found before.
    """
    sd, mask = values["droplet_scatter"], batch.observed_mask.get("adt")
    found = proteins(batch, {**values, "droplet_factor": torch.zeros_like(values["z"][..., 0])}, nets, form)
    background, foreground = found.background, found.foreground
    log_fold = foreground.log_mean - background.log_mean
    centre = width = torch.zeros_like(values["z"][..., 0])
    for _ in range(FACTOR_STEPS):
        with torch.no_grad():
            moved = ForegroundBackground(
                background.log_mean + centre.unsqueeze(-1),
                background.scatter,
                log_fold,
                found.logits,
                background.dispersion,
                foreground.dispersion,
                validate_args=False,
            )
            present = moved.foreground_prob(batch.adt)
        level = background.log_mean + present * log_fold
        dispersion = torch.lerp(background.dispersion, foreground.dispersion, present)
        counts = ScatteredCounts(level, background.scatter, dispersion, validate_args=False)
        centre, width = factor_given(batch.adt, counts, sd, mask)
    return centre, width


def factor_given(
    y: Tensor, counts: ScatteredCounts, sd: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Place and width of a given counts, as if log(y + 1/2) were normal about its level at a = 0.

    Gradients flow through the levels: with many proteins the counts fix the sum of level and factor alone,
    and a factor that were held while the level moves, and followed it at the next step, would let both drift.

    Args:
        y: counts (droplet, protein).
        counts: their distribution at a = 0.
        sd: of a beforehand.
        mask: True where a protein was counted; None if all were.
    """
    with torch.no_grad():
        precision = 1 / (1 / (y + 0.5) + 1 / counts.dispersion + counts.scatter.square())
        if mask is not None:
            precision = precision * mask
    total = precision.sum(-1) + sd.square().reciprocal()
    return (precision * ((y + 0.5).log() - counts.log_mean)).sum(-1) / total, total.rsqrt()


def derive(
    batch: Batch, prior: Prior, nets: Nets, values: Mapping[str, Tensor], *, form: Form
) -> dict[str, Tensor]:
    """Of a draw: chance of the foreground given the count, level of the background, protein without it."""
    found, y = proteins(batch, values, nets, form), batch.adt
    background, foreground = found.background, found.foreground
    present = found.foreground_prob(y)
    log_background, level = found.draw_log_background(y, present), foreground.expected(y)
    mask = batch.observed_mask.get("adt")
    if mask is not None:  # nothing was counted: what the cell's state says
        scattered = background.log_mean + background.scatter * torch.randn_like(present)
        log_background = torch.where(mask, log_background, scattered)
        present = torch.where(mask, present, found.logits.sigmoid())
        level = torch.where(mask, level, foreground.mean)
    if form.has_efficiency:
        log_efficiency = _of_batch(values["log_efficiency"], batch.batch.long())
        log_background, level = log_background - log_efficiency, level * (-log_efficiency).exp()
    return {"foreground": present, "log_background": log_background, "denoised": present * level}


def validate(
    values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray], *, panel: Panel
) -> list[str]:
    """What is wrong with the panel, and where it and the data disagree."""
    faults, names = panel.faults(), [str(name) for name in coords["protein"]]
    if names != list(panel.proteins):
        lacking, unknown = sorted({*panel.proteins} - {*names}), sorted({*names} - {*panel.proteins})
        told = [f"the data lack {', '.join(lacking)}"] if lacking else []
        told += [f"the panel has no {', '.join(unknown)}"] if unknown else []
        why = "; ".join(told) or "they are in another order"
        faults.append(f"the proteins are not those of the panel: {why}")
    if panel.log_fractions and len(coords["gene"]) != len(panel.log_fractions):
        faults.append(f"there are {len(coords['gene'])} genes; the panel has {len(panel.log_fractions)}")
    return faults


def make(
    panel: Panel | Mapping[str, Any],
    *,
    n_latent: int = 20,
    hidden: int = 256,
    dropout: float = 0.2,
    reference: int = 0,
    prior: Prior | None = None,
) -> Template:
    """A template of CITE-seq counts.

    Args:
        panel: what was measured, and the levels to begin at; or its ``to_dict``. ``from_data`` reads it off
            the data.
        n_latent: dimensions of a cell's state.
        hidden: width of the networks.
        dropout: share of hidden units that are left out while fitting.
        reference: number of batches of the fit that these cells are mapped onto, as ``query`` sets it.
        prior: numbers of the model.

    Raises:
        TemplateError: the panel contradicts itself.
    """
    if isinstance(panel, Mapping):
        panel = Panel.from_dict(panel)
    if faults := panel.faults():
        raise TemplateError(listed("the panel cannot be used:", faults))
    form = Form(panel, n_latent, hidden, dropout, reference)
    units = {"log_empty": "ln count"} if panel.has_empties else {}
    units |= {"log_ambient": "ln count", "log_background": "ln count", "denoised": "count"}
    return Template(
        name=f"CITE-seq, {len(panel.proteins)} proteins" + (", empty droplets" if panel.has_empties else ""),
        fields=_fields(form),
        rows=("cell", "droplet") if panel.has_empties else "cell",
        model=partial(model, form=form),
        dims=_dims(form),
        guide=partial(guide, form=form),
        nets=lambda sizes, prior: Nets(form, prior),
        prior=prior or Prior(),
        simulate=partial(simulate, form=form),
        derive=partial(derive, form=form),
        units=units,
        sizes={"latent": n_latent, "batch": form.n_batches}
        | ({"gene": len(panel.log_fractions)} if form.has_rna else {}),
        coords={"batch": panel.batches},
        validate=partial(validate, panel=panel),
        distinct=True,
        made=(
            "domains.genomics.citeseq:make",
            {"panel": panel.to_dict(), **{name: getattr(form, name) for name in SETTINGS}},
        ),
    )


def _fields(form: Form) -> dict[str, Field]:
    panel, counts = form.panel, constraints.nonnegative_integer
    words = {"labels": panel.batches, "default": panel.batches[0]}
    found = {
        "adt": Field(("cell", "protein"), "observed", counts, "count", "protein counts, missing allowed"),
        "batch": Field(("cell",), doc="of the cell", **words),
    }
    if panel.has_empties:
        of_empties = "protein counts of empty droplets"
        found["empty_adt"] = Field(("droplet", "protein"), "observed", counts, "count", of_empties)
        found["empty_batch"] = Field(("droplet",), doc="of the empty droplet", **words)
    if form.has_rna:
        found["rna"] = Field(("cell", "gene"), "observed", counts, "count", "RNA counts", gaps=False)
    return found


def _dims(form: Form) -> dict[str, tuple[str, ...]]:
    by_batch, by_protein = ("batch", "protein"), ("protein",)
    dims: dict[str, tuple[str, ...]] = {"log_ambient": by_batch, "scatter": by_protein, "droplet_scatter": ()}
    dims |= {"log_background_dispersion": by_protein, "log_foreground_dispersion": by_protein}
    if form.has_efficiency:
        dims["log_efficiency"] = by_batch
    if form.panel.has_empties:
        dims |= {"log_empty": by_batch, "log_kappa": ("batch",), "log_kappa_protein": by_protein}
    if form.has_rna:
        dims["log_theta"] = ("gene",)
    dims |= {"z": ("cell", "latent"), "droplet_factor": ("cell",)}
    return dims | dict.fromkeys(("foreground", "log_background", "denoised"), ("cell", "protein"))


def from_data(
    data: Any,
    *,
    protein: str = "protein_expression",
    rna: str | None = "X",
    batch: str | None = None,
    missing: float | None = None,
    isotypes: Sequence[str] = (),
    empties: Any = None,
    **options: Any,
) -> tuple[Template, dict[str, Any]]:
    """The template that fits an AnnData or MuData of counts, and the table for ``scivi.fit``.

    From the command line: ``scivi fit domains.genomics.citeseq:from_data cells.h5ad --out results``.

    Args:
        data: AnnData, MuData, or the path of one.
        protein: where the proteins are, a key of obsm or "X"; of a MuData the modality.
        rna: where the RNA is, "X" or "layers/..."; of a MuData the modality; None if there is none.
        batch: a column of obs that says of which batch a cell is.
        missing: an entry that stands for "not measured", such as -1.
        isotypes: names of the proteins that no cell carries.
        empties: empty droplets, as an AnnData with its proteins at the same place.
        **options: of ``make``.
    """
    found = cells.counts(data, protein=protein, rna=rna, batch=batch, missing=missing)
    droplets = None
    if empties is not None:
        droplets = cells.counts(empties, protein=protein, rna=None, batch=batch, missing=missing)
    measured = cells.panel(found, droplets, isotypes=isotypes)
    return make(measured, **options), cells.table(found, measured, droplets)


def form_of(template: Template) -> Form:
    """What was fixed when a template was made by ``make``."""
    return cast(Any, template.model).keywords["form"]


def panel_of(template: Template) -> Panel:
    """The panel of a template made by ``make``."""
    return form_of(template).panel


EXAMPLE = Panel(
    proteins=("CD3", "CD4", "CD8", "CD14", "CD19", "IgG1"),
    batches=("1", "2"),
    log_ambient=((2.0, 1.5, 1.0, 1.5, 0.5, 0.5), (2.2, 1.7, 1.2, 1.7, 0.7, 0.7)),
    log_fold=(3.0, 2.0, 2.5, 2.0, 2.5, 0.5),
    share=(0.5, 0.3, 0.2, 0.2, 0.1, 0.01),
    log_fractions=tuple(math.log(1 / 30) + 0.5 * math.sin(g) for g in range(30)),
    isotypes=("IgG1",),
    has_empties=True,
)
template = make(EXAMPLE)
