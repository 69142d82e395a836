"""What Perfetto's importer makes of a Chrome JSON trace, as far as our exports use it.

The rules are those of its trace_processor (importers/json, and the slice and flow trackers): events in the order of their
times, equal ones in the order of the file; numbers of processes and threads that are no unsigned 32 bits become 0, and a
thread 0 the number of its process; a slice that begins inside another of its track and ends after it is dropped; an arrow
ends at the slice that began last on its track and has not been closed by a later one. What it cannot read it counts.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST_DEPTH = 512


class Decimals(str):
    """A number of a file as it is written there."""


@dataclass
class Imported:
    """``stats``: what was dropped or could not be read, by Perfetto's name. ``slices``: (track, start, end, event), ns.
    ``flows``: (cat, slice left, slice entered, time left, time entered). ``counters``: (name, time, value). ``moved``:
    threads of the file that are drawn as another one's."""

    stats: Counter[str] = field(default_factory=Counter)
    slices: list[tuple[Any, int, int, dict]] = field(default_factory=list)
    flows: list[tuple[str, tuple, tuple, int, int]] = field(default_factory=list)
    counters: list[tuple[str, int, float]] = field(default_factory=list)
    thread_names: dict[tuple[int, int], str] = field(default_factory=dict)
    moved: set[tuple[int, int]] = field(default_factory=set)
    _open: dict[Any, list[tuple]] = field(default_factory=dict)
    _begun: dict[Any, tuple] = field(default_factory=dict)

    def slice(self, event, track, start, length):
        """Pushes a slice on its track's stack, what ended before it popped."""
        stack = self._open.setdefault(track, [])
        end = start + length
        while stack:
            _, begun, ended, _ = stack[-1]
            if ended > start or (ended == start and begun == ended and length == 0):
                if ended < end and start < ended:
                    self.stats["slice_drop_overlapping_complete_event"] += 1
                    return
                break
            stack.pop()
        # Slices further down reach as far as those above them; the check of one is the check of all.
        if len(stack) >= MOST_DEPTH:
            self.stats["slice_max_depth_exceeded"] += 1
            return
        stack.append((track, start, end, event))
        self.slices.append(stack[-1])

    def flow(self, event, track, time):
        """Begins or ends an arrow at the last slice of the track."""
        number, kind = event.get("id"), (event.get("cat"), event.get("name"))
        if not isinstance(number, int):
            self.stats["flow_invalid_id"] += 1
            return
        stack, key = self._open.get(track), (number, *kind)
        if not stack:
            self.stats["flow_no_enclosing_slice"] += 1
        elif event["ph"] == "s":
            self.stats["flow_duplicate_id"] += key in self._begun
            self._begun.setdefault(key, (stack[-1], time))
        elif event.get("bp") != "e":
            self.stats["flow bound to the next slice"] += 1
        elif key not in self._begun:
            self.stats["flow_end_without_start"] += 1
        else:
            left, begun = self._begun[key]
            self.flows.append((event["cat"], left, stack[-1], begun, time))

    def counter(self, event, time):
        """One counter per argument."""
        for name, value in (event.get("args") or {"": None}).items():
            if isinstance(value, (int, Decimals)) and not isinstance(value, bool):
                self.counters.append((f"{event['name']} {name}", time, float(value)))
            else:
                self.stats["json_parser_failure"] += 1


def load(path) -> Imported:
    """The file as Perfetto would have it. Times are ns; a file that is not strict JSON fails."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "strict")
    out = Imported()
    timed = []
    for event in json.loads(text, parse_float=Decimals)["traceEvents"]:
        if event["ph"] != "M" and "ts" not in event:
            out.stats["json_tokenizer_failure"] += 1
            continue
        timed.append((nanoseconds(event.get("ts", 0)), event))
    for time, event in sorted(timed, key=lambda pair: pair[0]):
        add(out, event, time)
    out.stats = +out.stats
    return out


def add(out, event, time):
    track = thread(event)
    if track != (event["pid"], event["tid"]) and event["name"] != "process_name":
        out.moved.add((event["pid"], event["tid"]))
    if event["ph"] == "X":
        if "dur" in event:
            out.slice(event, track, time, nanoseconds(event["dur"]))
        else:
            out.stats["json_parser_failure"] += 1
    elif event["ph"] == "i":
        out.slice(event, track, time, 0)
    elif event["ph"] in "sf":
        out.flow(event, track, time)
    elif event["ph"] == "C":
        out.counter(event, time)
    elif event["ph"] == "M" and event["name"] in ("thread_name", "process_name"):
        out.stats["json_parser_failure"] += not event["args"].get("name")
        if event["name"] == "thread_name":
            out.thread_names[track] = event["args"]["name"]


def thread(event):
    """The (process, thread) that an event is drawn on."""
    pid, tid = (number if 0 <= number < 2**32 else 0 for number in (event["pid"], event["tid"]))
    return pid, tid if tid or not pid else pid


def nanoseconds(text):
    """Microseconds, whole or with up to three decimals, as ns."""
    whole, _, part = str(text).partition(".")
    assert len(part) <= 3 and whole.isdigit(), f"{text} is no time in microseconds that keeps nanoseconds"
    return int(whole + (part + "000")[:3])
