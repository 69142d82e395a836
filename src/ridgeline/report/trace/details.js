"use strict";
// What the page knows of one event, as HTML: its times, its arrows, the calls around it, what it was called with.
const MOST_LINKS = 12;

function describeEvent(timeline, i) {
  const { data } = timeline, { start, end, name, names } = data, row = rowOf(data, i), lane = data.lanes[data.rowLane[row]];
  const long = end[i] - start[i], inner = long - insideChildren(data, row, start[i], end[i]);
  const rows = [
    ["duration", duration(long), `${long.toLocaleString("en")} ns${inner < long ? `, ${duration(inner)} ${lane.part === "python" ? "in no further frame" : "its own"}` : ""}`],
    ["start", duration(start[i]), `${start[i].toLocaleString("en")} ns after the start`],
    [lane.kind, lane.label, data.header.ranks[lane.rank].label],
    ["kind", data.roles[data.role[i] & 63] + (data.role[i] & 128 ? ", on the critical path" : ""), ""],
  ];
  const number = data.correlation[data.partner[i] >= 0 ? data.partner[i] : i];
  if (number >= 0) rows.push(["correlation", String(number), ""]);
  const { count, sum } = timeline.countNames();
  rows.push(["same name", `${count[name[i]].toLocaleString("en")} events`, `${duration(sum[name[i]])} together, ${duration(sum[name[i]] / count[name[i]])} on average`]);
  const cells = rows.map(([what, value, more]) => cell(what, escapeHtml(value), more));
  cells.push(...arrowCells(data, i, timeline.painter.arrows), ...callCells(data, i));
  return `<h3>${escapeHtml(names[name[i]])}</h3><dl>${cells.join("")}</dl>${describeArguments(data, i)}`;
}

function cell(what, html, more = "", wide = false) {
  return `<div${wide ? ' class="wide"' : ""}><dt>${what}</dt><dd>${html}${more ? ` <span>${escapeHtml(more)}</span>` : ""}</dd></div>`;
}

// Time of the events of the rows below that lie in a span.
function insideChildren(data, row, low, high) {
  const lane = data.lanes[data.rowLane[row]];
  return row + 1 < lane.firstRow + lane.rows ? clipped(data, row + 1, low, high) : 0;
}

function arrowCells(data, i, arrows) {
  const out = [], groups = new Map();
  for (const arrow of arrows) {
    const leaves = arrow.from === i, what = arrowWord(arrow.kind, leaves);
    if (!groups.has(what)) groups.set(what, []);
    groups.get(what).push([leaves ? arrow.to : arrow.from, arrow]);
  }
  for (const [what, found] of groups) {
    const shown = found.slice(0, MOST_LINKS).map(([other, arrow]) => `${link(data, other)} <span>${escapeHtml(arrowNote(data, arrow, other))}</span>`);
    if (found.length > shown.length) shown.push(`<span>and ${(found.length - shown.length).toLocaleString("en")} more</span>`);
    out.push(cell(what, shown.join("<br>"), "", true));
  }
  return out;
}

function arrowWord(kind, leaves) {
  if (kind === "launch") return leaves ? "launches" : "launched by";
  if (kind === "backward") return leaves ? "backward" : "forward";
  return leaves ? "held up" : "waited for";
}

function arrowNote(data, { from, to, kind, why, ns }, other) {
  const { start, end } = data, lane = data.lanes[data.rowLane[rowOf(data, other)]];
  const where = data.header.ranks.length > 1 ? `${lane.label}, ${data.header.ranks[lane.rank].label}` : lane.label;
  if (kind === "wait") return `${where}; ${why}, ${duration(ns)}`;
  if (kind === "backward") return where;
  const late = start[to] - end[from];
  return `${where}; ${late >= 0 ? `${duration(late)} from the call's end to the start` : "starts before the call returns"}`;
}

// The calls around an event, and for a device event those around its launch.
function callCells(data, i) {
  const out = [];
  for (const [what, at] of [["called in", data.partner[i]], ["inside", i]]) {
    const around = at < 0 ? [] : enclosing(data, at);
    if (!around.length) continue;
    const links = around.map(one => link(data, one)), near = links.slice(-8).join(" › ");
    const rest = links.length > 8 ? `<details><summary>${links.length - 8} calls further out</summary>${links.slice(0, -8).join(" › ")}</details>` : "";
    out.push(cell(what, rest + near, "", true));
  }
  return out;
}

