from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from scivi.errors import CheckpointError
from scivi.inference.loop import fit, train
from scivi.inference.opening import begin, open_data
from scivi.inference.plan import Plateau
from scivi.inference.recorder import CLOCKED
from scivi.inference.state import load_state, save_state
from tests.inference.conjugate import OFF, hierarchy, plan, rows, shared
from tests.inference.test_loop import Place, place_guide

schools = replace(hierarchy(), guide=None, nets=None)
DATA = rows(40)
CASES = {
    "mean field": (schools, {"rows_per_batch": 7, "estimator": "trace"}),
    "amortised": (
        hierarchy(OFF),
        {"rows_per_batch": 7},
    ),  # marginal; its set-up draws random numbers of its own
    "newton": (hierarchy(OFF), {"rows_per_batch": 7, "newton": True}),
    "sgd": (schools, {"rows_per_batch": 7, "estimator": "stl", "optimiser": "sgd", "lr": 1e-3}),
    "streamed": (schools, {"rows_per_batch": 7, "estimator": "trace", "resident_bytes": 0}),
    "growing": (
        schools,
        {"rows_per_batch": 4, "rows_per_batch_max": 32, "grow_below": 0.9, "estimator": "trace"},
    ),
    "plateau": (
        schools,
        {"rows_per_batch": 7, "estimator": "trace", "stop": Plateau(30, 2.0, 60), "steps": 2000},
    ),
}


def run_to_end(template, knobs, state=None, until: int | None = None):
    """Train, all the way or until a step."""
    source = open_data(template, DATA)
    state = state or begin(template, source, knobs)
    for now in train(template, source, knobs, state=state):
        if now.step == until:
            break
    return state


