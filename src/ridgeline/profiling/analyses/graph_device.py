"""The device's part of the dependency graph: launches, stream order, waits between streams, and synchronising calls.

A kernel starts after the last of its causes::

    host       [launch)      [launch)
                |  latency    |
    stream 7    +---->[ a )---|-->[ b )      a waited for its launch, b (launched early) for a: a kernel-kernel gap
    stream 20                           +->[ c )   c waited for an event recorded after b: a stream wait

The launch latency of a trace is the low end of what kernels show whose stream was empty when they were launched.
Graph replays need nothing special: one call is the launch of many kernels, and all but the first wait for the stream.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.analyses.graph_base import Builder, Edge, Nodes, before
from ridgeline.profiling.classify import SYNCHRONIZE, device_roles, find_phases, launches
from ridgeline.profiling.table import Kind, Mask

UNEXPLAINED_NS = 5_000
"""A kernel that starts this long after its launch and its stream's last kernel waited for another stream."""
LONGEST_NS = {Edge.LAUNCH: 1_000_000, Edge.GAP: 50_000}
"""A longer delay is no launch delay or gap between kernels: the device did or waited for something not recorded, as in
captures that lost kernels."""
LATENCY_QUANTILE = 0.1
FULL_QUEUE = 256
"""Launched work of one stream that has not begun: with this much of it a slow launch call waited for room. CUDA's
queues hold about 1,000 kernels, those of graphs fewer."""
SLOW_CALL = 10
"""A launch call is slow when it takes this many times the median."""


def streams(made: Builder) -> None:
    """Bind device rows: ends to their starts, starts to the latest of launch, stream order and waits."""
    table = made.table
    rows = np.flatnonzero(table.device_rows & (made.start_node >= 0))
    if not rows.size:
        return
    launched = launches(table)
    made.bind(made.end_node[rows], made.start_node[rows], _span_kinds(made, rows, launched), rows)
    start = made.start_node[rows]
    call = np.where(launched[rows] >= 0, made.start_node[launched[rows]], -1)
    call[call > start] = -1
    earlier = _previous(made, rows)
    latency = _latency(made, start, call, earlier)
    other = _waits(made, rows, launched, start, np.maximum(_ready(made, call, latency), _ready(made, earlier, 0)))
    _bind_latest(made, rows, {Edge.LAUNCH: (call, latency), Edge.GAP: (earlier, 0), Edge.STREAM_WAIT: (other, 0)})


def _span_kinds(made: Builder, rows: Nodes, launched: Nodes) -> NDArray[np.int8]:
    table = made.table
    roles = device_roles(table, find_phases(table), launched)
    kinds = np.full(rows.size, Edge.KERNEL, np.int8)
    kinds[roles.copies[rows]] = Edge.COPY
    kinds[roles.collective[rows]] = Edge.COLLECTIVE
    return kinds


def _previous(made: Builder, rows: Nodes) -> Nodes:
    """The last end on the same stream before each row starts, or -1. ``[rows]`` nodes"""
    out = np.full(rows.size, -1, np.intp)
    thread = made.table.thread[rows]
    for one in np.unique(thread).tolist():
        mine = thread == one
        out[mine] = before(np.sort(made.end_node[rows[mine]]), made.start_node[rows[mine]])
    return out


def _ready(made: Builder, cause: Nodes, needs: int) -> NDArray[np.int64]:
    """When each cause allows a start; the window's start where there is none. ns"""
    return np.where(cause >= 0, made.time[cause] + needs, made.low)


def _latency(made: Builder, start: Nodes, call: Nodes, earlier: Nodes) -> int:
    """What a launch takes at least, in ns: the low end over kernels whose stream was empty when they were launched."""
    alone = (call >= 0) & ((earlier < 0) | (made.time[earlier] <= made.time[call]))
    delay = made.time[start[alone]] - made.time[call[alone]]
    return int(np.quantile(delay, LATENCY_QUANTILE, method="lower")) if delay.size else 0


def _bind_latest(made: Builder, rows: Nodes, causes: dict[Edge, tuple[Nodes, int]]) -> None:
    """Bind each start to the cause that was ready last; the others become slack."""
    start = made.start_node[rows]
    ready = np.stack([np.where(node >= 0, made.time[node] + needs, -1) for node, needs in causes.values()])
    # Times count from the trace's own zero; a cause that is absent must lose against any that is there.
    ready = np.where(np.stack([node for node, _ in causes.values()]) >= 0, ready, np.iinfo(np.int64).min)
    latest = ready.argmax(axis=0)
    for at, (kind, (node, needs)) in enumerate(causes.items()):
        there = node >= 0
        binds = there & (latest == at)
        took = made.time[start[binds]] - made.time[node[binds]]
        known = np.where(took <= LONGEST_NS.get(kind, took), kind, Edge.OUTSIDE).astype(np.int8)
        made.bind(start[binds], node[binds], known, rows[binds])
        loose = there & (latest != at)
        least = np.full(int(loose.sum()), needs, np.int64)
        made.loosen(node[loose], start[loose], least, kind, rows[loose])


