"use strict";
// The page's own state, for tests and for the curious: window.__ridgeline.
const page = window.__ridgeline = { ready: false, errors: [], draws: [] };
window.addEventListener("error", event => page.errors.push(String(event.message)));
window.addEventListener("unhandledrejection", event => page.errors.push(String(event.reason)));

// Events as typed arrays. Row r holds events rowFirst[r] .. rowFirst[r + 1], sorted, none overlapping.
async function readEvents() {
  const header = JSON.parse(document.getElementById("trace-header").textContent);
  const bytes = await unpack(document.getElementById("trace-block").textContent.trim());
  const part = {};
  let at = 0;
  for (const [name, size] of Object.entries(header.sizes)) {
    part[name] = bytes.subarray(at, at + size);
    at += size;
  }
  const n = header.count;
  const data = {
    header, n, names: header.names, roles: header.roles, role: part.role,
    start: new Float64Array(n), end: new Float64Array(n), busy: new Float64Array(n + 1),
    name: varints(part.name, new Uint32Array(n)),
    partner: new Int32Array(n), launches: new Int32Array(n).fill(-1), critical: new Uint32Array(n + 1),
    rowFirst: [0], lanes: [], rowLane: [],
  };
  const starts = varints(part.start, new Float64Array(n)), lengths = varints(part.duration, new Float64Array(n));
  placeRows(data, starts, lengths);
  linkPartners(data, varints(part.partner, new Float64Array(n)));
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
    rank.firstEvent = i;
    for (const lane of rank.lanes) {
      const mine = { rank: rankAt, label: lane.label, kind: lane.kind, firstRow: data.rowFirst.length - 1,
        rows: lane.rows.length, open: true };
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
    rank.lastEvent = i;
  });
}

// partner: the call that launched a device event. launches: the first device event of a call.
function linkPartners(data, coded) {
  for (const rank of data.header.ranks) {
    for (let i = rank.firstEvent; i < rank.lastEvent; i++) {
      const v = coded[i] - 1;
      const other = v < 0 ? -1 : i + (v % 2 ? -(v + 1) / 2 : v / 2);
      data.partner[i] = other;
      if (other >= 0 && (data.launches[other] < 0 || data.start[i] < data.start[data.launches[other]])) data.launches[other] = i;
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

// RFC 1950 and 1951, for browsers without DecompressionStream.
function inflate(input) {
  let at = 2, hold = 0, held = 0, size = 0, out = new Uint8Array(input.length * 4 + 1024);
  const bits = count => {
    while (held < count) { hold += input[at++] * 2 ** held; held += 8; }
    const low = hold % 2 ** count;
    hold = Math.floor(hold / 2 ** count);
    held -= count;
    return low;
  };
  const room = more => {
    if (size + more <= out.length) return;
    const bigger = new Uint8Array(Math.max(out.length * 2, size + more));
    bigger.set(out);
    out = bigger;
  };
  const table = lengths => {
    const count = new Uint16Array(16), next = new Uint16Array(16), symbol = new Uint16Array(lengths.length);
    for (const length of lengths) count[length]++;
    count[0] = 0;
    for (let k = 1; k < 16; k++) next[k] = next[k - 1] + count[k - 1];
    lengths.forEach((length, one) => { if (length) symbol[next[length]++] = one; });
    return { count, symbol };
  };
  const decode = ({ count, symbol }) => {
    let code = 0, first = 0, index = 0;
    for (let k = 1; k < 16; k++) {
      code |= bits(1);
      if (code - first < count[k]) return symbol[index + code - first];
      index += count[k];
      first = (first + count[k]) << 1;
      code <<= 1;
    }
    throw new Error("the trace block is damaged");
  };
  const BASE = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
  const EXTRA = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
  const FAR = [1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577];
  const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
  const dynamic = () => {
    const literals = bits(5) + 257, distances = bits(5) + 1, given = bits(4) + 4, lengths = new Array(19).fill(0);
    for (let k = 0; k < given; k++) lengths[ORDER[k]] = bits(3);
    const first = table(lengths), all = [];
    while (all.length < literals + distances) {
      const one = decode(first);
      if (one < 16) all.push(one);
      else {
        const value = one === 16 ? all[all.length - 1] : 0;
        const times = one === 16 ? 3 + bits(2) : one === 17 ? 3 + bits(3) : 11 + bits(7);
        for (let k = 0; k < times; k++) all.push(value);
      }
    }
    return [table(all.slice(0, literals)), table(all.slice(literals))];
  };
  const fixed = () => [table(Array.from({ length: 288 }, (_, k) => k < 144 ? 8 : k < 256 ? 9 : k < 280 ? 7 : 8)), table(new Array(30).fill(5))];
  for (let last = 0; !last;) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      at -= held >> 3;
      hold = held = 0;
      const length = input[at] + 256 * input[at + 1];
      room(length);
      out.set(input.subarray(at + 4, at + 4 + length), size);
      size += length;
      at += 4 + length;
      continue;
    }
    const [literal, distance] = kind === 1 ? fixed() : dynamic();
    for (;;) {
      const one = decode(literal);
      if (one === 256) break;
      room(258);
      if (one < 256) { out[size++] = one; continue; }
      const length = BASE[one - 257] + bits(EXTRA[one - 257]), code = decode(distance);
      const back = FAR[code] + bits(code < 2 ? 0 : (code >> 1) - 1);
      for (let k = 0; k < length; k++, size++) out[size] = out[size - back];
    }
  }
  return out.subarray(0, size);
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
