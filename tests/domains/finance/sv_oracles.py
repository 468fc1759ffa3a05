"""Oracles of stochastic volatility that share no code with it: NumPyro's NUTS and a particle filter."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats


def sp500(days: int = 2000) -> xr.Dataset:
    """The last days of the S&P 500 up to 2018, in percent, less their mean."""
    data = pytest.importorskip("arch.data.sp500", reason="the package arch holds the S&P 500")
    price = data.load()["Adj Close"].loc[:"2018-12-31"]
    y = (100 * np.log(price).diff()).dropna().iloc[-days:]
    return table(y - y.mean(), "S&P 500")


def table(y: pd.Series, name: str) -> xr.Dataset:
    """One series as the template takes it."""
    return xr.Dataset(
        {"returns": (("series", "day"), y.to_numpy()[None])}, {"series": [name], "day": y.index.to_numpy()}
    )


def by_nuts(y: np.ndarray, *, leverage: bool, warmup: int = 600, draws: int = 1000) -> dict[str, np.ndarray]:
    """Four chains of NumPyro's NUTS on parameters and path, (chain x draw, ...).

    The path is centred on the log of the returns' variance and scaled by sigma. Errors are normal without
    leverage, Student-t with it.
    """
    reason = "NUTS of NumPyro, extra [bench], is what this is compared with"
    numpyro = pytest.importorskip("numpyro", reason=reason)
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS, init_to_value

    centre, length = float(np.log(np.var(y))), len(y)

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = numpyro.deterministic("phi", 2 * numpyro.sample("phi_unit", dist.Beta(20.0, 1.5)) - 1)
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (length,)))
        m = (mu - centre) / sigma
        eta = x[1:] - m - phi * (x[:-1] - m)
        numpyro.factor("first", dist.Normal(0.0, 1 / jnp.sqrt(1 - phi**2)).log_prob(x[0] - m))
        numpyro.factor("steps", dist.Normal(0.0, 1.0).log_prob(eta).sum())
        h = numpyro.deterministic("h", centre + sigma * x)
        scale = jnp.exp(0.5 * h)
        if not leverage:
            numpyro.factor("y", dist.Normal(0.0, scale).log_prob(y).sum())
            return
        nu = numpyro.deterministic("nu", 2 + numpyro.sample("nu_less_2", dist.Gamma(2.0, 0.1)))
        rho = numpyro.deterministic("rho", 2 * numpyro.sample("rho_unit", dist.Beta(3.0, 3.0)) - 1)
        unit = jnp.sqrt((nu - 2) / nu)
        width = scale * unit * jnp.sqrt(1 - rho**2)
        given = dist.StudentT(nu, scale[:-1] * rho * eta, width[:-1]).log_prob(y[:-1]).sum()
        # the last day's shock of volatility is not in the path: drawn, and so summed out
        last = numpyro.sample("last", dist.Normal(0.0, 1.0))
        given = given + dist.StudentT(nu, scale[-1] * rho * last, width[-1]).log_prob(y[-1])
        numpyro.factor("y", given)

    with jax.enable_x64(True):
        start = {
            "mu": jnp.array(centre),
            "phi_unit": jnp.array(0.98),
            "sigma": jnp.array(0.2),
            "x": jnp.zeros(length),
        }
        kernel = NUTS(model, init_strategy=init_to_value(values=start), max_tree_depth=9)
        chains = MCMC(
            kernel,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=4,
            chain_method="sequential",
            progress_bar=False,
        )
        chains.run(jax.random.PRNGKey(11), jnp.asarray(y))
        drawn = {name: np.asarray(value) for name, value in chains.get_samples().items()}
    return {name: drawn[name] for name in ("mu", "phi", "sigma", "nu", "rho", "h") if name in drawn}


def by_particles(y: np.ndarray, theta: dict[str, float], chain, *, paths: int = 1000, seed: int = 0) -> float:
    """Log likelihood of Student-t errors with leverage by sequential importance sampling, resampled.

    Paths step by step from a Gaussian chain (its conditional of h_(t+1) given h_t), weighed by model over
    chain.

    Args:
        y: returns (T,).
        theta: mu, phi, sigma, nu, rho.
        chain: with moments of T + 1 entries, each (T + 1,) or (T,).
        paths: how many.
        seed: of the draws.
    """
    mu, phi, sigma, nu, rho = (theta[n] for n in ("mu", "phi", "sigma", "nu", "rho"))
    rng = np.random.default_rng(seed)
    mean, var, cov = (np.asarray(a, dtype=float).ravel() for a in chain)
    shock = stats.t(nu, scale=np.sqrt((nu - 2) / nu * (1 - rho**2)))
    h = rng.normal(mean[0], np.sqrt(var[0]), paths)
    log_w = stats.norm.logpdf(h, mu, sigma / np.sqrt(1 - phi**2)) - stats.norm.logpdf(
        h, mean[0], np.sqrt(var[0])
    )
    total = 0.0
    for t in range(len(y)):
        loc = mean[t + 1] + cov[t] / var[t] * (h - mean[t])
        sd = np.sqrt(var[t + 1] - cov[t] ** 2 / var[t])
        ahead = rng.normal(loc, sd)
        eta = (ahead - mu - phi * (h - mu)) / sigma
        scale = np.exp(0.5 * h)
        log_w += shock.logpdf(y[t] / scale - rho * eta) - np.log(scale)
        log_w += stats.norm.logpdf(eta) - np.log(sigma) - stats.norm.logpdf(ahead, loc, sd)
        w = np.exp(log_w - log_w.max())
        if w.sum() ** 2 / (w**2).sum() < 0.5 * paths:
            total += np.log(w.mean()) + log_w.max()
            places = (rng.random() + np.arange(paths)) / paths
            ahead = ahead[np.minimum(np.searchsorted(np.cumsum(w / w.sum()), places), paths - 1)]
            log_w = np.zeros(paths)
        h = ahead
    return float(total + np.log(np.exp(log_w - log_w.max()).mean()) + log_w.max())
