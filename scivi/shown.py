"""What a notebook shows of a value: pieces of HTML for ``_repr_html_``.

No script, no style sheet and nothing loaded, since notebooks strip these; the notebook's own ink at full or
part strength, so that light and dark both serve. Everything that is told is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from html import escape
from typing import Any

EDGE = "rgba(128,128,128,.5)"  # in the middle: seen on white and on black
FILLED = "rgba(128,128,128,.28)"
LONG = 6  # entries of a list that are told one by one; our choice
_CELL = f"text-align:left;vertical-align:top;padding:.15em .9em .15em 0;border-bottom:1px solid {EDGE}"


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


def told(value: Any) -> Html:
    """A value as a cell: a number with five digits, an absent one as a dash, a long list in short."""
    if isinstance(value, Html):
        return value
    if isinstance(value, bool):
        return Html("yes" if value else "no")
    if value is None or value == "":
        return Html("–")
    if isinstance(value, float):
        return Html("–" if math.isnan(value) else f"{value:.5g}")
    if isinstance(value, Mapping):
        return Html(", ".join(f"{told(k)} {told(v)}" for k, v in value.items()) or "none")
    if isinstance(value, (list, tuple)):
        shown = ", ".join(map(told, value[:LONG]))
        return Html((f"{shown}, … ({len(value):,} in all)" if len(value) > LONG else shown) or "none")
    return Html(escape(str(value)))


def box(kind: str, name: Any, *parts: str) -> str:
    """A value as a notebook shows it: what it is, its name, and its parts below each other."""
    head = f"<div><strong>{told(name)}</strong> {faint(kind)}</div>"
    return f'<div style="max-width:60em;line-height:1.5">{head}{"".join(parts)}</div>'


def faint(text: Any) -> Html:
    """Text at part strength."""
    return Html(f'<span style="opacity:.7">{told(text)}</span>')


def line(text: Any) -> str:
    """A sentence of its own."""
    return f'<div style="margin:.25em 0">{told(text)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in a box of its own, which scrolls if it is too wide; columns without entry are left out."""
    rows = list(rows)
    kept = [j for j in range(len(head)) if any(row[j] not in ("", None) for row in rows)]
    top = "".join(f'<th scope="col" style="{_CELL}">{told(head[j])}</th>' for j in kept)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{told(row[j])}</td>' for j in kept) + "</tr>" for row in rows
    )
    grid = f'<table style="border-collapse:collapse;margin:.3em 0"><thead><tr>{top}</tr></thead>'
    return f'<div style="overflow-x:auto">{grid}<tbody>{body}</tbody></table></div>'


def folded(summary: Any, content: str, *, open: bool = False) -> str:
    """Something to unfold."""
    start = "<details open>" if open else "<details>"
    return f'{start}<summary style="cursor:pointer">{told(summary)}</summary>{content}</details>'


def sparkline(values: Sequence[float], label: str) -> str:
    """Numbers in their order as a small curve, its scale that of all but the first tenth."""
    width, height = 260, 44  # pixels
    points = [(i, v) for i, v in enumerate(values) if math.isfinite(v)]
    if len(points) < 2:
        return ""
    settled = [v for i, v in points if i >= len(values) // 10] or [v for _, v in points]
    low, high = min(settled), max(settled)
    span = (high - low) or 1.0
    places = " ".join(
        f"{3 + i * (width - 10) / (len(values) - 1):.1f},"
        f"{height - 4 - (height - 8) * min(1.0, max(0.0, (v - low) / span)):.1f}"
        for i, v in points
    )
    end = places.split(" ")[-1].split(",")
    return (
        f'<svg role="img" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" style="max-width:100%;vertical-align:middle">'
        f"<title>{escape(label)}</title>"
        f'<polyline points="{places}" fill="none" stroke="currentColor" stroke-width="1.5" opacity=".8"/>'
        f'<circle cx="{end[0]}" cy="{end[1]}" r="2.5" fill="currentColor"/></svg>'
    )


def changed(value: Any) -> dict[str, tuple[Any, Any]]:
    """Of a dataclass, the fields that differ from their default, each with its value and that default."""
    found = {}
    for f in fields(value):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if getattr(value, f.name) != default:
            found[f.name] = (getattr(value, f.name), default)
    return found


def call(value: Any) -> str:
    """A dataclass as the shortest call that makes it."""
    told = ", ".join(f"{name}={own!r}" for name, (own, _) in changed(value).items())
    return f"{type(value).__name__}({told})"


def settings(value: Any) -> str:
    """A dataclass of settings: those that differ from their default, then all others, folded."""
    different = changed(value)
    rest = [(f.name, _plain(getattr(value, f.name))) for f in fields(value) if f.name not in different]
    rows = [(name, _plain(own), _plain(default)) for name, (own, default) in different.items()]
    first = table((type(value).__name__.lower(), "value", "default"), rows) if rows else ""
    return first + folded(f"{len(rest)} settings at their default", table(("setting", "value"), rest))


def _plain(value: Any) -> Any:
    """A setting as it is written in Python."""
    return call(value) if hasattr(value, "__dataclass_fields__") else Html(escape(repr(value)))
