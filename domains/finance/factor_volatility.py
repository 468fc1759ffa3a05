"""Volatility of a panel: loadings that move, stochastic volatility of each shock, big days in common.

    y_t = Lambda_t u_t

with unit lower-triangular loadings (``loadings``). Each series's shocks u_k follow the template of
``volatility``, all fitted in one computation and with its posterior, weights and k-hat. Shocks of a day are
uncorrelated, but big ones come together: with F_k the forecast distribution of u_k, the F_k(u_k) of a day
have the copula of a multivariate t with nu degrees of freedom and no correlation. The log score of a day is

    log p(y_t | past) = sum_k log p(u_kt | past) - log g_kt + log c_nu(F_1(u_1t), ..., F_K(u_Kt)).

The way of a fit:

    panel = factor_volatility.split(table)
    fit = scivi.fit(factor_volatility.template, panel.shocks)
    result = scivi.draw(fit, panel.shocks, 500)
    known = factor_volatility.begin(result, panel)
    ahead = factor_volatility.forecast(known, horizon=20)

What the posterior holds is the volatility of shocks given loadings that the days before foretold; loadings
carry their own uncertainty into densities and paths, but not into the parameters.

References:
    Pitt and Shephard 1999, Bayesian Statistics 6, 547 (factor stochastic volatility).
    Genest, Ghoudi and Rivest 1995, Biometrika 82, 543 (copulas fitted to ranks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from scipy import optimize, stats
from scipy.special import gammaln
from tqdm.auto import tqdm

from domains.finance import forecasts, loadings, scores, volatility
from domains.finance.backtest import Posterior, first_day, fitted
from domains.finance.forecasts import LEVELS, Filter
from domains.finance.loadings import Loadings
from scivi.errors import DataError
from scivi.models.template import Template

NU = (3.0, 200.0)  # between which that of the copula is searched
_EDGE = 1e-9  # probabilities are kept so far from 0 and 1


@dataclass(frozen=True)
class Panel:
    """Returns taken apart, up to a day.

    Args:
        shocks: "returns" (series, day), the table that the template of ``volatility`` takes.
        loadings: at the end of the last day.
        nu: degrees of freedom of the copula.
    """

    shocks: xr.Dataset
    loadings: Loadings
    nu: float


def split(table: xr.Dataset, factors: int | None = None) -> Panel:
    """Take a panel's returns apart.

    Args:
        table: "returns" (series, day), of ``returns.from_prices``. The first series are the factors.
        factors: how many; None for as many as there are series. A few do for large panels.

    Raises:
        DataError: fewer than two series, or than 200 days, or series that do not move.
    """
    returns = table["returns"].transpose("series", "day")
    if returns.sizes["series"] < 2:
        raise DataError("a panel has two series at least.")
    shocks, _, known = loadings.split(returns, factors)
    return Panel(shocks.to_dataset(name="returns"), known, shared_tail(shocks))


def shared_tail(shocks: xr.DataArray) -> float:
    """Degrees of freedom of the copula, by maximum likelihood from ranks.

    Args:
        shocks: (series, day); each is divided by the moving level of those before it.
    """
    frame = shocks.transpose("day", "series").to_pandas()
    level = frame.pow(2).ewm(alpha=1 - loadings.LEVEL).mean().shift().pow(0.5)
    z = (frame / level).iloc[loadings.SETTLE :].dropna()
    u = z.rank().to_numpy() / (len(z) + 1)

    def loss(log_nu: float) -> float:
        return -float(log_copula(u, np.exp(log_nu)).sum())

    low, high = np.log(NU)
    return float(np.exp(optimize.fminbound(loss, low, high)))


def log_copula(u: np.ndarray, nu: float) -> np.ndarray:
    """Log density of the copula of uncorrelated t variates.

    Args:
        u: probabilities, (*, K); NaN where there is none.
        nu: degrees of freedom.

    Returns:
        (*).
    """
    there = np.isfinite(u)
    x = stats.t.ppf(np.clip(np.where(there, u, 0.5), _EDGE, 1 - _EDGE), nu)
    n = there.sum(-1)
    joint = gammaln((nu + n) / 2) - gammaln(nu / 2) - 0.5 * n * np.log(nu * np.pi)
    joint = joint - 0.5 * (nu + n) * np.log1p((x**2 * there).sum(-1) / nu)
    return joint - (stats.t.logpdf(x, nu) * there).sum(-1)


@dataclass(frozen=True)
class Known:
    """What is known of tomorrow's returns.

    Args:
        shocks: filter of each series's shocks.
        loadings: at the end of the day.
        nu: of the copula.
    """

    shocks: Filter
    loadings: Loadings
    nu: float

    def log_density(self, returns: np.ndarray) -> float:
        """Joint log density of tomorrow's returns (series,), of those that are there."""
        u, log_g = self.loadings.shocks(returns)
        there = np.isfinite(u)
        below = np.where(there, self.shocks.probability(np.nan_to_num(u)), np.nan)
        each = self.shocks.log_density(u) - log_g
        return float(each.sum() + log_copula(below, self.nu))

    def after(self, returns: np.ndarray, day: np.datetime64 | int) -> Known:
        """What is known once a day's returns (series,) are; NaN where there is none."""
        u, _ = self.loadings.shocks(returns)
        return replace(self, shocks=self.shocks.after(u, day), loadings=self.loadings.after(returns))


