"""A template as a notebook shows it: what it is about, reads and reports, and its prior."""

from __future__ import annotations

import inspect
import re
from typing import Any

from scivi import shown
from scivi.errors import few


def short(template: Any) -> str:
    """A template on one line."""
    observed, reported = ", ".join(template.observed), few(list(template.dims), 6)
    return f'Template "{template.name}": {observed} over {", ".join(template.rows)}; reports {reported}'


def page(template: Any) -> str:
    """A template, with its fields, its reported sites and its prior."""
    fields = [
        (name, ", ".join(f.dims), f.role, "" if f.unit == "1" else f.unit, f.expected, _told(f))
        for name, f in template.fields.items()
    ]
    sites = [
        (name, ", ".join(dims) or "scalar", "" if (unit := template.units.get(name, "1")) == "1" else unit)
        for name, dims in template.dims.items()
    ]
    comments = _comments(type(template.prior))
    prior = [(name, v, comments.get(name, "")) for name, v in template.prior_numbers().items()]
    parts = [
        shown.line(_first_line(template.model)),
        shown.line(shown.faint(f"rows: {', '.join(template.rows)}; guide: {_guide(template.guide)}")),
        shown.folded(
            f"reads {len(fields)} fields",
            shown.table(("field", "dims", "role", "unit", "entries", "about"), fields),
            open=True,
        ),
        shown.folded(f"reports {len(sites)} sites", shown.table(("site", "dims", "unit"), sites), open=True),
    ]
    if prior:
        numbers = shown.table(("number", "value", "about"), prior)
        parts.append(shown.folded(f"prior: {len(prior)} numbers", numbers))
    return shown.box("template", template.name, *parts)


def _told(field: Any) -> str:
    """What a field is, and that it may be left out."""
    if field.default is None:
        return field.doc
    default = field.labels[int(field.default)] if field.labels else f"{field.default:g}"
    return "; ".join(filter(None, (field.doc, f"{default} if absent")))


def _guide(guide: Any) -> str:
    if guide is None:
        return "mean-field normal"
    if isinstance(guide, str):
        return guide
    part = getattr(guide, "func", guide)  # of a partial
    return part.__name__ if inspect.isfunction(part) else type(part).__name__


def _first_line(function: Any) -> str:
    """First line of the docstring of a function, or of what ``partial`` makes of one."""
    function = getattr(function, "func", function)
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    if "module's docstring" in first:  # as where a model is told of at the head of its file
        first = (getattr(inspect.getmodule(function), "__doc__", "") or first).partition("\n")[0]
    return first


def _comments(kind: type) -> dict[str, str]:
    """What is written behind the fields of a class: unit and source, as the house writes a prior."""
    try:
        lines = inspect.getsource(kind).splitlines()
    except (OSError, TypeError):  # made in a notebook that is gone, or by a program
        return {}
    found, name = dict[str, str](), ""
    for text in lines:
        if start := re.match(r"    (\w+)\s*:", text):
            name = start[1]
        if name and (comment := re.search(r"\s#\s*(.+)$", text)):
            found[name] = f"{found[name]} {comment[1]}" if name in found else comment[1]
    return found
