"""Forecasts from a posterior of stochastic volatility: tomorrow exactly, later days by simulation.

A ``Filter`` is what is known at the end of a day: M posterior draws of a series's parameters, with weights,
and for each of them N particles of the log variances of tomorrow and of the day after, (h, h'). Tomorrow's
return has the density

    p(y) = sum_m w_m (1 / N) sum_n p(y | h_mn, h'_mn, parameters_m),

of which density, cumulative probability, quantiles and expected shortfall are taken. With leverage a link
(h, h') says where y lies; without, h' says nothing. When y is known,

    w_m  is multiplied by the mean of the m-th link densities,
    n    is drawn anew in proportion to them (systematic resampling),

and the path takes a step. Particles are in the order of h', and places and steps are a randomly shifted
lattice of two dims, which spreads them more evenly than chance: on the S&P 500, 200 particles leave the
weights w nearly as precise as 1000 drawn at random. So new days are taken in without a refit, at a cost that
does not grow with the number of days before; a day without a return weighs nothing. The draws of parameters
stay the ones they were: their effective size falls with the days, and says when to fit again.

The weights begin as the importance weights of the posterior's draws, Pareto-smoothed; so forecasts are of the
corrected posterior. Particles begin some weeks before the end, at each draw's own log variance, and are
filtered through the days since, by when they have forgotten where they began.

References:
    Gordon, Salmond and Smith 1993, IEE Proceedings F 140, 107 (the filter).
    Kitagawa 1996, Journal of Computational and Graphical Statistics 5, 1 (systematic resampling).
    Chopin 2002, Biometrika 89, 539 (draws of parameters reweighted by data as they come).
    Gerber and Chopin 2015, JRSS B 77, 509, doi:10.1111/rssb.12104 (particles in order, on a lattice).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from domains.finance import shocks
from domains.finance.likelihood import Story
from scivi.analysis import groups, pareto
from scivi.analysis.figures import BLUE, INK, Panels
from scivi.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (0.01, 0.05)  # of value at risk: those that regulators and the literature use
USABLE_K = 0.7  # k-hat above which weights do not correct (Yao, Vehtari, Simpson and Gelman 2018)
SETTLE = 50  # days of filtering after which it no longer shows where particles began (our choice)
_BANDS = (0.5, 0.8, 0.95)  # of a fan chart
_FEW = 50  # particles of a draw where only paths begin from them, some of each (our choice)
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples are the most even sequence of one dim


def weights(tree: xr.DataTree) -> xr.Dataset:
    """Importance weights of the draws of each series.

    Args:
        tree: of ``scivi.draw``, or of NUTS, whose draws weigh the same.

    Returns:
        log_weight (sample, series), normalised over all draws of all chains; k_hat (series).

    Raises:
        DataError: weights that are not finite.
    """
    posterior = groups.group(tree, "posterior")
    size, series = posterior.sizes["chain"] * posterior.sizes["draw"], posterior["series"]
    if groups.has(tree, "sample_stats", "row_log_weight"):
        raw = (
            groups.group(tree, "sample_stats")["row_log_weight"]
            .stack(sample=("chain", "draw"))
            .transpose("series", "sample")
        )
        log_weight, k_hat = pareto.smooth(raw.values)
    else:
        log_weight, k_hat = np.full((len(series), size), -math.log(size)), np.zeros(len(series))
    if broken := [str(name) for name in series.values[~np.isfinite(log_weight).any(-1)]]:
        raise DataError(f"the draws of series {broken} have no finite weights: the fit failed there.")
    found = {"log_weight": (("sample", "series"), log_weight.T), "k_hat": ("series", k_hat)}
    return xr.Dataset(found, {"series": series.values})


@dataclass(frozen=True)
class Filter:
    """What is known of tomorrow's returns: see the module's docstring.

    Args:
        story: parameters, (draw, series) each.
        log_weight: of the draws, normalised, (draw, series).
        now: log variances of tomorrow, (draw, series, particle).
        ahead: those of the day after.
        k_hat: Pareto's, of the weights of the posterior that it began from, (series,).
        series: labels.
        day: label of the last day known.
        seed: of the filter.
        taken: days taken in since it began.
    """

    story: Story
    log_weight: Tensor
    now: Tensor
    ahead: Tensor
    k_hat: np.ndarray
    series: tuple[Any, ...]
    day: np.datetime64 | int
    seed: int
    taken: int = 0

    def _links(self, y: Tensor) -> Tensor:
        """Log densities of returns (series,) along every link; 0 where there is none."""
        there = y.isfinite().unsqueeze(-1)
        link = self.story.link(y.nan_to_num().unsqueeze(-1).expand(self.now.shape[1:]), there)
        return link(self.now, self.ahead)

    def log_density(self, returns: np.ndarray) -> np.ndarray:
        """Log density of tomorrow's returns, (series,); 0 where one is missing."""
        each = self._links(torch.as_tensor(returns).to(self.now))
        of_draw = each.logsumexp(-1) - math.log(each.shape[-1])
        return (self.log_weight + of_draw).logsumexp(0).numpy()

    def probability(self, returns: np.ndarray) -> np.ndarray:
        """Probability that tomorrow's returns stay below these, (series,): the PIT of those that come."""
        y = torch.as_tensor(returns).to(self.now)
        loc, scale, p = self.story.placed(self.now, self.ahead)
        below = shocks.cumulative((y.unsqueeze(-1) - loc) / scale, p.nu, p.nu_upper)
        return (self.log_weight.exp() * below.mean(-1)).sum(0).numpy()

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Tomorrow's returns, ascending, one of every particle, and weights: (series, draw x particle)."""
        with stream(self.seed, self.taken, 1):
            loc, scale, p = self.story.placed(self.now, self.ahead)
            y = loc + scale * shocks.sample(loc.shape, loc, p.nu, p.nu_upper)
        weight = (self.log_weight.exp() / y.shape[-1]).unsqueeze(-1).expand(y.shape)
        y, order = y.transpose(0, 1).flatten(1).sort(-1)
        return y.numpy(), weight.transpose(0, 1).flatten(1).gather(-1, order).numpy()

    def effective_size(self) -> np.ndarray:
        """How many equally weighted draws of parameters are left, (series,)."""
        return (-(2 * self.log_weight).logsumexp(0)).exp().numpy()

    def after(self, returns: np.ndarray, day: np.datetime64 | int) -> Filter:
        """What is known once a day's returns (series,) are; NaN where there is none."""
        each = self._links(torch.as_tensor(returns).to(self.now))
        log_weight = (self.log_weight + each.logsumexp(-1)).log_softmax(0)
        ahead, order = self.ahead.sort(-1)
        with stream(self.seed, self.taken + 1):
            now = ahead.gather(-1, systematic(each.gather(-1, order)))
            ahead = _step(self.story, now)
        return replace(self, log_weight=log_weight, now=now, ahead=ahead, day=day, taken=self.taken + 1)


