"""Which event lies in which: parents of host events, and the operator that launched a device event.

Events of one thread nest like calls::

    aten::linear   [-------------------)
      aten::addmm     [----------)            parent: aten::linear
        launch           [--)                 parent: aten::addmm
    kernel                     [------)       launched from aten::addmm, whichever stream it runs on

A launch is found by its correlation id, the operator by what was open on the launching thread at that moment, so
neither depends on ids that only some writers leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Times
from ridgeline.profiling.table import Kind, Mask, TraceTable


@dataclass(frozen=True)
class Nesting:
    """Parents among chosen rows of a table; both arrays are ``[rows]`` over the whole table.

    ``parent[row]`` is the table row that encloses it most closely on its thread, -1 for outermost and for rows that
    were not chosen; ``depth[row]`` is 0 for outermost, -1 for rows that were not chosen.
    """

    table: TraceTable
    chosen: Mask
    parent: NDArray[np.intp]
    depth: NDArray[np.intp]

    def innermost(self, thread: NDArray[np.int32], moment: Times) -> NDArray[np.intp]:
        """The chosen row that is innermost on ``thread[i]`` at ``moment[i]``, or -1. ``[len(moment)]``"""
        out = np.full(moment.size, -1, np.intp)
        for one in np.unique(thread).tolist():
            rows = np.flatnonzero(self.chosen & (self.table.thread == one) & (self.table.end > self.table.start))
            asked = np.flatnonzero(thread == one)
            if not rows.size or not asked.size:
                continue
            at = np.searchsorted(self.table.start[rows], moment[asked], side="right") - 1
            found = np.where(at >= 0, rows[np.maximum(at, 0)], -1)
            closed = (found >= 0) & (self.table.end[found] <= moment[asked])
            while closed.any():
                found[closed] = self.parent[found[closed]]
                closed = (found >= 0) & (self.table.end[found] <= moment[asked])
            out[asked] = found
        return out

    def outermost(self) -> NDArray[np.intp]:
        """For every chosen row the row at depth 0 that encloses it (itself when outermost), -1 for others. ``[rows]``"""
        root = np.where(self.chosen, np.arange(len(self.table)), -1)
        above = np.where(root >= 0, self.parent[root], -1)
        while (above >= 0).any():
            root = np.where(above >= 0, above, root)
            above = np.where(above >= 0, self.parent[above], -1)
        return root


def nest(table: TraceTable, chosen: Mask) -> Nesting:
    """Parents among the ``chosen`` rows (``[rows]``), thread by thread, without a Python loop over events.

    The depth of a row is the number of earlier rows of its thread still open; its parent is the latest earlier row one
    level up. An event without length has no children, and its parent is what is open at its moment.
    """
    parent, depth = np.full(len(table), -1, np.intp), np.full(len(table), -1, np.intp)
    timed = chosen & (table.end > table.start)
    for one in np.unique(table.thread[timed]).tolist():
        rows = np.flatnonzero(timed & (table.thread == one))
        closed = np.searchsorted(np.sort(table.end[rows]), table.start[rows], side="right")
        level = np.arange(rows.size) - closed
        depth[rows] = level
        for deep in range(1, int(level.max()) + 1):
            children, above = rows[level == deep], rows[level == deep - 1]
            parent[children] = above[np.searchsorted(above, children) - 1]
    made = Nesting(table, timed, parent, depth)
    empty = np.flatnonzero(chosen & ~timed)
    parent[empty] = made.innermost(table.thread[empty], table.start[empty])
    depth[empty] = np.where(parent[empty] >= 0, depth[parent[empty]] + 1, 0)
    return Nesting(table, chosen, parent, depth)


def operators(table: TraceTable) -> Nesting:
    """Nesting of the operators and named ranges of every host thread (no runtime calls, no Python frames)."""
    return table.once("operators", lambda: nest(table, table.is_kind(Kind.CPU_OP, Kind.ANNOTATION)))


def launching_operator(nesting: Nesting, launched: NDArray[np.intp]) -> NDArray[np.intp]:
    """For every row the innermost chosen row around its launch call, or -1. ``[rows]``

    ``launched`` as from :func:`ridgeline.profiling.classify.launches`.
    """
    table, out = nesting.table, np.full(launched.size, -1, np.intp)
    rows = np.flatnonzero(launched >= 0)
    calls = launched[rows]
    out[rows] = nesting.innermost(table.thread[calls], table.start[calls])
    return out
