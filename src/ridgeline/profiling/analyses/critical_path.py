"""The critical path: the chain of causes that made a window as long as it was.

Walked from the window's end: each moment is blamed on the cause that came last (a binding edge of the dependency
graph), so the segments follow one another without a hole and sum to the window exactly::

    host      [op)[launch)                    [.item() waits ))[op)
    stream 7        |  [ kernel )( gap )[ kernel )
    path      [op)[launch delay)[kernel)[gap)[kernel)[sync wait)[op)

Across ranks the path leaves a rank at a collective for the rank that arrived last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.graph import Match, build, build_across
from ridgeline.profiling.analyses.graph_base import EDGE_NAMES, Edge, Graph, Nodes, row_of, whole
from ridgeline.profiling.analyses.matching import clock_offsets, match_collectives
from ridgeline.profiling.table import TraceTable

NO_EVENT = "(no event)"

_SEGMENT = {
    "start_ns": "ns: when the segment begins, on the trace's clock",
    "end_ns": "ns: when it ends, where the next one begins",
    "duration_ns": "ns: end_ns - start_ns; sums to the window",
    "type": "text: why this time passed: operator, runtime call, python, host gap, kernel, memory copy, collective, "
    "launch delay, kernel-kernel gap, stream wait, sync wait, thread hand-over, not recorded",
    "name": f"text: the event the time belongs to (of a delay: the event it delayed), {NO_EVENT} for none",
    "thread": "text: pid/tid of that event; of device events device/stream",
    "device": "count: device index, -1 on the host",
    "stream": "count: stream, -1 on the host",
    "row": "count: row of that event in the trace table, -1 for none",
}
COLUMNS: dict[str, dict[str, str]] = {
    "critical_path": _SEGMENT,
    "critical_path_across": {"rank": "count: the rank on which the segment lies", **_SEGMENT},
    "critical_path_summary": {
        "type or name": "text: what the segments were grouped by",
        "count": "count: segments",
        "total_ns": "ns: their sum",
        "share": "ratio: of the whole path",
    },
}
_SCHEMA = {
    "start_ns": pl.Int64,
    "end_ns": pl.Int64,
    "duration_ns": pl.Int64,
    "type": pl.String,
    "name": pl.String,
    "thread": pl.String,
    "device": pl.Int32,
    "stream": pl.Int64,
    "row": pl.Int64,
}


def critical_path(table: TraceTable, window: tuple[int, int] | None = None) -> pl.DataFrame:
    """The segments of the critical path of one rank in order, tiling ``window`` (default: the whole capture).

    One row per segment, columns as in ``COLUMNS["critical_path"]``. Empty when the trace has no event to follow.
    """
    if why_empty(table) is not None:
        return pl.DataFrame(schema=_SCHEMA)
    return _segments(build(table, window)).drop("owner")


def why_empty(table: TraceTable) -> str | None:
    """Why there is no path, or None."""
    low, high = whole(table)
    return None if high > low else "the trace holds no host or device event with a duration"


def critical_path_across(
    tables: Mapping[int, TraceTable], matches: Sequence[Match] | None = None, offsets: Mapping[int, int] | None = None
) -> pl.DataFrame:
    """The critical path of several ranks of one job, over everything they recorded.

    Args:
        tables: rank -> table.
        matches: collectives as rank -> row of the transfer (default: :func:`matched_rows`).
        offsets: how far each rank's clock is ahead, in ns (default: :func:`offsets_of`).

    Columns as in ``COLUMNS["critical_path_across"]``; times are on the lowest rank's clock.
    """
    used = {rank: table for rank, table in tables.items() if why_empty(table) is None}
    if not used:
        return pl.DataFrame(schema={"rank": pl.Int64, **_SCHEMA})
    graph = graph_across(used, matches, offsets)
    ranks = np.array(sorted(used), np.int64)
    segments = _segments(graph)
    rank = pl.Series("rank", ranks[segments["owner"].to_numpy()])
    return segments.drop("owner").select(rank, pl.all())


def graph_across(
    tables: Mapping[int, TraceTable], matches: Sequence[Match] | None = None, offsets: Mapping[int, int] | None = None
) -> Graph:
    """The joined graph with the defaults of :func:`critical_path_across`."""
    matched = matched_rows(tables) if matches is None else matches
    return build_across(tables, matched, offsets_of(tables) if offsets is None else offsets)


def critical_path_summary(path: pl.DataFrame, by: str = "type") -> pl.DataFrame:
    """The path's segments summed ``by`` ``type``, ``name`` or ``rank``, the largest first; columns in ``COLUMNS``."""
    whole_ns = max(int(path["duration_ns"].sum()), 1)
    grouped = path.group_by(by).agg(
        pl.len().cast(pl.Int64).alias("count"), pl.col("duration_ns").sum().alias("total_ns")
    )
    shares = grouped.with_columns((pl.col("total_ns") / whole_ns).alias("share"))
    return shares.sort(["total_ns", by], descending=[True, False])


def walk(graph: Graph) -> Nodes:
    """The nodes of the critical path from the window's start to its end."""
    back, node = graph.back.tolist(), graph.back.size - 1
    path = [node]
    while node:
        node = back[node]
        path.append(node)
    return np.array(path[::-1], np.intp)


def _segments(graph: Graph) -> pl.DataFrame:
    """The walked path as a frame; neighbours of one event and type are one segment."""
    path = walk(graph)
    path = path[np.concatenate(([True], np.diff(graph.time[path]) > 0))]
    start, into = graph.time[path[:-1]], path[1:]
    kind, label, owner = graph.kind[into], graph.label[into], graph.owner[into]
    change = np.ones(into.size, np.bool_)
    change[1:] = (np.diff(kind) != 0) | (np.diff(label) != 0) | (np.diff(owner) != 0)
    at = np.flatnonzero(change)
    end = np.concatenate((start[at[1:]], graph.time[-1:]))[: at.size]
    shown = np.where(label >= 0, label, graph.row[into])[at]
    kind, label, owner = kind[at], label[at], owner[at]
    texts = [_texts(graph.tables[who], row, near) for who, row, near in zip(owner, label, shown, strict=True)]
    names, threads, devices, streams = zip(*texts, strict=True) if texts else ((), (), (), ())
    columns = {
        "start_ns": start[at],
        "end_ns": end,
        "duration_ns": end - start[at],
        "type": [EDGE_NAMES[Edge(code)] for code in kind.tolist()],
        "name": list(names),
        "thread": list(threads),
        "device": list(devices),
        "stream": list(streams),
        "row": label.astype(np.int64),
        "owner": owner,
    }
    return pl.DataFrame(columns, schema={**_SCHEMA, "owner": pl.Int32})


def _texts(table: TraceTable, row: int, near: int) -> tuple[str, str, int, int]:
    """(name, thread, device, stream) of a segment's event; ``near`` gives the thread where there is none."""
    name = table.names[table.name[row]] if row >= 0 else NO_EVENT
    if near < 0:
        return name, "", -1, -1
    return name, "/".join(table.threads[table.thread[near]]), int(table.device[near]), int(table.stream[near])


def collective_rows(table: TraceTable) -> NDArray[np.intp]:
    """Rows of a rank's transfers in time order: collective kernels, or on the CPU the backend's ranges."""
    if not table.has_device_timeline:
        return np.flatnonzero(row_of(classify.TRANSFER.match, table))
    roles = classify.device_roles(table, classify.find_phases(table), classify.launches(table))
    return np.flatnonzero(roles.collective)


def matched_rows(tables: Mapping[int, TraceTable]) -> list[dict[int, int]]:
    """The matched collectives of several ranks as rank -> table row of the kernel or transfer."""
    rows = {
        rank: {int(table.start[row]): int(row) for row in collective_rows(table)[::-1]}
        for rank, table in tables.items()
    }
    found: dict[int, dict[int, int]] = {}
    for match, rank, start in match_collectives(dict(tables)).select("match", "rank", "start_ns").iter_rows():
        if start in rows[rank]:
            found.setdefault(match, {})[rank] = rows[rank][start]
    return [match for match in found.values() if len(match) > 1]


def offsets_of(tables: Mapping[int, TraceTable]) -> dict[int, int]:
    """How far each rank's clock is ahead of the lowest rank's, in ns; 0 where nothing connects two clocks."""
    found = clock_offsets(dict(tables))
    return {rank: offset or 0 for rank, offset in found.select("rank", "offset_ns").iter_rows()}
