"""The critical path in the timeline: a lane of its segments, and a mark on the events whose own time lies on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ridgeline.profiling.table import Mask, TraceTable

GAP = "gap or delay"
ROLE_OF_TYPE = {
    "operator": "operator",
    "runtime call": "launch or runtime call",
    "python": "Python",
    "kernel": "compute kernel",
    "memory copy": "copy or memset",
    "collective": "collective",
    "stream wait": "synchronisation",
    "sync wait": "synchronisation",
    "thread hand-over": "synchronisation",
}
"""What a segment is drawn as; any other type is a gap or a delay."""
OWN_TIME = ("operator", "runtime call", "python", "kernel", "memory copy", "collective")
"""Types of segments that are an event's own time: that event is marked."""

Segments = Sequence[Mapping[str, Any]]


def segment_name(segment: Mapping[str, Any]) -> str:
    """``kernel: sgemm``; no event has a name like it."""
    return f"{segment.get('type') or 'on the path'}: {segment.get('name') or '(no event)'}"


def segment_role(segment: Mapping[str, Any]) -> str:
    """One of the page's roles."""
    return ROLE_OF_TYPE.get(str(segment.get("type")), GAP)


def on_path(table: TraceTable, segments: Segments) -> Mask:
    """Events whose own time is on the path: a segment names them (by ``row`` where it has one, else by ``name``) and
    overlaps them. ``[rows]``"""
    own = [one for one in segments if one.get("type") is None or one["type"] in OWN_TIME]
    return _by_row(table, [one for one in own if one.get("row") is not None]) | _by_name(
        table, [one for one in own if one.get("row") is None]
    )


def _by_row(table: TraceTable, segments: Segments) -> Mask:
    out = np.zeros(len(table), np.bool_)
    rows, low, high = (np.array([int(one[key]) for one in segments], np.int64) for key in ("row", "start_ns", "end_ns"))
    known = (rows >= 0) & (rows < len(table))
    rows, low, high = rows[known], low[known], high[known]
    out[rows[(table.start[rows] < high) & (low < table.end[rows])]] = True
    return out


def _by_name(table: TraceTable, segments: Segments) -> Mask:
    out = np.zeros(len(table), np.bool_)
    spans: dict[str, list[tuple[int, int]]] = {}
    for one in segments:
        spans.setdefault(str(one.get("name")), []).append((int(one["start_ns"]), int(one["end_ns"])))
    for code in (code for code, name in enumerate(table.names) if name in spans):
        rows = np.flatnonzero(table.name == code)
        mine = np.array(sorted(spans[table.names[code]]), np.int64)
        at = np.searchsorted(mine[:, 0], table.end[rows], side="left") - 1
        out[rows] = (at >= 0) & (mine[np.maximum(at, 0), 1] > table.start[rows])
    return out