class _SyncArguments(msgspec.Struct, gc=False):
    correlation: Any = None
    stream: Any = None
    wait_on_stream: Any = None
    wait_on_cuda_event_record_corr_id: Any = None


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 2**62 else -1


def _sync_events(made: Builder) -> tuple[Nodes, NDArray[np.int64]]:
    """(rows of ``cuda_sync`` events, their [correlation, stream, waited-for stream, correlation of the record])."""
    rows = np.flatnonzero(made.table.is_kind(Kind.SYNC))
    values = [
        (-1, -1, -1, -1)
        if one is None
        else tuple(
            _number(value)
            for value in (one.correlation, one.stream, one.wait_on_stream, one.wait_on_cuda_event_record_corr_id)
        )
        for one in made.table.decode(rows, _SyncArguments)
    ]
    return rows, np.array(values, np.int64).reshape(-1, 4)


def _calls_by_id(made: Builder, ids: NDArray[np.int64]) -> Nodes:
    """The runtime row with each correlation id, or -1. ``[ids]``"""
    table = made.table
    calls = np.flatnonzero(table.is_kind(Kind.RUNTIME) & (table.correlation >= 0))
    order = calls[np.argsort(table.correlation[calls], kind="stable")]
    if not order.size:
        return np.full(ids.shape, -1, np.intp)
    at = np.minimum(np.searchsorted(table.correlation[order], ids), order.size - 1)
    return np.where((table.correlation[order[at]] == ids) & (ids >= 0), order[at], -1)


def _waits(made: Builder, rows: Nodes, launched: Nodes, start: Nodes, known: NDArray[np.int64]) -> Nodes:
    """The end on another stream that each start waited for, or -1. ``[rows]`` nodes

    Recorded waits (``Stream Wait Event``) are used when the capture has them; otherwise a start that nothing else
    explains waited for whatever ended last on its device.
    """
    events, values = _sync_events(made)
    waiting = made.table.named(lambda name: "Wait Event" in name)[events]
    if waiting.any():
        return _recorded_waits(made, rows, launched, start, values[waiting])
    late = made.time[start] - known > UNEXPLAINED_NS
    out = np.full(rows.size, -1, np.intp)
    for device in np.unique(made.table.device[rows]).tolist():
        mine = made.table.device[rows] == device
        out[mine] = before(np.sort(made.end_node[rows[mine]]), start[mine])
    explains = late & (out >= 0) & (made.time[out] > known)
    return np.where(explains, out, -1)


def _recorded_waits(made: Builder, rows: Nodes, launched: Nodes, start: Nodes, values: NDArray[np.int64]) -> Nodes:
    """Waits as recorded: the first row launched on the waiting stream after the wait call, for the last row launched
    on the other stream before its event was recorded."""
    table = made.table
    out = np.full(rows.size, -1, np.intp)
    asked = np.where(launched[rows] >= 0, table.start[launched[rows]], table.start[rows])
    calls, records = _calls_by_id(made, values[:, 0]), _calls_by_id(made, values[:, 3])
    found = np.flatnonzero((calls >= 0) & (records >= 0))
    by_stream: dict[int, Nodes] = {}
    for one in np.unique(values[found][:, 1:3]).tolist():
        mine = np.flatnonzero(table.stream[rows] == one)
        by_stream[one] = mine[np.argsort(asked[mine], kind="stable")]
    for at in found.tolist():
        late, early = by_stream[int(values[at, 1])], by_stream[int(values[at, 2])]
        first = int(np.searchsorted(asked[late], table.start[calls[at]], side="right"))
        last = int(np.searchsorted(asked[early], table.start[records[at]])) - 1
        if first >= late.size or last < 0:
            continue
        node = int(made.end_node[rows[early[last]]])
        if node < start[late[first]]:
            out[late[first]] = max(out[late[first]], node)
    return out


