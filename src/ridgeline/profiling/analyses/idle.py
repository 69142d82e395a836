"""Idle by cause: why a stream, or a whole device, had nothing to do.

Between the first and the last event of a stream every hole is cut where the evidence changes; the pieces sum exactly
to the idle time, and idle plus busy is the span::

    host        ..data..|gc|sync| op |..python..[-launch call-)
    stream  [==last==)                                           .  .  .  [==next==)
                     |  host late: by what the   |launch_overhead|    |kernel_wait|
                     |  launching thread did     |               ^ up to launch_latency_ns more

In this order of evidence: ``graph_gap`` (both neighbours come from one launch of a graph), ``unknown`` (no launch is
known for the next event), then the three pieces above. Host late is split again: a data loader's range, a garbage
collection, a synchronising call, an operator or runtime call, and what is left: ``python``, code between operators.

On a CPU trace: time of the steps in which the driving threads show no operator for over ``idle_gap_ns``; ``python``
is then what lies in a named range, ``unknown`` what lies in none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.kernels import NO_OPERATOR
from ridgeline.profiling.analyses.launches import LAUNCH_CALL, streams, why_no_timeline
from ridgeline.profiling.communication import IDLE_GAP_NS, host_collectives, host_communication
from ridgeline.profiling.intervals import (
    Intervals,
    Times,
    clip,
    contains,
    covered,
    disjoint,
    empty,
    intersect,
    merge,
    subtract,
    total,
    union,
)
from ridgeline.profiling.nesting import nest
from ridgeline.profiling.table import Kind, Mask, TraceTable, distinct, row_numbers, values

HOST_LATE = ("data_loader", "garbage_collection", "synchronization", "operators", "python")
"""Causes of a launch call that began after the device had run dry: what its thread did until then."""
CAUSES = (*HOST_LATE, "launch_overhead", "kernel_wait", "graph_gap", "unknown")
LAUNCH_LATENCY_NS = 10_000
_AT_ONCE = 1 << 17
"""Gaps explained at once: each has a time for every cause, which together would be more than a large trace's table."""
_GARBAGE = "Python GC"
_BLOCKING = ("Context Sync", "Stream Sync", "Event Sync")

_WHERE = {
    "device": "id: device; null on a CPU trace, where it is the host's driving threads",
    "stream": "id: stream; null for all streams of the device together",
}
COLUMNS: dict[str, dict[str, str]] = {
    "idle_by_cause": {
        **_WHERE,
        "cause": f"class: one of {', '.join(CAUSES)}",
        "idle_ns": "ns: idle time with this cause; over the causes it sums to span_ns - busy_ns",
        "gaps": "count: gaps with a part of this cause",
        "drained_ns": "ns: of idle_ns, what lies in gaps that began while the launching thread was in a synchronising "
        "call: it had let the queue run dry; 0 on a CPU trace",
        "share": "fraction: idle_ns of span_ns",
        "busy_ns": "ns: union of the stream's (device's) events; on a CPU trace span_ns less the idle time",
        "span_ns": "ns: first event's start to last event's end, within the window; on a CPU trace the steps",
    },
    "idle_gaps": {
        **_WHERE,
        "start_ns": "ns: where the gap begins",
        "idle_ns": "ns: its length",
        "cause": "class: the cause with the largest part of it",
        "cause_ns": "ns: that part",
        "drained": "yes/no: the gap began while the launching thread was in a synchronising call",
        "operator": "name: innermost operator or range that the launching thread had open at the middle of the gap",
        "next_event": "name: the device event (on a CPU trace: the operator) that ended it",
        "next_operator": "name: innermost operator around the launch of next_event",
    },
}


class _Gaps(NamedTuple):
    """Gaps of one stream or device. ``parts`` is ``[causes, gaps]`` ns in the order of ``CAUSES``; ``next`` the row that
    ends each gap and ``thread`` the host thread that should have filled it, -1 where unknown; ``drained``: that thread
    was in a synchronising call when the gap began."""

    device: int | None
    stream: int | None
    start: Times
    end: Times
    parts: Times
    next: NDArray[np.intp]
    thread: NDArray[np.int32]
    drained: Mask
    span_ns: int


def why_empty(table: TraceTable) -> str | None:
    """Why idle time cannot be told from this trace, or None when it can."""
    if table.has_device_timeline:
        return None
    if (table.is_kind(Kind.RUNTIME) & table.named(LAUNCH_CALL.search)).any():
        return why_no_timeline(table)
    return None if table.is_kind(Kind.CPU_OP).any() else "no device event and no operator in this trace"


