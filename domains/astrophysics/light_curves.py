"""Light curves from photon counts: sources that were observed several times, and how they vary.

For source i at epoch t, with log brightness u (natural log of a flux in the unit that ``exposure`` is per):

    x_i  ~ Normal(mean, scatter)              mean log brightness of the source
    w_i  ~ Normal(0, K)                       its variation about that
    u_it = x_i + w_it

Two kinds of variation. "scatter" draws each epoch on its own, and needs no times:

    K_tt' = variability**2 if t = t' else 0

"ou" is a stationary Ornstein-Uhlenbeck process (a damped random walk), in which epochs closer than the
timescale are alike:

    K_tt' = variability**2 exp(-|t - t'| / timescale)

In the letters of Kelly et al. timescale is tau and variability**2 is tau sigma**2 / 2.
Counts follow from u as in ``apertures``, with one distribution of the log background for all epochs. x and w
are summed out: the latent is u_i, normal with mean ``mean`` and covariance scatter**2 + K.

An epoch without counts weighs nothing: the posterior there follows from the others, and from the population.
So gaps are filled, and forecasts made, by rows of missing counts at times of interest.

References:
    Kelly, Bechtold and Siemiginowska 2009, ApJ 698, 895, doi:10.1088/0004-637X/698/1/895 (the process).
    Vaughan, Edelson, Warwick and Uttley 2003, MNRAS 345, 1271 (fractional rms variability).
    Gill, Golub, Murray and Saunders 1974, Math. Comp. 28, 505 (Cholesky factor after a change of rank one).
    Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, section 3.4 (Newton steps whitened).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor, nn
from torch.distributions import constraints

from domains.astrophysics import apertures
from domains.astrophysics.apertures import Background, Counts, Laplace, Population
from scivi.inputs.fields import Field
from scivi.models import Batch, Template, guides, normals
from scivi.models.networks import perceptron

Variability = Literal["scatter", "ou"]
TIME = Field(("epoch",), "given", constraints.real, "d", "time of the epoch, from any zero near the data")
_BACKGROUND = ("background_mu", "background_sigma")
_STEPS, _FARTHEST = 8, 1.0  # Newton steps of a source, and the most by which one moves u or v (our choice)


@dataclass(frozen=True)
class Prior:
    """Numbers of the model. All are our choice: weak on the scale of ln(flux), where 1 is a factor of 2.7."""

    brightness_mean: float = 0.0  # ln(flux unit); centre of the population's mean
    brightness_sd: float = 5.0  # ln(flux unit)
    scatter: float = 2.0  # ln(flux); half-normal scale of the scatter between sources
    variability: float = 1.0  # ln(flux); half-normal scale of the variation of a source about its mean
    timescale_median: float = 30.0  # d; from days (rotation of stars) to hundreds (quasars, Kelly et al.)
    timescale_log_sd: float = 2.0  # of ln(timescale / d): a factor of 7 to either side
    background_mean: float = 0.0  # ln(counts in the source aperture)
    background_sd: float = 5.0  # ln(counts)
    background_scatter: float = 1.0  # ln(counts); half-normal scale


def covariance_tril(
    n_epochs: int, time: Tensor | None, scatter: Tensor, variability: Tensor, timescale: Tensor | None
) -> Tensor:
    """Lower Cholesky factor of scatter**2 + K, by closed forms.

    With gaps d_j and q_j = sqrt(1 - exp(-2 d_j / timescale)), q_1 = 1, the factor of K is

        L_ij = variability exp(-(t_i - t_j) / timescale) q_j,     i >= j

    and, with a = L**-1 1 scatter and c_j = 1 + a_1**2 + ... + a_j**2, that of 1 + a a' is

        C_jj = sqrt(c_j / c_(j-1)),     C_ij = a_i a_j / sqrt(c_j c_(j-1)),     i > j

    Every term of their product is positive. Nothing cancels, however close two epochs are, so that no jitter
    on the diagonal is needed (the Cholesky routine fails in float32 at gaps of 1e-7 timescales).

    Args:
        n_epochs: E.
        time: of the epochs, d, rising, (E,); None if they vary independently.
        scatter: ln flux, > 0, (*).
        variability: ln flux, > 0, (*).
        timescale: d, > 0, (*); None likewise.

    Returns:
        ln flux, (*, E, E).
    """
    s, v = scatter[..., None], variability[..., None]
    ones = torch.ones(n_epochs, dtype=v.dtype, device=v.device)
    if time is None or timescale is None:
        tril = torch.diag_embed(v * ones)
        a = s / v * ones
    else:
        tau = timescale[..., None]
        gap = time.diff() / tau
        first = torch.ones_like(tau)
        q = torch.cat([first, (-torch.expm1(-2 * gap)).sqrt()], -1)
        apart = (time[:, None] - time).tril()  # 0 above the diagonal, where exp might overflow
        tril = v[..., None] * (torch.exp(-apart / tau[..., None]) * q[..., None, :]).tril()
        a = s / v * torch.cat([first, torch.tanh(0.5 * gap).sqrt()], -1)
    c = 1 + a.square().cumsum(-1)
    before = torch.cat([torch.ones_like(c[..., :1]), c[..., :-1]], -1)
    below = (a[..., :, None] * (a / (c * before).sqrt())[..., None, :]).tril(-1)
    return tril @ (below + torch.diag_embed((c / before).sqrt()))


def population(values: Mapping[str, Tensor], batch: Batch) -> Population:
    """The population in terms of epochs, from the sites; ``timescale`` is absent for "scatter"."""
    ones, timescale = batch.alpha.new_ones(batch.sizes["epoch"]), values.get("timescale")
    time = None if timescale is None else batch.time
    tril = covariance_tril(len(ones), time, values["scatter"], values["variability"], timescale)
    each = {n: values[n].unsqueeze(-1) * ones for n in ("mean", *_BACKGROUND) if n in values}
    return Population(each["mean"], tril, each.get("background_mu"), each.get("background_sigma"))


def model(
    batch: Batch, prior: Prior, nets: nn.Module | None, *, variability: Variability, background: Background
) -> None:
    """The generative story of the module's docstring."""
    one = batch.alpha.new_ones(())
    values = {
        "mean": pyro.sample("mean", dist.Normal(prior.brightness_mean * one, prior.brightness_sd)),
        "scatter": pyro.sample("scatter", dist.HalfNormal(prior.scatter * one)),
        "variability": pyro.sample("variability", dist.HalfNormal(prior.variability * one)),
    }
    if variability == "ou":
        median = math.log(prior.timescale_median) * one
        values["timescale"] = pyro.sample("timescale", dist.LogNormal(median, prior.timescale_log_sd))
    if background == "hierarchical":
        level = dist.Normal(prior.background_mean * one, prior.background_sd)
        values["background_mu"] = pyro.sample("background_mu", level)
        spread = dist.HalfNormal(prior.background_scatter * one)
        values["background_sigma"] = pyro.sample("background_sigma", spread)
    pop = population(values, batch)
    with batch.plate("source"):
        u = pyro.sample("log_brightness", apertures.normal(pop.mu, pop.tril))
        pyro.deterministic("log_brightness_mean", u.mean(-1))
        flux = u.exp()
        level = flux.mean(-1, keepdim=True)
        square = (flux / level - 1).square().sum(-1) / (u.shape[-1] - 1)  # Vaughan et al., without noise
        pyro.deterministic("fractional_rms", square.sqrt())
        apertures.observe(batch, u, pop, background)


