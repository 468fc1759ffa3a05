"""The optional packages of scivi, by extra, as its metadata name them; and which of them are here."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata, version

# Distribution -> what is imported, where the two differ.
IMPORTED_AS = {
    "python-libsbml": "libsbml",
    "mlflow-skinny": "mlflow",
    "scvi-tools": "scvi",
    "scikit-learn": "sklearn",
}
_REQUIREMENT = re.compile(r'(?P<name>[\w.-]+)(\[(?P<own>[\w,-]+)\])?.*?(extra == "(?P<extra>[\w-]+)")?\)?$')


def required() -> dict[str, list[str]]:
    """Distributions by the extra that brings them, and under "" those that scivi always needs.

    Empty if scivi itself is not installed but runs from a folder.
    """
    try:
        told = metadata("scivi")
    except PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {"": [], **{extra: [] for extra in told.get_all("Provides-Extra", [])}}
    for text in told.get_all("Requires-Dist", []):
        if (match := _REQUIREMENT.match(text)) is None:
            continue
        own = f"scivi[{match['own']}]" if match["name"] == "scivi" else match["name"]
        found.setdefault(match["extra"] or "", []).append(own)
    return {extra: list(dict.fromkeys(_whole(names, found))) for extra, names in found.items()}


def _whole(names: list[str], found: dict[str, list[str]]) -> list[str]:
    """The same names, with those of an extra in the place of "scivi[extra]"."""
    whole = []
    for name in names:
        inner = name.removeprefix("scivi[").rstrip("]").split(",") if name.startswith("scivi[") else ()
        whole += [part for extra in inner for part in _whole(found.get(extra, []), found)]
        whole += [] if inner else [name]
    return whole


def installed(distribution: str) -> str | None:
    """Its version; None if it is not here."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def extra_of(package: str) -> str | None:
    """The first extra that brings a package, by the name under which it is imported."""
    for extra, names in required().items():
        if extra and package.partition(".")[0] in {IMPORTED_AS.get(n, n.replace("-", "_")) for n in names}:
            return extra
    return None
