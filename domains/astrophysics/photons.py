"""Photon counts of a catalogue of sources, in one or more bands.

It gives the brightness of each source, and of their population.

For source i and band k, with log brightness u (natural log of a flux in the unit that ``exposure`` is per)
and log background v (natural log of the expected background counts in the source aperture):

    x_i      = (reference, colours)         ~ Normal(mean, scatter, correlation)
    u_i      = cumulative sum of x_i          (u_1 = reference, u_k - u_{k-1} = colour k)
    v_ik     ~ Normal(background_mu_k, background_sigma_k)
    n_on_ik  ~ Poisson(E_ik f_ik exp(u_ik) + exp(v_ik))
    n_off_ik ~ Poisson(exp(v_ik) / alpha_ik + E_ik g_ik exp(u_ik))

E is exposure x effective area (counts per unit flux), f and g are the fractions of the point-spread function
inside the source and the background aperture, alpha is the ratio of source to background area (exposure
included).

Three treatments of the background: ``template`` learns its distribution (above), ``flat`` puts a flat prior
on each exp(v) >= 0 and sums it out exactly, ``known`` takes it as given. ``make`` offers the rest: catalogues
cut at a number of counts, whose selection is divided out.

The guide is a normal at the Laplace approximation of each source, bent by sinh-arcsinh and corrected by a
small network on clamped features. The corrections are in units of the source's own posterior sd in ln(flux):
they vanish as counts grow and the Laplace approximation becomes exact, so that the guide stays right far
outside the range it was trained on.

References:
    Primini and Kashyap 2014, ApJ 796, 24, doi:10.1088/0004-637X/796/1/24 (apertures and background).
    Loredo 2004, AIP Conf. Proc. 735, 195, arXiv:astro-ph/0409387 (populations from counts with selection).
    Lewandowski, Kurowicka and Joe 2009, J. Multivar. Anal. 100, 1989 (prior of the correlation).

Longer than 400 lines because three treatments of the background share one model and one guide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor, nn
from torch.distributions import constraints

from scivi.inputs.fields import Field
from scivi.models import Batch, Template, guides
from scivi.models.distributions import PoissonOverBackground
from scivi.models.networks import perceptron

Background = Literal["hierarchical", "flat", "known"]


@dataclass(frozen=True)
class Prior:
    """Numbers of the model. All are our choice: weak on the scale of ln(flux), where 1 is a factor of 2.7."""

    brightness_mean: float = 0.0  # ln(flux unit); centre of the population's mean in the first band
    brightness_sd: float = 5.0  # ln(flux unit)
    colour_sd: float = 3.0  # ln(flux ratio); of the mean colours
    scatter: float = (
        2.0  # ln(flux); half-normal scale of the population's scatter, in brightness and in colours
    )
    correlation: float = 2.0  # LKJ concentration; 1 is uniform
    background_mean: float = 0.0  # ln(counts in the source aperture)
    background_sd: float = 5.0  # ln(counts)
    background_scatter: float = 1.0  # ln(counts); half-normal scale


FIELDS = {
    "n_on": Field(
        ("source", "band"), "observed", constraints.nonnegative_integer, "ct", "counts in the source aperture"
    ),
    "n_off": Field(
        ("source", "band"),
        "observed",
        constraints.nonnegative_integer,
        "ct",
        "counts in the background aperture",
    ),
    "alpha": Field(
        ("source", "band"), "given", constraints.positive, "1", "source over background area x exposure"
    ),
    "exposure": Field(
        ("source", "band"), "given", constraints.positive, "ct / flux", "counts per unit flux", default=1.0
    ),
    "source_fraction": Field(
        ("source", "band"), "given", constraints.positive, "1", "PSF in source aperture", default=1.0
    ),
    "spill_fraction": Field(
        ("source", "band"), "given", constraints.nonnegative, "1", "PSF in background aperture", default=0.0
    ),
}
FIELDS["e_min"] = Field(
    ("band",), "given", constraints.nonnegative, "keV", "lower edge; 0 if unknown", default=0.0
)
FIELDS["e_max"] = Field(
    ("band",), "given", constraints.nonnegative, "keV", "upper edge; 0 if unknown", default=0.0
)
BACKGROUND = Field(
    ("source", "band"), "given", constraints.positive, "ct", "expected background in source aperture"
)
EDGES = {  # keV; Chandra Source Catalog 2.0, energy bands (Evans et al. 2010, ApJS 189, 37, table 4)
    "ultrasoft": (0.2, 0.5),
    "soft": (0.5, 1.2),
    "medium": (1.2, 2.0),
    "hard": (2.0, 7.0),
    "broad": (0.5, 7.0),
    "wide": (0.1, 10.0),
}


@dataclass(frozen=True)
class Population:
    """The globals, as the rows need them; ``mu`` (*, band), ``tril`` (*, band, band)."""

    mu: Tensor
    tril: Tensor
    background_mu: Tensor | None
    background_sigma: Tensor | None

    @property
    def sigma(self) -> Tensor:
        """Scatter of the log brightness by band."""
        return self.tril.square().sum(-1).sqrt()

    @property
    def background(self) -> tuple[Tensor, Tensor]:
        """Mean and scatter of the log background, which "hierarchical" learns; the others have none."""
        return cast(tuple[Tensor, Tensor], (self.background_mu, self.background_sigma))


def population(values: Mapping[str, Tensor]) -> Population:
    """The population in terms of bands, from the sites in terms of reference brightness and colours."""
    mean, scatter = values["mean"], values["scatter"]
    n_bands = mean.shape[-1]
    tril = torch.diag_embed(scatter)
    if n_bands > 1:
        sums = torch.ones(n_bands, n_bands, dtype=mean.dtype, device=mean.device).tril()
        tril = sums @ (scatter.unsqueeze(-1) * values["correlation_tril"])
    return Population(mean.cumsum(-1), tril, values.get("background_mu"), values.get("background_sigma"))


def _normal(mu: Tensor, tril: Tensor) -> dist.TorchDistribution:
    if mu.shape[-1] == 1:
        return dist.Normal(mu, tril[..., 0]).to_event(1)
    return dist.MultivariateNormal(mu, scale_tril=tril)


def model(batch: Batch, prior: Prior, nets: nn.Module | None, *, background: Background, cut: int) -> None:
    """The generative story of the module's docstring."""
    ones = batch.alpha.new_ones(batch.sizes["band"])
    first = torch.arange(len(ones), device=ones.device) == 0
    mean = torch.where(first, prior.brightness_mean * ones, 0 * ones)
    mean_sd = torch.where(first, prior.brightness_sd * ones, prior.colour_sd * ones)
    values = {
        "mean": pyro.sample("mean", dist.Normal(mean, mean_sd).to_event(1)),
        "scatter": pyro.sample("scatter", dist.HalfNormal(prior.scatter * ones).to_event(1)),
    }
    if len(ones) > 1:
        values["correlation_tril"] = pyro.sample(
            "correlation_tril", dist.LKJCholesky(len(ones), prior.correlation * ones[0])
        )
    if background == "hierarchical":
        level = dist.Normal(prior.background_mean * ones, prior.background_sd * ones).to_event(1)
        values["background_mu"] = pyro.sample("background_mu", level)
        spread = dist.HalfNormal(prior.background_scatter * ones).to_event(1)
        values["background_sigma"] = pyro.sample("background_sigma", spread)
    pop = population(values)
    pyro.deterministic("mu", pop.mu, event_dim=1)
    pyro.deterministic("sigma", pop.sigma, event_dim=1)
    covariance = pop.tril @ pop.tril.mT
    pyro.deterministic(
        "correlation", covariance / (pop.sigma.unsqueeze(-1) * pop.sigma.unsqueeze(-2)), event_dim=2
    )
    with batch.plate("source"):
        u = pyro.sample("log_brightness", _normal(pop.mu, pop.tril))
        source = batch.exposure * batch.source_fraction * u.exp()
        spill = batch.exposure * batch.spill_fraction * u.exp()
        if background == "flat":
            counts = PoissonOverBackground(source, batch.n_off + 1, 1 / batch.alpha)
            batch.observe("n_on", counts.to_event(1))
            return
        if background == "hierarchical":
            v = pyro.sample("log_background", dist.Normal(*pop.background).to_event(1))
            level = v.exp()
        else:
            level = batch.background
        batch.observe("n_on", dist.Poisson(source + level).to_event(1))
        if background == "hierarchical":
            batch.observe("n_off", dist.Poisson(level / batch.alpha + spill).to_event(1))
        if cut:
            pyro.factor("selection", -_log_detected(batch, pop, cut))


