"""The call tree: every distinct path of calls with its time, alone and with all below it.

One thread's events nest; rows with the same names from the outermost down are one path::

    aten::linear  [--------------------)          path                         inclusive  exclusive
      aten::t       [--)                          aten::linear                    20          8
      aten::addmm        [--------)               aten::linear > aten::t           3          3
                                                  aten::linear > aten::addmm       9          9

Exclusive times of all paths sum to the inclusive times of the roots. Device time is added where the launch was called.
A backward operator is charged to the forward operator that made it, along the profiler's forward-backward arrows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling.classify import STEP, launches
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.nesting import Nesting, launching_operator, nest, operators
from ridgeline.profiling.table import Kind, Mask, TraceTable, distinct, look_up, row_numbers

SEPARATOR = " > "
MODULE = re.compile(r"nn\.Module: ")
_PLACE = re.compile(r"(?P<file>.+)\((?P<line>\d+)\): ")
_KINDS = {Kind.CPU_OP: "operator", Kind.ANNOTATION: "range", Kind.PYTHON: "python"}

_AT_ONCE = 1 << 19

COLUMNS: dict[str, str] = {
    "path": f"text: names from the outermost call to this one, joined by '{SEPARATOR}'",
    "name": "text: the last of them; profiler steps lose their number",
    "depth": "count: calls above it",
    "kind": "text: operator, range (a user annotation), module (nn.Module) or python",
    "count": "count: calls of this path",
    "inclusive_ns": "ns: host time from call to return, summed over the calls",
    "exclusive_ns": "ns: the same without the calls directly below",
    "device_inclusive_ns": "ns: duration of the device work launched in these calls and below, summed",
    "device_exclusive_ns": "ns: duration of the device work launched by these calls themselves",
    "location": "text: file:line of a python frame, null otherwise",
    "module": "text: the innermost nn.Module around the call (of a backward operator: around its forward operator), null "
    "when the capture has no python frames",
    "backward_of": "text: path of the forward operator that made these backward operators (of several the one with most "
    "time), null where no arrow arrives",
    "backward_ns": "ns: host inclusive time of the backward operators that these calls made",
    "backward_device_ns": "ns: device work launched in them",
}
_SCHEMA = {
    "path": pl.String,
    "name": pl.String,
    "depth": pl.Int64,
    "kind": pl.String,
    "count": pl.Int64,
    "inclusive_ns": pl.Int64,
    "exclusive_ns": pl.Int64,
    "device_inclusive_ns": pl.Int64,
    "device_exclusive_ns": pl.Int64,
    "location": pl.String,
    "module": pl.String,
    "backward_of": pl.String,
    "backward_ns": pl.Int64,
    "backward_device_ns": pl.Int64,
}


def call_tree(table: TraceTable, window: tuple[int, int] | None = None) -> pl.DataFrame:
    """One row per distinct call path, parents before children, siblings by time; columns as in ``COLUMNS``.

    Calls that start inside ``window`` (ns, default: all) count with their whole time. Python frames and modules are
    there when the table was loaded with ``stacks=True``. Linear in events times depth.
    """
    chosen = table.is_kind(*_KINDS)
    if window is not None:
        chosen &= (table.start >= window[0]) & (table.start < window[1])
    if not chosen.any():
        return pl.DataFrame(schema=_SCHEMA)
    plain = window is None and not table.is_kind(Kind.PYTHON).any()
    nesting = operators(table) if plain else nest(table, chosen)
    arrows, paths = _arrows(nesting), _Paths(table)
    reach = _Reach(arrows, np.zeros(arrows.target.size, np.int64), np.zeros(arrows.target.size, np.int64))
    device = _device_times(nesting)
    for piece in _pieces(nesting):
        inclusive, exclusive = _host_times(table, piece)
        own = device.of(piece.rows)
        below = _roll_up(piece, own)
        paths.add(piece, (np.ones_like(inclusive), inclusive, exclusive, below, own))
        reach.add(piece, inclusive, below)
    paths.renumber()
    counted = ("count", "inclusive_ns", "exclusive_ns", "device_inclusive_ns", "device_exclusive_ns")
    columns = {
        **dict(zip(counted, paths.sums, strict=True)),
        **_backward(nesting, paths, reach),
        "module": paths.modules(arrows),
    }
    return _frame(paths, columns)


def why_empty(table: TraceTable) -> str | None:
    """Why there is no call tree, or None."""
    return None if table.is_kind(*_KINDS).any() else "the trace holds no operator, range or python frame"


class _Piece(NamedTuple):
    """Whole trees of one thread: their rows in order, each one's parent as a place among them (-1: none), its depth."""

    rows: NDArray[Any]
    parent: NDArray[np.intp]
    depth: NDArray[Any]

    def levels(self) -> list[NDArray[np.intp]]:
        """Places at depth 1, 2, ... (all have a parent)."""
        return [np.flatnonzero(self.depth == deep) for deep in range(1, int(self.depth.max(initial=0)) + 1)]


