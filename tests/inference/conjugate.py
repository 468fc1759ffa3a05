"""Normal models whose evidence, posterior and bounds are known, as templates with guides that can be exact.

Rows y_i ~ N(z_i, NOISE), z_i ~ N(mu, SPREAD), mu ~ N(0, PRIOR); without local latents y_i ~ N(mu, NOISE).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from scivi.inference.plan import Plan
from scivi.inputs.batches import Batch, chunks
from scivi.inputs.fields import Field
from scivi.inputs.sources import open_source
from scivi.models.binding import Bound, bind
from scivi.models.guides import global_normal
from scivi.models.template import Template

PRIOR, SPREAD, NOISE = 2.0, 0.8, 0.6
FIELDS = {"y": Field(("row",), "observed")}


class Shared(nn.Module):
    """A normal factor for mu: ``loc`` and ``log_scale``."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))


def shared_model(batch: Batch, prior: Any, nets: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), PRIOR))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, NOISE))


def shared_guide(batch: Batch, prior: Any, nets: Any) -> None:
    pyro.sample("mu", dist.Normal(nets.loc, nets.log_scale.exp()))


shared = Template(
    name="shared mean", fields=FIELDS, rows="row", model=shared_model, guide=shared_guide,
    nets=lambda sizes, prior: Shared(), dims={"mu": ()},
)  # fmt: skip


class Amortised(nn.Module):
    """mu in a joint normal; z_i ~ N(on_y y_i + on_mu mu + shift, exp(log_sd))."""

    def __init__(self, on_y: float, on_mu: float, shift: float, log_sd: float) -> None:
        super().__init__()
        self.globals = global_normal({"mu": constraints.real}, {"mu": torch.tensor(0.0)}, scale=0.5)
        self.on_y, self.on_mu = nn.Parameter(torch.tensor(on_y)), nn.Parameter(torch.tensor(on_mu))
        self.shift, self.log_sd = nn.Parameter(torch.tensor(shift)), nn.Parameter(torch.tensor(log_sd))


SHRINK = SPREAD**2 / (SPREAD**2 + NOISE**2)  # weight of y_i in the posterior mean of z_i given mu
ROW_SD = SPREAD * NOISE / (SPREAD**2 + NOISE**2) ** 0.5  # its sd
EXACT = (SHRINK, 1 - SHRINK, 0.0, float(np.log(ROW_SD)))
OFF = (0.5, 0.3, 0.1, float(np.log(0.7)))  # a guide that is wrong in every coefficient


def hierarchy_model(batch: Batch, prior: Any, nets: Any) -> None:
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), PRIOR))
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(mu, SPREAD))
        batch.observe("y", dist.Normal(z, NOISE))


def hierarchy_guide(batch: Batch, prior: Any, nets: Any) -> None:
    mu = nets.globals(batch)["mu"]
    with batch.plate("row"):
        pyro.sample("z", dist.Normal(nets.on_y * batch.y + nets.on_mu * mu + nets.shift, nets.log_sd.exp()))


def hierarchy(coefficients: tuple[float, float, float, float] = EXACT) -> Template:
    return Template(
        name="hierarchy", fields=FIELDS, rows="row", model=hierarchy_model, guide=hierarchy_guide,
        nets=lambda sizes, prior: Amortised(*coefficients), dims={"mu": (), "z": ("row",)},
    )  # fmt: skip


def rows(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"y": 1.0 + rng.normal(size=n) * (SPREAD**2 + NOISE**2) ** 0.5}


def whole(template: Template, data: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> Batch:
    source = open_source(data, template.fields, template.row_dims)
    return next(chunks(source, template.fields, template.row_dims, 10**6, torch.device("cpu"), dtype))


def some_rows(batch: Batch, index: list[int]) -> Batch:
    chosen = torch.tensor(index)
    values = {name: value[chosen] for name, value in batch.values.items()}
    return Batch(values, {}, batch.sizes, batch.rows, {"row": chosen})


def bound_to(template: Template, batch: Batch) -> Bound:
    return bind(template, batch, seed=0)


def plan(**knobs: Any) -> Plan:
    return Plan(
        **{
            "dtype": "float64",
            "rows_per_batch": None,
            "newton": False,
            "compile": "off",
            "stop": None,
            **knobs,
        }
    )


def posterior_of_mu(y: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of mu given rows with y_i ~ N(mu, variance spread**2 + NOISE**2)."""
    variance = spread**2 + NOISE**2
    precision = 1 / PRIOR**2 + len(y) / variance
    return y.sum() / variance / precision, y.new_tensor(1 / precision)


def log_evidence(y: Tensor, spread: float) -> Tensor:
    """Log density of y ~ N(0, a 11' + b I), whose determinant is b**(n - 1) (b + n a)."""
    n, a, b = len(y), PRIOR**2, spread**2 + NOISE**2
    square = (y.square().sum() - a * y.sum() ** 2 / (b + n * a)) / b
    return -0.5 * (square + (n - 1) * np.log(b) + np.log(b + n * a) + n * np.log(2 * np.pi))


def expected_log_normal(mean: Tensor, variance: Tensor, sd: float) -> Tensor:
    """E log N(x | 0, sd) for x of this mean and variance."""
    return -0.5 * (mean**2 + variance) / sd**2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


def entropy(log_sd: Tensor) -> Tensor:
    return log_sd + 0.5 * np.log(2 * np.pi * np.e)


def elbo_of_shared(y: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    variance = (2 * log_scale).exp()
    data = expected_log_normal(y - loc, variance, NOISE).sum()
    return data + expected_log_normal(loc, variance, PRIOR) + entropy(log_scale)


def parameters_of(bound: Bound) -> dict[str, Tensor]:
    """The hierarchy's parameters under the names of ``elbo_of_hierarchy``."""
    nets: Any = bound.nets.own
    return {
        "loc": nets.globals.loc, "log_scale": nets.globals.log_diag, "on_y": nets.on_y,
        "on_mu": nets.on_mu, "shift": nets.shift, "log_sd": nets.log_sd,
    }  # fmt: skip


def elbo_of_hierarchy(
    y: Tensor, loc: Tensor, log_scale: Tensor, on_y: Tensor, on_mu: Tensor, shift: Tensor, log_sd: Tensor
) -> Tensor:
    v, sd2 = (2 * log_scale).exp(), (2 * log_sd).exp()
    local = on_y * y + shift
    data = expected_log_normal(y - local - on_mu * loc, on_mu**2 * v + sd2, NOISE)
    scatter = expected_log_normal(local + (on_mu - 1) * loc, (on_mu - 1) ** 2 * v + sd2, SPREAD)
    rows = (data + scatter + entropy(log_sd)).sum()
    return (rows + expected_log_normal(loc, v, PRIOR) + entropy(log_scale)).sum()


def make_exact(bound: Bound, y: Tensor) -> None:
    """Give the guide of either template the exact posterior of mu."""
    nets: Any = bound.nets.own
    mean, variance = posterior_of_mu(y, SPREAD if isinstance(nets, Amortised) else 0.0)
    with torch.no_grad():
        if isinstance(nets, Amortised):
            nets.globals.set(mean.reshape(1), variance.reshape(1, 1))
        else:
            nets.loc.copy_(mean), nets.log_scale.copy_(variance.sqrt().log())
