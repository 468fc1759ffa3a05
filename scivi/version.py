"""Which version this is, as git's tags gave it when it was installed."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Of the installed distribution; a source tree that never was installed has none."""
    try:
        return metadata.version("scivi")
    except metadata.PackageNotFoundError:
        return "0+unknown"
