"""Many fits at once: against closed forms, against ``scivi.fit`` of each, and each apart from the others.

Longer than 400 lines because one way of fitting is held against all that fitting alone promises.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn
from torch.distributions import constraints

import scivi
from scivi.analysis.each import each
from scivi.analysis.report import report
from scivi.errors import DataError, FitError, PlanError, Unsupported
from scivi.inference import capture, slots
from scivi.inference.capture import captured, stacked
from scivi.inference.many import fit_many
from scivi.inference.plan import Plateau
from scivi.inference.scores import quiet
from scivi.inference.stopping import levelled
from scivi.inputs.fields import Field
from scivi.models.guides import JointNormal
from scivi.models.template import Template
from tests.inference.conjugate import NOISE, OFF, PRIOR, hierarchy, plan, posterior_of_mu, shared
from tests.inference.test_objective import mixture

N_STARS, N_ROWS = 40, 12
STL = {"estimator": "stl", "lr": 0.2, "log_every": 50}  # its gradient vanishes where the guide is exact


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Compiling takes longer than these fits."""
    monkeypatch.setattr(capture, "has_compiler", lambda: False)


def stars(n: int = N_STARS, n_rows: int = N_ROWS, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    y = PRIOR * rng.normal(size=(n, 1)) + NOISE * rng.normal(size=(n, n_rows))
    return xr.Dataset({"y": (("star", "row"), y)}, {"star": [f"HD {k}" for k in range(n)]})


def exact(data: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of mu for each star; missing rows left out."""
    found = [posterior_of_mu(torch.as_tensor(y[~np.isnan(y)]), 0.0) for y in data.y.values]
    return np.array([float(m) for m, _ in found]), np.array([float(v) ** 0.5 for _, v in found])


def many(template: Template, data: Any, **knobs: Any) -> Any:
    return fit_many(template, data, "star", plan(**{"steps": 300, **STL, **knobs}), progress=False)


def guide_of(fits: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of each star's guide of mu."""
    values = fits.course.values
    return values["own.loc"].numpy(), values["own.log_scale"].exp().numpy()


def test_each_fit_has_the_exact_conjugate_posterior():
    data = stars()
    mean, sd = exact(data)
    fits = many(shared, data)
    loc, scale = guide_of(fits)
    np.testing.assert_allclose((loc - mean) / sd, 0, atol=0.01)  # 300 steps come so near
    np.testing.assert_allclose(scale / sd, 1, atol=0.01)
    tree = fits.draw(1000)
    assert tree.posterior.mu.dims == ("chain", "draw", "star")
    assert tree.posterior.star.values.tolist() == data.star.values.tolist()
    assert tree.log_likelihood.y.dims == ("chain", "draw", "star", "row")
    drawn = tree.posterior.mu.isel(chain=0)
    # 4 Monte Carlo errors of a mean (1 / sqrt(1000) sd) and of an sd (1 / sqrt(2000)), and the .01 above
    assert float(np.abs((drawn.mean("draw") - mean) / sd).max()) < 4 * 1000**-0.5 + 0.01
    assert float(np.abs(drawn.std("draw") / sd - 1).max()) < 4 * 2000**-0.5 + 0.01
    weight = tree.sample_stats.lp - tree.sample_stats.log_q  # the log evidence, where the guide is exact
    assert float(weight.std("draw").max()) < 0.05
    y = data.y.values
    cov = PRIOR**2 * np.ones((N_ROWS, N_ROWS)) + NOISE**2 * np.eye(N_ROWS)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(N_ROWS).double(), torch.as_tensor(cov))
    log_evidence = evidence.log_prob(torch.as_tensor(y)).numpy()
    np.testing.assert_allclose(weight.mean("draw").values[0], log_evidence, atol=1e-3)  # 2nd order in .01


def test_draws_of_different_fits_are_independent():
    y = np.repeat(stars(1).y.values, 200, 0)  # equal data: only the noise tells the fits apart
    fits = many(shared, xr.Dataset({"y": (("star", "row"), y)}), steps=3, log_every=1, estimator="trace")
    assert len(np.unique(fits.history.objective.values[:, 0])) == 200
    draws = fits.draw(200).posterior.mu.values[0]
    correlation = np.corrcoef(draws.T)[np.triu_indices(200, 1)]
    assert abs(correlation.mean()) < 4 / (200 * 20_000) ** 0.5 * 200**0.5  # pairs of one draw share it
    assert np.abs(correlation).max() < 6 / 200**0.5  # of 20,000 pairs


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["trace", "analytic", "stl", "iwae"])
def test_steps_are_those_of_fit_with_every_estimator(estimator):
    # before the first step it is compared with the eager one, of three stars, in objective and gradient
    fits = many(hierarchy(OFF), stars(3), estimator=estimator, particles=4, steps=2, log_every=1)
    assert (fits.history.objective.isel(log=1) < fits.history.objective.isel(log=0)).any()


