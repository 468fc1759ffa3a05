"""Files that are whole or not there at all."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place whole, or not at all; what killed writers of the same file have left is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # on a full disk, say, it would fill it further
    sweep(path.parent, glob.escape(path.name))


def write_json(path: Path, value: Any) -> None:
    """The same of a value as JSON."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def sweep(folder: Path, name: str) -> None:
    """Remove the unfinished writes of a file (a pattern) whose processes have ended."""
    for left in folder.glob(f".{name}.*.part"):
        writer = left.name.split(".")[-2]
        if writer.isdecimal() and not _is_alive(int(writer)):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there a signal 0 is Ctrl-C, so that nothing is asked and nothing removed
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no number that a process has
        return True
    return True
