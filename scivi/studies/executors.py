"""Who runs the fits of a study: processes of this machine, or Slurm, to which placing work is left."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scivi.errors import StudyError
from scivi.files import write_json
from scivi.studies.folder import is_claimed, place, standings, told
from scivi.studies.manifest import Manifest, Resources, Row

_LOOK_S = 0.5  # between two looks at the workers
_ARRAY = 1000  # tasks of an array, if Slurm does not say how many it takes


def unfinished(folder: Path, manifest: Manifest) -> list[Row]:
    """Fits that nobody has ended, runs, or has queued."""
    return [s.row for s in standings(folder, manifest) if s.state in ("waiting", "stopped", "vanished")]


def local(
    folder: Path, manifest: Manifest, rows: Sequence[Row], jobs: int, look: Callable[[], None] = lambda: None
) -> None:
    """Run fits in so many processes of this machine, until all have ended; one that is killed is replaced.

    Args:
        folder: of the study.
        manifest: of the study.
        rows: the fits.
        jobs: processes.
        look: called now and then, to show how things stand.

    Raises:
        StudyError: some could not be ended.
        KeyboardInterrupt: a signal to stop came, and the processes have stopped.
    """
    call = [sys.executable, "-m", "scivi.studies.task", str(folder)]
    log = folder / "log" / "local.txt"
    log.parent.mkdir(exist_ok=True)
    environment = {**os.environ, **_threads(manifest.resources)}
    with log.open("a") as out, _told_to_stop() as stopped:

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(call, env=environment, stdout=out, stderr=out, start_new_session=True)

        workers = [start() for _ in range(min(jobs, len(rows)))]
        most = len(rows) * (manifest.retries + 1)  # restarts: a full disk would ask for more and more
        while workers:
            if stopped:
                for worker in workers:
                    worker.terminate()
                for worker in workers:
                    worker.wait()
                raise KeyboardInterrupt
            time.sleep(_LOOK_S)
            look()
            gone = [w for w in workers if w.poll() is not None]
            workers = [w for w in workers if w.poll() is None]
            for _ in gone:
                if unfinished(folder, manifest) and most > 0:
                    workers.append(start())
                    most -= 1
    if left := unfinished(folder, manifest):
        raise StudyError(f"{len(left)} fits could not be ended; {log} says why.")


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """While it lasts, signals to stop are listed."""
    found: list[int] = []
    before = {
        n: signal.signal(n, lambda number, frame: found.append(number))
        for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _threads(resources: Resources) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(resources.cpus), "OMP_WAIT_POLICY": "PASSIVE"}


def slurm(folder: Path, manifest: Manifest, rows: Sequence[Row], gather: bool = False) -> None:
    """Hand fits to Slurm in arrays as large as it takes; returns when they are submitted.

    Args:
        folder: of the study.
        manifest: of the study.
        rows: the fits.
        gather: submit, to run after them, a job that gathers.

    Raises:
        StudyError: there is no Slurm here, or it refuses; its own words are told.
    """
    if shutil.which("sbatch") is None:
        raise StudyError("there is no sbatch here: submit on a login node, or use the local executor.")
    (folder / "log").mkdir(exist_ok=True)
    most, sent = _largest_array(), told(folder / "submissions.json").get("arrays", [])
    new = []
    for first in range(0, len(rows), most):
        some = [row.id for row in rows[first : first + most]]
        job = _submitted(script(folder, manifest, some))
        new.append(job)
        sent.append({"job": job, "fits": some})
        write_json(folder / "submissions.json", {"arrays": sent})
    if gather and new:
        _submitted(_gathering(folder, manifest, new))


def script(folder: Path, manifest: Manifest, ids: Sequence[str]) -> str:
    """The batch script that runs these fits as one array."""
    asked, folder = manifest.resources, folder.absolute()
    throttle = f"%{asked.at_once}" if asked.at_once else ""
    lines = [
        "#!/bin/bash",
        *_options(
            f"--job-name={_name(manifest)}",
            f"--array=0-{len(ids) - 1}{throttle}",
            f"--time={asked.time}",
            f"--mem={asked.memory}",
            f"--cpus-per-task={asked.cpus}",
            f"--gres=gpu:{asked.gpus}" if asked.gpus else None,
            f"--partition={asked.partition}" if asked.partition else None,
            f"--output={folder / 'log'}/%A_%a.txt",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:TERM@{asked.warn_s}",
            *asked.sbatch,
        ),
        *asked.before,
        f"fits=({' '.join(ids)})",
        *(f"export {name}={value}" for name, value in _threads(asked).items()),
        f"cd {shlex.quote(manifest.folder)}",
        # exec: the warning signal is for Python
        f"exec {asked.python} -m scivi.studies.task {shlex.quote(str(folder))} "
        '--fit "${fits[$SLURM_ARRAY_TASK_ID]}"',
    ]
    return "\n".join(lines) + "\n"


def _gathering(folder: Path, manifest: Manifest, jobs: Sequence[int]) -> str:
    folder, after = folder.absolute(), ":".join(map(str, jobs))
    partition = manifest.resources.partition
    options = _options(
        f"--job-name={_name(manifest)}-gather",
        f"--dependency=afterany:{after}",
        f"--partition={partition}" if partition else None,
        f"--output={folder / 'log'}/gather.txt",
        *manifest.resources.sbatch,
    )
    command = f"exec {manifest.resources.python} -m scivi.cli study gather {shlex.quote(str(folder))}"
    return "\n".join(["#!/bin/bash", *options, *manifest.resources.before, command]) + "\n"


def _options(*words: str | None) -> list[str]:
    return [f"#SBATCH {word}" for word in words if word]


def _name(manifest: Manifest) -> str:
    return "".join(c if c.isalnum() else "-" for c in f"scivi-{manifest.name}")


def _submitted(script: str) -> int:
    """The job's number."""
    # batch jobs take their environment with them, what this process was given as a job of its own not
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"
    }
    found = subprocess.run(
        ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False, env=clean
    )
    if found.returncode:
        raise StudyError(f"sbatch refused: {found.stderr.strip()}")
    return int(found.stdout.split(";")[0])