def _log_detected(batch: Batch, pop: Population, cut: int, n_u: int = 15, n_v: int = 7) -> Tensor:
    """Log P(n_on >= cut in the first band | population), each source, by Gauss-Hermite quadrature."""
    x, w = (
        torch.as_tensor(a, dtype=batch.alpha.dtype, device=batch.alpha.device)
        for a in np.polynomial.hermite_e.hermegauss(n_u)
    )
    u = pop.mu[..., 0, None] + pop.sigma[..., 0, None] * x
    rate = (batch.exposure * batch.source_fraction)[..., 0, None] * u.exp()
    if pop.background_mu is None or pop.background_sigma is None:
        p = torch.special.gammainc(torch.full_like(rate, cut), rate + batch.background[..., 0, None])
        return (p * (w / w.sum())).sum(-1).log()
    y, q = (
        torch.as_tensor(a, dtype=x.dtype, device=x.device) for a in np.polynomial.hermite_e.hermegauss(n_v)
    )
    level = (pop.background_mu[..., 0, None] + pop.background_sigma[..., 0, None] * y).exp()
    total = rate.unsqueeze(-1) + level.unsqueeze(-2)
    p = torch.special.gammainc(torch.full_like(total, cut), total)
    return (p * (w / w.sum()).unsqueeze(-1) * (q / q.sum())).sum((-1, -2)).log()


