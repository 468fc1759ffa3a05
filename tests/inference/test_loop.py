from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from scivi.errors import DataError, FitError, PlanError
from scivi.inference.draws import draw, predict
from scivi.inference.loop import fit, train
from scivi.inference.plan import Plateau
from scivi.inputs.fields import Field
from scivi.models.template import Template
from tests.inference.conjugate import (
    EXACT,
    OFF,
    SPREAD,
    hierarchy,
    log_evidence,
    parameters_of,
    plan,
    posterior_of_mu,
    rows,
    shared,
)


@pytest.mark.parametrize(
    "estimator",
    ["trace", "marginal", *(pytest.param(e, marks=pytest.mark.slow) for e in ("analytic", "stl", "iwae"))],
)
def test_every_estimator_finds_the_posterior(estimator):
    data = rows(30)
    y = torch.as_tensor(data["y"])
    knobs = {"particles": 4 if estimator == "iwae" else 1}
    done = fit(hierarchy(OFF), data, plan(steps=800, lr=0.03, estimator=estimator, **knobs), progress=False)
    mean, variance = posterior_of_mu(y, SPREAD)
    found = parameters_of(done.bound)
    assert float(found["loc"]) == pytest.approx(
        float(mean), abs=0.25 * float(variance) ** 0.5
    )  # noise of Adam: .1 sd
    assert float(found["log_scale"].exp()) == pytest.approx(float(variance) ** 0.5, rel=0.15)  # the same
    for name, exact in zip(("on_y", "log_sd"), (EXACT[0], EXACT[3]), strict=True):
        assert float(found[name]) == pytest.approx(exact, abs=0.1)
    objective = float(done.history.objective[-4:].mean())
    assert objective == pytest.approx(-float(log_evidence(y, SPREAD)) / 30, abs=0.01)  # nats per row


def test_newton_finish_gives_the_exact_posterior_and_evidence():
    data = rows(6000)
    y = torch.as_tensor(data["y"])
    done = fit(hierarchy(OFF), data, plan(steps=300, lr=0.03, newton=True, rows_per_batch=64), progress=False)
    mean, variance = posterior_of_mu(y, SPREAD)
    found, newton = parameters_of(done.bound), done.provenance["fit"]["finish"]
    assert float(found["loc"]) == pytest.approx(
        float(mean), abs=0.05 * float(variance) ** 0.5
    )  # sd; last step < .02
    assert float(found["log_scale"].exp()) == pytest.approx(float(variance) ** 0.5, rel=0.02)
    assert newton["log_evidence"] == pytest.approx(
        float(log_evidence(y, SPREAD)), abs=0.05
    )  # 6000 rows of node error 1e-5
    assert newton["method"] == "newton"
    assert {"step_sd", "nodes", "node_error_sd", "moved_sd"} <= set(newton)


def test_a_template_may_bring_a_plan_of_its_own():
    template, data = replace(shared, plan={"steps": 3, "estimator": "trace"}), rows(8)
    assert fit(template, data, progress=False).plan.steps == 3
    assert fit(template, data, plan(steps=2), progress=False).plan.steps == 2
    with pytest.raises(PlanError, match="a plan has no 'stride'"):
        fit(replace(shared, plan={"stride": 3}), data, progress=False)


def test_progress_comes_every_log_entry_and_the_loop_can_be_left():
    steps = []
    for now in train(shared, rows(8), plan(steps=100, log_every=20, estimator="trace")):
        steps.append(now.step)
        assert now.rate > 0
        assert now.objective == now.state.history[-1]["objective"]
        if now.step == 60:
            break
    assert steps == [20, 40, 60]


class Place(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))


def limited_model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), 2.0))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, (batch.limit - mu).sqrt()))


def place_guide(batch, prior, nets):
    pyro.sample("mu", dist.Normal(nets.loc, 1e-3))


limited = Template(
    name="limited", fields={"y": Field(("row",), "observed"), "limit": Field(("row",))}, rows="row",
    model=limited_model, guide=place_guide, nets=lambda sizes, prior: Place(), dims={"mu": ()},
)  # fmt: skip
LIMITS = {
    "y": np.full(12, 1.0),
    "limit": np.where(np.arange(12) == 7, 1.3, 3.0),
}  # row 7 is NaN where mu > 1.3
STEEP = plan(
    steps=60, log_every=10, estimator="trace", optimiser="sgd", schedule="constant", lr=0.4, restarts=0
)


