from __future__ import annotations

import json
from dataclasses import replace

import pytest

from scivi.inference import loop
from scivi.inference.loop import fit
from scivi.inference.recorder import Guarded, JsonLines, Recorder
from scivi.inference.state import save_state
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
        patch.setattr(loop, "JsonLines", Dying)
        patch.setattr(loop, "save_state", lambda s, *rest: save_state(s, *rest) if s.step <= 20 else None)
        with pytest.raises(Killed):
            fit(shared, rows(8), replace(whole, save_every_s=1e-9), **knobs)
    assert len(knobs["record"].read_text().splitlines()) == 5
    again = fit(shared, rows(8), whole, **knobs, resume=True)
    entries = [json.loads(line) for line in knobs["record"].read_text().splitlines()]
    assert [e["step"] for e in entries] == [10, 20, 30, 40, 50, 60]
    for one, other in zip(entries, unstopped, strict=True):
        assert one | {"wall_s": 0} == other | {"wall_s": 0}
    assert [e["objective"] for e in entries] == done.history.objective.values.tolist()
    assert [e["wall_s"] for e in entries] == again.history.wall_s.values.tolist()


def test_a_recorder_that_fails_ends_the_recording_with_one_warning_and_not_the_fit():
    failing = Failing()
    with pytest.warns(
        UserWarning, match="the recorder failed .disk full.; the fit goes on without it"
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
