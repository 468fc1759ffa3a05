"""Are daily forecasts of stochastic volatility better than those of GARCH models?

    python benchmarks/volatility_forecast.py --json volatility_forecast.json

The S&P 500 (``arch.data.sp500``, returns since 1999) is forecast one day ahead on 1000 days, from 2015-01-12
to 2018-12-31, each from the days before it. The default template of ``domains.finance.volatility`` is fitted
again every 60 days; a particle filter takes in the days between. GARCH(1,1), GJR and EGARCH of the package
arch, with constant mean and errors t or skewed t, are fitted again every 20 days on all days before.

The window of 2000 days was chosen on the years before (``--start 2011-01-01 --end 2014-12-31``): log score
-1.1855 there, and -1.1921 with all days (300 draws); egarch_skewt, the best of the others, had -1.1900.

Figures:
    log_score: mean log density of the return, in nats per day. crps: mean, in percent. NAME_log_score and
        NAME_crps of the others: garch_t, gjr_t, gjr_skewt, egarch_t, egarch_skewt.
    kupiec_p_1, kupiec_p_5: of the number of days below the value at risk at 1 and 5 %.
    christoffersen_p_1, christoffersen_p_5: of their independence.
    fz0_ratio_to_gjr_t: FZ0 loss over that of gjr_t, the larger of the two levels' ratios; also
        fz0_ratio_to_gjr_t_1 and _5. (FZ0 is above 0 here.)
    pit_p: of Kolmogorov's test of the probability integral transforms. k_hat_max: of all fits.
    gain_over_gjr_t_se: standard error of the difference of log scores, from means over blocks of 20 days.
    sv_s, peers_s: seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import xarray as xr
from record import use_threads, write_json

from domains.finance import backtest, scores, volatility
from domains.finance.forecasts import LEVELS
from domains.finance.returns import from_prices

PEERS: dict[str, dict[str, Any]] = {
    "garch_t": {"vol": "GARCH", "o": 0, "dist": "t"},
    "gjr_t": {"vol": "GARCH", "o": 1, "dist": "t"},
    "gjr_skewt": {"vol": "GARCH", "o": 1, "dist": "skewt"},
    "egarch_t": {"vol": "EGARCH", "o": 1, "dist": "t"},
    "egarch_skewt": {"vol": "EGARCH", "o": 1, "dist": "skewt"},
}
PROBS = (np.arange(400) + 0.5) / 400  # of the quantiles that CRPS is taken from
TAIL = (np.arange(2000) + 0.5) / 2000  # of a level, of those that expected shortfall is the mean of


def peer(returns: pd.Series, start: str, refit_every: int, spec: dict[str, Any]) -> xr.Dataset:
    """Daily forecasts of a model of arch, with the variables of ``backtest``."""
    from arch import arch_model

    first, parts, params = int(np.searchsorted(returns.index.to_numpy(), np.datetime64(start))), [], None
    for begin in range(first, len(returns), refit_every):
        end = min(begin + refit_every, len(returns))
        model = arch_model(returns.iloc[:begin], mean="Constant", p=1, q=1, rescale=False, **spec)
        fits = [model.fit(disp="off", show_warning=False, starting_values=at) for at in (None, params)]
        params = max(fits, key=lambda fit: fit.loglikelihood).params.to_numpy()  # an optimiser may stop early
        known = arch_model(returns.iloc[:end], mean="Constant", p=1, q=1, rescale=False, **spec).fix(params)
        sd = np.asarray(known.conditional_volatility)[begin:end, None]
        law, shape, y = model.distribution, params[-model.distribution.num_params :], returns.iloc[begin:end]
        z = (y.to_numpy() - params[0]) / sd[:, 0]
        tails = np.asarray(law.ppf(np.outer(LEVELS, TAIL).ravel(), shape)).reshape(len(LEVELS), -1)
        risk = params[0] + sd * np.asarray(law.ppf(np.array(LEVELS), shape))
        shortfall = params[0] + sd * tails.mean(-1)
        quantiles = params[0] + sd * np.asarray(law.ppf(PROBS, shape))
        density = np.asarray(law.loglikelihood(shape, z, np.ones_like(z), individual=True))
        daily = {
            "returns": y.to_numpy(),
            "log_score": density - np.log(sd[:, 0]),
            "crps": scores.crps_of_quantiles(quantiles, PROBS, y.to_numpy()),
            "pit": np.asarray(law.cdf(z, shape)),
        }
        found = xr.Dataset({k: ("day", v) for k, v in daily.items()}, {"day": y.index, "level": list(LEVELS)})
        parts.append(
            found.assign(
                value_at_risk=(("day", "level"), risk), expected_shortfall=(("day", "level"), shortfall)
            )
        )
    return xr.concat(parts, "day").expand_dims(series=[returns.name])


def prices(path: Path | None, column: str | None) -> pd.Series:
    """Of the S&P 500, or of a file."""
    if path is None:
        from arch.data import sp500

        close = sp500.load()["Adj Close"]
        return pd.Series(close.to_numpy(), close.index, name="S&P 500")
    frame = pd.read_csv(path, index_col=0, parse_dates=True)
    return cast(pd.Series, frame[column or frame.columns[0]])


def standard_error(difference: xr.DataArray) -> float:
    """Of the mean of a daily difference, from blocks of 20 days, within which days are alike."""
    whole = difference.values[: difference.size // 20 * 20].reshape(-1, 20).mean(-1)
    return float(whole.std(ddof=1)) / whole.size**0.5 if whole.size > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="CSV", help="dates and prices, instead of the S&P 500")
    parser.add_argument("--column", help="of that file; the first if not given")
    parser.add_argument("--start", default="2015-01-12", help="first day forecast")
    parser.add_argument("--end", default="2018-12-31", help="last day forecast")
    parser.add_argument("--refit-every", type=int, default=60, help="days; arch's models: 20")
    parser.add_argument("--window", type=int, default=2000, help="fit to so many last days; 0 for all")
    parser.add_argument("--draws", type=int, default=500, help="of each posterior")
    parser.add_argument("--particles", type=int, default=200, help="of each draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    use_threads(1)
    table = from_prices(prices(given.data, given.column)).sel(day=slice(None, given.end))
    series, figures, told = table["returns"].isel(series=0).to_series().dropna(), {}, {}
    series.name = str(table["series"].values[0])

    begun = time.perf_counter()
    daily: dict[str, xr.Dataset] = {}
    for name, spec in PEERS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arch's, of optimisers that stop early
            daily[name] = peer(series, given.start, 20, spec)
        print(name, backtest.lines(backtest.summary(daily[name])), sep="\n", flush=True)
        told[name] = backtest.summary(daily[name]).isel(series=0)
        figures |= {f"{name}_{k}": float(told[name][k]) for k in ("log_score", "crps")}
    figures["peers_s"] = time.perf_counter() - begun

    begun = time.perf_counter()
    settings = {"refit_every": given.refit_every, "draws": given.draws, "particles": given.particles}
    found = backtest.backtest(
        volatility.template, table, given.start, window=given.window or None, seed=given.seed, **settings
    )
    print("stochastic volatility", backtest.lines(backtest.summary(found)), sep="\n")
    told["sv"] = ours = backtest.summary(found).isel(series=0)
    figures |= {name: float(ours[name]) for name in ("log_score", "crps", "pit_p")}
    ratio = (ours["fz0"] / told["gjr_t"]["fz0"]).values
    for k, level in enumerate(LEVELS):
        for name in ("kupiec_p", "christoffersen_p"):
            figures[f"{name}_{100 * level:g}"] = float(ours[name][k])
        figures[f"fz0_ratio_to_gjr_t_{100 * level:g}"] = float(ratio[k])
    gain = (found["log_score"] - daily["gjr_t"]["log_score"].assign_coords(series=found["series"])).isel(
        series=0
    )
    figures |= {
        "fz0_ratio_to_gjr_t": float(ratio.max()),
        "gain_over_gjr_t_se": standard_error(gain.dropna("day")),
        "k_hat_max": float(found["k_hat"].max()),
        "sv_s": time.perf_counter() - begun,
    }
    print("share of days in each tenth of the PIT")
    for name in ("sv", "gjr_t", "egarch_skewt"):
        print(f"{name:14s}" + " ".join(f"{share:.3f}" for share in told[name]["pit_share"].values.ravel()))
    print("\n".join(f"{name:26s} {value:9.4f}" for name, value in sorted(figures.items())))
    settings |= {"window": given.window, "seed": given.seed}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
