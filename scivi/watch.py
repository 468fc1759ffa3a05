"""``scivi watch``: the fits that run below a folder, one line each, in a terminal.

It reads the histories that fits write (history.jsonl), and needs neither torch nor the fits' own process: it
works on a login node, on files that are still being written.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from scivi.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

HISTORY = "history.jsonl"
SILENT_S, SILENT_ENTRIES = 60.0, 10.0  # no news for both, in seconds and in usual waits: silent (our choice)
LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 20  # characters of the objective's course (our choice)
PLAIN_WIDTH = 160  # columns where the output is no terminal


def watch(folder: str | Path, once: bool = False, interval: float = 2.0) -> None:
    """Show the fits whose history lies below a folder, until Ctrl-C.

    A fit is ``done`` once it is saved beside its history, with what stopped it; else it is ``running`` if its
    last entry is not older than a minute or ten times the usual wait, and else ``silent``: it may have been
    killed, wait for its machine, or be at work on what follows the steps.

    Args:
        folder: of one fit, or of many at any depth.
        once: show them once; so it is, too, if the output is no terminal.
        interval: seconds between two looks.

    Raises:
        DataError: there is no such folder.
    """
    from rich.console import Console
    from rich.live import Live

    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'there is no folder "{folder}".')
    console, followed = Console(), {}
    if once or not console.is_terminal:
        wide = console if console.is_terminal else Console(width=PLAIN_WIDTH)
        wide.print(look(folder, followed))
        return
    try:
        with Live(look(folder, followed), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(look(folder, followed), refresh=True)
    except KeyboardInterrupt:
        return


def look(folder: Path, followed: dict[Path, Followed]) -> Table | Text:
    """The table of the fits as they are now, or a sentence if there are none.

    Args:
        folder: to look below.
        followed: what was read so far, by file; taken further.
    """
    from rich.table import Table
    from rich.text import Text

    found = sorted(histories(folder))
    if not found:
        return Text(f'There is no {HISTORY} below "{folder}": no fit has written an entry there yet.')
    table = Table(box=None, pad_edge=False)
    for name in ("fit", "step", "nats/row", "change", "gradient", "steps/s", "loader", "last entry"):
        table.add_column(name, justify="left" if name == "fit" else "right", overflow="fold")
    table.add_column("state")
    table.add_column("objective", no_wrap=True)
    now = time.time()
    for path in found:
        one = followed.setdefault(path, Followed(path))
        one.read()
        name = path.parent.relative_to(folder).as_posix()
        table.add_row(folder.resolve().name if name == "." else name, *one.cells(now))
    return table


def histories(folder: Path) -> Iterator[Path]:
    """Every history below a folder; what a fit keeps beside its own, and stores, are not entered."""
    for here, folders, files in os.walk(folder):
        if HISTORY in files:
            yield Path(here, HISTORY)
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".zarr")]


@dataclass
class Followed:
    """A history that is read on from where reading ended.

    Args:
        path: of the file.
        offset, inode: how far it was read, and of which file: a resumed fit puts another in its place.
        changed: when it was last written, in seconds since the epoch.
        steps, objectives: of all entries, oldest first.
        last: the two latest entries.
    """

    path: Path
    offset: int = 0
    inode: int = 0
    changed: float = 0.0
    steps: list[float] = field(default_factory=list)
    objectives: list[float] = field(default_factory=list)
    last: list[dict[str, float]] = field(default_factory=list)

    def read(self) -> None:
        """Take in the lines that came; one that is not written to its end waits, a broken one is left out."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.inode or status.st_size < self.offset:
                    self.offset, self.inode = 0, status.st_ino
                    self.steps, self.objectives, self.last = [], [], []
                self.changed = status.st_mtime
                file.seek(self.offset)
                whole, end, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:  # between two looks
            return
        self.offset += len(whole) + len(end)
        for entry in entries(whole + end):
            self.steps.append(entry["step"])
            self.objectives.append(entry["objective"])
            self.last = [*self.last[-1:], entry]

    def cells(self, now: float) -> list[str]:
        """What the table shows of it, but for its name.

        Args:
            now: seconds since the epoch.
        """
        age = max(0.0, now - self.changed)
        if not self.last:
            return ["–"] * 6 + [_duration(age), self.state(age), ""]
        entry = self.last[-1]
        share = entry.get("loader_share", math.nan)
        return [
            f"{int(entry['step']):,}",
            _number(entry["objective"]),
            _number(self.change(), signed=True),
            _number(entry.get("grad_norm", math.nan)),
            _number(self.rate()),
            f"{share:.0%}" if math.isfinite(share) else "–",
            _duration(age),
            self.state(age),
            sparkline(self.objectives),
        ]

    def change(self) -> float:
        """Mean objective of the last quarter of the steps, less that of the quarter before it."""
        if not self.steps:
            return math.nan
        end = self.steps[-1]
        window = end / 4
        pairs = list(zip(self.steps, self.objectives, strict=True))
        late = [value for step, value in pairs if step > end - window]
        early = [value for step, value in pairs if end - 2 * window < step <= end - window]
        return sum(late) / len(late) - sum(early) / len(early) if early else math.nan

    def rate(self) -> float:
        """Steps per second between the two latest entries, or of all steps if there is one entry."""
        before = self.last[0] if len(self.last) > 1 else {}
        steps, seconds = (self.last[-1].get(k, math.nan) - before.get(k, 0.0) for k in ("step", "wall_s"))
        return steps / seconds if seconds > 0 else math.nan

    def state(self, age: float) -> str:
        """Done, running or silent.

        Args:
            age: of the last entry in s.
        """
        saved = self.path.parent / "fit" / "fit.json"
        try:
            if saved.stat().st_mtime >= self.changed:  # else it is of an earlier fit in this folder
                return f"done: {json.loads(saved.read_bytes())['provenance']['fit']['stopped']}"
        except (OSError, ValueError, KeyError):  # not there, or not what it should be
            pass
        rate = self.rate() if self.last else math.nan
        steps = self.last[-1]["step"] - self.last[0]["step"] if len(self.last) > 1 else math.nan
        usual = steps / rate if rate > 0 and steps > 0 else 0.0
        return "running" if age <= max(SILENT_S, SILENT_ENTRIES * usual) else "silent"


def entries(text: bytes) -> list[dict[str, float]]:
    """The entries of a part of a history; a line that is cut at either end, or is none, is left out."""
    found = (_entry(line) for line in text.rpartition(b"\n")[0].splitlines())
    return [entry for entry in found if entry is not None]


def _entry(line: bytes) -> dict[str, float] | None:
    """A line's numbers, if it is one."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    entry = {str(name): float(value) for name, value in entry.items() if isinstance(value, int | float)}
    return entry if {"step", "objective"} <= entry.keys() else None


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """The course of some numbers in so many characters.

    A fit's first values dwarf all others: the highest level is three times as far from the lowest value as
    the median is, or the largest value if that is nearer.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    n = min(width, len(known))
    edges = [k * len(known) // n for k in range(n + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low = min(means)
    high = min(max(means), low + 3 * (sorted(means)[n // 2] - low)) if n > 2 else max(means)
    scale = (len(LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(LEVELS[round(scale * (min(high, mean) - low))] for mean in means)


def _number(value: float, signed: bool = False) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:+.3g}" if signed else f"{value:.5g}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