@pytest.mark.slow
def test_a_fit_of_many_is_that_of_fit():
    data, template = stars(3), hierarchy(OFF)
    knobs = {"estimator": "trace", "particles": 4, "steps": 400, "lr": 0.05, "log_every": 50}
    tree = many(template, data, **knobs).draw(1000)
    assert tree.posterior.z.dims == ("chain", "draw", "star", "row")
    assert tree.sample_stats.row_log_weight.dims == ("chain", "draw", "star", "row")
    own = data.isel(star=1)
    alone = scivi.draw(scivi.fit(template, own, plan(**knobs), progress=False), own, 1000)
    for name in ("mu", "z"):
        ours, theirs = (t.posterior[name].isel(chain=0) for t in (tree.isel(star=1), alone))
        sd = theirs.std("draw")
        # 4.5 Monte Carlo errors of a difference of means, and .1 sd for where 400 noisy steps end
        assert float(np.abs((ours.mean("draw") - theirs.mean("draw")) / sd).max()) < 4.5 * 0.002**0.5 + 0.1
        assert float(np.abs(ours.std("draw") / sd - 1).max()) < 0.25


def test_a_data_set_filled_up_with_missing_entries_is_the_shorter_one():
    data = stars(6)
    lengths = np.array([12, 3, 7, 12, 1, 5])
    short = data.where(data.row < xr.DataArray(lengths, dims="star"))
    loc, scale = guide_of(many(shared, short))
    mean, sd = exact(short)
    np.testing.assert_allclose(
        (loc - mean) / sd, 0, atol=0.02
    )  # as above, for up to 3 times wider posteriors
    np.testing.assert_allclose(scale / sd, 1, atol=0.02)


@pytest.mark.slow
def test_a_batch_of_slots_is_as_good_as_a_slot_for_each(monkeypatch):
    data = stars(11)
    mean, sd = exact(data)
    monkeypatch.setitem(slots.MOST_SLOTS, "captured", 3)
    fits = many(shared, data, log_every=30, steps=401)  # the last entry is a short one
    loc, scale = guide_of(fits)
    np.testing.assert_allclose((loc - mean) / sd, 0, atol=0.01)
    np.testing.assert_allclose(scale / sd, 1, atol=0.01)
    assert fits.course.engine["fits_at_once"] == 3
    assert set(fits.course.step) == {401}
    np.testing.assert_array_equal(fits.history.step.isel(log=-1), 401)
    assert float(fits.history.window_steps.isel(log=-1)[0]) == 401 - 13 * 30


@pytest.mark.slow
def test_every_fit_stops_by_itself_and_leaves_the_others_as_they_are():
    data = stars(8)
    near = data.copy(deep=True)
    data.y[3] += 60.0  # far from where guides begin
    knobs = {"stop": Plateau(min_steps=100, window=50), "steps": 3000, "lr": 0.1, "log_every": 10}
    fits, others = (many(shared, one, schedule="constant", **knobs) for one in (data, near))
    steps = fits.history.steps
    assert int(steps[3]) > 1.5 * int(steps.drop_isel(star=3).max())
    assert (fits.history.stopped == "plateau").all()
    apart = np.arange(8) != 3
    for name, values in fits.course.values.items():  # to the last bit, while the third goes on
        np.testing.assert_array_equal(values[apart], others.course.values[name][apart])
    np.testing.assert_array_equal(others.history.steps[apart], steps[apart])
    mean, sd = exact(data)
    loc, _ = guide_of(fits)
    np.testing.assert_allclose((loc - mean) / sd, 0, atol=0.1)  # a constant rate of .1 leaves that


