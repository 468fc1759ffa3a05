from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from arviz_stats.base import array
from scipy.stats import norm
from torch import nn

import scivi
from domains.astrophysics import photons
from scivi.errors import FitError, PlanError, TemplateError, Unsupported
from scivi.inference.nuts import nuts
from scivi.inference.simulate import simulate
from scivi.models.guides import JointNormal
from tests.schools import schools

PRIOR_SD, NOISE = 3.0, 2.0
array_stats: Any = (
    array.array_stats
)  # its functions are annotated as giving several arrays; of one they give one


def level_model(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, PRIOR_SD))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level, NOISE))


LEVEL = scivi.Template(
    name="level",
    rows="row",
    model=level_model,
    fields={"y": scivi.Field(("row",), role="observed", unit="m")},
    dims={"level": ()},
    units={"level": "m"},
)


def table(n: int = 12) -> xr.Dataset:
    values = np.random.default_rng(0).normal(1.5, NOISE, n)
    return xr.Dataset({"y": ("row", values)}, {"row": [f"r{i}" for i in range(n)]})


def exact_level(y: np.ndarray) -> tuple[float, float]:
    precision = 1 / PRIOR_SD**2 + len(y) / NOISE**2
    return y.sum() / NOISE**2 / precision, precision**-0.5


def misses(values: np.ndarray, mean: float, sd: float) -> tuple[float, float]:
    """By how many Monte Carlo standard errors mean and sd of (chain, draw) are off."""
    of_mean = (values.mean() - mean) / float(array_stats.mcse(values, method="mean"))
    of_sd = (values.std() - sd) / float(array_stats.mcse(values, method="sd"))
    return of_mean, of_sd


@pytest.mark.parametrize("backend", ["nutpie", pytest.param("pyro", marks=pytest.mark.slow)])
def test_a_conjugate_posterior_is_met_within_its_monte_carlo_error(backend):
    data = table()
    found: Any = nuts(LEVEL, data, draws=500, warmup=150, chains=2, seed=1, backend=backend, progress=False)
    made = json.loads(found.attrs["provenance"])
    assert made["backend"] == backend
    assert made["sampler"]["gradients"] > found["sample_stats"]["n_steps"].sum()  # the warm-up took some too
    mean, sd = exact_level(data.y.values)
    level = found["posterior"]["level"]
    assert level.dims == ("chain", "draw")
    assert level.dtype == np.float64
    assert level.attrs["units"] == "m"
    assert np.abs(misses(level.values, mean, sd)).max() < 4  # z scores: 4 sd, 1 in 15 000 by chance
    assert float(array_stats.rhat(level.values)) < 1.02
    joint = norm.logpdf(level.values, 0.0, PRIOR_SD)
    likelihood = found["log_likelihood"]["y"]
    assert likelihood.dims == ("chain", "draw", "row")
    np.testing.assert_allclose(found["sample_stats"]["lp"], joint + likelihood.sum("row"), rtol=1e-10)
    stats = found["sample_stats"].to_dataset()
    assert not stats.diverging.any()
    assert stats.diverging.dtype == bool
    assert float(stats.acceptance_rate.mean()) == pytest.approx(0.87, abs=0.12)  # adapted to at least .8
    assert ((stats.acceptance_rate >= 0) & (stats.acceptance_rate <= 1)).all()
    assert (stats.n_steps <= 2**stats.tree_depth).all()


