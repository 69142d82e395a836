"use strict";
// The call tree as a flame graph: a frame's width is its inclusive time; choosing one makes it the whole width.
class Flame {
  constructor(host) {
    this.host = host;
    // [depth, start, inclusive, exclusive, count, name, parent] in depth-first order
    this.frames = JSON.parse(document.getElementById("flame-data").textContent);
    this.note = document.getElementById("flame-note");
    this.total = this.frames[0][2];
    this.cells = this.frames.map((frame, at) => this.cell(frame, at));
    host.append(...this.cells);
    host.addEventListener("click", event => event.target.dataset.at && this.focus(+event.target.dataset.at));
    host.addEventListener("keydown", event => this.key(event));
    host.addEventListener("pointerover", event => event.target.dataset.at && this.tell(+event.target.dataset.at));
    window.addEventListener("resize", () => this.focus(this.chosen, false));
    this.focus(0, false);
  }

  cell([depth, , , , , name, parent], at) {
    const cell = document.createElement("button");
    cell.dataset.at = at;
    cell.tabIndex = at ? -1 : 0;
    cell.textContent = name;
    cell.style.top = `${depth * 20}px`;
    cell.className = parent < 0 ? "root" : /^(c10d::|gloo:|nccl|record_param)/.test(name) ? "collective" : /::/.test(name) ? "operator" : "range";
    return cell;
  }

  tell(at) {
    const [, , inclusive, exclusive, count, name] = this.frames[at];
    const share = (100 * inclusive / this.total).toFixed(1);
    const calls = count ? `, ${duration(exclusive)} its own, ${count.toLocaleString("en")} ${count === 1 ? "call" : "calls"}` : "";
    this.note.textContent = `${name}: ${duration(inclusive)} inclusive (${share} %)${calls}`;
  }

  // Frames under the chosen one fill the width, those above it span it all, others are hidden.
  focus(at, take = true) {
    this.chosen = at;
    const [, low, wide] = this.frames[at], above = new Set(), width = this.host.clientWidth; // read once: writing follows
    for (let up = at; up >= 0; up = this.frames[up][6]) above.add(up);
    this.frames.forEach(([, start, inclusive], k) => {
      const inside = start >= low && start + inclusive <= low + wide && !above.has(k), cell = this.cells[k];
      const share = inside ? inclusive / wide : 1;
      cell.hidden = !(above.has(k) || (inside && share > 0.0008));
      cell.style.left = inside ? `${100 * (start - low) / wide}%` : "0";
      cell.style.width = `${100 * share}%`;
      cell.classList.toggle("narrow", share * width < 26);
      cell.classList.toggle("above", above.has(k) && k !== at);
    });
    const depth = this.frames.reduce((most, frame, k) => this.cells[k].hidden ? most : Math.max(most, frame[0]), 0);
    this.host.style.height = `${(depth + 1) * 20}px`;
    this.tell(at);
    if (take) this.cells[at].focus({ preventScroll: true });
  }

  key(event) {
    const at = +document.activeElement.dataset.at, frames = this.frames;
    const shown = k => k >= 0 && k < frames.length && !this.cells[k].hidden;
    const peers = frames.map((_, k) => k).filter(k => frames[k][6] === frames[at][6] && shown(k));
    const to = {
      ArrowUp: frames[at][6], ArrowDown: frames.findIndex((frame, k) => frame[6] === at && shown(k)),
      ArrowLeft: peers[peers.indexOf(at) - 1], ArrowRight: peers[peers.indexOf(at) + 1],
    }[event.key];
    if (event.key === "Escape") this.focus(0);
    if (!["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    if (to === undefined || !shown(to)) return;
    this.cells[to].focus();
    this.tell(to);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  const host = document.getElementById("flame");
  if (host) page.flame = new Flame(host);
});
