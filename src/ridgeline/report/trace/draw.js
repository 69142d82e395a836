"use strict";
// Drawing: a row's visible events by binary search; what is narrower than a pixel is merged into bars of its density.
const GUTTER = 188, ROW = 17, LANE_GAP = 7, RULER = 26, RANK = 24;
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif';
// [three shades, text] per role, in the order of header.roles.
const SHADES = [
  [["#c3d9f0", "#d3e4f5", "#b3cfea"], "#1b2430"], [["#e1e6ed", "#d9dfe7", "#e9edf2"], "#1b2430"],
  [["#f6e3b5", "#f9ebc9", "#f2d99c"], "#1b2430"], [["#f3b9c3", "#f6c7cf", "#efabb7"], "#1b2430"],
  [["#0b6bcb", "#0a5fb4", "#1f74c9"], "#ffffff"], [["#23845b", "#1d7550", "#1a6b49"], "#ffffff"],
  [["#b85800", "#ad5200", "#b55a06"], "#ffffff"], [["#8a4fbf", "#7d43b3", "#9159c4"], "#ffffff"],
  [["#5b6776", "#525d6b", "#4d5866"], "#ffffff"], [["#d6e8d0", "#e0eedb", "#cbe1c4"], "#1b2430"],
  [["#e6dfd3", "#ece7dd", "#dfd6c7"], "#1b2430"], [["#f4cdbf", "#f7d9ce", "#efbfae"], "#1b2430"],
];
const DENSITY = [0.3, 0.5, 0.75, 1];

