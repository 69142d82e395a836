"""Where a rank's time went: computing, communicating, copying, or nothing at all; the sums are exact.

On an accelerator the window is its span, from the first device event to the last (or the step asked for)::

    compute        ====   =====      ======
    communication     -------    ---------
    copies                         ..        ..
    exposed                 --   ---              communication that no compute covers
    idle                                   XX     no device event of any kind

``compute + exposed communication + exposed copies + idle = span``. Kernels of which nobody knows whether they compute
count as compute and stand in ``unknown_ns`` too. Without an accelerator the window is the profiled steps; the host's
driving and autograd threads compute in their outermost operators, and a collective lasts from its call to the end of
its transfer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from ridgeline.errors import UserError
from ridgeline.profiling import classify
from ridgeline.profiling.communication import host_collectives, host_communication
from ridgeline.profiling.intervals import Intervals, Times, empty, intersect, merge, subtract, total, union
from ridgeline.profiling.table import Kind, TraceTable

COLUMNS = {
    "step": "the profiler's step number; null for the whole capture",
    "device": "gpu when the trace has a device timeline, else cpu",
    "start_ns": "ns: start of the window on the trace's clock",
    "span_ns": "ns: length of the window: first device event to last, the step, or on a CPU all profiled steps",
    "busy_ns": "ns: union of all device events; on a CPU of compute and communication",
    "idle_ns": "ns: span less busy",
    "compute_ns": "ns: union of kernels that are not collectives, unknown ones included; on a CPU of outermost operators",
    "communication_ns": "ns: union of collectives",
    "exposed_communication_ns": "ns: communication not covered by compute",
    "memory_ns": "ns: union of copies and sets",
    "exposed_memory_ns": "ns: copies and sets not covered by compute or communication",
    "unknown_ns": "ns: union of device events of a kind nobody described; inside compute too",
    "overlap_fraction": "share: 1 - exposed / communication; null without communication",
    "kernel_count": "kernels that start in the window, copies and sets not counted",
}


@dataclass(frozen=True)
class Activity:
    """What a rank did, as sets of moments, and the starts of its kernels (sorted). ``window`` is the default one."""

    device: str
    compute: Intervals
    communication: Intervals
    memory: Intervals
    unknown: Intervals
    window: Intervals
    kernels: Times


def temporal_breakdown(table: TraceTable, steps: bool = False, step: int | None = None) -> pl.DataFrame:
    """One row for the whole capture, or per profiler step (``steps``), or for one ``step``. Columns: ``COLUMNS``.

    Raises:
        UserError: no timed event, or no such step.
    """
    if not len(table):
        raise UserError(f"trace {table.meta.source}: holds no timed event")
    found = activity(table)
    windows: list[tuple[int | None, Intervals]] = [(None, found.window)]
    if step is not None:
        windows = [(step, _one(*step_window(table, step)))]
    elif steps:
        windows = [(number, _one(start, end)) for number, start, end in step_windows(table)]
    rows = [_row(found, number, window) for number, window in windows]
    return pl.DataFrame(rows, schema=_SCHEMA)


def step_windows(table: TraceTable) -> list[tuple[int, int, int]]:
    """(number, start, end) of every profiler step on the host, in time order; unnumbered ones are counted from 0."""
    out = []
    for at, row in enumerate(classify.step_rows(table).tolist()):
        match = classify.STEP.match(table.names[table.name[row]])
        number = int(match.group(1)) if match and match.group(1) else at
        out.append((number, int(table.start[row]), int(table.end[row])))
    return out


def step_window(table: TraceTable, step: int) -> tuple[int, int]:
    """Start and end of one profiler step, ns.

    Raises:
        UserError: no such step.
    """
    windows = step_windows(table)
    for number, start, end in windows:
        if number == step:
            return start, end
    has = f"its steps are {windows[0][0]} to {windows[-1][0]}" if windows else "it has no ProfilerStep"
    raise UserError(f"trace {table.meta.source}: no step {step}; {has}")


def activity(table: TraceTable) -> Activity:
    """The sets of moments that every breakdown is made of."""
    return table.once("activity", lambda: _device(table) if table.has_device_timeline else _host(table))


def _device(table: TraceTable) -> Activity:
    phases, launched = classify.find_phases(table), classify.launches(table)
    roles = classify.device_roles(table, phases, launched)
    device = table.device_rows
    ends = np.maximum(table.start[device], table.end[device])
    return Activity(
        device="gpu",
        compute=table.intervals(roles.compute | roles.optimizer | roles.unknown),
        communication=table.intervals(roles.collective),
        memory=table.intervals(roles.copies),
        unknown=table.intervals(roles.unknown),
        window=union(table.start[device].min(keepdims=True), ends.max(keepdims=True)),
        kernels=np.sort(table.start[table.is_kind(Kind.KERNEL)]),
    )


def _host(table: TraceTable) -> Activity:
    threads = classify.host_threads(table)
    ops = table.is_kind(Kind.CPU_OP) | (table.is_kind(Kind.ANNOTATION) & table.named(classify.COMPILED_CALL.match))
    calls = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & table.named(classify.COLLECTIVE_OP.match)
    compute = empty()
    for thread in threads:  # a thread that computes while another is inside a collective's call goes on computing
        on = table.thread == thread
        compute = merge(compute, subtract(table.intervals(ops & ~calls & on), table.intervals(calls & on)))
    steps = classify.step_rows(table)
    whole = union(table.start.min(keepdims=True), table.end.max(keepdims=True))
    window = union(table.start[steps], table.end[steps]) if steps.size else whole
    communication = host_communication(table, threads, host_collectives(table, threads))
    return Activity(
        device="cpu",
        compute=intersect(compute, window),
        communication=intersect(communication, window),
        memory=empty(),
        unknown=empty(),
        window=window,
        kernels=np.empty(0, np.int64),
    )


def _one(start: int, end: int) -> Intervals:
    return union(np.array([start]), np.array([end]))


def _row(found: Activity, step: int | None, window: Intervals) -> dict[str, object]:
    compute, communication, memory, unknown = (
        intersect(one, window) for one in (found.compute, found.communication, found.memory, found.unknown)
    )
    span, busy = total(window), total(merge(compute, communication, memory))
    exposed, spent = total(subtract(communication, compute)), total(communication)
    low, high = (int(window.start[0]), int(window.end[-1])) if span else (0, 0)
    return {
        "step": step,
        "device": found.device,
        "start_ns": low,
        "span_ns": span,
        "busy_ns": busy,
        "idle_ns": span - busy,
        "compute_ns": total(compute),
        "communication_ns": spent,
        "exposed_communication_ns": exposed,
        "memory_ns": total(memory),
        "exposed_memory_ns": total(subtract(memory, merge(compute, communication))),
        "unknown_ns": total(unknown),
        "overlap_fraction": 1 - exposed / spent if spent else None,
        "kernel_count": found.kernels.size
        if window is found.window
        else int(np.diff(np.searchsorted(found.kernels, [low, high]))[0]),
    }


_SCHEMA = {
    name: pl.Float64 if name == "overlap_fraction" else pl.String if name == "device" else pl.Int64 for name in COLUMNS
}
