"""Cells of new batches, with whatever panel, mapped onto a fit of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from domains.genomics import cells
from domains.genomics.cell_networks import Nets
from domains.genomics.citeseq import SETTINGS, form_of, make
from domains.genomics.panels import Form, Prior
from scivi.models import Template


def query(
    fit: Any,
    data: Any,
    *,
    protein: str = "protein_expression",
    rna: str | None = "X",
    batch: str | None = None,
    missing: float | None = None,
) -> tuple[Template, dict[str, Any]]:
    """The template that maps cells of new batches onto a fit, and the table for ``scivi.fit``.

    All that the fit knows stays as it is; what is learnt are the new batches' levels of the ambient and their
    shifts in the decoders. Proteins of the fit that the new cells lack are missing, and are imputed. Cells of
    the fit's own batches need no fit: ``scivi.draw(fit, cells.table(cells.counts(data), panel))``.

    Args:
        fit: of a template made by ``make``.
        data: AnnData, MuData, or the path of one.
        protein: where the proteins are, as in ``from_data``.
        rna: where the RNA is, likewise.
        batch: a column of obs that says of which batch a cell is; all are of one if None.
        missing: an entry that stands for "not measured", such as -1.
    """
    form = form_of(fit.template)
    found = cells.counts(data, protein=protein, rna=rna, batch=batch, missing=missing)
    own, known = cells.panel(found), form.panel
    place = {name: k for k, name in enumerate(own.proteins)}
    usual = np.mean(known.log_ambient, 0) + (fit.template.prior.kappa if known.has_empties else 0.0)
    levels = [
        tuple(row[place[p]] if p in place else float(usual[t]) for t, p in enumerate(known.proteins))
        for row in own.log_ambient
    ]
    panel = replace(known, batches=own.batches, log_ambient=tuple(levels), has_empties=False)
    settings = {name: getattr(form, name) for name in SETTINGS} | {"reference": form.n_batches}
    made = make(panel, prior=fit.template.prior, **settings)
    learnt = partial(_mapped, form=form_of(made), known=fit.nets.own)
    genes = fit.coords["gene"] if form.has_rna else ()
    return replace(made, nets=learnt), cells.table(found, panel, genes=genes)


def _mapped(sizes: Mapping[str, int], prior: Prior, *, form: Form, known: Nets) -> Nets:
    """Networks that know what others do, and learn nothing but what belongs to a batch."""
    made, held = Nets(form, prior), known.state_dict()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not any(word in name for word in ("batch_", "log_ambient", "log_efficiency")):
                parameter.copy_(held[name])
                parameter.requires_grad_(False)
    return made
