"use strict";
// The page of a compilation: six panes of linked lines. Only the rows in sight are elements, whatever a pane holds.
const ROW = 18, EXTRA = 12;
const TONES = {python: "#0b6bcb", torch: "#a85100", aten: "#7a2fb0", loops: "#0f6a4d", fused: "#b02340", code: "#46556a"};
const TOKEN = /(#.*$|\/\/.*$)|('[^']*'|"[^"]*")|\b(def|return|for|in|if|else|class|import|from|self|with|lambda|float|auto|void|const|int64_t|static_cast|del|as|None|True|False)\b|\b((?:f|bf|i|u|c)(?:8|16|32|64|128)\[[^\]]*\])|\b(\d[\w.]*)\b/g;
const errors = [];
window.addEventListener("error", event => errors.push(String(event.message)));

const escapeText = text => text.replace(/[&<>"]/g, one => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[one]));
const colour = text => {
  let out = "", at = 0;
  for (const m of text.matchAll(TOKEN)) {
    const kind = m[1] ? "c" : m[2] ? "s" : m[3] ? "k" : m[4] ? "t" : "n";
    out += escapeText(text.slice(at, m.index)) + `<i class="${kind}">${escapeText(m[0])}</i>`;
    at = m.index + m[0].length;
  }
  return out + escapeText(text.slice(at));
};
const element = (tag, className, text) => {
  const one = document.createElement(tag);
  if (className) one.className = className;
  if (text !== undefined) one.textContent = text;
  return one;
};
const scaled = (value, unit) => {
  if (value === null || value === undefined) return "–";
  let at = 0;
  while (value >= 1000 && at < 5) { value /= 1000; at++; }
  return `${at || value % 1 ? value.toPrecision(3) : value} ${["", "k", "M", "G", "T", "P"][at]}${unit}`;
};
const time = s => s === null ? "–" : s < 1e-6 ? `${(s * 1e9).toPrecision(3)} ns` : s < 1e-3 ? `${(s * 1e6).toPrecision(3)} µs` : s < 1 ? `${(s * 1e3).toPrecision(3)} ms` : `${s.toPrecision(3)} s`;

class Links {
  // Parents of every entity, and the way back down.
  constructor(up, weak) {
    this.up = up; this.weak = weak;
    this.down = up.map(() => []); this.below = up.map(() => []);
    up.forEach((parents, one) => parents.forEach(parent => this.down[parent].push(one)));
    weak.forEach((parents, one) => parents.forEach(parent => this.below[parent].push(one)));
  }
  walk(start, next) {
    const seen = new Set(start), stack = [...seen];
    while (stack.length) for (const other of next(stack.pop())) if (!seen.has(other)) { seen.add(other); stack.push(other); }
    return seen;
  }
  around(one) {
    // What `one` came from and became; `via` are the lines of the callers above it.
    const above = this.walk([one], at => this.up[at]);
    const below = this.walk([one, ...this.below[one]], at => this.down[at]);
    const lit = new Set([...above, ...below]), via = new Set();
    for (const at of above) for (const caller of this.weak[at]) if (!lit.has(caller)) via.add(caller);
    return {lit, via};
  }
}

class Pane {
  constructor(data, app) {
    Object.assign(this, data);
    this.app = app; this.shown = new Map(); this.found = new Set();
    this.rows = []; this.rowOf = new Int32Array(this.lines.length);
    const heads = new Map(this.sections.map((one, at) => [one.first, at]));
    const titled = this.sections.length > 1 || this.name === "python";
    this.lines.forEach((_, line) => {
      if (titled && heads.has(line)) this.rows.push(-1 - heads.get(line));
      this.rowOf[line] = this.rows.push(line) - 1;
    });
    this.linesOf = new Map();
    this.of.forEach((one, line) => { if (one >= 0) (this.linesOf.get(one) || this.linesOf.set(one, []).get(one)).push(line); });
    this.build();
  }
  build() {
    const root = this.root = element("section", "pane");
    root.id = `pane-${this.name}`; root.style.setProperty("--tone", TONES[this.name]);
    const head = element("h2", "", this.title), about = element("small", "", this.about), zoom = element("button", "", "⤢");
    zoom.setAttribute("aria-label", `only ${this.title}`); zoom.title = "only this pane, and back";
    zoom.onclick = () => this.app.only(this.name);
    head.append(about, zoom);
    this.jump = element("div", "jump");
    this.chips = this.sections.length > 1 ? this.sections.map(one => {
      const chip = element("button", "", one.title);
      chip.append(element("b")); chip.onclick = () => this.toLine(this.firstLit(one) ?? one.first, true);
      this.jump.append(chip);
      return chip;
    }) : [];
    const stage = element("div", "stage");
    this.view = element("div", "view"); this.view.tabIndex = 0; this.view.setAttribute("role", "group");
    this.view.setAttribute("aria-label", `${this.title}: ${this.about}. Arrow keys choose a line.`);
    this.body = element("div", "rows"); this.body.style.height = `${this.rows.length * ROW}px`;
    const longest = this.lines.reduce((most, line) => Math.max(most, line.length), 0);
    this.body.style.width = `${Math.max(1, longest) * 7.3 + 26}px`;
    this.ticks = element("canvas", "ticks");
    this.view.append(this.body); stage.append(this.view, this.ticks);
    root.append(head, ...(this.chips.length ? [this.jump] : []), stage);
    this.view.addEventListener("scroll", () => this.later(), {passive: true});
    this.body.addEventListener("click", event => { const row = event.target.closest(".row"); if (row && row.dataset.line) this.app.choose(this, Number(row.dataset.line)); });
    this.view.addEventListener("keydown", event => this.key(event));
    this.ticks.addEventListener("click", event => { this.view.scrollTop = event.offsetY / this.ticks.clientHeight * this.view.scrollHeight - this.view.clientHeight / 2; });
    new ResizeObserver(() => { this.later(); this.mark(); }).observe(this.view);
  }
  later() { if (!this.waiting) { this.waiting = true; requestAnimationFrame(() => { this.waiting = false; this.draw(); }); } }
  draw(afresh) {
    const first = Math.max(0, Math.floor(this.view.scrollTop / ROW) - EXTRA);
    const last = Math.min(this.rows.length, Math.ceil((this.view.scrollTop + this.view.clientHeight) / ROW) + EXTRA);
    if (afresh) { this.body.textContent = ""; this.shown.clear(); }
    for (const [at, one] of this.shown) if (at < first || at >= last) { one.remove(); this.shown.delete(at); }
    const fresh = document.createDocumentFragment();
    for (let at = first; at < last; at++) if (!this.shown.has(at)) { const one = this.row(at); this.shown.set(at, one); fresh.append(one); }
    this.body.append(fresh);
    this.here();
  }
  row(at) {
    const line = this.rows[at], one = element("div", "row");
    one.style.top = `${at * ROW}px`;
    if (line < 0) { one.classList.add("head"); one.textContent = this.sections[-1 - line].title; return one; }
    const entity = this.of[line];
    if (line in this.comments) one.classList.add("can");
    one.innerHTML = colour(this.lines[line]); one.dataset.line = line;
    one.classList.add(entity < 0 ? "dead" : "can");  // a comment can be clicked too: it is the Python line it names
    if (entity >= 0) {
      if (entity === this.app.chosen) one.classList.add("chosen");
      if (this.app.lit.has(entity)) one.classList.add("lit");
      else if (this.app.via.has(entity)) one.classList.add("via");
    }
    if (this.found.has(line)) one.classList.add("found");
    return one;
  }
  litLines() { return [...this.app.lit].flatMap(one => this.linesOf.get(one) || []).sort((a, b) => a - b); }
  end(section) { const next = this.sections[this.sections.indexOf(section) + 1]; return next ? next.first : this.lines.length; }
  firstLit(section) { return this.marked.find(line => line >= section.first && line < this.end(section)); }
  refresh(phase, keep) {
    this.marked = this.litLines();
    this.sections.forEach((one, at) => {
      const chip = this.chips[at], count = this.marked.filter(line => line >= one.first && line < this.end(one)).length;
      if (chip) { chip.lastChild.textContent = count || ""; chip.classList.toggle("lit", count > 0); }
    });
    if (!keep && this.marked.length && !this.marked.some(line => this.inSight(line))) {
      const same = this.sections.find(one => phase && one.phase === phase && this.firstLit(one) !== undefined);
      this.toLine(same ? this.firstLit(same) : this.marked[0]);
    }
    this.draw(true); this.mark();
  }
  inSight(line) { const y = this.rowOf[line] * ROW; return y >= this.view.scrollTop && y + ROW <= this.view.scrollTop + this.view.clientHeight; }
  toLine(line, top) { this.view.scrollTop = Math.max(0, this.rowOf[line] * ROW - (top ? ROW : this.view.clientHeight / 3)); this.later(); }
  here() {
    if (!this.chips.length) return;
    const row = this.rows[Math.min(this.rows.length - 1, Math.floor(this.view.scrollTop / ROW + 1))];
    const line = row < 0 ? this.sections[-1 - row].first : row;
    const at = this.sections.findLastIndex(one => one.first <= line);
    if (at === this.at) return;
    this.at = at;
    this.chips.forEach((chip, index) => chip.classList.toggle("here", index === at));
    const chip = this.chips[at];
    if (chip) this.jump.scrollLeft = chip.offsetLeft - this.jump.clientWidth / 3;
  }
  mark() {
    const high = this.ticks.clientHeight, context = this.ticks.getContext("2d");
    this.ticks.width = 9; this.ticks.height = high;
    for (const [lines, tone] of [[[...this.found], "#d9730d"], [this.marked || [], TONES[this.name]]]) {
      context.fillStyle = tone;
      for (const line of lines) context.fillRect(1, Math.floor(this.rowOf[line] / this.rows.length * (high - 2)), 8, 2);
    }
  }
  key(event) {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    const start = this.app.pane === this ? this.app.line : Math.max(0, this.rows[Math.floor(this.view.scrollTop / ROW)]) - step;
    for (let line = start + step; line >= 0 && line < this.lines.length; line += step)
      if (this.of[line] >= 0 && this.of[line] !== this.app.chosen) { this.app.choose(this, line); if (!this.inSight(line)) this.toLine(line); return; }
  }
}

class App {
  constructor(data) {
    this.data = data; this.links = new Links(data.up, data.weak);
    this.chosen = -1; this.lit = new Set(); this.via = new Set();
    this.panes = data.panes.map(one => new Pane(one, this));
    this.visible = new Set(data.panes.map(one => one.name));
    this.place = document.getElementById("panes");
    this.place.append(...this.panes.map(one => one.root));
    this.kernels = new Kernels(data, this);
    this.chips(); this.layout(); this.searching();
    document.addEventListener("keydown", event => {
      const typing = event.target.tagName === "INPUT";
      if (event.key === "Escape") this.clear();
      if (event.key === "/" && !typing) { event.preventDefault(); document.getElementById("search").focus(); }
    });
    const start = data.kernels.reduce((best, one) => one.bytes_unfused - one.bytes_moved > (best ? best.bytes_unfused - best.bytes_moved : -1) ? one : best, null);
    if (start) this.select(start.entity); else this.clear();
  }
  chips() {
    const group = document.querySelector(".chips");
    for (const pane of this.panes) {
      const chip = element("button", "", pane.title);
      chip.setAttribute("aria-pressed", "true"); chip.dataset.pane = pane.name;
      chip.onclick = () => { const on = this.visible.has(pane.name); if (on && this.visible.size === 1) return; this.visible[on ? "delete" : "add"](pane.name); this.layout(); };
      group.append(chip);
    }
  }
  only(name) {
    this.visible = this.visible.size === 1 ? new Set(this.panes.map(one => one.name)) : new Set([name]);
    this.layout();
  }
  layout() {
    const count = this.visible.size, rows = count > 3 ? 2 : 1;
    this.place.style.gridTemplateColumns = `repeat(${Math.ceil(count / rows)},minmax(0,1fr))`;
    this.place.style.gridTemplateRows = `repeat(${rows},minmax(0,1fr))`;
    for (const pane of this.panes) pane.root.hidden = !this.visible.has(pane.name);
    for (const chip of document.querySelectorAll(".chips button")) chip.setAttribute("aria-pressed", this.visible.has(chip.dataset.pane));
    for (const pane of this.panes) pane.later();
  }
  choose(pane, line) {
    if (line in pane.comments) return this.select(pane.comments[line]);
    const entity = pane.of[line];
    if (entity < 0) return;
    this.pane = pane; this.line = line;
    const section = pane.sections[pane.sections.findLastIndex(one => one.first <= line)];
    this.select(entity, pane, section && section.phase);
  }
  select(entity, from, phase) {
    this.chosen = entity; Object.assign(this, this.links.around(entity));
    if (!from) {
      this.pane = this.panes.find(one => one.linesOf.has(entity)); this.line = this.pane ? this.pane.linesOf.get(entity)[0] : 0;
      const section = this.pane && this.pane.sections[this.pane.sections.findLastIndex(one => one.first <= this.line)];
      phase = section && section.phase;
    }
    for (const pane of this.panes) pane.refresh(phase, pane === from);
    this.kernels.refresh();
  }
  clear() {
    this.chosen = -1; this.lit = new Set(); this.via = new Set(); this.pane = null;
    for (const pane of this.panes) pane.refresh("", true);
    this.kernels.refresh();
  }
  searching() {
    const input = document.getElementById("search"), count = document.getElementById("count");
    let hits = [], at = -1;
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase(); hits = []; at = -1;
      for (const pane of this.panes) {
        pane.found = new Set();
        if (wanted) pane.lines.forEach((line, index) => { if (line.toLowerCase().includes(wanted)) { pane.found.add(index); hits.push([pane, index]); } });
        pane.draw(true); pane.mark();
      }
      count.textContent = wanted ? `${hits.length} lines` : "";
    });
    input.addEventListener("keydown", event => {
      if (event.key !== "Enter" || !hits.length) return;
      at = (at + (event.shiftKey ? hits.length - 1 : 1)) % hits.length;
      const [pane, line] = hits[at];
      if (!this.visible.has(pane.name)) { this.visible.add(pane.name); this.layout(); }
      count.textContent = `${at + 1} of ${hits.length}`;
      this.choose(pane, line); pane.toLine(line);
    });
  }
}

class Kernels {
  constructor(data, app) {
    this.app = app; this.device = data.device;
    this.all = [...data.kernels].sort((a, b) => (b.floor_seconds || 0) - (a.floor_seconds || 0));
    this.byEntity = new Map(this.all.map(one => [one.entity, one]));
    const most = Math.max(...this.all.map(one => one.floor_seconds || 0), 1e-30), list = document.getElementById("kernels");
    this.items = this.all.map(one => {
      const item = element("li"), button = element("button"), bar = element("div", "bar"), fill = element("i", one.bound);
      fill.style.width = `${100 * (one.floor_seconds || 0) / most}%`; bar.append(fill);
      const from = one.sources.length ? ` · ${one.sources[0].file}:${one.sources[0].line}` : "";
      button.append(element("b", "", one.name), bar, element("span", "", `${time(one.floor_seconds)} · ${scaled(one.bytes_moved, "B")} · ${scaled(one.flops, "FLOP")}${from}`));
      button.title = `${one.loops}, graph ${one.graph}, ${one.phase}`; button.onclick = () => app.select(one.entity); button.dataset.entity = one.entity;
      item.append(button); list.append(item);
      return button;
    });
    this.details = document.getElementById("details");
    this.roof();
  }
  roof() {
    const points = this.all.filter(one => one.intensity > 0 && one.bound !== "unknown");
    const place = document.getElementById("roof"), wide = 316, high = 128, left = 40, low = 22;
    if (!points.length) { place.remove(); this.dots = []; return; }
    const band = this.device.bytes_per_second, peaks = [...new Set(points.map(one => one.peak))].sort((a, b) => a - b);
    const xs = points.map(one => one.intensity).concat(peaks.map(one => one / band));
    const x0 = Math.floor(Math.log10(Math.min(...xs)) - 0.1), x1 = Math.ceil(Math.log10(Math.max(...xs)) + 0.1);
    const y1 = Math.log10(peaks[peaks.length - 1]) + 0.25, y0 = Math.min(x0 + Math.log10(band), y1 - 1);
    const x = value => left + (Math.log10(value) - x0) / (x1 - x0) * (wide - left - 6);
    const y = value => high - low - (Math.log10(value) - y0) / (y1 - y0) * (high - low - 8);
    let out = "";
    const every = Math.ceil((x1 - x0) / 6);
    for (let at = x0; at <= x1; at += every) out += `<line x1="${x(10 ** at)}" x2="${x(10 ** at)}" y1="8" y2="${high - low}" stroke="#eef1f5"/><text x="${x(10 ** at)}" y="${high - 10}" text-anchor="middle">${at < 3 ? 10 ** at : `${10 ** (at - 3)}k`}</text>`;
    out += `<text x="${wide - 6}" y="${high}" text-anchor="end">FLOP per byte</text>`;
    out += `<line x1="${x(10 ** x0)}" y1="${y(band * 10 ** x0)}" x2="${x(peaks[peaks.length - 1] / band)}" y2="${y(peaks[peaks.length - 1])}" stroke="#b85800" stroke-width="1.4"/>`;
    for (const peak of peaks) out += `<line x1="${x(peak / band)}" x2="${wide - 6}" y1="${y(peak)}" y2="${y(peak)}" stroke="#0b6bcb" stroke-width="1.4"/><text x="2" y="${y(peak) + 3}">${peak >= 1e12 ? `${Math.round(peak / 1e11) / 10}T` : `${Math.round(peak / 1e9)}G`}</text>`;
    const most = Math.max(...points.map(one => one.floor_seconds));
    for (const one of points) out += `<circle data-entity="${one.entity}" cx="${x(one.intensity)}" cy="${y(Math.min(one.peak, one.intensity * band))}" r="${2.5 + 5 * Math.sqrt(one.floor_seconds / most)}" fill="${one.bound === "memory" ? "#b85800" : "#0b6bcb"}"/>`;
    place.innerHTML = `<svg viewBox="0 0 ${wide} ${high + 4}" role="img" aria-label="Roofline: each kernel at its arithmetic intensity">${out}</svg>`;
    this.dots = [...place.querySelectorAll("circle")];
    for (const dot of this.dots) dot.addEventListener("click", () => this.app.select(Number(dot.dataset.entity)));
  }
  refresh() {
    const lit = this.app.lit, ours = this.all.filter(one => lit.has(one.entity));
    for (const one of this.items) one.classList.toggle("lit", lit.has(Number(one.dataset.entity)));
    for (const dot of this.dots) dot.classList.toggle("on", lit.has(Number(dot.dataset.entity)));
    const first = this.items.find(one => one.classList.contains("lit"));
    if (first) { const list = first.closest("ul"), y = first.parentNode.offsetTop; if (y < list.scrollTop || y > list.scrollTop + list.clientHeight - 50) list.scrollTop = y - 8; }
    this.details.textContent = "";
    if (this.app.chosen < 0) {
      this.details.append(element("p", "", "Choose a line in any pane: what it came from lights up on its left, what it became on its right. Escape clears, / finds."));
      return;
    }
    const kernel = this.byEntity.get(this.app.chosen);
    if (kernel) this.kernel(kernel); else this.line(ours);
  }
  kernel(one) {
    const rows = [["moves", scaled(one.bytes_moved, "B")], ["without fusion", scaled(one.bytes_unfused, "B")], ["computes", scaled(one.flops, "FLOP")],
      ["intensity", one.intensity === null ? "–" : `${one.intensity.toPrecision(3)} FLOP/B`], ["at best", time(one.floor_seconds)], ["operators", String(one.operators)]];
    this.details.append(element("h3", "", one.name), this.table(rows, one.bound));
    this.details.append(element("p", "", `${one.kind} ${one.loops}, graph ${one.graph}, ${one.phase}. Caused by:`), this.sources(one.sources));
  }
  table(rows, bound) {
    const list = element("dl");
    for (const [name, value] of rows) list.append(element("dt", "", name), element("dd", "", value));
    if (bound) { const dd = element("dd"); dd.append(element("span", bound, bound)); list.append(element("dt", "", "bound by"), dd); }
    return list;
  }
  line(ours) {
    const pane = this.app.pane;
    this.details.append(element("h3", "", pane ? pane.lines[this.app.line].trim() : ""));
    if (ours.length) {
      const sum = name => ours.reduce((total, one) => total + (one[name] || 0), 0);
      this.details.append(element("p", "", ours.length === 1 ? "Runs in one kernel:" : `Runs in ${ours.length} kernels, which in all:`));
      this.details.append(this.table([["move", scaled(sum("bytes_moved"), "B")], ["compute", scaled(sum("flops"), "FLOP")], ["at best", time(sum("floor_seconds"))]], ours.length === 1 ? ours[0].bound : ""));
    } else this.details.append(element("p", "", "No kernel computes this: it is an input, a view, or was folded away."));
    const seen = new Map();
    for (const one of ours) for (const source of one.sources) seen.set(source.entity, source);
    const above = [...seen.values()].filter(one => this.app.lit.has(one.entity) && one.entity !== this.app.chosen);
    if (above.length) this.details.append(element("p", "", "From:"), this.sources(above));
    if (ours.length > 0) {
      const list = element("ul");
      for (const one of ours.slice(0, 8)) { const button = element("button", "link"); button.append(element("span", "", one.name), element("code", "", `${time(one.floor_seconds)} · ${one.bound} · ${one.phase}`)); button.onclick = () => this.app.select(one.entity); list.append(button); }
      this.details.append(element("p", "", ours.length > 8 ? `Its longest 8 of ${ours.length} kernels:` : "Its kernels:"), list);
    }
  }
  sources(all) {
    const list = element("ul");
    for (const one of all.slice(0, 12)) {
      const button = element("button", "link");
      button.append(element("span", "", `${one.file}:${one.line}`), element("code", "", one.code));
      button.onclick = () => this.app.select(one.entity);
      list.append(button);
    }
    if (all.length > 12) list.append(element("p", "", `and ${all.length - 12} more lines`));
    return list;
  }
}

window.addEventListener("DOMContentLoaded", () => {
  const app = new App(JSON.parse(document.getElementById("view").textContent));
  window.__ridgeline = {
    ready: true, errors, app,
    lit: () => Object.fromEntries(app.panes.map(one => [one.name, one.marked])),
    rows: () => Object.fromEntries(app.panes.map(one => [one.name, one.shown.size])),
  };
});
