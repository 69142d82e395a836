"use strict";
// A measured span: how many events it holds, how long they ran inside it, by lane and by name.
const MOST_NAMES = 15;

// Time of a row's events inside [low, high). No two of a row overlap, so all but the first and last lie inside.
function clipped(data, row, low, high) {
  const { start, end, busy } = data, last = data.rowFirst[row + 1];
  const from = firstEnding(data, data.rowFirst[row], last, low), to = lower(start, from, last, high);
  if (to <= from) return 0;
  return busy[to] - busy[from] - Math.max(0, low - start[from]) - Math.max(0, end[to - 1] - high);
}

// { events, lanes: [lane, events, own], names: Map of code to [events, inside, own] }. "Own" is time inside the span
// without that of the calls inside a call: it sums to the time that a lane was busy. Segments of the path are no events.
function measure(data, { low, high, lanes }) {
  const found = { events: 0, lanes: [], names: new Map() };
  for (const lane of data.lanes) {
    if (lane.kind === "lane" || (lanes && !lanes.has(lane))) continue;
    const mine = [lane, 0, 0];
    for (let row = lane.firstRow; row < lane.firstRow + lane.rows; row++) measureRow(data, row, low, high, mine, found.names);
    found.events += mine[1];
    if (mine[1]) found.lanes.push(mine);
  }
  return found;
}

function measureRow(data, row, low, high, lane, names) {
  const { start, end, name, rowFirst } = data, last = rowFirst[row + 1];
  for (let i = firstEnding(data, rowFirst[row], last, low); i < last && start[i] < high; i++) {
    const from = Math.max(start[i], low), to = Math.min(end[i], high);
    const own = Math.max(0, to - from - insideChildren(data, row, from, to));
    if (!names.has(name[i])) names.set(name[i], [0, 0, 0]);
    const mine = names.get(name[i]);
    mine[0]++;
    mine[1] += to - from;
    mine[2] += own;
    lane[1]++;
    lane[2] += own;
  }
}

function describeSpan(data, span) {
  const found = measure(data, span), long = span.high - span.low, several = data.header.ranks.length > 1;
  const share = ns => `${(100 * ns / long).toFixed(1)} %`, number = n => n.toLocaleString("en");
  const lanes = found.lanes.map(([lane, events, own]) => [`${several ? `${data.header.ranks[lane.rank].label}, ` : ""}${lane.label}`, number(events), duration(own), share(own)]);
  const largest = [...found.names].sort((a, b) => b[1][2] - a[1][2]).slice(0, MOST_NAMES);
  const names = largest.map(([code, [events, inside, own]]) => [shorten(data.names[code], 90), number(events), duration(inside), duration(own), duration(inside / events)]);
  const more = found.names.size > names.length ? `, the ${names.length} largest of ${number(found.names.size)} names` : "";
  return `<h3>${duration(long)} measured</h3><p class="hint">${number(found.events)} events from ${moment(span.low, long)} to ${moment(span.high, long)}. `
    + "Only the part of an event inside the span counts; own time is without the calls inside a call.</p>"
    + grid(["lane", "events", "busy", "of the span"], lanes) + grid([`name${more}`, "events", "time", "own time", "mean"], names);
}

function grid(head, rows) {
  const cells = (row, tag) => row.map((one, k) => `<${tag}${tag === "th" ? ' scope="col"' : ""}${k ? ' class="n"' : ""}>${escapeHtml(one)}</${tag}>`).join("");
  return `<div class="scroll"><table><thead><tr>${cells(head, "th")}</tr></thead><tbody>${rows.map(row => `<tr>${cells(row, "td")}</tr>`).join("")}</tbody></table></div>`;
}
