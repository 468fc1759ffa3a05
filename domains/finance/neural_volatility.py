"""Neural stochastic volatility: slow and fast hidden states, whose moves a network bends.

For window i of a series and day t, y the return over the series's scale,

    y_t       = drift + exp(h_t / 2) e_t,     h_t = level + x_1t + ... + x_Kt
    x_k(t+1)  = phi_k x_kt + f_k(x_t, e_t) + sigma_k (rho_k e_t + sqrt(1 - rho_k^2) exp(g_k(x_t, e_t)) eta_kt)

with eta ~ N(0, 1), and e of mean 0 and variance 1, a t with tails nu and nu_upper (``shocks``). f and g come
of one small network, |f| < .3 and |g| < 1: a stochastic-volatility model whose answer to good and bad news,
and whose volatility of volatility, the data may bend. No return is a function of an earlier one: all that
the past says goes through the states.

Latent are the states. Their guide is a chain of normals for each (``volatility_networks.Smoother``), with
pseudo-observations from a network that reads the whole window, and moves that are the model's own, made
linear. The other numbers (phi, sigma, rho, level, drift, tails, weights) are learnt as point estimates that
all rows share: the spread of results is that of the states, given them. Windows of one series may overlap,
and then count a day several times; no posterior of what rows share is claimed. The weights of f and g have a
normal prior.

One network serves series of any size: the scale of a series, which ``windows`` takes from its returns, comes
in as a field, and is the only number that is a series's own. Returns of other years or series are served
without a fit, by the guide (smoothed states) or by ``neural_forecasts`` (what was known on the day before).

Missing days: no likelihood, no pseudo-observation, and a shock that is summed out of the linear part.

References:
    Krishnan, Shalit and Sontag 2017, AAAI, arXiv:1609.09869 (structured inference networks).
    Johnson et al. 2016, NeurIPS, arXiv:1603.06277 (networks that give a Gaussian chain its potentials).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from domains.finance import volatility_networks
from domains.finance.volatility_networks import Dynamics, Nets, States
from scivi.errors import DataError
from scivi.inputs.fields import Field
from scivi.models import Batch, Template

_CANDIDATES = 64  # returns among which one is drawn that suits the states after it


@dataclass(frozen=True)
class Prior:
    """Numbers of the model."""

    weight_sd: float = 1.0  # of the weights of the transition's network (our choice)


class Returns(TorchDistribution):
    """Returns given the states of all days, with event (day).

    Args:
        dynamics: what they follow.
        x: states, (*, state, day).
        scale: of the series, percent, (*).
        present: True where a return is there; None if all are.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support: Any = constraints.real_vector
    has_rsample = False

    def __init__(self, dynamics: Dynamics, x: Tensor, scale: Tensor, present: Tensor | None = None) -> None:
        self.dynamics, self.x, self.scale, self.seen = dynamics, x, scale, present
        super().__init__(x.shape[:-2], x.shape[-1:], validate_args=False)

    def present(self, mask: Tensor) -> Returns:
        """The distribution of the days that are there."""
        return Returns(self.dynamics, self.x, self.scale, mask)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Returns:
        """The same over more dims."""
        x = self.x.expand(*batch_shape, *self.x.shape[-2:])
        return Returns(self.dynamics, x, self.scale, self.seen)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density per percent, (*)."""
        scale = self.scale.unsqueeze(-1)
        each = self.dynamics.log_likelihood(value / scale, self.x) - scale.log()
        return (each if self.seen is None else torch.where(self.seen, each, 0.0)).sum(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Returns that suit the states before and after them.

        Leverage ties a return to the next day's states; it is drawn from some candidates by their density.
        """
        with torch.no_grad():
            x = self.x.expand(*self._extended_shape(torch.Size(sample_shape))[:-1], *self.x.shape[-2:])
            chosen, most = self.dynamics.returns(x), torch.tensor(-math.inf)
            for _ in range(_CANDIDATES):  # the largest of Gumbel variables is one drawn by density
                y = self.dynamics.returns(x)
                move = self.dynamics.step(x[..., :-1], y[..., :-1])
                misfit = (x[..., 1:] - move.loc) * (-move.log_scale).exp()
                fit = -(0.5 * misfit.square() + move.log_scale).sum(-2)
                fit = fit - torch.empty_like(fit).exponential_().log()
                better = torch.nn.functional.pad(fit > most, (0, 1))  # nothing is known after the last day
                chosen, most = torch.where(better, y, chosen), torch.maximum(fit, most)
            return chosen * self.scale.unsqueeze(-1)


def model(batch: Batch, prior: Prior, nets: Nets) -> None:
    """The generative story of the module's docstring."""
    pyro.factor("weights", nets.dynamics.log_prior(prior.weight_sd))
    y, scale = batch.returns / batch.scale.unsqueeze(-1), batch.scale
    with batch.plate("window"):
        x = pyro.sample("states", States(nets.dynamics, y, batch.observed_mask.get("returns")))
        h = nets.dynamics.log_variance(x) + 2 * scale.log().unsqueeze(-1)
        pyro.deterministic("log_variance", h, event_dim=1)
        batch.observe("returns", Returns(nets.dynamics, x, scale))


def guide(batch: Batch, prior: Prior, nets: Nets) -> None:
    """Chains of normals whose pseudo-observations a network gives."""
    y = batch.returns / batch.scale.unsqueeze(-1)
    with batch.plate("window"):
        pyro.sample("states", nets.encoder(nets.dynamics, y, batch.observed_mask.get("returns")))


