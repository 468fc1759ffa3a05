"""The fixed text of the report's page: style, frame, captions."""

from string import Template

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
td.name { white-space:nowrap; } td.mark { width:5.5em; white-space:nowrap; font-weight:600; }
.pass { color:#228833; } .warn { color:#9a7b0a; } .fail { color:#cc3344; } .mute { color:#8b949e;
font-weight:400; } figure { margin:16px 0 22px; } figure img { display:block; max-width:100%; height:auto;
margin:0 auto; } figcaption { color:var(--soft); font-size:13.5px; margin-top:6px; }
.facts { display:flex; flex-wrap:wrap; gap:10px; margin:10px 0; }
.fact { flex:1 1 140px; background:var(--wash); border-radius:8px; padding:10px 14px; }
.fact b { display:block; font-size:19px; } .fact span { color:var(--soft); font-size:12.5px; }
.grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(290px,1fr)); gap:0 32px; }
.grid td:first-child { width:38%; }
h3 { font-size:14px; margin:16px 0 2px; } code { font-size:12.5px; overflow-wrap:anywhere; }
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

CAPTIONS = {
    "population": "Population variables: posterior (blue), prior (grey) and, where given, NUTS (dashed).",
    "rows": "Pareto k-hat of each row: above the dashed line a row's posterior is not to be believed.",
    "catalogue": "Rows sorted by posterior mean, with 90 % intervals; of many rows, some, evenly spaced.",
    "predictive": "Observed (dots) and replicated values (90 % band): dots outside speak against the model.",
    "history": "The objective while fitting, and its parts: a fit has ended when these are level.",
    "compare": "SVI beside NUTS, entry by entry; green is what passes, bars are two Monte Carlo errors.",
}