def test_a_divergence_is_named_by_step_site_and_rows():
    with pytest.raises(
        FitError, match=r'diverged at step \d+: the log density of site "y" is not finite in rows \[7\]'
    ) as caught:
        fit(limited, LIMITS, STEEP, progress=False)
    error = caught.value
    assert error.site == "y"
    assert error.rows == (7,)
    # the step that a fit which looks at every step fails at
    with pytest.raises(FitError) as each:
        fit(limited, LIMITS, replace(STEEP, log_every=1), progress=False)
    assert each.value.step == error.step == each.value.state.step
    assert error.state.step == error.step // 10 * 10
    assert error.state.stopped == "diverged"


def test_rows_of_a_divergence_are_those_of_the_data_and_not_of_the_minibatch():
    with pytest.raises(FitError) as caught:
        fit(limited, LIMITS, replace(STEEP, rows_per_batch=5, steps=400), progress=False)
    assert caught.value.rows == (7,)


@pytest.mark.slow
def test_a_diverged_fit_goes_back_and_tells_so():
    """Descent of a quadratic diverges above 2 (1 + momentum) / curvature (Polyak 1964), here 3.8 * .36."""

    template = replace(shared, guide=place_guide, nets=lambda sizes, prior: Place())
    knobs = plan(
        steps=3000,
        log_every=100,
        estimator="trace",
        optimiser="sgd",
        schedule="constant",
        lr=2.4,
        clip=None,
        dtype="float32",
    )
    done = fit(template, rows(12), knobs, progress=False)
    restarts = done.provenance["fit"]["restarts"]
    assert len(restarts) == 1
    assert restarts[0]["step"] < 3000
    assert done.provenance["fit"]["stopped"] == "steps"
    assert float(done.history.lr[-1]) == pytest.approx(1.2)
    y = torch.as_tensor(rows(12)["y"])
    assert float(done.nets.own.loc) == pytest.approx(
        float(posterior_of_mu(y, 0.0)[0]), abs=0.02
    )  # guide's sd x lr


@pytest.mark.parametrize("noisy", [False, True])
def test_a_plateau_ends_the_fit_after_a_last_fall_of_the_learning_rate(noisy):
    template, data = (hierarchy(EXACT), rows(20)) if noisy else (shared, rows(20))
    knobs = {"estimator": "trace", "rows_per_batch": 5} if noisy else {"estimator": "trace"}
    rule = Plateau(window=50, tolerance=2.0, least=0.05, min_steps=100)
    done = fit(template, data, plan(steps=5000, log_every=10, lr=0.02, stop=rule, **knobs), progress=False)
    steps, lr = done.history.step.values, done.history.lr.values
    assert done.provenance["fit"]["stopped"] == "plateau"
    begun = steps[np.flatnonzero(np.isclose(lr, lr.max()))[-1]]
    assert 100 <= begun < 5000
    assert steps[-1] == 2 * begun  # the fall takes as long again
    assert lr[-1] < 0.02 * lr.max()


def test_noise_that_hides_any_improvement_ends_nothing():
    rule = Plateau(window=50, tolerance=2.0, least=1e-4, min_steps=100)
    noisy = plan(steps=300, log_every=10, estimator="trace", rows_per_batch=5, stop=rule)
    assert fit(hierarchy(EXACT), rows(20), noisy, progress=False).provenance["fit"]["stopped"] == "steps"


def test_a_fit_without_noise_that_has_converged_is_on_a_plateau():
    rule = Plateau(window=20, tolerance=2.0, min_steps=40)
    knobs = plan(steps=400, log_every=10, lr=1e-12, estimator="trace", stop=rule)
    still = replace(
        shared, guide=lambda b, p, n: pyro.sample("mu", dist.Delta(n.loc)), nets=lambda sizes, prior: Place()
    )
    assert fit(still, rows(20), knobs, progress=False).provenance["fit"]["stopped"] == "plateau"


def test_a_fit_that_still_improves_is_not_on_a_plateau():
    rule = Plateau(window=20, tolerance=2.0, min_steps=40)
    knobs = plan(steps=200, log_every=10, lr=1e-3, schedule="constant", estimator="trace", stop=rule)
    far = {"y": rows(20)["y"] + 50}  # 200 steps of 1e-3 on the way
    straight = replace(shared, guide=place_guide, nets=lambda sizes, prior: Place())
    assert fit(straight, far, knobs, progress=False).provenance["fit"]["stopped"] == "steps"