def idle_by_cause(
    table: TraceTable,
    window: tuple[int, int] | None = None,
    launch_latency_ns: int = LAUNCH_LATENCY_NS,
    idle_gap_ns: int = IDLE_GAP_NS,
) -> pl.DataFrame:
    """Every cause of every device (stream null) and of each of its streams; causes without time are there with 0.

    ``launch_latency_ns``: after a launch call's end this much still counts as launching when the device is dry.
    """
    spans: dict[tuple[int | None, int | None], int] = {}
    sums: dict[tuple[int | None, int | None], Times] = {}
    for gaps in _all_gaps(table, window, launch_latency_ns, idle_gap_ns):
        place, parts = (gaps.device, gaps.stream), gaps.parts
        piece = np.stack((parts.sum(axis=1), (parts > 0).sum(axis=1), parts[:, gaps.drained].sum(axis=1)), axis=1)
        spans[place], sums[place] = gaps.span_ns, sums.get(place, 0) + piece
        del gaps, parts
    rows = []
    for (device, stream), span in spans.items():
        counted = sums[device, stream].tolist()
        idle = sum(own for own, _, _ in counted)
        for cause, (own, gaps_of, drained) in zip(CAUSES, counted, strict=True):
            rows.append(
                {
                    "device": device,
                    "stream": stream,
                    "cause": cause,
                    "idle_ns": own,
                    "gaps": gaps_of,
                    "drained_ns": drained,
                    "share": own / max(span, 1),
                    "busy_ns": span - idle,
                    "span_ns": span,
                }
            )
    types = {"cause": pl.String, "share": pl.Float64}
    return pl.DataFrame(rows, schema={one: types.get(one, pl.Int64) for one in COLUMNS["idle_by_cause"]})


def idle_gaps(
    table: TraceTable,
    top: int = 20,
    window: tuple[int, int] | None = None,
    by_stream: bool = False,
    launch_latency_ns: int = LAUNCH_LATENCY_NS,
    idle_gap_ns: int = IDLE_GAP_NS,
) -> pl.DataFrame:
    """The ``top`` longest gaps: of whole devices, or with ``by_stream`` of single streams."""
    found = _all_gaps(table, window, launch_latency_ns, idle_gap_ns)
    wanted = (gaps for gaps in found if gaps.device is None or (gaps.stream is not None) == by_stream)
    parts = [_gap_frame(table, gaps, top) for gaps in wanted]
    types = {"cause": pl.String, "drained": pl.Boolean, "operator": pl.String}
    types |= {"next_event": pl.String, "next_operator": pl.String}
    nothing = pl.DataFrame(schema={one: types.get(one, pl.Int64) for one in COLUMNS["idle_gaps"]})
    frame = pl.concat([nothing, *parts])
    return frame.sort(["idle_ns", "start_ns", "device", "stream"], descending=[True, False, False, False]).head(top)


def _gap_frame(table: TraceTable, gaps: _Gaps, top: int) -> pl.DataFrame:
    length = gaps.end - gaps.start
    pick = np.argsort(-length, kind="stable")[:top]
    main = gaps.parts[:, pick].argmax(axis=0) if pick.size else np.empty(0, np.intp)
    middle, after = gaps.start[pick] + length[pick] // 2, gaps.next[pick]
    host = classify.launches(table)[after] if table.has_device_timeline else after
    launched = np.where((after >= 0) & (host >= 0), host, -1)
    known = [table.names[table.name[row]] if row >= 0 else "" for row in after.tolist()]
    return pl.DataFrame(
        {
            "device": pl.Series([gaps.device] * pick.size, dtype=pl.Int64),
            "stream": pl.Series([gaps.stream] * pick.size, dtype=pl.Int64),
            "start_ns": gaps.start[pick],
            "idle_ns": length[pick],
            "cause": pl.Series([CAUSES[at] for at in main.tolist()], dtype=pl.String),
            "cause_ns": gaps.parts[main, pick],
            "drained": gaps.drained[pick],
            "operator": pl.Series(_around(table, gaps.thread[pick], middle), dtype=pl.String),
            "next_event": pl.Series(known, dtype=pl.String),
            "next_operator": pl.Series(
                _around(table, np.where(launched >= 0, table.thread[launched], -1), table.start[launched]),
                dtype=pl.String,
            ),
        }
    )


