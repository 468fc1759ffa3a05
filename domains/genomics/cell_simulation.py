"""Cells with known truth, made as the CITE-seq template says cells are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from domains.genomics.cell_networks import LEAST_LOG_FOLD
from domains.genomics.panels import Form, Prior


def simulate(
    sizes: Mapping[str, int], prior: Prior, generator: torch.Generator, *, form: Form
) -> tuple[xr.Dataset, xr.Dataset]:
    """Cells of six types, each with its own genes and proteins, and the truth behind them.

    Args:
        sizes: number of cells ("cell"), and of empty droplets ("droplet"; as many as cells if absent).
        prior: kappa and the proteins' dispersion are read.
        generator: whose seed starts numpy's.
        form: of the template.
    """
    rng = np.random.default_rng(generator.initial_seed())
    panel, n, n_types = form.panel, sizes["cell"], 6
    t, k, kind = len(panel.proteins), form.n_batches, rng.integers(0, n_types, sizes["cell"])
    isotype = np.isin(panel.proteins, panel.isotypes)
    place = rng.integers(0, k, n)
    log_ambient = np.array(panel.log_ambient) + (prior.kappa if panel.has_empties else 0.0)
    log_ambient = log_ambient + 0.3 * rng.normal(size=(k, t))
    scatter, droplet_scatter = rng.uniform(0.15, 0.4, t), rng.uniform(0.2, 0.5)
    share = np.where(isotype, 1e-3, rng.choice([0.03, 0.5, 0.97], (n_types, t)))
    log_fold = np.maximum(np.array(panel.log_fold), LEAST_LOG_FOLD) + rng.uniform(0.0, 0.5, t)
    factor = droplet_scatter * rng.normal(size=n)
    log_background = log_ambient[place] + factor[:, None] + scatter * rng.normal(size=(n, t))
    present = rng.random((n, t)) < share[kind]

    adt = _counts(rng, log_background + present * log_fold, prior.protein_dispersion)
    table: dict[str, Any] = {
        "adt": (("cell", "protein"), adt),
        "batch": (("cell",), np.array(panel.batches)[place]),
    }
    truth: dict[str, Any] = {
        "log_ambient": (("batch", "protein"), log_ambient),
        "scatter": (("protein",), scatter),
        "droplet_scatter": ((), droplet_scatter),
        "droplet_factor": (("cell",), factor),
        "log_background": (("cell", "protein"), log_background),
        "foreground": (("cell", "protein"), present.astype(float)),
    }
    if form.has_rna:
        rna, log_theta = _rna(rng, np.array(panel.log_fractions), kind, n_types)
        table["rna"], truth["log_theta"] = (("cell", "gene"), rna), (("gene",), log_theta)
    coords: dict[str, Any] = {"cell": np.arange(n), "protein": np.array(panel.proteins)}
    if panel.has_empties:
        m = sizes.get("droplet", n)
        at = rng.integers(0, k, m)
        own = rng.normal(0.0, prior.kappa_protein_sd, t)
        level = (log_ambient - prior.kappa - own)[at] + droplet_scatter * rng.normal(size=(m, 1))
        empties = _counts(rng, level + scatter * rng.normal(size=(m, t)), prior.protein_dispersion)
        table["empty_adt"] = (("droplet", "protein"), empties)
        table["empty_batch"] = (("droplet",), np.array(panel.batches)[at])
        truth |= {
            "log_empty": (("batch", "protein"), log_ambient - prior.kappa - own),
            "log_kappa": (("batch",), np.full(k, prior.kappa)),
            "log_kappa_protein": (("protein",), own),
        }
    return xr.Dataset(table, coords), xr.Dataset(truth, {**coords, "batch": np.array(panel.batches)})


def _counts(rng: np.random.Generator, log_mean: np.ndarray, dispersion: float | np.ndarray) -> np.ndarray:
    rate = np.exp(log_mean) * rng.gamma(dispersion, 1.0, log_mean.shape) / dispersion
    return rng.poisson(rate).astype(float)


def _rna(
    rng: np.random.Generator, log_fractions: np.ndarray, kind: np.ndarray, n_types: int
) -> tuple[np.ndarray, np.ndarray]:
    """RNA counts (cell, gene) of cells of these types, and the log dispersion of genes."""
    g = len(log_fractions)
    logits = log_fractions + (rng.normal(size=(n_types, g)) * (rng.random((n_types, g)) < 0.3))[kind]
    fractions = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    log_theta = rng.normal(0.5, 0.5, g)
    library = np.exp(rng.normal(math.log(20.0 * g), 0.3, (len(kind), 1)))
    return _counts(rng, np.log(library * fractions), np.exp(log_theta)), log_theta
