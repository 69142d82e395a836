"use strict";
// Moving about the timeline: wheel, pinch, drag, keys, buttons; choosing an event, measuring, searching; the address.
const LEAST = 20; // ns: the narrowest view

class Timeline {
  constructor(data) {
    this.data = data;
    this.view = document.getElementById("timeline-view");
    this.canvas = document.getElementById("timeline-canvas");
    this.spacer = document.getElementById("timeline-spacer");
    this.details = document.getElementById("timeline-details");
    this.tip = document.getElementById("timeline-tip");
    this.range = document.getElementById("timeline-range");
    this.counts = document.getElementById("timeline-count");
    this.box = document.getElementById("timeline-search");
    this.painter = new Painter(this.canvas, data);
    this.pointers = new Map();
    this.instances = null;
    this.measuring = false;
    this.bind();
    this.resize();
    this.follow();
  }

  bind() {
    new ResizeObserver(() => this.resize()).observe(this.view);
    this.view.addEventListener("scroll", () => { this.painter.scroll = this.view.scrollTop; this.draw(); });
    this.canvas.addEventListener("wheel", event => this.wheel(event), { passive: false });
    this.canvas.addEventListener("pointerdown", event => this.press(event));
    this.canvas.addEventListener("pointermove", event => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, event => this.release(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    this.canvas.addEventListener("dblclick", () => this.zoomToSelected());
    this.canvas.addEventListener("keydown", event => this.key(event));
    this.box.addEventListener("input", () => this.search(this.box.value));
    this.box.addEventListener("keydown", event => {
      if (event.key === "Enter") this.next(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") { this.box.value = ""; this.search(""); }
    });
    const acts = {
      "zoom-in": () => this.zoom(0.5), "zoom-out": () => this.zoom(2), left: () => this.pan(-0.25), right: () => this.pan(0.25),
      fit: () => this.show(0, this.data.header.span), previous: () => this.next(-1), next: () => this.next(1), fold: () => this.fold(),
      measure: () => this.toggleMeasuring(),
    };
    document.querySelectorAll("[data-act]").forEach(button => button.addEventListener("click", acts[button.dataset.act]));
    document.querySelectorAll("[data-low]").forEach(button => button.addEventListener("click", () => this.visit(+button.dataset.low, +button.dataset.high)));
    window.addEventListener("hashchange", () => this.follow());
    this.details.addEventListener("click", event => {
      const to = event.target.closest("[data-event]");
      if (!to) return;
      this.choose(+to.dataset.event, true);
      this.canvas.focus({ preventScroll: true }); // the link is gone; the keys go on from the event
    });
  }

  resize() {
    const height = Math.min(this.painter.content + RULER + 6, Math.max(320, Math.min(680, window.innerHeight * 0.72)));
    this.view.style.height = `${height}px`;
    this.painter.resize(this.view.clientWidth, height);
    this.spacer.style.height = `${Math.max(0, this.painter.content + RULER + 4 - height)}px`;
    this.draw(true);
  }

  draw(now = false) {
    const { low, high } = this.painter;
    this.range.textContent = `${moment(low, high - low)} to ${moment(high, high - low)}: ${duration(high - low)}`;
    this.remember();
    if (now) this.painter.draw();
    else if (!this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => { this.waiting = false; this.painter.draw(); });
    }
  }

  // Shows [low, high) of the capture, held within it.
  show(low, high) {
    const span = this.data.header.span, wide = Math.min(Math.max(high - low, LEAST), Math.max(span, LEAST));
    const start = Math.min(Math.max(low, 0), Math.max(span - wide, 0));
    this.painter.low = start;
    this.painter.high = start + wide;
    this.draw();
  }

  // Shows a span with some room around it, the timeline in sight.
  visit(low, high) {
    const room = Math.max(0.1 * (high - low), LEAST);
    this.show(low - room, high + room);
    document.getElementById("timeline").scrollIntoView({ behavior: "instant" });
    this.canvas.focus({ preventScroll: true });
  }

  zoom(factor, x = null) {
    const painter = this.painter, wide = (painter.high - painter.low) * factor;
    const held = x === null ? (painter.gutter + painter.width) / 2 : Math.max(x, painter.gutter);
    const share = (held - painter.gutter) / (painter.width - painter.gutter), time = painter.time(held);
    const kept = Math.max(wide, LEAST);
    this.show(time - share * kept, time + (1 - share) * kept);
  }

  pan(share) {
    const { low, high } = this.painter, by = (high - low) * share;
    this.show(low + by, high + by);
  }

  wheel(event) {
    const active = document.activeElement === this.canvas;
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
    if (!active && !event.ctrlKey && !event.metaKey && !sideways) return; // the page scrolls
    event.preventDefault();
    const amount = event.deltaMode === 1 ? 18 : 1;
    if (sideways) this.pan((event.deltaX || event.deltaY) * amount / this.painter.width);
    else this.zoom(Math.exp(event.deltaY * amount * (event.ctrlKey ? 0.01 : 0.002)), this.at(event)[0]);
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.at(event));
    this.moved = this.pointers.size > 1;
    this.from = this.at(event);
    const [x, y] = this.from;
    this.mode = x >= this.painter.gutter && (y < RULER || event.shiftKey || this.measuring) ? "measure" : "move";
  }

  move(event) {
    const at = this.at(event), last = this.pointers.get(event.pointerId);
    if (!last) return this.hover(at);
    if (this.pointers.size === 2) this.pinch(event.pointerId, at);
    else {
      if (Math.hypot(at[0] - this.from[0], at[1] - this.from[1]) > 4) this.moved = true;
      if (this.moved && this.mode === "measure") this.stretch(at);
      else if (this.moved) {
        this.pan((last[0] - at[0]) / (this.painter.width - this.painter.gutter));
        if (event.pointerType !== "touch") this.view.scrollTop += last[1] - at[1];
        this.tip.hidden = true;
      }
    }
    return this.pointers.set(event.pointerId, at);
  }

  pinch(id, at) {
    const [other] = [...this.pointers].filter(([one]) => one !== id).map(([, place]) => place);
    const before = Math.abs(this.pointers.get(id)[0] - other[0]), after = Math.abs(at[0] - other[0]);
    if (before > 4 && after > 4) this.zoom(before / after, (at[0] + other[0]) / 2);
  }

  release(event) {
    if (!this.pointers.delete(event.pointerId) || event.type !== "pointerup") return;
    if (!this.moved) this.click(this.at(event));
    else if (this.mode === "measure") this.tellSpan();
  }

  // The span between where the pointer went down and where it is; from the ruler all lanes, else those it crossed.
  stretch([x, y]) {
    const { painter } = this, [x0, y0] = this.from, times = [x0, x].map(one => painter.time(Math.min(Math.max(one, painter.gutter), painter.width)));
    const span = { low: Math.round(Math.min(...times)), high: Math.round(Math.max(...times)), lanes: null };
    if (y0 >= RULER) span.lanes = painter.lanesBetween(Math.min(y0, y), Math.max(y0, y));
    painter.span = span.high > span.low ? span : null;
    this.tip.hidden = true;
    this.draw();
  }

  // Measures all lanes over the chosen event, or over what is in view.
  measureHere() {
    const { data, painter } = this, i = painter.selected;
    const [low, high] = i >= 0 && data.end[i] > data.start[i] ? [data.start[i], data.end[i]] : [painter.low, painter.high];
    painter.span = { low, high, lanes: null };
    this.tellSpan();
  }

  tellSpan() {
    const { painter } = this;
    if (painter.span) {
      this.pick(-1);
      this.details.innerHTML = describeSpan(this.data, painter.span);
    }
    this.draw();
  }

  toggleMeasuring() {
    this.measuring = !this.measuring;
    document.querySelector("[data-act=measure]").setAttribute("aria-pressed", this.measuring);
    if (!this.measuring) this.choose(-1);
  }

  click([x, y]) {
    const lane = this.painter.laneAt(y);
    if (x < this.painter.gutter && lane && lane.rows > 1) {
      lane.open = !lane.open;
      this.painter.layout();
      this.resize();
    } else this.choose(this.painter.hit(x, y));
  }

  fold() {
    const open = !this.data.lanes.some(lane => lane.open && lane.rows > 1);
    for (const lane of this.data.lanes) lane.open = open;
    this.painter.layout();
    this.resize();
  }

  hover([x, y]) {
    const i = this.painter.hit(x, y);
    const idle = x < this.painter.gutter ? "default" : y < RULER || this.measuring ? "crosshair" : "grab";
    this.canvas.style.cursor = i >= 0 ? "pointer" : idle;
    this.tip.hidden = i < 0;
    if (i < 0) return;
    const inputs = shapes(this.data, i);
    this.tip.textContent = `${shorten(this.data.names[this.data.name[i]], 90)} · ${duration(this.data.end[i] - this.data.start[i])}${inputs ? ` · ${inputs}` : ""}`;
    const right = x > this.painter.width / 2;
    this.tip.style.left = right ? "auto" : `${x + 14}px`;
    this.tip.style.right = right ? `${this.painter.width - x + 10}px` : "auto";
    this.tip.style.top = `${y + 16}px`;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = {
      w: () => this.zoom(0.7), s: () => this.zoom(1 / 0.7), a: () => this.pan(-0.15), d: () => this.pan(0.15),
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), f: () => this.show(0, this.data.header.span),
      0: () => this.show(0, this.data.header.span), "/": () => this.box.focus(), Escape: () => this.choose(-1),
      m: () => this.measureHere(), Enter: () => this.zoomToSelected(), ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1),
      ArrowDown: () => this.climb(1), ArrowUp: () => this.climb(-1),
      PageDown: () => { this.view.scrollTop += 200; }, PageUp: () => { this.view.scrollTop -= 200; },
    };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  // Arrow keys: the next event of the row, or the event above or below at the same time.
  step(by) {
    const { data, painter } = this, chosen = painter.selected;
    if (chosen < 0) return this.choose(this.firstVisible(), true);
    const row = rowOf(data, chosen), to = chosen + by;
    return to >= data.rowFirst[row] && to < data.rowFirst[row + 1] ? this.choose(to, true) : undefined;
  }