def _around(table: TraceTable, thread: NDArray[np.int32], moment: Times) -> list[str]:
    """The innermost operator or range (no profiler step) open on a thread at a moment. ``[moments]``"""
    steps = table.named(classify.STEP.match)
    found = nest(table, table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & ~steps).innermost(thread, moment)
    return [table.names[table.name[row]] if row >= 0 else NO_OPERATOR for row in found.tolist()]


def _all_gaps(
    table: TraceTable, window: tuple[int, int] | None, launch_latency_ns: int, idle_gap_ns: int
) -> Iterator[_Gaps]:
    """For every device all streams together, then each of them, ``_AT_ONCE`` gaps at a time; on a CPU trace the host."""
    if why_empty(table) is not None:
        return
    low, high = window if window is not None else (int(table.start.min()), int(table.end.max()))
    if not table.has_device_timeline:
        yield _host_gaps(table, low, high, idle_gap_ns)
        return
    launched, host = classify.launches(table), _Host(table)
    live = table.device_rows & (table.end > table.start) & (table.start < high) & (table.end > low)
    rows = row_numbers(live)
    for device, stream, mine in _places(*streams(table, rows)):
        busy = clip(table.intervals(rows[mine]), low, high)
        if not busy.start.size:  # an empty window
            continue
        span = int(busy.end[-1] - busy.start[0])
        holes = _holes(table, rows[mine], low, high)
        for at in range(0, max(holes[0].size, 1), _AT_ONCE):
            begin, end, before, after = (one[at : at + _AT_ONCE] for one in holes)
            parts, thread = _split(table, host, launched, (begin, end, before, after), launch_latency_ns)
            yield _Gaps(device, stream, begin, end, parts, after, thread, host.blocked_at(thread, begin), span)


def _places(device: Times, stream: Times) -> Iterator[tuple[int, int | None, Mask]]:
    """Every device (stream None) and then each of its streams, and which rows are theirs."""
    for one in values(device):
        here = device == one
        yield one, None, here
        for two in values(stream[here]):
            yield one, two, here & (stream == two)


_Holes = tuple[Times, Times, NDArray[np.intp], NDArray[np.intp]]


def _holes(table: TraceTable, rows: NDArray[Any], low: int, high: int) -> _Holes:
    """(start, end, row that ended last before, row that starts next) of the holes between ``rows`` (in time order)."""
    start, end = np.maximum(table.start[rows], low), np.minimum(table.end[rows], high)
    reach = np.maximum.accumulate(end)
    after = np.flatnonzero(start[1:] > reach[:-1]) + 1
    # The event that reaches furthest before a hole: the last at which the running maximum rose.
    rose = np.append(True, reach[1:] > reach[:-1])[: rows.size]
    latest = np.maximum.accumulate(np.where(rose, np.arange(rows.size), 0))
    return reach[after - 1], start[after], rows[latest[after - 1]], rows[after]


class _Host:
    """What host threads did, as far as it explains a late launch; sets of one thread are made once."""

    def __init__(self, table: TraceTable) -> None:
        self.table = table
        self.data = classify.find_phases(table).ranges["data"]
        self.garbage = table.intervals(garbage_rows(table))
        self.blocking = table.is_kind(Kind.RUNTIME) & table.named(classify.SYNCHRONIZE.search)
        self.at_work = table.is_kind(Kind.CPU_OP, Kind.RUNTIME)
        # Some captures hold the waits as events of their own and no runtime calls.
        waits = table.is_kind(Kind.SYNC) & table.named(lambda name: name in _BLOCKING)
        self.waits = empty() if self.blocking.any() else table.intervals(waits)
        self._causes: dict[int, list[Intervals]] = {}
        self._in_wait: dict[int, Intervals] = {}

    def causes(self, thread: int) -> list[Intervals]:
        """Disjoint sets for the causes of ``HOST_LATE`` but the last, which is what they leave."""
        if thread not in self._causes:
            work = self.table.intervals(self.at_work & (self.table.thread == thread))
            self._causes[thread] = disjoint(self.data, self.garbage, self._blocked(thread), work)
        return self._causes[thread]

    def _blocked(self, thread: int) -> Intervals:
        if thread not in self._in_wait:
            calls = self.table.intervals(self.blocking & (self.table.thread == thread))
            self._in_wait[thread] = merge(calls, self.waits)
        return self._in_wait[thread]

    def blocked_at(self, thread: NDArray[np.int32], moment: Times) -> Mask:
        """Whether ``thread[i]`` was in a synchronising call at ``moment[i]``. ``[moments]``"""
        out = np.zeros(moment.size, np.bool_)
        for one in distinct(thread):
            here = thread == one
            out[here] = contains(self._blocked(one), moment[here])
        return out


