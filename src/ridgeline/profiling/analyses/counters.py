"""Counters that a trace implies: work waiting in each stream's queue, bytes per second of copies, hardware metrics.

The queue of a stream holds what the host has launched and the device has not finished::

    host     [call 1)[call 2)
    stream         [=kernel 1=)[=kernel 2=)
    queue    0 1....2..........1..........0      up at a call's start, down at an event's end

A launch of a graph puts in as many events as the graph has, and is one launch. What ran before a stream's first
launched event was launched before the capture: it counts from the capture's start. Nothing is estimated.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.launches import streams, why_no_timeline
from ridgeline.profiling.intervals import Times, total, union
from ridgeline.profiling.table import Kind, TraceTable, values

QUEUE_LIMIT = 1024
"""Launches after which CUDA's queue is full and the next launch call blocks."""
_DIRECTION = re.compile(r"\b([HDPA]to[HDPA])\b")

_PLACE = {"device": "id: device, -1 where the file names none", "stream": "id: stream, -1 where the file names none"}
COLUMNS: dict[str, dict[str, str]] = {
    "queue_length": {
        **_PLACE,
        "time_ns": "ns: from this moment to the stream's next row",
        "events": "count: device events launched and not finished",
        "launches": "count: launch calls whose work is not finished (a graph is one)",
    },
    "queue_summary": {
        **_PLACE,
        "device_events": "count: events that went through the queue in the window",
        "unexplained_events": "count: events left out because no launch is known for them",
        "span_ns": "ns: from the first launch to the last finish, within the window",
        "mean_events": "count: events in the queue, weighted by time over the span",
        "max_events": "count: most events in the queue",
        "mean_launches": "count: launches in the queue, weighted by time over the span",
        "max_launches": "count: most launches in the queue",
        "full_ns": "ns: time with at least `limit` launches in the queue, when the host's next launch blocks",
    },
    "memory_bandwidth": {
        "device": "id: device, -1 where the file names none",
        "kind": "class: HtoD, DtoH, DtoD, PtoP, other (copies) or memset",
        "count": "count: copies or sets",
        "without_bytes": "count: of them, those without recorded bytes or without length; they are in no rate",
        "bytes": "bytes: moved or set by the others",
        "sum_ns": "ns: summed durations of the others",
        "busy_ns": "ns: length of their union",
        "mean_gb_per_s": "10^9 bytes/s: bytes / busy_ns, the rate while any of this kind is under way, null without bytes",
        "peak_gb_per_s": "10^9 bytes/s: highest sum of the rates of those under way together, null without bytes",
    },
    "memory_bandwidth_series": {
        "device": "id: device, -1 where the file names none",
        "kind": "class: as in memory_bandwidth",
        "time_ns": "ns: from this moment to the next row of this device and kind",
        "gb_per_s": "10^9 bytes/s: summed rates of those under way; each moves its bytes evenly over its duration",
    },
    "hardware_counters": {
        "kernel": "name: the kernel the range profiler measured, as it wrote it",
        "metric": "name: the hardware counter",
        "count": "count: measured ranges",
        "sum": "as the metric: over the ranges",
        "min": "as the metric: smallest",
        "mean": "as the metric: sum / count",
        "max": "as the metric: largest",
    },
}


def why_empty(table: TraceTable) -> str | None:
    """Why there is no queue and no copy to speak of, or None."""
    return None if table.has_device_timeline else why_no_timeline(table)


def why_no_counters(table: TraceTable) -> str | None:
    """Why there are no hardware counters, or None when there are."""
    if table.is_kind(Kind.COUNTER_RANGE).any():
        return None
    return "no hardware counters in this trace: capture with CUPTI's range profiler (profiler_metrics)"


class _Queue(NamedTuple):
    """Time in the queue of one stream's events and of its launches, clipped to the window; ``[events]``, ``[launches]``."""

    device: int
    stream: int
    event_in: Times
    event_out: Times
    launch_in: Times
    launch_out: Times
    unexplained: int


def queue_length(table: TraceTable, window: tuple[int, int] | None = None) -> pl.DataFrame:
    """The queue of every stream as a step function of time."""
    parts = [_steps(queue) for queue in _queues(table, window)]
    return pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(COLUMNS["queue_length"], pl.Int64))


