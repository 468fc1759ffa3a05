"""Stochastic volatility: daily returns whose log variance is a hidden autoregressive path.

For series i and day t, y the return in percent,

    y_t     = drift + exp(h_t / 2) (rho eta_(t+1) + sqrt(1 - rho^2) eps_t)
    h_(t+1) = mu + phi (h_t - mu) + sigma eta_(t+1)
    eta ~ N(0, 1),     eps of mean 0 and variance 1: normal, Student-t(nu), or a t with tails nu and nu_upper

rho < 0 is leverage: a fall in price goes with a rise of volatility. Every series has parameters of its own,
and all are fitted in one computation.

The path is summed out (``likelihood``), so that the latents of a series are its three to seven parameters.
Their guide is a skewed normal at the mode that a search finds for each series, with the curvature and the
widths there: no step of a fit is needed, and series or days that the fit has not seen are served as well as
its own. How well T days tell mu depends on phi and sigma, as the mean of the path strays from it by
sigma / (1 - phi) / T^(1/2); so search and guide see mu in units of that. Given the parameters, the path is
drawn from the Gaussian chain nearest to its posterior. ``make(path="sampled")`` keeps the path as a latent,
as NUTS wants it.

Missing days say nothing: gaps and forecasts follow from the autoregression.

References:
    Kim, Shephard and Chib 1998, Review of Economic Studies 65, 361.
    Omori, Chib, Shephard and Nakajima 2007, Journal of Econometrics 140, 425 (leverage).
    Kastner and Fruehwirth-Schnatter 2014, Computational Statistics and Data Analysis 76, 408.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor, nn
from torch.distributions import AffineTransform, biject_to

from domains.finance.likelihood import Returns, Story
from domains.finance.returns import from_prices, from_returns
from scivi.inputs.fields import Field
from scivi.models import Batch, Template
from scivi.models.chains import Autoregressive
from scivi.models.distributions import Moved
from scivi.models.normals import SinhArcsinh
from scivi.models.search import TAIL, Peak, peak

Errors = Literal["normal", "t", "skew_t"]
SigmaPrior = Literal["half_normal", "inverse_gamma"]
Path = Literal["summed", "sampled"]

FEWEST = 10  # returns of a series
LEAST_SD = 0.1  # percent a day, of the middle series: one of all is rather a fraction (our choice)
LONGEST_RUN = 15  # equal returns in a row: a density of returns has no maximum there (our choice)
_OF_A_DAY = 2.0  # variance with which a normal return tells its log variance: one over Fisher's information
_STALE = 0.3  # on the unbounded scale: quadratics found at most so far away serve a step of the search


@dataclass(frozen=True)
class Prior:
    """Numbers of the model; those of mu and sigma are Kastner and Fruehwirth-Schnatter's."""

    mu_mean: float = 0.0  # ln(percent^2)
    mu_sd: float = 10.0  # ln(percent^2)
    phi_a: float = 20.0  # (phi + 1) / 2 ~ Beta(a, b), Kim, Shephard and Chib
    phi_b: float = 1.5
    sigma_scale: float = 1.0  # ln(percent^2); half-normal scale of sigma
    variance_shape: float = 2.5  # sigma^2 ~ InverseGamma(shape, rate), Kim, Shephard and Chib
    variance_rate: float = 0.025
    rho_a: float = 3.0  # (rho + 1) / 2 ~ Beta(a, a); our choice, which keeps away from the ends
    nu_shape: float = 2.0  # nu - 2 ~ Gamma(shape, rate); Juarez and Steel 2010
    nu_rate: float = 0.1
    drift_sd: float = 0.2  # percent per day; our choice, far wider than any market's mean


