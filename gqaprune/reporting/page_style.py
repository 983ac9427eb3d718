"""The style sheet of `report.html`: narrow and wide screens, light and dark, and paper."""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f24; --soft: #5d6570; --line: #d9dde3; --wash: #f4f6f8;
  --mark: #2b5fa8; --kept: #3b6fb6; --gone: #e1e5ea; }
* { box-sizing: border-box; }
html { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
body { max-width: 68rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0; }
a { color: var(--mark); }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin-top: .7rem; font-size: .9rem; }
nav a { padding: .25rem 0; }
.lead { font-size: 1.05rem; }
.state, .note, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow: auto; max-width: 100%; margin: .7rem 0; }
.long { max-height: 26rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--paper); }
thead th { color: var(--soft); font-size: .85rem; }
.long thead th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
.long thead th:first-child { z-index: 2; }
.share { display: inline-block; min-width: 2.8em; }
thead th.text { text-align: left; }
td.text { text-align: left; white-space: normal; min-width: 15rem; overflow-wrap: break-word; }
.bar { display: inline-block; vertical-align: middle; width: 5rem; height: .55rem; margin-right: .5rem;
  border-radius: 2px; background: linear-gradient(var(--kept), var(--kept)) left / calc(var(--share) * 100%) 100%
  no-repeat var(--gone); }
img { display: block; max-width: 100%; height: auto; }
@media screen and (max-width: 40rem) {
  th, td { padding: .3rem .4rem; }
  tbody th:first-child { white-space: normal; max-width: 7rem; overflow-wrap: break-word; }
  img.wide { max-width: none; width: 44rem; }
}
pre { margin: .2rem 0 .7rem; padding: .6rem .8rem; background: var(--wash); border-radius: 4px; font-size: .88rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 0; }
.pair { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --soft: #9aa3ae; --line: #31373f; --wash: #1e2329; --mark: #8ab8f5;
    --kept: #6d9fe0; --gone: #333a43; }
  img { filter: invert(.92) hue-rotate(180deg); }
}
@media print {
  :root { color-scheme: light; }
  html { font-size: 10.5pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll, .long { overflow: visible; max-height: none; }
  .long thead th, th:first-child { position: static; }
  th, td { padding: .15rem .5rem; white-space: normal; }
  td.text { min-width: 0; }
  tr, img, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .bar, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