def queue_summary(table: TraceTable, window: tuple[int, int] | None = None, limit: int = QUEUE_LIMIT) -> pl.DataFrame:
    """Mean, maximum and time at the limit of every stream's queue."""
    rows = []
    for queue in _queues(table, window):
        steps = _steps(queue)
        moments = steps["time_ns"].to_numpy()
        held = np.diff(moments, append=moments[-1:])
        span = int(moments[-1] - moments[0]) if moments.size else 0
        events, launches = steps["events"].to_numpy(), steps["launches"].to_numpy()
        rows.append(
            {
                "device": queue.device,
                "stream": queue.stream,
                "device_events": int(queue.event_in.size),
                "unexplained_events": queue.unexplained,
                "span_ns": span,
                "mean_events": int((events * held).sum()) / max(span, 1),
                "max_events": int(events.max(initial=0)),
                "mean_launches": int((launches * held).sum()) / max(span, 1),
                "max_launches": int(launches.max(initial=0)),
                "full_ns": int(held[launches >= limit].sum()),
            }
        )
    floats = {"mean_events": pl.Float64, "mean_launches": pl.Float64}
    return pl.DataFrame(rows, schema={one: floats.get(one, pl.Int64) for one in COLUMNS["queue_summary"]})


def _queues(table: TraceTable, window: tuple[int, int] | None) -> list[_Queue]:
    """Every stream's queue; streams in order of (device, stream)."""
    if not table.has_device_timeline:
        return []
    launched = classify.launches(table)
    low, high = window if window is not None else (int(table.start.min()), int(table.end.max()))
    rows = np.flatnonzero(table.device_rows & (table.end >= table.start))
    device, stream = streams(table, rows)
    out = []
    places = [(one, two) for one in values(device) for two in values(stream[device == one])]
    for one, two in places:
        here = rows[(device == one) & (stream == two)]
        call, begun, known = _enqueued(table, here, launched)
        event = (begun, table.end[here][known])
        calls, which = np.unique(call[known], return_inverse=True)
        first, last = np.full(calls.size, high), np.full(calls.size, low)
        np.minimum.at(first, which, begun)
        np.maximum.at(last, which, event[1])
        queue = (_clip(*event, low, high), _clip(first, last, low, high))
        out.append(_Queue(one, two, *queue[0], *queue[1], unexplained=int((~known).sum())))
    return out


def _enqueued(
    table: TraceTable, rows: NDArray[np.intp], launched: NDArray[np.intp]
) -> tuple[NDArray[np.intp], Times, NDArray[np.bool_]]:
    """(call, when it entered the queue of those known, whether that is known) of one stream's rows.

    An event carried over from before the capture is a launch of its own (-2 - row) and waits from its start.
    """
    call = launched[rows]
    with_call = call >= 0
    first = int(table.start[rows][with_call].min()) if with_call.any() else np.iinfo(np.int64).max
    carried = ~with_call & (table.start[rows] < first)
    known = with_call | carried
    began = np.where(with_call, table.start[np.maximum(call, 0)], table.start.min())
    call = np.where(carried, -2 - rows, call)
    # Clocks of host and device differ: nothing enters its queue after it started.
    return call, np.minimum(began, table.start[rows])[known], known


def _clip(begin: Times, end: Times, low: int, high: int) -> tuple[Times, Times]:
    inside = (begin < high) & (end > low)
    return np.maximum(begin[inside], low), np.minimum(end[inside], high)


def _steps(queue: _Queue) -> pl.DataFrame:
    """One row per moment at which the queue's length changes or could have."""
    moments = np.concatenate((queue.event_in, queue.event_out, queue.launch_in, queue.launch_out))
    moments.sort()
    moments = moments[np.append(True, moments[1:] != moments[:-1])[: moments.size]]
    return pl.DataFrame(
        {
            "device": np.full(moments.size, queue.device, np.int64),
            "stream": np.full(moments.size, queue.stream, np.int64),
            "time_ns": moments,
            "events": _inside(queue.event_in, queue.event_out, moments),
            "launches": _inside(queue.launch_in, queue.launch_out, moments),
        }
    )


def _inside(begin: Times, end: Times, moments: Times) -> Times:
    """How many of ``[begin[i], end[i])`` hold each moment. ``[moments]``"""
    begun = np.searchsorted(np.sort(begin), moments, side="right")
    begun -= np.searchsorted(np.sort(end), moments, side="right")
    return begun


class _Bytes(msgspec.Struct):
    bytes: int | None = None


class _Copies(NamedTuple):
    """The copies and sets of one device and kind that have bytes and a length, and how many have not."""

    device: int
    kind: str
    start: Times
    end: Times
    bytes: Times
    without: int


