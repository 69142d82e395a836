"""What a late rank was doing: the operator in which it spent more than the next latest rank, since the two last met.

::

    rank 0   met|[fwd   ][bwd  ] arrives
    rank 1   met|        [fwd   ][bwd  ] arrives      it ran nothing longer: the excess is "no recorded event"
    rank 2   met|[fwd            ][bwd  ] arrives     the excess is fwd's

The longest operator alone would always be the backward pass, late or not; what counts is the difference, and of several
differences those that come again: a thread that the system put aside for 10 ms in one operator is longer once. Time inside
the call of a collective (waking up from the previous one) has that call's name, whatever operator is around it.
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
MOST_STEPS = 100
"""Steps that say what comes again, the last ones."""
COMES_AGAIN = 4
"""An excess is what a rank has in all but one of so many steps."""
LEAST_PART = 0.1
"""Of the wait that a collective cost: what an excess must be to explain it."""


@dataclass(frozen=True)
class Doing:
    """What a rank did: spans with names, sorted by start, and their union. Arrays are ``[spans]``; ``sign`` is -1 where a
    span is taken out of the one around it."""

    name: NDArray[np.intp]
    names: tuple[str, ...]
    start: Times
    end: Times
    sign: Times
    busy: Intervals
    longest: int

    def between(self, low: int, high: int) -> dict[str, int]:
        """Time by name inside ``[low, high)``, and the time of nothing. ns"""
        first = int(np.searchsorted(self.start, low - self.longest))
        last = int(np.searchsorted(self.start, high))
        inside = np.minimum(self.end[first:last], high) - np.maximum(self.start[first:last], low)
        weights = np.maximum(inside, 0) * self.sign[first:last]
        sums = np.bincount(self.name[first:last], weights, minlength=len(self.names)).astype(np.int64)
        out = {self.names[code]: int(sums[code]) for code in np.flatnonzero(sums).tolist()}
        out[NOTHING] = high - low - int(covered(self.busy, np.array([low]), np.array([high]))[0])
        return out


def blame(tables: dict[int, TraceTable], whole: pl.DataFrame, rank: int | None = None) -> list[str]:
    """For every row of ``whole`` (``match_collectives``) that arrived last (of ``rank`` alone, when given), in order,
    what that rank did longer than the next latest one: of what it does longer step after step the most, else the most."""
    late = whole.filter(pl.col("last") if rank is None else pl.col("last") & (pl.col("rank") == rank))
    if late.is_empty():
        return []
    compared = _Compared(tables, whole)
    return [compared.cause(match, who) for match, who in late.select("match", "rank").rows()]


class _Compared:
    """What each rank did before each collective, against the latest of the others."""

    def __init__(self, tables: dict[int, TraceTable], whole: pl.DataFrame) -> None:
        self.arrivals, self.ends = _by_match(whole, "arrival_ns"), _by_match(whole, "end_ns")
        self.aligned = _by_match(whole, "aligned_arrival_ns")
        self.steps = dict(whole.select("match", "step").rows())
        self.cost = dict(whole.group_by("match").agg(pl.col("caused_wait_ns").max()).rows())
        ranks = sorted(set(whole["rank"].to_list()))
        self.begin = {one: _begin(tables[one]) for one in ranks}
        self.layers: dict[str, dict[int, Any]] = {
            "device": {one: _device(tables[one]) for one in ranks},
            "host": {one: _host(tables[one]) for one in ranks},
        }
        self.usual: dict[tuple[str, int], dict[str, int]] = {}

    def cause(self, match: int, who: int) -> str:
        """The name to blame; device work comes first, where both ranks have any."""
        found = self._most("device", match, who)
        return found if found != NOTHING else self._most("host", match, who)

    def _most(self, layer: str, match: int, who: int) -> str:
        more = self._excess(layer, match, who)
        if more is None:
            return NOTHING
        usual = self._usually(layer, who)
        again = {name: min(excess, usual.get(name, 0)) for name, excess in more.items()}
        least = max(LEAST_PART * self.cost[match], 1)
        chosen = again if max(again.values()) >= least else more
        return max(sorted(chosen), key=lambda name: (chosen[name], more[name]))

    def _excess(self, layer: str, match: int, who: int) -> dict[str, int] | None:
        """By name, what ``who`` spent since it last met the latest of the others less what that one did. ns"""
        others = [one for one in self.aligned[match] if one != who]
        other = max(others, key=lambda one: (self.aligned[match][one], -one))
        mine, theirs = self.layers[layer][who], self.layers[layer][other]
        if mine is None or theirs is None:
            return None
        low = {one: _last_meeting(self.ends, match, who, other, one, self.begin[one]) for one in (who, other)}
        high = self.arrivals[match]
        spent, beside = (
            doing.between(min(low[one], high[one]), high[one]) for doing, one in ((mine, who), (theirs, other))
        )
        return {name: spent.get(name, 0) - beside.get(name, 0) for name in spent.keys() | beside.keys()}

    def _usually(self, layer: str, who: int) -> dict[str, int]:
        """By name, the excess that comes again step after step (the lower quartile), whether or not ``who`` came last:
        what was longer now and then is noise. Collectives outside of steps are a step each."""
        if (layer, who) in self.usual:
            return self.usual[layer, who]
        mine = [match for match, ranks in self.aligned.items() if who in ranks and len(ranks) > 1]
        keys = {match: match if self.steps[match] is None else -1 - self.steps[match] for match in mine}
        chosen = set(list(dict.fromkeys(keys.values()))[-MOST_STEPS:])
        sums: dict[str, dict[int, int]] = {}
        for match in (one for one in mine if keys[one] in chosen):
            for name, excess in (self._excess(layer, match, who) or {}).items():
                by_step = sums.setdefault(name, {})
                by_step[keys[match]] = by_step.get(keys[match], 0) + excess
        missing = {name: [0] * (len(chosen) - len(by_step)) for name, by_step in sums.items()}
        self.usual[layer, who] = {
            name: sorted([*by_step.values(), *missing[name]])[(len(chosen) - 1) // COMES_AGAIN]
            for name, by_step in sums.items()
        }
        return self.usual[layer, who]


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
    nesting = nest(table, here)
    rows = np.flatnonzero(nesting.depth == 0)
    calls = np.flatnonzero(here & table.named(classify.COLLECTIVE_OP.match))
    calls = calls[nesting.depth[calls] > 0]
    around = nesting.outermost()[calls]
    names = np.concatenate((table.name[rows], table.name[calls], table.name[around]))
    sign = np.repeat([1, 1, -1], (rows.size, calls.size, calls.size))
    return _doing(table, np.concatenate((rows, calls, calls)), names, sign)


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
    return _doing(table, rows, table.name[root], np.ones(rows.size, np.int64))


def _doing(table: TraceTable, rows: NDArray[np.intp], names: NDArray[np.int32], sign: Times) -> Doing:
    order = np.argsort(table.start[rows], kind="stable")
    start, end = table.start[rows][order], table.end[rows][order]
    longest = int((end - start).max(initial=0))
    return Doing(names[order].astype(np.intp), table.names, start, end, sign[order], union(start, end), longest)
