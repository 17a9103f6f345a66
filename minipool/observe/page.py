"""The page: what an operator looks at for ten seconds. One document, no outside assets.

The state stands first, as a word, a shape and a colour; then the figures that explain it, each
with its line over time; then the workers, and what happened lately. Whatever comes from a pool is
put in by the script as text, never as markup, so the document itself is the same for everybody
but for the nonce, which alone lets its style and its script run.
"""

from __future__ import annotations

from .script import SCRIPT

#: What a browser may do with the page: run what carries the nonce, and talk to where it came from.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


def page(nonce: str) -> str:
    """Return the document, whose style and script carry this nonce."""
    return _DOCUMENT.replace("{nonce}", nonce).replace("{style}", _STYLE).replace(
        "{script}", SCRIPT
    )  # fmt: skip


_DOCUMENT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>minipool</title>
<style nonce="{nonce}">{style}</style>
</head>
<body>
<a class="skip" href="#workers">Skip to the workers</a>
<header>
<p class="brand">minipool</p>
<div class="field" id="picker"><label for="pool">Pool</label><select id="pool"></select></div>
<fieldset class="segments"><legend>Window</legend>
<label><input type="radio" name="window" value="60"><span>1 min</span></label>
<label><input type="radio" name="window" value="300"><span>5 min</span></label>
<label><input type="radio" name="window" value="900"><span>15 min</span></label>
<label><input type="radio" name="window" value="3600"><span>60 min</span></label>
</fieldset>
</header>
<p id="line" class="notice" role="status" hidden></p>
<main id="main">
<p id="empty" class="notice">Connecting …</p>
<div id="board" hidden>
<section class="hero" id="hero" aria-labelledby="name">
<h1 id="name"></h1>
<p class="state" role="status"><span id="mark" aria-hidden="true"></span>
<span id="word"></span></p>
<p class="score"><span id="score"></span><span class="of" id="of"> of 100</span></p>
<ul id="reasons"></ul>
<p id="counts" class="quiet"></p>
<p id="totals" class="quiet"></p>
</section>
<section aria-label="Figures"><div class="cards" id="cards"></div></section>
<section class="panel" aria-labelledby="workers">
<h2 id="workers" tabindex="-1">Workers</h2>
<div class="scroll" role="region" aria-labelledby="workers" tabindex="0">
<table><thead><tr>
<th scope="col">Worker</th><th scope="col">State</th><th scope="col" class="n">PID</th>
<th scope="col" class="n">Generation</th><th scope="col">Session</th>
<th scope="col" class="n">Calls</th><th scope="col">Last call</th>
<th scope="col" class="n">Memory</th><th scope="col" class="n">CPU</th>
<th scope="col" class="n">Uptime</th><th scope="col">Why the one before ended</th>
</tr></thead><tbody id="rows"></tbody></table>
</div>
<p id="nobody" class="quiet" hidden>No workers.</p>
</section>
<section class="panel" aria-labelledby="lately">
<h2 id="lately">Recent events</h2>
<ol id="events" class="events" aria-labelledby="lately" tabindex="0"></ol>
<p id="quiet" class="quiet"></p>
</section>
</div>
</main>
<footer><p class="quiet">It only looks: nothing here changes a pool.
<span id="source"></span></p></footer>
<noscript><p class="notice">This page is drawn by its script. Without one, read /api/pools or
/metrics.</p></noscript>
<script nonce="{nonce}">{script}</script>
</body>
</html>
"""

_STYLE = """
:root {
  --ground: #f5f6f8; --paper: #ffffff; --ink: #1b1f24; --quiet: #59636e; --edge: #d5dae0;
  --line: #0a5cc2; --second: #8a3ffc; --good: #16703a; --fair: #8a5a00; --bad: #c0202b;
  --good-wash: #e3f4e9; --fair-wash: #fdf1d7; --bad-wash: #fde7e8; --none-wash: #eceff2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0e1116; --paper: #171b22; --ink: #e8ebef; --quiet: #a0a9b4; --edge: #2e3540;
    --line: #6cb1ff; --second: #c8a2ff; --good: #4cc77a; --fair: #e3b341; --bad: #ff7b78;
    --good-wash: #12281c; --fair-wash: #2c2412; --bad-wash: #331a1c; --none-wash: #20252d;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0 auto; max-width: 100rem; padding: 0 1.25rem 2rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.45 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums;
}
h1, h2, h3, p, ul, ol { margin: 0; padding: 0; }
h1, h2, h3 { font-weight: 600; overflow-wrap: anywhere; }
ul, ol { list-style: none; }
.quiet { color: var(--quiet); font-size: .9rem; }
:focus-visible { outline: 3px solid var(--line); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .5rem 1rem; z-index: 2; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: .75rem 1.5rem; padding: 1rem 0; }
.brand { font-weight: 700; letter-spacing: .01em; font-size: 1.1rem; margin-right: auto; }
.field { display: flex; align-items: center; gap: .5rem; min-width: 0; }
.field label, legend { color: var(--quiet); font-size: .9rem; }
select {
  font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--edge);
  border-radius: .5rem; padding: .35rem .6rem; min-width: 0; max-width: 22rem;
  text-overflow: ellipsis;
}
.segments { border: 0; margin: 0; padding: 0; display: flex; align-items: center; min-width: 0; }
.segments legend { float: left; padding: 0; margin-right: .5rem; }
.segments input { position: absolute; opacity: 0; }
.segments span {
  display: block; padding: .35rem .7rem; border: 1px solid var(--edge); background: var(--paper);
  margin-left: -1px; white-space: nowrap; cursor: pointer;
}
.segments label:first-of-type span { border-radius: .5rem 0 0 .5rem; }
.segments label:last-of-type span { border-radius: 0 .5rem .5rem 0; }
.segments input:checked + span {
  background: var(--line); border-color: var(--line); color: var(--paper);
}
.segments input:focus-visible + span { outline: 3px solid var(--line); outline-offset: 2px; }
.notice {
  padding: .75rem 1rem; border-radius: .75rem; background: var(--fair-wash); color: var(--ink);
  border: 1px solid var(--fair); margin-bottom: 1rem;
}
#empty { background: var(--none-wash); border-color: var(--edge); }
.hero, .card, .panel {
  background: var(--paper); border: 1px solid var(--edge); border-radius: .75rem;
  padding: 1rem 1.25rem;
}
.hero {
  display: grid; grid-template-columns: 1fr auto; gap: .25rem 1.5rem; align-items: baseline;
  border-left: .5rem solid var(--tone, var(--quiet)); background: var(--wash, var(--paper));
  margin-bottom: 1rem;
}
.good { --tone: var(--good); --wash: var(--good-wash); }
.fair { --tone: var(--fair); --wash: var(--fair-wash); }
.bad { --tone: var(--bad); --wash: var(--bad-wash); }
h1 { font-size: 1.05rem; grid-column: 1 / -1; }
.state { color: var(--tone, var(--quiet)); font-size: 2.2rem; font-weight: 700; line-height: 1.15; }
.score { font-size: 2.2rem; font-weight: 600; line-height: 1.15; text-align: right; }
.of { color: var(--quiet); font-size: 1rem; font-weight: 400; }
#reasons, .hero .quiet { grid-column: 1 / -1; overflow-wrap: anywhere; }
#reasons li { padding-left: 1.1rem; text-indent: -1.1rem; }
#reasons li::before { content: "\\2013  "; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); gap: 1rem; }
.card { display: flex; flex-direction: column; min-width: 0; }
h2 { font-size: 1rem; }
h3 { font-size: .95rem; color: var(--quiet); font-weight: 500; }
.value { font-size: 1.45rem; font-weight: 600; line-height: 1.3; }
.value span, .ends span { white-space: nowrap; display: inline-block; }
.value .also { color: var(--quiet); font-size: .9rem; font-weight: 400; margin-left: .4rem; }
#card-latency .also { border-bottom: 2px dashed var(--second); }
.card .quiet { margin-bottom: .5rem; }
svg {
  display: block; width: 100%; height: 3.5rem; margin-top: auto;
  border-bottom: 1px solid var(--edge);
}
path { fill: none; stroke: var(--line); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; stroke-linecap: round; }
path.second { stroke: var(--second); stroke-dasharray: 5 4; }
path.area { fill: var(--line); opacity: .13; stroke: none; }
.ends { display: flex; justify-content: space-between; color: var(--quiet); font-size: .8rem; }
.panel { margin-top: 1rem; min-width: 0; }
.panel h2 { margin-bottom: .5rem; }
.scroll { overflow-x: auto; margin: 0 -1.25rem; padding: 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { text-align: left; padding: .4rem 1rem .4rem 0; white-space: nowrap; vertical-align: top; }
td:last-child { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; padding-right: 0; }
td.session { max-width: 12rem; overflow: hidden; text-overflow: ellipsis; }
thead th { color: var(--quiet); font-weight: 500; border-bottom: 1px solid var(--edge); }
tbody tr + tr > * { border-top: 1px solid var(--edge); }
.n { text-align: right; }
th[scope="row"] { font-weight: 600; }
.dot::before { content: "●"; margin-right: .4rem; color: var(--tone, var(--quiet)); }
.dot.fair::before { content: "▲"; }
.dot.bad::before { content: "■"; }
.events { max-height: 22rem; overflow-y: auto; font-size: .93rem; }
.events li {
  display: grid; grid-template-columns: 5.5rem 10.5rem 1fr; gap: 0 .75rem; padding: .25rem 0;
}
.events li + li { border-top: 1px solid var(--edge); }
.events time { color: var(--quiet); }
.events .what { overflow-wrap: anywhere; min-width: 0; }
.events .kind { color: var(--tone, inherit); font-weight: 500; }
footer { padding-top: 1rem; }
.stale #board { opacity: .75; filter: grayscale(1); }
@media (max-width: 40rem) {
  body { padding: 0 .75rem 1.5rem; }
  header { gap: .6rem; }
  .brand, .field { width: 100%; }
  select { flex: 1; max-width: none; }
  .segments { width: 100%; }
  .segments label { flex: 1; text-align: center; }
  .segments span { padding: .45rem .2rem; }
  .cards { grid-template-columns: 1fr; gap: .75rem; }
  .hero, .card, .panel { padding: .8rem 1rem; }
  .scroll { margin: 0 -1rem; padding: 0 1rem; }
  .state, .score { font-size: 1.8rem; }
  .events li { grid-template-columns: 5rem 1fr; }
  .events .what { grid-column: 1 / -1; }
}
@media (prefers-reduced-motion: no-preference) {
  .stale #board, #board { transition: opacity .3s; }
}
@media (forced-colors: active) {
  .segments input:checked + span {
    forced-color-adjust: none; background: Highlight; color: HighlightText;
  }
}
"""
