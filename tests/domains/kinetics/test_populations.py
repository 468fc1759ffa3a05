"""Many similar experiments: densities and marginals by numpy, symmetries of the encoder, what users get."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy.stats import halfnorm, norm

import scivi
from domains.kinetics import populations
from domains.kinetics.networks import network
from domains.kinetics.petab_problems import Observable, Parameter, Problem
from scivi.errors import DataError, TemplateError
from scivi.inference import marginal, newton
from scivi.inference.opening import begin, open_data
from scivi.inference.polish import polish
from scivi.inference.scores import Placed, log_prob
from scivi.models.sites import sample_sites

MEAN, SCATTER, SD = 0.2, 0.25, 0.05  # log10 k; log10 k; of A
BOUNDS = (1e-2, 1e2)
PLAN = scivi.Plan(steps=2, stop=None, newton=False, nodes=3, rows_per_batch=None)


def decay(**changes: Any) -> Problem:
    """A -> B at k, of which A is seen with a known error."""
    made = network({"A -> B": "k"}, initial={"A": 1.0, "B": 0.0}, parameters={"k": 1.0})
    seen = (Observable("A seen", "A", str(SD)),)
    known = Problem(made, (Parameter("k", "log10", *BOUNDS, 1.0),), seen, {"c": {}}, (("c", ""),), "decay")
    return replace(known, **changes)


def noisy(**changes: Any) -> Problem:
    """The same with an error, and an initial value, that all experiments share; A and B are seen."""
    made = network({"A -> B": "k"}, initial={"A": "a", "B": 0.0}, parameters={"k": 1.0, "a": 1.0})
    parameters = (
        Parameter("a", "lin", 0.5, 2.0, 1.0),
        Parameter("k", "log10", *BOUNDS, 1.0),
        Parameter("sd", "lin", 0.01, 1.0, 0.1),
    )
    seen = (Observable("A seen", "A", "sd"), Observable("B seen", "B", "sd", "log"))
    return replace(Problem(made, parameters, seen, {"c": {}}, (("c", ""),), "decay"), **changes)


def decayed(n: int, seed: int = 0, *, both: bool = False) -> tuple[dict[str, Any], np.ndarray]:
    """Measurements at six times of each experiment's own, a fifth of them missing, and log10 k."""
    rng = np.random.default_rng(seed)
    theta = MEAN + SCATTER * rng.standard_normal(n)
    time = np.sort(rng.uniform(0.05, 2.0, (n, 6)), 1)
    a = np.exp(-(10 ** theta[:, None]) * time)
    measured = (a + SD * rng.standard_normal(a.shape))[..., None]
    if both:
        b = (1 - a) * np.exp(SD * rng.standard_normal(a.shape))
        measured = np.concatenate([measured, b[..., None]], -1)
    measured[rng.random(measured.shape) < 0.2] = np.nan
    return {
        "measured": (populations.DIMS["measured"], measured),
        "time": (populations.DIMS["time"], time),
    }, theta


def log_measured(table: dict[str, Any], theta: np.ndarray) -> np.ndarray:
    """Log likelihood of each experiment at values of log10 k, (experiment, value), by numpy."""
    measured, time = table["measured"][1][..., 0], table["time"][1]
    expected = np.exp(-(10**theta) * time[..., None])
    each = norm.logpdf(measured[..., None], expected, SD)
    return np.where(np.isnan(measured)[..., None], 0.0, each).sum(1)


@cache
def practised() -> tuple[scivi.Template, dict[str, Any], np.ndarray]:
    """Twelve decays, with an encoder that has practised a little."""
    table, theta = decayed(12, seed=4)
    template = populations.make(decay(), varying=("k",), rtol=1e-6, atol=1e-9)
    template = populations.rehearsed(template, table, rounds=2, experiments=2048, steps=500, progress=False)
    return template, table, theta


def bound_to(template: scivi.Template, table: dict[str, Any]) -> Any:
    return begin(template, open_data(template, table), PLAN).bound


