"""Eleven posteriors of posteriordb as templates, and ten thousand reference draws of each, by Stan's NUTS.

    table = posteriors.read("garch-garch11", folder)    # template, data, reference

Source: Magnusson et al., posteriordb, https://github.com/stan-dev/posteriordb (BSD-3-Clause): NAME.data.json
unchanged, and NAME.draws.nc, variable "draws" with dims parameter, chain, draw. Parameters have Stan's names.
A prior that Stan leaves out is flat on the parameter's own scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.distributions import constraints
from torch import Tensor

import scivi
from scivi import Field

ONE = torch.Size()
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "posteriordb"


class Flat(dist.TorchDistribution):
    """No prior: density 1 on the support. What is drawn is wide, as a prior that says nothing would be."""

    arg_constraints: Mapping[str, Any] = {}

    support: Any = constraints.real

    def __init__(self, *shape: int, positive: bool = False) -> None:
        self.positive = positive
        kind = constraints.positive if positive else constraints.real
        self.support = constraints.independent(kind, len(shape)) if shape else kind
        super().__init__(event_shape=torch.Size(shape), validate_args=False)

    def sample(self, sample_shape: torch.Size = ONE) -> Tensor:
        """Any values."""
        value = torch.randn(sample_shape + self.event_shape)
        return (15 * value).exp() if self.positive else 1e7 * value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        return torch.zeros_like(value) if not self.event_shape else torch.zeros_like(value[..., 0])


class Sorted(dist.TorchDistribution):
    """Independent normals, of which only increasing values are taken."""

    arg_constraints: Mapping[str, Any] = {}
    support: Any = constraints.ordered_vector

    def __init__(self, mean: Tensor, sd: float, support: Any) -> None:
        self.normal, self.support = dist.Normal(mean, sd).to_event(1), support
        super().__init__(event_shape=mean.shape, validate_args=False)

    def sample(self, sample_shape: torch.Size = ONE) -> Tensor:
        """Any values."""
        return self.normal.sample(sample_shape).abs().sort(-1).values

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        return self.normal.log_prob(value)


class Hidden(dist.TorchDistribution):
    """A series (T,) whose hidden states are summed out; the first state has no weight.

    Args:
        transition: log chances, from a state to a state, (..., K, K).
        emission: normal of unit variance around (..., K).
    """

    arg_constraints: Mapping[str, Any] = {}
    support: Any = constraints.real_vector

    def __init__(self, transition: Tensor, emission: Tensor, length: int) -> None:
        self.transition, self.emission = transition, emission
        super().__init__(transition.shape[:-2], torch.Size([length]), validate_args=False)

    def sample(self, sample_shape: torch.Size = ONE) -> Tensor:
        """Any values."""
        return torch.randn(sample_shape + self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        seen = dist.Normal(self.emission.unsqueeze(-2), 1.0).log_prob(value.unsqueeze(-1))  # (..., T, K)
        steps = self.transition.unsqueeze(-3) + seen[..., 1:, None, :]  # (..., T - 1, K, K)
        while steps.shape[-3] > 1:
            even = steps[..., : steps.shape[-3] // 2 * 2, :, :]
            left, right = even[..., ::2, :, :].unsqueeze(-1), even[..., 1::2, :, :].unsqueeze(-3)
            rest = steps[..., even.shape[-3] :, :, :]
            steps = torch.cat([torch.logsumexp(left + right, -2), rest], -3)
        return torch.logsumexp(seen[..., 0, :, None] + steps[..., 0, :, :], (-2, -1))


def linear(batch: Any, prior: Any, nets: Any) -> None:
    """Linear regression: y ~ normal(X beta, sigma)."""
    beta = pyro.sample("beta", Flat(batch.x.shape[-1]))
    sigma = pyro.sample("sigma", Flat(positive=True))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(_times(batch.x, beta), sigma))


def kidscore(batch: Any, prior: Any, nets: Any) -> None:
    """The same with a prior of sigma."""
    beta = pyro.sample("beta", Flat(batch.x.shape[-1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(_times(batch.x, beta), sigma))


def autoregression(batch: Any, prior: Any, nets: Any) -> None:
    """Of order K: y_t ~ normal(alpha + sum_k beta_k y_{t-k}, sigma)."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(batch.x.shape[-1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(alpha + _times(batch.x, beta), sigma))


