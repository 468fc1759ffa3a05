"""Does the neural volatility model foretell returns, use its hidden states, and serve series it never saw?

    python benchmarks/volatility_neural.py --json volatility_neural.json

    S&P 500   fitted to 1999-2014 with some seeds; it foretells the last 1000 days of 2015-2018, without refit
    noise     as many simulated returns, independent and identical: the states must go unused
    stocks    fitted to ten stocks until 2014, it foretells ten others in 2015-2018, beside a fit to those

Figures:
    neural_log_score_seed_K, neural_log_score_min: mean log density of a day's return, nats.
    neural_log_score_mixture: of the equal mixture of all seeds.
    neural_crps: of seed 0, percent. fit_s: a fit to the S&P 500.
    kl_per_day, sd_h: divergence of the states' posterior from their prior, nats per day, and standard
        deviation over days of the mean log variance, of seed 0. kl_per_day_iid, sd_h_iid: of the noise.
    amortisation_loss: what the ten stocks lose by being foretold by a fit to the others, nats per day.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from record import use_threads, write_json

import scivi
from domains.finance import neural_forecasts, neural_volatility, returns

TRAINED_UNTIL, TESTED_FROM, TESTED_UNTIL, TESTED = "2014-12-31", "2015-01-01", "2018-12-31", 1000


def index() -> xr.Dataset:
    """Returns of the S&P 500, from the package arch."""
    from arch.data import sp500

    return returns.from_prices(sp500.load()[["Adj Close"]])


def stocks(file: Path | None) -> xr.Dataset:
    """Returns of a file's stocks; without a file, of the twenty that come with the package skfolio."""
    if file:
        return returns.from_returns(pd.read_csv(file, index_col=0, parse_dates=True))
    from skfolio.datasets import load_sp500_dataset

    return until(returns.from_prices(load_sp500_dataset()), TESTED_UNTIL)


def noise(like: xr.Dataset) -> xr.Dataset:
    """Independent Student-t(6) returns in place of others, of their spread."""
    y = like["returns"]
    drawn = np.random.default_rng(0).standard_t(6.0, y.shape) * float(y.std()) / np.sqrt(1.5)
    return like.assign(returns=(y.dims, drawn))


def fitted(table: xr.Dataset, steps: int, seed: int) -> scivi.Fit:
    """A fit to the days of training."""
    template = neural_volatility.template
    plan = scivi.Plan(**{**template.plan, "steps": steps, "seed": seed})
    return scivi.fit(template, neural_volatility.windows(table), plan, progress=False)


def until(table: xr.Dataset, day: str) -> xr.Dataset:
    """The days up to one."""
    return table.sel(day=slice(None, np.datetime64(day)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=neural_volatility.template.plan["steps"])
    parser.add_argument("--seeds", type=int, default=3, help="how many, of the S&P 500")
    parser.add_argument("--stocks", type=Path, metavar="CSV", help="returns, percent, by day; not skfolio's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads(1)
    table, figures = index(), {}
    train = until(table, TRAINED_UNTIL)

    fits = []
    for seed in range(given.seeds):
        begun = time.perf_counter()
        fits.append(fitted(train, given.steps, seed))
        figures.setdefault("fit_s", time.perf_counter() - begun)
        found = neural_forecasts.filtered(fits[-1], table, TESTED_FROM).isel(day=slice(-TESTED, None))
        figures[f"neural_log_score_seed_{seed}"] = float(found["log_score"].mean())
        figures.setdefault("neural_crps", float(found["crps"].mean()))
        print({name: round(value, 4) for name, value in figures.items()}, flush=True)
    scores = [value for name, value in figures.items() if "_seed_" in name]
    figures["neural_log_score_min"] = min(scores)
    mixture = neural_forecasts.filtered(fits, table, TESTED_FROM).isel(day=slice(-TESTED, None))
    figures["neural_log_score_mixture"] = float(mixture["log_score"].mean())

    used = neural_volatility.collapse(scivi.draw(fits[0], neural_volatility.windows(train), 50))
    figures |= {name: float(used[name]) for name in ("kl_per_day", "sd_h")}
    plain = noise(train)
    drawn = scivi.draw(fitted(plain, given.steps, 0), neural_volatility.windows(plain), 50)
    unused = neural_volatility.collapse(drawn)
    figures |= {f"{name}_iid": float(unused[name]) for name in ("kl_per_day", "sd_h")}

    panel = stocks(given.stocks)
    ours, others = panel.isel(series=slice(0, None, 2)), panel.isel(series=slice(1, None, 2))
    found = [
        neural_forecasts.filtered(fitted(until(t, TRAINED_UNTIL), given.steps, 0), ours, TESTED_FROM)
        for t in (ours, others)
    ]
    own, lent = (one["log_score"].mean("day").to_series() for one in found)
    print(pd.DataFrame({"own": own, "lent": lent}).round(4))
    figures["amortisation_loss"] = float(own.mean() - lent.mean())

    print("\n".join(f"{name:28s} {value:.4f}" for name, value in sorted(figures.items())))
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, {"steps": given.steps})


if __name__ == "__main__":
    main()