def begin(tree: xr.DataTree, panel: Panel, particles: int = 200, seed: int = 0) -> Known:
    """Forecasts at the end of a panel, from a posterior of its shocks.

    Args:
        tree: of ``scivi.draw`` or ``scivi.nuts`` on ``panel.shocks``.
        panel: of ``split``.
        particles: of each draw.
        seed: of the filter's random numbers.

    Raises:
        DataError: a posterior of other series, or weights that are not finite.
    """
    state = forecasts.begin(tree, particles, seed)
    if list(state.series) != (own := panel.shocks["series"].values.tolist()):
        raise DataError(f"the posterior is of series {list(state.series)}, the panel of {own}.")
    return Known(state, panel.loadings, panel.nu)


def update(known: Known, table: xr.Dataset) -> Known:
    """Take in new days without a refit.

    Args:
        known: of ``begin``, or of an earlier update.
        table: "returns" (series, day) of the days that followed, series in any order.

    Raises:
        DataError: other series, or days that do not follow.
    """
    new = forecasts.following(known.shocks, table)
    for day, y in zip(new["day"].values, new.transpose("day", "series").values, strict=True):
        known = known.after(y, day)
    return known


def forecast(known: Known, horizon: int = 20, paths: int = 4000, seed: int = 0) -> xr.Dataset:
    """Simulate the days to come, all series together.

    Args:
        known: of ``begin`` or ``update``.
        horizon: how many days.
        paths: how many.
        seed: of the paths.

    Returns:
        returns (path, series, horizon) in percent, all paths of equal weight, with the coordinates of
        ``forecasts.forecast``; ``portfolio`` makes one series of them. The shocks of the first day have the
        copula of the module's docstring; those of a later day have it given the path's volatilities.
    """
    rng = np.random.default_rng([known.shocks.seed, known.shocks.taken, 3, seed])
    shape = (paths, len(known.shocks.series), horizon)
    common = np.sqrt(known.nu / rng.chisquare(known.nu, (paths, 1, horizon)))
    u = stats.t.cdf(rng.standard_normal(shape) * common, known.nu).clip(_EDGE, 1 - _EDGE)
    shocks = forecasts.forecast(known.shocks, horizon, paths, seed, u)["returns"]
    return shocks.copy(data=known.loadings.returns(shocks.values, rng)).to_dataset(name="returns")


def correlation(ahead: xr.Dataset) -> xr.DataArray:
    """Correlations of the returns over all days of a forecast, (series, other)."""
    total = ahead["returns"].sum("horizon")
    names = total["series"].values
    matrix = np.corrcoef(total.transpose("series", "path").values)
    return xr.DataArray(matrix, {"series": names, "other": names}, ("series", "other"), "correlation")


