"""The report as one self-contained HTML page: inline style, figures as data, nothing loaded."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from scivi.analysis import groups, plots
from scivi.analysis.skeleton import CAPTIONS, PAGE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 60  # rows of a table; our choice
TONE = {"trust": "good", "trust with care": "care", "do not trust": "bad"}


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
    sections = [
        _verdict(checks),
        _checks(checks),
        _population(tree, found),
        _rows(tree, found),
        _figures(tree, found, reference),
        _comparison(found),
        _predictive(found),
        _provenance(made),
    ]
    return PAGE.substitute(
        title=escape(str(made.get("template", "Posterior"))),
        verdict=escape(str(checks.attrs["verdict"])),
        style=STYLE,
        subtitle=escape(_subtitle(tree, made)),
        body="\n".join(s for s in sections if s),
    )


def number(value: Any) -> str:
    """A number as a reader wants it: four digits, thousands grouped, a dash for none."""
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (str, np.str_)):
        return escape(str(value))
    value = float(value)
    if not np.isfinite(value):
        return "∞" if value == np.inf else "–"
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:.4g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; cells that are numbers stand right."""
    body, numeric = [], [False] * len(head)
    for row in rows:
        cells = []
        for j, cell in enumerate(row):
            numeric[j] = not isinstance(cell, (str, np.str_))
            kind = ' class="n"' if numeric[j] else ""
            cells.append(f"<td{kind}>{number(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    top = "".join(f"<th{' class=n' * n}>{escape(h)}</th>" for h, n in zip(head, numeric, strict=True))
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(body)}</table></div>'