def simulate(
    sizes: Mapping[str, int], prior: Prior, generator: torch.Generator, *, form: Mapping[str, int]
) -> tuple[xr.Dataset, xr.Dataset]:
    """Windows of returns of the model as it begins, its network small at random, and the truth behind them.

    Args:
        sizes: number of windows and days ("window", "day").
        prior: not read.
        generator: torch's, whose seed is that of all numbers.
        form: as in ``make``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        dynamics = Nets(**form).dynamics
        scale = torch.rand(sizes["window"]) + 0.5
        x, y = volatility_networks.simulate(dynamics, sizes["window"], sizes["day"])
        h = dynamics.log_variance(x).detach() + 2 * scale.log()[:, None]
    dims = ("window", "day")
    table = xr.Dataset(
        {"returns": (dims, (scale[:, None] * y).numpy()), "scale": ("window", scale.numpy())},
        {dim: np.arange(sizes[dim]) for dim in dims},
    )
    truth = {"states": (("window", "state", "day"), x.numpy()), "log_variance": (dims, h.numpy())}
    return table, xr.Dataset(truth, table.coords)


def typical(returns: np.ndarray) -> np.ndarray:
    """Scale of series (series, day), percent: mean absolute return times sqrt(pi / 2).

    That is the standard deviation of a normal; a single wild day hardly moves it, and zeros do no harm.
    """
    return np.nanmean(np.abs(returns), -1) * np.sqrt(np.pi / 2)


def windows(table: xr.Dataset, length: int = 512, step: int = 64) -> xr.Dataset:
    """Cut series into rows for the template.

    Args:
        table: ``returns`` (series, day), percent, missing ones NaN; ``scale`` (series), percent, if it is not
            to be found from these returns (those of a test are not to say it).
        length: days of a window.
        step: days from one window to the next; the last one ends with the series.

    Returns:
        ``returns`` (window, day) and ``scale`` (window), windows labelled by series and first day.

    Raises:
        DataError: the series are shorter than a window.
    """
    returns = table["returns"].transpose("series", "day")
    n_days = returns.sizes["day"]
    if n_days < length:
        raise DataError(f"the series have {n_days} days, and a window {length}: give windows(length=...)")
    starts = np.unique([*range(0, n_days - length, step), n_days - length])
    values = np.stack([returns.values[:, s : s + length] for s in starts], 1)
    scale = table["scale"].values if "scale" in table else typical(returns.values)
    first = [str(day)[:10] for day in returns["day"].values[starts]]
    labels = [f"{series} {day}" for series in returns["series"].values for day in first]
    columns = {
        "returns": (("window", "day"), values.reshape(-1, length)),
        "scale": ("window", np.repeat(scale, len(starts))),
    }
    return xr.Dataset(columns, {"window": labels, "day": np.arange(length)})


def collapse(tree: xr.DataTree) -> xr.Dataset:
    """Whether the hidden states are used, of a result of ``scivi.draw``.

    Returns:
        ``kl_per_day``: divergence of the states' posterior from their prior, nats per day that has a return;
        ``sd_h``: standard deviation over days of the posterior mean of the log variance, the mean over
        windows. Both are near 0 where the fit has turned its back on the states.
    """
    likelihood = tree["log_likelihood"]["returns"].sum("window")
    weight = tree["sample_stats"]["row_log_weight"].sum("window")  # log of p(y, x) / q(x)
    n_days = int(tree["observed_data"]["returns"].notnull().sum())
    h = tree["posterior"]["log_variance"].mean(("chain", "draw"))
    return xr.Dataset(
        {"kl_per_day": (likelihood - weight).mean() / n_days, "sd_h": h.std("day").mean("window")}
    )


def parameters(fit: Any) -> xr.Dataset:
    """What the rows of a fit share, but for the network's weights; returns in units of their scale."""
    dynamics = fit.bound.nets.own.dynamics
    with torch.no_grad():
        by_state = {"phi": dynamics.phi, "sigma": dynamics.log_sigma.exp(), "rho": dynamics.rho}
        lone = {"level": dynamics.level, "drift": dynamics.drift}
        lone |= dict(zip(("nu", "nu_upper"), dynamics.tails, strict=True))
        found = {name: ("state", value.numpy()) for name, value in by_state.items()}
        return xr.Dataset(found | {name: float(value) for name, value in lone.items()})


def make(n_states: int = 2, *, width: int = 32, layers: int = 6, prior: Prior | None = None) -> Template:
    """A neural volatility template.

    Args:
        n_states: hidden states, from slow to fast.
        width: of the networks' hidden layers.
        layers: of the encoder's convolutions, which reach 2 ** layers days to either side.
        prior: numbers of the model.
    """
    form = {"n_states": n_states, "width": width, "layers": layers}
    return Template(
        name=f"neural volatility, {n_states} states",
        fields={
            "returns": Field(("window", "day"), "observed", unit="percent", doc="100 x log price ratio"),
            "scale": Field(
                ("window",), "given", constraints.positive, "percent", "typical size of the series's returns"
            ),
        },
        rows="window",
        model=model,
        dims={"states": ("window", "state", "day"), "log_variance": ("window", "day")},
        guide=guide,
        nets=lambda sizes, prior: Nets(**form),
        prior=prior or Prior(),
        simulate=partial(simulate, form=form),
        units={"log_variance": "ln(percent^2)"},
        sizes={"state": n_states},
        plan={
            "steps": 1000,
            "rows_per_batch": 12,
            "lr": 8e-3,
            "estimator": "stl",
            "decay": 0.5,
            "clip": 300.0,
            "stop": None,
        },
        made=("domains.finance.neural_volatility:make", form),
    )


template = make()