def garbage_rows(table: TraceTable) -> Mask:
    """Python's garbage collections, which a capture holds when asked (``record_python_gc_info``). ``[rows]``"""
    return table.named(_GARBAGE.__eq__) & ~table.device_rows


def _split(
    table: TraceTable, host: _Host, launched: NDArray[Any], holes: _Holes, latency: int
) -> tuple[Times, NDArray[np.int32]]:
    """(parts ``[causes, gaps]``, launching thread ``[gaps]``). Each gap's parts sum to its length."""
    begin, end, before, after = holes
    call = launched[after]
    thread = np.where(call >= 0, table.thread[call], -1).astype(np.int32)
    replay = (call >= 0) & (launched[before] == call)
    split = (call >= 0) & ~replay
    begun = np.clip(table.start[call], begin, end)
    done = np.clip(table.end[call], begun, end)
    # The device was dry when the call ended: it still takes a moment to start what it was given.
    started = np.where(table.end[call] > begin, np.minimum(done + latency, end), done)
    out = np.zeros((len(CAUSES), begin.size), np.int64)
    parts = dict(zip(CAUSES, out, strict=True))
    np.copyto(parts["graph_gap"], end - begin, where=replay)
    np.copyto(parts["unknown"], end - begin, where=call < 0)
    np.copyto(parts["launch_overhead"], started - begun, where=split)
    np.copyto(parts["kernel_wait"], end - started, where=split)
    for one in distinct(thread[split & (begun > begin)]):
        late = np.flatnonzero(split & (thread == one) & (begun > begin))
        for at, cause in enumerate(host.causes(one)):
            out[at, late] = covered(cause, begin[late], begun[late])
        rest = len(HOST_LATE) - 1
        out[rest, late] = begun[late] - begin[late] - out[:rest, late].sum(axis=0)
    return out, thread


def _host_gaps(table: TraceTable, low: int, high: int, idle_gap_ns: int) -> _Gaps:
    """On a CPU trace the holes over ``idle_gap_ns`` without an operator of the driving threads, within the steps."""
    threads = classify.host_threads(table)
    steps = classify.step_rows(table)
    span = clip(table.intervals(steps) if steps.size else union(np.array([low]), np.array([high])), low, high)
    here = table.on_threads(threads)
    work = here & (table.is_kind(Kind.CPU_OP, Kind.RUNTIME) | _compiled(table))
    collectives = host_collectives(table, threads)
    active = merge(table.intervals(work), host_communication(table, threads, collectives))
    holes = subtract(span, active)
    keep = holes.end - holes.start > idle_gap_ns
    idle = Intervals(holes.start[keep], holes.end[keep])
    named = here & table.is_kind(Kind.ANNOTATION) & ~table.named(classify.STEP.match)
    data, garbage = classify.find_phases(table).ranges["data"], table.intervals(garbage_rows(table))
    evidence = dict(
        zip(
            ("data_loader", "garbage_collection", "python"),
            disjoint(data, garbage, table.intervals(named)),
            strict=True,
        )
    )
    parts = {cause: covered(intersect(one, idle), idle.start, idle.end) for cause, one in evidence.items()}
    parts["unknown"] = idle.end - idle.start - sum(parts.values(), np.zeros(idle.start.size, np.int64))
    stacked = np.stack([parts.get(cause, np.zeros(idle.start.size, np.int64)) for cause in CAUSES])
    rows = np.flatnonzero(work)
    after = np.append(rows, -1)[np.searchsorted(table.start[rows], idle.end)]
    thread = np.where(after >= 0, table.thread[after], -1).astype(np.int32)
    drained = np.zeros(idle.start.size, np.bool_)
    return _Gaps(None, None, idle.start, idle.end, stacked, after, thread, drained, total(span))


def _compiled(table: TraceTable) -> Mask:
    return table.is_kind(Kind.ANNOTATION) & table.named(classify.COMPILED_CALL.match)
