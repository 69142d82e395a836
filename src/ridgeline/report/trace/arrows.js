"use strict";
// Arrows: from a call to what it launched, from an operator to its backward, from what was waited for to what waited.
const ARROWS = {
  launch: { colour: "#1b2430", label: "launched" },
  backward: { colour: "#23845b", label: "forward to backward" },
  wait: { colour: "#c4314b", label: "waited for" },
};
const MOST_ARROWS = 200; // of one event: a graph's launch may have thousands

// Every arrow at an event: { from, to, kind, why, ns }.
function arrowsOf(data, i) {
  const out = [];
  if (i < 0) return out;
  if (data.partner[i] >= 0) out.push({ from: data.partner[i], to: i, kind: "launch" });
  if (data.forward[i] >= 0) out.push({ from: data.forward[i], to: i, kind: "backward" });
  for (let k = 0; k < data.n; k++) {
    if (data.partner[k] === i) out.push({ from: i, to: k, kind: "launch" });
    if (data.forward[k] === i) out.push({ from: i, to: k, kind: "backward" });
  }
  for (const [from, to, why, ns] of data.header.arrows) {
    if (from === i || to === i) out.push({ from, to, kind: "wait", why: data.header.why[why], ns });
  }
  return out;
}

// When an arrow leaves and when it arrives. Who waits is reached at the moment that the wait was for.
function moments(data, { from, to, kind }) {
  const { start, end } = data;
  if (kind !== "wait") return [end[from] <= start[to] ? end[from] : start[from], start[to]];
  const left = end[from] <= end[to] ? end[from] : start[from];
  return [left, Math.min(Math.max(left, start[to]), end[to])];
}

function drawArrow(painter, arrow, chosen) {
  const c = painter.context, [left, arrived] = moments(painter.data, arrow), { colour } = ARROWS[arrow.kind];
  const near = time => Math.min(Math.max(painter.x(time), painter.gutter - 60), painter.width + 60);
  const x0 = near(left), x1 = near(arrived), y0 = painter.place(arrow.from).y + ROW / 2 - 1, y1 = painter.place(arrow.to).y + ROW / 2 - 1;
  const bend = Math.min(Math.max(24, Math.abs(x1 - x0) / 2), 160);
  painter.frame(arrow.from === chosen ? arrow.to : arrow.from, colour, 2);
  for (const [width, style] of [[4, "rgba(255,255,255,.8)"], [1.6, colour]]) {
    c.lineWidth = width;
    c.strokeStyle = style;
    c.beginPath();
    c.moveTo(x0, y0);
    c.bezierCurveTo(x0 + bend, y0, x1 - 7 - bend, y1, x1 - 7, y1);
    c.stroke();
  }
  c.fillStyle = colour;
  c.beginPath();
  c.moveTo(x1, y1);
  c.lineTo(x1 - 9, y1 - 4.5);
  c.lineTo(x1 - 9, y1 + 4.5);
  c.fill();
}

function arrowKinds(data) {
  const used = { launch: false, backward: false, wait: data.header.arrows.length > 0 };
  for (let i = 0; i < data.n && !(used.launch && used.backward); i++) {
    used.launch ||= data.partner[i] >= 0;
    used.backward ||= data.forward[i] >= 0;
  }
  return Object.keys(used).filter(kind => used[kind]);
}
