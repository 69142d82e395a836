"""A page's timeline: which events of which ranks are drawn in which lane and row, what they were called with, and the
arrows between them. :mod:`ridgeline.report.trace.encode` says how they are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.calltree import forward_rows
from ridgeline.profiling.nesting import nest, operators
from ridgeline.profiling.table import Kind, Mask, TraceTable
from ridgeline.report.trace import arguments, arrows
from ridgeline.report.trace.encode import RankEvents, deflate, encode
from ridgeline.report.trace.lanes import Lane, find_lanes, parts
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
    """``header`` is plain JSON; ``block`` (the events) and ``texts`` (names and arguments as JSON) are deflated base64.
    ``shown`` events of ``total``, none shorter than ``cut_ns``. ``origins`` gives each rank's zero of the time line, ns
    of its clock. ``notes`` are sentences that the reader should know."""

    header: dict[str, Any]
    block: str
    texts: str
    origins: dict[int, int]
    shown: int
    total: int
    cut_ns: int
    notes: list[str]

    @property
    def on_device(self) -> bool:
        """Whether any lane is a device's."""
        return any(lane["kind"] == "stream" for rank in self.header["ranks"] for lane in rank["lanes"])


def pack(
    tables: Sequence[TraceTable],
    critical: Segments = (),
    limit: int = MAX_EVENTS,
    collectives: Sequence[Mapping[str, Any]] = (),
) -> Packed:
    """Pack the events of ``tables`` (at least one, none empty).

    ``critical`` are the critical path's segments: ``start_ns``, ``end_ns``, ``type``, ``name``, ``row`` (of the table),
    ``rank``; the last two may be absent. ``collectives`` are rows of ``match_collectives``.
    """
    total = sum(len(table) for table in tables)
    cut = _shortest_shown(tables, limit)
    numbers = [rank_of(table, at) for at, table in enumerate(tables)]
    origins, note = _origins(tables, min(int(table.start.min()) for table in tables))
    ranks = [
        _arrange(table, rank_label(table, at), origin, cut, _of_rank(critical, rank))
        for at, (table, origin, rank) in enumerate(zip(tables, origins, numbers, strict=True))
    ]
    codes, names = _names(ranks)
    used = arguments.gather(tables, [one.row for one in ranks])
    header, block = encode(ranks, codes, used.codes)
    found, missing = _arrows(tables, ranks, critical, collectives)
    header |= found | {"roles": list(ROLES)}
    header["span"] = max(int(t.end.max()) - o for t, o in zip(tables, origins, strict=True))
    shown = sum(int(((one.role & SEGMENT) == 0).sum()) for one in ranks)
    notes = [one for one in (note, used.note, f"{missing:,} arrows are left out." if missing else "") if one]
    texts = deflate(msgspec.json.encode({"names": names, "sets": [msgspec.Raw(one.encode()) for one in used.sets]}))
    return Packed(header, block, texts, dict(zip(numbers, origins, strict=True)), shown, total, cut, notes)


def _arrows(
    tables: Sequence[TraceTable],
    ranks: Sequence[RankEvents],
    critical: Segments,
    collectives: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], int]:
    """The header's arrows, and how many of them are left out. Of tables that claim one rank the first has it."""
    known: dict[int, TraceTable] = {}
    places, before = {}, 0
    for at, (table, one) in enumerate(zip(tables, ranks, strict=True)):
        rank = rank_of(table, at)
        if rank not in known:
            events = np.flatnonzero(one.row >= 0)
            known[rank], places[rank] = table, np.full(len(table), -1, np.int64)
            places[rank][one.row[events]] = before + events
        before += one.row.size
    return arrows.place([*arrows.crossings(critical, known), *arrows.waits(collectives, known)], places)


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