class Nets(nn.Module):
    """The guide's own: one joint normal for the population, one small network for all sources."""

    def __init__(self, sizes: Mapping[str, int], prior: Prior, background: Background) -> None:
        super().__init__()
        n = sizes["band"]
        self.n_features, self.n_outputs = 12, 9
        half = math.sqrt(2 / math.pi)  # mean of a half-normal in units of its scale
        sites: dict[str, tuple[tuple[int, ...], constraints.Constraint]] = {
            "mean": ((n,), constraints.real),
            "scatter": ((n,), constraints.positive),
        }
        start = {
            "mean": torch.full((n,), prior.brightness_mean),
            "scatter": torch.full((n,), half * prior.scatter),
        }
        if n > 1:
            sites["correlation_tril"] = ((n, n), constraints.corr_cholesky)
            start["correlation_tril"] = torch.eye(n)
        if background == "hierarchical":
            sites["background_mu"] = ((n,), constraints.real)
            sites["background_sigma"] = ((n,), constraints.positive)
            start["background_mu"] = torch.full((n,), prior.background_mean)
            start["background_sigma"] = torch.full((n,), half * prior.background_scatter)
        self.globals = guides.global_normal(sites, start, scale=0.05)
        self.correct = perceptron(self.n_features * n, self.n_outputs * n, (64, 64), last=0.1)


@dataclass(frozen=True)
class Counts:
    """A batch's counts and constants for one evaluation; missing counts weigh nothing."""

    n: Tensor
    m: Tensor
    on: Tensor
    off: Tensor
    gain: Tensor
    spill: Tensor
    alpha: Tensor


def _counts(batch: Batch, background: Background) -> Counts:
    def weight(name: str) -> Tensor:
        mask = batch.observed_mask.get(name)
        return torch.ones_like(batch.alpha) if mask is None else mask.to(batch.alpha.dtype)

    on, off = weight("n_on"), weight("n_off") if background != "known" else torch.zeros_like(batch.alpha)
    gain, spill = batch.exposure * batch.source_fraction, batch.exposure * batch.spill_fraction
    m = batch.n_off if background != "known" else torch.zeros_like(batch.alpha)
    return Counts(batch.n_on * on, m * off, on, off, gain, spill, batch.alpha)