  climb(by) {
    const { data, painter } = this, chosen = painter.selected;
    if (chosen < 0) return this.choose(this.firstVisible(), true);
    const time = Math.max(data.start[chosen], Math.min(painter.low, data.end[chosen]));
    for (let row = rowOf(data, chosen) + by; row >= 0 && row < data.rowFirst.length - 1; row += by) {
      const found = nearest(data, row, time, (painter.high - painter.low) / 4);
      if (found >= 0) return this.choose(found, true);
    }
    return undefined;
  }

  firstVisible() {
    const { data, painter } = this;
    for (let row = 0; row < data.rowFirst.length - 1; row++) {
      const i = firstEnding(data, data.rowFirst[row], data.rowFirst[row + 1], painter.low);
      if (i < data.rowFirst[row + 1] && data.start[i] < painter.high) return i;
    }
    return -1;
  }

  zoomToSelected() {
    const i = this.painter.selected;
    if (i < 0) return;
    const wide = Math.max(this.data.end[i] - this.data.start[i], LEAST);
    this.show(this.data.start[i] - 0.6 * wide, this.data.end[i] + 0.6 * wide);
  }

  // Makes an event the chosen one, with its arrows; -1 for none.
  pick(i) {
    this.painter.selected = i;
    this.painter.arrows = arrowsOf(this.data, i).slice(0, MOST_ARROWS);
  }

