"""Networks of the CITE-seq template: from counts to a cell's state, and from that to its rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from domains.genomics.panels import Form, Prior
from scivi.models import Batch, guides

LEAST_LOG_FOLD = math.log(1.5)  # of foreground over background (our choice; see the template's docstring)
ISOTYPE_LOGIT = math.log(1e-3 / (1 - 1e-3))  # an isotype control binds nothing; some droplets hold two cells
INPUT_DROPOUT = 0.3  # of what the encoder reads while fitting (our choice, by held-out cells)
OTHER_PANELS = 0.2  # of the cells while fitting, from which proteins are hidden, a random share (our choice)
LEAST_SCALE = 1e-4  # of the guide's normals (our choice)
PACE = 5.0  # of what cells share, in steps of a network's weight (our choice: see IndependentNormals)
START_SHARE = 0.3  # of the cells in a protein's high mode that begin as foreground (our choice: networks find
# a foreground sooner than they unlearn one)


class Encoder(nn.Module):
    """From the counts of cells to where their states lie, and to a correction of their droplet factors."""

    def __init__(self, form: Form, n_genes: int) -> None:
        super().__init__()
        n_proteins, d = len(form.panel.proteins), form.n_latent
        n_inputs = n_genes + (1 if n_genes else 0) + 2 * n_proteins + form.n_read
        self.hide = nn.Dropout(INPUT_DROPOUT)
        self.layers = nn.Sequential(
            *_layer(n_inputs, form.hidden, form.dropout), *_layer(form.hidden, form.hidden, form.dropout)
        )
        self.heads = nn.ModuleDict(
            {
                "loc": nn.Linear(form.hidden, d),
                "scale": nn.Linear(form.hidden, d),
                "correlation": _quiet(nn.Linear(form.hidden, d * (d - 1) // 2)),
                "factor": _quiet(nn.Linear(form.hidden, 2)),
            }
        )
        self.n_read, self.new = form.n_read, bool(form.reference)
        self.below = torch.tril_indices(d, d, -1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of z place (cell, latent) and factor (cell, latent, latent); of a shift and log stretch (cell,)."""
        seen = torch.ones_like(batch.adt)
        if "adt" in batch.observed_mask:
            seen = batch.observed_mask["adt"].to(seen.dtype)
        if self.training:  # other panels lack some proteins
            hidden = torch.rand_like(seen[:, :1]) * (torch.rand_like(seen[:, :1]) < OTHER_PANELS)
            seen = seen * (torch.rand_like(seen) >= hidden)
        inputs = [(1 + batch.adt).log() * seen, seen]
        if "rna" in batch.values:
            x = batch.rna
            inputs += [torch.log1p(x / (1 + x.mean(-1, keepdim=True))), torch.log1p(x.sum(-1, keepdim=True))]
        if self.n_read:  # a batch that it has not seen is none of those it knows
            place = batch.batch.long()
            one = nn.functional.one_hot(torch.zeros_like(place) if self.new else place, self.n_read)
            inputs.append((0 if self.new else 1) * one.to(seen.dtype))
        hidden = self.layers(self.hide(torch.cat(inputs, -1)))
        loc, scale, correlation, factor = (head(hidden) for head in self.heads.values())
        tril = torch.diag_embed(softplus(scale) + LEAST_SCALE)
        tril[:, self.below[0], self.below[1]] = 0.1 * correlation
        return loc, tril, factor[:, 0], factor[:, 1]