@dataclass(frozen=True)
class Kind:
    """Which model: see ``make``."""

    errors: Errors = "skew_t"
    leverage: bool = True
    drift: bool = True
    sigma_prior: SigmaPrior = "half_normal"

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of a series; first those with the longest tails, which the others follow."""
        heavy = {"normal": (), "t": ("nu",), "skew_t": ("nu_upper", "nu")}[self.errors]
        return (*heavy, "phi", "sigma", "mu", *("rho",) * self.leverage, *("drift",) * self.drift)


UNITS = {"mu": "ln(percent^2)", "sigma": "ln(percent^2)", "drift": "percent"}
UNITS |= dict.fromkeys(("log_variance", "log_variance_next"), "ln(percent^2)")


def laws(prior: Prior, kind: Kind, like: Tensor) -> dict[str, dist.TorchDistribution]:
    """Priors of a series's parameters, by name."""
    one = like.new_ones(())
    found: dict[str, Any] = {
        "mu": dist.Normal(prior.mu_mean * one, prior.mu_sd),
        "phi": Moved(dist.Beta(prior.phi_a * one, prior.phi_b * one), -1.0, 2.0),
        "sigma": dist.HalfNormal(prior.sigma_scale * one),
        "nu": Moved(dist.Gamma(prior.nu_shape * one, prior.nu_rate * one), 2.0, 1.0),
        "nu_upper": Moved(dist.Gamma(prior.nu_shape * one, prior.nu_rate * one), 2.0, 1.0),
        "rho": Moved(dist.Beta(prior.rho_a * one, prior.rho_a * one), -1.0, 2.0),
        "drift": dist.Normal(0 * one, prior.drift_sd),
    }
    if kind.sigma_prior == "inverse_gamma":
        variance = dist.InverseGamma(prior.variance_shape * one, prior.variance_rate * one)
        root = torch.distributions.transforms.PowerTransform(0.5 * one)
        found["sigma"] = dist.TransformedDistribution(variance, [root])
    return {name: found[name] for name in kind.names}


@dataclass(frozen=True)
class Chart:
    """Maps from the unbounded scale of a search and its guide to the parameters.

    Args:
        supports: of the parameters, by name.
        level: mu at 0 of its scale, (series,).
        days: with a return, (series,).
    """

    supports: Mapping[str, Any]
    level: Tensor
    days: Tensor

    def map(self, name: str, found: Mapping[str, Tensor]) -> Any:
        """That of a parameter, given those before it."""
        if name != "mu":
            return biject_to(self.supports[name])
        long_run = found["sigma"].square() / (1 - found["phi"]).square()
        return AffineTransform(self.level, ((long_run + _OF_A_DAY) / self.days).sqrt())


def _present(batch: Batch) -> Tensor | None:
    return batch.observed_mask.get("returns")


def model(batch: Batch, prior: Prior, nets: nn.Module | None, *, kind: Kind, path: Path) -> None:
    """The generative story of the module's docstring."""
    days = batch.returns.shape[-1]
    with batch.plate("series"):
        story = Story(
            **{name: pyro.sample(name, law) for name, law in laws(prior, kind, batch.returns).items()}
        )
        h = None
        if path == "sampled":  # about mu, in units of sigma: so NUTS sees neither move with the path
            unit = Autoregressive(0 * story.mu, story.phi, torch.ones_like(story.phi), days + 1)
            x = pyro.sample("path", unit)
            h = story.mu.unsqueeze(-1) + story.sigma.unsqueeze(-1) * x
            pyro.deterministic("log_variance", h[..., :-1], event_dim=1)
            pyro.deterministic("log_variance_next", h[..., -1])
        elif batch.predicting:  # returns anew, and missing ones, along the paths that the data leave
            h = story.smoothed(batch.returns, _present(batch)).rsample()
        batch.observe("returns", Returns(story, days, h))


def derive(
    batch: Batch, prior: Prior, nets: nn.Module | None, values: Mapping[str, Any], *, kind: Kind
) -> Any:
    """Paths drawn given each draw of the parameters."""
    story = Story(**{name: values[name] for name in kind.names})
    h = story.smoothed(batch.returns, _present(batch)).rsample()
    return {"log_variance": h[..., :-1], "log_variance_next": h[..., -1]}