def test_the_plateau_of_one_among_many_is_that_of_it_alone():
    rule, rng = Plateau(least=0.3), np.random.default_rng(0)
    entries = 40
    objective = 2.0 * np.exp(-np.arange(entries) / rng.uniform(2, 30, (50, 1))) + 0.01 * rng.normal(
        size=(50, 40)
    )
    sd, step = rng.uniform(0.01, 0.3, (50, entries)), 50.0 * np.arange(1, entries + 1)
    told = 0
    for upto in (3, 4, 9, 17, entries):
        past = np.where(np.arange(entries) < upto, step, np.nan)
        ours = levelled(rule, np.tile(past, (50, 1)), objective, sd, np.full((50, entries), 50.0))
        for k in range(50):
            alone = levelled(rule, step[:upto], objective[k, :upto], sd[k, :upto], np.full(upto, 50.0))
            assert alone == ours[k]
            told += int(ours[k])
    assert 10 < told < 240  # of 250: both answers occur


def brittle_model(batch, prior, nets):
    """log(mu) of a real mu: not finite where mu comes below -5."""
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(3.0), PRIOR))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu + 0.0 * (mu + 5.0).log(), NOISE))


@pytest.mark.slow
def test_a_fit_that_diverges_is_named_and_leaves_the_others_as_they_are():
    data, brittle = stars(6), replace(shared, model=brittle_model)
    data["y"] = data.y + 3.0
    untouched = many(brittle, data, steps=150)
    data.y[2] = -60.0
    with pytest.warns(UserWarning, match=r'1 of 6 fits diverged more than 1 times: star "HD 2" at step \d+'):
        fits = many(brittle, data, steps=150, log_every=20, restarts=1)
    assert fits.history.stopped.values.tolist() == ["steps", "steps", "diverged", "steps", "steps", "steps"]
    assert np.isfinite(guide_of(fits)[0]).all()  # the last good ones
    for name, values in fits.course.values.items():
        others = untouched.course.values[name].numpy()
        np.testing.assert_array_equal(np.delete(values.numpy(), 2, 0), np.delete(others, 2, 0))
    judged = each(fits.draw(100))
    assert judged.verdict.sel(star="HD 2") == "do not trust"
    assert "diverged" in judged.why.sel(star="HD 2").item()
    assert fits["HD 2"].provenance["fit"]["stopped"] == "diverged"
    with pytest.raises(FitError, match="1 of 1 fits diverged"):
        many(brittle, data.isel(star=[2]), steps=150, log_every=20, restarts=1)


def test_a_fit_that_diverges_once_goes_on_with_half_the_learning_rate():
    data, brittle = stars(3), replace(shared, model=brittle_model)
    data["y"] = data.y - data.y.mean("row") + xr.DataArray([30.0, -3.0, 40.0], dims="star")
    fits = many(brittle, data, lr=8.0, steps=600, log_every=10, restarts=12, warmup=0.0)
    assert fits.history.restarts.values[1] > 0
    assert (fits.history.stopped == "steps").all()
    assert fits.history.lr[1].max() < 8.0
    judged = fits["HD 1"].provenance["fit"]["restarts"]
    assert len(judged) == fits.history.restarts.values[1]


def test_faults_of_the_data_are_listed_with_their_labels():
    data = stars(5)
    data.y[1, 4], data.y[3, 0] = np.inf, -np.inf
    with pytest.raises(DataError, match="HD 1") as error:
        many(shared, data)
    told = str(error.value).split("\n")
    assert told[0] == 'the data cannot be used with template "shared mean":'
    assert [line.split(":")[0] for line in told[1:]] == ['  - star "HD 1"', '  - star "HD 3"']
    assert "the first is inf at row=4" in told[1]
    picky = replace(
        shared, validate=lambda values, coords: ["it is too bright"] * bool(values["y"].max() > 50)
    )
    data = stars(4)
    data.y[2, 0] = 60.0
    with pytest.raises(DataError, match='star "HD 2": it is too bright'):
        many(picky, data)
    days = replace(
        shared, validate=lambda values, coords: [f"not {coords['row'][0]}"] * ("mon" not in coords["row"])
    )
    named = stars(3).assign_coords(row=["mon", *map(str, range(1, stars(3).sizes["row"]))])
    assert len(many(days, named)) == 3  # labels along other dims are looked at too


