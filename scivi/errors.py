"""Every error that a user of SciVI can meet.

Each is also the builtin that fits, so that ``except ValueError`` keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class SciVIError(Exception):
    """The base of all errors raised on purpose by SciVI."""


class DataError(SciVIError, ValueError):
    """The data do not fit the template's fields; the message lists every fault."""


class TemplateError(SciVIError, ValueError):
    """A template breaks one of its own promises (dims, sites, shapes)."""


class PlanError(SciVIError, ValueError):
    """A plan holds a value that cannot be used."""


class FitError(SciVIError, RuntimeError):
    """A fit diverged or could not go on.

    Attributes:
        step: the step at which it happened, or None.
        site: the first sample site whose log density is not finite, or None.
        rows: indices of the offending rows of the data, possibly empty.
        state: the last good state, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        site: str | None = None,
        rows: tuple[int, ...] = (),
        state: Any = None,
    ) -> None:
        super().__init__(message)
        self.step, self.site, self.rows, self.state = step, site, rows, state


class CheckpointError(SciVIError, RuntimeError):
    """A saved fit or checkpoint is missing, damaged, or belongs to something else."""


class StudyError(SciVIError, ValueError):
    """A study cannot be used, or its folder is not what it should be; the message lists every fault."""


class Unsupported(SciVIError, NotImplementedError):
    """The combination that was asked for is not offered; the message says what is."""


class TrustWarning(UserWarning):
    """Predictions of a posterior that the report does not trust."""


def listed(title: str, faults: Iterable[str], most: int | None = None) -> str:
    """One message for many faults: a title, then a line for each, or for the first so many."""
    told = [*faults]
    rest = [] if most is None or len(told) <= most else [f"and {len(told) - most} more"]
    return "\n".join([title, *(f"  - {fault}" for fault in [*told[:most], *rest])])


def few(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def missing_extra(package: str, extra: str) -> Unsupported:
    """The error for an optional dependency that is not installed."""
    return Unsupported(
        f'"{package}" is not installed. It comes with the extra: pip install "scivi[{extra}]".'
    )