class Painter {
  constructor(canvas, data) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.data = data;
    this.low = 0;
    this.high = data.header.span;
    this.scroll = 0;
    this.selected = -1;
    this.arrows = [];
    this.span = null;
    this.matched = null;
    this.briefs = [];
    this.context.font = FONT;
    this.letter = this.context.measureText("abcdefghijklmnopqrstuvwxyz_:0123").width / 30;
    this.layout();
  }

  // Positions of ranks and lanes below the ruler; a closed lane shows its first row alone.
  layout() {
    let y = 4;
    this.bands = [];
    this.data.header.ranks.forEach((rank, at) => {
      this.bands.push({ rank: at, y, height: RANK });
      y += RANK;
      for (const lane of this.data.lanes.filter(one => one.rank === at)) {
        const rows = lane.open ? lane.rows : Math.min(lane.rows, 1);
        lane.y = y;
        lane.height = rows * ROW + LANE_GAP;
        this.bands.push({ lane, y, height: lane.height });
        y += lane.height;
      }
      y += 6;
    });
    this.content = y;
  }

  resize(width, height) {
    const ratio = window.devicePixelRatio || 1;
    this.width = width;
    this.height = height;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.ratio = ratio;
    this.gutter = width < 640 ? 108 : GUTTER;
  }

  x(time) { return this.gutter + (time - this.low) * this.scale; }
  time(x) { return this.low + (x - this.gutter) / this.scale; }
  get scale() { return (this.width - this.gutter) / (this.high - this.low); }

  draw() {
    const began = performance.now(), c = this.context;
    c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    c.fillStyle = "#ffffff";
    c.fillRect(0, 0, this.width, this.height);
    c.font = FONT;
    c.textBaseline = "middle";
    this.ticks = ticks(this.low, this.high, this.width - this.gutter);
    this.grid();
    this.texts = [];
    for (const band of this.bands) {
      const y = band.y - this.scroll + RULER;
      if (y + band.height < RULER || y > this.height) continue;
      if (band.lane) this.lane(band.lane, y);
      else this.rank(band.rank, y);
    }
    this.labels();
    this.steps();
    this.selection();
    this.ruler();
    this.measured();
    const spent = performance.now() - began;
    page.draws.push(spent);
    if (page.draws.length > 1000) page.draws.shift();
    return spent;
  }

  grid() {
    const c = this.context;
    c.fillStyle = "#eef1f5";
    for (const tick of this.ticks) c.fillRect(Math.round(this.x(tick.time)), RULER, 1, this.height);
  }

  rank(at, y) {
    const c = this.context;
    c.fillStyle = "#eef3f9";
    c.fillRect(0, y, this.width, RANK - 4);
    c.fillStyle = "#1b2430";
    c.font = `600 ${FONT.replace("11px", "12px")}`;
    c.fillText(this.data.header.ranks[at].label, 8, y + RANK / 2 - 2);
    c.font = FONT;
  }

  lane(lane, y) {
    const c = this.context, shown = lane.open ? lane.rows : Math.min(lane.rows, 1);
    c.save();
    c.beginPath();
    c.rect(this.gutter, Math.max(RULER, y), this.width - this.gutter, this.height);
    c.clip();
    for (let k = 0; k < shown; k++) {
      const top = y + k * ROW;
      if (top + ROW > RULER && top < this.height) this.row(lane.firstRow + k, top);
    }
    c.restore();
    this.texts.push([lane, y, shown]);
    c.fillStyle = "#eef1f5";
    c.fillRect(0, y + lane.height - 4, this.width, 1);
  }

  // Lane names in the gutter, over whatever was drawn there.
  labels() {
    const c = this.context;
    for (const [lane, y] of this.texts) {
      c.fillStyle = "#ffffff";
      c.fillRect(0, Math.max(y, RULER), this.gutter - 1, lane.height - 4);
      c.fillStyle = lane.rows > 1 ? "#5b6776" : "#c3ccd6";
      triangle(c, 10, y + 8, lane.open && lane.rows > 1);
      c.fillStyle = "#1b2430";
      c.fillText(ends(lane.label, this.gutter - 26, this.letter), 20, y + 8);
    }
    c.fillStyle = "#dde3ea";
    c.fillRect(this.gutter - 1, RULER, 1, this.height);
  }

  row(row, y) {
    const { start, end, busy, role, critical, rowFirst } = this.data;
    const first = rowFirst[row], last = rowFirst[row + 1];
    const stop = lower(start, first, last, this.high), scale = this.scale, width = 1 / scale;
    let i = firstEnding(this.data, first, last, this.low);
    let bar = null;
    while (i < stop) {
      const x0 = this.x(start[i]), x1 = this.x(end[i]);
      if (x1 - x0 >= 1.5) {
        bar = this.flush(bar, y);
        this.box(i, x0, x1, y);
        i++;
        continue;
      }
      const column = Math.floor(x0), edge = this.time(column + 1);
      let j = gallop(start, i + 1, stop, edge);
      if (j - 1 > i && (end[j - 1] - start[j - 1]) * scale >= 1.5) j--;
      const level = Math.min(3, Math.floor(4 * (busy[j] - busy[i]) / width));
      const mark = critical[j] > critical[i];
      const dim = this.matched !== null && this.matched[j] === this.matched[i];
      const shade = this.heaviest(i, j);
      if (bar && bar.shade === shade && bar.level === level && bar.dim === dim && bar.mark === mark && bar.to === column) bar.to++;
      else {
        this.flush(bar, y);
        bar = { shade, level, dim, mark, from: column, to: column + 1 };
      }
      i = j;
    }
    this.flush(bar, y);
  }

  // The role that took most of the time among a few of the events i..j.
  heaviest(i, j) {
    const { role, start, end } = this.data;
    if (j - i === 1) return role[i] & 63;
    let best = role[i] & 63, most = -1;
    for (let k = i, step = Math.max(1, (j - i) >> 2); k < j; k += step) {
      if (end[k] - start[k] > most) {
        most = end[k] - start[k];
        best = role[k] & 63;
      }
    }
    return best;
  }

  flush(bar, y) {
    if (!bar) return null;
    const c = this.context;
    c.globalAlpha = bar.dim ? 0.12 : DENSITY[bar.level];
    c.fillStyle = SHADES[bar.shade][0][0];
    c.fillRect(bar.from, y, bar.to - bar.from, ROW - 2);
    if (bar.mark) {
      c.globalAlpha = bar.dim ? 0.16 : 1;
      c.fillStyle = "#c4314b";
      c.fillRect(bar.from, y + ROW - 4, bar.to - bar.from, 3);
    }
    c.globalAlpha = 1;
    return null;
  }

  box(i, x0, x1, y) {
    const c = this.context, { role, name, names, critical } = this.data;
    const from = Math.max(x0, this.gutter - 1), to = Math.min(x1, this.width + 1), wide = to - from;
    const [shades, ink] = SHADES[role[i] & 63];
    const dim = this.matched !== null && this.matched[i + 1] === this.matched[i];
    if (dim) c.globalAlpha = 0.16;
    c.fillStyle = shades[name[i] % 3];
    c.fillRect(from, y, wide > 3 ? wide - 0.75 : wide, ROW - 2);
    if (critical[i + 1] > critical[i]) {
      c.fillStyle = "#c4314b";
      c.fillRect(from, y + ROW - 4, wide, 3);
    }
    c.globalAlpha = 1;
    if (wide > 26) {
      c.fillStyle = dim ? "#8a94a0" : ink;
      const full = names[name[i]], room = wide - 7;
      c.fillText(full.length * this.letter <= room ? full : fit(this.brief(name[i]), room, this.letter), from + 4, y + 7.5);
    }
  }

  // A name without return type, namespaces and arguments, for boxes too narrow for all of it.
  brief(code) {
    return this.briefs[code] ??= brief(this.data.names[code]);
  }

  steps() {
    const c = this.context;
    c.fillStyle = "#5b6776";
    for (const rank of this.data.header.ranks) {
      const lanes = this.bands.filter(band => band.lane && this.data.header.ranks[band.lane.rank] === rank);
      if (!lanes.length) continue;
      const top = Math.max(RULER, lanes[0].y - this.scroll + RULER - RANK);
      const bottom = lanes[lanes.length - 1].y + lanes[lanes.length - 1].height - this.scroll + RULER;
      if (bottom < RULER || top > this.height) continue;
      let free = this.gutter;
      for (const [label, from, to] of rank.steps) {
        for (const edge of [from, to]) {
          const x = Math.round(this.x(edge));
          if (x < this.gutter || x > this.width) continue;
          for (let y = top; y < Math.min(bottom, this.height); y += 6) c.fillRect(x, y, 1, 3);
        }
        const x = Math.max(this.x(from), this.gutter) + 5, room = Math.min(this.x(to), this.width) - x - 3;
        if (room < 30 || lanes[0].y - this.scroll < RANK || x < free) continue;
        const text = fit(label.replace("ProfilerStep#", "step "), room, this.letter);
        c.fillText(text, Math.max(x, this.gutter + 4), lanes[0].y - this.scroll + RULER - RANK / 2 - 2);
        free = x + text.length * this.letter;
      }
    }
  }

  // A frame around the chosen event, its arrows, and frames around what they lead to.
  selection() {
    if (this.selected < 0) return;
    const c = this.context;
    c.save();
    c.beginPath();
    c.rect(this.gutter, RULER, this.width - this.gutter, this.height - RULER);
    c.clip();
    for (const arrow of this.arrows) drawArrow(this, arrow, this.selected);
    this.frame(this.selected, "#1b2430", 2);
    c.restore();
  }

  frame(i, colour, width) {
    const { x, y, width: wide } = this.place(i);
    this.context.lineWidth = width;
    this.context.strokeStyle = colour;
    this.context.strokeRect(x, y - 0.5, wide, ROW - 1);
  }

  // The measured span: what lies outside of it is veiled, its length stands in the ruler.
  measured() {
    if (!this.span) return;
    const c = this.context, left = Math.max(this.x(this.span.low), this.gutter), right = Math.min(this.x(this.span.high), this.width);
    c.fillStyle = "rgba(27,36,48,.10)";
    if (left > this.gutter) c.fillRect(this.gutter, RULER, Math.min(left, this.width) - this.gutter, this.height);
    if (right < this.width) c.fillRect(Math.max(right, this.gutter), RULER, this.width, this.height);
    c.fillStyle = "#0b6bcb";
    for (const x of [this.x(this.span.low), this.x(this.span.high)]) if (x >= this.gutter && x <= this.width) c.fillRect(Math.round(x) - 1, 0, 2, this.height);
    if (right <= left) return;
    c.fillRect(left, 0, right - left, 4);
    const text = duration(this.span.high - this.span.low), wide = text.length * this.letter + 12;
    const at = Math.min(Math.max((left + right - wide) / 2, this.gutter), this.width - wide);
    c.fillRect(at, 4, wide, RULER - 6);
    c.fillStyle = "#ffffff";
    c.fillText(text, at + 6, 14);
  }

  // Where an event is on the canvas. In a closed lane it is drawn on the lane's only row.
  place(i) {
    const row = rowOf(this.data, i), lane = this.data.lanes[this.data.rowLane[row]];
    const y = lane.y + (lane.open ? row - lane.firstRow : 0) * ROW - this.scroll + RULER;
    const x0 = Math.max(this.x(this.data.start[i]), this.gutter - 4), x1 = Math.min(this.x(this.data.end[i]), this.width + 4);
    return { x: x0, y, width: Math.max(x1 - x0, 2), height: ROW - 2, row };
  }

  ruler() {
    const c = this.context;
    c.fillStyle = "#f5f7fa";
    c.fillRect(0, 0, this.width, RULER - 1);
    c.fillStyle = "#dde3ea";
    c.fillRect(0, RULER - 1, this.width, 1);
    c.fillStyle = "#5b6776";
    for (const tick of this.ticks) {
      const x = Math.round(this.x(tick.time));
      c.fillRect(x, RULER - 7, 1, 6);
      c.fillText(tick.label, Math.min(x + 4, this.width - tick.label.length * this.letter - 6), 11);
    }
    c.fillStyle = "#f5f7fa";
    c.fillRect(0, 0, this.gutter - 1, RULER - 1);
    c.fillStyle = "#5b6776";
    c.fillText(fit("time from the start", this.gutter - 12, this.letter), 8, 12);
  }

  // The event under a point, or -1. Narrow events are easier to hit than they look: two pixels either side.
  hit(x, y) {
    if (x < this.gutter || y < RULER) return -1;
    for (const { lane } of this.bands) {
      if (!lane) continue;
      const down = y - (lane.y - this.scroll + RULER);
      const row = Math.floor(down / ROW);
      if (down < 0 || row >= (lane.open ? lane.rows : Math.min(lane.rows, 1))) continue;
      return nearest(this.data, lane.firstRow + row, this.time(x), 2.5 / this.scale);
    }
    return -1;
  }

  // The lanes of which something lies between two heights.
  lanesBetween(top, bottom) {
    const y = band => band.y - this.scroll + RULER;
    return new Set(this.bands.filter(band => band.lane && y(band) < bottom && y(band) + band.height > top).map(band => band.lane));
  }

  laneAt(y) {
    const found = this.bands.find(band => band.lane && y >= band.y - this.scroll + RULER && y < band.y + band.height - this.scroll + RULER);
    return y > RULER && found ? found.lane : null;
  }
}
