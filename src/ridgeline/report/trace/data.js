"use strict";
// The page's own state, for tests and for the curious: window.__ridgeline.
const page = window.__ridgeline = { ready: false, errors: [], draws: [] };
window.addEventListener("error", event => page.errors.push(String(event.message)));
window.addEventListener("unhandledrejection", event => page.errors.push(String(event.reason)));

// Events as typed arrays. Row r holds events rowFirst[r] .. rowFirst[r + 1], sorted, none overlapping.
async function readEvents() {
  const header = JSON.parse(document.getElementById("trace-header").textContent);
  const [bytes, texts] = await Promise.all(["trace-block", "trace-texts"].map(id => unpack(document.getElementById(id).textContent.trim())));
  const part = {};
  let at = 0;
  for (const [name, size] of Object.entries(header.sizes)) {
    part[name] = bytes.subarray(at, at + size);
    at += size;
  }
  const n = header.count, { names, sets } = JSON.parse(new TextDecoder().decode(texts));
  const data = {
    header, n, names, sets, roles: header.roles, role: part.role,
    start: new Float64Array(n), end: new Float64Array(n), busy: new Float64Array(n + 1),
    name: varints(part.name, new Uint32Array(n)), args: varints(part.arguments, new Uint32Array(n)),
    partner: new Int32Array(n), forward: new Int32Array(n), correlation: new Float64Array(n), critical: new Uint32Array(n + 1),
    rowFirst: [0], lanes: [], rowLane: [],
  };
  placeRows(data, varints(part.start, new Float64Array(n)), varints(part.duration, new Float64Array(n)));
  point(varints(part.partner, new Float64Array(n)), data.partner);
  point(varints(part.forward, new Float64Array(n)), data.forward);
  correlate(data, varints(part.correlation, new Float64Array(n)));
  return data;
}

function varints(bytes, out) {
  for (let i = 0, at = 0; i < out.length; i++) {
    let byte = bytes[at++], value = byte & 127, scale = 128;
    while (byte & 128) {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    }
    out[i] = value;
  }
  return out;
}

function placeRows(data, starts, lengths) {
  let i = 0;
  data.header.ranks.forEach((rank, rankAt) => {
    for (const lane of rank.lanes) {
      const mine = { ...lane, rank: rankAt, firstRow: data.rowFirst.length - 1, rows: lane.rows.length };
      mine.open = lane.part !== "python" || mine.rows < 4; // frames are deep, and asked for less often
      for (const count of lane.rows) {
        let now = 0;
        for (const stop = i + count; i < stop; i++) {
          now += starts[i];
          data.start[i] = now;
          data.end[i] = now + lengths[i];
          data.busy[i + 1] = data.busy[i] + lengths[i];
          data.critical[i + 1] = data.critical[i] + (data.role[i] >> 7);
        }
        data.rowLane.push(data.lanes.length);
        data.rowFirst.push(i);
      }
      data.lanes.push(mine);
    }
  });
}

function signed(v) { return v % 2 ? -(v + 1) / 2 : v / 2; }

// Distances as positions: the call that launched a device event, the operator whose backward one is; -1 for none.
function point(coded, out) {
  for (let i = 0; i < out.length; i++) out[i] = coded[i] ? i + signed(coded[i] - 1) : -1;
}

// A call's number; a device event has that of its call.
function correlate(data, coded) {
  let last = 0, rankAt = -1;
  for (let row = 0; row < data.rowLane.length; row++) {
    const rank = data.lanes[data.rowLane[row]].rank;
    if (rank !== rankAt) [last, rankAt] = [0, rank];
    for (let i = data.rowFirst[row]; i < data.rowFirst[row + 1]; i++) {
      if (coded[i]) last += signed(coded[i] - 1);
      data.correlation[i] = coded[i] ? last : -1;
    }
  }
}

async function unpack(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  page.inflatedBy = window.DecompressionStream ? "DecompressionStream" : "script";
  if (!window.DecompressionStream) return inflate(bytes);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function duration(ns) {
  const size = Math.abs(ns);
  const [unit, scale] = size < 1e3 ? ["ns", 1] : size < 1e6 ? ["µs", 1e3] : size < 1e9 ? ["ms", 1e6] : ["s", 1e9];
  const value = ns / scale;
  return `${Math.abs(value) >= 100 ? value.toFixed(1) : +value.toPrecision(4)} ${unit}`.replace(".0 ", " ");
}

// A moment with as many digits as a view of this width can tell apart.
function moment(ns, width) {
  const [unit, scale] = ns + width < 1e4 ? ["ns", 1] : ns + width < 1e7 ? ["µs", 1e3] : ns + width < 1e10 ? ["ms", 1e6] : ["s", 1e9];
  const digits = Math.min(9, Math.max(0, Math.ceil(-Math.log10(width / 300 / scale))));
  return `${(ns / scale).toFixed(scale === 1 ? 0 : digits)} ${unit}`;
}
