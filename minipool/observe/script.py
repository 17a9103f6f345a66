"""The page's own program: hears the readings, one a second, and draws them.

What a reading holds is told in `portrait`. Text goes into the page as text (`textContent`), never
as markup. A reading is whole in itself, so nothing has to be remembered from one to the next, and
one that was missed is not missed.
"""

from __future__ import annotations

SCRIPT = r"""
"use strict";
const SILENCE = 5000;  // ms without a reading: then what is shown is called old
const RETRY = 2000;
const SVG = "http://www.w3.org/2000/svg";
const MARKS = {good: "\u25cf", fair: "\u25b2", bad: "\u25a0", none: "\u25cb"};
const TONES = {idle: "good", leased: "good", probing: "good", starting: "fair", stopping: "fair",
               stuck: "fair", stopped: "bad", lost: "bad"};
const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
let chosen = asked.get("pool") || "";
let span = [60, 300, 900, 3600].includes(+asked.get("window")) ? +asked.get("window") : 60;
let stream = null, heard = null, tried = Date.now();

// -- words ----------------------------------------------------------------------------------

const unknown = (x) => x === null || x === undefined;
const count = (x) => unknown(x) ? "\u2013" : Math.round(x).toLocaleString("en");
function number(x) {
  if (unknown(x)) return "\u2013";
  return x === 0 || x >= 100 ? count(x) : String(+x.toPrecision(x < 1 ? 2 : 3));
}
function percent(x) {
  if (unknown(x)) return "\u2013";
  const of = 100 * x;
  if (of > 0 && of < 0.1) return "< 0.1 %";
  return (of && of < 10 ? +of.toFixed(1) : Math.round(of)) + " %";
}
function seconds(x) {
  if (unknown(x)) return "\u2013";
  if (x < 1e-3) return number(x * 1e6) + " \u00b5s";
  if (x < 1) return number(x * 1e3) + " ms";
  return x < 120 ? number(x) + " s" : age(x);
}
function age(x) {
  if (unknown(x)) return "\u2013";
  const s = Math.floor(x), two = (a, b, c, d) => `${a} ${b}` + (c ? ` ${c} ${d}` : "");
  if (s < 120) return `${s} s`;
  if (s < 7200) return two(Math.floor(s / 60), "min", s < 600 ? s % 60 : 0, "s");
  if (s < 172800) return two(Math.floor(s / 3600), "h", Math.floor(s % 3600 / 60), "min");
  return two(Math.floor(s / 86400), "d", Math.floor(s % 86400 / 3600), "h");
}
function bytes(x) {
  if (!x) return "\u2013";
  const power = Math.min(4, Math.floor(Math.log2(x) / 10));
  return number(x / 1024 ** power) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][power];
}
const clock = (t) => new Date(t * 1000).toLocaleTimeString("en-GB");
const tone = (score) =>
  unknown(score) ? "none" : score >= 80 ? "good" : score >= 60 ? "fair" : "bad";
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

// -- drawing --------------------------------------------------------------------------------

function say(node, text) { if (node.textContent !== text) node.textContent = text; }
function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}
function keep(parent, wanted, create) {  // as many children as wanted, those there are reused
  while (parent.children.length > wanted) parent.lastElementChild.remove();
  while (parent.children.length < wanted) parent.append(create());
  return [...parent.children];
}

const CARDS = [
  {id: "utilization", title: "Utilisation", lines: ["utilization"], show: percent, least: 1,
   also: () => "", note: (p) => `${count(p.active)} of ${plural(there(p), "worker")} leased`},
  {id: "throughput", title: "Throughput", lines: ["throughput"], least: 1,
   show: (x) => number(x) + " /s", also: () => "",
   note: (p) => p.calls ? `${plural(p.calls, "call")} in all` : "no calls yet"},
  {id: "latency", title: "Latency, p50 and p99", lines: ["call_p50", "call_p99"],
   show: seconds, least: 0,
   also: (p) => unknown(p.call_p99) ? "" : "p99 " + seconds(p.call_p99), note: calls},
  {id: "errors", title: "Error rate", lines: ["error_rate"], show: percent, least: 0.01,
   also: () => "", note: (p) => errors(p)},
  {id: "queue", title: "Queue", lines: ["queue_depth"], show: count, least: 1,
   also: (p) => unknown(p.wait_p99) ? "" : "wait p99 " + seconds(p.wait_p99),
   note: (p) => p.checkout_timeouts ? `${plural(p.checkout_timeouts, "checkout")} gave up waiting`
     : p.queue_depth ? "callers wait for a worker" : "nobody waits"},
];
function calls(p) {
  if (p.call_count) return plural(p.call_count, "call") + " in a minute";
  return p.calls ? "no calls in the last minute" : "no calls yet";
}
const there = (p) => Object.values(p.states).reduce((a, b) => a + b, 0);
function errors(p) {
  if (unknown(p.errors)) return "not seen from outside";
  const found = Object.entries(p.errors).map(([name, n]) => `${count(n)} ${name}`);
  if (p.user_errors) found.push(plural(p.user_errors, "exception") + " of your code");
  return found.join(", ") || (p.calls ? "no errors" : "no calls yet");
}
for (const card of CARDS) {
  const box = make("section", "", "card"), title = make("h3", card.title);
  title.id = "title-" + card.id;
  box.id = "card-" + card.id;
  box.setAttribute("aria-labelledby", title.id);
  card.value = make("span", "\u2013");
  card.value.id = "value-" + card.id;
  card.more = make("span", "", "also");
  card.under = make("p", "", "quiet");
  const value = make("p", "", "value");
  value.append(card.value, card.more);
  card.svg = document.createElementNS(SVG, "svg");
  card.svg.setAttribute("viewBox", "0 0 100 100");
  card.svg.setAttribute("preserveAspectRatio", "none");
  card.svg.setAttribute("role", "img");
  card.paths = ["area", ...card.lines.map((_, i) => i ? "second" : "first")].map((kind) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", kind);
    card.svg.append(path);
    return path;
  });
  card.ends = [make("span"), make("span"), make("span", "now")];
  const ends = make("p", "", "ends");
  ends.append(...card.ends);
  box.append(title, value, card.under, card.svg, ends);
  $("cards").append(box);
}

function draw(card, series) {
  const all = card.lines.map((line) => series[line]);
  const seen = all.flat().filter((x) => !unknown(x));
  const top = Math.max(card.least, ...seen) || 1;
  const at = (i, x) =>
    [(100 - 100 * series.age[i] / span).toFixed(2), (97 - 92 * x / top).toFixed(2)];
  all.forEach((values, n) => {
    let line = "", area = "", from = null, last = null;
    const shut = () => { if (from !== null) area += `L${last} 100L${from} 100Z`; from = null; };
    values.forEach((x, i) => {
      if (unknown(x)) return shut();
      const [left, up] = at(i, x), move = from === null ? "M" : "L";
      if (from === null) from = left;
      last = left;
      line += `${move}${left} ${up}`;
      area += `${move}${left} ${up}`;
      if (move === "M" && unknown(values[i + 1])) line += "h0.01";  // a dot
    });
    shut();
    card.paths[n + 1].setAttribute("d", line);
    if (!n) card.paths[0].setAttribute("d", area);
  });
  const window = span === 60 ? "1 min" : span / 60 + " min";
  say(card.ends[0], window + " ago");
  const low = card.show(Math.min(...seen)), high = card.show(Math.max(...seen));
  say(card.ends[1], seen.length ? "top " + high : "nothing yet");
  card.svg.setAttribute("aria-label", seen.length
    ? `${card.title} in the last ${window}: from ${low} to ${high}` : `${card.title}: nothing yet`);
}

function drawPools(pools) {
  const select = $("pool");
  const options = keep(select, pools.length, () => make("option"));
  pools.forEach((pool, i) => {
    options[i].value = pool.id;
    say(options[i], `${pool.name} (${pool.word})`);
  });
  select.value = chosen;
}

function drawHero(pool) {
  const kind = tone(pool.score);
  $("hero").className = "hero " + kind;
  say($("name"), pool.name);
  say($("mark"), MARKS[kind]);
  say($("word"), pool.word);
  say($("score"), unknown(pool.score) ? "" : String(Math.round(pool.score)));
  $("of").hidden = unknown(pool.score);
  keep($("reasons"), pool.reasons.length, () => make("li"))
    .forEach((item, i) => say(item, pool.reasons[i]));
  const n = pool.now, states = Object.entries(n.states);
  say($("counts"), `${count(pool.workers.length)} of ${plural(n.pool_size, "worker")}: ` +
    (states.map(([state, k]) => `${count(k)} ${state}`).join(", ") || "none"));
  say($("totals"), [`${plural(n.workers_started, "worker")} started`, `${count(n.crashes)} lost`,
    `${count(n.workers_recycled)} retired`,
    ...(unknown(n.active_sessions) ? [] : [plural(n.active_sessions, "session")]),
    "up " + age(n.uptime)].join(" \u00b7 "));
}

function drawWorkers(workers) {
  $("nobody").hidden = workers.length > 0;
  const rows = keep($("rows"), workers.length, () => {
    const row = make("tr"), head = make("th");
    head.scope = "row";
    const kinds = ["", "n", "n", "session", "n", "", "n", "n", "n", ""];
    row.append(head, ...kinds.map((kind) => make("td", "", kind)));
    return row;
  });
  workers.forEach((worker, i) => {
    const cells = rows[i].children;
    cells[1].className = "dot " + (TONES[worker.state] || "none");
    [worker.worker_id, worker.state, worker.pid, worker.generation, worker.session,
     count(worker.calls), lastCall(worker), bytes(worker.rss_bytes), percent(worker.cpu),
     worker.uptime ? age(worker.uptime) : "\u2013", worker.last_death || "\u2013",
    ].forEach((text, k) => say(cells[k], unknown(text) || text === "" ? "\u2013" : String(text)));
    cells[4].title = worker.session || "";
  });
}
function lastCall(worker) {
  const run = worker.in_call_for, last = worker.last_call;
  if (!unknown(run)) return run < 1 ? "running" : "running for " + age(run);
  return unknown(last) ? "none yet" : last < 1 ? "just now" : age(last) + " ago";
}

function drawEvents(told) {
  const events = told || [];
  $("quiet").hidden = events.length > 0;
  say($("quiet"), told ? "None since the dashboard began to watch." : "Not seen from outside.");
  const items = keep($("events"), events.length, () => {
    const item = make("li");
    item.append(make("time"), make("span", "", "kind"), make("span", "", "what"));
    return item;
  });
  events.forEach((event, i) => {
    const [time, kind, what] = items[i].children;
    items[i].className = event.bad ? "bad" : "";
    time.dateTime = new Date(event.time * 1000).toISOString();
    say(time, clock(event.time));
    say(kind, event.name);
    say(what, event.text);
  });
}

function show(reading) {
  if (!chosen && reading.pools.length) choose(reading.pools[0].id, span);
  const pool = reading.pool;
  say($("source"), reading.source);
  $("picker").hidden = !reading.pools.length;
  drawPools(reading.pools);
  $("board").hidden = !pool;
  $("empty").hidden = !!pool;
  if (!pool) {
    say($("empty"), reading.pools.length ? "This pool has ended. Choose another one above."
      : "No pool is open in this process.");
    document.title = "minipool";
    return;
  }
  document.title = `${pool.word} \u00b7 ${pool.name} \u00b7 minipool`;
  drawHero(pool);
  for (const card of CARDS) {
    say(card.value, card.show(pool.now[card.lines[0]]));
    say(card.more, card.also(pool.now));
    say(card.under, card.note(pool.now));
    draw(card, pool.series);
  }
  drawWorkers(pool.workers);
  drawEvents(pool.events);
}

// -- hearing --------------------------------------------------------------------------------

function listen() {
  if (stream) stream.close();
  stream = new EventSource("events?" + new URLSearchParams({pool: chosen, window: span}));
  stream.onmessage = (message) => {
    heard = Date.now();
    judge();
    show(JSON.parse(message.data));
  };
  stream.onerror = () => {  // refused for good: the browser does not try again, so we do
    if (stream.readyState === EventSource.CLOSED) setTimeout(listen, RETRY);
    judge();
  };
}

function judge() {  // what is shown: is it now, or when?
  const since = heard || tried, cut = stream.readyState !== EventSource.OPEN;
  const old = Date.now() - since > SILENCE || (heard && cut);
  document.body.classList.toggle("stale", !!(old && heard));
  $("line").hidden = !old;
  if (!old) return;
  const when = clock(since / 1000);
  const below = "Below is what was last seen.";
  say($("line"), !heard ? `No connection since ${when}, trying again \u2026`
    : cut ? `Disconnected since ${when}, trying again \u2026 ${below}`
    : `No news since ${when}: the process may be stopped, or too busy to answer. ${below}`);
  if (!heard) say($("empty"), "Nothing to show yet.");
}

function choose(pool, window) {
  chosen = pool;
  span = window;
  history.replaceState(null, "", "?" + new URLSearchParams({pool: chosen, window: span}));
}

for (const box of document.querySelectorAll("input[name=window]")) {
  box.checked = +box.value === span;
  box.onchange = () => { choose(chosen, +box.value); listen(); };
}
$("pool").onchange = () => { choose($("pool").value, span); listen(); };
setInterval(judge, 1000);
listen();
"""
