"""Tomorrow's return by the neural volatility model, day after day: a particle filter over its states.

What is known of the states before a day is held as particles. Each foretells the day's return; once the
return is there, particles are weighed by its density, resampled (systematically), and moved a day on: the
bootstrap filter. Of a missing return nothing is weighed, and each particle draws one of its own. Several
fits, of different seeds, go side by side; they foretell as a mixture.

References:
    Gordon, Salmond and Smith 1993, IEE Proceedings F 140, 107 (the filter).
    Carpenter, Clifford and Fearnhead 1999, IEE Proc. Radar 146, 2 (systematic resampling).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from domains.finance import backtest
from domains.finance.forecasts import stream, systematic
from domains.finance.neural_volatility import typical
from domains.finance.volatility_networks import Dynamics
from scivi.errors import DataError

SETTLE = 750  # last days of a table by which the states are found
_COPIES = 2  # returns drawn of each particle


@dataclass(frozen=True)
class Filter:
    """What is known of tomorrow's returns; of the form of ``forecasts.Filter``.

    Args:
        dynamics: of each fit.
        states: their particles on the coming day, (series, state, particle) each.
        scale: of the series, percent, (series,).
        seed: of the filter.
        taken: days taken in since it began.
    """

    dynamics: tuple[Dynamics, ...]
    states: tuple[Tensor, ...]
    scale: Tensor
    seed: int
    taken: int = 0

    @torch.no_grad()
    def log_density(self, returns: np.ndarray) -> np.ndarray:
        """Log density of tomorrow's returns, percent, (series,); NaN where one is missing."""
        y = (torch.as_tensor(returns).to(self.scale) / self.scale).unsqueeze(-1)
        each = torch.cat([d.log_likelihood(y, x) for d, x in self._fits()], -1)
        return (each.logsumexp(-1) - math.log(each.shape[-1]) - self.scale.log()).numpy()

    @torch.no_grad()
    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Tomorrow's returns, percent, ascending, some of every particle, and weights: (series, draw)."""
        with stream(self.seed, self.taken, 1):
            drawn = [d.returns(x.repeat(1, 1, _COPIES)) for d, x in self._fits()]
        y = (self.scale[:, None] * torch.cat(drawn, -1)).sort(-1).values.numpy()
        return y, np.full(y.shape, 1 / y.shape[-1])

    def probability(self, returns: np.ndarray) -> np.ndarray:
        """Share of ``sample`` that stays below these returns, (series,)."""
        return (self.sample()[0] <= returns[:, None]).mean(-1)

    def effective_size(self) -> np.ndarray:
        """Fits in the mixture, whose weights stay equal, (series,)."""
        return np.full(len(self.scale), float(len(self.dynamics)))

    @torch.no_grad()
    def after(self, returns: np.ndarray, day: Any = None) -> Filter:
        """What is known once a day's returns (series,) are; NaN where there is none."""
        y = (torch.as_tensor(returns).to(self.scale) / self.scale).unsqueeze(-1)
        with stream(self.seed, self.taken, 2):
            states = tuple(_moved(d, x, y) for d, x in self._fits())
        return replace(self, states=states, taken=self.taken + 1)

    def _fits(self) -> Iterator[tuple[Dynamics, Tensor]]:
        return zip(self.dynamics, self.states, strict=True)


def _moved(dynamics: Dynamics, x: Tensor, y: Tensor) -> Tensor:
    """Particles of the next day, from those of a day and its returns (series, 1)."""
    missing = y.isnan()
    places = systematic(torch.where(missing, 0.0, dynamics.log_likelihood(y.nan_to_num(), x)))
    x = x.gather(-1, places.unsqueeze(-2).expand_as(x))
    step = dynamics.step(x, torch.where(missing, dynamics.returns(x), y) if bool(missing.any()) else y)
    return step.loc + step.log_scale.exp() * torch.randn_like(step.loc)


def begin(fit: Any, table: xr.Dataset, particles: int = 4000, seed: int = 0, settle: int = SETTLE) -> Filter:
    """A filter at the end of the last day of a table.

    Args:
        fit: of ``neural_volatility``, or several.
        table: ``returns`` (series, day), percent; ``scale`` (series) as in ``neural_volatility.windows``, if
            it is not to be taken from these returns.
        particles: for each series and fit.
        seed: of the filter's random numbers.
        settle: how many of the last days are filtered; before them the states are where the model begins.

    Raises:
        DataError: a scale is not positive, as of returns that are all zero or missing.
    """
    fits = list(fit) if isinstance(fit, Sequence) else [fit]
    values = table["returns"].transpose("day", "series").values
    scale = table["scale"].values if "scale" in table else typical(values.T)
    if not (scale > 0).all():
        raise DataError(f"the scales of the series must be positive; they are {scale}")
    dynamics = tuple(f.bound.nets.own.dynamics for f in fits)
    with torch.no_grad(), stream(seed, 0, 0):
        states = []
        for each in dynamics:
            log_sd = each.start()
            states.append(log_sd.exp() * torch.randn(len(scale), len(log_sd), particles))
    state = Filter(dynamics, tuple(states), torch.as_tensor(scale, dtype=torch.float32), seed)
    for y in values[-settle:]:
        state = state.after(y)
    return state


def filtered(fit: Any, table: xr.Dataset, start: Any, particles: int = 4000, seed: int = 0) -> xr.Dataset:
    """Forecast each day from ``start`` on by the days before it, without a refit, and score the forecast.

    Args:
        fit: of ``neural_volatility``, or several: their mixture with equal weights.
        table: as for ``begin``; scales are taken from the days before ``start``.
        start: label of the first day to forecast; if it is none of the days, the next one.
        particles: for each series and fit.
        seed: of the filter's random numbers.

    Returns:
        As ``backtest.backtest``, for ``backtest.summary``: dims (day, series) and level.

    Raises:
        DataError: no day before the start, or none from it on.

    Notes:
        A thousand days of a series take some seconds.
    """
    days = table["day"].values
    first = backtest.first_day(days, start, least=1)
    state, rows = begin(fit, table.isel(day=slice(first)), particles, seed), []
    for y in table["returns"].transpose("day", "series").values[first:]:
        rows.append(backtest.scored(cast(Any, state), y))  # it is of that form
        state = state.after(y)
    return backtest.gathered(rows, days[first:], table["series"].values)