def test_what_cannot_be_done_is_said():
    data = stars(3)
    with pytest.raises(DataError, match='no field of "shared mean" has the dim "galaxy" in these data'):
        fit_many(shared, data, "galaxy", plan())
    with pytest.raises(DataError, match='"row" is a dim of template "shared mean" itself'):
        fit_many(shared, data, "row", plan())
    with pytest.raises(DataError, match='labels of "star" occur more than once; the first is "a"'):
        many(shared, data.assign_coords(star=["a", "b", "a"]))
    with pytest.raises(DataError, match="has no dim 'star' besides its rows"):
        many(shared, data.to_dataframe().reset_index())
    with pytest.raises(
        PlanError, match='each data set has 12 entries along "row", more than rows_per_batch = 5'
    ):
        many(shared, data, rows_per_batch=5)
    with pytest.raises(Unsupported, match='estimator="marginal" is not offered for many fits at once'):
        many(hierarchy(), data, estimator="marginal")
    with pytest.raises(Unsupported, match='guide of "mixture" leaves out the discrete latents'):
        many(replace(mixture, name="mixture"), data)
    with pytest.raises(DataError, match="there is no star 'Vega'; there are 'HD 0', 'HD 1', 'HD 2'"):
        many(shared, data, steps=1)["Vega"]


def curious_model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), PRIOR if float(batch.y.sum()) > 0 else 1.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, NOISE))


