"""Photon counts of a catalogue of sources, in one or more bands.

It gives the brightness of each source, and of their population.

For source i and band k, with log brightness u (natural log of a flux in the unit that ``exposure`` is per)
and log background v (natural log of the expected background counts in the source aperture):

    x_i      = (reference, colours)         ~ Normal(mean, scatter, correlation)
    u_i      = cumulative sum of x_i          (u_1 = reference, u_k - u_{k-1} = colour k)
    v_ik     ~ Normal(background_mu_k, background_sigma_k)
    n_on_ik  ~ Poisson(E_ik f_ik exp(u_ik) + exp(v_ik))
    n_off_ik ~ Poisson(exp(v_ik) / alpha_ik + E_ik g_ik exp(u_ik))

with exposure E, fractions f and g of the point-spread function and area ratio alpha as in ``apertures``,
which also holds the guide.

``template`` learns the distribution of the background (above); ``flat`` and ``known`` treat it as in
``apertures``. ``make`` also takes catalogues cut at a number of counts, whose selection is divided out.

References:
    Primini and Kashyap 2014, ApJ 796, 24, doi:10.1088/0004-637X/796/1/24 (apertures and background).
    Loredo 2004, AIP Conf. Proc. 735, 195, arXiv:astro-ph/0409387 (populations from counts with selection).
    Lewandowski, Kurowicka and Joe 2009, J. Multivar. Anal. 100, 1989 (prior of the correlation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor, nn
from torch.distributions import constraints

from domains.astrophysics import apertures
from domains.astrophysics.apertures import Background, Population
from scivi.inputs.fields import Field
from scivi.models import Batch, Template, guides
from scivi.models.networks import perceptron


@dataclass(frozen=True)
class Prior:
    """Numbers of the model. All are our choice: weak on the scale of ln(flux), where 1 is a factor of 2.7."""

    brightness_mean: float = 0.0  # ln(flux unit); centre of the population's mean in the first band
    brightness_sd: float = 5.0  # ln(flux unit)
    colour_sd: float = 3.0  # ln(flux ratio); of the mean colours
    # ln(flux); half-normal scale of the population's scatter, in brightness and in colours.
    scatter: float = 2.0
    correlation: float = 2.0  # LKJ concentration; 1 is uniform
    background_mean: float = 0.0  # ln(counts in the source aperture)
    background_sd: float = 5.0  # ln(counts)
    background_scatter: float = 1.0  # ln(counts); half-normal scale


BANDS = {
    "e_min": Field(
        ("band",), "given", constraints.nonnegative, "keV", "lower edge; 0 if unknown", default=0.0
    ),
    "e_max": Field(
        ("band",), "given", constraints.nonnegative, "keV", "upper edge; 0 if unknown", default=0.0
    ),
}
MOST_BANDS = 20  # where there are no more sources; more are sources (our choice)
EDGES = {  # keV; Chandra Source Catalog 2.0, energy bands (Evans et al. 2010, ApJS 189, 37, table 4)
    "ultrasoft": (0.2, 0.5),
    "soft": (0.5, 1.2),
    "medium": (1.2, 2.0),
    "hard": (2.0, 7.0),
    "broad": (0.5, 7.0),
    "wide": (0.1, 10.0),
}


def population(values: Mapping[str, Tensor]) -> Population:
    """The population in terms of bands, from the sites in terms of reference brightness and colours."""
    mean, scatter = values["mean"], values["scatter"]
    n_bands = mean.shape[-1]
    tril = torch.diag_embed(scatter)
    if n_bands > 1:
        sums = torch.ones(n_bands, n_bands, dtype=mean.dtype, device=mean.device).tril()
        tril = sums @ (scatter.unsqueeze(-1) * values["correlation_tril"])
    return Population(mean.cumsum(-1), tril, values.get("background_mu"), values.get("background_sigma"))


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
        u = pyro.sample("log_brightness", apertures.normal(pop.mu, pop.tril))
        apertures.observe(batch, u, pop, background, cut)


def nets(sizes: Mapping[str, int], prior: Prior, *, background: Background) -> apertures.Nets:
    """The joint normal of the population, started at the prior's centre, and the network of the sources."""
    n = sizes["band"]
    half = math.sqrt(2 / math.pi)  # mean of a half-normal in units of its scale
    start = {
        "mean": torch.full((n,), prior.brightness_mean),
        "scatter": torch.full((n,), half * prior.scatter),
    }
    if n > 1:
        start["correlation_tril"] = torch.eye(n)
    if background == "hierarchical":
        start["background_mu"] = torch.full((n,), prior.background_mean)
        start["background_sigma"] = torch.full((n,), half * prior.background_scatter)
    of: dict[str, constraints.Constraint] = dict.fromkeys(("mean", "background_mu"), constraints.real)
    of["correlation_tril"] = constraints.corr_cholesky
    supports = {name: of.get(name, constraints.positive) for name in start}
    normal = guides.global_normal(supports, start, scale=0.05)
    # bands are told apart by their place
    correct = perceptron(apertures.N_FEATURES * n, apertures.N_OUTPUTS * n, (32, 32), last=0.1)
    return apertures.Nets(normal, correct)


def guide(batch: Batch, prior: Prior, nets: apertures.Nets, *, background: Background) -> None:
    """Joint normal for the population; skewed Laplace for each source given the population."""
    apertures.guide(batch, nets, population(nets.globals(batch)), background=background)


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

    Two that overlap hold the same photons, and cannot be fitted as independent data. Very many are rather
    the sources of a transposed matrix.

    Args:
        values: fields without rows.
        coords: labels by dim; where the edges are not given, Chandra's own names of bands are known.
    """
    names = [str(b) for b in coords["band"]]
    if len(names) > MOST_BANDS and len(names) > len(coords.get("source", names)):
        n = len(coords["source"])
        return [f"there are {len(names)} bands of {n} sources: if matrices are transposed, pass their .T"]
    given = zip(names, values["e_min"], values["e_max"], strict=True)
    edges = [(b, (lo, hi) if hi > lo else EDGES[b]) for b, lo, hi in given if hi > lo or b in EDGES]
    faults = []
    for (a, (a_min, a_max)), (b, (b_min, b_max)) in combinations(edges, 2):
        lo, hi = max(a_min, b_min), min(a_max, b_max)
        if lo < hi - 1e-9:
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
    return Template(
        name=f"photons, {background} background" + (f", cut at {cut} counts" if cut else ""),
        fields=apertures.fields("band", background) | BANDS,
        rows="source",
        model=partial(model, background=background, cut=cut),
        dims=dims,
        guide=partial(guide, background=background),
        nets=partial(nets, background=background),
        prior=prior or Prior(),
        simulate=partial(simulate, background=background, cut=cut),
        units=units,
        sizes={"band_other": "band"},
        validate=overlapping,
        made=("domains.astrophysics.photons:make", {"background": background, "cut": cut}),
    )


template = make()
flat = make("flat")
known = make("known")