def test_density_is_that_of_the_story():
    """Against scipy, in float32: a sum of some hundred nats."""
    table, theta = decayed(5, both=True)
    template = populations.make(noisy(), varying=("k",), rtol=1e-9, atol=1e-12)
    bound = bound_to(template, table)
    at = {"mean": [0.1], "scatter": [0.3], "shared": [1.1, 0.07], "theta": theta[:, None]}
    values = {name: torch.tensor(np.array(value, np.float32)) for name, value in at.items()}
    with torch.no_grad(), Placed(values, lambda name, _: values[name]):
        trace = poutine.trace(bound.model).get_trace(bound.example)
    ours = {name: float(log_prob(site).sum()) for name, site in sample_sites(trace)}
    measured, time = table["measured"][1], table["time"][1]
    a = 1.1 * np.exp(-(10 ** theta[:, None]) * time)
    each = np.stack(
        [norm.logpdf(measured[..., 0], a, 0.07), norm.logpdf(np.log(measured[..., 1]), np.log(1.1 - a), 0.07)]
    )
    each[1] -= np.log(measured[..., 1])
    theirs = {
        "mean": -np.log(4.0),  # uniform over four decades
        "scatter": halfnorm.logpdf(0.3, scale=1 / np.log(10.0)),
        "shared": -np.log(1.5) - np.log(0.99),
        "theta": norm.logpdf(theta, 0.1, 0.3).sum(),
        "measured": np.nansum(each),
    }
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(float(value), rel=2e-5, abs=1e-4), name
    assert ours["unsolved"] == 0.0


@pytest.mark.parametrize("place", [0, 1], ids=["changes the solution", "changes the noise"])
def test_gradient_by_a_shared_parameter_is_that_of_differences(place):
    """Central differences of 1e-4 at rtol 1e-10: seven digits of the density, some three of the slope."""
    table, theta = decayed(4, both=True)
    problem = noisy()
    if place == 1:  # nothing that is shared moves the solution then
        problem = replace(
            problem, parameters=(replace(problem.parameters[0], is_estimated=False), *problem.parameters[1:])
        )
    population = populations.population_of(populations.make(problem, varying=("k",), rtol=1e-10, atol=1e-12))
    assert population.moves == (place == 0)
    values = {"time": torch.tensor(table["time"][1])}
    at = torch.tensor([1.1, 0.07], dtype=torch.float64)[-len(population.shared) :]

    def total(shared: torch.Tensor) -> torch.Tensor:
        found = population.seen(torch.tensor(theta)[:, None], shared, values)
        return (found.mean.square() / found.sd).sum()

    for k in range(len(at)):
        step = 1e-4 * torch.eye(len(at), dtype=torch.float64)[k]
        slope = (total(at + step) - total(at - step)) / 2e-4
        point = at.clone().requires_grad_()
        (ours,) = torch.autograd.grad(total(point), point)
        assert float(ours[k]) == pytest.approx(float(slope), rel=2e-3)


@pytest.mark.slow
def test_marginal_of_the_population_is_that_of_quadrature():
    """31 nodes about the encoder's normal against a grid of 2000 values, twelve rows in float32.

    The nodes of an encoder that has practised for seconds leave some thousandths of a nat.
    """
    template, table, _ = practised()
    bound = bound_to(template, table)
    module, plan = marginal.global_module(bound), marginal.layout(bound, bound.example)
    assert module is not None
    assert plan.dims == 1
    grid = np.linspace(-2, 2, 2000)
    each = log_measured(table, grid)
    found = []
    for mean, scatter in ((0.2, 0.25), (0.1, 0.35), (0.35, 0.2)):
        at = bound_at(module, mean, scatter)
        with torch.no_grad():
            ours = float(marginal.log_marginal(bound, module, at, bound.example, plan, 31))
        weight = norm.logpdf(grid, mean, scatter) + np.log(grid[1] - grid[0])
        found.append(ours - float(np.logaddexp.reduce(each + weight, 1).sum()))
    np.testing.assert_allclose(found, 0.0, atol=2e-2)


def bound_at(module: Any, mean: float, scatter: float) -> torch.Tensor:
    """Globals on the unbounded scale: the mean between its bounds, the scatter's log."""
    low, high = np.log10(BOUNDS)
    share = (mean - low) / (high - low)
    values = {"mean": np.log(share / (1 - share)), "scatter": np.log(scatter)}
    return torch.tensor([values[slot.name] for slot in module.slots], dtype=torch.float32)


