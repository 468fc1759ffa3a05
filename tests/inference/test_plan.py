from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest

from scivi.errors import PlanError
from scivi.inference.plan import Plan, Plateau


def test_defaults_need_no_tuning_and_cannot_be_changed_in_place():
    plan = Plan()
    with pytest.raises(FrozenInstanceError):
        plan.steps = 1  # type: ignore[misc]
    assert replace(plan, steps=7).steps == 7


def test_every_unusable_value_is_told_at_once():
    with pytest.raises(PlanError) as caught:
        Plan(steps=-1, lr=-1.0, warmup=2.0, rows_per_batch=0, estimator="elbo", dtype="half", clip=0.0)  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    assert lines[0] == "this plan cannot be used:"
    assert sorted(line.split()[1] for line in lines[1:]) == [
        "clip", "dtype", "estimator", "lr", "rows_per_batch", "steps", "warmup",
    ]  # fmt: skip
    assert "estimator = 'elbo'; it must be one of" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": True}, "steps = True; it must be a whole number of at least 0"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"seed": -1}, "seed = -1"),
        ({"resident_bytes": -1}, "resident_bytes = -1; it must be a whole number of at least 0"),
        ({"resident_bytes": 2e9}, "resident_bytes = 2000000000.0"),
        ({"lr": float("nan")}, "lr = nan; it must be a number above 0"),
        ({"estimator": "iwae"}, '"iwae" needs particles >= 2'),
        ({"stop": 3}, "stop = 3; it must be a Plateau or None"),
        ({"compile": "fast"}, "compile = 'fast'"),
    ],
)
def test_an_unusable_value_is_told(values, words):
    with pytest.raises(PlanError, match=words):
        Plan(**values)


def test_rate_rises_stays_and_falls():
    plan = Plan(steps=1000, lr=0.1, warmup=0.1, decay=0.3)
    rates = [plan.lr_at(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1 / 100)
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert rates[100:700] == pytest.approx([0.1] * 600)
    assert all(a > b for a, b in pairwise(rates[700:]))
    # a half cosine: half way down in the middle, and 1e-3 of the rate (our choice) where it would reach zero
    assert rates[850] == pytest.approx(0.05, rel=2e-3)
    assert plan.lr_at(1000) == pytest.approx(1e-4)


def test_the_fall_can_begin_early():
    plan = Plan(steps=1000, lr=0.1, warmup=0.0, decay=0.3)
    assert plan.lr_at(399, decay_from=400, decay_steps=100) == pytest.approx(0.1)
    assert plan.lr_at(500, decay_from=400, decay_steps=100) == pytest.approx(1e-4)
    assert plan.lr_at(700, decay_from=400, decay_steps=100) == pytest.approx(1e-4)


def test_a_constant_rate_is_constant():
    plan = Plan(schedule="constant", lr=0.1)
    assert {plan.lr_at(step) for step in (0, 10, 4999)} == {0.1}


def test_weight_of_the_kl_part_rises_linearly():
    plan = Plan(kl_warmup=100, beta_start=0.2, beta=1.0)
    assert [plan.beta_at(step) for step in (0, 50, 100, 900)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert Plan().beta_at(0) == 1.0


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(steps=9, stop=Plateau(window=5), rows_per_batch=None, clip=None)]
)
def test_plain_values_give_the_same_plan(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("head", ["", "[plan]\n"])
def test_a_plan_is_read_from_toml(tmp_path, head):
    path = tmp_path / "plan.toml"
    path.write_text(f"{head}steps = 300\nestimator = 'marginal'\nstop = {{window = 100}}\n")
    assert Plan.from_toml(path) == Plan(steps=300, estimator="marginal", stop=Plateau(window=100))


def test_a_file_that_is_no_plan_is_told(tmp_path):
    path = tmp_path / "plan.toml"
    with pytest.raises(PlanError, match="there is no plan file"):
        Plan.from_toml(path)
    path.write_text("steps = ")
    with pytest.raises(PlanError, match="is not valid TOML"):
        Plan.from_toml(path)
    path.write_text("step = 10")
    with pytest.raises(PlanError, match=r"a plan has no 'step'\. It has: beta, beta_start, clip"):
        Plan.from_toml(path)