def test_the_history_has_the_parts_the_noise_and_the_plan():
    done = fit(
        hierarchy(OFF),
        rows(20),
        plan(steps=45, log_every=10, kl_warmup=30, estimator="trace"),
        progress=False,
    )
    h = done.history
    assert h.step.values.tolist() == [10, 20, 30, 40, 45]
    np.testing.assert_allclose(h.beta, [9 / 30, 19 / 30, 29 / 30, 1, 1])
    parts = sum(h[name] for name in h.data_vars if str(name).startswith("part_"))
    np.testing.assert_allclose(parts[-1], -h.objective[-1], rtol=1e-12)  # at beta 1; float64 sums
    assert float(h.objective_sd.min()) > 0
    assert float(h.grad_norm.min()) > 0
    assert h.objective.attrs["units"] == "nat / row"


def test_devices_are_never_chosen_in_silence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match='device = "cuda", but torch finds no CUDA device here; use "cpu"'):
        fit(shared, rows(5), plan(device="cuda"), progress=False)
    with pytest.raises(PlanError, match='device = "abacus" is no device'):
        fit(shared, rows(5), plan(device="abacus"), progress=False)


def test_a_fit_runs_outside_the_main_thread_where_no_signal_can_be_heard():
    found = []
    knobs = plan(steps=20, log_every=10, estimator="trace")
    thread = threading.Thread(target=lambda: found.append(fit(shared, rows(5), knobs, progress=False)))
    thread.start(), thread.join()
    assert found[0].provenance["fit"]["steps"] == 20


def test_what_the_user_gave_is_left_as_it_was():
    data = rows(10)
    before, given = data["y"].copy(), hierarchy(OFF)
    fit(given, data, plan(steps=20, log_every=10, rows_per_batch=4), progress=False)
    np.testing.assert_array_equal(data["y"], before)
    assert given == replace(given)


@pytest.mark.parametrize("n", [40, 600])  # rows that are polished, and rows that Newton finishes
def test_the_random_stream_of_the_process_is_left_as_it_was(n):
    before = torch.get_rng_state()
    fit(hierarchy(OFF), rows(n), plan(steps=2, log_every=1, newton=True), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 1), nn.Linear(1, 2)


def coded_model(batch, prior, nets):
    with batch.plate("row"):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        batch.observe("y", dist.Normal(nets.decoder(z.unsqueeze(-1)).squeeze(-1), 0.5))


def coded_guide(batch, prior, nets):
    with batch.plate("row"):
        loc, log_scale = nets.encoder(batch.y.unsqueeze(-1)).unbind(-1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


@pytest.mark.parametrize("estimator", ["auto", "trace", "analytic", "stl", "iwae"])
def test_a_model_of_plain_numbers_is_fitted_in_double(estimator):
    template = Template(
        name="coded", fields={"y": Field(("row",), "observed")}, rows="row", model=coded_model,
        guide=coded_guide, nets=lambda sizes, prior: Coder(), dims={"z": ("row",)},
    )  # fmt: skip
    done = fit(
        template, rows(12), plan(steps=20, log_every=10, estimator=estimator, particles=2), progress=False
    )
    assert {p.dtype for p in done.nets.parameters()} == {torch.float64}
    drawn = draw(done, rows(12), draws=4, seed=0)
    assert drawn["posterior"]["z"].dtype == np.float64
    assert predict(done, rows(12), draws=4, seed=0)["posterior_predictive"]["y"].dtype == np.float64


@pytest.mark.parametrize("run", [fit, lambda *given, **_: next(train(*given))])
def test_a_field_that_is_missing_everywhere_is_refused_to_learn_from_and_not_to_forecast(run):
    none = {"y": np.full(12, np.nan)}
    with pytest.raises(DataError, match=r'(?s)nothing to learn from.*field "y": every entry is missing'):
        run(shared, none, plan(steps=2), progress=False)
    some = {"y": np.r_[1.0, np.full(11, np.nan)]}  # in one chunk with those that are missing
    done = fit(shared, some, plan(steps=2), progress=False)
    assert predict(done, none, draws=4)["posterior_predictive"]["y"].shape == (1, 4, 12)