def _pieces(nesting: Nesting) -> Iterator[_Piece]:
    """The chosen rows, about ``_AT_ONCE`` at a time: a large trace's columns of times would not fit beside it."""
    table = nesting.table
    for thread in distinct(table.thread):
        rows = row_numbers(nesting.chosen & (table.thread == thread))
        # An event without length may stand alone between a caller and its calls when these overlap: no place to cut.
        roots = np.flatnonzero((nesting.depth[rows] == 0) & (table.end[rows] > table.start[rows]))
        wanted = np.searchsorted(roots, np.arange(_AT_ONCE, rows.size, _AT_ONCE))
        cuts = [0, *roots[wanted[wanted < roots.size]].tolist(), rows.size]
        for low, high in pairwise(cuts):
            if low < high:
                piece = rows[low:high]
                parent = nesting.parent[piece]
                yield _Piece(piece, np.where(parent < 0, -1, np.searchsorted(piece, parent)), nesting.depth[piece])


def _host_times(table: TraceTable, piece: _Piece) -> tuple[Times, Times]:
    """Inclusive and exclusive host time of every row of the piece. ``[rows]`` ns

    A call that outlasts its caller (clocks of old writers are coarse) is cut where the caller returns, so that
    exclusive times are never negative and sum to the roots' inclusive times.
    """
    start = table.start[piece.rows]
    end = np.maximum(start, table.end[piece.rows])
    exclusive = end - start
    for at in piece.levels():
        parent = piece.parent[at]
        start[at] = np.clip(start[at], start[parent], end[parent])
        end[at] = np.clip(end[at], start[at], end[parent])
        exclusive[at] = end[at] - start[at]
        np.subtract.at(exclusive, parent, end[at] - start[at])
    return end - start, exclusive


class _Sparse(NamedTuple):
    """A time for some rows, sorted, and 0 for all others."""

    rows: NDArray[Any]
    time: Times

    def of(self, rows: NDArray[Any]) -> Times:
        """The times of ``rows``. ``[len(rows)]``"""
        if not self.rows.size:
            return np.zeros(rows.size, np.int64)
        at = np.minimum(np.searchsorted(self.rows, rows), self.rows.size - 1)
        return np.where(self.rows[at] == rows, self.time[at], 0)


def _device_times(nesting: Nesting) -> _Sparse:
    """Device time launched directly by the rows that launched any. ns"""
    table, launched = nesting.table, launches(nesting.table)
    rows = row_numbers((launched >= 0) & table.device_rows)
    owner = launching_operator(nesting, launched[rows])
    rows, owner = rows[owner >= 0], owner[owner >= 0]
    found, place = np.unique(owner, return_inverse=True)
    time = np.zeros(found.size, np.int64)
    np.add.at(time, place, np.maximum(table.end[rows] - table.start[rows], 0))
    return _Sparse(found, time)


def _roll_up(piece: _Piece, own: Times) -> Times:
    """``own`` of each row and of everything below it. ``[rows]``"""
    out = own.copy()
    for at in reversed(piece.levels()):
        np.add.at(out, piece.parent[at], out[at])
    return out


class _Arrows(NamedTuple):
    """Forward-backward arrows as rows: ``target`` (sorted, distinct) was made by ``made``. ``[arrows]``"""

    target: NDArray[np.intp]
    made: NDArray[np.intp]


def _arrows(nesting: Nesting) -> _Arrows:
    links = nesting.table.links
    made = _starting(nesting, links.from_thread, links.from_time)
    target = _starting(nesting, links.to_thread, links.to_time)
    both = (made >= 0) & (target >= 0) & (made != target)
    made, target = made[both], target[both]
    order = np.argsort(target, kind="stable")
    made, target = made[order], target[order]
    last = np.append(target[1:] != target[:-1], True)[: target.size]
    return _Arrows(target[last], made[last])


def forward_rows(nesting: Nesting) -> NDArray[np.intp]:
    """For every row the forward row that an arrow into it comes from, or -1. ``[rows]``"""
    arrows, out = _arrows(nesting), np.full(len(nesting.table), -1, np.intp)
    out[arrows.target] = arrows.made
    return out