  choose(i, reveal = false) {
    this.pick(i);
    this.painter.span = null;
    if (i >= 0 && reveal) this.reveal(i);
    this.details.innerHTML = i < 0 ? '<p class="hint">Choose an event to see what it is.</p>' : describeEvent(this, i);
    this.draw();
  }

  // Brings an event into view, wide enough to be seen.
  reveal(i) {
    const { data, painter } = this, long = data.end[i] - data.start[i], wide = painter.high - painter.low;
    const lane = data.lanes[data.rowLane[rowOf(data, i)]];
    if (!lane.open) {
      lane.open = true;
      painter.layout();
      this.resize();
    }
    const middle = data.start[i] + long / 2, least = Math.max(long * 8, LEAST);
    if (long / wide < 0.004) this.show(middle - 15 * Math.max(long, 2), middle + 15 * Math.max(long, 2));
    else if (data.end[i] < painter.low || data.start[i] > painter.high) this.show(middle - Math.max(wide, least) / 2, middle + Math.max(wide, least) / 2);
    const { y } = painter.place(i);
    if (y < RULER || y > painter.height - 2 * ROW) this.view.scrollTop += y - painter.height / 2;
  }

  countNames() {
    if (this.instances) return this.instances;
    const { data } = this, count = new Uint32Array(data.names.length), sum = new Float64Array(data.names.length);
    for (let i = 0; i < data.n; i++) {
      count[data.name[i]]++;
      sum[data.name[i]] += data.end[i] - data.start[i];
    }
    this.instances = { count, sum };
    return this.instances;
  }