def same(one, other) -> None:
    assert len(one.history) == len(other.history)
    for ours, theirs in zip(one.history, other.history, strict=True):
        assert {k: v for k, v in ours.items() if k not in CLOCKED} == {
            k: v for k, v in theirs.items() if k not in CLOCKED
        }
    for (name, ours), (_, theirs) in zip(
        *[s.bound.nets.state_dict().items() for s in (one, other)], strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("case", CASES)
def test_resume_at_any_step_equals_a_fit_that_was_never_stopped(case, tmp_path):
    template, knobs = CASES[case]
    whole = plan(**{"steps": 150, "log_every": 10, "seed": 2, **knobs})
    unstopped = run_to_end(template, whole)
    assert unstopped.stopped == ("plateau" if case == "plateau" else "steps")
    halting, source = (
        replace(whole, save_every_s=1e-9),
        open_data(template, DATA),
    )  # gives way after every step
    stopped = None
    for until in (23, 60, 61, 99):  # in the middle of a window, at its end, after it
        stopped = run_to_end(template, halting, stopped, until)
        save_state(stopped, tmp_path / "ckpt", {"it": 1})
        stopped = begin(template, source, replace(halting, seed=2))
        load_state(stopped, tmp_path / "ckpt", {"it": 1})
    same(run_to_end(template, whole, stopped), unstopped)
    if case == "growing":
        sizes = [e["rows_per_batch"] for e in unstopped.history]
        assert sizes[0] == 4 < sizes[-1] <= 32
        assert sorted(sizes) == sizes


def test_resume_of_a_fit_that_had_diverged_keeps_its_restarts(tmp_path):
    whole = plan(steps=60, log_every=5, seed=1, estimator="trace", rows_per_batch=7)
    state = run_to_end(schools, whole, until=30)
    state.restarts, state.lr_factor = [{"step": 4, "site": "z", "rows": [1]}], 0.5
    save_state(state, tmp_path / "ckpt", {})
    other = begin(schools, open_data(schools, DATA), whole)
    load_state(other, tmp_path / "ckpt", {})
    assert (other.restarts, other.lr_factor, other.step) == (state.restarts, 0.5, 30)
    same(run_to_end(schools, whole, other), run_to_end(schools, whole, state))


@pytest.mark.parametrize("until", [60, 70, 72, 73])
def test_a_divergence_after_a_resume_goes_back_as_far_as_without(until, tmp_path):
    """Descent that diverges (test_loop says why), stopped at the end and in the middle of a window."""
    template = replace(shared, guide=place_guide, nets=lambda sizes, prior: Place())
    whole = plan(
        steps=200, log_every=10, estimator="trace", optimiser="sgd", schedule="constant", lr=1.5, clip=None,
        dtype="float32",
    )  # fmt: skip
    unstopped = run_to_end(template, whole)
    assert [r["step"] for r in unstopped.restarts] == [74]
    halting, source = replace(whole, save_every_s=1e-9), open_data(template, DATA)
    stopped = run_to_end(template, halting, None, until)
    save_state(stopped, tmp_path / "ckpt", {})
    resumed = begin(template, source, whole)
    load_state(resumed, tmp_path / "ckpt", {})
    same(run_to_end(template, whole, resumed), unstopped)
    assert resumed.restarts == unstopped.restarts


@pytest.mark.eager  # it looks at every step
def test_a_signal_holds_though_the_window_it_fell_in_diverged(monkeypatch):
    template = replace(shared, guide=place_guide, nets=lambda sizes, prior: Place())
    whole = plan(
        steps=200, log_every=10, estimator="trace", optimiser="sgd", schedule="constant", lr=1.5, clip=None,
        dtype="float32",
    )  # fmt: skip

    state = begin(template, open_data(template, DATA), whole)
    following = state.feed.next

    def signalled():
        if state.step == 76:  # two steps after the one that diverges
            state.stopped = "signal"
        return following()

    monkeypatch.setattr(state.feed, "next", signalled)
    run_to_end(template, whole, state)
    assert (state.stopped, state.step, [r["step"] for r in state.restarts]) == ("signal", 70, [74])


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_fit_killed_ten_times_ends_with_the_unstopped_history(tmp_path):
    script, found, seconds = Path(__file__).with_name("killed_fit.py"), {}, "0"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    for kills in (0, 10):
        folder = tmp_path / str(kills)
        folder.mkdir()
        command = [sys.executable, str(script), str(folder), str(kills), seconds, "0"]
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert run.returncode == 0, run.stderr
        killed, seconds = run.stdout.split()[-2:]
        assert int(killed) == kills
        found[kills] = result(folder)
    assert len(found[0]["history"]["step"]) == 200
    assert found[10] == found[0]


class Terminator:
    """A recorder that asks this process to stop at an entry."""

    def __init__(self, at: int) -> None:
        self.at = at

    def write(self, entry) -> None:
        if entry["step"] == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None: ...


@pytest.mark.parametrize("name", ["amortised", "newton"])
def test_a_signal_ends_a_fit_that_can_be_resumed(name, tmp_path):
    template, knobs = CASES[name]
    whole, path = plan(**{"steps": 200, "log_every": 20, **knobs}), tmp_path / "fit.ckpt"
    unstopped = fit(template, DATA, whole, progress=False)
    before = signal.getsignal(signal.SIGTERM)
    first = fit(template, DATA, whole, progress=False, checkpoint=path, record=Terminator(60))
    assert first.provenance["fit"]["stopped"] == "signal"
    assert 60 <= first.provenance["fit"]["steps"] <= 80
    assert "method" not in first.provenance["fit"]["finish"]  # a finish is for fits that have ended
    assert signal.getsignal(signal.SIGTERM) == before
    then = fit(template, DATA, whole, progress=False, checkpoint=path, resume=True)
    assert then.provenance["fit"]["stopped"] == "steps"
    assert then.provenance["fit"]["finish"] == unstopped.provenance["fit"]["finish"]
    xr.testing.assert_identical(then.history.drop_vars(CLOCKED), unstopped.history.drop_vars(CLOCKED))
    for key, value in unstopped.nets.state_dict().items():
        assert torch.equal(value, then.nets.state_dict()[key]), key


def test_resume_of_an_ended_fit_gives_it_again(tmp_path):
    whole, path = plan(steps=40, log_every=10, estimator="trace"), tmp_path / "fit.ckpt"
    first = fit(schools, DATA, whole, progress=False, checkpoint=path)
    second = fit(schools, DATA, whole, progress=False, checkpoint=path, resume=True)
    xr.testing.assert_identical(first.history, second.history)
    assert second.provenance["fit"]["stopped"] == "steps"


def test_resume_refuses_another_fits_checkpoint_and_says_what_differs(tmp_path):
    whole, path = plan(steps=20, log_every=10, estimator="trace"), tmp_path / "fit.ckpt"
    fit(schools, DATA, whole, progress=False, checkpoint=path)
    with pytest.raises(
        CheckpointError, match=r"belongs to another fit; .*\n  - plan: there .*'lr': 0.005"
    ) as caught:
        fit(schools, DATA, replace(whole, lr=0.1), progress=False, checkpoint=path, resume=True)
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(CheckpointError, match=r"  - data: there .*fingerprint"):
        fit(schools, {"y": DATA["y"] + 1}, whole, progress=False, checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match=r"  - template: there 'hierarchy', here 'other'"):
        fit(replace(schools, name="other"), DATA, whole, progress=False, checkpoint=path, resume=True)
    fit(schools, DATA, replace(whole, save_every_s=1.0), progress=False, checkpoint=path, resume=True)


def test_resume_refuses_a_damaged_checkpoint_and_never_reads_one_half_written(tmp_path):
    whole, path = plan(steps=20, log_every=10, estimator="trace"), tmp_path / "fit.ckpt"
    (tmp_path / f".fit.ckpt.{os.getpid()}.part").write_bytes(b"half a checkp")
    done = fit(schools, DATA, whole, progress=False, checkpoint=path, resume=True)
    assert done.provenance["fit"]["steps"] == 20
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"fit.ckpt\" cannot be read as safetensors"):
        fit(schools, DATA, whole, progress=False, checkpoint=path, resume=True)


def test_two_fits_with_one_seed_are_equal_and_do_not_move_the_process_stream():
    whole = plan(steps=60, log_every=10, rows_per_batch=7)
    torch.manual_seed(5)
    one = fit(hierarchy(OFF), DATA, whole, progress=False)
    after = torch.rand(3)
    torch.manual_seed(5)
    np.testing.assert_array_equal(after, torch.rand(3))
    other = fit(hierarchy(OFF), DATA, whole, progress=False)
    xr.testing.assert_identical(one.history.drop_vars(CLOCKED), other.history.drop_vars(CLOCKED))
    third = fit(hierarchy(OFF), DATA, replace(whole, seed=1), progress=False)
    assert not np.array_equal(third.history.objective, one.history.objective)