class EachEpoch(nn.Module):
    """The same network at each epoch, which sees the epoch's features and their mean over the curve.

    It has no place for the number of epochs or their times: those come in through the Laplace approximation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron(2 * apertures.N_FEATURES, apertures.N_OUTPUTS, (32, 32), last=0.0)

    def forward(self, features: Tensor) -> Tensor:
        """Corrections (*, N_OUTPUTS x E) of features (*, N_FEATURES x E)."""
        own = features.unflatten(-1, (apertures.N_FEATURES, -1)).mT
        whole = own.mean(-2, keepdim=True).expand_as(own)
        return self.net(torch.cat([own, whole], -1)).mT.flatten(-2)


def nets(
    sizes: Mapping[str, int], prior: Prior, *, variability: Variability, background: Background
) -> apertures.Nets:
    """The joint normal of the population, started at the prior's centre, and the network of the epochs."""
    half = math.sqrt(2 / math.pi)  # mean of a half-normal in units of its scale
    start = {
        "mean": prior.brightness_mean,
        "scatter": half * prior.scatter,
        "variability": half * prior.variability,
    }
    if variability == "ou":
        start["timescale"] = prior.timescale_median
    if background == "hierarchical":
        start["background_mu"] = prior.background_mean
        start["background_sigma"] = half * prior.background_scatter
    real = ("mean", "background_mu")
    supports = {name: constraints.real if name in real else constraints.positive for name in start}
    values = {name: torch.tensor(value) for name, value in start.items()}
    normal = guides.global_normal(supports, values, scale=0.05)
    return apertures.Nets(normal, EachEpoch())


