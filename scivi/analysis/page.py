"""The report as one self-contained HTML page: inline style, figures as data, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from scivi.analysis import groups, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 60  # rows of a table; our choice
TONE = {"trust": "good", "trust with care": "care", "do not trust": "bad"}

STYLE = """
:root { --ink:#22272e; --soft:#5c6670; --line:#dfe3e8; --paper:#ffffff; --wash:#f6f7f9; --accent:#4477aa; }
* { box-sizing:border-box; }
body { margin:0; background:var(--wash); color:var(--ink); font:15px/1.55
-apple-system,BlinkMacSystemFont,"Segoe UI",
  "Helvetica Neue",Arial,"Noto Sans","DejaVu Sans",sans-serif; }
main { max-width:980px; margin:0 auto; padding:32px 28px 64px; background:var(--paper); min-height:100vh; }
h1 { font-size:26px; line-height:1.2; margin:0 0 4px; }
h2 { font-size:18px; margin:38px 0 8px; padding-bottom:5px; border-bottom:1px solid var(--line); }
p { margin:6px 0; } .soft { color:var(--soft); font-size:13.5px; }
.verdict { margin:22px 0 8px; padding:18px 22px; border-radius:8px; border-left:7px solid; }
.verdict strong.word { display:block; font-size:23px; margin-bottom:6px; }
.verdict ul, .next ul { margin:4px 0; padding-left:20px; } .verdict li, .next li { margin:3px 0; }
.good { background:#eaf5ec; border-color:#228833; } .good .word { color:#1b6b29; }
.care { background:#fdf6e0; border-color:#c9a21a; } .care .word { color:#7d6408; }
.bad { background:#fdecee; border-color:#cc3344; } .bad .word { color:#a32434; }
.next { margin:8px 0; padding:12px 22px; border:1px solid var(--line); border-radius:8px; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; margin:8px 0 4px; font-size:13.5px;
font-variant-numeric:tabular-nums; } th { text-align:left; color:var(--soft); font-weight:600; padding:5px
10px; border-bottom:2px solid var(--line); } td { padding:4px 10px; border-bottom:1px solid var(--line);
vertical-align:top; } td.n, th.n { text-align:right; white-space:nowrap; }
td.mark { width:5.5em; white-space:nowrap; font-weight:600; }
.pass { color:#228833; } .warn { color:#9a7b0a; } .fail { color:#cc3344; } .mute { color:#8b949e;
font-weight:400; } figure { margin:16px 0 22px; } figure img { display:block; max-width:100%; height:auto;
margin:0 auto; } figcaption { color:var(--soft); font-size:13.5px; margin-top:6px; }
.facts { display:flex; flex-wrap:wrap; gap:10px; margin:10px 0; }
.fact { flex:1 1 140px; background:var(--wash); border-radius:8px; padding:10px 14px; }
.fact b { display:block; font-size:19px; } .fact span { color:var(--soft); font-size:12.5px; }
.grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(290px,1fr)); gap:0 32px; }
h3 { font-size:14px; margin:16px 0 2px; } code { font-size:12.5px; word-break:break-all; }
@media print { body { background:white; } main { padding:0; } h2, figure { break-inside:avoid; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,
initial-scale=1"> <title>$title: $verdict</title><style>$style</style></head>
<body><main>
<h1>$title</h1><p class="soft">$subtitle</p>
$body
</main></body></html>
""")


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
    parts.append(f"{posterior.sizes['chain']} × {posterior.sizes['draw']:,} draws")
    parts.append(str(made.get("created", "")))
    return " · ".join(p for p in parts if p)


def _verdict(checks: xr.Dataset) -> str:
    word = str(checks.attrs["verdict"])
    why, advice = json.loads(checks.attrs["why"]), json.loads(checks.attrs["advice"])
    box = f'<div class="verdict {TONE[word]}"><strong class="word">{escape(word.capitalize())}</strong>{_items(why)}</div>'
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
        limit = float(one["threshold"])
        rows.append(
            f'<tr><td class="mark {style}">{word}</td><td>{escape(str(one["check"].item()))}</td>'
            f'<td class="n">{number(one["value"].item())}</td>'
            f'<td class="n">{number(limit)}</td><td>{escape(str(one["sentence"].item()))}</td></tr>'
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
    rows = [
        (name, *(float(summary[k][i]) for k in ("mean", "sd", "lower", "upper")), _unit(str(summary["unit"][i].item())),
         share.get(name, np.nan), shift.get(name, np.nan))
        for i, name in enumerate(names[:SHOWN])
    ]  # fmt: skip
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
        "Contraction is posterior over prior spread: near 1 the data said nothing. The corrected shift is how far the "
        "importance weights move the mean; a dash means that they cannot tell."
    )
    return f'<h2>{title}</h2>{_table(head, rows)}{more}<p class="soft">{note}</p>'


def _unit(unit: str) -> str:
    return "" if unit == "1" else unit


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
        (number(float(np.median(rows["ess"].values))), "median effective size"),
    ]
    if "amortisation_gap" in rows:
        facts.append((number(float(np.nanmean(rows["amortisation_gap"]))), "mean amortisation gap (nats)"))
    boxes = "".join(f'<div class="fact"><b>{b}</b><span>{escape(t)}</span></div>' for b, t in facts)
    data = _row_data(tree, rows)
    names = groups.labels(rows["k_hat"].rename(str(next(iter(rows["k_hat"].dims)))))
    worst = np.argsort(-np.where(np.isnan(k), np.inf, k), kind="stable")[:10]
    table = _table(
        ("row", "k-hat", "effective size", "gap (nats)", "outside", *data),
        [
            (names[i], k[i], round(float(rows["ess"].values.ravel()[i])), gap[i],
             "yes" if rows["outside"].values.ravel()[i] else "", *(v[i] for v in data.values()))
            for i in worst
        ],
    )  # fmt: skip
    return f'<h2>Rows</h2><div class="facts">{boxes}</div><h3>The ten rows with the largest k-hat</h3>{table}'


def _row_data(tree: xr.DataTree, rows: xr.Dataset) -> dict[str, np.ndarray]:
    """Up to four fields with one number per row."""
    found: dict[str, np.ndarray] = {}
    for name in ("observed_data", "constant_data"):
        if name in tree.children:
            fields = groups.numeric(tree[name].to_dataset(inherit=False))
            found |= {f: a.values for f, a in fields.items() if a.dims == rows["k_hat"].dims and a.ndim == 1}
    return dict(list(found.items())[:4])


def _figures(tree: xr.DataTree, found: Mapping[str, xr.Dataset], reference: xr.DataTree | None) -> str:
    """The figures for which the tree has the groups, each with one sentence."""
    predicted = "posterior_predictive" in tree.children and "observed_data" in tree.children
    drawn: list[tuple[bool, Callable[[], Figure], str]] = [
        (bool(groups.population_names(tree)), lambda: plots.plot_population(tree, reference=reference),
         "Population variables: posterior (blue), prior (grey) and, where given, NUTS (dashed)."),
        ("row_reliability" in found, lambda: plots.plot_row_k(tree, rows=found["row_reliability"]),
         "Pareto k-hat of each row: above the dashed line neither the row's guide nor its correction can be believed."),
        (bool(groups.local_names(tree)), lambda: plots.plot_catalogue(tree),
         "Rows sorted by their posterior mean, with 90 % intervals; of many rows, evenly spaced ones are drawn."),
        (predicted, lambda: plots.plot_predictive(tree),
         "Observed values (dots) among replicated ones (90 % band): dots outside the band are not reproduced by the model."),
        (groups.has(tree, "history", "objective"), lambda: plots.plot_history(tree),
         "The objective while fitting, and its parts: a fit has ended when these are level."),
        ("compare" in found and reference is not None, lambda: plots.plot_comparison(tree, reference or tree),
         "SVI beside NUTS, entry by entry; the green bands are what passes (bars: two Monte Carlo errors)."),
    ]  # fmt: skip
    pieces = [_image(draw(), caption) for wanted, draw, caption in drawn if wanted]
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
    keys = (
        "n",
        "shift_median",
        "shift_p95",
        "shift_mcse",
        "sd_ratio_median",
        "sd_ratio_p95",
        "w1_median",
        "w1_floor",
    )
    rows = [
        (str(table["variable"][i].item()), *(float(table[k][i]) for k in keys), str(table["worst_at"][i].item()),
         "" if bool(table["comparable"][i]) else "other rows", bool(table["ok"][i]))
        for i in range(table.sizes["variable"])
    ]  # fmt: skip
    head = ("variable", "entries", "Δ mean, median", "|Δ mean|, 95 %", "± MC", "sd ratio, median", "sd factor, 95 %",
            "W1", "W1 if equal", "worst at", "", "ok")  # fmt: skip
    note = "Differences in units of the NUTS sd. A row marked “other rows” has a different posterior under NUTS by design."
    return f'<h2>Beside NUTS</h2>{_table(head, rows)}<p class="soft">{note}</p>'


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
    if isinstance(value, (dict, list)):
        return escape(json.dumps(value))
    return escape("–" if value is None else str(value))