def synchronisation(made: Builder) -> None:
    """Rebind the end of each call that blocked until the device was done (a synchronisation, a copy that waits for
    itself, a launch into a full queue) to the device row that it waited for."""
    table = made.table
    device = np.flatnonzero(table.device_rows & (made.start_node >= 0))
    runtime = table.is_kind(Kind.RUNTIME) & (made.end_node >= 0)
    if not device.size or not runtime.any():
        return
    launched = launches(table)
    _full_queues(made, device, launched)
    _own_copies(made, device, launched)
    calls = np.flatnonzero(runtime & table.named(SYNCHRONIZE.search))
    found = _last_done(made, device, launched, calls)
    hit = found >= 0
    made.rebind(made.end_node[calls[hit]], found[hit], Edge.SYNC, calls[hit])


def _full_queues(made: Builder, device: Nodes, launched: Nodes) -> None:
    """Slow launches into a stream with much work waiting end when an earlier row of that stream ended. What waits may
    begin after the window."""
    table = made.table
    every = np.flatnonzero(table.device_rows & (launched >= 0))
    if not every.size:
        return
    call = launched[every]
    slow = table.duration[call] > SLOW_CALL * np.median(table.duration[call])
    for stream in np.unique(table.thread[every[slow]]).tolist():
        mine = table.thread[every] == stream
        asked, begun = np.sort(table.start[call[mine]]), np.sort(table.start[every[mine]])
        calls = np.unique(call[mine & slow])
        moments = table.start[calls]
        waiting = np.searchsorted(asked, moments) - np.searchsorted(begun, moments, side="right")
        calls = calls[(waiting >= FULL_QUEUE) & (made.end_node[calls] >= 0)]
        room = before(np.sort(made.end_node[device[table.thread[device] == stream]]), made.end_node[calls])
        inside = room > made.start_node[calls]
        made.rebind(made.end_node[calls[inside]], room[inside], Edge.SYNC, calls[inside])


def _own_copies(made: Builder, device: Nodes, launched: Nodes) -> None:
    """Calls whose own work ended inside them waited for it."""
    mine = device[launched[device] >= 0]
    call = launched[mine]
    node, end = made.end_node[mine], made.end_node[call]
    inside = (end >= 0) & (node < end) & (node > made.start_node[call]) & _copies(made, mine)
    last = np.full(len(made.table), -1, np.intp)
    np.maximum.at(last, call[inside], node[inside])
    calls = np.flatnonzero(last >= 0)
    made.rebind(made.end_node[calls], last[calls], Edge.SYNC, calls)


def _copies(made: Builder, rows: Nodes) -> Mask:
    return np.isin(made.table.kind[rows], (Kind.MEMCPY, Kind.MEMSET))


def _last_done(made: Builder, device: Nodes, launched: Nodes, calls: Nodes) -> Nodes:
    """The last end inside each call of work that was launched before it (on its stream, if known), or -1. Nodes."""
    table = made.table
    order = device[np.argsort(made.end_node[device])]
    ends = made.end_node[order]
    asked = np.where(launched[order] >= 0, table.start[launched[order]], np.iinfo(np.int64).min)
    stream, limit = _sync_targets(made, calls)
    at = np.searchsorted(ends, made.end_node[calls]) - 1
    inside = (at >= 0) & (ends[np.maximum(at, 0)] > made.start_node[calls])
    fits = (asked[at] < limit) & ((stream < 0) | (table.stream[order[at]] == stream))
    while (inside & ~fits).any():
        at = np.where(inside & ~fits, at - 1, at)
        inside = (at >= 0) & (ends[np.maximum(at, 0)] > made.start_node[calls])
        fits = (asked[at] < limit) & ((stream < 0) | (table.stream[order[at]] == stream))
    return np.where(inside, ends[np.maximum(at, 0)], -1)


def _sync_targets(made: Builder, calls: Nodes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each call (the stream it waits for or -1 for all, the moment before which the work was launched)."""
    table = made.table
    stream, limit = np.full(calls.size, -1, np.int64), table.start[calls].copy()
    _, values = _sync_events(made)
    if not values.size:
        return stream, limit
    values = values[np.argsort(values[:, 0], kind="stable")]
    at = np.minimum(np.searchsorted(values[:, 0], table.correlation[calls]), len(values) - 1)
    known = (values[at, 0] == table.correlation[calls]) & (table.correlation[calls] >= 0)
    stream[known] = np.where(values[at, 2] >= 0, values[at, 2], values[at, 1])[known]
    records = _calls_by_id(made, values[at, 3])
    recorded = known & (records >= 0)
    limit[recorded] = table.start[records[recorded]]
    return stream, limit