def _curvature(
    point: Tensor, c: Counts, pop: Population, precision: Tensor, v_prior: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor]:
    """Gradient (*, 2 band) and negative Hessian (*, 2 band, 2 band) of the log joint density in (u, v).

    Where the observed curvature of a band is not positive definite beside the weakest that the prior can add,
    the expected one stands in. (A covariance is at most band times its diagonal, so the prior adds at least
    sigma**-2 / band.)
    """
    u, v = point.chunk(2, -1)
    v_mean, v_precision, v_slope = v_prior
    s, b, g, o = c.on * c.gain * u.exp(), c.on * v.exp(), c.off * c.spill * u.exp(), c.off * v.exp() / c.alpha
    on, off = (s + b).clamp_min(1e-30), (g + o).clamp_min(1e-30)
    a, d = c.n / on, c.m / off
    gu = a * s - s + d * g - g - ((u - pop.mu).unsqueeze(-2) @ precision).squeeze(-2)
    gv = a * b - b + d * o - o - (v - v_mean) * v_precision + v_slope
    cross = a * s * b / on + d * g * o / off
    huu, hvv, huv = s + g - cross, b + o - cross, cross
    least = pop.sigma.pow(-2) / u.shape[-1]
    hvv_all = hvv + v_precision
    bad = (hvv_all <= 0) | (
        (huu + least) * hvv_all - huv.square() <= 1e-4 * (huu.abs() + least) * hvv_all.abs()
    )
    huu = torch.where(bad, s * s / on + g * g / off, huu)
    hvv = torch.where(bad, b * b / on + o * o / off, hvv) + v_precision
    huv = torch.where(bad, s * b / on + g * o / off, huv)
    top = torch.cat([torch.diag_embed(huu) + precision, torch.diag_embed(huv)], -1)
    bottom = torch.cat([torch.diag_embed(huv), torch.diag_embed(hvv)], -1)
    return torch.cat([gu, gv], -1), torch.cat([top, bottom], -2)


def _base(batch: Batch, pop: Population, c: Counts, background: Background) -> tuple[Tensor, Tensor]:
    """Laplace approximation of each source: mode (*, 2 band) and Cholesky factor (*, 2 band, 2 band)."""
    n_bands = pop.mu.shape[-1]
    precision = torch.cholesky_inverse(pop.tril) if n_bands > 1 else pop.tril.square().reciprocal()
    ones = torch.ones_like(pop.mu)
    if background == "hierarchical":
        floor, sigma = pop.background
        v_prior = (floor, sigma.pow(-2), 0.0)
    elif background == "known":
        v_prior = (batch.background.log(), 1e8 * ones, 0.0)
        floor = batch.background.log()
    else:
        v_prior = (0 * ones, 1e-6 * ones, 1.0)  # a flat density in exp(v) is exp(v) in v
        floor = -2 * ones
    if background == "known":
        v = floor + 0 * c.n
    else:
        v = torch.where(c.off * c.m > 0, torch.log((c.m + 0.5) * c.alpha), floor)
    net = c.n - v.exp()
    faint = net < 5
    u = torch.where(faint & (net < 0.5), pop.mu + 0 * net, torch.log(net.clamp_min(0.5) / c.gain))
    u = torch.where(faint, 0.5 * (u + pop.mu), u)
    derivatives = partial(_curvature, c=c, pop=pop, precision=precision, v_prior=v_prior)
    start = torch.cat(torch.broadcast_tensors(u, v), -1)
    return guides.laplace(derivatives, start, steps=6)


def _features(
    u: Tensor, v: Tensor, u_sd: Tensor, v_sd: Tensor, slope: Tensor, pop: Population, c: Counts
) -> Tensor:
    """Features of a source (*, 12 band), each clamped.

    Beyond the range of training the correction stays what it was.
    """
    source, level = c.gain * u.exp(), v.exp()
    if pop.background_mu is not None and pop.background_sigma is not None:
        v_place = (v - pop.background_mu) / pop.background_sigma
    else:
        v_place = v / 2
    n, m = c.n.clamp(max=600.0), c.m.clamp(max=600.0)
    share = source / (source + level)
    third = c.n * share * (1 - share)  # third derivatives of the log density, which set the skew
    parts = [
        ((third * (1 - 2 * share) - source) * u_sd**3).clamp(-2, 2),
        ((third * (2 * share - 1) - level - level / c.alpha) * v_sd**3).clamp(-2, 2),
        ((u - pop.mu) / pop.sigma).clamp(-4, 4),
        (u_sd / pop.sigma).log().clamp(-5, 0.5) + 1,
        v_place.clamp(-4, 4),
        v_sd.log().clamp(-4, 1) + 1,
        slope.clamp(-3, 0),
        torch.log1p(n) - 2,
        torch.log1p(m) - 2,
        (n + 0.375).sqrt() / 3 - 1,
        source.log().clamp(-3, 6.4) / 2,
        share,
    ]
    return torch.cat(torch.broadcast_tensors(*parts), -1)