def _copies(table: TraceTable, window: tuple[int, int] | None) -> list[_Copies]:
    rows = np.flatnonzero(table.is_kind(Kind.MEMCPY, Kind.MEMSET) & (table.end >= table.start))
    if window is not None:
        rows = rows[(table.start[rows] >= window[0]) & (table.start[rows] < window[1])]
    sizes = np.array([-1 if one is None or one.bytes is None else one.bytes for one in table.decode(rows, _Bytes)])
    device = streams(table, rows)[0]
    codes, inverse = np.unique(table.name[rows], return_inverse=True)
    directions = np.array([_direction(table.names[code]) for code in codes.tolist()], object)
    kinds = np.where(table.kind[rows] == Kind.MEMSET, "memset", directions[inverse])
    out = []
    for one, kind in sorted(set(zip(device.tolist(), kinds.tolist(), strict=True))):
        here = (device == one) & (kinds == kind)
        rated = here & (sizes >= 0) & (table.end[rows] > table.start[rows])
        start, end = table.start[rows[rated]], table.end[rows[rated]]
        out.append(_Copies(one, kind, start, end, sizes[rated].astype(np.int64), int(here.sum() - rated.sum())))
    return out


def _direction(name: str) -> str:
    found = _DIRECTION.search(name)
    return found.group(1) if found else "other"


def memory_bandwidth(table: TraceTable, window: tuple[int, int] | None = None) -> pl.DataFrame:
    """Bytes and rates of the copies and sets that start in the window, by device and kind."""
    rows = []
    for copies in _copies(table, window):
        moved, busy = int(copies.bytes.sum()), total(union(copies.start, copies.end))
        rows.append(
            {
                "device": copies.device,
                "kind": copies.kind,
                "count": int(copies.start.size) + copies.without,
                "without_bytes": copies.without,
                "bytes": moved,
                "sum_ns": int((copies.end - copies.start).sum()),
                "busy_ns": busy,
                "mean_gb_per_s": moved / busy if busy else None,
                "peak_gb_per_s": float(_rates(copies)[1].max()) if busy else None,
            }
        )
    types = {"kind": pl.String, "mean_gb_per_s": pl.Float64, "peak_gb_per_s": pl.Float64}
    return pl.DataFrame(rows, schema={one: types.get(one, pl.Int64) for one in COLUMNS["memory_bandwidth"]})


def memory_bandwidth_series(table: TraceTable, window: tuple[int, int] | None = None) -> pl.DataFrame:
    """The rate of each kind of copy as a step function of time."""
    types = {"device": pl.Int64, "kind": pl.String, "time_ns": pl.Int64, "gb_per_s": pl.Float64}
    parts = [pl.DataFrame(schema=types)]
    for copies in _copies(table, window):
        moments, rates = _rates(copies)
        size = moments.size
        place = {"device": np.full(size, copies.device, np.int64), "kind": [copies.kind] * size}
        parts.append(pl.DataFrame({**place, "time_ns": moments, "gb_per_s": rates}, schema=types))
    return pl.concat(parts)


def _rates(copies: _Copies) -> tuple[Times, NDArray[np.float64]]:
    """Moments of change and the summed rate from each to the next. Bytes per ns are GB/s."""
    rate = copies.bytes / np.maximum(copies.end - copies.start, 1)
    moments, at = np.unique(np.concatenate((copies.start, copies.end)), return_inverse=True)
    change, under_way = np.zeros(moments.size), np.zeros(moments.size, np.int64)
    np.add.at(change, at, np.concatenate((rate, -rate)))
    np.add.at(under_way, at, np.repeat([1, -1], copies.start.size))
    # Rounding of the running sum must not leave a rate where nothing is under way.
    return moments, np.where(np.cumsum(under_way) > 0, np.maximum(np.cumsum(change), 0.0), 0.0)


def hardware_counters(table: TraceTable) -> pl.DataFrame:
    """Metrics of CUPTI's range profiler by kernel and counter; whatever is no number is left out."""
    found: list[tuple[str, str, float]] = []
    for row in np.flatnonzero(table.is_kind(Kind.COUNTER_RANGE)).tolist():
        values = _numbers(bytes(table.args[row]))
        found += [(table.names[table.name[row]], metric, value) for metric, value in values.items()]
    frame = pl.DataFrame(found, schema={"kernel": pl.String, "metric": pl.String, "value": pl.Float64}, orient="row")
    value = pl.col("value")
    grouped = frame.group_by("kernel", "metric").agg(
        count=pl.len().cast(pl.Int64), sum=value.sum(), min=value.min(), mean=value.mean(), max=value.max()
    )
    return grouped.sort("metric", "sum", "kernel", descending=[False, True, False])


def _numbers(raw: bytes) -> dict[str, float]:
    try:
        values = msgspec.json.decode(raw or b"{}")
    except msgspec.DecodeError:
        return {}
    return {
        key: float(value)
        for key, value in (values.items() if isinstance(values, dict) else ())
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
