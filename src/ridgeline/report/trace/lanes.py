"""Lanes of the timeline: a rank's host threads, those that drive the step first, then its devices' streams.

The Python frames of a thread, often dozens deep, have a lane of their own under its operators; so have the named ranges
and synchronisations of a stream, which overlap its kernels, above them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ridgeline.profiling import classify
from ridgeline.profiling.table import Kind, Mask, TraceTable

_AUTOGRAD = re.compile(r"autograd::engine::evaluate_function")


@dataclass(frozen=True)
class Lane:
    """Events of a thread or stream: those of one ``part``."""

    label: str
    kind: str
    thread: int
    part: str


def parts(table: TraceTable) -> dict[str, Mask]:
    """Every event in exactly one part. ``[rows]`` each"""
    ranges, python = table.is_kind(Kind.GPU_ANNOTATION, Kind.SYNC), table.is_kind(Kind.PYTHON)
    return {"ranges": ranges, "": ~(ranges | python), "python": python}


def find_lanes(table: TraceTable) -> list[Lane]:
    """The lanes of a table, every event in exactly one."""
    hosts: list[tuple[tuple[int, ...], Lane]] = []
    streams: list[tuple[tuple[int, ...], Lane]] = []
    device, jobs = table.device_rows, _jobs(table)
    for code in np.unique(table.thread).tolist():
        here = table.thread == code
        size = int(here.sum())
        for at, (part, mask) in enumerate(parts(table).items()):
            rows = np.flatnonzero(here & mask)
            if not rows.size:
                continue
            if part == "ranges" or device[rows].any():
                key, lane = _stream(table, code, part, np.flatnonzero(here & device))
                streams.append(((*key, at), lane))
            else:
                order, job = jobs.get(code, (3, "thread"))
                label = f"{job} {table.threads[code][1]}" + (" Python" if part == "python" else "")
                hosts.append(((order, -size, code, at), Lane(label, "thread", code, part)))
    return [lane for _, lane in sorted(hosts, key=_key)] + [lane for _, lane in sorted(streams, key=_key)]


def _key(pair: tuple[tuple[int, ...], Lane]) -> tuple[int, ...]:
    return pair[0]


def _stream(
    table: TraceTable, code: int, part: str, work: np.ndarray[tuple[int], np.dtype[np.intp]]
) -> tuple[tuple[int, int], Lane]:
    """A stream's lane and where it sorts."""
    pid, tid = table.threads[code]
    device, stream = (int(table.device[work[0]]), int(table.stream[work[0]])) if work.size else (-1, -1)
    label = f"device {device if device >= 0 else pid} stream {stream if stream >= 0 else tid}"
    return (device, stream), Lane(label + (" ranges" if part == "ranges" else ""), "stream", code, part)


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