def _largest_array() -> int:
    found = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    for line in found.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value) - 1)
    return _ARRAY


def cancel(folder: Path) -> int:
    """Stop all of a study's fits that run or wait; how many jobs or processes were told to."""
    told_to = 0
    for array in told(folder / "submissions.json").get("arrays", []):
        if shutil.which("scancel"):
            subprocess.run(["scancel", str(array["job"])], check=False, capture_output=True)
            told_to += 1
    for attempt in folder.glob("fits/*/attempt.json"):
        begun = told(attempt)
        if begun.get("job") or begun.get("host") != socket.gethostname():
            continue
        if not (attempt.parent / "result.json").exists() and is_claimed(attempt.parent):
            os.kill(begun["process"], signal.SIGTERM)
            told_to += 1
    return told_to


def retry(folder: Path, manifest: Manifest, *, all_causes: bool = False) -> None:
    """Forget the failures that a machine caused (or all), so that the fits can be run again.

    Args:
        folder: of the study.
        manifest: of the study.
        all_causes: also those by data, plan or divergence.
    """
    for row in manifest.rows:
        fit = place(folder, row)
        result = told(fit / "result.json")
        if result.get("state") == "failed" and (all_causes or result["cause"] == "machine"):
            (fit / "attempt.json").unlink(missing_ok=True)
            (fit / "result.json").unlink()
            if all_causes and result["cause"] != "machine":  # it would go on from where it diverged
                (fit / "checkpoint.safetensors").unlink(missing_ok=True)


def snakefile(folder: Path, manifest: Manifest) -> str:
    """A Snakefile that makes every fit's result."""
    asked, folder = manifest.resources, folder.absolute()
    ids = [row.id for row in manifest.rows]
    call = f"{asked.python} -m scivi.studies.task {shlex.quote(str(folder))}"
    return f'''FITS = {ids!r}


rule all:
    input:
        expand("{folder}/fits/{{fit}}/result.json", fit=FITS),


rule fit:
    output:
        "{folder}/fits/{{fit}}/result.json",
    threads: {asked.cpus}
    retries: {manifest.retries}
    resources:
        slurm_extra="--mem={asked.memory} --time={asked.time}",
    shell:
        "{call} --fit {{wildcards.fit}}"
'''
