"""Where the processes of one fit come from: ``launch`` starts them, ``place`` tells one which it is.

``torchrun`` and ``srun`` start processes on many machines, ``launch`` on this one. How they join, and what
they then share, is the business of ``scivi.inference.team``; here is no torch.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from scivi.errors import PlanError, Unsupported

LOST = "another process of this fit has ended or cannot be reached"
GRACE_S = 10.0  # that processes have to end by themselves once one has failed (our choice)
POLL_S = 0.05
TAIL = 2**16  # characters of what the first process has said that are remembered


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that were started together.

    Args:
        rank, size: its number, and how many there are.
        local: its number on its machine.
        meeting: where they meet, as torch's ``init_method``.
    """

    rank: int
    size: int
    local: int
    meeting: str


def place(environment: Mapping[str, str]) -> Place | None:
    """This process's place by what ``torchrun``, ``launch`` or ``srun`` has told it; None if it is alone.

    Of ``srun`` all tasks of a step count as one fit. A batch script runs outside of any step, and is alone.

    Raises:
        PlanError: something of it is missing.
    """
    if "RANK" in environment:
        names = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environment]:
            raise PlanError(
                f"RANK is set, as torchrun does, but not {', '.join(missing)}; set all or none of them."
            )
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Place(rank, size, int(environment.get("LOCAL_RANK", rank)), "env://") if size > 1 else None
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    size = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    if size < 2:
        return None
    host = environment.get("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    number = 31 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
    port = environment.get("MASTER_PORT", str(20000 + number % 10000))  # below those lent to callers
    local = int(environment.get("SLURM_LOCALID", "0"))
    return Place(int(environment["SLURM_PROCID"]), size, local, f"tcp://{host}:{port}")


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: "gpu[07-09,12],cpu3" begins with gpu07."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise PlanError(f'SLURM_STEP_NODELIST is "{nodes}", which names no machine.')
    return "".join(part or "" for part in found.groups())


def launch(n: int, argv: Sequence[str], program: Sequence[str] = ("-m", "scivi.cli")) -> int:
    """Run a command line in several processes on this machine that share the fit.

    Each has its share of the cores. The first speaks; the others are heard only if they fail. A signal to
    stop goes on to all of them, and if one fails the others are ended.

    Args:
        n: how many.
        argv: the command line, without the program.
        program: arguments of Python before it.

    Returns:
        The exit code: 0, or that of the process that was the first to end otherwise (128 and its number, if
        a signal ended it).
    """
    if n < 2:
        raise Unsupported(f"launch is for two processes or more, not {n}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(n)}
    shared["COLUMNS"] = str(shutil.get_terminal_size().columns)  # they see no terminal
    threads = {"OMP_NUM_THREADS": str(max(1, cores // n))}
    with tempfile.TemporaryDirectory(prefix="scivi-") as folder:
        said = [Path(folder) / f"{rank}" for rank in range(n)]
        children: list[subprocess.Popen[bytes]] = []
        with _passing_on(children):
            for rank in range(n):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with said[rank].open("wb") as file:
                    children.append(
                        subprocess.Popen(
                            [sys.executable, *program, *argv],
                            env={**threads, **os.environ, **shared, **own},
                            stdout=None if rank == 0 else subprocess.DEVNULL,
                            stderr=subprocess.PIPE if rank == 0 else file,
                            process_group=0,  # a terminal's Ctrl-C comes by way of this process alone
                        )
                    )
            first = _Echo(children[0].stderr)
            failed = _watched(children)
            first.join()
        _tell_failures(failed, said, first.text)
    code = children[failed[0]].returncode if failed else 0
    return code if code >= 0 else 128 - code


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def _passing_on(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals to stop go on to the children; only a main thread hears them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Echo(threading.Thread):
    """Says again what a process says, and remembers the end of it."""

    def __init__(self, heard: IO[bytes] | None) -> None:
        super().__init__(name="scivi-echo", daemon=True)
        self.heard, self.text = heard, ""
        self.start()

    def run(self) -> None:
        """Until the process says no more."""
        assert self.heard is not None
        with self.heard:
            while piece := os.read(self.heard.fileno(), 2**16):
                words = piece.decode(errors="replace")
                self.text = (self.text + words)[-TAIL:]
                sys.stderr.write(words)
                sys.stderr.flush()


def _watched(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; the numbers of those that failed by themselves, in the order in which they did."""
    failed: list[int] = []
    end = math.inf
    while any(child.poll() is None for child in children):
        new = [k for k, child in enumerate(children) if child.poll() and k not in failed]
        if new and not failed:
            end = time.monotonic() + GRACE_S
        failed += new
        if time.monotonic() > end:
            _end([child for child in children if child.poll() is None])
            return failed
        time.sleep(POLL_S)
    return failed + [k for k, child in enumerate(children) if child.returncode and k not in failed]


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end; make those that do not."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _tell_failures(failed: Sequence[int], said: Sequence[Path], shown: str) -> None:
    """Say what those that failed have said, once; that one was missed by the others only if nothing else."""
    told = {k: said[k].read_text(errors="replace").strip() for k in failed if k > 0}
    causes = {k: words for k, words in told.items() if words and LOST not in words}
    if not causes and not shown.strip():
        causes = {k: words for k, words in told.items() if words}
    for k, words in causes.items():
        if words.splitlines()[-1] not in shown:
            sys.stderr.write(f"scivi: process {k} has failed:\n{words}\n")
            sys.stderr.flush()
            shown += words
