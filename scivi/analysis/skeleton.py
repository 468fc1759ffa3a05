"""The fixed text of the report's page: style, frame, captions.

One page for all: a phone and a desk, light and dark, screen and paper. Tables scroll in boxes of their own,
but for those of the checks and of the posterior, whose lines fold where the page is narrow.
"""

from string import Template

NARROW = 640  # px: below it the page is one narrow column, with figures of its own

_LIGHT = """--ink:#1f252c; --soft:#56606a; --line:#dfe3e8; --paper:#ffffff; --wash:#f4f6f8; --edge:#00000030;
--accent:#2f5f94; --good:#1b6b29; --good-wash:#eaf5ec; --care:#755c00; --care-wash:#fdf5dc;
--bad:#a8233a; --bad-wash:#fdecee; --figure:none;"""

_DARK = """--ink:#e4e7eb; --soft:#a3adb8; --line:#363d46; --paper:#171b20; --wash:#21272e; --edge:#000000a0;
--accent:#8db8ea; --good:#7fd08f; --good-wash:#16291b; --care:#e6c65c; --care-wash:#2b2612;
--bad:#ff98a5; --bad-wash:#331a1f; --figure:invert(1) hue-rotate(180deg);"""

STYLE = f"""
:root {{ color-scheme:light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme:dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing:border-box; }}
html {{ -webkit-text-size-adjust:100%; text-size-adjust:100%; }}
body {{ margin:0; background:var(--wash); color:var(--ink); overflow-wrap:break-word;
  font:15px/1.55 system-ui,-apple-system,"Segoe UI","Helvetica Neue",Arial,"Noto Sans","DejaVu Sans",
  sans-serif; }}
main {{ max-width:980px; margin:0 auto; padding:32px 28px 64px; background:var(--paper); min-height:100vh; }}
h1 {{ font-size:26px; line-height:1.25; margin:0 0 4px; }}
h2 {{ font-size:19px; line-height:1.3; margin:40px 0 10px; padding-bottom:5px;
  border-bottom:1px solid var(--line); scroll-margin-top:8px; }}
h3 {{ font-size:15px; margin:20px 0 4px; }}
p {{ margin:6px 0; }} a {{ color:var(--accent); }} :focus-visible {{ outline:2px solid var(--accent); }}
.soft {{ color:var(--soft); font-size:13.5px; }}
.verdict {{ margin:22px 0 12px; padding:18px 22px; border-radius:10px; border-left:7px solid; }}
.verdict h2 {{ display:flex; align-items:center; gap:12px; font-size:25px; margin:0 0 8px; padding:0;
  border:0; }}
.verdict h2 span {{ flex:none; width:34px; height:34px; border-radius:50%; background:currentColor;
  display:grid; place-items:center; }}
.verdict h2 span b {{ color:var(--paper); font-size:20px; line-height:1; }}
.verdict ul, .next ul {{ margin:4px 0; padding-left:20px; }} .verdict li, .next li {{ margin:4px 0; }}
.good {{ background:var(--good-wash); border-color:var(--good); }} .good h2 {{ color:var(--good); }}
.care {{ background:var(--care-wash); border-color:var(--care); }} .care h2 {{ color:var(--care); }}
.bad {{ background:var(--bad-wash); border-color:var(--bad); }} .bad h2 {{ color:var(--bad); }}
.next {{ margin:12px 0; padding:14px 22px; border:1px solid var(--line); border-radius:10px; }}
.next h2 {{ font-size:16px; margin:0; padding:0; border:0; }}
nav {{ display:flex; flex-wrap:wrap; gap:2px 18px; margin:18px 0 0; font-size:14px; }}
nav a {{ padding:4px 0; text-decoration:none; }} nav a:hover {{ text-decoration:underline; }}
.scroll {{ overflow-x:auto; border-radius:2px; background:
  linear-gradient(to right,var(--paper) 30%,transparent) left/40px 100% no-repeat local,
  linear-gradient(to left,var(--paper) 30%,transparent) right/40px 100% no-repeat local,
  linear-gradient(to right,var(--edge),transparent) left/12px 100% no-repeat scroll,
  linear-gradient(to left,var(--edge),transparent) right/12px 100% no-repeat scroll; }}
table {{ border-collapse:collapse; width:100%; margin:6px 0 4px; font-size:13.5px; line-height:1.45;
  font-variant-numeric:tabular-nums; }}
th, td {{ text-align:left; padding:5px 10px; border-bottom:1px solid var(--line); vertical-align:top; }}
th:not([scope=row]) {{ color:var(--soft); font-weight:600; border-bottom:2px solid var(--line);
  vertical-align:bottom; }}
th[scope=row] {{ font-weight:500; }}
td.n, th.n {{ text-align:right; white-space:nowrap; }} th.n {{ white-space:normal; }}
.unit {{ color:var(--soft); font-weight:400; white-space:nowrap; }}
td.name {{ white-space:nowrap; }} td.mark {{ width:6em; white-space:nowrap; font-weight:600; }}
.pass {{ color:var(--good); }} .warn {{ color:var(--care); }} .fail {{ color:var(--bad); }}
.mute {{ color:var(--soft); }} td.mark.mute {{ font-weight:400; }} .mark a {{ color:inherit; }}
figure {{ margin:18px 0 28px; }}
figure img {{ display:block; max-width:100%; height:auto; margin:0 auto; filter:var(--figure); }}
figcaption {{ color:var(--soft); font-size:13.5px; margin:8px auto 0; max-width:840px; }}
.facts {{ display:grid; grid-template-columns:repeat(auto-fit,minmax(116px,1fr)); gap:10px; margin:12px 0; }}
.fact {{ background:var(--wash); border-radius:10px; padding:10px 14px; }}
.fact b {{ display:block; font-size:20px; line-height:1.4; font-variant-numeric:tabular-nums; }}
.fact span {{ display:block; color:var(--soft); font-size:12.5px; line-height:1.35; }}
.grid {{ columns:2 300px; column-gap:36px; }} .grid section {{ break-inside:avoid; }}
.grid section.long {{ break-inside:auto; }} .grid h3 {{ margin:0; padding-top:14px; }}
dl {{ display:grid; grid-template-columns:fit-content(46%) 1fr; margin:4px 0 8px; font-size:13px;
  line-height:1.45; }}
dt, dd {{ margin:0; padding:3px 0; border-bottom:1px solid var(--line); min-width:0;
  overflow-wrap:anywhere; }}
dt {{ color:var(--soft); padding-right:12px; }} dd {{ font-variant-numeric:tabular-nums; }}
@media (max-width:{NARROW}px) {{
  main {{ padding:20px 16px 48px; }} h1 {{ font-size:22px; }} h2 {{ margin-top:32px; }}
  .verdict {{ padding:14px 16px; }} .verdict h2 {{ font-size:22px; }} .next {{ padding:12px 16px; }}
  th, td {{ padding:5px 8px; }} th:first-child, td:first-child {{ padding-left:0; }}
  .scroll th[scope=row] {{ position:sticky; left:0; min-width:30vw; background:var(--paper);
    box-shadow:1px 0 var(--line); }}
  .scroll td.soft {{ min-width:17em; }} .fact {{ padding:8px 12px; }} figure {{ margin:14px 0 24px; }}
}}
@media screen and (max-width:{NARROW}px) {{
  .checks, .checks tbody {{ display:block; }}
  .checks thead {{ position:absolute; clip-path:inset(50%); width:1px; height:1px; overflow:hidden; }}
  .checks tr {{ display:flex; flex-wrap:wrap; padding:8px 0; border-bottom:1px solid var(--line); }}
  .checks td {{ display:block; border:0; padding:1px 0; text-align:left; white-space:normal; }}
  .checks td.name {{ font-weight:600; width:calc(100% - 6em); }}
  .checks td.told {{ width:100%; order:1; }}
  .checks td.n {{ order:2; color:var(--soft); font-size:12.5px; margin-right:1.5em; }}
  .checks td.n::before {{ content:attr(data-is) " "; }} .checks td.n.none {{ display:none; }}
  [aria-label^=Summary] :is(table, thead, tbody) {{ display:block; }}
  [aria-label^=Summary] tr {{ display:flex; flex-wrap:wrap; border-bottom:1px solid var(--line); }}
  [aria-label^=Summary] :is(th, td) {{ flex:1 1 0; min-width:0; border:0; padding:2px 0 4px 4px;
    font-size:12.5px; }}
  [aria-label^=Summary] th.n {{ font-size:11px; font-weight:500; overflow-wrap:normal; }}
  [aria-label^=Summary] th:first-child {{ flex:0 0 100%; position:static; box-shadow:none; padding:4px 0 0; }}
}}
@page {{ margin:16mm 14mm; }}
@media print {{
  body {{ background:none; font-size:10.5pt; }} main {{ padding:0; max-width:none; }} nav {{ display:none; }}
  h2, h3 {{ break-after:avoid; }} figure, tr, .verdict, .next, .fact {{ break-inside:avoid; }}
  .scroll {{ overflow:visible; background:none; }} td.n, td.name {{ white-space:normal; }}
  table {{ font-size:8.5pt; }} th, td {{ padding:3px 6px; }}
  .verdict, .fact {{ print-color-adjust:exact; -webkit-print-color-adjust:exact; }}
}}
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: $verdict</title><style>$style</style></head>
<body><main>
<header><h1>$title</h1><p class="soft">$subtitle</p></header>
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
