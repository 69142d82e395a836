"""What a late rank was doing: the operator in which it spent more than the next latest rank, since the two last met.

::

    rank 0   met|[fwd   ][bwd  ] arrives
    rank 1   met|        [fwd   ][bwd  ] arrives      it ran nothing longer: the excess is "no recorded event"
    rank 2   met|[fwd            ][bwd  ] arrives     the excess is fwd's

The longest operator alone would always be the backward pass, late or not; what counts is the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.intervals import Intervals, Times, covered, union
from ridgeline.profiling.nesting import launching_operator, nest
from ridgeline.profiling.table import Kind, Mask, TraceTable

NOTHING = "no recorded event"


@dataclass(frozen=True)
class Doing:
    """What a rank did: spans with names, sorted by start, and their union. Arrays are ``[spans]``."""

    name: NDArray[np.intp]
    names: tuple[str, ...]
    start: Times
    end: Times
    busy: Intervals
    longest: int

    def between(self, low: int, high: int) -> dict[str, int]:
        """Time by name inside ``[low, high)``, and the time of nothing. ns"""
        first = int(np.searchsorted(self.start, low - self.longest))
        last = int(np.searchsorted(self.start, high))
        inside = np.minimum(self.end[first:last], high) - np.maximum(self.start[first:last], low)
        sums = np.bincount(self.name[first:last], np.maximum(inside, 0), minlength=len(self.names)).astype(np.int64)
        out = {self.names[code]: int(sums[code]) for code in np.flatnonzero(sums).tolist()}
        out[NOTHING] = high - low - int(covered(self.busy, np.array([low]), np.array([high]))[0])
        return out


def blame(tables: dict[int, TraceTable], whole: pl.DataFrame, rank: int | None = None) -> list[str]:
    """For every row of ``whole`` (``match_collectives``) that arrived last (of ``rank`` alone, when given), in order,
    what that rank did longer than the next latest one."""
    late = whole.filter(pl.col("last") if rank is None else pl.col("last") & (pl.col("rank") == rank))
    if late.is_empty():
        return []
    arrivals = _by_match(whole, "arrival_ns")
    aligned, ends = _by_match(whole, "aligned_arrival_ns"), _by_match(whole, "end_ns")
    device = {one: _device(tables[one]) for one in sorted(set(whole["rank"].to_list()))}
    host = {one: _host(tables[one]) for one in device}
    out = []
    for match, who in late.select("match", "rank").rows():
        others = [one for one in aligned[match] if one != who]
        other = max(others, key=lambda one: (aligned[match][one], -one))
        windows = {}
        for one in (who, other):
            met = _last_meeting(ends, match, who, other, one, _begin(tables[one]))
            windows[one] = (min(met, arrivals[match][one]), arrivals[match][one])
        cause = (
            _excess(device, windows, who, other) if device[who] is not None and device[other] is not None else NOTHING
        )
        out.append(cause if cause != NOTHING else _excess(host, windows, who, other))
    return out


def _excess(doing: dict[int, Any], windows: dict[int, tuple[int, int]], who: int, other: int) -> str:
    """The name on which ``who`` spent most more than ``other``."""
    mine, theirs = doing[who].between(*windows[who]), doing[other].between(*windows[other])
    return str(max(sorted(mine), key=lambda name: int(mine[name] - theirs.get(name, 0))))


def _by_match(whole: pl.DataFrame, column: str) -> dict[int, dict[int, int]]:
    out: dict[int, dict[int, int]] = {}
    for match, rank, value in whole.select("match", "rank", column).rows():
        out.setdefault(match, {})[rank] = value
    return out


def _last_meeting(ends: dict[int, dict[int, int]], match: int, who: int, other: int, one: int, begin: int) -> int:
    """When ``one`` left the previous collective that both ranks took part in; the begin of its trace before the first."""
    for earlier in range(match - 1, -1, -1):
        if who in ends.get(earlier, {}) and other in ends[earlier]:
            return max(ends[earlier][one], begin)
    return begin


def _begin(table: TraceTable) -> int:
    steps = classify.step_rows(table)
    return int(table.start[steps[0]]) if steps.size else int(table.start.min())


def _host(table: TraceTable) -> Doing:
    """Outermost operators and ranges of the threads that drive the step, without steps and our phases."""
    skip = table.named(lambda name: classify.STEP.match(name) or name.startswith("ridgeline."))
    here = np.isin(table.thread, classify.host_threads(table)) & table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & ~skip
    rows = np.flatnonzero(nest(table, here).depth == 0)
    return _doing(table, rows, table.name[rows])


def _device(table: TraceTable) -> Doing | None:
    """Device work that is not communication, by the outermost operator that launched it (by its own name without)."""
    if not table.has_device_timeline:
        return None
    launched = classify.launches(table)
    collective: Mask = classify.kernel_roles(table, classify.find_phases(table), launched).has("communication")
    rows = np.flatnonzero(table.device_rows & ~collective)
    host = nest(table, table.is_kind(Kind.CPU_OP))
    above = launching_operator(host, launched)[rows]
    root = np.where(above >= 0, host.outermost()[above], rows)
    return _doing(table, rows, table.name[root])


def _doing(table: TraceTable, rows: NDArray[np.intp], names: NDArray[np.int32]) -> Doing:
    start, end = table.start[rows], table.end[rows]
    longest = int((end - start).max(initial=0))
    return Doing(names.astype(np.intp), table.names, start, end, union(start, end), longest)