def begin(tree: xr.DataTree, particles: int = 200, seed: int = 0, settle: int = SETTLE) -> Filter:
    """A filter at the end of the last day of a posterior.

    Args:
        tree: of ``scivi.draw`` or ``scivi.nuts``; reads the parameters, ``log_variance``,
            ``log_variance_next`` and the observed returns.
        particles: of each draw.
        seed: of the filter's random numbers.
        settle: how many of the last days are filtered once more. 0, or a tree without observed returns: all
            particles of a draw begin at its ``log_variance_next``.

    Raises:
        DataError: weights that are not finite.

    Warns:
        Of series with k-hat above 0.7, whose weights cannot be relied on.
    """
    found = groups.group(tree, "posterior", "log_variance_next").stack(sample=("chain", "draw"))
    story = Story(**{part.name: _tensor(found[part.name]) for part in fields(Story) if part.name in found})
    weight = weights(tree)
    series, k_hat = weight["series"].values.tolist(), weight["k_hat"].values
    if poor := [f"{name} ({k:.2f})" for name, k in zip(series, k_hat, strict=True) if k > USABLE_K]:
        warnings.warn(
            f"Pareto k-hat is above {USABLE_K} for series {', '.join(poor)}: do not trust their forecasts.",
            stacklevel=2,
        )
    last, h = found["day"].values[-1], found["log_variance_next"]
    days = min(settle, found.sizes["day"]) if groups.has(tree, "observed_data", "returns") else 0
    if days:
        h = found["log_variance"].isel(day=-days)
    now = _tensor(h).unsqueeze(-1).repeat(1, 1, particles)
    with stream(seed, 0):
        ahead = _step(story, now)
    log_weight = torch.from_numpy(weight["log_weight"].values)
    state = Filter(story, log_weight, now, ahead, k_hat, tuple(series), last, seed)
    if days:
        for y in groups.group(tree, "observed_data")["returns"].transpose("day", "series").values[-days:]:
            state = state.after(y, last)
    return replace(state, log_weight=log_weight)  # which know of these days already


