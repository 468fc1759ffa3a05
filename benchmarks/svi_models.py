"""Five models, each as a SciVI template, as Pyro takes it and as NumPyro does: the same maths three times.

photons: brightness of 256 stars from counts in 16 bands, amortised normal of log brightness.
totalvi: 256 cells, 2000 genes and 15 proteins, a variational autoencoder with two hidden layers of 256.
logistic, lowrank: regression of 1000 rows on 24 features, its scale learnt; mean field, and rank 5.
schools: the eight schools of Rubin (1981), uncentred; mean field.

All rows enter at every step. Learnt scales are exponentials in all three. Pyro and NumPyro have the negative
binomial as scvi-tools writes it, with log gammas and 1e-8 added to the means; SciVI has that of
``scivi.models.counts``.

Longer than 400 lines because each model stands beside its two twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
import xarray as xr
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from scivi.inference.state import State
from scivi.models import Batch, Field, JointNormal, MeanField, Template
from scivi.models.counts import NegativeBinomialMean, NegativeBinomialMixture

COUNTS = constraints.nonnegative_integer
RANK = 5


@dataclass(frozen=True)
class Case:
    """One model three times, and its data.

    Args:
        template, table: SciVI's.
        of_pyro: from a state of SciVI's fit to Pyro's model, guide and arguments, at the same parameters.
        of_numpyro: the same for NumPyro.
    """

    template: Template
    table: xr.Dataset
    of_pyro: Callable[[State], tuple[Any, Any, tuple[Tensor, ...]]]
    of_numpyro: Callable[[State], tuple[Any, Any, tuple[Any, ...]]]


def arrays(state: State) -> dict[str, Any]:
    """The nets' parameters by name, as arrays of JAX; weights of linear layers as (inputs, outputs)."""
    import jax.numpy as jnp

    named = _own(state).named_parameters()
    return {k: jnp.array((v.T if v.dim() == 2 else v).detach().numpy()) for k, v in named}


def _own(state: State) -> Any:
    return state.bound.nets.own


