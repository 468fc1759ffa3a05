"""Where the numbers of a running fit go: anything with ``write`` and ``close``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from scivi.files import write_atomically

CLOCKED = frozenset({"wall_s", "loader_share"})  # of the history, what a clock tells: no two fits share it


@runtime_checkable
class Recorder(Protocol):
    """Takes one entry of the history at a time.

    ``scivi.inference.trackers`` has TensorBoard, MLflow and Prometheus; wrap any other tracker in these two
    methods.
    """

    def write(self, entry: Mapping[str, float]) -> None:
        """Take an entry: names to numbers, "step" among them."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class JsonLines:
    """One JSON object a line, appended; a resumed fit goes on in the same file.

    Args:
        path: of the file; its folder is made.
        history: the entries that the file holds to begin with, in place of what is there: a killed fit has
            written more than its checkpoint has. None leaves the file as it is.
    """

    def __init__(self, path: str | Path, history: Sequence[Mapping[str, float]] | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if history is not None:
            write_atomically(self.path, "".join(map(_line, history)).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, float]) -> None:
        """Append an entry."""
        self._file.write(_line(entry))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(entry: Mapping[str, float]) -> str:
    return json.dumps(dict(entry)) + "\n"


class Guarded:
    """A recorder whose failure ends the recording, with one warning, and not the fit."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder: Recorder | None = recorder

    def write(self, entry: Mapping[str, float]) -> None:
        """Pass an entry on."""
        self._try(lambda recorder: recorder.write(entry))

    def close(self) -> None:
        """Pass it on; the fit has its result, so that this too may fail."""
        self._try(lambda recorder: recorder.close())

    def _try(self, tell: Callable[[Recorder], None]) -> None:
        if self._recorder is None:
            return
        try:
            tell(self._recorder)
        except (OSError, RuntimeError, ValueError) as error:
            name, self._recorder = type(self._recorder).__name__, None
            warnings.warn(f"the recorder {name} failed ({error}); the fit goes on without it.", stacklevel=3)


class Several:
    """Recorders that all take every entry; one that fails is left out from then on, with one warning."""

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = [Guarded(recorder) for recorder in recorders]

    def write(self, entry: Mapping[str, float]) -> None:
        """Pass an entry on to each."""
        for recorder in self._recorders:
            recorder.write(entry)

    def close(self) -> None:
        """Pass it on to each."""
        for recorder in self._recorders:
            recorder.close()


def recorder_for(
    record: str | Path | Recorder | Sequence[str | Path | Recorder] | None,
    history: Sequence[Mapping[str, float]] | None,
) -> Several:
    """What ``fit(record=...)`` means, as one recorder that does not fail.

    Args:
        record: a file for JSON lines, a recorder, several of these, or None.
        history: of a fit that goes on, with which its files begin; None of one that begins.
    """
    wanted = [record] if isinstance(record, str | Path | Recorder) else record or []
    return Several(*[JsonLines(r, history) if isinstance(r, str | Path) else r for r in wanted])
