from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from scivi import watch as watching
from scivi.errors import DataError
from scivi.watch import Followed, histories, sparkline, watch
from tests.inference.conjugate import plan, rows, shared

ROOT = Path(__file__).resolve().parents[1]
NOW = 1_000_000_000.0


def entry(step: int, objective: float = 2.0, **others: float) -> str:
    return json.dumps({"step": step, "objective": objective, "wall_s": step / 50, **others}) + "\n"


def history(folder: Path, *lines: str, age: float = 1.0) -> Path:
    """A history whose last entry is some seconds old at ``NOW``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "history.jsonl"
    path.write_text("".join(lines))
    os.utime(path, (NOW - age, NOW - age))
    return path


def saved(folder: Path, stopped: str, age: float) -> None:
    (folder / "fit").mkdir()
    path = folder / "fit" / "fit.json"
    path.write_text(json.dumps({"provenance": {"fit": {"stopped": stopped}}}))
    os.utime(path, (NOW - age, NOW - age))


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(watching.time, "time", lambda: NOW)


def shown(folder: Path, capsys) -> list[list[str]]:
    """The table's lines, by cell: columns stand two blanks apart."""
    watch(folder, once=True)
    return [
        [c.strip() for c in line.split("  ") if c.strip()] for line in capsys.readouterr().out.splitlines()
    ]


def test_every_fit_below_a_folder_has_a_line(tmp_path, capsys):
    history(tmp_path / "a", entry(150, 4.0), entry(200, 3.0, grad_norm=0.25, loader_share=0.125), age=5)
    history(tmp_path / "deep" / "b", entry(50), age=7200)
    history(tmp_path / "c", entry(100), age=600)
    saved(tmp_path / "c", "plateau", age=590)
    head, a, c, b = shown(tmp_path, capsys)
    assert head == [
        "fit",
        "step",
        "nats/row",
        "change",
        "gradient",
        "steps/s",
        "loader",
        "last entry",
        "state",
        "objective",
    ]
    assert a == ["a", "200", "3", "-1", "0.25", "50", "12%", "5 s", "running", "█▁"]
    assert c == ["c", "100", "2", "–", "–", "50", "–", "10.0 min", "done: plateau", "▁"]
    assert b == ["deep/b", "50", "2", "–", "–", "50", "–", "2.0 h", "silent", "▁"]


def test_a_fit_that_was_begun_again_beside_a_saved_one_runs(tmp_path, capsys):
    history(tmp_path, entry(100), age=2)
    saved(tmp_path, "steps", age=500)
    _, line = shown(tmp_path, capsys)
    assert line[0] == tmp_path.name
    assert "running" in line


def test_a_fit_whose_entries_are_far_apart_is_silent_after_ten_times_as_long(tmp_path):
    slow = [json.dumps({"step": k, "objective": 1.0, "wall_s": 30.0 * k}) + "\n" for k in (1, 2)]
    one = Followed(history(tmp_path, *slow))
    one.read()
    assert (one.state(61), one.state(299), one.state(301)) == ("running", "running", "silent")
    one = Followed(history(tmp_path / "quick", entry(1), entry(2)))
    one.read()
    assert (one.state(59), one.state(61)) == ("running", "silent")


def test_a_half_written_line_waits_and_a_broken_one_is_left_out(tmp_path):
    path = history(tmp_path, entry(10), '{"step": 2', "\n", '"text"\n', '{"step": 20}\n', entry(30)[:-9])
    one = Followed(path)
    one.read()
    assert one.steps == [10]
    with path.open("a") as file:
        file.write(entry(30)[-9:] + entry(40))
    one.read()
    assert one.steps == [10, 30, 40]
    path.with_name("aside").write_text(entry(10) + entry(20, 7.0))  # as a resumed fit does
    path.with_name("aside").replace(path)
    one.read()
    assert (one.steps, one.objectives) == ([10, 20], [2.0, 7.0])
    path.unlink()
    one.read()
    assert one.steps == [10, 20]


def test_a_fit_without_an_entry_yet_has_a_line(tmp_path, capsys):
    history(tmp_path / "new", age=3)
    _, line = shown(tmp_path, capsys)
    assert line == ["new", *["–"] * 6, "3 s", "running"]


def test_change_is_between_the_last_quarters_of_the_steps(tmp_path):
    # of 400 steps the quarters are (200, 300] and (300, 400]
    lines = [entry(step, float(step)) for step in range(20, 401, 20)]
    one = Followed(history(tmp_path, *lines))
    one.read()
    late, early = [320, 340, 360, 380, 400], [220, 240, 260, 280, 300]
    assert one.change() == sum(late) / 5 - sum(early) / 5


def test_what_a_fit_keeps_beside_its_history_and_stores_are_not_entered(tmp_path):
    for name in ("one", "one/inside", "two/posterior.zarr/x", ".hidden", "two/b"):
        history(tmp_path / name, entry(1))
    assert sorted(histories(tmp_path)) == [
        tmp_path / "one" / "history.jsonl",
        tmp_path / "two" / "b" / "history.jsonl",
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([float("nan")], ""),
        ([1.0, 1.0], "▁▁"),
        ([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], "█▇▆▅▄▃▂▁"),
        (
            [1e6, 2.0, 1.0, 0.0],
            "█▃▂▁",
        ),  # the first value is cut at 0 + 3 (2 - 0); 2 and 1 are levels 7/3, 7/6
    ],
)
def test_sparkline(values, line):
    assert sparkline(values) == line


def test_a_long_course_is_averaged_to_the_width():
    assert sparkline([*[7.0] * 500, *[0.0] * 500], width=4) == "██▁▁"


def test_an_empty_folder_gives_one_sentence_and_none_an_error(tmp_path, capsys):
    watch(tmp_path, once=True)
    told = " ".join(capsys.readouterr().out.split())
    assert told == f'There is no history.jsonl below "{tmp_path}": no fit has written an entry there yet.'
    with pytest.raises(DataError, match="there is no folder"):
        watch(tmp_path / "absent")


def test_where_the_output_is_no_terminal_it_is_shown_once(tmp_path, capsys):
    history(tmp_path / "a", entry(100))
    watch(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_in_a_terminal_it_follows_until_ctrl_c(tmp_path, monkeypatch):
    path, screen, looks = history(tmp_path / "a", entry(100)), io.StringIO(), []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        path.write_text(entry(100) + entry(12345))

    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("rich.console.Console", lambda: terminal)
    monkeypatch.setattr(time, "sleep", sleep)
    watch(tmp_path, interval=7.0)
    assert looks == [7.0, 7.0]
    assert "12,345" in screen.getvalue()


def test_a_real_fit_is_shown_and_torch_is_not_needed(tmp_path):
    from scivi.inference.loop import fit
    from scivi.inference.state import save

    short = plan(steps=30, log_every=10, estimator="trace")
    done = fit(shared, rows(8), short, record=tmp_path / "a" / "history.jsonl", progress=False)
    save(done, tmp_path / "a" / "fit")
    code = f"""
import sys
class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "pyro", "numpy", "xarray"):
            raise ImportError(name)
sys.meta_path.insert(0, Refused)
from scivi.watch import watch
watch({str(tmp_path)!r})
"""
    told = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    line = run.stdout.splitlines()[1]
    assert line.startswith("a ")
    assert "done: steps" in line
    assert f"{done.history.objective.values[-1]:.5g}" in line


def test_what_draws_the_table_is_loaded_when_it_is_drawn():
    code = "import sys, scivi.watch; print('rich' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
