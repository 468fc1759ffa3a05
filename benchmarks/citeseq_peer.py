"""The peer: totalVI of scvi-tools, in the settings that it comes with. Imports nothing of ours.

20 latent dimensions, negative binomial genes, 256 hidden units, batches of 256, Adam at 4e-3, which falls on
a plateau of the validation loss; it stops when that loss has not improved for 45 epochs. Its own limit of 400
epochs is lifted, so that it always comes to that stop.

What it reports as its validation loss is no bound on the evidence. To

    -E_q[log p(x | z, l) p(y | z, b)] + KL(q(z) | p(z)) + KL(q(b | z) | p(b)),     b = log of the background

it adds, for every cell and protein, -log LogNormal(e; 0, 1) of the efficiency e of capture, which is a
parameter of the whole batch, and -.001 log of the mixture's background weight, .04 nats in all. With one
batch nothing but that term tells e from b: it begins at log e = 0, where it is .919, and falls towards its
least value, .419, at log e = -1; with 14 proteins by 7 nats in all. ``bound`` takes off .919 whatever e is,
which is in the peer's favour; ``exact_bound`` takes off what was added for e.

References:
    Gayoso et al. 2021, Nature Methods 18, 272, doi:10.1038/s41592-020-01050-x.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import scvi
import torch
from citeseq_scores import Cells
from scvi import REGISTRY_KEYS
from scvi.distributions import NegativeBinomial

NORMAL = 0.5 * np.log(2 * np.pi)  # .919
FOREGROUND_DRAWS, BACKGROUND_DRAWS = 25, 200


class Watch(lightning.Callback):
    """Seconds of training at the end of each epoch, validation left out, and the efficiencies' term then."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.added: list[float] = []
        self.spent, self.since = 0.0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the clock run."""
        self.since = time.perf_counter()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the clock."""
        self.spent += time.perf_counter() - self.since
        log_e = pl_module.module.log_per_batch_efficiency.detach()
        self.added.append(float((NORMAL + log_e + log_e.square() / 2).sum()))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Let it run on."""
        self.seconds.append(self.spent)
        self.since = time.perf_counter()


@dataclass(frozen=True)
class PeerFit:
    """A fit of totalVI.

    Args:
        model: the fitted model.
        seconds: of training until the end of each epoch.
        loss: on the validation cells, by epoch, nats per cell.
        added: what the loss holds for the efficiency, by epoch, nats per cell.
    """

    model: scvi.model.TOTALVI
    seconds: np.ndarray
    loss: np.ndarray
    added: np.ndarray

    @property
    def bound(self) -> np.ndarray:
        """Lower bound of the validation cells' evidence by epoch, with .919 for each protein taken off."""
        return -self.loss + NORMAL * self.model.summary_stats["n_proteins"]

    @property
    def exact_bound(self) -> np.ndarray:
        """The same with what was added taken off."""
        return -self.loss + self.added

    def log_likelihood(self, places: np.ndarray, draws: int) -> float:
        """Importance weighted log likelihood of cells, nats per cell.

            log p(x, y) ~ log mean_k w_k
            log w_k = log p(z) + log p(b) + log p(x | z, l) + log p(y | z, b) - log q(z | x, y) - log q(b | z)

        ``get_marginal_ll`` gives it with the sign of a likelihood. Its terms are all normalised densities:
        normals, and negative binomials with their factorials; the library l is the cell's own count. What the
        validation loss adds stands among the KL terms, which it does not use, so that nothing is to be taken
        off. It takes the mean of the minibatches' means, whatever their sizes: of 685 cells in minibatches of
        128 the last 45 count as much as any 128, which makes 8 nats here. So all cells are one minibatch.
        """
        torch.manual_seed(1)
        n = len(places)
        found = self.model.get_marginal_ll(indices=places.tolist(), n_mc_samples=draws, batch_size=n)
        return float(found)

    def foreground(self, places: np.ndarray) -> np.ndarray:
        """What it offers as the probability of the foreground: the weight decoded from z, (cell, protein)."""
        offered = self.model.get_protein_foreground_probability
        return np.asarray(offered(indices=places.tolist(), n_samples=FOREGROUND_DRAWS))

    def foreground_given_counts(self, places: np.ndarray) -> np.ndarray:
        """Probability of the foreground given the count too, which it does not offer, (cell, protein)."""
        total = np.zeros(())
        for y, of in self._decoded(places, FOREGROUND_DRAWS):
            back, fore = (
                NegativeBinomial(mu=of[rate], theta=of["r"]).log_prob(y)
                for rate in ("rate_back", "rate_fore")
            )
            total = total + torch.sigmoid(fore - back - of["mixing"]).numpy()
        return total / FOREGROUND_DRAWS

    def background(self, places: np.ndarray) -> np.ndarray:
        """Draws of the mean of the background, (draw, cell, protein)."""
        return np.stack([of["rate_back"].numpy() for _, of in self._decoded(places, BACKGROUND_DRAWS)])

    @torch.no_grad()
    def _decoded(self, places: np.ndarray, draws: int) -> Iterator[tuple[torch.Tensor, Any]]:
        """Protein counts, and what draws of the latents are decoded to, (cell, protein) each."""
        model, module = self.model, self.model.module
        assert model.adata is not None  # it was made with some
        found = model._make_data_loader(model.adata, indices=places.tolist(), batch_size=len(places))
        tensors = next(iter(found))
        for _ in range(draws):
            _, made = module.forward(tensors, compute_loss=False)
            yield tensors[REGISTRY_KEYS.PROTEIN_EXP_KEY], made["py_norm_"]

    def latent(self) -> np.ndarray:
        """Posterior means of all cells' states (cell, latent)."""
        return np.asarray(self.model.get_latent_representation())


def fit_totalvi(cells: Cells, seed: int, most_epochs: int) -> PeerFit:
    """Fit totalVI on the processor; the validation cells steer its learning rate and tell it when to stop."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = seed
    adata = cells.adata.copy()
    scvi.model.TOTALVI.setup_anndata(adata, protein_expression_obsm_key="protein_expression")
    model, watch = scvi.model.TOTALVI(adata), Watch()
    model.train(
        max_epochs=most_epochs,
        accelerator="cpu",
        external_indexing=[cells.train, cells.validation, cells.test],
        callbacks=[watch],
        enable_progress_bar=False,
    )
    assert model.history is not None  # it has been trained
    loss = model.history["elbo_validation"].to_numpy(float).ravel()
    return PeerFit(model, np.array(watch.seconds), loss, np.array(watch.added))