def _tensor(drawn: xr.DataArray) -> Tensor:
    """(draw, series), in double precision."""
    return torch.from_numpy(drawn.transpose("sample", "series").values.astype(float))


def update(known: xr.DataTree | Filter, table: xr.Dataset) -> Filter:
    """Take in new days without a refit.

    Args:
        known: a posterior, or a filter that has taken in earlier days.
        table: "returns" (series, day) of the days that followed, of the same series in any order; NaN where
            there is none.

    Raises:
        DataError: other series, or days that do not follow.
    """
    state = known if isinstance(known, Filter) else begin(known)
    new = following(state, table)
    for day, returns in zip(new["day"].values, new.transpose("day", "series").values, strict=True):
        state = state.after(returns, day)
    return state


def following(state: Filter, table: xr.Dataset) -> xr.DataArray:
    """The returns of a table whose days follow, series in the order of the filter.

    Raises:
        DataError: other series, or days that do not follow.
    """
    new = table["returns"]
    if set(new["series"].values.tolist()) != set(state.series):
        raise DataError(f"the forecasts are of series {list(state.series)}, these of {new['series'].values}.")
    days = new["day"].values
    if len(days) and (days[0] <= state.day or (days[1:] <= days[:-1]).any()):
        raise DataError(
            f"new days begin after {state.day} and ascend; these go from {days[0]} to {days[-1]}."
        )
    return new.sel(series=list(state.series))


def forecast(
    known: xr.DataTree | Filter,
    horizon: int = 20,
    paths: int = 4000,
    seed: int = 0,
    together: np.ndarray | None = None,
) -> xr.Dataset:
    """Simulate the days to come.

    Args:
        known: a posterior, or a filter.
        horizon: how many days.
        paths: how many.
        seed: of the paths.
        together: uniform numbers (path, series, horizon) that say how series depend on each other: on the
            first day the probability of a lower return, given all that is known; on later days that of a
            lower shock, given the path's volatility. None for independent series.

    Returns:
        returns and log_variance (path, series, horizon), all paths of equal weight. Coordinate horizon is 1,
        2, ...; ``day`` along it is the business days (Monday to Friday, holidays are not known) after the
        last if days are dates, else the numbers that follow.

    Example: value at risk of the return over all days is that of ``result["returns"].cumsum("horizon")``.
    """
    state = known if isinstance(known, Filter) else begin(known, _FEW, seed)
    n_series, particles = state.now.shape[1:]
    with stream(state.seed, state.taken, 2, seed):
        pick = systematic(state.log_weight.T, paths).T  # (path, series)
        one = torch.randint(particles, pick.shape)
        column = torch.arange(n_series).expand(pick.shape)
        story = state.story.mapped(lambda value: value.gather(0, pick))
        h = torch.stack([state.now[pick, column, one], state.ahead[pick, column, one]], -1)
        first = story.returns(h)
        if together is not None:  # the paths of each series in the order of its uniform numbers
            rank = torch.from_numpy(together[..., 0]).argsort(0).argsort(0)
            order = first.squeeze(-1).argsort(0).gather(0, rank)
            story = story.mapped(lambda value: value.gather(0, order))
            h, first = (value[order, column] for value in (h, first))
        path = list(h.unbind(-1))
        for _ in range(horizon - 1):
            path.append(_step(story, path[-1].unsqueeze(-1)).squeeze(-1))
        path = torch.stack(path, -1)
        given = None if together is None else torch.from_numpy(together[..., 1:])
        returns = torch.cat([first, story.returns(path[..., 1:], given)], -1)
    dims = ("path", "series", "horizon")
    coords = {"series": list(state.series), "horizon": np.arange(1, horizon + 1)}
    found = xr.Dataset(
        {"returns": (dims, returns.numpy()), "log_variance": (dims, path[..., :-1].numpy())}, coords
    ).assign_coords(day=("horizon", days_after(state.day, horizon)))
    found["returns"].attrs["units"], found["log_variance"].attrs["units"] = "percent", "ln(percent^2)"
    return found