// The events of the same thread around one, outermost first: calls above it, and the Python frames open at its start.
function enclosing(data, i) {
  const row = rowOf(data, i), own = data.lanes[data.rowLane[row]], out = [];
  for (const lane of data.lanes) {
    if (lane !== own && (lane.rank !== own.rank || lane.thread !== own.thread || lane.kind !== "thread")) continue;
    const stop = lane === own ? row : lane.firstRow + lane.rows;
    for (let up = lane.firstRow; up < stop; up++) {
      const above = nearest(data, up, data.start[i], 0);
      if (above >= 0 && data.start[above] <= data.start[i] && data.end[above] >= data.end[i]) out.push(above);
    }
  }
  return out.sort((a, b) => data.start[a] - data.start[b] || data.end[b] - data.end[a]);
}

// ---- arguments

function describeArguments(data, i) {
  if (!data.args[i]) return "";
  const given = data.sets[data.args[i] - 1], rest = [], tensors = { input: {}, output: {} };
  for (const [key, value] of Object.entries(given)) {
    const found = /^(input|output) (dims|type|strides)$|^concrete (inputs)$/i.exec(key);
    if (found && Array.isArray(value)) tensors[(found[1] || "input").toLowerCase()][(found[2] || "value").toLowerCase()] = value;
    else rest.push([key, value]);
  }
  const tables = Object.entries(tensors).map(([side, parts]) => tensorTable(side, parts)).join("");
  const cells = rest.map(([key, value]) => cell(escapeHtml(key), argument(key, value), "", /stack|hierarchy/i.test(key)));
  return `<h4>Arguments</h4>${cells.length ? `<dl class="args">${cells.join("")}</dl>` : ""}${tables}`;
}

function tensorTable(side, { dims = [], type = [], strides = [], value = [] }) {
  const rows = [];
  for (let k = 0; k < Math.max(dims.length, type.length, value.length); k++) {
    const shape = Array.isArray(dims[k]) && dims[k].length ? dims[k] : null;
    if (!shape && !type[k] && !value[k]) continue;
    const odd = shape && Array.isArray(strides[k]) && strides[k].length && !contiguous(shape, strides[k]);
    const cells = [k, type[k] || "", shape ? flat(shape) : type[k] === "Scalar" ? "" : "", value[k] ?? "", odd ? `strides ${flat(strides[k])}` : ""];
    rows.push(`<tr>${cells.map(one => `<td>${escapeHtml(one)}</td>`).join("")}</tr>`);
  }
  if (!rows.length) return "";
  const head = [side, "type", "shape", "value", "layout"].map(one => `<th scope="col">${one}</th>`).join("");
  return `<div class="scroll"><table><thead><tr>${head}</tr></thead><tbody>${rows.join("")}</tbody></table></div>`;
}

function contiguous(shape, strides) {
  if (Array.isArray(shape[0])) return shape.every((one, k) => !Array.isArray(strides[k]) || contiguous(one, strides[k]));
  let expected = 1;
  for (let k = shape.length - 1; k >= 0; k--) {
    if (shape[k] !== 1 && strides[k] !== expected) return false;
    expected *= shape[k];
  }
  return true;
}

function flat(list) { return `[${list.map(one => Array.isArray(one) ? flat(one) : one).join(", ")}]`; }

function argument(key, value) {
  if (/stack/i.test(key) && typeof value === "string") return value.split(";").map(escapeHtml).join("<br>");
  if (/^(grid|block)$/.test(key) && Array.isArray(value)) return value.join(" × ");
  if (typeof value === "number") {
    const text = Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(5));
    return /^bytes$|shared memory/i.test(key) && value >= 1024 ? `${text} <span>${binary(value)}</span>` : text;
  }
  return escapeHtml(typeof value === "string" ? value : Array.isArray(value) ? flat(value) : JSON.stringify(value));
}

function binary(bytes) {
  const unit = Math.min(4, Math.floor(Math.log2(bytes) / 10));
  return `${+(bytes / 1024 ** unit).toPrecision(4)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

// The shapes of an operator's inputs in a few words, for the tip.
function shapes(data, i) {
  const given = data.args[i] ? data.sets[data.args[i] - 1] : {};
  const dims = given["Input Dims"] || given["Input dims"];
  return Array.isArray(dims) ? shorten(dims.filter(one => Array.isArray(one) && one.length).slice(0, 3).map(flat).join(" "), 60) : "";
}

function link(data, i) {
  const name = data.names[data.name[i]];
  return `<button class="link" data-event="${i}" title="${escapeHtml(name)}">${escapeHtml(shorten(name, 60))}</button>`;
}

function shorten(text, most) { return text.length > most ? `${text.slice(0, most - 1)}…` : text; }

function escapeHtml(text) {
  return String(text).replace(/[&<>"']/g, one => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[one]);
}