@pytest.mark.slow
def test_population_is_that_of_a_grid():
    """Mean and log scatter on a grid of 200 x 200 by numpy, against 160 weighted draws.

    Of an effective size of 100 or so: error of a mean .1 sd, of an sd 7 %; held to three and a half of those.
    """
    template, table, _ = practised()
    bound = bound_to(template, table)
    rows = newton.Rows(lambda n: [bound.example], lambda n: [bound.example], 1.0)
    module = marginal.global_module(bound)
    assert module is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = newton.newton_finish(bound, rows, 9, fine=False)
        module.set(start.loc, start.covariance)
        found = polish(bound, rows, 9, rounds=(2, 2), draws=80)
    assert found.ess > 60
    grid, mean, log_scatter = np.linspace(-2, 2, 400), np.linspace(-0.4, 0.8, 200), np.linspace(-4, 0.5, 200)
    likelihood = np.exp(log_measured(table, grid))
    log_p = np.zeros((200, 200))
    for j, scatter in enumerate(np.exp(log_scatter)):
        population = norm.pdf(grid[:, None], mean, scatter) * (grid[1] - grid[0])
        log_p[:, j] = np.log(likelihood @ population).sum(0)
        log_p[:, j] += halfnorm.logpdf(scatter, scale=1 / np.log(10.0)) + np.log(scatter)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    low, high = np.log10(BOUNDS)
    unbounded = np.log((mean - low) / (high - mean))
    for slot, loc, variance in zip(module.slots, found.loc, found.covariance.diagonal(), strict=True):
        axis, values = (1, unbounded) if slot.name == "mean" else (0, log_scatter)
        weight = p.sum(axis)
        centre = float((weight * values).sum())
        spread = float(np.sqrt((weight * (values - centre) ** 2).sum()))
        assert abs(float(loc) - centre) < 0.35 * spread
        assert float(variance) ** 0.5 == pytest.approx(spread, rel=0.25)


@pytest.mark.slow
def test_encoder_comes_near_the_posterior_of_each_experiment():
    """Against a grid: half of the experiments within .3 sd in the mean and 30 % in the sd, after seconds."""
    template, table, _ = practised()
    bound = bound_to(template, table)
    population = {"mean": torch.tensor([MEAN]), "scatter": torch.tensor([SCATTER])}
    encoder, values = bound.nets.own.encoder, bound.example.values
    with torch.no_grad():
        seen = encoder.read(values, bound.example.observed_mask["measured"])
        mean, tril = (x.squeeze(-1).numpy() for x in encoder(seen, *population.values(), None))
    grid = np.linspace(-2, 2, 2000)
    p = np.exp(log_measured(table, grid)) * norm.pdf(grid, MEAN, SCATTER)
    p /= p.sum(1, keepdims=True)
    centre = (p * grid).sum(1)
    spread = np.sqrt((p * (grid - centre[:, None]) ** 2).sum(1))
    assert np.median(np.abs((mean - centre) / spread)) < 0.3
    assert np.median(np.abs(tril[:, 0] / spread - 1)) < 0.3


def encoded(template: scivi.Template, table: dict[str, Any], population: Any = None) -> list[np.ndarray]:
    """What an encoder that has not practised, of random weights, says of a table."""
    bound = bound_to(template, table)
    encoder, example = bound.nets.own.encoder, bound.example
    mean, scatter, shared = population or (torch.tensor([0.3]), torch.tensor([0.4]), torch.tensor([1.0, 0.1]))
    mask = example.observed_mask.get("measured", torch.ones_like(example.measured, dtype=torch.bool))
    with torch.no_grad():
        return [x.numpy() for x in encoder(encoder.read(example.values, mask), mean, scatter, shared)]


