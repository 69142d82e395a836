"""Lanes of the timeline: a rank's host threads, those that drive the step first, then its devices' streams."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ridgeline.profiling import classify
from ridgeline.profiling.table import Kind, TraceTable

_AUTOGRAD = re.compile(r"autograd::engine::evaluate_function")


@dataclass(frozen=True)
class Lane:
    """A thread's or stream's events. ``ranges`` marks the lane of a stream's named ranges and synchronisations, which
    overlap its kernels."""

    label: str
    kind: str
    thread: int
    ranges: bool


def find_lanes(table: TraceTable) -> list[Lane]:
    """The lanes of a table, every event in exactly one."""
    hosts: list[tuple[tuple[int, int], Lane]] = []
    streams: list[tuple[tuple[int, int, bool], Lane]] = []
    ranges, device = table.is_kind(Kind.GPU_ANNOTATION, Kind.SYNC), table.device_rows
    jobs = _jobs(table)
    for code in np.unique(table.thread).tolist():
        here = table.thread == code
        for upper in (True, False):
            rows = np.flatnonzero(here & (ranges == upper))
            if not rows.size:
                continue
            if upper or device[rows].any():
                key, lane = _stream(table, code, upper, np.flatnonzero(here & device))
                streams.append((key, lane))
            else:
                order, job = jobs.get(code, (3, "thread"))
                lane = Lane(f"{job} {table.threads[code][1]}", "thread", code, False)
                hosts.append(((order, -rows.size), lane))
    return [lane for _, lane in sorted(hosts, key=_key)] + [lane for _, lane in sorted(streams, key=_key)]


def _key(pair: tuple[tuple[int, ...], Lane]) -> tuple[int, ...]:
    return pair[0]


def _stream(
    table: TraceTable, code: int, upper: bool, work: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> tuple[tuple[int, int, bool], Lane]:
    """A stream's lane and where it sorts; its ranges stand above it."""
    pid, tid = table.threads[code]
    device, stream = (int(table.device[work[0]]), int(table.stream[work[0]])) if work.size else (-1, -1)
    label = f"device {device if device >= 0 else pid} stream {stream if stream >= 0 else tid}"
    return (device, stream, not upper), Lane(label + (" ranges" if upper else ""), "stream", code, upper)


def _jobs(table: TraceTable) -> dict[int, tuple[int, str]]:
    """What is known of host threads: the one with the steps, those that run backward, those that move data."""
    ops = table.is_kind(Kind.CPU_OP)
    found: dict[int, tuple[int, str]] = {}
    for code in classify.transfer_threads(table):
        found[code] = (2, "transfer thread")
    for code in np.unique(table.thread[ops & table.named(_AUTOGRAD.match)]).tolist():
        found[code] = (1, "autograd thread")
    for code in np.unique(table.thread[classify.step_rows(table)]).tolist():
        found[code] = (0, "main thread")
    return found
