"""The report's style sheet: system fonts, light and dark by the reader's setting, one column on a phone, plain in print."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1b1f24; --soft: #5b6570; --rule: #d5dae0; --grid: #e9edf1; --panel: #f5f7f9;
  --original: #6b7480; --control: #c4540a; --ln_free: #0b62b0; --mark: #fbe3a6; --mark-text: #3c2c00;
  --mlp: #7a4fb5; --qk: #00806a; --v: #a8740a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --text: #e4e7eb; --soft: #9aa4af; --rule: #39414a; --grid: #262c33; --panel: #1c2127;
    --original: #a3adb8; --control: #f09a5a; --ln_free: #6cb2f5; --mark: #6b5414; --mark-text: #fff3d0;
    --mlp: #bb9af0; --qk: #4fcdb4; --v: #e0b24e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 1.6rem 1rem 3rem; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--ln_free); }
.soft, figcaption, .note { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.08rem; }
.original { --role: var(--original); } .control { --role: var(--control); } .ln_free { --role: var(--ln_free); }
.mlp { --role: var(--mlp); } .qk { --role: var(--qk); } .v { --role: var(--v); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .7rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .45rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
td.words, th.words { text-align: left; }
thead th.ln_free, #published th:first-child, #accuracies th:first-child { white-space: nowrap; }
thead th { border-bottom: 1px solid var(--rule); font-weight: 600; }
thead th.original, thead th.control, thead th.ln_free { color: var(--role); }
tbody th { font-weight: 400; }
tr.strong th, tr.strong td { font-weight: 600; }
.pm { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; white-space: nowrap; }
figure { margin: 1rem 0 1.4rem; }
figcaption { margin-top: .4rem; }
.narrow { display: none; }
svg.chart { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg text.label { fill: var(--text); font-size: 12.5px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
polyline, svg line.line, svg line.dashed, svg line.faint { fill: none; stroke: var(--role); stroke-width: 2;
  stroke-linejoin: round; stroke-linecap: round; }
.dashed { stroke-dasharray: 5 4; }
polyline.faint, svg line.faint { stroke-width: 1; opacity: .38; }
.dot { fill: var(--role); stroke: var(--page); stroke-width: 1; }
.band { fill: var(--soft); opacity: .09; }
.span { fill: var(--soft); opacity: .75; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .875rem; margin-bottom: .3rem; }
.key { display: inline-flex; align-items: center; gap: .4rem; }
pre { background: var(--panel); padding: .7rem .8rem; margin: .5rem 0; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: .8rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
mark { background: var(--mark); color: var(--mark-text); border-radius: 3px; padding: 0 .1em; }
.sample { border-left: 3px solid var(--rule); padding-left: .8rem; margin: 1.2rem 0; }
.sample p { margin: .2rem 0; font-size: .92rem; }
.missing { background: var(--panel); border-radius: 6px; padding: .6rem .8rem; font-size: .92rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1rem; }
@media (max-width: 40rem) {
  .wide { display: none; } .narrow { display: block; }
  main { padding-top: 1rem; }
  table { font-size: .85rem; } th, td { padding: .34rem .28rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --text: #000; --soft: #444; --rule: #999; --grid: #ddd; --panel: #fff;
    --original: #6b7480; --control: #c4540a; --ln_free: #0b62b0; --mark: #eee; --mark-text: #000;
    --mlp: #7a4fb5; --qk: #00806a; --v: #a8740a; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  .wide { display: block; } .narrow { display: none; }
  figure, tr, .sample { break-inside: avoid; } h2, h3 { break-after: avoid; }
  pre { border: 1px solid var(--rule); }
}
"""
