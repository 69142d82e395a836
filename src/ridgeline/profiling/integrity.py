"""What the capture lost, by class: small, but each line is true. A figure made unsafe by it is the reader's to judge."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Times, clip, total
from ridgeline.profiling.table import Kind, Mask, TraceTable

_LAUNCH = re.compile(r"(Launch(?!HostFunc)|Memcpy|Memset)", re.IGNORECASE)
_MEMSET = re.compile(r"Memset", re.IGNORECASE)
_CAPTURE_EDGE = re.compile(r"Stream(Begin|End)Capture", re.IGNORECASE)
MEANING = {
    "elided_memset": "memsets of nothing, elided by the driver",
    "graph_capture": "recorded into a graph, not run",
    "lost": "lost by the profiler",
    "carry_over": "launched before the capture",
    "unexplained": "unexplained",
}


@dataclass(frozen=True)
class Integrity:
    """Counts of what is missing or odd in one rank's trace. Empty dictionaries mean nothing was found."""

    steps_recorded: int
    steps_expected: int | None
    steps_missing: list[int]
    launches_without_kernel: dict[str, int]
    kernels_without_launch: dict[str, int]
    device_ns_after_last_step: int
    negative_durations: int
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is missing that could change a figure."""
        lost = self.launches_without_kernel.get("lost", 0) + self.kernels_without_launch.get("unexplained", 0)
        short = self.steps_expected is not None and self.steps_recorded < self.steps_expected
        return not (lost or short or self.steps_missing or self.negative_durations)


def examine(table: TraceTable, launched: NDArray[np.intp], low: Times, high: Times, numbers: list[int]) -> Integrity:
    """Look for what the capture lost. ``launched`` as from :func:`ridgeline.profiling.classify.launches`."""
    gaps = sorted(set(range(min(numbers), max(numbers) + 1)) - set(numbers)) if numbers else []
    expected = table.meta.ridgeline.get("active")
    return Integrity(
        steps_recorded=len(numbers),
        steps_expected=expected if isinstance(expected, int) else None,
        steps_missing=gaps,
        launches_without_kernel=_launches_without_kernel(table, launched),
        kernels_without_launch=_kernels_without_launch(table, launched),
        device_ns_after_last_step=_after(table, int(high.max())) if numbers else 0,
        negative_durations=int((table.end < table.start).sum()),
        notes=_notes(table, numbers),
    )


def describe(integrity: Integrity, step_seconds: float, steps: int) -> list[str]:
    """What a reader must know before trusting the figures, one line each; empty when nothing is missing."""
    lines = list(integrity.notes)
    if integrity.steps_expected is not None and integrity.steps_recorded < integrity.steps_expected:
        lines.append(f"only {integrity.steps_recorded} of {integrity.steps_expected} steps were recorded")
    if integrity.steps_missing:
        lines.append(f"steps {integrity.steps_missing} are missing between the recorded ones")
    for name, count in integrity.launches_without_kernel.items():
        lines.append(f"{count} launches without a device event: {MEANING[name]}")
    for name, count in integrity.kernels_without_launch.items():
        lines.append(f"{count} device events without a launch: {MEANING[name]}")
    late = integrity.device_ns_after_last_step / 1e9
    if late > 0.05 * step_seconds * steps:
        lines.append(f"the device still worked {late:.4f} s after the last step: its host runs ahead of it")
    if integrity.negative_durations:
        lines.append(f"{integrity.negative_durations} events end before they start and were ignored")
    return lines


def missing_ranks(held: list[int], world: int) -> list[int]:
    """Ranks of the job whose trace is not here."""
    return sorted(set(range(world)) - set(held))


def _launches_without_kernel(table: TraceTable, launched: NDArray[np.intp]) -> dict[str, int]:
    """Launch calls with no device event: elided memsets (zero bytes), graph capture (records, runs nothing), or lost."""
    rows = table.is_kind(Kind.RUNTIME) & table.named(_LAUNCH.search)
    if not rows.any() or not table.has_device_timeline:
        return {}
    alone = rows.copy()
    alone[launched[launched >= 0]] = False
    memset = alone & table.named(_MEMSET.search)
    capture = alone & ~memset & _in_graph_capture(table)
    classes = {"elided_memset": memset, "graph_capture": capture, "lost": alone & ~memset & ~capture}
    return {name: int(mask.sum()) for name, mask in classes.items() if mask.any()}


def _in_graph_capture(table: TraceTable) -> Mask:
    """Rows between a stream's begin and end of capture, on any thread. ``[rows]``"""
    edges = np.flatnonzero(table.is_kind(Kind.RUNTIME) & table.named(_CAPTURE_EDGE.search))
    begins = np.array([("begin" in table.names[code].lower()) for code in table.name[edges].tolist()], np.bool_)
    depth = np.cumsum(np.where(begins, 1, -1)) if edges.size else np.empty(0, np.int64)
    depth -= min(int(depth.min(initial=0)), 0)  # the capture of a graph may have begun before ours
    at = np.searchsorted(table.start[edges], table.start, side="right") - 1
    if not edges.size:
        return np.zeros(len(table), np.bool_)
    before_first = not begins[0]
    return np.where(at >= 0, depth[np.maximum(at, 0)] > 0, before_first)


def _kernels_without_launch(table: TraceTable, launched: NDArray[np.intp]) -> dict[str, int]:
    """Device events with no launch call: carried over from before the capture, or unexplained.

    Work of one stream runs in order, so whatever runs before the stream's first launched event was launched
    before the capture began.
    """
    device = table.device_rows
    alone = device & (launched < 0)
    if not alone.any():
        return {}
    carried = np.zeros(len(table), np.bool_)
    for stream in np.unique(table.thread[alone]).tolist():
        here = table.thread == stream
        known = table.start[device & here & (launched >= 0)]
        carried |= alone & here & (table.start < (known.min() if known.size else np.iinfo(np.int64).max))
    classes = {"carry_over": carried, "unexplained": alone & ~carried}
    return {name: int(mask.sum()) for name, mask in classes.items() if mask.any()}


def _after(table: TraceTable, moment: int) -> int:
    busy = table.intervals(table.device_rows)
    return total(clip(busy, moment, max(moment, int(busy.end[-1])))) if busy.end.size else 0


def _notes(table: TraceTable, numbers: list[int]) -> list[str]:
    notes = list(table.meta.repairs)
    runtime = table.is_kind(Kind.RUNTIME) & table.named(_LAUNCH.search)
    if runtime.any() and not table.has_device_timeline:
        notes.append(f"{int(runtime.sum())} launches but no GPU timeline: this is the host's split, not the GPU's")
    if not numbers:
        notes.append("no ProfilerStep in the trace: the whole capture is one window")
    return notes
