"""Events of all ranks as one small binary block that a browser turns into typed arrays.

Events are ordered by rank, lane (a thread or a stream), row (nesting depth) and start. No two events of a row overlap,
so a row's starts and its ends are both sorted, and the page finds what is visible by binary search::

    lane    thread 12    row 0   [aten::linear--------)   [aten::relu--)
                         row 1      [aten::addmm--)
    coded                        start deltas, durations, name codes, partners: LEB128; roles: one byte each

The five streams follow one another, are deflated together and written as base64. Times are ns from the page's origin,
exact in the browser up to 2**53 ns (104 days).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.nesting import nest
from ridgeline.profiling.table import Kind, Mask, TraceTable
from ridgeline.report.trace.lanes import Lane, find_lanes
from ridgeline.report.trace.path import GAP, Segments, on_path, segment_name, segment_role

MAX_EVENTS = 1_000_000
"""A page with more is slow to open; the shortest events are left out, and the page says so."""
MAX_ROWS = 96
"""Rows of a lane. Events that overlap deeper than this share the last row."""
ROLES = (
    "operator",
    "range",
    "launch or runtime call",
    "synchronisation",
    "compute kernel",
    "optimiser kernel",
    "collective",
    "copy or memset",
    "unknown device work",
    "Python",
    "other",
    GAP,
)
SEGMENT = 64
"""Bit of the role byte of a segment of the critical path: it is drawn, but is no event of the trace."""
CRITICAL = 128
"""Bit of the role byte of an event on the critical path."""


@dataclass(frozen=True)
class Packed:
    """``header`` is plain JSON; ``block`` is base64 text. ``shown`` events of ``total``, none shorter than ``cut_ns``.
    ``origins`` gives each rank's zero of the time line, ns of its clock."""

    header: dict[str, Any]
    block: str
    origins: dict[int, int]
    shown: int
    total: int
    cut_ns: int

    @property
    def on_device(self) -> bool:
        """Whether any lane is a device's."""
        return any(lane["kind"] == "stream" for rank in self.header["ranks"] for lane in rank["lanes"])


@dataclass(frozen=True)
class _Rank:
    """One rank's events in page order; arrays are ``[events]``. ``start`` is ns from the origin, ``name`` a code into
    ``names``, ``partner`` a position in this order or -1."""

    label: str
    lanes: list[Lane]
    steps: list[list[Any]]
    names: Sequence[str]
    lane: NDArray[np.int64]
    depth: NDArray[np.int64]
    start: NDArray[np.int64]
    duration: NDArray[np.int64]
    name: NDArray[np.int64]
    role: NDArray[np.uint8]
    partner: NDArray[np.int64]


def pack(tables: Sequence[TraceTable], critical: Segments = (), limit: int = MAX_EVENTS) -> Packed:
    """Pack the events of ``tables`` (at least one, none empty).

    ``critical`` are the critical path's segments: ``start_ns``, ``end_ns``, ``type``, ``name``, ``row`` (of the table),
    ``rank``; the last two may be absent.
    """
    total = sum(len(table) for table in tables)
    cut = _shortest_shown(tables, limit)
    shared = min(int(table.start.min()) for table in tables)
    origins, note = _origins(tables, shared)
    ranks = [
        _arrange(table, rank_label(table, at), origin, cut, _of_rank(critical, rank_of(table, at)))
        for at, (table, origin) in enumerate(zip(tables, origins, strict=True))
    ]
    codes, names = _names(ranks)
    header, block = _encode(ranks, codes)
    shown = sum(int(((one.role & SEGMENT) == 0).sum()) for one in ranks)
    header |= {"names": names, "roles": list(ROLES), "note": note}
    header["span"] = max(int(t.end.max()) - o for t, o in zip(tables, origins, strict=True))
    zeros = {rank_of(table, at): origin for at, (table, origin) in enumerate(zip(tables, origins, strict=True))}
    return Packed(header, block, zeros, shown, total, cut)


def rank_of(table: TraceTable, position: int) -> int:
    """The rank a table says it is, else its position."""
    return table.meta.rank if table.meta.rank is not None else position


def rank_label(table: TraceTable, position: int) -> str:
    """``rank 0``, with the host where the trace names it."""
    host = f" on {table.meta.host}" if table.meta.host else ""
    return f"rank {rank_of(table, position)}{host}"


def _of_rank(critical: Segments, rank: int) -> list[Mapping[str, Any]]:
    return [one for one in critical if one.get("rank", rank) == rank]


def _origins(tables: Sequence[TraceTable], shared: int) -> tuple[list[int], str]:
    """One origin for all, unless the captures do not overlap: then each begins at its own start."""
    last_start = max(int(table.start.min()) for table in tables)
    first_end = min(int(table.end.max()) for table in tables)
    if last_start < first_end:
        return [shared] * len(tables), ""
    note = "The captures do not overlap in time, so each rank is drawn from its own start."
    return [int(table.start.min()) for table in tables], note


def _shortest_shown(tables: Sequence[TraceTable], limit: int) -> int:
    """The duration in ns below which events are left out so that at most ``limit`` remain; 0 when all fit."""
    if sum(len(table) for table in tables) <= limit:
        return 0
    spans = np.concatenate([np.maximum(table.duration, 0) for table in tables])
    return int(np.partition(spans, spans.size - limit)[spans.size - limit]) + 1


def _arrange(table: TraceTable, label: str, origin: int, cut: int, critical: Segments) -> _Rank:
    lanes = find_lanes(table)
    lane_of, depth = _places(table, lanes, np.maximum(table.duration, 0) >= cut)
    rows = np.flatnonzero(lane_of >= 0)
    rows = rows[np.lexsort((table.start[rows], depth[rows], lane_of[rows]))]
    launched = classify.launches(table)
    place = np.full(len(table) + 1, -1, np.int64)  # the last entry answers for -1
    place[rows] = np.arange(rows.size)
    role = roles(table, launched)
    role[on_path(table, critical)] |= CRITICAL
    steps = classify.step_rows(table)
    rank = _Rank(
        label=label,
        lanes=lanes,
        steps=[
            [table.names[code], int(low) - origin, int(high) - origin]
            for code, low, high in zip(table.name[steps], table.start[steps], table.end[steps], strict=True)
        ],
        names=table.names,
        lane=lane_of[rows],
        depth=depth[rows],
        start=table.start[rows] - origin,
        duration=np.maximum(table.duration[rows], 0),
        name=table.name[rows].astype(np.int64),
        role=role[rows],
        partner=place[launched[rows]],
    )
    return _with_path(rank, critical, origin)


def _places(table: TraceTable, lanes: Sequence[Lane], keep: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(lane of every event, -1 for those left out; its row in the lane). ``[rows]``"""
    lane_of, depth = np.full(len(table), -1, np.int64), np.zeros(len(table), np.int64)
    ranges = table.is_kind(Kind.GPU_ANNOTATION, Kind.SYNC)
    for mask in (keep & ~ranges, keep & ranges):
        depth[mask] = nest(table, mask).depth[mask]
    for at, lane in enumerate(lanes):
        mine = np.flatnonzero(keep & (table.thread == lane.thread) & (ranges == lane.ranges))
        lane_of[mine] = at
        depth[mine] = separate(table.start[mine], table.end[mine], depth[mine])
    return lane_of, depth


def _with_path(rank: _Rank, critical: Segments, origin: int) -> _Rank:
    """The rank with the critical path's segments as a lane above the others."""
    timed = sorted((int(one["start_ns"]), int(one["end_ns"]), at) for at, one in enumerate(critical))
    timed = [one for one in timed if one[1] > one[0] >= origin]
    if not timed:
        return rank
    ordered = [critical[at] for _, _, at in timed]
    texts = list(dict.fromkeys(map(segment_name, ordered)))
    codes = {text: len(rank.names) + at for at, text in enumerate(texts)}
    start, end = (np.array([one[at] for one in timed], np.int64) - origin for at in (0, 1))
    depth = separate(start, end, np.zeros(start.size, np.int64))
    order, here = np.argsort(depth, kind="stable"), start.size
    name = np.array([codes[segment_name(one)] for one in ordered], np.int64)
    role = np.array([ROLES.index(segment_role(one)) | SEGMENT for one in ordered], np.uint8)
    return replace(
        rank,
        lanes=[Lane("critical path", "lane", -1, False), *rank.lanes],
        names=[*rank.names, *texts],
        lane=np.concatenate((np.zeros(here, np.int64), rank.lane + 1)),
        depth=np.concatenate((depth[order], rank.depth)),
        start=np.concatenate((start[order], rank.start)),
        duration=np.concatenate(((end - start)[order], rank.duration)),
        name=np.concatenate((name[order], rank.name)),
        role=np.concatenate((role[order], rank.role)),
        partner=np.concatenate((np.full(here, -1), np.where(rank.partner < 0, -1, rank.partner + here))),
    )


def separate(start: NDArray[np.int64], end: NDArray[np.int64], depth: NDArray[np.int64]) -> NDArray[np.int64]:
    """Depths of one lane's events such that none of a row overlap: one that would moves down. ``[events]``"""
    depth, end, level = np.minimum(depth, MAX_ROWS - 1), np.maximum(end, start), 0
    while level <= depth.max(initial=-1) and level < MAX_ROWS - 1:
        mine = np.flatnonzero(depth == level)
        mine = mine[np.argsort(start[mine], kind="stable")]
        reach = np.maximum.accumulate(end[mine])
        depth[mine[1:][start[mine[1:]] < reach[:-1]]] = level + 1
        level += 1
    return depth


def roles(table: TraceTable, launched: NDArray[np.intp]) -> NDArray[np.uint8]:
    """What each event is, as an index into ``ROLES``. ``[rows]``"""
    role = np.full(len(table), ROLES.index("other"), np.uint8)
    found = classify.device_roles(table, classify.find_phases(table), launched)
    host = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION)
    runtime = table.is_kind(Kind.RUNTIME)
    masks: dict[str, Mask] = {
        "operator": table.is_kind(Kind.CPU_OP),
        "range": table.is_kind(Kind.ANNOTATION, Kind.GPU_ANNOTATION),
        "launch or runtime call": runtime,
        "synchronisation": table.is_kind(Kind.SYNC) | (runtime & table.named(classify.SYNCHRONIZE.search)),
        "compute kernel": found.compute,
        "optimiser kernel": found.optimizer,
        "collective": found.collective | (host & table.named(classify.COLLECTIVE_OP.match)),
        "copy or memset": found.copies,
        "unknown device work": found.unknown,
        "Python": table.is_kind(Kind.PYTHON),
    }
    for name, mask in masks.items():
        role[mask] = ROLES.index(name)
    return role