def _arrange(table: TraceTable, label: str, origin: int, cut: int, critical: Segments) -> RankEvents:
    lanes = find_lanes(table)
    lane_of, depth = _places(table, lanes, np.maximum(table.duration, 0) >= cut)
    rows = np.flatnonzero(lane_of >= 0)
    rows = rows[np.lexsort((table.start[rows], depth[rows], lane_of[rows]))]
    launched, made_by = classify.launches(table), _forward(table)
    place = np.full(len(table) + 1, -1, np.int64)  # the last entry answers for -1
    place[rows] = np.arange(rows.size)
    role = roles(table, launched)
    role[on_path(table, critical)] |= CRITICAL
    partner = place[launched[rows]]
    rank = RankEvents(
        label=label,
        lanes=lanes,
        steps=_steps(table, origin),
        names=table.names,
        lane=lane_of[rows],
        depth=depth[rows],
        start=table.start[rows] - origin,
        duration=np.maximum(table.duration[rows], 0),
        name=table.name[rows].astype(np.int64),
        role=role[rows],
        partner=partner,
        forward=place[made_by[rows]],
        correlation=np.where(partner < 0, table.correlation[rows], -1),  # a launched event has its call's
        row=rows,
    )
    return _with_path(rank, critical, origin)


def _forward(table: TraceTable) -> NDArray[np.intp]:
    """For every row the operator whose backward it is, or -1. ``[rows]``"""
    return forward_rows(operators(table)) if len(table.links) else np.full(len(table), -1, np.intp)


def _steps(table: TraceTable, origin: int) -> list[list[Any]]:
    """[name, start, end] of each step, ns from the origin."""
    steps = classify.step_rows(table)
    times = zip(table.name[steps].tolist(), table.start[steps].tolist(), table.end[steps].tolist(), strict=True)
    return [[table.names[code], low - origin, high - origin] for code, low, high in times]


def _places(table: TraceTable, lanes: Sequence[Lane], keep: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(lane of every event, -1 for those left out; its row in the lane). ``[rows]``"""
    lane_of, depth = np.full(len(table), -1, np.int64), np.zeros(len(table), np.int64)
    masks = {part: keep & mask for part, mask in parts(table).items()}
    for mask in masks.values():
        depth[mask] = nest(table, mask).depth[mask]
    for at, lane in enumerate(lanes):
        mine = np.flatnonzero(masks[lane.part] & (table.thread == lane.thread))
        lane_of[mine] = at
        depth[mine] = separate(table.start[mine], table.end[mine], depth[mine])
    return lane_of, depth


def _with_path(rank: RankEvents, critical: Segments, origin: int) -> RankEvents:
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
    none = np.full(here, -1, np.int64)
    return replace(
        rank,
        lanes=[Lane("critical path", "lane", -1, ""), *rank.lanes],
        names=[*rank.names, *texts],
        lane=np.concatenate((np.zeros(here, np.int64), rank.lane + 1)),
        depth=np.concatenate((depth[order], rank.depth)),
        start=np.concatenate((start[order], rank.start)),
        duration=np.concatenate(((end - start)[order], rank.duration)),
        name=np.concatenate((name[order], rank.name)),
        role=np.concatenate((role[order], rank.role)),
        partner=np.concatenate((none, np.where(rank.partner < 0, -1, rank.partner + here))),
        forward=np.concatenate((none, np.where(rank.forward < 0, -1, rank.forward + here))),
        correlation=np.concatenate((none, rank.correlation)),
        row=np.concatenate((none, rank.row)),
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


def _names(ranks: Sequence[RankEvents]) -> tuple[list[NDArray[np.int64]], list[str]]:
    """(per rank: its name code -> the page's code, the page's names)."""
    seen: dict[str, int] = {}
    codes = []
    for rank in ranks:
        mine = np.zeros(max(len(rank.names), 1), np.int64)
        for code in np.unique(rank.name).tolist():
            mine[code] = seen.setdefault(rank.names[code], len(seen))
        codes.append(mine)
    return codes, list(seen)
