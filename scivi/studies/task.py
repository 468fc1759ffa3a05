"""Run fits of a study, one after the other, in this process.

    python -m scivi.studies.task FOLDER            # any fit that nobody runs, until none is left
    python -m scivi.studies.task FOLDER --fit ID   # this one

A fit that was begun before goes on from its checkpoint. What a fit's end means:

    its data or plan cannot be used, or it diverged     failed: the same would happen again
    the machine failed it (disk, memory), or killed it  begun again, ``retries`` times
    a signal                                            saved, and begun again when there is room

Exit codes: 0 all that could be done is done; 75 stopped by a signal, or the machine failed: try again.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from scivi.errors import FitError, SciVIError
from scivi.files import opened, write_json
from scivi.studies.folder import claimed, place, told
from scivi.studies.job import run
from scivi.studies.manifest import Manifest, Row

AGAIN = 75  # "try again" in sysexits.h
KEPT = ("stopped", "steps", "wall_s", "verdict", "why", "score", "score_se")  # of what a fit tells
LOOK_S = 5.0  # whoever looks at the state of a fit holds its lock for a moment


class Stopped(BaseException):
    """A signal to stop came between the steps of fits."""


def run_row(
    folder: Path, manifest: Manifest, row: Row, *, wait_s: float = 0.0, progress: bool = False
) -> str:
    """Run a fit of a study, unless it has ended or another process runs it.

    Args:
        folder: of the study.
        manifest: of the study.
        row: the fit.
        wait_s: seconds to wait for its folder, if another process has it.
        progress: show a progress bar.

    Returns:
        "done" or "failed"; "busy" if another process runs it; "again" if a signal or the machine stopped it.
    """
    try:
        with claimed(place(folder, row), wait_s) as mine:
            return _run(place(folder, row), manifest, row, progress) if mine else "busy"
    except OSError:  # not even that could be written down
        traceback.print_exc()
        return "again"


def _run(fit: Path, manifest: Manifest, row: Row, progress: bool) -> str:
    if ended := told(fit / "result.json"):
        return ended["state"]
    attempt = _begun(told(fit / "attempt.json"))
    if attempt["number"] > manifest.retries + 1:
        times = attempt["number"] - 1
        message = f"begun {times} times, and the process was gone each time"
        return _end(fit, {**attempt, "number": times}, "machine", message)
    write_json(fit / "attempt.json", attempt)
    try:
        with _stopping():
            summary = run(row.job, fit, resume=True, report=manifest.report, progress=progress)
            if summary["stopped"] != "signal":
                summary |= _score(Path(summary["posterior"]))
    except (Stopped, KeyboardInterrupt):
        summary = {"stopped": "signal"}
    except FitError as error:
        return _end(fit, attempt, "diverged", str(error))
    except SciVIError as error:
        return _end(fit, attempt, type(error).__name__, str(error))
    except (OSError, MemoryError) as error:
        if attempt["number"] > manifest.retries:
            return _end(fit, attempt, "machine", f"{type(error).__name__}: {error}")
        traceback.print_exc()
        return "again"
    except BaseException as error:
        _end(fit, attempt, type(error).__name__, f"{error}; the log has where")
        raise
    if summary["stopped"] == "signal":
        write_json(fit / "attempt.json", {**attempt, "stopped": True})
        return "again"
    kept = {name: summary[name] for name in KEPT if name in summary}
    return _end(fit, {**attempt, **kept})


def _begun(before: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt, counted; one that a signal stopped does not count."""
    number = before.get("number", 0) + (0 if before.get("stopped") else 1)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    where = {"host": socket.gethostname(), "process": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
    return {"number": number, "begun": begun, **where}


def _end(fit: Path, attempt: Mapping[str, Any], cause: str = "", message: str = "") -> str:
    """Write the result, last of all."""
    state = "failed" if cause else "done"
    write_json(fit / "result.json", {"state": state, **attempt, "cause": cause, "message": message})
    return state


def _score(posterior: Path) -> dict[str, Any]:
    """Expected log density of held-out entries, by leave-one-out from the draws; nats, with its error."""
    from scivi import analysis

    with opened(posterior) as tree:
        if "log_likelihood" not in tree.children:
            return {}
        found = analysis.loo(tree)
    elpd, error = float(found["elpd"].sum()), float((found["se"] ** 2).sum() ** 0.5)
    return {"score": elpd, "score_se": error} if np.isfinite(elpd) else {}


@contextmanager
def _stopping() -> Iterator[None]:
    """While it lasts, SIGTERM raises ``Stopped``; within ``fit`` it lets the step be finished instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Run one fit, or all that nobody runs; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scivi.studies.task", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fit", help="id of the fit")
    given = parser.parse_args(arguments)
    manifest = Manifest.read(given.folder)
    sys.path[:0] = [p for p in (manifest.folder, os.getcwd()) if p not in sys.path]
    alone = given.fit is not None
    how: dict[str, Any] = {"wait_s": LOOK_S, "progress": sys.stderr.isatty()} if alone else {}
    rows = [row for row in manifest.rows if given.fit in (None, row.id)]
    if alone and not rows:
        parser.error(f"{given.folder} has no fit {given.fit}")
    for row in rows:
        state = run_row(given.folder, manifest, row, **how)
        print(f"{row.id} {state}: {row.label}", flush=True)
        if state == "again" or (state == "busy" and alone):
            _requeue()
            return AGAIN
    return 0


def _requeue() -> None:
    """Ask Slurm to run this job again, if it is one that Slurm still means to run.

    A job that it has preempted it queues by itself, and one that was cancelled is not wanted.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    asked = ["squeue", "--noheader", f"--jobs={job}", "--format=%t"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    if found.stdout.split() == ["R"]:
        subprocess.run(["scontrol", "requeue", job], check=False)


if __name__ == "__main__":
    sys.exit(main())