def days_after(day: np.datetime64 | int, count: int) -> np.ndarray:
    """The business days after a date, or the numbers after a number."""
    if isinstance(day, np.datetime64):
        return pd.bdate_range(pd.Timestamp(day) + pd.offsets.BDay(), periods=count).to_numpy()
    return day + np.arange(1, count + 1)


def quantiles(returns: xr.DataArray, probs: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> xr.DataArray:
    """Quantiles over the paths of a forecast, with dim quantile."""
    return returns.quantile(list(probs), "path")


def value_at_risk(returns: xr.DataArray, levels: Sequence[float] = LEVELS) -> xr.DataArray:
    """The return that is undercut with the probability of each level: a loss is negative."""
    return returns.quantile(list(levels), "path").rename(quantile="level").rename("value_at_risk")


def expected_shortfall(returns: xr.DataArray, levels: Sequence[float] = LEVELS) -> xr.DataArray:
    """Mean of the returns that do not exceed the value at risk of each level."""
    return returns.where(returns <= value_at_risk(returns, levels)).mean("path").rename("expected_shortfall")


def weighted_quantiles(
    values: np.ndarray, weight: np.ndarray, levels: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of weighted values, and means of the values up to them.

    Args:
        values: (series, n), ascending.
        weight: (series, n), of sum 1.
        levels: between 0 and 1.

    Returns:
        (series, level) both: with few levels, value at risk and expected shortfall.
    """
    up_to = weight.cumsum(-1)
    mass = (weight * values).cumsum(-1)
    at = np.stack([np.searchsorted(row, np.asarray(levels) * row[-1]) for row in up_to])
    quantile = np.take_along_axis(values, at, -1)
    before = np.take_along_axis(up_to, at, -1) - np.asarray(levels)  # of the last value only a part counts
    return quantile, (np.take_along_axis(mass, at, -1) - before * quantile) / np.asarray(levels)


def fan_chart(
    found: xr.Dataset, series: str, *, past: xr.DataArray | None = None, ax: Axes | None = None
) -> Axes:
    """Quantiles of cumulated returns of one series against days, as bands of 50, 80 and 95 %.

    Args:
        found: of ``forecast``.
        series: which.
        past: returns (series, day) up to the forecast, shown cumulated to 0 at its beginning.
        ax: matplotlib's; a new figure's if None.
    """
    panel = Panels(ax, 1, (7.0, 3.5)).told
    total = found["returns"].sel(series=series).cumsum("horizon")
    day = found["day"].values
    if past is not None:
        y = past.sel(series=series).fillna(0.0)
        panel.plot(y["day"].values, (y.cumsum("day") - y.sum("day")).values, color=INK, lw=1)
    for share, shade in zip(reversed(_BANDS), ("#D6E3F0", "#A9C4E0", "#7FA6CF"), strict=True):
        low, high = total.quantile([0.5 - share / 2, 0.5 + share / 2], "path").values
        panel.fill_between(day, low, high, color=shade, lw=0, label=f"{share:.0%}")
    panel.plot(day, total.median("path").values, color=BLUE, label="median")
    panel.set(title=series, ylabel="cumulated return (percent)")
    panel.legend(frameon=False)
    return panel


def _step(story: Story, h: Tensor) -> Tensor:
    """The log variances that follow those of particles in order, (*, series, particle)."""
    mu, phi, sigma = (value.unsqueeze(-1) for value in (story.mu, story.phi, story.sigma))
    even = torch.arange(h.shape[-1], dtype=h.dtype) * _GOLDEN + torch.rand(*h.shape[:-1], 1, dtype=h.dtype)
    eta = torch.special.ndtri((even % 1).clamp(1e-12, 1 - 1e-12))
    return mu + phi * (h - mu) + sigma * eta


def systematic(log_weight: Tensor, count: int | None = None) -> Tensor:
    """Places along the last dim, in proportion to weights: their counts differ from n w by less than 1."""
    n = count or log_weight.shape[-1]
    points = (torch.arange(n) + torch.rand(*log_weight.shape[:-1], 1)) / n
    edges = log_weight.softmax(-1).cumsum(-1)
    return torch.searchsorted(edges, points.to(edges)).clamp_max(log_weight.shape[-1] - 1)


@contextmanager
def stream(*key: int) -> Iterator[None]:
    """Torch's random numbers follow from a key; its own stream stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield
