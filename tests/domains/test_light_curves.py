"""The light-curve template against its process, importance sampling, and the times it must refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import xarray as xr

import scivi
from domains.astrophysics import apertures, light_curves
from scivi.errors import DataError
from scivi.laws import check
from scivi.models import Batch

ROOT = Path(__file__).parents[2]
KNOWN = light_curves.make("ou", "known")
TIME = np.array([0.0, 0.3, 4.0, 5.0, 25.0])
SCATTER, VARIABILITY, TIMESCALE = 1.3, 0.4, 6.0


def tril_of(
    time: np.ndarray, timescale: float = TIMESCALE, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    numbers = [torch.tensor(x, dtype=dtype) for x in (SCATTER, VARIABILITY, timescale)]
    return light_curves.covariance_tril(len(time), torch.as_tensor(time, dtype=dtype), *numbers)


def covariance(time: np.ndarray, timescale: float = TIMESCALE) -> np.ndarray:
    """The formula of the module's docstring, Kelly et al. 2009."""
    apart = np.abs(time[:, None] - time)
    return SCATTER**2 + VARIABILITY**2 * np.exp(-apart / timescale)


@pytest.mark.slow
@pytest.mark.parametrize(("variability", "background"), [("ou", "hierarchical"), ("scatter", "flat")])
def test_every_law_holds_for(variability, background):
    found = check(light_curves.make(variability, background), seed=1)
    broken = {str(law): str(found.detail.sel(law=law).values) for law in found.law.values[~found.ok.values]}
    assert broken == {}


def test_the_closed_factor_is_that_of_the_covariance():
    tril = tril_of(TIME)
    assert torch.equal(tril, tril.tril())
    np.testing.assert_allclose(tril @ tril.mT, covariance(TIME), rtol=1e-13)  # float64 epsilon, five terms
    s, v = torch.tensor(SCATTER), torch.tensor(VARIABILITY)
    apart = light_curves.covariance_tril(5, None, s, v, None)
    wanted = SCATTER**2 + VARIABILITY**2 * np.eye(5)
    np.testing.assert_allclose(apart @ apart.mT, wanted, rtol=1e-6)  # float32 epsilon, five terms


def test_the_covariance_is_that_of_the_damped_random_walk():
    # Kelly et al. 2009: dw = -w dt / timescale + sigma dB, variability**2 = timescale sigma**2 / 2, here by
    # Euler's steps. Their bias is h / (2 timescale) = .1 %; the Monte Carlo error of a covariance of n draws
    # is at most variability**2 sqrt(2 / n), of which four are allowed.
    rng, n, h = np.random.default_rng(1), 40_000, 0.0125
    sigma = VARIABILITY * np.sqrt(2 / TIMESCALE)
    w, at = rng.normal(0.0, VARIABILITY, n), np.round(TIME[:4] / h).astype(int)
    seen = [w]
    for step in range(1, at[-1] + 1):
        w = w - w * h / TIMESCALE + sigma * np.sqrt(h) * rng.normal(size=n)
        if step in at:
            seen.append(w)
    error = VARIABILITY**2 * np.sqrt(2 / n)
    wanted = tril_of(TIME[:4]).numpy()
    np.testing.assert_allclose(np.cov(seen), wanted @ wanted.T - SCATTER**2, rtol=0, atol=4 * error)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7])
def test_close_epochs_need_no_jitter(gap):
    # Gaps in timescales; in float32 the Cholesky routine of the covariance breaks down at the smaller ones.
    time = gap * TIMESCALE * np.arange(8)
    exact, got = tril_of(time), tril_of(time, dtype=torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)  # float32 epsilon, some ten operations
    if gap < 1e-6:
        assert int(torch.linalg.cholesky_ex(torch.tensor(covariance(time)).float())[1]) > 0


def batch_of(n_on: np.ndarray, background: np.ndarray, dtype: torch.dtype) -> tuple[Batch, apertures.Counts]:
    """Rows and counts for a known background, exposures of one."""
    n, b = (torch.as_tensor(a, dtype=dtype) for a in (n_on, background))
    one, none = torch.ones_like(n), torch.zeros_like(n)
    there = (~n.isnan()).to(dtype)
    counts = apertures.Counts(n.nan_to_num(), none, there, none, one, none, one)
    return cast(Batch, SimpleNamespace(background=b)), counts


def test_whitened_newton_steps_hold_where_the_covariance_has_no_inverse():
    rng, time = np.random.default_rng(2), np.arange(8) * 1.0
    found = {}
    for timescale in (10.0, 1e6):
        u = 1.0 + rng.normal(size=(50, 8)) @ tril_of(time, timescale).numpy().T
        b = np.full(u.shape, 0.5)
        n = np.where(rng.random(u.shape) < 0.2, np.nan, rng.poisson(np.exp(u) + b))
        for dtype in (torch.float64, torch.float32):
            batch, counts = batch_of(n, b, dtype)
            pop = apertures.Population(
                torch.ones(8, dtype=dtype), tril_of(time, timescale, dtype), None, None
            )
            for base in (light_curves.by_whitening, apertures.by_precision):
                at = base(batch, pop, counts, "known")
                found[timescale, dtype, base] = at.u.double(), at.u_tril.double()
    plain = found[10.0, torch.float64, apertures.by_precision]
    for mine, other in zip(found[10.0, torch.float64, light_curves.by_whitening], plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)  # Newton's last steps: six against eight
    exact = found[1e6, torch.float64, light_curves.by_whitening]
    rough = found[1e6, torch.float32, light_curves.by_whitening]
    for mine, other in zip(rough, exact, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)  # float32 epsilon times some hundred


@pytest.fixture(scope="module")
def fitted():
    """600 sources at four epochs, a fifth of them missing."""
    data, truth = scivi.simulate(KNOWN, {"source": 600, "epoch": 4}, seed=3)
    gone = np.random.default_rng(3).random((600, 4)) < 0.2
    data["n_on"] = data.n_on.where(~gone)
    fit = scivi.fit(KNOWN, data, scivi.Plan(steps=60, lr=1e-2, stop=None), progress=False)
    some, truth = (x.isel(source=slice(0, 400)) for x in (data, truth))
    return some, truth, fit, scivi.draw(fit, some, 300)["posterior"].to_dataset().squeeze("chain")


def assert_recovered(posterior: xr.Dataset, truth: xr.Dataset) -> None:
    """The truth of each global lies within three posterior sd; by chance one does not at 1 % of seeds."""
    for name in ("mean", "scatter", "variability", "timescale"):
        draws = posterior[name] if name == "mean" else np.log(posterior[name])
        wanted = float(truth[name] if name == "mean" else np.log(truth[name]))
        assert abs(float(draws.mean()) - wanted) < 3 * float(draws.std()), name


@pytest.mark.slow
def test_the_population_is_recovered(fitted):
    _, truth, fit, posterior = fitted
    assert fit.provenance["fit"]["estimator"] == "marginal"
    assert_recovered(posterior, truth)
    assert all(float(np.log(posterior[n]).std()) < 0.5 for n in ("scatter", "variability", "timescale"))


@pytest.mark.slow
def test_intervals_of_the_sources_hold_the_truth(fitted):
    _, truth, _, posterior = fitted
    for name in ("log_brightness", "log_brightness_mean", "fractional_rms"):
        low, high = (posterior[name].quantile(q, "draw") for q in (0.05, 0.95))
        held = float(((truth[name] > low) & (truth[name] < high)).mean())
        # four times the binomial error of 400 sources, .015, and .01 for ends that come from 300 draws
        assert abs(held - 0.9) < 0.07, name


@pytest.mark.slow
def test_epochs_without_counts_are_less_certain(fitted):
    data, _, _, posterior = fitted
    sd, gone = posterior.log_brightness.std("draw").values, data.n_on.isnull().values
    some = gone.any(1) & ~gone.all(1)
    missing = np.nanmean(np.where(gone, sd, np.nan)[some], 1)
    there = np.nanmean(np.where(gone, np.nan, sd)[some], 1)
    # The least that is missing is as uncertain as half the variation; sd from 300 draws are good to 4 %.
    assert (missing > there).mean() > 0.95
    assert np.median(missing / there) > 1.3


@pytest.mark.slow
def test_sources_given_the_population_match_importance_sampling(fitted):
    """Draws of the prior, weighted by the likelihood in numpy."""
    data, _, fit, _ = fitted
    few = data.isel(source=slice(0, 8))
    normal = fit.nets.own.globals
    kept = [p.detach().clone() for p in (normal.loc, normal.scale_tril @ normal.scale_tril.mT)]
    normal.set(kept[0], 1e-12 * torch.eye(len(kept[0])))
    try:
        posterior = scivi.draw(fit, few, 2000, seed=1)["posterior"]
    finally:
        normal.set(*kept)
    mean, scatter, variability, timescale = kept[0].double().numpy()
    scatter, variability, timescale = np.exp([scatter, variability, timescale])
    apart = np.abs(data.time.values[:, None] - data.time.values)
    prior = scatter**2 + variability**2 * np.exp(-apart / timescale)
    u = np.random.default_rng(4).multivariate_normal(np.full(4, mean), prior, 400_000)
    rms, checked = np.exp(u).std(1, ddof=1) / np.exp(u).mean(1), 0
    for i in range(8):
        row = few.isel(source=i)
        there = row.n_on.notnull().values
        rate = row.exposure.values * np.exp(u) + row.background.values
        log_w = (row.n_on.values * np.log(rate) - rate)[:, there].sum(1)
        weight = np.exp(log_w - log_w.max())
        weight /= weight.sum()
        if 1 / (weight**2).sum() < 2000:  # too bright for draws from the prior
            continue
        checked += 1
        expected = weight @ u
        sd = np.sqrt(weight @ (u - expected) ** 2)
        got = posterior.log_brightness.isel(chain=0, source=i)
        # 2000 draws, and as many effective ones: .032 sd in a mean, 2.2 % in a sd; four times those, over the
        # largest of some thirty numbers.
        assert (np.abs(got.mean("draw") - expected) / sd).max() < 0.13
        np.testing.assert_allclose(got.std("draw") / sd, 1.0, rtol=0, atol=0.09)
        ours = posterior.fractional_rms.isel(chain=0, source=i)
        spread = np.sqrt(weight @ (rms - weight @ rms) ** 2)
        assert abs(float(ours.mean()) - weight @ rms) / spread < 0.13
    assert checked >= 4


@pytest.mark.slow
def test_many_epochs_follow_the_elbo_and_forecast():
    data, truth = scivi.simulate(KNOWN, {"source": 50, "epoch": 18}, seed=5)
    ahead = data.assign(n_on=data.n_on.where(data.epoch < 14))  # the last four are to come
    fit = scivi.fit(KNOWN, ahead, scivi.Plan(steps=200, lr=2e-2, stop=None), progress=False)
    assert fit.provenance["fit"]["estimator"] == "trace"
    tree = scivi.predict(fit, ahead, 200)
    posterior = tree["posterior"].to_dataset().squeeze("chain")
    assert all(np.isfinite(v).all() for v in posterior.data_vars.values())
    assert_recovered(posterior, truth)
    sd = posterior.log_brightness.std("draw").median("source").values
    assert sd[14:].min() > sd[:14].max()
    assert sd[-1] > sd[14]
    found = tree["posterior_predictive"].n_on.squeeze("chain").isel(epoch=slice(14, None))
    low, high = (found.quantile(q, "draw") for q in (0.05, 0.95))
    held = float(((data.n_on[:, 14:] >= low) & (data.n_on[:, 14:] <= high)).mean())
    # Whole numbers make intervals that hold .9 or a little more; binomial error of 50 sources: .042, twice
    assert held > 0.81


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ([0.0, 3.0, 2.0, 2.0], ["epoch 2 at 2 d", "epoch 3 at 2 d", "sort the epochs"]),
        ([59000.0, 59000.001, 59000.002, 59001.0], ["single precision", "time - 59000"]),
        ([0.0, np.nan, 2.0, 3.0], ["time"]),
    ],
)
def test_bad_times_are_one_error_that_lists_them(time, words):
    data, _ = scivi.simulate(KNOWN, {"source": 3, "epoch": 4}, seed=0)
    data["time"] = ("epoch", np.array(time))
    with pytest.raises(DataError) as raised:
        scivi.fit(KNOWN, data, progress=False)
    assert all(word in str(raised.value) for word in words)


def test_one_epoch_is_no_light_curve():
    data, _ = scivi.simulate(KNOWN, {"source": 3, "epoch": 2}, seed=0)
    with pytest.raises(DataError, match="needs two at least"):
        scivi.fit(KNOWN, data.isel(epoch=slice(0, 1)), progress=False)


def test_independent_epochs_need_no_times():
    template = light_curves.make("scatter", "known")
    assert "time" not in template.fields
    data, truth = scivi.simulate(template, {"source": 5, "epoch": 3}, seed=0)
    assert "time" not in data
    assert isinstance(truth, xr.Dataset)
    assert "timescale" not in truth


@pytest.mark.slow
def test_a_fit_is_loaded_by_another_process(tmp_path):
    template = light_curves.make("scatter", "flat")
    data, _ = scivi.simulate(template, {"source": 5, "epoch": 3}, seed=3)
    scivi.save(scivi.fit(template, data, scivi.Plan(steps=5, newton=False), progress=False), tmp_path)
    code = "import sys, scivi; t = scivi.load(sys.argv[1]).template; print(t.name, dict(t.made[1]), t.prior)"
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"{template.name} {dict(template.made[1])} {template.prior}"
