"use strict";
// Finding events: by time in a row, by position in the page; and short forms of names.
function triangle(c, x, y, open) {
  c.beginPath();
  if (open) { c.moveTo(x - 4, y - 2); c.lineTo(x + 4, y - 2); c.lineTo(x, y + 3); }
  else { c.moveTo(x - 2, y - 4); c.lineTo(x - 2, y + 4); c.lineTo(x + 3, y); }
  c.fill();
}

function brief(name) {
  if (!name.includes("::")) return name.replace(/^void /, "");
  const head = name.replace(/^void /, "").replace(/\(anonymous namespace\)::/g, "").split(/[<(]/)[0];
  return head.split("::").filter(Boolean).pop() || name;
}

function fit(text, room, letter) {
  const most = Math.floor(room / letter);
  return text.length <= most ? text : most < 3 ? text.slice(0, Math.max(most, 0)) : text.slice(0, most - 1) + "…";
}

// A label that ends in a number keeps it when it is cut.
function ends(text, room, letter) {
  const most = Math.floor(room / letter), [number] = /-?\d+$/.exec(text) || [];
  if (!number || text.length <= most || number.length > most - 4) return fit(text, room, letter);
  return `${text.slice(0, most - number.length - 1).trimEnd()}…${number}`;
}

// The first index in [low, high) whose value is at least the one asked for.
function lower(values, low, high, asked) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < asked) low = middle + 1;
    else high = middle;
  }
  return low;
}

function gallop(values, from, stop, asked) {
  let step = 1, at = from;
  while (at < stop && values[at] < asked) {
    from = at + 1;
    at += step;
    step *= 2;
  }
  return lower(values, from, Math.min(at, stop), asked);
}

function firstEnding(data, first, last, time) {
  const at = lower(data.start, first, last, time);
  return at > first && data.end[at - 1] > time ? at - 1 : at;
}

function nearest(data, row, time, slack) {
  const first = data.rowFirst[row], last = data.rowFirst[row + 1];
  const at = lower(data.start, first, last, time);
  let best = -1, least = slack;
  for (let i = Math.max(first, at - 1); i < Math.min(last, at + 1); i++) {
    const away = time < data.start[i] ? data.start[i] - time : Math.max(0, time - data.end[i]);
    if (away <= least) {
      best = i;
      least = away;
    }
  }
  return best;
}

function rowOf(data, i) {
  let low = 0, high = data.rowFirst.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (data.rowFirst[middle] <= i) low = middle;
    else high = middle;
  }
  while (data.rowFirst[low + 1] === i) low++;
  return low;
}

// Round times, about one per 110 pixels, labelled in one unit with just enough digits.
function ticks(low, high, width) {
  const rough = (high - low) * 110 / width, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, power * [1, 2, 5, 10].find(k => k * power >= rough * 0.999));
  const [unit, scale] = high < 1e4 ? ["ns", 1] : high < 1e7 ? ["µs", 1e3] : high < 1e10 ? ["ms", 1e6] : ["s", 1e9];
  const digits = Math.max(0, -Math.floor(Math.log10(step / scale) + 1e-9));
  const out = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) out.push({ time: k * step, label: `${(k * step / scale).toFixed(digits)} ${unit}` });
  return out;
}