class Target:
    """Log density of the parameters of some series, on the unbounded scale, with its gradient.

    Args:
        y: returns (series, day).
        present: True where a return is there; None if all are.
        prior: numbers of the model.
        kind: which.
    """

    def __init__(self, y: Tensor, present: Tensor | None, prior: Prior, kind: Kind) -> None:
        self.y, self.there, self.kind = y, present, kind
        self.laws = laws(prior, kind, y)
        self.chart, self.at = self._start()
        self.near = self.parts(self.at)[0].near(y, present)

    def _start(self) -> tuple[Chart, Tensor]:
        """Where a search begins, (series, parameters): the level of the returns, and what is common."""
        there = torch.ones_like(self.y) if self.there is None else self.there.to(self.y)
        days = there.sum(-1)
        mean = (self.y * there).sum(-1) / days
        size = ((self.y - mean.unsqueeze(-1)).abs() * there).sum(-1) / days
        usual = {"phi": 0.95, "sigma": 0.25, "nu": 10.0, "nu_upper": 15.0, "rho": -0.3}
        values = {name: torch.full_like(mean, value) for name, value in usual.items()}
        # of a normal with its path's variance about 1: E|y| = (2 / pi)^(1/2) exp(mu / 2 + 1 / 8)
        values |= {"mu": 2 * size.log() + math.log(0.5 * math.pi) - 0.25, "drift": mean}
        chart = Chart({name: law.support for name, law in self.laws.items()}, values["mu"], days)
        return chart, torch.stack([chart.map(n, values).inv(values[n]) for n in self.kind.names], -1)

    def parts(self, u: Tensor) -> tuple[Story, Tensor]:
        """The parameters at points (*, series, parameters), and the log volume that the maps give a point."""
        found: dict[str, Tensor] = {}
        volume = torch.zeros_like(u[..., 0])
        for name, x in zip(self.kind.names, u.unbind(-1), strict=True):
            to = self.chart.map(name, found)
            found[name] = to(x)
            volume = volume + to.log_abs_det_jacobian(x, found[name])
        return Story(**found), volume

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density (*, series) and gradient."""
        if u.dim() == 2 and bool(((u - self.at).abs() > _STALE).any()):
            self.near, self.at = self.parts(u)[0].near(self.y, self.there, self.near), u
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            story, value = self.parts(u)
            for name, law in self.laws.items():
                value = value + law.log_prob(story.parts()[name])
            value = value + story.log_likelihood(self.y, self.there, self.near)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient


def posterior(batch: Batch, prior: Prior, kind: Kind) -> tuple[Chart, Peak]:
    """Each series's parameters on the unbounded scale, found in double precision, and what maps them."""
    target = Target(batch.returns.double(), _present(batch), prior, kind)
    chart, found = target.chart, peak(target, target.at)
    level, days = chart.level.to(batch.returns), chart.days.to(batch.returns)
    return replace(chart, level=level, days=days), Peak(*(part.to(batch.returns) for part in found))


def guide(batch: Batch, prior: Prior, nets: nn.Module | None, *, kind: Kind) -> None:
    """A skewed normal about each series's mode, parameter by parameter given those before."""
    chart, at = posterior(batch, prior, kind)
    noise: list[Tensor] = []
    found: dict[str, Tensor] = {}
    with batch.plate("series"):
        for k, name in enumerate(kind.names):
            centre, width = at.loc[:, k], at.tril[:, k, k]
            for j, z in enumerate(noise):
                centre = centre + at.tril[:, k, j] * z
            base = dist.Normal(torch.zeros_like(centre), torch.ones_like(centre))
            bend = SinhArcsinh(at.skew[:, k], TAIL * torch.ones_like(centre))
            to = chart.map(name, found)
            law = dist.TransformedDistribution(base, [bend, AffineTransform(centre, width), to])
            found[name] = pyro.sample(name, law)
            noise.append((to.inv(found[name]) - centre) / width)