class Decoder(nn.Module):
    """From the states of cells to so many numbers each: one hidden layer, beside a linear map."""

    def __init__(self, form: Form, hidden: int, n_outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(form.n_latent, hidden)
        self.rest = nn.Sequential(nn.LayerNorm(hidden), nn.SiLU(), nn.Dropout(form.dropout))
        self.last = _quiet(nn.Linear(hidden, n_outputs))
        self.direct = _quiet(nn.Linear(form.n_latent, n_outputs))
        k = form.n_shifts
        self.batch_hidden = nn.Parameter(torch.zeros(k, hidden)) if k else None
        self.batch_outputs = nn.Parameter(torch.zeros(k, n_outputs)) if k else None

    def forward(self, z: Tensor, place: Tensor) -> Tensor:
        """(*draw, cell, latent) and the cells' batches (cell,) to (*draw, cell, outputs)."""
        hidden, direct = self.first(z), self.direct(z)
        if self.batch_hidden is not None and self.batch_outputs is not None:
            hidden, direct = hidden + self.batch_hidden[place], direct + self.batch_outputs[place]
        return self.last(self.rest(hidden)) + direct

    def log_prior(self, sd: Tensor) -> Tensor:
        """Log density of the weights that lead to the outputs.

        Args:
            sd: of what the weights add to an output when the numbers they are multiplied with are of size 1,
                (outputs,).
        """
        n_inputs = self.last.in_features + self.direct.in_features
        squares = self.last.weight.square().sum(-1) + self.direct.weight.square().sum(-1)
        return -0.5 * n_inputs * (squares / sd.square()).sum()


def _layer(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.SiLU(), nn.Dropout(dropout)]


def _quiet(layer: nn.Linear) -> nn.Linear:
    """A layer whose first word is nearly nothing."""
    nn.init.normal_(layer.weight, 0.0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


class Nets(nn.Module):
    """All that is learnt: normals for what cells share, the encoder, decoders of genes and proteins."""

    log_fractions: Tensor

    def __init__(self, form: Form, prior: Prior) -> None:
        super().__init__()
        panel = form.panel
        n_genes, n_proteins = len(panel.log_fractions), len(panel.proteins)
        self.globals = guides.IndependentNormals(*_start(form, prior), scale=0.05, pace=PACE)
        self.encoder = Encoder(form, n_genes)
        self.of_proteins = Decoder(form, form.hidden, 2 * n_proteins)
        start = torch.tensor([panel.log_fold, panel.share])
        # the softplus above the least fold, and the logit of the share
        rise = (start[0] - LEAST_LOG_FOLD).clamp_min(0.1)
        self.start = nn.Parameter(torch.stack([torch.expm1(rise).log(), torch.logit(START_SHARE * start[1])]))
        if n_genes:
            self.of_genes = Decoder(form, form.hidden, n_genes)
            self.register_buffer("log_fractions", torch.tensor(panel.log_fractions), persistent=False)
        if panel.has_empties:
            self.of_empties = nn.Parameter(torch.zeros(2))

    def log_prior(self, prior: Prior) -> Tensor:
        """Log density of the weights by which a cell's state changes fold and log odds of its proteins."""
        sd = self.start.new_tensor([prior.fold_sd, prior.logit_sd]).repeat_interleave(self.start.shape[-1])
        return self.of_proteins.log_prior(sd)

    def fractions(self, z: Tensor, place: Tensor) -> Tensor:
        """Each gene's share of a cell's RNA, (*draw, cell, gene)."""
        return torch.softmax(self.log_fractions + self.of_genes(z, place), -1)

    def proteins(self, z: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """What the log fold is the softplus of, and the foreground's logit, (*draw, cell, protein)."""
        found = self.of_proteins(z, place).unflatten(-1, (2, -1)) + self.start
        return found[..., 0, :], found[..., 1, :]


def _start(form: Form, prior: Prior) -> tuple[dict[str, constraints.Constraint], dict[str, Tensor]]:
    """Supports of the global latents, and where they begin: the prior's centres."""
    panel = form.panel
    k, t = form.n_batches, len(panel.proteins)
    supports: dict[str, constraints.Constraint] = {}
    start: dict[str, Tensor] = {}

    def add(name: str, support: constraints.Constraint, value: Tensor) -> None:
        supports[name], start[name] = support, value

    add(
        "log_empty" if panel.has_empties else "log_ambient", constraints.real, torch.tensor(panel.log_ambient)
    )
    if panel.has_empties:
        add("log_kappa", constraints.real, torch.full((k,), prior.kappa))
        add("log_kappa_protein", constraints.real, torch.zeros(t))
    mean = math.sqrt(2 / math.pi) * prior.scatter  # of a half-normal
    add("scatter", constraints.positive, torch.full((t,), mean))
    add("droplet_scatter", constraints.positive, torch.tensor(mean))
    for kind in ("background", "foreground"):
        add(f"log_{kind}_dispersion", constraints.real, torch.full((t,), math.log(prior.protein_dispersion)))
    if form.has_efficiency:
        add("log_efficiency", constraints.real, torch.zeros(k, t))
    if form.has_rna:
        add("log_theta", constraints.real, torch.zeros(len(panel.log_fractions)))
    return supports, start