def diamonds(batch: Any, prior: Any, nets: Any) -> None:
    """Linear regression on centred X: y ~ normal(intercept + X b, sigma)."""
    b = pyro.sample("b", dist.Normal(torch.zeros(batch.x.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(intercept + _times(batch.x, b), sigma))


def schools(batch: Any, prior: Any, nets: Any) -> None:
    """Not centred: theta = mu + tau z; y ~ normal(theta, sd)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with batch.plate("row"):
        theta = pyro.deterministic("theta", mu + tau * pyro.sample("z", dist.Normal(0.0, 1.0)))
        batch.observe("y", dist.Normal(theta, batch.sd))


def garch(batch: Any, prior: Any, nets: Any) -> None:
    """Order (1, 1): s_t^2 = alpha0 + alpha1 (y_{t-1} - mu)^2 + beta1 s_{t-1}^2, beta1 < 1 - alpha1."""
    mu = pyro.sample("mu", Flat())
    alpha0 = pyro.sample("alpha0", Flat(positive=True))
    alpha1 = pyro.sample("alpha1", dist.Beta(1.0, 2.0))  # what is left for beta1 is its density
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * pyro.sample("share", dist.Uniform(0.0, 1.0)))
    mu, alpha0, alpha1, beta1 = map(torch.atleast_1d, (mu, alpha0, alpha1, beta1))  # (..., 1)
    new = alpha0 + alpha1 * (batch.y[:-1] - mu).square()
    variance = torch.cat([(batch.sigma1[:1].square() + 0.0 * mu), new], -1)
    for k in range(len(batch.y).bit_length()):  # v_t = new_t + beta1 v_{t-1}, twice as far back each time
        before = torch.zeros_like(variance[..., : 2**k])
        variance = variance + beta1 ** (2**k) * torch.cat([before, variance[..., : -(2**k)]], -1)
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, variance.sqrt()))


def gaussian_process(batch: Any, prior: Any, nets: Any) -> None:
    """Squared exponential: y ~ normal(0, alpha^2 exp(-(x - x')^2 / (2 rho^2)) + sigma I)."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    rho, alpha, sigma = (v[..., None, None] for v in (rho, alpha, sigma))
    away = batch.x.unsqueeze(-1) - batch.x.unsqueeze(-2)
    covariance = alpha**2 * (-(away**2) / (2 * rho**2)).exp() + sigma * torch.eye(batch.x.shape[-1]).to(away)
    with batch.plate("row"):
        batch.observe("y", dist.MultivariateNormal(torch.zeros_like(batch.x), covariance))


def mixture(batch: Any, prior: Any, nets: Any) -> None:
    """Of two normals: theta normal(mu1, sigma1) + (1 - theta) normal(mu2, sigma2), mu1 < mu2."""
    mu = pyro.sample("mu", Sorted(torch.zeros(2), 2.0, constraints.ordered_vector))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    chances = torch.stack(torch.broadcast_tensors(theta, 1 - theta), -1)
    with batch.plate("row"):
        parts = dist.Normal(mu, sigma)
        batch.observe("y", dist.MixtureSameFamily(dist.Categorical(chances), parts))


def hidden_states(batch: Any, prior: Any, nets: Any) -> None:
    """Two states with normal emissions of unit variance, summed out."""
    mu = pyro.sample("mu", Sorted(torch.tensor([3.0, 10.0]), 1.0, constraints.positive_ordered_vector))
    rows = [pyro.sample(f"theta{k}", dist.Dirichlet(torch.ones(2))) for k in (1, 2)]
    transition = torch.stack(torch.broadcast_tensors(*rows), -2).log()
    with batch.plate("row"):
        batch.observe("y", Hidden(transition, mu, batch.y.shape[-1]))


def _times(x: Tensor, b: Tensor) -> Tensor:
    """X b, with draws of b in front: (..., row)."""
    found = b.to(x) @ x.mT  # what `Flat` draws is of single precision
    return found.squeeze(-2) if b.dim() > 1 else found


class Posterior(NamedTuple):
    """One of them.

    Args:
        template: with a flat prior where Stan has none.
        data: for it.
        reference: draws (parameter, chain, draw), Stan's names.
    """

    template: scivi.Template
    data: dict[str, Any]
    reference: xr.DataArray


def _age(d: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [d["age_discrete"] == k for k in (2, 3, 4)]


SIZES = ("diam1", "diam2", "canopy_height", "total_height", "density")
# of each: model, names of what is reported with an axis of its own, and data by field from Stan's
Told = tuple[Callable[..., None], tuple[str, ...], tuple[str, ...], Callable[[Any], dict[str, Any]]]
OF: Mapping[str, Told] = {
    "eight_schools-eight_schools_noncentered": (
        schools, ("mu", "tau"), ("theta",), lambda d: {"y": d["y"], "sd": d["sigma"]},
    ),
    "kidiq-kidscore_interaction": (
        kidscore, ("sigma",), ("beta",),
        lambda d: {"y": d["kid_score"], "x": [1, d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"]]},
    ),
    "arK-arK": (
        autoregression, ("alpha", "sigma"), ("beta",),
        lambda d: {"y": d["y"][5:], "x": [d["y"][5 - k : -k] for k in range(1, 6)]},
    ),
    "garch-garch11": (
        garch, ("mu", "alpha0", "alpha1", "beta1"), (),
        lambda d: {"y": d["y"], "sigma1": np.full(len(d["y"]), d["sigma1"])},
    ),
    "gp_pois_regr-gp_regr": (
        gaussian_process, ("rho", "alpha", "sigma"), (), lambda d: {"y": d["y"][None], "x": d["x"][None]},
    ),
    "low_dim_gauss_mix-low_dim_gauss_mix": (mixture, ("theta",), ("mu", "sigma"), lambda d: {"y": d["y"]}),
    "hmm_example-hmm_example": (
        hidden_states, (), ("theta1", "theta2", "mu"), lambda d: {"y": d["y"][None]},
    ),
    "diamonds-diamonds": (
        diamonds, ("Intercept", "sigma"), ("b",),
        lambda d: {"y": d["Y"], "x": (d["X"] - d["X"].mean(0)).T[1:]},
    ),
    "nes1980-nes": (
        linear, ("sigma",), ("beta",),
        lambda d: {
            "y": d["partyid7"],
            "x": [1, d["real_ideo"], d["race_adj"], *_age(d), d["educ1"], d["gender"], d["income"]],
        },
    ),
    "mesquite-logmesquite": (
        linear, ("sigma",), ("beta",),
        lambda d: {
            "y": np.log(d["weight"]),
            "x": [1, *(np.log(d[k]) for k in SIZES), d["group"]],
        },
    ),
    "earnings-earn_height": (
        linear, ("sigma",), ("beta",), lambda d: {"y": d["earn"], "x": [1, d["height"]]},
    ),
}  # fmt: skip


def read(name: str, folder: Path = FOLDER) -> Posterior:
    """One posterior of a folder."""
    model, scalars, vectors, of = OF[name]
    told = json.loads((folder / f"{name}.data.json").read_text())
    data = of({k: np.asarray(v, float) if isinstance(v, list) else v for k, v in told.items()})
    data["y"] = np.asarray(data["y"], float)
    whole = data["y"].ndim > 1  # one observation of many numbers
    if "x" in data and not whole:
        data["x"] = np.stack([np.broadcast_to(np.asarray(c, float), data["y"].shape) for c in data["x"]], -1)
    dims = {key: ("row", "entry") if np.ndim(v) > 1 else ("row",) for key, v in data.items()}
    fields = {key: Field(d, role="observed" if key == "y" else "given") for key, d in dims.items()}
    reported: dict[str, tuple[str, ...]] = dict.fromkeys(scalars, ())
    reported |= {key: ("row",) if key == "theta" else (f"of {key}",) for key in vectors}
    with xr.open_dataset(folder / f"{name}.draws.nc", engine="h5netcdf") as held:
        reference = held["draws"].load()
    at = reference["parameter"].values.tolist()
    sizes = {f"of {key}": sum(n.startswith(f"{key}[") for n in at) for key in vectors if key != "theta"}
    template = scivi.Template(
        name=name, rows="row", model=model, fields=fields, dims=reported, sizes=sizes, guide="auto"
    )
    return Posterior(template, data, reference)


def draws_of(tree: xr.DataTree, parameters: list[str]) -> np.ndarray:
    """Draws (parameter, draw) of a tree, under Stan's names."""
    posterior, found = tree["posterior"].to_dataset(), []
    for parameter in parameters:
        name, _, place = parameter.partition("[")
        values = posterior[name].stack(sample=("chain", "draw")).transpose(..., "sample").values
        found.append(values[int(place[:-1]) - 1] if place else values)
    return np.stack(found)