def by_whitening(batch: Batch, pop: Population, c: Counts, background: Background) -> Laplace:
    """Laplace approximation in z, where u = mu + tril z, with v solved for.

    The matrix of each Newton step is 1 + tril' W tril, W >= 0 but for rounding: well conditioned where
    neighbouring epochs are nearly one and the covariance of u has no inverse in float32.
    """
    v, v_prior = apertures.background_start(batch, pop, c, background)
    net, gain = (x.sum(-1, keepdim=True) for x in (c.n - c.on * v.exp(), c.on * c.gain))
    level = torch.log(net.clamp_min(0.5) / gain.clamp_min(1e-30))  # one for the whole curve
    level = torch.where(net < 5, 0.5 * (level + pop.mu), level)
    u = torch.where(gain > 0, level, pop.mu)
    tril, eye = pop.tril, torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    z = torch.linalg.solve_triangular(tril, (u - pop.mu).unsqueeze(-1), upper=False).squeeze(-1)
    for step in range(_STEPS + 1):
        u = pop.mu + (tril @ z.unsqueeze(-1)).squeeze(-1)
        d = apertures.slopes(u, v, c, pop, v_prior)
        slope = -d.huv / d.hvv
        matrix = eye + tril.mT @ ((d.huu + slope * d.huv).unsqueeze(-1) * tril)
        if step == _STEPS:
            break
        pull = (tril.mT @ (d.gu + slope * d.gv).unsqueeze(-1)).squeeze(-1) - z
        dz = normals.solve_spd(matrix, pull)
        du = (tril @ dz.unsqueeze(-1)).squeeze(-1)
        dv = d.gv / d.hvv + slope * du
        most = torch.maximum(du.abs(), dv.abs()).amax(-1, keepdim=True)
        length = _FARTHEST / most.clamp_min(_FARTHEST)
        z, v = z + length * dz, v + length * dv
    u_tril = tril @ normals.inverse_tril(matrix)
    return Laplace(u, v, u_tril, d.hvv.rsqrt(), slope)


def guide(batch: Batch, prior: Prior, nets: apertures.Nets, *, background: Background) -> None:
    """Joint normal for the population; skewed Laplace for each source given the population."""
    pop = population(nets.globals(batch), batch)
    apertures.guide(batch, nets, pop, background=background, base=by_whitening)


def simulate(
    sizes: Mapping[str, int],
    prior: Prior,
    generator: torch.Generator,
    *,
    variability: Variability,
    background: Background,
) -> tuple[xr.Dataset, xr.Dataset]:
    """Light curves at irregular times some days apart, and the truth behind them.

    Populations are drawn from the prior narrowed to a range in which most epochs have a few to a few hundred
    counts, and in which the timescale spans a few epochs.

    Args:
        sizes: number of sources and epochs ("source", "epoch"; six epochs if absent).
        prior: not read.
        generator: torch's, whose seed starts numpy's.
        variability: as in ``make``.
        background: as in ``make``; "flat" simulates as "hierarchical".
    """
    rng = np.random.default_rng(generator.initial_seed())
    n, k = sizes["source"], sizes.get("epoch", 6)
    population = {
        "mean": rng.normal(2.5, 0.5),
        "scatter": rng.uniform(0.8, 1.4),
        "variability": rng.uniform(0.3, 0.8),
        "timescale": np.exp(rng.uniform(np.log(10.0), np.log(40.0))),
        "background_mu": rng.normal(0.0, 0.3),
        "background_sigma": rng.uniform(0.4, 0.8),
    }
    time = np.cumsum(rng.gamma(2.0, 4.0, k))  # gaps of 8 d, on average
    apart = np.abs(time[:, None] - time)
    kernel = np.exp(-apart / population["timescale"]) if variability == "ou" else np.eye(k)
    w = rng.multivariate_normal(np.zeros(k), population["variability"] ** 2 * kernel, n)
    u = population["mean"] + population["scatter"] * rng.normal(size=(n, 1)) + w
    v = population["background_mu"] + population["background_sigma"] * rng.normal(size=(n, k))
    exposure, alpha = np.exp(rng.normal(0.0, 0.5, (n, k))), rng.uniform(0.02, 0.3, (n, k))
    on, off = rng.poisson(exposure * np.exp(u) + np.exp(v)), rng.poisson(np.exp(v) / alpha)
    columns = {"n_on": on, "n_off": off, "alpha": alpha, "exposure": exposure}
    if background == "known":
        columns["background"] = np.exp(v)
    dims, coords = ("source", "epoch"), {"source": np.arange(n), "epoch": np.arange(k)}
    table = xr.Dataset({name: (dims, values) for name, values in columns.items()}, coords)
    truth: dict[str, Any] = {name: ((), value) for name, value in population.items()}
    truth |= {"log_brightness": (dims, u), "log_brightness_mean": (("source",), u.mean(-1))}
    truth["fractional_rms"] = (("source",), np.exp(u).std(-1, ddof=1) / np.exp(u).mean(-1))
    truth["log_background"] = (dims, v)
    if variability == "ou":
        table["time"] = ("epoch", time)
    else:
        del truth["timescale"]
    if background != "hierarchical":
        truth = {name: value for name, value in truth.items() if "background" not in name}
    return table, xr.Dataset(truth, coords)


