"""A conjugate normal catalogue whose exact posterior is known, under a good, a narrow and a shifted guide.

mu ~ Normal(0, 10); z_i ~ Normal(mu, tau); x_i ~ Normal(z_i, s_i); tau known. Then p(mu | x) and p(z_i | mu,
x_i) are normal in closed form, and a guide is those two with their sd multiplied by `scale` and their mean
moved by `shift` sd.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm

TAU, PRIOR_SD = 1.5, 10.0


def exact_mu(x: np.ndarray, s: np.ndarray) -> tuple[float, float]:
    """Posterior mean and sd of mu: z integrated, x_i ~ Normal(mu, sqrt(tau^2 + s_i^2))."""
    weight = 1 / (TAU**2 + s**2)
    precision = weight.sum() + 1 / PRIOR_SD**2
    return float((weight * x).sum() / precision), float(precision**-0.5)


def make_tree(
    rows: int = 40,
    draws: int = 1000,
    chains: int = 1,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    global_shift: float = 0.0,
    finish: dict[str, Any] | None = None,
    method: str = "svi",
    seed: int = 0,
    extra: bool = True,
) -> xr.DataTree:
    """A tree of the contract for the catalogue above; the data depend on `rows` only, the draws on `seed`."""
    fixed = np.random.default_rng(1)
    mu_true, s = 2.0, fixed.uniform(0.5, 2.0, rows)
    z_true = fixed.normal(mu_true, TAU, rows)
    x = fixed.normal(z_true, s)
    rng = np.random.default_rng(seed)
    mean, sd = exact_mu(x, s)
    shape = (chains, draws)
    sigma = sd * scale
    mu = rng.normal(mean + (shift + global_shift) * sd, sigma, shape)
    cond_sd = (1 / TAU**2 + 1 / s**2) ** -0.5
    centre = cond_sd**2 * (mu[..., None] / TAU**2 + x / s**2) + shift * cond_sd
    z = rng.normal(centre, cond_sd * scale)
    row_log_q = norm.logpdf(z, centre, cond_sd * scale)
    likelihood = norm.logpdf(x, z, s)
    row_log_p = norm.logpdf(z, mu[..., None], TAU) + likelihood
    lp = norm.logpdf(mu, 0, PRIOR_SD) + row_log_p.sum(-1)
    log_q = norm.logpdf(mu, mean + (shift + global_shift) * sd, sigma) + row_log_q.sum(-1)
    source = [f"J{i:04d}" for i in range(rows)]
    coords = {"chain": np.arange(chains), "draw": np.arange(draws), "source": source}
    both, row = ("chain", "draw"), ("chain", "draw", "source")
    unit = {"units": "ln ct", "long_name": "log brightness"}
    prior_mu = rng.normal(0, PRIOR_SD, (1, draws))
    outside = np.zeros(rows, bool)
    outside[: rows // 40] = True
    stats = {"lp": (both, lp), "log_q": (both, log_q), "row_log_weight": (row, row_log_p - row_log_q),
             "outside": ("source", outside)}  # fmt: skip
    if method == "nuts":
        stats = {"lp": (both, lp), "diverging": (both, np.zeros(shape, bool))}
    groups = {
        "posterior": xr.Dataset({"mu": (both, mu, unit), "z": (row, z, unit)}, coords=coords),
        "observed_data": xr.Dataset({"x": ("source", x, unit)}, coords={"source": source}),
        "constant_data": xr.Dataset({"s": ("source", s, unit)}, coords={"source": source}),
        "log_likelihood": xr.Dataset({"x": (row, likelihood)}, coords=coords),
        "sample_stats": xr.Dataset(stats, coords=coords),
    }
    if extra:
        few = min(rows, 50)
        prior_z = rng.normal(prior_mu[..., None], TAU, (1, draws, few))
        groups["prior"] = xr.Dataset(
            {"mu": (both, prior_mu), "z": (row, prior_z)},
            coords={"chain": [0], "draw": np.arange(draws), "source": source[:few]},
        )
        groups["posterior_predictive"] = xr.Dataset({"x": (row, rng.normal(z, s), unit)}, coords=coords)
        groups["history"] = make_history(seed=seed)
    fit = {"stopped": "plateau", "steps": 4000, "wall_s": 12.5, "restarts": [], "finish": finish}
    provenance = {
        "scivi": "0.1.0", "template": "conjugate catalogue", "method": method, "seed": seed, "device": "cpu",
        "created": "2026-01-01T00:00:00", "prior": {"mu_sd": PRIOR_SD, "tau": TAU}, "plan": {"steps": 4000},
        "data": {"fingerprint": "0" * 16, "sizes": {"source": rows}}, "fit": fit,
        "versions": {"numpy": np.__version__},
    }  # fmt: skip
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs={"provenance": json.dumps(provenance)}), **groups})


def make_history(entries: int = 100, drop: float = 0.0, noise: float = 0.02, seed: int = 0) -> xr.Dataset:
    """An objective that decays to 2 nats and then falls by `drop` nats per tenth of its length."""
    rng = np.random.default_rng(seed)
    at = np.arange(entries)
    objective = 2 + 3 * np.exp(-at / 8) - drop * at / (entries / 10) + rng.normal(0, noise, entries)
    columns = {
        "step": 40.0 * (at + 1), "objective": objective, "objective_sd": np.full(entries, noise * 40**0.5),
        "grad_norm": 1 / (1 + at), "lr": np.full(entries, 1e-2), "rows_per_batch": np.full(entries, 64.0),
        "beta": np.minimum(1.0, (at + 1) / 10), "part_x": -objective + 0.4, "part_z": np.full(entries, -0.4),
    }  # fmt: skip
    return xr.Dataset({k: ("log", v) for k, v in columns.items()})


@pytest.fixture
def catalogue() -> Callable[..., xr.DataTree]:
    return make_tree


@pytest.fixture
def history() -> Callable[..., xr.Dataset]:
    return make_history


@pytest.fixture
def exact() -> Callable[[xr.DataTree], tuple[float, float]]:
    """Exact posterior mean and sd of mu, from the data of a tree."""
    return lambda tree: exact_mu(tree["observed_data"]["x"].values, tree["constant_data"]["s"].values)