def _names(ranks: Sequence[_Rank]) -> tuple[list[NDArray[np.int64]], list[str]]:
    """(per rank: its name code -> the page's code, the page's names)."""
    seen: dict[str, int] = {}
    codes = []
    for rank in ranks:
        mine = np.zeros(max(len(rank.names), 1), np.int64)
        for code in np.unique(rank.name).tolist():
            mine[code] = seen.setdefault(rank.names[code], len(seen))
        codes.append(mine)
    return codes, list(seen)


def _encode(ranks: Sequence[_Rank], codes: Sequence[NDArray[np.int64]]) -> tuple[dict[str, Any], str]:
    streams: dict[str, list[NDArray[np.int64]]] = {"start": [], "duration": [], "name": [], "partner": []}
    described = []
    for rank, code in zip(ranks, codes, strict=True):
        start = rank.start
        first = np.concatenate(([True], (np.diff(rank.lane) != 0) | (np.diff(rank.depth) != 0)))[: start.size]
        before = np.concatenate(([0], start[:-1]))[: start.size]
        streams["start"].append(np.where(first, start, start - before))
        streams["duration"].append(rank.duration)
        streams["name"].append(code[rank.name])
        away = rank.partner - np.arange(start.size)
        streams["partner"].append(np.where(rank.partner < 0, 0, 1 + np.where(away < 0, -2 * away - 1, 2 * away)))
        described.append(_describe(rank, np.flatnonzero(first)))
    parts = {name: varint(np.concatenate(values)) for name, values in streams.items()}
    parts["role"] = np.concatenate([rank.role for rank in ranks]).tobytes()
    header = {
        "count": len(parts["role"]),
        "sizes": {name: len(data) for name, data in parts.items()},
        "ranks": described,
    }
    return header, base64.b64encode(zlib.compress(b"".join(parts.values()), 6)).decode()


def _describe(rank: _Rank, firsts: NDArray[np.intp]) -> dict[str, Any]:
    """A rank's lanes, each with its rows as event counts (an empty row counts 0), and its step markers."""
    counts = np.diff(np.append(firsts, rank.start.size))
    rows: list[list[int]] = [[] for _ in rank.lanes]
    for at, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        mine, depth = rows[int(rank.lane[at])], int(rank.depth[at])
        mine += [0] * (depth - len(mine)) + [count]
    return {
        "label": rank.label,
        "lanes": [{"label": one.label, "kind": one.kind, "rows": r} for one, r in zip(rank.lanes, rows, strict=True)],
        "steps": rank.steps,
    }


def varint(values: NDArray[np.int64]) -> bytes:
    """Unsigned LEB128 of non-negative values, without a loop over them."""
    rest = values.astype(np.uint64)
    length = np.ones(rest.size, np.int64)
    for bits in range(7, 64, 7):
        length += rest >= np.uint64(1 << bits)
    offset = np.cumsum(length) - length
    out = np.empty(int(length.sum()), np.uint8)
    for at in range(int(length.max(initial=0))):
        has = length > at
        piece = (rest[has] >> np.uint64(7 * at)) & np.uint64(127)
        out[offset[has] + at] = piece | np.where(length[has] > at + 1, 128, 0).astype(np.uint64)
    return out.tobytes()