def guide(batch: Batch, prior: Prior, nets: Nets, *, background: Background) -> None:
    """Joint normal for the population; skewed Laplace for each source given the population."""
    pop = population(nets.globals(batch))
    with torch.no_grad():
        c = _counts(batch, background)
        mode, tril = _base(batch, pop, c, background)
        u0, v0 = mode.chunk(2, -1)
        k = u0.shape[-1]
        u_tril, v_sd = tril[..., :k, :k], tril[..., k:, k:].diagonal(dim1=-2, dim2=-1)
        u_sd = u_tril.square().sum(-1).sqrt()
        slope = tril[..., k:, :k].diagonal(dim1=-2, dim2=-1) / u_tril.diagonal(dim1=-2, dim2=-1)
        features = _features(u0, v0, u_sd, v_sd, slope, pop, c)
        u_size, v_size = (sd.clamp(max=1.0).unsqueeze(-2) for sd in (u_sd, v_sd))
    out = nets.correct(features).unflatten(-1, (nets.n_outputs, k))
    shift, widen, skew, tail = (out[..., :4, :] * u_size).clamp(-2, 2).unbind(-2)
    v_shift, v_widen, v_bend, v_skew, v_tail = (out[..., 4:, :] * v_size).clamp(-2, 2).unbind(-2)
    with batch.plate("source"):
        tril = u_tril * widen.exp().unsqueeze(-2)
        u = pyro.sample("log_brightness", guides.skew_normal(u0 + shift * u_sd, tril, skew, tail.exp()))
        if background == "hierarchical":
            centre = v0 + v_shift * v_sd + (slope + v_bend) * (u - u0)
            v_tril = torch.diag_embed(v_sd * v_widen.exp())
            pyro.sample("log_background", guides.skew_normal(centre, v_tril, v_skew, v_tail.exp()))


def simulate(
    sizes: Mapping[str, int], prior: Prior, generator: torch.Generator, *, background: Background, cut: int
) -> tuple[xr.Dataset, xr.Dataset]:
    """A catalogue with exposures and area ratios like those of a real field, and the truth behind it.

    Populations are drawn from the prior narrowed to a range in which most sources have a few to a few hundred
    counts.

    Args:
        sizes: number of sources and bands ("source", "band"; one band if absent).
        prior: the LKJ concentration is read.
        generator: numpy's, or torch's, whose seed starts numpy's.
        background: as in ``make``; "flat" simulates as "hierarchical".
        cut: sources with fewer counts in the first band are left out, as in a catalogue.
    """
    rng = np.random.default_rng(generator.initial_seed())
    n, k = sizes["source"], sizes.get("band", 1)
    mean = np.concatenate([rng.normal(2.0, 0.5, 1), rng.normal(0.0, 0.3, k - 1)])
    scatter = np.concatenate([rng.uniform(0.8, 1.4, 1), rng.uniform(0.3, 0.8, k - 1)])
    tril = np.tril(np.ones((k, k))) @ (scatter[:, None] * _random_tril(k, prior.correlation, generator))
    b_mu, b_sigma = rng.normal(0.0, 0.3, k), rng.uniform(0.4, 0.8, k)
    tables: list[dict[str, np.ndarray]] = []
    while sum(len(t["n_on"]) for t in tables) < n:
        u = np.cumsum(mean) + rng.normal(size=(n, k)) @ tril.T
        v = b_mu + b_sigma * rng.normal(size=(n, k))
        exposure, alpha = np.exp(rng.normal(0.0, 0.5, (n, k))), rng.uniform(0.02, 0.3, (n, k))
        on, off = rng.poisson(exposure * np.exp(u) + np.exp(v)), rng.poisson(np.exp(v) / alpha)
        keep = on[:, 0] >= cut
        table = {"n_on": on, "n_off": off, "alpha": alpha, "exposure": exposure, "u": u, "v": v}
        tables.append({name: values[keep] for name, values in table.items()})
    columns = {name: np.concatenate([t[name] for t in tables])[:n] for name in tables[0]}
    dims, coords = ("source", "band"), {"source": np.arange(n), "band": np.arange(k)}
    truth = {"log_brightness": (dims, columns.pop("u")), "log_background": (dims, columns.pop("v"))}
    covariance = tril @ tril.T
    sigma = np.sqrt(np.diag(covariance))
    truth |= {"mu": (("band",), np.cumsum(mean)), "sigma": (("band",), sigma)}
    truth["correlation"] = (("band", "band_other"), covariance / np.outer(sigma, sigma))
    truth |= {"background_mu": (("band",), b_mu), "background_sigma": (("band",), b_sigma)}
    if background == "known":
        columns["background"] = np.exp(truth["log_background"][1])
    if background != "hierarchical":
        truth = {name: v for name, v in truth.items() if "background" not in name}
    table = xr.Dataset({name: (dims, values) for name, values in columns.items()}, coords)
    return table, xr.Dataset(truth, coords | {"band_other": np.arange(k)})