def on_jax(case_args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Tensors as arrays of JAX."""
    import jax.numpy as jnp

    return tuple(jnp.array(x.numpy()) for x in case_args)


# Photon counts of stars


class StarNets(nn.Module):
    """Encoder of counts, and the population: mean and log sd of log brightness, log background by band."""

    def __init__(self, bands: int, width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(bands, width), nn.Linear(width, width)
        self.place, self.width = nn.Linear(width, 1), nn.Linear(width, 1)
        self.mean, self.log_sd = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.log_background = nn.Parameter(torch.full((bands,), 0.5).log())

    def encode(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Place and width of the log brightness, (star,) each."""
        hidden = F.relu(self.second(F.relu(self.first(torch.log1p(counts)))))
        return self.place(hidden).squeeze(-1), F.softplus(self.width(hidden)).squeeze(-1) + 1e-3


def photons(n: int = 256, bands: int = 16) -> Case:
    """Counts ~ Poisson(brightness exposure + background), brightness ~ LogNormal."""
    generator = torch.Generator().manual_seed(0)
    brightness = torch.exp(1.5 + 0.8 * torch.randn(n, generator=generator))
    exposure = torch.linspace(0.5, 2, bands)
    counts = torch.poisson(brightness[:, None] * exposure + 0.7, generator=generator)

    def model(batch: Batch, prior: Any, nets: StarNets) -> None:
        with batch.plate("star"):
            b = pyro.sample("brightness", dist.LogNormal(nets.mean, nets.log_sd.exp()))
            rate = b.unsqueeze(-1) * batch.exposure + nets.log_background.exp()
            batch.observe("counts", dist.Poisson(rate).to_event(1))

    def guide(batch: Batch, prior: Any, nets: StarNets) -> None:
        with batch.plate("star"):
            pyro.sample("brightness", dist.LogNormal(*nets.encode(batch.counts)))

    template = Template(
        name="benchmark photons",
        fields={
            "counts": Field(("star", "band"), role="observed", support=COUNTS),
            "exposure": Field(("band",), support=constraints.positive),
        },
        rows="star",
        model=model,
        guide=guide,
        nets=lambda sizes, prior: StarNets(sizes["band"]),
        dims={"brightness": ("star",)},
    )
    table = xr.Dataset({"counts": (("star", "band"), counts.numpy()), "exposure": ("band", exposure.numpy())})

    def of_pyro(state: State) -> tuple[Any, Any, tuple[Tensor, ...]]:
        encoder = StarNets(bands)
        encoder.load_state_dict(_own(state).state_dict())
        start = {k: v.detach().clone() for k, v in encoder.named_parameters()}
        for name in ("mean", "log_sd", "log_background"):
            delattr(encoder, name)

        def model(counts: Tensor, exposure: Tensor) -> None:
            mean = pyro.param("mean", start["mean"])
            sd = pyro.param("sd", start["log_sd"].exp(), constraint=constraints.positive)
            background = pyro.param(
                "background", start["log_background"].exp(), constraint=constraints.positive
            )
            with pyro.plate("star", n):
                b = pyro.sample("brightness", dist.LogNormal(mean, sd))
                rate = b.unsqueeze(-1) * exposure + background
                pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)

        def guide(counts: Tensor, exposure: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("star", n):
                pyro.sample("brightness", dist.LogNormal(*encoder.encode(counts)))

        return model, guide, (counts, exposure)

    def of_numpyro(state: State) -> tuple[Any, Any, tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd

        start, softplus = arrays(state), cast(Any, jax.nn.softplus)

        def dense(name: str, x: Any) -> Any:
            return x @ numpyro.param(f"{name}.weight", start[f"{name}.weight"]) + numpyro.param(
                f"{name}.bias", start[f"{name}.bias"]
            )

        def positive(name: str) -> Any:
            return numpyro.param(name, jnp.exp(start[name]), constraint=npd.constraints.positive)

        def model(counts: Any, exposure: Any) -> None:
            mean = numpyro.param("mean", start["mean"])
            sd, background = positive("log_sd"), positive("log_background")
            with numpyro.plate("star", n):
                b: Any = numpyro.sample("brightness", npd.LogNormal(mean, sd))
                rate = b[:, None] * exposure + background
                numpyro.sample("counts", npd.Poisson(rate).to_event(1), obs=counts)

        def guide(counts: Any, exposure: Any) -> None:
            hidden = jax.nn.relu(dense("first", jnp.log1p(counts)))
            hidden = jax.nn.relu(dense("second", hidden))
            place, width = dense("place", hidden)[:, 0], softplus(dense("width", hidden))[:, 0]
            with numpyro.plate("star", n):
                numpyro.sample("brightness", npd.LogNormal(place, width + 1e-3))

        return model, guide, on_jax((counts, exposure))

    return Case(template, table, of_pyro, of_numpyro)


# Cells with genes and proteins


class LogGammaNegativeBinomial(dist.TorchDistribution):
    """The negative binomial by its mean, as scvi-tools writes it."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support: ClassVar[constraints.Constraint] = COUNTS  # type: ignore[assignment]

    def __init__(self, mean: Tensor, theta: Tensor) -> None:
        self.mean_, self.theta = mean, theta
        super().__init__(torch.broadcast_shapes(mean.shape, theta.shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts."""
        return log_gamma_density(value, self.mean_, self.theta)


class LogGammaMixture(dist.TorchDistribution):
    """The mixture of two of them, as scvi-tools writes it."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support: ClassVar[constraints.Constraint] = COUNTS  # type: ignore[assignment]

    def __init__(self, background: Tensor, foreground: Tensor, theta: Tensor, logits: Tensor) -> None:
        self.parts = background, foreground, theta, logits
        super().__init__(logits.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of counts."""
        background, foreground, theta, logits = self.parts
        first = log_gamma_density(value, background, theta) - F.softplus(-logits)
        second = log_gamma_density(value, foreground, theta) - logits - F.softplus(-logits)
        return torch.logaddexp(first, second)


def log_gamma_density(value: Tensor, mean: Tensor, theta: Tensor, eps: float = 1e-8) -> Tensor:
    """Log density of the negative binomial by log gammas (scvi-tools, ``log_nb_positive``)."""
    log_both = torch.log(theta + mean + eps)
    return (
        theta * (torch.log(theta + eps) - log_both)
        + value * (torch.log(mean + eps) - log_both)
        + torch.lgamma(value + theta)
        - torch.lgamma(theta)
        - torch.lgamma(value + 1)
    )


class CellNets(nn.Module):
    """Encoder, decoder and what all cells share."""

    def __init__(self, genes: int, proteins: int, latent: int = 20, width: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(genes + proteins, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.ReLU(),
        )
        self.place, self.spread = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.LayerNorm(width), nn.ReLU())
        self.genes, self.fold = nn.Linear(width, genes), nn.Linear(width, proteins)
        self.low, self.low_spread = nn.Linear(width, proteins), nn.Linear(width, proteins)
        self.mixing, self.latent = nn.Linear(width, proteins), latent
        self.log_theta = nn.Parameter(torch.zeros(genes))
        self.log_theta_protein = nn.Parameter(torch.zeros(proteins))
        self.low_mean, self.low_log_sd = (nn.Parameter(torch.zeros(proteins)) for _ in range(2))

    def encode(self, rna: Tensor, protein: Tensor) -> tuple[Tensor, Tensor]:
        """Place and width of z, (cell, latent) each."""
        hidden = self.encoder(torch.cat([torch.log1p(rna), torch.log1p(protein)], -1))
        return self.place(hidden), F.softplus(self.spread(hidden)) + 1e-4

    def encode_low(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Place and width of the log background, (cell, protein) each."""
        hidden = self.decoder(z)
        return self.low(hidden), F.softplus(self.low_spread(hidden)) + 1e-4

    def decode(self, z: Tensor, rna: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of genes; foreground and mixing logits of proteins."""
        hidden = self.decoder(z)
        mean = rna.sum(-1, keepdim=True) * torch.softmax(self.genes(hidden), -1)
        return mean, low * (1 + 1e-3 + F.softplus(self.fold(hidden))), self.mixing(hidden)


SHARED = ("log_theta", "log_theta_protein", "low_mean", "low_log_sd")


def totalvi(n: int = 256, genes: int = 2000, proteins: int = 15, latent: int = 20) -> Case:
    """Genes ~ NB(library softmax(decoder(z)), theta), proteins ~ NB mixture over a background."""
    generator = np.random.default_rng(0)
    rate = generator.gamma(0.12, 1.2, (n, genes))
    rna = torch.tensor(generator.poisson(rate), dtype=torch.float32)
    protein = torch.tensor(generator.poisson(5 + 20 * generator.random((n, proteins))), dtype=torch.float32)

    def model(batch: Batch, prior: Any, nets: CellNets) -> None:
        with batch.plate("cell"):
            z = pyro.sample("z", dist.Normal(batch.rna.new_zeros(nets.latent), 1.0).to_event(1))
            low = dist.LogNormal(nets.low_mean, nets.low_log_sd.exp()).to_event(1)
            low = pyro.sample("low", low)
            mean, high, logits = nets.decode(z, batch.rna, low)
            batch.observe("rna", NegativeBinomialMean(mean, nets.log_theta.exp()).to_event(1))
            mixture = NegativeBinomialMixture(low, high, nets.log_theta_protein.exp(), logits)
            batch.observe("adt", mixture.to_event(1))

    def guide(batch: Batch, prior: Any, nets: CellNets) -> None:
        with batch.plate("cell"):
            z = pyro.sample("z", dist.Normal(*nets.encode(batch.rna, batch.adt)).to_event(1))
            pyro.sample("low", dist.LogNormal(*nets.encode_low(z)).to_event(1))

    template = Template(
        name="benchmark totalvi",
        fields={
            "rna": Field(("cell", "gene"), role="observed", support=COUNTS),
            "adt": Field(("cell", "protein"), role="observed", support=COUNTS),
        },
        rows="cell",
        model=model,
        guide=guide,
        nets=lambda sizes, prior: CellNets(sizes["gene"], sizes["protein"], sizes["latent"]),
        dims={"z": ("cell", "latent"), "low": ("cell", "protein")},
        sizes={"latent": latent},
    )
    table = xr.Dataset(
        {"rna": (("cell", "gene"), rna.numpy()), "adt": (("cell", "protein"), protein.numpy())}
    )

    def of_pyro(state: State) -> tuple[Any, Any, tuple[Tensor, ...]]:
        nets = CellNets(genes, proteins, latent)
        nets.load_state_dict(_own(state).state_dict())
        start = {k: v.detach().clone() for k, v in nets.named_parameters() if k in SHARED}
        for name in SHARED:
            delattr(nets, name)

        def positive(name: str) -> Tensor:
            return pyro.param(name, start[name].exp(), constraint=constraints.positive)

        def model(rna: Tensor, protein: Tensor) -> None:
            pyro.module("nets", nets)
            theta, theta_protein = positive("log_theta"), positive("log_theta_protein")
            low_mean, low_sd = pyro.param("low_mean", start["low_mean"]), positive("low_log_sd")
            with pyro.plate("cell", n):
                z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
                low = pyro.sample("low", dist.LogNormal(low_mean, low_sd).to_event(1))
                mean, high, logits = nets.decode(z, rna, low)
                pyro.sample("rna", LogGammaNegativeBinomial(mean, theta).to_event(1), obs=rna)
                mixture = LogGammaMixture(low, high, theta_protein, logits)
                pyro.sample("protein", mixture.to_event(1), obs=protein)

        def guide(rna: Tensor, protein: Tensor) -> None:
            pyro.module("nets", nets)
            with pyro.plate("cell", n):
                z = pyro.sample("z", dist.Normal(*nets.encode(rna, protein)).to_event(1))
                pyro.sample("low", dist.LogNormal(*nets.encode_low(z)).to_event(1))

        return model, guide, (rna, protein)

    def of_numpyro(state: State) -> tuple[Any, Any, tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd
        from jax.scipy.special import gammaln

        start = arrays(state)

        def param(name: str) -> Any:
            return numpyro.param(name, start[name])

        def positive(name: str) -> Any:
            return numpyro.param(name, jnp.exp(start[name]), constraint=npd.constraints.positive)

        def dense(name: str, x: Any) -> Any:
            return x @ param(f"{name}.weight") + param(f"{name}.bias")

        def normed(name: str, x: Any) -> Any:
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            return jax.nn.relu(x * param(f"{name}.weight") + param(f"{name}.bias"))

        def decoded(z: Any) -> Any:
            return normed("decoder.1", dense("decoder.0", z))

        def density(x: Any, mean: Any, theta: Any, eps: float = 1e-8) -> Any:
            log_both = jnp.log(theta + mean + eps)
            value = theta * (jnp.log(theta + eps) - log_both) + x * (jnp.log(mean + eps) - log_both)
            return value + gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)

        def model(rna: Any, protein: Any) -> None:
            theta, theta_protein = positive("log_theta"), positive("log_theta_protein")
            low_mean, low_sd = param("low_mean"), positive("low_log_sd")
            with numpyro.plate("cell", n):
                z = numpyro.sample("z", npd.Normal(jnp.zeros(latent), 1.0).to_event(1))
                low = numpyro.sample("low", npd.LogNormal(low_mean, low_sd).to_event(1))
                hidden = decoded(z)
                mean = rna.sum(-1, keepdims=True) * jax.nn.softmax(dense("genes", hidden), -1)
                high = low * (1 + 1e-3 + jax.nn.softplus(dense("fold", hidden)))
                logits = dense("mixing", hidden)
                numpyro.factor("rna", density(rna, mean, theta).sum(-1))
                first = density(protein, low, theta_protein) - jax.nn.softplus(-logits)
                second = density(protein, high, theta_protein) - logits - jax.nn.softplus(-logits)
                numpyro.factor("protein", jnp.logaddexp(first, second).sum(-1))

        def guide(rna: Any, protein: Any) -> None:
            hidden: Any = jnp.concatenate([jnp.log1p(rna), jnp.log1p(protein)], -1)
            hidden = normed("encoder.1", dense("encoder.0", hidden))
            hidden = normed("encoder.4", dense("encoder.3", hidden))
            width = jax.nn.softplus(dense("spread", hidden)) + 1e-4
            with numpyro.plate("cell", n):
                z = numpyro.sample("z", npd.Normal(dense("place", hidden), width).to_event(1))
                hidden = decoded(z)
                width = jax.nn.softplus(dense("low_spread", hidden)) + 1e-4
                numpyro.sample("low", npd.LogNormal(dense("low", hidden), width).to_event(1))

        return model, guide, on_jax((rna, protein))

    return Case(template, table, of_pyro, of_numpyro)


# Small models with ready-made guides


def regression(rank: int | None, n: int = 1000, features: int = 24) -> Case:
    """Outcome ~ Bernoulli(logit = intercept + x @ slopes), slopes ~ Normal(0, scale)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator)
    logits = x @ (torch.randn(features, generator=generator) * 0.5)
    y = torch.bernoulli(torch.sigmoid(logits), generator=generator)

    def story(x: Tensor) -> Tensor:
        scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
        intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), 1.0))
        slopes = pyro.sample("slopes", dist.Normal(x.new_zeros(features), scale).to_event(1))
        return intercept + x @ slopes

    def model(batch: Batch, prior: Any, nets: Any) -> None:
        logits = story(batch.x)
        with batch.plate("row"):
            batch.observe("y", dist.Bernoulli(logits=logits))

    template = Template(
        name="benchmark regression",
        fields={
            "x": Field(("row", "feature")),
            "y": Field(("row",), role="observed", support=constraints.boolean),
        },
        rows="row",
        model=model,
        guide=MeanField() if rank is None else JointNormal(rank=rank),
        dims={"scale": (), "intercept": (), "slopes": ("feature",)},
    )
    table = xr.Dataset({"x": (("row", "feature"), x.numpy()), "y": ("row", y.numpy())})

    def model_of_pyro(x: Tensor, y: Tensor) -> None:
        logits = story(x)
        with pyro.plate("row", n):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def model_of_numpyro(x: Any, y: Any) -> None:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as npd

        scale = numpyro.sample("scale", npd.HalfNormal(1.0))
        intercept = numpyro.sample("intercept", npd.Normal(0.0, 1.0))
        slopes = numpyro.sample("slopes", npd.Normal(jnp.zeros(features), scale).to_event(1))
        with numpyro.plate("row", n):
            numpyro.sample("y", npd.Bernoulli(logits=intercept + x @ slopes), obs=y)

    return _ready_made(template, table, model_of_pyro, model_of_numpyro, (x, y), rank)


def schools() -> Case:
    """Effect ~ Normal(mu + tau t, sd), t ~ Normal(0, 1), mu ~ Normal(0, 5), tau ~ HalfCauchy(5)."""
    effect = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sd = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def globals_of(effect: Tensor) -> tuple[Tensor, Tensor]:
        mu = pyro.sample("mu", dist.Normal(effect.new_zeros(()), 5.0))
        return mu, pyro.sample("tau", dist.HalfCauchy(effect.new_full((), 5.0)))

    def model(batch: Batch, prior: Any, nets: Any) -> None:
        mu, tau = globals_of(batch.sd)
        with batch.plate("school"):
            t = pyro.sample("t", dist.Normal(batch.sd.new_zeros(()), 1.0))
            batch.observe("effect", dist.Normal(mu + tau * t, batch.sd))

    template = Template(
        name="benchmark schools",
        fields={
            "effect": Field(("school",), role="observed"),
            "sd": Field(("school",), support=constraints.positive),
        },
        rows="school",
        model=model,
        guide=MeanField(),
        dims={"mu": (), "tau": (), "t": ("school",)},
    )
    table = xr.Dataset({"effect": ("school", effect.numpy()), "sd": ("school", sd.numpy())})

    def model_of_pyro(effect: Tensor, sd: Tensor) -> None:
        mu, tau = globals_of(effect)
        with pyro.plate("school", 8):
            t = pyro.sample("t", dist.Normal(effect.new_zeros(()), 1.0))
            pyro.sample("effect", dist.Normal(mu + tau * t, sd), obs=effect)

    def model_of_numpyro(effect: Any, sd: Any) -> None:
        import numpyro
        import numpyro.distributions as npd

        mu, tau = numpyro.sample("mu", npd.Normal(0.0, 5.0)), numpyro.sample("tau", npd.HalfCauchy(5.0))
        with numpyro.plate("school", 8):
            t = numpyro.sample("t", npd.Normal(0.0, 1.0))
            numpyro.sample("effect", npd.Normal(mu + tau * t, sd), obs=effect)

    return _ready_made(template, table, model_of_pyro, model_of_numpyro, (effect, sd), None)


def _ready_made(
    template: Template,
    table: xr.Dataset,
    of_pyro: Any,
    of_numpyro: Any,
    data: tuple[Tensor, ...],
    rank: int | None,
) -> Case:
    """A case whose guides are ready-made ones: mean field, or normal of a rank."""

    def pyros(state: State) -> tuple[Any, Any, tuple[Tensor, ...]]:
        ours: Any = state.bound.nets.guide
        sites = state.bound.sites
        if rank is None:
            guide: Any = AutoNormal(of_pyro)
            guide(*data)
            with torch.no_grad():
                for site in sites:
                    setattr(guide.locs, site.name, ours.loc[site.name].clone())
                    setattr(guide.scales, site.name, ours.log_scale[site.name].exp())
            return of_pyro, guide, data
        guide = AutoLowRankMultivariateNormal(of_pyro, rank=rank)
        guide(*data)
        with torch.no_grad():
            guide.loc.copy_(ours.loc)
            guide.scale = ours.log_diag.exp()
            guide.cov_factor.copy_(ours.factor / ours.log_diag.exp()[:, None])
        return of_pyro, guide, data

    def numpyros(state: State) -> tuple[Any, Any, tuple[Any, ...]]:
        import jax.numpy as jnp
        from numpyro.infer import autoguide, init_to_value

        values = {k: jnp.array(v.detach().numpy()) for k, v in starting_values(state).items()}
        start = init_to_value(values=values)
        if rank is None:
            guide = autoguide.AutoNormal(of_numpyro, init_loc_fn=start, init_scale=0.1)
        else:
            guide = autoguide.AutoLowRankMultivariateNormal(
                of_numpyro, init_loc_fn=start, init_scale=0.1, rank=rank
            )
        return of_numpyro, guide, on_jax(data)

    return Case(template, table, pyros, numpyros)


def starting_values(state: State) -> dict[str, Tensor]:
    """Where a ready-made guide of ours is centred, by site, on the sites' own scale."""
    guide: Any = state.bound.nets.guide
    sites = state.bound.sites
    if isinstance(getattr(guide, "loc", None), nn.ParameterDict):
        return {s.name: biject_to(s.support)(guide.loc[s.name]) for s in sites}
    out, start = {}, 0
    for site in sites:
        stop = start + math.prod(site.shape)
        out[site.name] = biject_to(site.support)(guide.loc[start:stop]).reshape(site.shape)
        start = stop
    return out


CASES: dict[str, Callable[[], Case]] = {
    "photons": photons,
    "logistic": lambda: regression(None),
    "lowrank": lambda: regression(RANK),
    "schools": schools,
    "totalvi": totalvi,
}