@pytest.mark.parametrize("backend", ["nutpie", "pyro"])
def test_same_seed_same_bits_and_nothing_left_behind(backend):
    before = torch.get_rng_state()
    run = {"draws": 10, "warmup": 10, "chains": 2, "backend": backend, "progress": False}
    first, second = (nuts(LEVEL, table(), seed=3, **run) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    xr.testing.assert_identical(first["posterior"]["level"], second["posterior"]["level"])
    xr.testing.assert_identical(first["sample_stats"].to_dataset(), second["sample_stats"].to_dataset())
    other = nuts(LEVEL, table(), seed=4, **run)
    chains = np.concatenate([first["posterior"]["level"], other["posterior"]["level"]])
    assert len(np.unique(chains[:, -1])) == 4  # chains of neighbouring seeds do not repeat each other


SCHOOLS = schools()
NAMES = [
    "Choate",
    "Deerfield",
    "Phillips Andover",
    "Phillips Exeter",
    "Hotchkiss",
    "Lawrenceville",
    "St. Paul's",
    "Mt. Hermon",
]
# Rubin 1981, J. Educ. Stat. 6(4), 377-401, table 1 (rounded as in Gelman et al., Bayesian Data Analysis,
# section 5.5)
EIGHT = xr.Dataset(
    {
        "effect": ("school", [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sd": ("school", [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    },
    {"school": NAMES},
)


def quadrature_of_schools() -> tuple[float, float]:
    """Posterior means of mu and tau: theta integrated by hand, tau on a fine grid."""
    y, s = EIGHT.effect.values, EIGHT.sd.values
    tau = np.linspace(1e-4, 120, 40_000)
    variance = s**2 + tau[:, None] ** 2
    precision = 1 / 25 + (1 / variance).sum(1)
    mu = (y / variance).sum(1) / precision
    squares = (y**2 / variance).sum(1) - mu**2 * precision
    log_p = -0.5 * (np.log(variance).sum(1) + np.log(precision) + squares) - np.log1p((tau / 5) ** 2)
    weight = np.exp(log_p - log_p.max())
    return float((weight * mu).sum() / weight.sum()), float((weight * tau).sum() / weight.sum())


@pytest.mark.slow
def test_eight_schools_has_the_dims_and_coords_of_the_table():
    found: Any = nuts(SCHOOLS, EIGHT, draws=150, warmup=120, chains=2, seed=0, progress=False)
    posterior = found["posterior"].to_dataset()
    assert set(posterior) == {"mu", "tau", "theta"}  # z is auxiliary
    assert posterior.theta.dims == ("chain", "draw", "school")
    assert posterior.school.values.tolist() == NAMES
    for name, mean in zip(("mu", "tau"), quadrature_of_schools(), strict=True):
        values = posterior[name].values
        assert abs(values.mean() - mean) / float(array_stats.mcse(values, method="mean")) < 4, name
    assert set(found.children) == {
        "posterior",
        "prior",
        "log_likelihood",
        "observed_data",
        "constant_data",
        "sample_stats",
    }
    assert found["log_likelihood"]["effect"].dims == ("chain", "draw", "school")
    assert set(found["prior"].data_vars) == {"mu", "tau"}


def test_photons_run_on_a_subset_of_rows_that_keeps_its_labels(tmp_path):
    data, _ = simulate(photons.template, {"source": 400}, seed=2)
    data = data.assign_coords(source=[f"J{i:03d}" for i in range(400)])
    path = tmp_path / "nuts.nc"
    found: Any = nuts(
        photons.template, data, rows=40, draws=20, warmup=30, chains=1, seed=0, progress=False, to=path
    )
    taken = [f"J{i:03d}" for i in np.linspace(0, 399, 40).round().astype(int)]
    assert found["posterior"].source.values.tolist() == taken
    assert found["posterior"]["log_brightness"].dims == ("chain", "draw", "source", "band")
    assert {"mu", "sigma", "correlation", "background_mu"} <= set(found["posterior"].data_vars)
    kept = data.sel(source=taken)
    np.testing.assert_array_equal(found["observed_data"]["n_on"], kept.n_on)
    truth = np.log(
        (kept.n_on.values + 1) / kept.exposure.values
    )  # a crude estimate: right for bright sources
    bright = kept.n_on.values[:, 0] > 100
    mean = found["posterior"]["log_brightness"].mean(("chain", "draw")).values
    np.testing.assert_allclose(mean[bright], truth[bright], atol=0.5)  # Poisson error at 100 counts is .1
    made = json.loads(found.attrs["provenance"])
    assert made["subset"] == {"dim": "source", "taken": 40, "of": 400}
    assert made["data"]["sizes"]["source"] == 40
    assert made["method"] == "nuts"
    with xr.open_datatree(path, engine="h5netcdf") as stored:
        xr.testing.assert_allclose(stored["posterior"]["mu"], found["posterior"]["mu"])


def learnt_model(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(batch.y.new_tensor(0.0), PRIOR_SD))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(nets(level.reshape(-1, 1)).reshape(level.shape), NOISE))


def learnt_guide(batch, prior, nets):
    pyro.sample("level", dist.Normal(nets.weight.reshape(()).detach(), 0.1))


LEARNT = replace(
    LEVEL, name="learnt", model=learnt_model, guide=learnt_guide, nets=lambda sizes, prior: nn.Linear(1, 1)
)


def test_learnt_networks_are_held_fixed_at_those_of_a_fit():
    with pytest.raises(
        TemplateError, match=r'contains learnt networks \("own.weight", "own.bias"\).*pass given=fit'
    ):
        nuts(LEARNT, table(), progress=False)
    fit: Any = scivi.fit(LEARNT, table(), scivi.Plan(steps=5, rows_per_batch=None), progress=False)
    before = {k: v.clone() for k, v in fit.nets.state_dict().items()}
    found: Any = nuts(LEARNT, table(), given=fit, draws=300, warmup=150, chains=1, progress=False)
    assert json.loads(found.attrs["provenance"])["held_fixed"] == ["own.weight", "own.bias"]
    assert all(
        torch.equal(v, before[k]) and v.dtype == torch.float32 for k, v in fit.nets.state_dict().items()
    )
    slope, shift = (float(p) for p in fit.nets.own.parameters())
    y, precision = table().y.values - shift, 1 / PRIOR_SD**2 + 12 * slope**2 / NOISE**2
    mean = slope * y.sum() / NOISE**2 / precision
    assert np.abs(misses(found["posterior"]["level"].values, mean, precision**-0.5)).max() < 4  # z scores


def test_a_fit_gives_chains_their_start_also_on_a_subset():
    template = replace(SCHOOLS, guide=JointNormal())
    fit = scivi.fit(template, EIGHT, scivi.Plan(steps=20, rows_per_batch=None), progress=False)
    run = {"draws": 3, "chains": 1, "progress": False}
    found: Any = nuts(template, EIGHT, given=fit, rows=3, **run)
    assert found["posterior"].school.values.tolist() == [NAMES[0], NAMES[4], NAMES[7]]
    shorter = json.loads(found.attrs["provenance"])["plan"]
    assert shorter == {"draws": 3, "warmup": 200, "chains": 1}  # 500 without a fit
    with pytest.raises(Unsupported, match="one factor for each row"):
        nuts(template, EIGHT.assign(effect=EIGHT.effect + 1), given=fit, **run)
    with pytest.raises(TemplateError, match='given is a fit of "eight schools"; this is "level"'):
        nuts(LEVEL, table(), given=fit, **run)


def mixture_model(batch, prior, nets):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with batch.plate("row"):
        kind = pyro.sample("kind", dist.Bernoulli(batch.y.new_tensor(0.4)))
        batch.observe("y", dist.Normal(shift + 6.0 * kind, 1.0))


def test_discrete_latents_are_summed_and_then_drawn():
    template = replace(
        LEVEL, name="mixture", model=mixture_model, dims={"shift": (), "kind": ("row",)}, units={}
    )
    y = xr.Dataset({"y": ("row", [0.1, -0.2, 6.3, 0.3, 5.8])})
    found: Any = nuts(template, y, draws=60, warmup=60, chains=1, progress=False)
    kind = found["posterior"]["kind"]
    assert kind.dims == ("chain", "draw", "row")
    np.testing.assert_allclose(kind.mean(("chain", "draw")), [0, 0, 1, 0, 1], atol=0.05)  # six sd apart
    counts = replace(template, model=poisson_model)
    with pytest.raises(Unsupported, match=r"discrete latents \['kind'\] one has no finite support"):
        nuts(counts, y, draws=2, warmup=2, chains=1, progress=False)


def poisson_model(batch, prior, nets):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with batch.plate("row"):
        kind = pyro.sample("kind", dist.Poisson(2.0))
        batch.observe("y", dist.Normal(shift + kind, 1.0))


def impossible_model(batch, prior, nets):
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.factor("never", level * 0 - torch.inf)
    with batch.plate("row"):
        batch.observe("y", dist.Normal(level, 1.0))


def test_what_cannot_be_run_is_refused_in_words():
    with pytest.raises(Unsupported, match="backend = \"stan\" is not offered; 'auto', 'nutpie', 'pyro' are"):
        nuts(LEVEL, table(), backend="stan")
    with pytest.raises(PlanError, match=r"draws = 0; it must be a whole number(.|\n)*rows = 0;"):
        nuts(LEVEL, table(), draws=0, rows=0)
    with pytest.raises(FitError, match='no point at which the density of "impossible" is finite'):
        nuts(replace(LEVEL, name="impossible", model=impossible_model), table(), progress=False)


def test_without_nutpie_pyro_samples_and_who_asks_for_nutpie_is_told_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(Unsupported, match=r'"nutpie" is not installed.*scivi\[nuts\]'):
        nuts(LEVEL, table(), backend="nutpie")
    for backend in (None, "auto"):
        found: Any = nuts(LEVEL, table(), draws=2, warmup=2, chains=1, backend=backend, progress=False)
        assert json.loads(found.attrs["provenance"])["backend"] == "pyro"
