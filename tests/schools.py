"""Eight schools (Rubin 1981, J. Educ. Stat. 6, 377), uncentred, as a template for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist

import scivi


@dataclass(frozen=True)
class Prior:
    effect_sd: float = 5.0
    spread: float = 5.0


def model(batch: Any, prior: Prior, nets: Any, *, scale: Callable[[float], Any]) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, prior.effect_sd))
    tau = pyro.sample("tau", scale(prior.spread))
    with batch.plate("school"):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        batch.observe("effect", dist.Normal(theta, batch.sd))


def schools(scale: Callable[[float], Any] = dist.HalfCauchy) -> scivi.Template:
    return scivi.Template(
        name="eight schools",
        rows="school",
        model=partial(model, scale=scale),
        prior=Prior(),
        fields={"effect": scivi.Field(("school",), role="observed"), "sd": scivi.Field(("school",))},
        dims={"mu": (), "tau": (), "theta": ("school",)},
    )
