"""A fit as a notebook shows it: how it ended, its objective, its finish, its model as nested plates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine

from scivi import shown
from scivi.inputs.batches import some_field
from scivi.models.binding import Bound, seeded
from scivi.models.sites import is_deterministic, is_subsample, plates_of
from scivi.shown import EDGE, FILLED, Html

ENDED = {
    "plateau": "The objective was level",
    "steps": "It took all the steps it was given",
    "signal": "It was interrupted: what it had learnt so far is kept, and nothing was finished",
    "nothing to learn": "There was nothing to learn",
}
_WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")


def page(fit: Any) -> str:
    """A fit, with its objective as a small curve and its model as nested plates."""
    ended = fit.provenance["fit"]
    steps, stopped, seconds = ended["steps"], ended["stopped"], ended.get("wall_s")
    took = f" in {seconds:.3g} s" if seconds is not None else ""
    parts = [
        shown.line(f"{ENDED.get(stopped, f'It ended by: {stopped}')}; {steps:,} steps{took}."),
        shown.line(" · ".join(f"{n:,} × {dim}" for dim, n in fit.sizes.items())),
    ]
    if "objective" in fit.history and fit.history["objective"].size:
        values = [float(v) for v in fit.history["objective"].values]
        label = f"objective over {steps:,} steps, from {values[0]:.5g} to {values[-1]:.5g} nats per row"
        note = shown.faint(f"objective {values[-1]:.6g} nats per row, lower is better")
        parts.append(shown.line(Html(f"{shown.sparkline(values, label)} {note}")))
    finish = {k: v for k, v in (ended.get("finish") or {}).items() if isinstance(v, int | float | str)}
    if restarts := ended.get("restarts"):
        finish = {"divergences, each with a restart": len(restarts), **finish}
    if finish:
        parts.append(shown.folded("finish", shown.table(("number", "value"), finish.items()), open=True))
    parts.append(shown.folded("model", plates(fit.bound), open=True))
    parts.append(shown.folded("plan", shown.settings(fit.plan)))
    return shown.box("fit", fit.template.name, *parts)


def plates(bound: Bound) -> str:
    """The model's sites, as one run on the example shows them, in their plates as boxes within boxes.

    Sites in the order in which they are sampled: latent ones open, observed ones filled, worked out ones
    dashed.
    """
    some = some_field(bound.example)
    with torch.no_grad(), seeded(0, some.device):
        trace = poutine.trace(bound.model).get_trace(bound.example)
    tree: dict[str, Any] = {}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site):
            here = tree
            for plate in plates_of(site):
                here = here.setdefault(f"plate {plate}", {})
            here[f"site {name}"] = _pill(name, site)
    key = "".join(
        _drawn(text, style) for text, style in (("latent", ""), ("observed", "o"), ("derived", "d"))
    )
    return f"{_boxes(tree, bound.example.sizes)}{shown.line(Html(f'<small>{key}</small>'))}"


def _boxes(tree: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """Sites of one plate, then the plates inside it."""
    pieces = [v for v in tree.values() if isinstance(v, str)]
    for key, inside in tree.items():
        if not isinstance(inside, str):
            name = key.removeprefix("plate ")
            size = f"{sizes[name]:,} × " if name in sizes else ""
            pieces.append(
                f'<div style="border:1px solid {EDGE};border-radius:.5em;margin:.3em .3em .3em 0;'
                f'padding:.2em .5em;display:inline-block;vertical-align:top;max-width:100%">'
                f"{_boxes(inside, sizes)}"
                f'<div style="text-align:right;font-size:85%">{shown.faint(f"{size}{name}")}</div></div>'
            )
    return "".join(pieces)


def _pill(name: str, site: Mapping[str, Any]) -> str:
    if is_deterministic(site):
        return _drawn(name, "d")
    law = site["fn"]
    while type(law).__name__ in _WRAPPERS:
        law = law.base_dist
    word = {"Unit": "factor"}.get(type(law).__name__, type(law).__name__.lstrip("_"))
    event = " × ".join(str(n) for n in site["fn"].event_shape if n)  # a factor has an event of no entry
    return _drawn(name, "o" if site["is_observed"] else "", f"{word} [{event}]" if event else word)


def _drawn(name: str, style: str, law: str = "") -> str:
    """A site as a pill: open, filled ("o") or dashed ("d")."""
    edge = f"1px dashed {EDGE}" if style == "d" else "1.5px solid currentColor"
    fill = f";background:{FILLED}" if style == "o" else ""
    return (
        f'<span style="display:inline-block;border:{edge};border-radius:1em;padding:0 .7em;'
        f'margin:.15em .3em .15em 0{fill}">{shown.told(name)} {shown.faint(law) if law else ""}</span>'
    )