def _items(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _subtitle(tree: xr.DataTree, made: Mapping[str, Any]) -> str:
    """What was fitted, how and when, on one line."""
    posterior = groups.group(tree, "posterior")
    method = {"svi": "variational inference", "nuts": "NUTS"}.get(
        str(made.get("method")), str(made.get("method", ""))
    )
    sizes = made.get("data", {}).get("sizes", {})
    parts = [
        method,
        ", ".join(f"{n:,} × {d}" if isinstance(n, int) else f"{n} × {d}" for d, n in sizes.items()),
    ]
    chains, draws = posterior.sizes["chain"], f"{posterior.sizes['draw']:,} draws"
    parts.append(f"{chains} chains × {draws}" if chains > 1 else draws)
    parts.append(str(made.get("created", "")))
    return " · ".join(p for p in parts if p)


def _verdict(checks: xr.Dataset) -> str:
    word = str(checks.attrs["verdict"])
    why, advice = json.loads(checks.attrs["why"]), json.loads(checks.attrs["advice"])
    title = f'<strong class="word">{escape(word.capitalize())}</strong>'
    box = f'<div class="verdict {TONE[word]}">{title}{_items(why)}</div>'
    todo = f'<div class="next"><b>What to do next</b>{_items(advice)}</div>' if advice else ""
    return box + todo


def _checks(checks: xr.Dataset) -> str:
    """Every check with a mark."""
    rows = []
    for i in range(checks.sizes["check"]):
        one = checks.isel(check=i)
        counts, ok = str(one["counts"].item()), bool(one["ok"])
        style, word = ("mute", "note") if counts == "note" else ("pass", "✓ passed") if ok else (
            ("fail", "✗ failed") if counts == "decides" else ("warn", "! care")
        )  # fmt: skip
        name, value, limit, text = (one[k].item() for k in ("check", "value", "threshold", "sentence"))
        rows.append(
            f'<tr><td class="mark {style}">{word}</td><td class="name">{escape(str(name))}</td>'
            f'<td class="n">{number(value)}</td><td class="n">{number(limit)}</td>'
            f"<td>{escape(str(text))}</td></tr>"
        )
    head = '<tr><th></th><th>check</th><th class="n">value</th><th class="n">limit</th><th>meaning</th></tr>'
    return f'<h2>Checks</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _population(tree: xr.DataTree, found: Mapping[str, xr.Dataset]) -> str:
    """Mean, sd, interval, unit, contraction and corrected shift of each population variable."""
    summary = found["summary"]
    share, shift = _column(found.get("contraction"), "contraction"), {}
    joint = found.get("reliability")
    if joint is not None and joint.attrs["decisive"]:
        shift = _column(joint, "shift_sd")
    names = [str(v) for v in summary["variable"].values]
    rows = []
    for i, name in enumerate(names[:SHOWN]):
        numbers, unit = (
            (float(summary[k][i]) for k in ("mean", "sd", "lower", "upper")),
            summary["unit"][i].item(),
        )
        tail = share.get(name, np.nan), shift.get(name, np.nan)
        rows.append((name, *numbers, "" if unit == "1" else str(unit), *tail))
    percent = f"{summary.attrs['prob']:.0%}"
    head = (
        "variable",
        "mean",
        "sd",
        f"{percent} from",
        f"{percent} to",
        "unit",
        "contraction",
        "corrected shift (sd)",
    )
    title = "Population" if groups.population_names(tree) else "Posterior"
    more = f"<p class='soft'>The first {SHOWN} of {len(names)}.</p>" if len(names) > SHOWN else ""
    note = (
        "Contraction is posterior over prior spread: near 1 the data said nothing. The corrected shift is "
        "how far the importance weights move the mean; a dash means that they cannot tell."
    )
    return f'<h2>{title}</h2>{_table(head, rows)}{more}<p class="soft">{note}</p>'


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
        (number(k.size), "rows"),
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
        lines.append((name, k[i], round(float(ess[i])), gap[i], "yes" if outside[i] else "", *own))
    table = _table(("row", "k-hat", "effective size", "gap (nats)", "outside", *data), lines)
    return f'<h2>Rows</h2><div class="facts">{boxes}</div><h3>The ten rows with the largest k-hat</h3>{table}'


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
    drawn: dict[str, Figure] = {}
    if groups.population_names(tree):
        drawn["population"] = plots.plot_population(tree, reference=reference)
    if "row_reliability" in found:
        drawn["rows"] = plots.plot_row_k(tree, rows=found["row_reliability"])
    if groups.local_names(tree):
        drawn["catalogue"] = plots.plot_catalogue(tree)
    if "predictive_check" in found and found["predictive_check"].sizes["variable"]:
        drawn["predictive"] = plots.plot_predictive(tree)
    if "plateau" in found:
        drawn["history"] = plots.plot_history(tree)
    if reference is not None:
        drawn["compare"] = plots.plot_comparison(tree, reference)
    pieces = [_image(figure, CAPTIONS[name]) for name, figure in drawn.items()]
    return f"<h2>Figures</h2>{''.join(pieces)}" if pieces else ""


def _image(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(float(figure.get_figwidth()) * 100)
    return (
        f'<figure><img width="{width}" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


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
    return f'<h2>Beside NUTS</h2>{_table((*head, "worst at", "ok"), rows)}<p class="soft">{note}</p>'


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
    return f"<h2>Predictive checks</h2>{_table(head, rows)}"


def _provenance(made: Mapping[str, Any]) -> str:
    """Template, prior, data, plan, fit and versions as they were recorded."""
    if not made:
        return ""
    blocks = []
    plain = {k: v for k, v in made.items() if not isinstance(v, (dict, list))}
    for title, values in (
        ("Run", plain),
        *((k.capitalize(), v) for k, v in made.items() if isinstance(v, dict)),
    ):
        rows = "".join(
            f"<tr><td>{escape(str(k))}</td><td><code>{_value(v)}</code></td></tr>" for k, v in values.items()
        )
        if rows:
            blocks.append(f"<div><h3>{escape(title)}</h3><table>{rows}</table></div>")
    return f'<h2>Provenance</h2><div class="grid">{"".join(blocks)}</div>'


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(k))} {_value(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_value(v) for v in value) or "none"
    return escape("–" if value is None else str(value))