def portfolio(returns: xr.DataArray, weights: Mapping[str, float] | None = None) -> xr.DataArray:
    """Return of a portfolio, as a series of that name.

    Args:
        returns: percent, with dim series. Log returns are added with the weights, which is right for small
            ones.
        weights: of the series, of sum 1; None for equal ones.

    Raises:
        DataError: weights of other series.
    """
    names = [str(name) for name in returns["series"].values]
    shares = dict.fromkeys(names, 1 / len(names)) if weights is None else dict(weights)
    if strange := sorted(set(shares) - set(names)):
        raise DataError(f"the portfolio holds {strange}; there are {names}.")
    share = xr.DataArray([shares.get(n, 0.0) for n in names], {"series": returns["series"]}, ("series",))
    return (returns * share).sum("series", skipna=False).expand_dims(series=["portfolio"])


def backtest(
    template: Template | Posterior,
    table: xr.Dataset,
    start: Any,
    *,
    weights: Mapping[str, float] | None = None,
    factors: int | None = None,
    refit_every: int = 50,
    window: int | None = 2000,
    draws: int = 500,
    particles: int = 100,
    paths: int = 4000,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Forecast each day's returns together from the days before.

    Args:
        template: of ``volatility``; or a function from a table of shocks to posterior draws.
        table: "returns" (series, day).
        start: label of the first day to forecast; if it is none of the days, the next one.
        weights: of the portfolio; None for equal ones.
        factors: of ``split``.
        refit_every: days from fit to fit.
        window: fit to so many last days; None for all.
        draws: of each posterior.
        particles: of each draw.
        paths: from which a day's portfolio is forecast.
        levels: of value at risk.
        seed: of all random numbers.
        progress: show a bar.

    Returns:
        joint_log_score (day), nats, of all series together. Of the portfolio, (day, series) and level, as
        ``backtest.backtest`` has them: returns, crps, pit, value_at_risk, expected_shortfall; so
        ``backtest.summary`` reads them. k_hat (fit, asset) of each posterior.

    Raises:
        DataError: too few days before the start, or none after it.
    """
    returns = table["returns"].transpose("series", "day")
    days = returns["day"].values
    first = first_day(days, start, least=0)  # ``split`` needs some
    posterior = fitted(template, draws, seed) if isinstance(template, Template) else template
    rows, k_hat, begins = [], [], range(first, len(days), refit_every)
    with tqdm(total=len(days) - first, unit="day", disable=not progress) as bar:
        for begin_at in begins:
            panel = split(returns.isel(day=slice(begin_at)).to_dataset(name="returns"), factors)
            recent = panel.shocks.isel(day=slice(-window if window else None, None))
            known = begin(posterior(recent), panel, particles, seed)
            k_hat.append(known.shocks.k_hat)
            block = returns.isel(day=slice(begin_at, begin_at + refit_every))
            for day in block["day"].values:
                rows.append(_scored(known, block.sel(day=day), weights, paths, levels))
                known = known.after(block.sel(day=day).values, day)
                bar.update()
    found = xr.concat(rows, "day").assign_coords(day=days[first:], fit=days[list(begins)])
    return found.assign_coords(asset=returns["series"].values).assign(
        k_hat=(("fit", "asset"), np.stack(k_hat))
    )


def _scored(
    known: Known, y: xr.DataArray, weights: Mapping[str, float] | None, paths: int, levels: Sequence[float]
) -> xr.Dataset:
    """Forecast and scores of one day, with returns (series,)."""
    drawn = portfolio(forecast(known, 1, paths)["returns"].isel(horizon=0, drop=True), weights)
    sample = np.sort(drawn.transpose("series", "path").values)
    real = portfolio(y.drop_vars("day"), weights)
    risk, shortfall = forecasts.weighted_quantiles(sample, np.full_like(sample, 1 / paths), levels)
    below = (sample <= real.values[:, None]).mean(-1)
    found = {
        "returns": ("series", real.values),
        "crps": ("series", scores.crps(sample, real.values)),
        "pit": ("series", np.where(np.isfinite(real.values), below, np.nan)),
        "value_at_risk": (("series", "level"), risk),
        "expected_shortfall": (("series", "level"), shortfall),
        "joint_log_score": known.log_density(y.values),
    }
    return xr.Dataset(found, {"series": real["series"].values, "level": list(levels)})


template = volatility.make(leverage=False)