def bad_times(values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray]) -> list[str]:
    """Faults of the epochs: fewer than two, times that do not rise, times that single precision cannot tell.

    Args:
        values: fields without rows; ``time``, d, is absent for "scatter".
        coords: labels by dim.
    """
    epochs = list(coords["epoch"])
    if len(epochs) < 2:
        return [
            "there is one epoch; a light curve needs two at least (domains.astrophysics.photons takes one)"
        ]
    if "time" not in values:
        return []
    time = np.asarray(values["time"], dtype=np.float64)
    gap = np.diff(time)
    faults = [
        f'"time" must rise from epoch to epoch: epoch {epochs[j + 1]} at {time[j + 1]:.10g} d does not come '
        f"after epoch {epochs[j]} at {time[j]:.10g} d; sort the epochs, and join those of one time"
        for j in np.flatnonzero(gap <= 0)
    ]
    rounded = np.abs(np.diff(time.astype(np.float32).astype(np.float64)) - gap) > 0.01 * gap
    if not faults and rounded.any():
        faults.append(
            f'"time" is so large that single precision changes {rounded.sum()} of its gaps by more than 1 %; '
            f"count it from the first epoch: time - {time[0]:.10g}"
        )
    return faults


def make(
    variability: Variability = "ou", background: Background = "hierarchical", *, prior: Prior | None = None
) -> Template:
    """A light-curve template.

    Args:
        variability: "ou" for an Ornstein-Uhlenbeck process, which takes the field ``time``; "scatter" for
            epochs that vary independently.
        background: "hierarchical" learns the distribution of log background over sources and epochs; "flat"
            sums out a flat prior on each; "known" takes the field ``background``.
        prior: numbers of the model.

    Notes:
        Latents per source: one for each epoch, two with a hierarchical background. Up to 16 of them the
        engine integrates; with more it follows the ELBO.
    """
    sites: dict[str, tuple[tuple[str, ...], str]] = {
        "mean": ((), "ln flux"),
        "scatter": ((), "ln flux"),
        "variability": ((), "ln flux"),
        **({"timescale": ((), "d")} if variability == "ou" else {}),
        "log_brightness": (("source", "epoch"), "ln flux"),
        "log_brightness_mean": (("source",), "ln flux"),
        "fractional_rms": (("source",), "1"),
    }
    if background == "hierarchical":
        sites |= {name: ((), "ln ct") for name in _BACKGROUND}
        sites["log_background"] = (("source", "epoch"), "ln ct")
    return Template(
        name=f"light curves, {variability}, {background} background",
        fields=apertures.fields("epoch", background) | ({"time": TIME} if variability == "ou" else {}),
        rows="source",
        model=partial(model, variability=variability, background=background),
        dims={name: dims for name, (dims, _) in sites.items()},
        guide=partial(guide, background=background),
        nets=partial(nets, variability=variability, background=background),
        prior=prior or Prior(),
        simulate=partial(simulate, variability=variability, background=background),
        units={name: unit for name, (_, unit) in sites.items()},
        validate=bad_times,
        made=(
            "domains.astrophysics.light_curves:make",
            {"variability": variability, "background": background},
        ),
    )


template = make("ou")
scatter = make("scatter")
