"""The photon template fitted by SciVI, in the oracle's terms: a table, a fit, the guide at fixed globals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from photons_oracle import Catalogue, Prior
from photons_scores import GuideOf
from pyro import poutine
from record import use_threads as use_threads  # the other photon benchmarks take both from here
from record import write_json as write_json
from torch import Tensor

import scivi
from domains.astrophysics import photons
from scivi.inference.opening import open_data
from scivi.inputs.batches import Batch, chunks


def prior() -> Prior:
    """The template's prior, as the oracle writes it."""
    own = photons.template.prior
    if own.brightness_mean or own.background_mean:
        raise ValueError("the oracle's prior has its means at zero; the template's has not.")
    return Prior(own.brightness_sd, own.scatter, own.background_sd, own.background_scatter)


def table_of(rows: Catalogue) -> xr.Dataset:
    """The sources as the template's table, dims (source, band), one band."""
    columns = {
        "n_on": rows.n_on,
        "n_off": rows.n_off,
        "alpha": rows.log_alpha.exp(),
        "exposure": rows.log_exposure.exp(),
    }
    return xr.Dataset(
        {name: (("source", "band"), column[:, None].numpy()) for name, column in columns.items()},
        {"source": rows.row.numpy(), "band": ["broad"]},
    )


def fit_scivi(rows: Catalogue, seed: int, steps: int | None = None, **knobs: Any) -> scivi.Fit:
    """Fit the template as a user would, with the default plan but for what is given."""
    plan = scivi.Plan(seed=seed, **({} if steps is None else {"steps": steps}), **knobs)
    return scivi.fit(photons.template, table_of(rows), plan)


def globals_of(fit: scivi.Fit) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the guide's globals, in the oracle's coordinates, dims (4,)."""
    normal = fit.nets.own.globals
    with torch.no_grad():
        return normal.loc.double(), normal.scale_tril.double().square().sum(1).sqrt()


@dataclass(frozen=True)
class FittedGuide:
    """The guide of a fit for some rows, at fixed globals."""

    fit: scivi.Fit
    batch: Batch
    theta: Tensor

    def log_density(self, u: Tensor, v: Tensor) -> Tensor:
        """Log q(u, v), dims (source, point)."""
        sites = self._sites({"log_brightness": u.T[..., None], "log_background": v.T[..., None]})
        return sum(
            sites[name]["fn"].log_prob(sites[name]["value"]) for name in ("log_brightness", "log_background")
        ).T

    def sample(self, draws: int) -> Tensor:
        """Draws of u, dims (draw, source)."""
        with torch.no_grad():
            return self._sites({})["log_brightness"]["fn"].sample((draws,))[..., 0]

    def _sites(self, given: dict[str, Tensor]) -> dict[str, dict]:
        """Run the guide with some of its sites held at float32 values."""
        nets = self.fit.nets.own
        held = {nets.globals.name: self.theta, **given}
        held = {name: value.to(self.batch.alpha.dtype) for name, value in held.items()}
        guide = poutine.trace(poutine.condition(self.fit.template.guide, data=held))
        with torch.no_grad():
            return guide.get_trace(self.batch, self.fit.template.prior, nets).nodes


def guide_of(fit: scivi.Fit, theta: Tensor) -> GuideOf:
    """Make the guide of any rows at globals theta, in the coordinates and order of the oracle."""

    def of(rows: Catalogue) -> FittedGuide:
        source = open_data(fit.template, table_of(rows))
        whole = chunks(
            source, fit.template.fields, fit.template.row_dims, len(rows), torch.device("cpu"), torch.float32
        )
        return FittedGuide(fit, next(whole), theta)

    return of