def test_encoder_sees_nothing_of_what_is_missing_and_no_order():
    """Sums of float32 in another order."""
    template, (table, _) = populations.make(noisy(), varying=("k",)), decayed(8, both=True)
    time, measured = table["time"][1], table["measured"][1]
    first = encoded(template, table)
    # moments added with nothing measured, early and late
    more = np.concatenate([np.zeros((8, 1)), time, np.full((8, 2), 9.0)], 1)
    gaps = np.full((8, 1, 2), np.nan)
    padded = table | {
        "time": (table["time"][0], more),
        "measured": (table["measured"][0], np.concatenate([gaps, measured, gaps, gaps], 1)),
    }
    for a, b in zip(first, encoded(template, padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # experiments in another order are the same experiments
    turned = {name: (dims, values[::-1].copy()) for name, (dims, values) in table.items()}
    for a, b in zip(first, encoded(template, turned), strict=True):
        np.testing.assert_allclose(a[::-1], b, rtol=1e-4, atol=1e-5)
    # two measurements at one time, changed over
    twice = time.copy()
    twice[:, 1] = twice[:, 0]
    swapped = measured.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    both = [
        encoded(template, table | {"time": (table["time"][0], twice), "measured": (table["measured"][0], m)})
        for m in (measured, swapped)
    ]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_without_measurements_an_experiment_is_one_of_the_population():
    template, (table, _) = populations.make(noisy(), varying=("k",)), decayed(3, both=True)
    table["measured"][1][1] = np.nan
    mean, tril = encoded(template, table)
    np.testing.assert_allclose(mean[1], 0.3, rtol=1e-5)
    np.testing.assert_allclose(tril[1], 0.4, rtol=1e-5)
    assert abs(mean[0, 0] - 0.3) > 1e-3


@pytest.mark.slow
def test_laws_hold():
    template, (table, _) = populations.make(noisy(), varying=("k",)), decayed(10, both=True)
    found = scivi.check(template, table)
    assert bool(found["ok"].all()), found["detail"].values[~found["ok"].values]


def test_results_are_labelled_and_a_saved_fit_finds_its_template(tmp_path):
    template, (table, _) = populations.make(noisy(), varying=("k",)), decayed(10, both=True)
    table = populations.table(noisy(), table)
    fit = scivi.fit(template, table, PLAN, progress=False)
    scivi.save(fit, tmp_path / "fit")
    first, second = (scivi.predict(each, table, 5) for each in (fit, scivi.load(tmp_path / "fit")))
    posterior: Any = first["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "experiment", "parameter")
    assert posterior["theta"]["parameter"].values.tolist() == ["log10 k"]
    assert posterior["shared"]["shared_parameter"].values.tolist() == ["a", "sd"]
    assert posterior["expected"].dims == ("chain", "draw", "experiment", "moment", "observable")
    np.testing.assert_allclose(posterior["value"], 10 ** posterior["theta"], rtol=1e-4)
    a = posterior["shared"].values[..., 0]
    expected = a[..., None, None] * np.exp(-posterior["value"].values * table["time"][1])
    np.testing.assert_allclose(posterior["expected"].values[..., 0], expected, atol=1e-3)  # rtol 1e-4
    for name in ("theta", "shared", "expected"):
        np.testing.assert_array_equal(posterior[name].values, second["posterior"][name].values)
    assert float(posterior["failed"].sum()) == 0
    assert template.made is not None
    json.dumps(dict(template.made[1]))


@pytest.mark.slow
def test_a_rehearsed_fit_is_saved_with_what_its_encoder_has_learnt(tmp_path):
    template, table, _ = practised()
    fit = scivi.fit(template, table, PLAN, progress=False)
    scivi.save(fit, tmp_path / "fit")
    first, second = (
        scivi.draw(each, table, 5)["posterior"]["theta"].values
        for each in (fit, scivi.load(tmp_path / "fit"))
    )
    np.testing.assert_array_equal(first, second)


def test_bad_descriptions_are_one_error():
    several = noisy(conditions={"c": {}, "d": {}}, rows=(("c", ""), ("d", "")))
    with pytest.raises(TemplateError) as told:
        populations.make(several, varying=("k", "sd", "q", "k"), start={"mean": (0.1,), "middle": (1.0,)})
    for words in (
        'no estimated parameter "q"; there are a, k, sd',
        '"sd" is on the scale "lin"; what varies needs log or log10',
        'names "k" twice',
        "has 2 conditions (c, d)",
        'start has "middle"',
        "mean has 1 numbers; it needs 3",
    ):
        assert words in str(told.value)
    with pytest.raises(TemplateError, match="varying names no parameter"):
        populations.make(noisy(), varying=())
    with pytest.raises(TemplateError, match=r"prior\.scatter is -1"):
        populations.make(noisy(), varying=("k",), prior=populations.Prior(-1.0))


def test_bad_measurements_are_one_error():
    table, _ = decayed(4, both=True)
    time, measured = table["time"][1].copy(), table["measured"][1].copy()
    time[0, 0], time[2] = -1.0, time[2, ::-1]
    measured[1, 2, 1], measured[1, 3, 0] = 0.0, np.inf
    bad = {"time": (table["time"][0], time), "measured": (table["measured"][0], measured)}
    with pytest.raises(DataError) as told:
        populations.from_data(
            (noisy(), bad | {"observable": (("observable",), ["B seen", "A seen"])}), varying=("k",)
        )
    for words in (
        "1 experiments have times that are no numbers >= 0",
        "1 experiments have their times out of order, row 2 first",
        "1 measurements are infinite",
        '"B seen": 1 measurements are not above 0',
        "the observables are B seen, A seen; the problem has A seen, B seen",
    ):
        assert words in str(told.value)
    with pytest.raises(DataError, match='"time" is missing'):
        populations.from_data((noisy(), {"measured": table["measured"]}), varying=("k",))
    with pytest.raises(DataError, match="measured"):  # of a table that was not made by from_data
        scivi.fit(populations.make(noisy(), varying=("k",)), bad, PLAN, progress=False)
