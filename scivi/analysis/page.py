"""The report as one self-contained HTML page: inline style, figures as data, nothing loaded."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import xarray as xr

from scivi.analysis import groups, plots
from scivi.analysis.numerals import breakable, measured, number
from scivi.analysis.pictures import picture
from scivi.analysis.skeleton import CAPTIONS, PAGE, STYLE

SHOWN, OF_EACH = 60, 12  # rows of a table, and of these entries of one variable; our choice
FEW = 8  # entries of a list that are told one by one; our choice
TONE = {"trust": "good", "trust with care": "care", "do not trust": "bad"}
SIGN = {"good": "✓", "care": "!", "bad": "✗"}  # colour alone would not tell every reader


def render(
    tree: xr.DataTree,
    found: Mapping[str, xr.Dataset],
    checks: xr.Dataset,
    reference: xr.DataTree | None = None,
) -> str:
    """Write the page.

    Args:
        tree: the posterior.
        found: results of `verdict.measure`.
        checks: the Dataset of `report.report`.
        reference: a NUTS posterior, drawn beside the tree.

    Returns:
        HTML that loads nothing.
    """
    made = groups.provenance(tree)
    sections = {
        "Checks": _checks(checks),
        "Population" if groups.population_names(tree) else "Posterior": _population(found),
        "Rows": _rows(tree, found),
        "Figures": _figures(tree, found, reference),
        "Beside NUTS": _comparison(found),
        "Predictive checks": _predictive(found),
        "Provenance": _provenance(made),
    }
    there = {title: text for title, text in sections.items() if text}
    links = "".join(f'<a href="#{_anchor(t)}">{escape(t)}</a>' for t in there)
    body = [f'<section id="{_anchor(t)}"><h2>{escape(t)}</h2>{text}</section>' for t, text in there.items()]
    return PAGE.substitute(
        title=escape(str(made.get("template", "Posterior"))),
        verdict=escape(str(checks.attrs["verdict"])),
        style=STYLE,
        subtitle=escape(_subtitle(tree, made)),
        body="\n".join([_verdict(checks), f'<nav aria-label="Sections">{links}</nav>', *body]),
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


class _Told(str):
    """A cell that is HTML already: the name of a row, or a number."""

    __slots__ = ()


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in a box of its own, which scrolls; numbers stand right, the first cell names the row."""
    body, numeric = [], [False] * len(head)
    for first, *rest in rows:
        cells = [f'<th scope="row">{first if isinstance(first, _Told) else breakable(first)}</th>']
        for j, cell in enumerate(rest, 1):
            told = cell if isinstance(cell, _Told) else number(cell, aligned=True)
            plain = isinstance(cell, (str, np.str_)) and not isinstance(cell, _Told)
            numeric[j] = numeric[j] or not plain
            cells.append(f"<td{'' if plain else ' class=n'}>{told}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    top = "".join(
        f'<th scope="col"{" class=n" * n}>{escape(h)}</th>' for h, n in zip(head, numeric, strict=True)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _items(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _subtitle(tree: xr.DataTree, made: Mapping[str, Any]) -> str:
    """What was fitted, how and when, on one line."""
    posterior = groups.group(tree, "posterior")
    method, sizes = str(made.get("method", "")), made.get("data", {}).get("sizes", {})
    parts = [
        {"svi": "variational inference", "nuts": "NUTS"}.get(method, method),
        ", ".join(f"{n:,} × {d}" for d, n in sizes.items()),
    ]
    chains, draws = posterior.sizes["chain"], f"{posterior.sizes['draw']:,} draws"
    parts.append(f"{chains} chains × {draws}" if chains > 1 else draws)
    parts.append(str(made.get("created", "")).replace("T", " ").replace("+00:00", " UTC"))
    return " · ".join(p for p in parts if p)


def _verdict(checks: xr.Dataset) -> str:
    word = str(checks.attrs["verdict"])
    why, advice = json.loads(checks.attrs["why"]), json.loads(checks.attrs["advice"])
    tone = TONE[word]
    sign = f'<span aria-hidden="true"><b>{SIGN[tone]}</b></span>'
    title = f'<h2 id="verdict">{sign}{escape(word.capitalize())}</h2>'
    box = f'<section class="verdict {tone}" aria-labelledby="verdict">{title}{_items(why)}</section>'
    todo = f'<section class="next"><h2>What to do next</h2>{_items(advice)}</section>' if advice else ""
    return box + todo


def _checks(checks: xr.Dataset) -> str:
    """Every check with a mark, those that failed first."""
    rows: list[tuple[int, str]] = []
    for i in range(checks.sizes["check"]):
        one = checks.isel(check=i)
        counts, ok = str(one["counts"].item()), bool(one["ok"])
        failed = (0, "fail", "✗ failed") if counts == "decides" else (1, "warn", "! care")
        passed = (3, "mute", "· note") if counts == "note" else (2, "pass", "✓ passed")
        rank, style, word = passed if ok or counts == "note" else failed
        name, value, limit, text = (one[k].item() for k in ("check", "value", "threshold", "sentence"))
        numbers = "".join(
            f'<td role="cell" class="n{"" if np.isfinite(v) else " none"}" data-is="{h}">{number(v)}</td>'
            for h, v in (("value", value), ("limit", limit))
        )
        line = (
            f'<tr role="row"><td role="cell" class="mark {style}">{word}</td>'
            f'<td role="cell" class="name">{escape(str(name))}</td>{numbers}'
            f'<td role="cell" class="told">{escape(str(text))}</td></tr>'
        )
        rows.append((rank, line))
    lines = "".join(line for _, line in sorted(rows, key=lambda row: row[0]))
    names = (("", "result"), ("", "check"), (" class=n", "value"), (" class=n", "limit"), ("", "meaning"))
    head = "".join(f'<th role="columnheader" scope="col"{kind}>{name}</th>' for kind, name in names)
    return (
        f'<table class="checks" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{lines}</tbody></table>'
    )


def _population(found: Mapping[str, xr.Dataset]) -> str:
    """Mean, sd, interval, unit, contraction and corrected shift of each population variable."""
    summary = found["summary"]
    share, shift = _column(found.get("contraction"), "contraction"), {}
    joint = found.get("reliability")
    if joint is not None and joint.attrs["decisive"]:
        shift = _column(joint, "shift_sd")
        shift = shift if np.any(list(shift.values())) else {}  # draws that were weighed already
    rows, constants, seen = [], 0, Counter[str]()
    for i, name in enumerate(str(v) for v in summary["variable"].values):
        mean, sd, *ends = (float(summary[k][i]) for k in ("mean", "sd", "lower", "upper"))
        if sd <= 1e-5 * (1 + abs(mean)):  # up to rounding, as the diagonal of a correlation matrix
            constants += 1
            continue
        variable = name.partition("[")[0]
        seen[variable] += 1
        if seen[variable] > OF_EACH or len(rows) == SHOWN:
            continue
        unit = str(summary["unit"][i].item())
        unit = "" if unit in ("", "1") else f' <span class="unit">{escape(unit)}</span>'
        numbers = map(_Told, measured(mean, sd, *ends))
        tail = (column.get(name, np.nan) for column in (share, shift) if column)
        rows.append((_Told(breakable(name) + unit), *numbers, *tail))
    percent = f"{summary.attrs['prob']:.0%}".replace("%", " %")
    head = ["variable", "mean", "sd", f"{percent} from", f"{percent} to"]
    notes = []
    if share:
        head.append("contraction")
        notes.append("Contraction is posterior over prior spread: near 1 the data said nothing.")
    if shift:
        head.append("corrected shift (sd)")
        notes.append("The corrected shift is how far the importance weights move the mean.")
    if len(rows) < (n := seen.total()):
        notes.append(f"{len(rows)} of {n:,} entries are shown, at most {OF_EACH} of a variable.")
    if constants:
        notes.append(f"{constants} entries that are constant are left out.")
    table = _table("Summary of the posterior", head, rows)
    return f'{table}<p class="soft">{" ".join(notes)}</p>'


def _column(table: xr.Dataset | None, key: str) -> dict[str, float]:
    if table is None:
        return {}
    return dict(zip((str(v) for v in table["variable"].values), map(float, table[key].values), strict=True))


def _rows(tree: xr.DataTree, found: Mapping[str, xr.Dataset]) -> str:
    """How many rows are poor or outside, and the worst ten with their data."""
    rows = found.get("row_reliability")
    if rows is None:
        return ""
    k, gap = rows["k_hat"].values.ravel(), rows["gap"].values.ravel()
    facts = [
        (number(k.size), "rows" if k.size > 1 else "row"),
        (number(int((~rows["ok"].values).sum())), f"with k-hat above {rows.attrs['threshold']}"),
        (number(int(rows["outside"].values.sum())), "outside the range of the fit"),
        (number(float(np.median(k))), "median k-hat"),
        (number(float(np.nanmedian(gap))), "median gap (nats)"),
        (number(round(float(np.nanmedian(rows["ess"])))), "median effective size"),
    ]
    if "amortisation_gap" in rows:
        facts.append((number(float(np.nanmean(rows["amortisation_gap"]))), "mean amortisation gap (nats)"))
    boxes = "".join(f'<div class="fact"><b>{b}</b><span>{escape(t)}</span></div>' for b, t in facts)
    data = _row_data(tree, rows)
    worst = np.argsort(-np.where(np.isnan(k), np.inf, k), kind="stable")[:10]
    names = groups.labels(rows["k_hat"].rename(str(next(iter(rows["k_hat"].dims)))), list(worst))
    ess, outside = rows["ess"].values.ravel(), rows["outside"].values.ravel()
    lines = []
    for name, i in zip(names, worst, strict=True):
        own = (values[i] for values in data.values())
        where = ("yes" if outside[i] else "no",) if outside.any() else ()
        lines.append((name, k[i], round(float(ess[i])), gap[i], *where, *own))
    title = "The ten rows with the largest k-hat" if k.size > 10 else "Rows, the largest k-hat first"
    head = ("row", "k-hat", "effective size", "gap (nats)", *(["outside"] if outside.any() else []), *data)
    table = _table(title, head, lines)
    return f'<div class="facts">{boxes}</div><h3>{title}</h3>{table}'


def _row_data(tree: xr.DataTree, rows: xr.Dataset) -> dict[str, np.ndarray]:
    """Up to four fields with one number per row."""
    found: dict[str, np.ndarray] = {}
    for name in ("observed_data", "constant_data"):
        if name in tree.children:
            fields = groups.numeric(groups.group(tree, name))
            found |= {f: a.values for f, a in fields.items() if a.dims == rows["k_hat"].dims and a.ndim == 1}
    return dict(list(found.items())[:4])


def _figures(tree: xr.DataTree, found: Mapping[str, xr.Dataset], reference: xr.DataTree | None) -> str:
    """The figures for which the tree has the groups, each with one sentence."""
    from matplotlib.figure import Figure  # of which pyplot does not know: no window opens, none stays open

    drawn: dict[str, Figure] = defaultdict(Figure)
    if groups.population_names(tree):
        plots.plot_population(tree, reference=reference, ax=drawn["population"])
    if "row_reliability" in found and found["row_reliability"]["k_hat"].size > 1:
        plots.plot_row_k(tree, rows=found["row_reliability"], ax=drawn["rows"])
    if groups.local_names(tree) and groups.rows(tree) > 1:
        plots.plot_catalogue(tree, ax=drawn["catalogue"])
    if "predictive_check" in found and found["predictive_check"].sizes["variable"]:
        plots.plot_predictive(tree, ax=drawn["predictive"])
    if "plateau" in found and groups.group(tree, "history").sizes["log"] > 1:
        plots.plot_history(tree, ax=drawn["history"])
    if reference is not None:
        plots.plot_comparison(tree, reference, ax=drawn["compare"])
    return "".join(picture(figure, CAPTIONS[name]) for name, figure in drawn.items())


def _comparison(found: Mapping[str, xr.Dataset]) -> str:
    table = found.get("compare")
    if table is None:
        return ""
    keys = ("n", "shift_median", "shift_p95", "shift_mcse", "sd_ratio_median", "sd_ratio_p95", "w1_p95")
    rows = []
    for i in range(table.sizes["variable"]):
        one = table.isel(variable=i)
        passed = ("yes" if one["ok"] else "no") if one["comparable"] else "other rows"
        numbers = (float(one[k]) for k in keys)
        rows.append((str(one["variable"].item()), *numbers, str(one["worst_at"].item()), passed))
    head = ("variable", "entries", "Δ mean", "|Δ mean| 95 %", "± MC", "sd ratio", "sd factor 95 %", "W1 95 %")
    note = (
        "Differences in NUTS sd: median, then the value that 95 % of entries stay below. A variable marked "
        "“other rows” has another posterior under NUTS by design, since that saw fewer rows."
    )
    table = _table("SVI beside NUTS", (*head, "worst at", "ok"), rows)
    return f'{table}<p class="soft">{note}</p>'


def _predictive(found: Mapping[str, xr.Dataset]) -> str:
    table = found.get("predictive_check")
    if table is None or not table.sizes["variable"]:
        return ""
    keys = ("observed", "replicated_mean", "replicated_sd", "p_value")
    rows = [
        (str(table["variable"][i].item()), *(float(table[k][i]) for k in keys), bool(table["ok"][i]))
        for i in range(min(table.sizes["variable"], SHOWN))
    ]
    head = ("statistic", "observed", "replicated, mean", "replicated, sd", "P(replicated > observed)", "ok")
    return _table("Predictive checks", head, rows)


def _provenance(made: Mapping[str, Any]) -> str:
    """Template, prior, data, plan, fit and versions as they were recorded; long lists in short."""
    if not made:
        return ""
    blocks = []
    plain = {k: v for k, v in made.items() if not isinstance(v, (dict, list))}
    for title, values in (("run", plain), *((k, v) for k, v in made.items() if isinstance(v, dict))):
        lines = "".join(f"<dt>{escape(str(k))}</dt><dd>{_value(v)}</dd>" for k, v in values.items())
        if lines:
            name = escape(title.replace("_", " ").capitalize())
            long = " class=long" if len(values) > 2 * FEW else ""
            blocks.append(f"<section{long}><h3>{name}</h3><dl>{lines}</dl></section>")
    return f'<div class="grid">{"".join(blocks)}</div>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(k))} {_value(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        if len(value) > FEW and all(isinstance(v, int | float) for v in value):
            return f"{len(value):,} numbers from {number(np.nanmin(value))} to {number(np.nanmax(value))}"
        more = f" and {len(value) - 4 * FEW:,} more" if len(value) > 4 * FEW else ""
        return ", ".join(_value(v) for v in value[: 4 * FEW]) + more or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape("–" if value is None else str(value))
