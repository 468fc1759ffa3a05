from __future__ import annotations

import json
from dataclasses import replace

import pytest

from scivi.inference import loop, stepper
from scivi.inference.loop import fit
from scivi.inference.recorder import CLOCKED, Guarded, JsonLines, Recorder, Several, recorder_for
from scivi.inference.state import save_state
from scivi.inputs import feed
from scivi.inputs.feed import Feed
from tests.inference.conjugate import plan, rows, shared


class Failing:
    def __init__(self) -> None:
        self.taken, self.closed = 0, False

    def write(self, entry) -> None:
        self.taken += 1
        if self.taken == 2:
            raise OSError("disk full")

    def close(self) -> None:
        self.closed = True


def test_lines_are_appended_and_can_be_read_while_the_fit_runs(tmp_path):
    path = tmp_path / "made" / "history.jsonl"
    for step in (1, 2):
        lines = JsonLines(path)
        assert isinstance(lines, Recorder)
        lines.write({"step": step, "objective": 0.5})
        assert len(path.read_text().splitlines()) == step
        lines.close()


def test_every_entry_of_the_history_is_recorded(tmp_path):
    path = tmp_path / "history.jsonl"
    done = fit(shared, rows(8), plan(steps=55, log_every=10, estimator="trace"), record=path, progress=False)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["step"] for e in entries] == [10, 20, 30, 40, 50, 55]
    assert [e["objective"] for e in entries] == done.history.objective.values.tolist()


class Killed(Exception):
    pass


def test_a_killed_and_resumed_fit_leaves_the_lines_of_an_unstopped_one(tmp_path, monkeypatch):
    knobs = {"record": tmp_path / "history.jsonl", "checkpoint": tmp_path / "ckpt", "progress": False}
    whole = plan(steps=60, log_every=10, estimator="trace")
    done = fit(shared, rows(8), whole, **{**knobs, "checkpoint": None})
    unstopped = [json.loads(line) for line in knobs["record"].read_text().splitlines()]
    knobs["record"].unlink()

    class Dying(JsonLines):
        def write(self, entry) -> None:
            super().write(entry)
            if entry["step"] == 40:
                self._file.write('{"step": 50, "obj')  # and what was being written
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", lambda s, *rest: save_state(s, *rest) if s.step <= 20 else None)
        dying = {**knobs, "record": Dying(knobs["record"])}
        with pytest.raises(Killed):
            fit(shared, rows(8), replace(whole, save_every_s=1e-9), **dying)
    assert len(knobs["record"].read_text().splitlines()) == 5
    again = fit(shared, rows(8), whole, **knobs, resume=True)
    entries = [json.loads(line) for line in knobs["record"].read_text().splitlines()]
    assert [e["step"] for e in entries] == [10, 20, 30, 40, 50, 60]
    for one, other in zip(entries, unstopped, strict=True):
        assert {k: v for k, v in one.items() if k not in CLOCKED} == {
            k: v for k, v in other.items() if k not in CLOCKED
        }
    assert [e["objective"] for e in entries] == done.history.objective.values.tolist()
    assert [e["wall_s"] for e in entries] == again.history.wall_s.values.tolist()


def test_a_recorder_that_fails_ends_the_recording_with_one_warning_and_not_the_fit():
    failing = Failing()
    with pytest.warns(
        UserWarning, match="the recorder Failing failed .disk full.; the fit goes on without it"
    ) as caught:
        done = fit(
            shared, rows(8), plan(steps=50, log_every=10, estimator="trace"), record=failing, progress=False
        )
    assert len(caught) == 1
    assert failing.taken == 2
    assert len(done.history.log) == 5


def test_a_guarded_recorder_is_closed():
    failing = Failing()
    Guarded(failing).close()
    assert failing.closed


class Unclosable(Failing):
    def write(self, entry) -> None:
        self.taken += 1

    def close(self) -> None:
        raise OSError("server gone")


def test_a_recorder_that_cannot_be_closed_does_not_take_the_result_with_it():
    whole = plan(steps=20, log_every=10, estimator="trace")
    with pytest.warns(UserWarning, match="the recorder Unclosable failed .server gone."):
        done = fit(shared, rows(8), whole, record=Unclosable(), progress=False)
    assert len(done.history.log) == 2


def test_several_recorders_take_every_entry_but_for_one_that_fails():
    failing, good = Failing(), Unclosable()
    several = Several(failing, good)
    assert isinstance(several, Recorder)
    several.write({"step": 1})
    with pytest.warns(UserWarning, match="the recorder Failing failed"):
        several.write({"step": 2})
    several.write({"step": 3})
    assert (failing.taken, good.taken) == (2, 3)
    with pytest.warns(UserWarning, match="the recorder Unclosable failed"):
        several.close()


def test_recorders_are_files_others_several_or_none(tmp_path):
    path, failing = tmp_path / "history.jsonl", Failing()
    path.write_text("what a killed fit has left\n")
    for record in (path, str(path), [path], (path, failing)):
        recorder = recorder_for(record, [{"step": 1}])
        recorder.write({"step": 2})
        recorder.close()
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert failing.taken == 1
    recorder_for([path], None).close()
    assert len(path.read_text().splitlines()) == 2
    recorder_for(None, None).write({"step": 1})


@pytest.mark.parametrize("knobs", [{}, {"resident_bytes": 0}, {"rows_per_batch": None}])
def test_the_loaders_share_is_that_of_the_time_since_the_entry_before(knobs):
    whole = plan(**{"steps": 40, "log_every": 10, "estimator": "trace", "rows_per_batch": 4, **knobs})
    done = fit(shared, rows(8), whole, progress=False)
    share = done.history.loader_share.values
    assert share.shape == (4,)
    assert ((share > 0) & (share < 1)).all()


@pytest.mark.eager  # its clock goes on in `update`, which a captured step does not call
def test_a_step_that_waits_for_its_rows_counts_as_loading(monkeypatch):
    clock = [0.0]  # as if the first batch took 3 s, and everything else no time but 1 s a step

    def slow(feed):
        clock[0] += 3.0 if clock[0] == 0 else 0.0
        return taken(feed)

    def step(state, objective, plan):
        value = updated(state, objective, plan)
        clock[0] += 1.0
        return value

    taken, updated = Feed._next, stepper.update
    monkeypatch.setattr(Feed, "_next", slow)
    monkeypatch.setattr(stepper, "update", step)
    for module in (feed, loop):
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    whole = plan(steps=20, log_every=10, estimator="trace", save_every_s=1e9)
    done = fit(shared, rows(8), whole, progress=False)
    assert done.history.loader_share.values.tolist() == [3 / 13, 0.0]
    assert done.history.wall_s.values.tolist() == [13.0, 23.0]
