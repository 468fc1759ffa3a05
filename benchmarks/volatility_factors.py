"""Are joint forecasts of a panel better than those of GARCH margins with a copula?

    python benchmarks/volatility_factors.py --json volatility_factors.json

Ten exchange rates against the euro are forecast together, one day ahead, on the last 1000 days of the panel
(--data, a CSV of dates and returns in percent), each from the days before it. ``domains.finance.
factor_volatility`` is fitted again every 50 days. The others: GJR-GARCH(1,1) with t errors of the package
arch for each series, fitted again every 50 days on all days before, their probabilities joined by no copula,
by a t copula with constant correlations, or by one whose correlations move (DCC, Engle 2002).

Whatever was chosen was chosen on the 500 days before the last 1000 (``--skip 1000 --days 500``).

Figures:
    joint_log_score: mean joint log density of a day's returns, in nats. independent_log_score,
        ccc_t_log_score, dcc_t_log_score of the others. gain_over_dcc_t_se: standard error of the difference,
        from means over blocks of 20 days.
    kupiec_p_1, kupiec_p_5, christoffersen_p_1, christoffersen_p_5: of the value at risk of the portfolio of
        equal shares. crps: of its return, in percent. pit_p: of Kolmogorov's test. dcc_t_kupiec_p_1, ... and
        dcc_t_crps: of the others' best.
    fz0_gain_over_dcc_t_1, _5: by how much the loss of value at risk and expected shortfall is smaller. (It is
        below 0 here, where a ratio would say nothing.)
    k_hat_max: of all fits and series. factors_s, peers_s: seconds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from record import use_threads, write_json
from scipy import optimize, stats
from scipy.special import expit, gammaln

from domains.finance import backtest, factor_volatility, forecasts, scores
from domains.finance.forecasts import LEVELS
from domains.finance.returns import from_returns

DATA = Path("../shared/data/returns/fx_eur_panel_2000_2012.csv")
RECENT = 1000  # days of which the copulas' parameters are found
PATHS = 4000  # from which a day's portfolio is forecast


def margins(returns: pd.DataFrame, begin: int, end: int, kept: dict[str, Any]) -> dict[str, np.ndarray]:
    """GJR-t of each series, fitted to the days before ``begin`` and run on to ``end``."""
    from arch import arch_model

    spec: dict[str, Any] = {"mean": "Constant", "vol": "GARCH", "p": 1, "o": 1, "q": 1, "dist": "t"}
    rows = []
    for name in returns.columns.astype(str):
        y = returns[name]
        model = arch_model(y.iloc[:begin], rescale=False, **spec)
        starts = (None, kept.get(name))
        fits = [model.fit(disp="off", show_warning=False, starting_values=at) for at in starts]
        kept[name] = max(fits, key=lambda fit: fit.loglikelihood).params.to_numpy()
        known = arch_model(y.iloc[:end], rescale=False, **spec).fix(kept[name])
        sd, nu = np.asarray(known.conditional_volatility), kept[name][-1]
        z = (y.to_numpy()[:end] - kept[name][0]) / sd
        wide = np.sqrt(nu / (nu - 2))
        rows.append(
            {
                "probability": stats.t.cdf(z * wide, nu),
                "log_density": stats.t.logpdf(z * wide, nu) + np.log(wide / sd),
                "sd": sd,
                "mean": kept[name][0],
                "nu": nu,
            }
        )
    return {key: np.stack([row[key] for row in rows], -1) for key in rows[0]}


def log_copula(x: np.ndarray, correlation: np.ndarray, nu: float) -> np.ndarray:
    """Log density of the t copula at t variates x (day, K)."""
    n, root = x.shape[-1], np.linalg.cholesky(correlation)
    w = np.linalg.solve(root, x[..., None])[..., 0]
    constant = gammaln((nu + n) / 2) - gammaln(nu / 2) - 0.5 * n * np.log(nu * np.pi)
    constant = constant - np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    return constant - 0.5 * (nu + n) * np.log1p((w**2).sum(-1) / nu) - stats.t.logpdf(x, nu).sum(-1)


def moving(z: np.ndarray, a: float, b: float, target: np.ndarray) -> np.ndarray:
    """Correlations foretold for each day and the one after the last, (day + 1, K, K)."""
    q = np.empty((len(z) + 1, *target.shape))
    q[0] = target
    for t, now in enumerate(z):
        q[t + 1] = (1 - a - b) * target + a * np.outer(now, now) + b * q[t]
    scale = 1 / np.sqrt(np.diagonal(q, axis1=1, axis2=2))
    return q * scale[:, :, None] * scale[:, None, :]


def copulas(u: np.ndarray) -> tuple[float, float, float, float]:
    """Degrees of freedom with constant correlations; and with moving ones, with their two rates."""
    z = stats.norm.ppf(u)
    target = np.corrcoef(z.T)

    def constant(p: np.ndarray) -> float:
        nu = 2 + np.exp(p[0])
        return -float(log_copula(stats.t.ppf(u, nu), target, nu).sum())

    def dynamic(p: np.ndarray) -> float:
        nu, a, b = 2 + np.exp(p[0]), 0.2 * expit(p[1]), expit(p[2])
        if a + b >= 0.9995:
            return 1e9
        return -float(log_copula(stats.t.ppf(u, nu), moving(z, a, b, target)[:-1], nu).sum())

    options = {"maxiter": 80, "xatol": 1e-2, "fatol": 1e-2}
    still = optimize.minimize(constant, [2.0], method="Nelder-Mead", options=options).x
    p = optimize.minimize(dynamic, [2.0, -2.2, 3.5], method="Nelder-Mead", options=options).x
    return 2 + np.exp(still[0]), 2 + np.exp(p[0]), 0.2 * expit(p[1]), expit(p[2])


def peers(returns: pd.DataFrame, first: int, refit_every: int, seed: int) -> xr.Dataset:
    """Daily joint log scores of the copulas, and the portfolio of the moving one."""
    rng, n, rows = np.random.default_rng(seed), len(returns), []
    kept: dict[str, Any] = {}
    for begin in range(first, n, refit_every):
        end = min(begin + refit_every, n)
        of = margins(returns, begin, end, kept)
        u = of["probability"].clip(1e-6, 1 - 1e-6)
        still, nu, a, b = copulas(u[max(begin - RECENT, 0) : begin])
        z = stats.norm.ppf(u)
        target, since = np.corrcoef(z[:begin].T), max(begin - RECENT, 0)
        path = moving(z[since:end], a, b, target)[begin - since : -1]
        alone = of["log_density"][begin:end].sum(-1)
        ccc = log_copula(stats.t.ppf(u[begin:end], still), target[None], still)
        dcc = log_copula(stats.t.ppf(u[begin:end], nu), path, nu)
        wide = np.sqrt(of["nu"] / (of["nu"] - 2))
        for k in range(end - begin):
            x = rng.standard_normal((PATHS, len(target))) @ np.linalg.cholesky(path[k]).T
            x = stats.t.cdf(x * np.sqrt(nu / rng.chisquare(nu, (PATHS, 1))), nu)
            y = of["mean"] + of["sd"][begin + k] / wide * stats.t.ppf(x, of["nu"])
            sample = np.sort(y.mean(-1))[None]
            real = returns.iloc[begin + k].to_numpy().mean()[None]
            risk, shortfall = forecasts.weighted_quantiles(sample, np.full_like(sample, 1 / PATHS), LEVELS)
            found = {
                "returns": ("series", real),
                "crps": ("series", scores.crps(sample, real)),
                "pit": ("series", (sample <= real[:, None]).mean(-1)),
                "value_at_risk": (("series", "level"), risk),
                "expected_shortfall": (("series", "level"), shortfall),
                "independent": alone[k],
                "ccc_t": alone[k] + ccc[k],
                "dcc_t": alone[k] + dcc[k],
            }
            rows.append(xr.Dataset(found, {"series": ["portfolio"], "level": list(LEVELS)}))
    return xr.concat(rows, "day").assign_coords(day=returns.index[first:])


def standard_error(difference: np.ndarray) -> float:
    """Of the mean of a daily difference, from blocks of 20 days, within which days are alike."""
    whole = difference[: difference.size // 20 * 20].reshape(-1, 20).mean(-1)
    return float(whole.std(ddof=1)) / whole.size**0.5 if whole.size > 1 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="CSV", help="dates and returns in percent")
    parser.add_argument("--days", type=int, default=1000, help="how many are forecast")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many last days")
    parser.add_argument("--refit-every", type=int, default=50, help="days")
    parser.add_argument("--factors", type=int, help="how many; all if not given")
    parser.add_argument("--draws", type=int, default=300, help="of each posterior")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="leave the others out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    given = parser.parse_args()
    if not given.data.exists():
        raise SystemExit(f'there is no "{given.data}": name it by --data.')
    use_threads(1)
    frame = pd.read_csv(given.data, index_col=0, parse_dates=True)
    frame = frame.iloc[: len(frame) - given.skip]
    first, figures = len(frame) - given.days, {}

    begun = time.perf_counter()
    settings = {"refit_every": given.refit_every, "factors": given.factors, "draws": given.draws}
    found = factor_volatility.backtest(
        factor_volatility.template, from_returns(frame), frame.index[first], seed=given.seed, **settings
    )
    told = {"": backtest.summary(found).isel(series=0)}
    figures["joint_log_score"] = float(found["joint_log_score"].mean())
    figures |= {"factors_s": time.perf_counter() - begun, "k_hat_max": float(found["k_hat"].max())}
    print(backtest.lines(backtest.summary(found)), figures, sep="\n", flush=True)

    if not given.alone:
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # arch's, of optimisers that stop early
            other = peers(frame, first, given.refit_every, given.seed)
        figures["peers_s"] = time.perf_counter() - begun
        told["dcc_t_"] = backtest.summary(other).isel(series=0)
        for name in ("independent", "ccc_t", "dcc_t"):
            figures[f"{name}_log_score"] = float(other[name].mean())
        figures["gain_over_dcc_t_se"] = standard_error(
            found["joint_log_score"].values - other["dcc_t"].values
        )
        better = (told["dcc_t_"]["fz0"] - told[""]["fz0"]).values
        figures |= {f"fz0_gain_over_dcc_t_{100 * a:g}": float(g) for a, g in zip(LEVELS, better, strict=True)}
    for who, of in told.items():
        figures |= {f"{who}{name}": float(of[name]) for name in ("crps", "pit_p")}
        for k, level in enumerate(LEVELS):
            for name in ("kupiec_p", "christoffersen_p"):
                figures[f"{who}{name}_{100 * level:g}"] = float(of[name][k])
    print("\n".join(f"{name:28s} {value:9.4f}" for name, value in sorted(figures.items())))
    settings |= {"days": given.days, "skip": given.skip, "seed": given.seed}
    write_json(given.json, (__doc__ or "").split("\n")[0], figures, settings)


if __name__ == "__main__":
    main()
