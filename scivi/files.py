"""Files that are whole or not there at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xarray import DataTree

MOST_INDEXED = 2**18  # rows whose labels are indexed in every group (our choice: 100 MB of five groups)


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


def put(aside: Path, path: Path) -> None:
    """Give a finished file or folder its place; of two writers that finish at once, the later one's stays."""
    if not (aside.is_dir() or path.is_dir()):
        aside.replace(path)
        return
    old = aside.with_suffix(".old")  # a folder cannot be replaced in one step: an older one steps aside first
    while aside.exists():
        with suppress(FileNotFoundError):
            path.replace(old)
        remove(old)
        try:
            aside.replace(path)
        except OSError as error:  # the other writer was there first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def remove(path: Path) -> None:
    """A file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait_s: float = 0.0) -> Iterator[bool]:
    """Whether this process alone holds a lock file, while it lasts; a process that ends lets go of it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def opened(path: Path) -> DataTree:
    """A tree in a .zarr or .nc, read lazily; of very many rows even the labels, so that ``sel`` needs more.

    An index over labels takes memory in every group that has them: ``tree[group].to_dataset().set_xindex``
    makes one.
    """
    import xarray as xr

    how: dict[str, Any] = {"engine": "zarr" if path.is_dir() else "h5netcdf", "chunks": None}
    plain = xr.open_datatree(path, **how, create_default_indexes=False, decode_timedelta=False)
    if max((n for node in plain.leaves for n in node.sizes.values()), default=0) > MOST_INDEXED:
        return plain
    plain.close()
    return xr.open_datatree(path, **how, decode_timedelta=False)


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