  // Marks every event whose name holds the text, whatever its case; returns how many. Segments are no events.
  search(text) {
    const { data, painter } = this, wanted = text.trim().toLowerCase();
    if (!wanted) painter.matched = null;
    else {
      const holds = Uint8Array.from(data.names, one => +one.toLowerCase().includes(wanted));
      const marks = new Uint32Array(data.n + 1);
      for (let i = 0; i < data.n; i++) marks[i + 1] = marks[i] + (data.role[i] & 64 ? 0 : holds[data.name[i]]);
      painter.matched = marks;
    }
    const found = painter.matched ? painter.matched[data.n] : 0;
    this.counts.textContent = wanted ? `${found.toLocaleString("en")} ${found === 1 ? "event" : "events"}${found ? `, ${duration(this.matchedTime())}` : ""}` : "";
    this.draw();
    return found;
  }

  matchedTime() {
    const { data, painter: { matched } } = this;
    let sum = 0;
    for (let i = 0; i < data.n; i++) if (matched[i + 1] > matched[i]) sum += data.end[i] - data.start[i];
    return sum;
  }

  // The next event found after the chosen one, in the page's order.
  next(by) {
    const { data, painter } = this, marks = painter.matched;
    if (!marks || !marks[data.n]) return;
    const total = marks[data.n], chosen = painter.selected;
    let at = chosen < 0 ? (by > 0 ? 0 : total - 1) : by > 0 ? marks[chosen + 1] : marks[chosen] - 1;
    at = (at + total) % total;
    const i = lower(marks, 0, data.n + 1, at + 1) - 1;
    this.choose(i, true);
    this.counts.textContent = `${(at + 1).toLocaleString("en")} of ${total.toLocaleString("en")} events`;
  }

  // The address keeps what is shown, so that a link to the page opens where it was copied. Browsers allow few changes.
  remember() {
    if (!page.ready || this.remembering) return;
    this.remembering = setTimeout(() => {
      this.remembering = null;
      const { low, high, selected } = this.painter, state = new URLSearchParams({ view: `${Math.round(low)}-${Math.round(high)}` });
      if (selected >= 0) state.set("event", selected);
      if (this.box.value) state.set("find", this.box.value);
      const untouched = low === 0 && high === this.data.header.span && [...state].length === 1;
      if (!untouched || location.hash.startsWith("#view=")) history.replaceState(null, "", `#${state}`);
    }, 400);
  }

  // Shows what an address asks for; one that asks for a section is not ours.
  follow() {
    const state = new URLSearchParams(location.hash.slice(1)), [, low, high] = /^(\d+)-(\d+)$/.exec(state.get("view")) || [];
    if (high === undefined) return;
    this.box.value = state.get("find") || "";
    this.search(this.box.value);
    const event = Number(state.get("event") ?? -1);
    if (Number.isInteger(event) && event >= 0 && event < this.data.n) this.choose(event, true);
    this.show(+low, +high);
    document.getElementById("timeline").scrollIntoView({ behavior: "instant" });
  }
}

function legend(data) {
  const present = new Set();
  for (let i = 0; i < data.n; i++) present.add(data.role[i] & 63);
  const chips = [...present].sort((a, b) => a - b).map(one => `<li><i style="background:${SHADES[one][0][0]}"></i>${escapeHtml(data.roles[one])}</li>`);
  if (data.critical[data.n]) chips.push('<li><i class="critical"></i>on the critical path</li>');
  for (const kind of arrowKinds(data)) chips.push(`<li><i class="arrow" style="background:${ARROWS[kind].colour}"></i>arrow: ${ARROWS[kind].label}</li>`);
  if (data.header.ranks.some(rank => rank.steps.length)) chips.push('<li><i class="step"></i>step</li>');
  document.getElementById("timeline-legend").innerHTML = chips.join("");
}

document.addEventListener("DOMContentLoaded", async () => {
  if (!document.getElementById("trace-header")) {
    page.ready = true;
    return;
  }
  const began = performance.now(), data = await readEvents(), timeline = new Timeline(data);
  legend(data);
  Object.assign(page, {
    count: data.n, data, timeline,
    setView: (low, high) => timeline.show(low, high),
    drawNow: () => timeline.painter.draw(),
    view: () => [timeline.painter.low, timeline.painter.high],
    ruler: () => timeline.painter.ticks.map(tick => tick.label),
    place: i => timeline.painter.place(i),
    loadMs: performance.now() - began, ready: true,
  });
});
