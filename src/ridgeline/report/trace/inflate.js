"use strict";
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