def _starting(nesting: Nesting, thread: NDArray[np.int32], moment: Times) -> NDArray[np.intp]:
    """The operator that starts on ``thread[i]`` at ``moment[i]`` (the outermost of several), else the innermost one
    open then, or -1. ``[len(moment)]``"""
    table = nesting.table
    found = nesting.innermost(thread, moment)
    above = np.where(found >= 0, nesting.parent[found], -1)
    same = (above >= 0) & (table.start[above] == moment) & (table.kind[above] == Kind.CPU_OP)
    while same.any():
        found = np.where(same, above, found)
        above = np.where(found >= 0, nesting.parent[found], -1)
        same = (above >= 0) & (table.start[above] == moment) & (table.kind[above] == Kind.CPU_OP)
    return found


class _Paths:
    """Distinct paths. ``sums`` has a row per quantity; ``by_row[row]`` is the path of a chosen row, else -1.

    While pieces are added paths are numbered as they are met; :meth:`renumber` puts them in the order of (depth, parent,
    name), whatever the pieces were.
    """

    def __init__(self, table: TraceTable) -> None:
        self.table = table
        # Steps differ in their number alone: one path for all of them.
        self.labels = ["ProfilerStep" if STEP.fullmatch(name) else name for name in table.names]
        distinct_labels = {label: code for code, label in enumerate(self.labels)}
        self._label = np.array([distinct_labels[one] for one in self.labels], np.int64)
        self._known: dict[tuple[int, int], int] = {}
        self._firsts, self._depths = list[int](), list[int]()
        self.by_row = np.full(len(table), -1, np.int32)
        self.sums = np.zeros((5, 0), np.int64)

    def add(self, piece: _Piece, quantities: tuple[Times, ...]) -> None:
        """Find the paths of the piece's rows and add up their quantities."""
        path, label = np.empty(piece.rows.size, np.int32), self._label[self.table.name[piece.rows]]
        for deep, at in enumerate([np.flatnonzero(piece.depth == 0), *piece.levels()]):
            above = path[piece.parent[at]].astype(np.int64) if deep else np.full(at.size, -1)
            key = (above + 1) * len(self.labels) + label[at]
            _, first, code = np.unique(key, return_index=True, return_inverse=True)
            heads = zip(above[first].tolist(), label[at[first]].tolist(), piece.rows[at[first]].tolist(), strict=True)
            path[at] = np.array([self._code(*head, deep) for head in heads], np.int32)[code]
        self.by_row[piece.rows] = path
        sums = np.zeros((len(quantities), len(self._known)), np.int64)
        sums[:, : self.sums.shape[1]] = self.sums
        for total, values in zip(sums, quantities, strict=True):
            np.add.at(total, path, values)
        self.sums = sums

    def _code(self, above: int, label: int, row: int, depth: int) -> int:
        code = self._known.setdefault((above, label), len(self._firsts))
        if code == len(self._firsts):
            self._firsts.append(row)
            self._depths.append(depth)
        self._firsts[code] = min(self._firsts[code], row)
        return code

    def renumber(self) -> None:
        """Number the paths anew, parents first, and make their columns: parent, name, depth, first row, text."""
        met = np.array(list(self._known), np.int64).reshape(-1, 2)
        depth, new, order = np.array(self._depths, np.int64), np.empty(len(met), np.int64), list[int]()
        for deep in range(int(depth.max()) + 1):
            at = np.flatnonzero(depth == deep)
            above = new[met[at, 0]] if deep else np.full(at.size, -1)
            at = at[np.lexsort((met[at, 1], above))]
            new[at] = np.arange(len(order), len(order) + at.size)
            order += at.tolist()
        self.size, self.depth, self.name = len(met), depth[order], met[order, 1]
        self.parent = np.where(self.depth > 0, new[met[order, 0]], -1)
        self.first, self.sums = np.array(self._firsts, np.int64)[order], self.sums[:, order]
        self.by_row = look_up(np.append(new, -1).astype(np.int32), self.by_row)
        self.texts = self._joined()

    def _joined(self) -> list[str]:
        texts: list[str] = []
        for above, code in zip(self.parent.tolist(), self.name.tolist(), strict=True):
            name = self.labels[code]
            texts.append(name if above < 0 else texts[above] + SEPARATOR + name)
        return texts

    def modules(self, arrows: _Arrows) -> list[str | None]:
        """Per path the innermost module around it; for backward paths that around the forward row of the first one."""
        out: list[str | None] = []
        for above, code in zip(self.parent.tolist(), self.name.tolist(), strict=True):
            name = self.labels[code]
            out.append(name if MODULE.match(name) else (out[above] if above >= 0 else None))
        at_path, first = np.unique(self.by_row[arrows.target], return_index=True)
        for path, row in zip(at_path.tolist(), arrows.made[first].tolist(), strict=True):
            out[path] = out[path] or out[self.by_row[row]]
        for path, above in enumerate(self.parent.tolist()):  # what a backward operator calls is its module's too
            if out[path] is None and above >= 0:
                out[path] = out[above]
        return out