def limited_model(batch, prior, nets):
    low = batch.low.amin()
    limit = pyro.sample("mu", dist.Uniform(low, low + 10.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(limit, NOISE))


def test_templates_whose_graph_depends_on_the_data_are_refused_by_name():
    data = stars(3)
    with pytest.raises(
        Unsupported, match=r'template "shared mean" cannot be fitted to many .* decides by the value'
    ):
        many(replace(shared, model=curious_model), data)
    fields = {**shared.fields, "low": Field(("row",))}
    limited = replace(shared, fields=fields, model=limited_model, guide=None, nets=None)
    data["low"] = (
        ("star", "row"),
        np.repeat([[-9.0], [-7.0], [-5.0]], N_ROWS, 1),
    )  # the ready-made guide keeps the support that it was bound to
    with pytest.raises(Unsupported, match="keep something of the data that they were bound to"):
        many(limited, data)


def test_one_fit_of_many_is_an_ordinary_fit(tmp_path):
    data = stars(4)
    fits = many(shared, data, log_every=10)
    label = data.star.values[2]
    fit, own = fits[label], data.sel(star=label)
    assert list(fits) == data.star.values.tolist()
    assert len(fits) == 4
    assert "4 fits" in repr(fits)
    assert fit.history.sizes["log"] == int(np.isfinite(fits.history.step[2]).sum())
    np.testing.assert_array_equal(
        fit.history.objective, fits.history.objective[2, : fit.history.sizes["log"]]
    )
    again = scivi.load(scivi.save(fit, tmp_path / "one"), shared)
    trees = [scivi.draw(f, own, 200) for f in (fit, again)]
    xr.testing.assert_equal(trees[0].posterior.to_dataset(), trees[1].posterior.to_dataset())
    mean, sd = exact(data)
    assert abs(float(trees[0].posterior.mu.mean()) - mean[2]) / sd[2] < 4 * 200**-0.5 + 0.01
    judged = each(fits.draw(1000))
    single = report(scivi.draw(fit, own))
    assert judged.verdict.sel(star=label) == single.attrs["verdict"] == "trust"
    assert set(judged.data_vars) > {"k_hat", "ess", "gap", "verdict", "why", "ok", "stopped", "steps"}
    assert judged.attrs["fits"] == judged.attrs["trusted"] == 4


def test_verdicts_are_those_of_the_report_on_the_same_draws():
    template, data = hierarchy(OFF), stars(4)
    fits = many(template, data, steps=20, estimator="trace", lr=0.02, log_every=1)
    tree = fits.draw(400)
    judged = each(tree)
    for label in data.star.values:
        one = tree.sel(star=label)
        one.children["history"].dataset = one.history.to_dataset()[
            ["step", "objective", "objective_sd", "beta"]
        ]
        one.attrs["provenance"] = "{}"
        told = report(one)
        assert judged.k_hat.sel(star=label) == pytest.approx(float(told.value.sel(check="k-hat")))
        assert judged.gap.sel(star=label) == pytest.approx(float(told.value.sel(check="gap")))
        failed = told.sentence.values[~told.ok.values & (told.counts.values != "note")]
        ours = judged.why.sel(star=label).item()
        names = ("k-hat", "gap", "corrected means", "rows with poor weights", "mean gap of rows", "plateau")
        for check in (c for c in names if c in told.check and not bool(told.ok.sel(check=c))):
            assert told.sentence.sel(check=check).item() in ours
        assert len(failed)


class Line(nn.Module):
    """The exact normal of slopes given a design, with nothing to learn."""


def line_model(batch, prior, nets):
    slopes = pyro.sample("slopes", dist.Normal(batch.y.new_zeros(2), PRIOR).to_event(1))
    with batch.plate("row"):
        batch.observe("y", dist.Normal((batch.x * slopes).sum(-1), NOISE))


def line_guide(batch, prior, nets):
    precision = torch.eye(2).to(batch.y) / PRIOR**2 + batch.x.mT @ batch.x / NOISE**2
    loc = torch.linalg.solve(precision, batch.x.mT @ batch.y / NOISE**2)
    pyro.sample("slopes", dist.MultivariateNormal(loc, precision_matrix=precision))


line = Template(
    name="line", fields={"y": Field(("row",), "observed"), "x": Field(("row", "term"))}, rows="row",
    model=line_model, guide=line_guide, dims={"slopes": ("term",)}, plan={"steps": 0},
)  # fmt: skip


def lines(n: int = 5) -> tuple[xr.Dataset, np.ndarray, np.ndarray]:
    """Data with one design for all, and the exact means and sds of the slopes."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(N_ROWS, 2))
    y = rng.normal(size=(n, 2)) @ x.T + NOISE * rng.normal(size=(n, N_ROWS))
    covariance = np.linalg.inv(np.eye(2) / PRIOR**2 + x.T @ x / NOISE**2)
    data = xr.Dataset(
        {"y": (("star", "row"), y), "x": (("row", "term"), x)},
        {"star": np.arange(n) + 100, "term": ["a", "b"]},
    )
    return data, y @ x @ covariance / NOISE**2, np.diag(covariance) ** 0.5


def assert_slopes(tree: xr.DataTree, mean: np.ndarray, sd: np.ndarray, off: float) -> None:
    slopes = tree.posterior.slopes
    assert slopes.dims == ("chain", "draw", "star", "term")
    assert slopes.term.values.tolist() == ["a", "b"]
    error = (slopes.mean(("chain", "draw")).values - mean) / sd
    assert np.abs(error).max() < 4.5 * slopes.sizes["draw"] ** -0.5 + off


def test_a_template_with_nothing_to_learn_is_only_drawn():
    data, mean, sd = lines()
    fits = fit_many(line, data, "star", plan(steps=0), progress=False)
    tree = fits.draw(1000)
    assert_slopes(tree, mean, sd, 0.0)
    assert fits.history.stopped.values.tolist() == ["nothing to learn"] * 5
    assert each(tree).ok.all()
    assert fits[102].provenance["fit"]["stopped"] == "nothing to learn"


@pytest.mark.slow
def test_a_field_may_be_common_to_all_and_a_dict_of_arrays_does():
    data, mean, sd = lines()
    full = replace(line, guide=JointNormal(), plan={})
    fits = fit_many(full, data, "star", plan(steps=600, **STL), progress=False)
    assert_slopes(fits.draw(1000), mean, sd, 0.02)
    arrays = {"y": data.y.values, "x": data.x.values}
    again = fit_many(full, arrays, "star", plan(steps=600, **STL), progress=False)
    assert again.labels.tolist() == list(range(5))
    for name, values in fits.course.values.items():
        torch.testing.assert_close(again.course.values[name], values)


def count_model(batch, prior, nets):
    rate = pyro.sample("rate", dist.Gamma(batch.counts.new_tensor(2.0), 0.5))
    with batch.plate("time"):
        batch.observe("counts", dist.Poisson(rate * batch.exposure))


def test_counts_with_exposures_of_their_own_have_the_gamma_posterior():
    fields = {"counts": Field("time", "observed", constraints.nonnegative_integer), "exposure": Field("time")}
    template = Template(name="light curve", fields=fields, rows="time", model=count_model, dims={"rate": ()})
    rng = np.random.default_rng(5)
    exposure = rng.uniform(0.5, 3.0, (12, 30))
    counts = rng.poisson(rng.gamma(4.0, 2.0, (12, 1)) * exposure)
    data = xr.Dataset({"counts": (("star", "time"), counts), "exposure": (("star", "time"), exposure)})
    knobs = {"estimator": "stl", "steps": 400, "particles": 8, "lr": 0.05}
    tree = many(template, data, **knobs).draw(2000)
    shape, total = 2.0 + counts.sum(1), 0.5 + exposure.sum(1)
    drawn = tree.posterior.rate
    error = (drawn.mean(("chain", "draw")).values - shape / total) / (shape**0.5 / total)
    # 4 Monte Carlo errors; of fifty counts or more a log-normal's mean is a gamma's to .01 sd
    assert counts.sum(1).min() > 50
    assert np.abs(error).max() < 4 * 2000**-0.5 + 0.02
    np.testing.assert_allclose(
        drawn.std("draw").values[0] * total / shape**0.5, 1, atol=4 * 4000**-0.5 + 0.02
    )


def test_every_random_operation_draws_for_each_set_by_itself():
    def drawn(x):
        return (
            torch.stack([
                dist.Normal(x[0], 1.0).rsample(), dist.Laplace(x[0], 1.0).rsample(),
                dist.Exponential(x[0]).rsample(), dist.HalfCauchy(x[0]).rsample(),
                dist.Gamma(x[0], 1.0).rsample(),
                dist.Uniform(0.0, x[0]).rsample(), dist.Gamma(torch.ones(()), 1.0).rsample(),
                torch.empty(()).log_normal_(), dist.Beta(x[0], x[0]).rsample(),
            ]),
        )  # fmt: skip

    with quiet():
        graph = captured(drawn, [torch.ones(2)])
        found = stacked(graph, [False])(torch.ones(500, 2))[0]
    assert all(len(column.unique()) == 500 for column in found.T)
    spread = found[:, 0].std()
    assert abs(float(spread) - 1) < 4 / 1000**0.5


@pytest.mark.slow
def test_a_compiled_run_is_the_captured_one(monkeypatch):
    monkeypatch.undo()
    data = stars(4)
    mean, sd = exact(data)
    fits = many(shared, data, compile="on", steps=300)
    assert fits.course.engine["steps"] in ("compiled", "captured")  # without a compiler the latter
    loc, scale = guide_of(fits)
    np.testing.assert_allclose((loc - mean) / sd, 0, atol=0.01)
    np.testing.assert_allclose(scale / sd, 1, atol=0.01)


def test_equal_seeds_give_equal_fits_and_nobody_elses_random_stream_moves():
    before = torch.get_rng_state()
    fits = [many(shared, stars(3), seed=seed, steps=20, estimator="trace") for seed in (0, 0, 1)]
    values = [f.course.values["own.loc"] for f in fits]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    assert not torch.equal(values[0], values[2])
    trees = [fits[0].draw(50, seed=seed).posterior.mu for seed in (0, 0, 1)]
    assert trees[0].equals(trees[1])
    assert not trees[0].equals(trees[2])
    assert torch.equal(torch.get_rng_state(), before)
