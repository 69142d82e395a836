"""What every detector of anti-patterns starts from: the table, its nesting, its launches, and the stretch to look at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.places import Places
from ridgeline.profiling.intervals import Intervals, Times, contains, union
from ridgeline.profiling.nesting import Nesting, launching_operator, operators
from ridgeline.profiling.table import Kind, Mask, TraceTable

Window = tuple[int, int] | None


@dataclass(frozen=True)
class Found:
    """Sightings: host rows, and what each cost. Both ``[sightings]``."""

    rows: NDArray[np.intp]
    cost: Times

    @staticmethod
    def none() -> Found:
        """Nothing."""
        return Found(np.empty(0, np.intp), np.empty(0, np.int64))


@dataclass(frozen=True)
class Case:
    """A table prepared once for all detectors. ``inside``: rows that start in the steps (all, if the trace has none)
    and in the window. ``operator[row]``: the operator or range that launched a device row, or -1."""

    table: TraceTable
    ops: Nesting
    places: Places
    inside: Mask
    launched: NDArray[np.intp]
    operator: NDArray[np.intp]

    @staticmethod
    def of(table: TraceTable, window: Window) -> Case:
        """Prepare."""
        ops, launched = operators(table), classify.launches(table)
        steps = classify.step_rows(table)
        inside = np.ones(len(table), np.bool_)
        if steps.size:
            inside = contains(union(table.start[steps], table.end[steps]), table.start)
        if window is not None:
            inside &= contains(Intervals(np.array([window[0]]), np.array([window[1]])), table.start)
        return Case(table, ops, Places(table, ops), inside, launched, launching_operator(ops, launched))

    def rows(self, mask: Mask) -> NDArray[np.intp]:
        """Rows of the mask inside the stretch."""
        return np.flatnonzero(mask & self.inside)

    def host_calls(self) -> NDArray[np.intp]:
        """Runtime calls inside the stretch."""
        return self.rows(self.table.is_kind(Kind.RUNTIME))

    def enclosing(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """The innermost operator or range around each row that is none itself (runtime calls), or -1."""
        return self.ops.innermost(self.table.thread[rows], self.table.start[rows])

    def topmost(self, rows: NDArray[np.intp], among: Mask) -> NDArray[np.intp]:
        """For each operator row (or -1) the outermost of itself and its ancestors that is in ``among``, or -1."""
        out, above = np.full(rows.size, -1, np.intp), rows.copy()
        while (above >= 0).any():
            hit = (above >= 0) & among[above]
            out[hit] = above[hit]
            above = np.where(above >= 0, self.ops.parent[above], -1)
        return out

    def device_time(self, owners: NDArray[np.intp], among: Mask) -> Times:
        """Device time of the rows in ``among`` that each operator row of ``owners`` (or what it calls) launched."""
        cost = np.zeros(owners.size, np.int64)
        marked = np.zeros(len(self.table), np.bool_)
        marked[owners] = True
        device = np.flatnonzero(self.table.device_rows & among)
        of = self.topmost(self.operator[device], marked)
        known = of >= 0
        order = np.argsort(owners, kind="stable")
        at = order[np.searchsorted(owners[order], of[known])]
        np.add.at(cost, at, np.maximum(self.table.duration[device[known]], 0))
        return cost

    def length(self, rows: NDArray[np.intp]) -> Times:
        """Durations, never negative. ns"""
        return np.maximum(self.table.duration[rows], 0)