class _Reach(NamedTuple):
    """Host and device time inside of every arrow's target. ``[arrows]`` ns"""

    arrows: _Arrows
    host: Times
    device: Times

    def add(self, piece: _Piece, inclusive: Times, below: Times) -> None:
        """Note the times of the targets that lie in the piece."""
        target = self.arrows.target
        at = np.minimum(np.searchsorted(piece.rows, target), piece.rows.size - 1)
        here = piece.rows[at] == target
        self.host[here], self.device[here] = inclusive[at[here]], below[at[here]]


def _backward(nesting: Nesting, paths: _Paths, reach: _Reach) -> dict[str, object]:
    """Columns ``backward_of`` (of backward paths) and ``backward_ns``, ``backward_device_ns`` (of forward paths)."""
    target, made = reach.arrows
    outer = ~_inside_another(nesting, target)
    of = paths.by_row[made]
    host, work = np.zeros(paths.size, np.int64), np.zeros(paths.size, np.int64)
    np.add.at(host, of[outer], reach.host[outer])
    np.add.at(work, of[outer], reach.device[outer])
    pairs = pl.DataFrame({"path": paths.by_row[target], "of": of, "ns": reach.host + reach.device})
    most = (
        pairs.group_by("path", "of").agg(pl.col("ns").sum()).sort(["path", "ns", "of"], descending=[False, True, False])
    )
    most = most.unique("path", keep="first", maintain_order=True)
    made_by: list[str | None] = [None] * paths.size
    for path, other in most.select("path", "of").iter_rows():
        made_by[path] = paths.texts[other]
    return {"backward_of": made_by, "backward_ns": host, "backward_device_ns": work}


def _inside_another(nesting: Nesting, rows: NDArray[np.intp]) -> Mask:
    """Whether a row lies below another of ``rows``: its time is in that one's already. ``[len(rows)]``"""
    linked, inside = np.zeros(len(nesting.table), np.bool_), np.zeros(rows.size, np.bool_)
    linked[rows] = True
    above = nesting.parent[rows]
    while (above >= 0).any():
        inside |= (above >= 0) & linked[above]
        above = np.where(above >= 0, nesting.parent[above], -1)
    return inside


def _kind(table: TraceTable, row: int) -> str:
    if table.kind[row] == Kind.PYTHON and MODULE.match(table.names[table.name[row]]):
        return "module"
    return _KINDS[Kind(int(table.kind[row]))]


def _location(table: TraceTable, row: int) -> str | None:
    found = _PLACE.match(table.names[table.name[row]]) if table.kind[row] == Kind.PYTHON else None
    return f"{found['file']}:{found['line']}" if found else None


def _frame(paths: _Paths, columns: dict[str, object]) -> pl.DataFrame:
    """The rows in reading order: every path right before its children, larger siblings first."""
    table, first = paths.table, paths.first.tolist()
    data = {
        "path": paths.texts,
        "name": [paths.labels[code] for code in paths.name.tolist()],
        "depth": paths.depth,
        "kind": [_kind(table, row) for row in first],
        "location": [_location(table, row) for row in first],
        **columns,
    }
    order = _reading_order(paths.parent, np.asarray(columns["inclusive_ns"]), table.start[paths.first])
    return pl.DataFrame(data, schema_overrides=_SCHEMA).select(*_SCHEMA)[order]


def _reading_order(parent: NDArray[np.intp], size: Times, begun: Times) -> list[int]:
    """Depth-first order of a forest given by ``parent`` (-1: root), siblings by falling ``size``, then by ``begun``."""
    children: dict[int, list[int]] = {}
    for at in np.lexsort((np.arange(parent.size), begun, -size)).tolist():
        children.setdefault(int(parent[at]), []).append(at)
    order: list[int] = []
    pending = children.get(-1, [])[::-1]
    while pending:
        at = pending.pop()
        order.append(at)
        pending += children.get(at, [])[::-1]
    return order