def _random_tril(k: int, concentration: float, generator: torch.Generator) -> np.ndarray:
    if k == 1:
        return np.ones((1, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return dist.LKJCholesky(k, torch.tensor(concentration)).sample().numpy()


def overlapping(values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray]) -> list[str]:
    """Faults of a choice of bands.

    Two that overlap hold the same photons, and cannot be fitted as independent data.

    Args:
        values: fields without rows.
        coords: labels by dim; where the edges are not given, Chandra's own names of bands are known.
    """
    names = [str(b) for b in coords["band"]]
    given = dict(zip(names, zip(values["e_min"], values["e_max"], strict=True), strict=True))
    edges = {b: (lo, hi) if hi > lo else EDGES.get(b) for b, (lo, hi) in given.items()}
    edges = {b: e for b, e in edges.items() if e is not None}
    faults = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if (
                a in edges
                and b in edges
                and max(edges[a][0], edges[b][0]) < min(edges[a][1], edges[b][1]) - 1e-9
            ):
                lo, hi = max(edges[a][0], edges[b][0]), min(edges[a][1], edges[b][1])
                faults.append(
                    f'bands "{a}" and "{b}" overlap between {lo:g} and {hi:g} keV, so they share photons; '
                    f"choose bands that do not, such as soft, medium, hard"
                )
    return faults


def make(background: Background = "hierarchical", *, cut: int = 0, prior: Prior | None = None) -> Template:
    """A photon template.

    Args:
        background: "hierarchical" learns the distribution of log background over sources; "flat" sums out a
            flat prior on each; "known" takes the field ``background``.
        cut: fewest counts in the first band with which a source enters the catalogue; the chance of that is
            divided out, so that the population is that of the sky and not of the catalogue. 0 for no cut.
        prior: numbers of the model.
    """
    if cut and background == "flat":
        raise ValueError(
            'cut needs the distribution of the background: use background="hierarchical" or "known".'
        )
    fields = dict(FIELDS)
    dims = {
        "mu": ("band",),
        "sigma": ("band",),
        "correlation": ("band", "band_other"),
        "log_brightness": ("source", "band"),
    }
    units = {"mu": "ln flux", "sigma": "ln flux", "correlation": "1", "log_brightness": "ln flux"}
    if background == "hierarchical":
        dims |= {
            "background_mu": ("band",),
            "background_sigma": ("band",),
            "log_background": ("source", "band"),
        }
        units |= {"background_mu": "ln ct", "background_sigma": "ln ct", "log_background": "ln ct"}
    if background == "known":
        fields = {name: f for name, f in fields.items() if name != "n_off"} | {"background": BACKGROUND}
    if background == "flat":
        fields["n_off"] = replace(fields["n_off"], role="given")
    return Template(
        name=f"photons, {background} background" + (f", cut at {cut} counts" if cut else ""),
        fields=fields,
        rows="source",
        model=partial(model, background=background, cut=cut),
        dims=dims,
        guide=partial(guide, background=background),
        nets=partial(Nets, background=background),
        prior=prior or Prior(),
        simulate=partial(simulate, background=background, cut=cut),
        units=units,
        sizes={"band_other": "band"},
        validate=overlapping,
    )


template = make()
flat = make("flat")
known = make("known")
