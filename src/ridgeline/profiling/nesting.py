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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Times
from ridgeline.profiling.table import Kind, Mask, TraceTable, distinct, row_numbers, row_type

_TREES = 1 << 20
"""About how many rows of a thread are nested at once."""


@dataclass(frozen=True)
class Nesting:
    """Parents among chosen rows of a table; both arrays are ``[rows]`` over the whole table, of narrow integers.

    ``parent[row]`` is the table row that encloses it most closely on its thread, -1 for outermost and for rows that
    were not chosen; ``depth[row]`` is 0 for outermost, -1 for rows that were not chosen.
    """

    table: TraceTable
    chosen: Mask
    parent: NDArray[Any]
    depth: NDArray[Any]

    def innermost(self, thread: NDArray[np.int32], moment: Times) -> NDArray[np.intp]:
        """The chosen row that is innermost on ``thread[i]`` at ``moment[i]``, or -1. ``[len(moment)]``"""
        table, out = self.table, np.full(moment.size, -1, np.intp)
        timed = self.chosen & (table.end > table.start)
        for one in distinct(thread):
            rows = row_numbers(timed & (table.thread == one))
            asked = np.flatnonzero(thread == one)
            if not rows.size:
                continue
            before = np.searchsorted(table.start, moment[asked], side="right")  # rows are in the order of their starts
            at = np.searchsorted(rows, before.astype(rows.dtype)) - 1
            found = np.where(at >= 0, rows[np.maximum(at, 0)], -1).astype(np.intp)
            closed = (found >= 0) & (table.end[found] <= moment[asked])
            while closed.any():
                found[closed] = self.parent[found[closed]]
                closed = (found >= 0) & (table.end[found] <= moment[asked])
            out[asked] = found
        return out

    def outermost(self, rows: NDArray[Any] | None = None) -> NDArray[np.intp]:
        """For each of ``rows`` (-1: none), or of all that were chosen, the row at depth 0 that encloses it, itself when
        outermost; -1 for others. ``[len(rows)]``"""
        root = np.where(self.chosen, np.arange(len(self.table)), -1) if rows is None else np.asarray(rows, np.intp)
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
    parent, depth = np.full(len(table), -1, row_type(len(table))), np.full(len(table), -1, np.int8)
    timed = chosen & (table.end > table.start)
    for one in distinct(table.thread):
        for rows, level in trees(table.start, table.end, row_numbers(timed & (table.thread == one))):
            deepest = int(level.max())
            depth = _holding(depth, deepest)
            depth[rows] = level
            for deep in range(1, deepest + 1):
                children, above = rows[level == deep], rows[level == deep - 1]
                parent[children] = above[np.searchsorted(above, children) - 1]
    made = Nesting(table, timed, parent, depth)
    empty = np.flatnonzero(chosen & ~timed)
    if empty.size:
        parent[empty] = made.innermost(table.thread[empty], table.start[empty])
        below = np.where(parent[empty] >= 0, depth[parent[empty]].astype(np.int64) + 1, 0)
        depth = _holding(depth, int(below.max()))
        depth[empty] = below
    return Nesting(table, chosen, parent, depth)


def _holding(depth: NDArray[Any], deepest: int) -> NDArray[Any]:
    """``depth`` in a type that holds ``deepest``."""
    return depth.astype(np.promote_types(depth.dtype, np.min_scalar_type(-1 - deepest)), copy=False)


def trees(start: Times, end: Times, rows: NDArray[Any]) -> Iterator[tuple[NDArray[Any], NDArray[np.intp]]]:
    """Rows of one thread in pieces of whole trees, and the depth of each: how many earlier rows are open at its start.

    ``rows`` are of events with a length, in the table's order. Depth rises by at most one from row to row, and where it
    is 0 nothing is open, so a piece that ends there knows all of its parents.
    """
    at, size = 0, _TREES
    while at < rows.size:
        piece = rows[at : at + size]
        closed = np.searchsorted(np.sort(end[piece]), start[piece], side="right")
        level = np.arange(piece.size) - closed
        if at + piece.size < rows.size:
            last = int(np.flatnonzero(level == 0)[-1])
            if not last:  # one tree is larger than that
                size *= 2
                continue
            piece, level = piece[:last], level[:last]
        yield piece, level
        at += piece.size


def operators(table: TraceTable) -> Nesting:
    """Nesting of the operators and named ranges of every host thread (no runtime calls, no Python frames)."""
    return table.once("operators", lambda: nest(table, table.is_kind(Kind.CPU_OP, Kind.ANNOTATION)))


def launching_operator(nesting: Nesting, launched: NDArray[Any]) -> NDArray[Any]:
    """For every row the innermost chosen row around its launch call, or -1. ``[len(launched)]``

    ``launched``: row of the launch call or -1, as from :func:`ridgeline.profiling.classify.launches`, of all rows or of
    some.
    """
    table, out = nesting.table, np.full(launched.size, -1, nesting.parent.dtype)
    rows = np.flatnonzero(launched >= 0)
    calls = launched[rows]
    out[rows] = nesting.innermost(table.thread[calls], table.start[calls])
    return out
