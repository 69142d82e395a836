"""Launches: how long the host took to hand work to the accelerator, and how long that work then waited.

A launch call and its device events carry one correlation id; one call may make many events (a graph)::

    host     [--call--)
    device        .........[--kernel--)  [--kernel--)
                      |delay|                           delay = first event's start - call's end, signed:
                                                        negative when the work began while the call was under way

Calls are found by correlation alone, so Triton's ``cuLaunchKernel``, HIP's calls and graph launches count like any.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.table import Kind, TraceTable, look_up, row_numbers

LAUNCH_CALL = re.compile(r"Launch(?!HostFunc)|Memcpy|Memset", re.IGNORECASE)
"""Runtime calls that ask for device work: only to tell a trace that lost its device rows from one of the CPU alone."""
SLOW_CALL_NS, LONG_DELAY_NS = 50_000, 100_000

COLUMNS: dict[str, dict[str, str]] = {
    "launch_calls": {
        "launch": "name: the runtime call that launched device work",
        "correlation": "id: correlation id of the call and of all it launched, -1 where the file gives none",
        "start_ns": "ns: start of the call",
        "call_ns": "ns: duration of the call on the host",
        "delay_ns": "ns, signed: start of the first device event less the end of the call",
        "device_ns": "ns: summed durations of the device events it launched",
        "device_events": "count: device events it launched (more than one for a graph)",
        "first_event": "name: the first device event it launched",
    },
    "launch_statistics": {
        "launch": "name: the runtime call; '(all)' sums up every call",
        "calls": "count: calls that launched device work",
        "device_events": "count: device events they launched",
        "call_sum_ns": "ns: summed durations of the calls",
        "call_min_ns": "ns: shortest call",
        "call_mean_ns": "ns: call_sum_ns / calls",
        "call_max_ns": "ns: longest call",
        "delay_min_ns": "ns, signed: smallest delay from the call's end to its first device event",
        "delay_mean_ns": "ns, signed: mean delay",
        "delay_median_ns": "ns, signed: median delay",
        "delay_max_ns": "ns, signed: largest delay",
        "device_sum_ns": "ns: summed durations of the device events",
        "short_calls": "count: calls that took longer than all the device work they launched",
        "slow_calls": "count: calls longer than slow_call_ns",
        "delayed_calls": "count: calls whose delay exceeds long_delay_ns",
    },
}


def streams(table: TraceTable, rows: NDArray[Any] | None = None) -> tuple[Times, Times]:
    """Device and stream of every row, or of ``rows``: of its arguments, else the numbers in its track's names, else -1.
    ``[len(rows)]``"""

    def number(text: str) -> int:
        found = re.search(r"\d{1,18}", text)
        return int(found.group()) if found else -1

    tracks = np.array([(number(pid), number(tid)) for pid, tid in table.threads], np.int64).reshape(-1, 2)
    device, stream, track = (
        column if rows is None else column[rows] for column in (table.device, table.stream, table.thread)
    )
    return (
        np.where(device >= 0, device, look_up(tracks[:, 0], track)).astype(np.int64, copy=False),
        np.where(stream >= 0, stream, look_up(tracks[:, 1], track)).astype(np.int64, copy=False),
    )


def texts(labels: Sequence[str], codes: NDArray[np.integer[Any]]) -> pl.Series:
    """``labels[code]`` of every code. The rows share the labels' bytes: kernel names are long and their rows many."""
    return pl.Series(list(labels), dtype=pl.String).gather(codes)


def why_empty(table: TraceTable) -> str | None:
    """Why there is no launch to speak of, or None when there is one."""
    if not table.has_device_timeline:
        return why_no_timeline(table)
    if not (classify.launches(table) >= 0).any():
        return "no device event has the correlation id of a runtime call: the capture recorded no launches"
    return None


def why_no_timeline(table: TraceTable) -> str:
    """What kind of trace without device rows this is, in a sentence."""
    calls = int((table.is_kind(Kind.RUNTIME) & table.named(LAUNCH_CALL.search)).sum())
    if calls:
        return f"no timeline of the accelerator: {calls} launches were recorded but not one device event"
    return "no accelerator in this trace: it shows the CPU alone"


def launch_calls(table: TraceTable, window: tuple[int, int] | None = None) -> pl.DataFrame:
    """One row per runtime call that launched device work, in time order; those that start in the window.

    Events and calls that end before they start are left out (integrity reports them).
    """
    launched = classify.launches(table)
    rows = row_numbers((launched >= 0) & (table.end >= table.start))
    call = launched[rows]
    sound = table.end[call] >= table.start[call]
    if window is not None:
        sound &= (table.start[call] >= window[0]) & (table.start[call] < window[1])
    rows, call = rows[sound], call[sound]
    # Rows are in time order, so the first of each call is its earliest event.
    calls, first, inverse, events = np.unique(call, return_index=True, return_inverse=True, return_counts=True)
    work = np.zeros(calls.size, np.int64)
    np.add.at(work, inverse, table.end[rows] - table.start[rows])
    head = rows[first]
    return pl.DataFrame(
        {
            "launch": texts(table.names, table.name[calls]),
            "correlation": table.correlation[calls],
            "start_ns": table.start[calls],
            "call_ns": table.end[calls] - table.start[calls],
            "delay_ns": table.start[head] - table.end[calls],
            "device_ns": work,
            "device_events": events.astype(np.int64),
            "first_event": texts(table.names, table.name[head]),
        }
    )


def launch_statistics(
    table: TraceTable,
    window: tuple[int, int] | None = None,
    slow_call_ns: int = SLOW_CALL_NS,
    long_delay_ns: int = LONG_DELAY_NS,
) -> pl.DataFrame:
    """Launches by the name of the call, most host time first, and ``(all)`` of them as the first row."""
    calls = launch_calls(table, window)
    if calls.is_empty():
        return _statistics(calls, slow_call_ns, long_delay_ns)
    together = _statistics(calls.with_columns(launch=pl.lit("(all)")), slow_call_ns, long_delay_ns)
    each = _statistics(calls, slow_call_ns, long_delay_ns)
    return pl.concat([together, each.sort(["call_sum_ns", "launch"], descending=[True, False])])


def _statistics(calls: pl.DataFrame, slow_call_ns: int, long_delay_ns: int) -> pl.DataFrame:
    call, delay, work = pl.col("call_ns"), pl.col("delay_ns"), pl.col("device_ns")
    return calls.group_by("launch").agg(
        calls=pl.len().cast(pl.Int64),
        device_events=pl.col("device_events").sum(),
        call_sum_ns=call.sum(),
        call_min_ns=call.min(),
        call_mean_ns=call.mean(),
        call_max_ns=call.max(),
        delay_min_ns=delay.min(),
        delay_mean_ns=delay.mean(),
        delay_median_ns=delay.median(),
        delay_max_ns=delay.max(),
        device_sum_ns=work.sum(),
        short_calls=(work < call).sum().cast(pl.Int64),
        slow_calls=(call > slow_call_ns).sum().cast(pl.Int64),
        delayed_calls=(delay > long_delay_ns).sum().cast(pl.Int64),
    )