def simulate(
    sizes: Mapping[str, int], prior: Prior, generator: torch.Generator, *, kind: Kind
) -> tuple[xr.Dataset, xr.Dataset]:
    """Series of returns and the truth behind them, from priors narrowed to what markets show.

    Args:
        sizes: number of series and days ("series", "day"; 1000 days if absent).
        prior: not read.
        generator: torch's, whose seed starts numpy's.
        kind: which model.
    """
    rng = np.random.default_rng(generator.initial_seed())
    n, days = sizes["series"], sizes.get("day", 1000)
    drawn = {
        "mu": rng.normal(0.0, 0.7, n),
        "phi": rng.uniform(0.93, 0.985, n),
        "sigma": rng.uniform(0.15, 0.35, n),
        "nu": rng.uniform(5.0, 15.0, n),
        "nu_upper": rng.uniform(5.0, 30.0, n),
        "rho": rng.uniform(-0.8, 0.0, n),
        "drift": rng.normal(0.03, 0.03, n),
    }
    story = Story(**{name: torch.as_tensor(drawn[name]) for name in kind.names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        h = story.path(days).rsample()
        y = story.returns(h)
    coords = {"series": np.arange(n), "day": np.arange(days)}
    truth = {name: ("series", drawn[name]) for name in kind.names}
    truth |= {
        "log_variance": (("series", "day"), h[:, :-1].numpy()),
        "log_variance_next": ("series", h[:, -1].numpy()),
    }
    return xr.Dataset({"returns": (("series", "day"), y.numpy())}, coords), xr.Dataset(truth, coords)


def bad_returns(values: Mapping[str, np.ndarray], coords: Mapping[str, np.ndarray]) -> list[str]:
    """Faults of the returns: series that are constant, too short, or look like prices.

    Warns:
        UserWarning: they scatter so little that they look like fractions.
    """
    faults, spread = [], []  # the sds of sound series
    for label, y in zip(coords["series"], np.asarray(values["returns"], dtype=float), strict=True):
        there = y[np.isfinite(y)]
        same = np.diff(np.flatnonzero(np.diff(y, prepend=np.nan, append=np.nan) != 0))  # lengths of runs
        if len(there) < FEWEST:
            faults.append(f'series "{label}" has {len(there)} returns; {FEWEST} at least are needed')
        elif np.ptp(there) == 0:
            faults.append(f'series "{label}" is constant at {there[0]:g}: it has no volatility to be found')
        elif there.min() > 0:
            faults.append(
                f'series "{label}" never falls: are these prices? '
                f"domains.finance.returns.from_prices makes returns of them"
            )
        elif same.max() >= LONGEST_RUN:
            faults.append(
                f'series "{label}" has {same.max()} equal returns in a row; '
                f"where nothing was traded, make them NaN"
            )
        else:
            spread.append(there.std())
    if spread and (middle := float(np.median(spread))) < LEAST_SD:
        text = f"returns have an sd of {middle:.2g} percent a day: if they are fractions, multiply by 100"
        warnings.warn(text, stacklevel=4)
    return faults


def make(
    errors: Errors = "skew_t",
    leverage: bool = True,
    drift: bool = True,
    *,
    sigma_prior: SigmaPrior = "half_normal",
    path: Path = "summed",
    prior: Prior | None = None,
) -> Template:
    """A stochastic-volatility template.

    Args:
        errors: "normal", "t" or "skew_t".
        leverage: whether returns and volatility have a correlation rho.
        drift: whether there is a mean return; else it is 0.
        sigma_prior: "half_normal" for sigma, or "inverse_gamma" for its square.
        path: "summed", or "sampled" to keep the path as a latent, for NUTS.
        prior: numbers of the model.
    """
    kind = Kind(errors, leverage, drift, sigma_prior)
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(kind.names, ("series",))
    dims |= {"log_variance": ("series", "day"), "log_variance_next": ("series",)}
    summed = path == "summed"
    return Template(
        name=f"stochastic volatility, {errors.replace('_', '-')} errors" + ", leverage" * leverage,
        fields={
            "returns": Field(("series", "day"), role="observed", unit="percent", doc="100 x log price ratio")
        },
        rows="series",
        model=partial(model, kind=kind, path=path),
        dims=dims,
        guide=partial(guide, kind=kind) if summed else None,
        prior=prior or Prior(),
        simulate=partial(simulate, kind=kind),
        derive=partial(derive, kind=kind) if summed else None,
        units={name: UNITS[name] for name in dims if name in UNITS},
        validate=bad_returns,
        plan={"steps": 0} if summed else {},
        made=("domains.finance.volatility:make", {**asdict(kind), "path": path}),
    )


def from_data(data: Any, *, prices: bool = True, **options: Any) -> tuple[Template, xr.Dataset]:
    """A template, and the table that it takes, of prices or returns.

    From the command line: ``scivi fit domains.finance.volatility:from_data prices.csv --out results``.

    Args:
        data: path of a CSV file whose first column holds the days and each other column a series; or what
            ``returns.from_prices`` takes.
        prices: whether they are prices; else returns in percent.
        **options: of ``make``.

    Raises:
        DataError: listing all faults of the numbers.
    """
    read = isinstance(data, str | os.PathLike)
    frame = pd.read_csv(data, index_col=0, parse_dates=True) if read else data
    return make(**options), (from_prices if prices else from_returns)(frame)


template = make()
