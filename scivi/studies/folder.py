"""A study's folder: what each fit has left there, and what that says of its state.

    study.json            the manifest
    submissions.json      what was handed to the scheduler, if any
    fits/<id>/            as ``scivi fit`` leaves it: fit/, history.jsonl, posterior, report.html; and
        attempt.json      written when a fit begins: who, where, how often before
        result.json       written last: done, or failed and why

A fit is running while its process holds ``.lock``, or the scheduler lists its job. One that has begun, has no
result, and neither, has vanished: killed, or gone with its node.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scivi.files import locked
from scivi.studies.manifest import Manifest, Row
from scivi.watch import HISTORY, entries

STATES = ("done", "running", "queued", "waiting", "stopped", "vanished", "failed")
ENDED = ("done", "failed")
_TAIL = 4096  # bytes at the end of a history in which its last entry stands


@dataclass(frozen=True)
class Standing:
    """How a fit of a study stands.

    Args:
        row: the fit.
        state: one of ``STATES``.
        told: its result or, before, its last attempt.
        last: last entry of its history.
    """

    row: Row
    state: str
    told: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)

    @property
    def cause(self) -> str:
        """Why it failed; empty if it has not."""
        return f"{self.told['cause']}: {self.told['message']}" if self.told.get("cause") else ""


def place(folder: Path, row: Row) -> Path:
    """The folder of a fit."""
    return folder / "fits" / row.id


def told(path: Path) -> dict[str, Any]:
    """What a JSON file says; empty if there is none."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}


@contextmanager
def claimed(fit: Path, wait_s: float = 0.0) -> Iterator[bool]:
    """Whether this process has the fit's folder to itself, while it lasts."""
    fit.mkdir(parents=True, exist_ok=True)
    with locked(fit / ".lock", wait_s) as ours:
        yield ours


def is_claimed(fit: Path) -> bool:
    """Whether some process has the fit's folder to itself."""
    if not (fit / ".lock").exists():
        return False
    try:
        with locked(fit / ".lock") as free:
            return not free
    except PermissionError:  # another user's study: nothing more can be learnt
        return False


def jobs_of(folder: Path) -> dict[str, str]:
    """What the scheduler says of a study's jobs: by id of the fit, "running" or "queued".

    Empty where there is no scheduler or it knows none of them.
    """
    sent = told(folder / "submissions.json").get("arrays", [])
    if not sent or shutil.which("squeue") is None:
        return {}
    ids = ",".join(str(array["job"]) for array in sent)
    # squeue fails if all jobs are gone, which is an answer
    found = subprocess.run(
        ["squeue", "--noheader", "--array", f"--jobs={ids}", "--format=%F %K %t"],
        capture_output=True,
        text=True,
        check=False,
    )
    fits = {str(array["job"]): array["fits"] for array in sent}
    states = {}
    for line in found.stdout.splitlines():
        job, index, state = line.split()
        if job in fits and index.isdecimal():
            states[fits[job][int(index)]] = "queued" if state in ("PD", "CF", "RQ", "S") else "running"
    return states


def standings(folder: Path, manifest: Manifest | None = None) -> list[Standing]:
    """How every fit of a study stands."""
    jobs = jobs_of(folder)
    rows = (manifest or Manifest.read(folder)).rows
    return [_standing(folder, row, jobs.get(row.id)) for row in rows]


def _standing(folder: Path, row: Row, job: str | None) -> Standing:
    fit = place(folder, row)
    result, attempt = told(fit / "result.json"), told(fit / "attempt.json")
    if result:
        return Standing(row, result["state"], result)
    last = _last(fit / HISTORY)
    if job == "running" or is_claimed(fit):
        return Standing(row, "running", attempt, last)
    if job == "queued":
        return Standing(row, "queued", attempt, last)
    if not attempt:
        return Standing(row, "waiting")
    return Standing(row, "stopped" if attempt.get("stopped") else "vanished", attempt, last)


def _last(path: Path) -> dict[str, float]:
    """The last entry of a history."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            found = entries(file.read())
    except FileNotFoundError:
        return {}
    return found[-1] if found else {}
