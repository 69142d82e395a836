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

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling.classify import STEP, launches
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.nesting import Nesting, launching_operator, nest
from ridgeline.profiling.table import Kind, Mask, TraceTable

SEPARATOR = " > "
MODULE = re.compile(r"nn\.Module: ")
_PLACE = re.compile(r"(?P<file>.+)\((?P<line>\d+)\): ")
_KINDS = {Kind.CPU_OP: "operator", Kind.ANNOTATION: "range", Kind.PYTHON: "python"}

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
    nesting = nest(table, chosen)
    inclusive, exclusive = host_times(nesting)
    paths = _Paths(nesting)
    own_device = _device_times(nesting)
    below_device = _roll_up(nesting, own_device)
    forward = forward_rows(nesting)
    columns = {
        "count": np.bincount(paths.of, minlength=paths.size),
        "inclusive_ns": paths.sum(inclusive),
        "exclusive_ns": paths.sum(exclusive),
        "device_inclusive_ns": paths.sum(below_device),
        "device_exclusive_ns": paths.sum(own_device),
        **_backward(nesting, paths, forward, inclusive, below_device),
        "module": paths.modules(forward),
    }
    return _frame(paths, columns)


def why_empty(table: TraceTable) -> str | None:
    """Why there is no call tree, or None."""
    return None if table.is_kind(*_KINDS).any() else "the trace holds no operator, range or python frame"


def host_times(nesting: Nesting) -> tuple[Times, Times]:
    """(inclusive, exclusive) host time of every chosen row, 0 for others. ``[rows]`` ns

    A call that outlasts its caller (clocks of old writers are coarse) is cut where the caller returns, so that
    exclusive times are never negative and sum to the roots' inclusive times.
    """
    table = nesting.table
    start, end = table.start.copy(), np.maximum(table.start, table.end)
    exclusive = np.where(nesting.chosen, end - start, 0)
    for rows in _levels(nesting):
        parent = nesting.parent[rows]
        start[rows] = np.clip(start[rows], start[parent], end[parent])
        end[rows] = np.clip(end[rows], start[rows], end[parent])
        exclusive[rows] = end[rows] - start[rows]
        np.subtract.at(exclusive, parent, end[rows] - start[rows])
    return np.where(nesting.chosen, end - start, 0), exclusive


def _levels(nesting: Nesting) -> list[NDArray[np.intp]]:
    """Rows at depth 1, 2, ... (all have a parent)."""
    deepest = int(nesting.depth.max(initial=0))
    return [np.flatnonzero((nesting.depth == deep) & (nesting.parent >= 0)) for deep in range(1, deepest + 1)]


def _device_times(nesting: Nesting) -> Times:
    """Device time launched directly by each chosen row. ``[rows]`` ns"""
    table = nesting.table
    owner = launching_operator(nesting, launches(table))
    rows = np.flatnonzero(table.device_rows & (owner >= 0))
    out = np.zeros(len(table), np.int64)
    np.add.at(out, owner[rows], np.maximum(table.duration[rows], 0))
    return out


def _roll_up(nesting: Nesting, own: Times) -> Times:
    """``own`` of each row and of everything below it. ``[rows]``"""
    out = own.copy()
    for rows in reversed(_levels(nesting)):
        np.add.at(out, nesting.parent[rows], out[rows])
    return out


def forward_rows(nesting: Nesting) -> NDArray[np.intp]:
    """For every row the forward row that an arrow into it comes from, or -1. ``[rows]``"""
    table, links = nesting.table, nesting.table.links
    out = np.full(len(table), -1, np.intp)
    made = _starting(nesting, links.from_thread, links.from_time)
    target = _starting(nesting, links.to_thread, links.to_time)
    both = (made >= 0) & (target >= 0) & (made != target)
    out[target[both]] = made[both]
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
    """Distinct paths, numbered so that parents come first; ``of[i]`` is the path of the i-th chosen row ``rows[i]``."""

    def __init__(self, nesting: Nesting) -> None:
        table = nesting.table
        path = np.full(len(table), -1, np.intp)
        self.table, self.size = table, 0
        # Steps differ in their number alone: one path for all of them.
        self.labels = ["ProfilerStep" if STEP.fullmatch(name) else name for name in table.names]
        distinct = {label: code for code, label in enumerate(self.labels)}
        label = np.array([distinct[one] for one in self.labels], np.intp)[table.name]
        parents, names, firsts, depths = [], [], [], []
        for deep in range(int(nesting.depth.max(initial=0)) + 1):
            rows = np.flatnonzero(nesting.depth == deep)
            above = path[nesting.parent[rows]] if deep else np.full(rows.size, -1, np.intp)
            key = (above + 1) * len(table.names) + label[rows]
            _, first, code = np.unique(key, return_index=True, return_inverse=True)
            path[rows] = self.size + code
            parents.append(above[first])
            names.append(label[rows[first]])
            firsts.append(rows[first])
            depths.append(np.full(first.size, deep))
            self.size += first.size
        self.by_row, self.rows = path, np.flatnonzero(path >= 0)
        self.of = path[self.rows]
        self.parent, self.first = np.concatenate(parents), np.concatenate(firsts)
        self.depth, self.name = np.concatenate(depths), np.concatenate(names)
        self.texts = self._joined()

    def _joined(self) -> list[str]:
        texts: list[str] = []
        for above, code in zip(self.parent.tolist(), self.name.tolist(), strict=True):
            name = self.labels[code]
            texts.append(name if above < 0 else texts[above] + SEPARATOR + name)
        return texts

    def sum(self, values: Times) -> Times:
        """Sum of ``values`` (``[rows]`` of the table) over the rows of each path."""
        out = np.zeros(self.size, np.int64)
        np.add.at(out, self.of, values[self.rows])
        return out

    def modules(self, forward: NDArray[np.intp]) -> list[str | None]:
        """Per path the innermost module around it; for backward paths that around the forward row of the first one."""
        out: list[str | None] = []
        for above, code in zip(self.parent.tolist(), self.name.tolist(), strict=True):
            name = self.labels[code]
            out.append(name if MODULE.match(name) else (out[above] if above >= 0 else None))
        linked = self.rows[forward[self.rows] >= 0]
        at_path, first = np.unique(self.by_row[linked], return_index=True)
        for path, row in zip(at_path.tolist(), linked[first].tolist(), strict=True):
            out[path] = out[path] or out[self.by_row[forward[row]]]
        for path, above in enumerate(self.parent.tolist()):  # what a backward operator calls is its module's too
            if out[path] is None and above >= 0:
                out[path] = out[above]
        return out


def _backward(
    nesting: Nesting, paths: _Paths, forward: NDArray[np.intp], inclusive: Times, device: Times
) -> dict[str, object]:
    """Columns ``backward_of`` (of backward paths) and ``backward_ns``, ``backward_device_ns`` (of forward paths)."""
    rows = np.flatnonzero(forward >= 0)
    outer = rows[~_inside_another(nesting, forward, rows)]
    host, work = np.zeros(paths.size, np.int64), np.zeros(paths.size, np.int64)
    np.add.at(host, paths.by_row[forward[outer]], inclusive[outer])
    np.add.at(work, paths.by_row[forward[outer]], device[outer])
    pairs = pl.DataFrame(
        {"path": paths.by_row[rows], "of": paths.by_row[forward[rows]], "ns": inclusive[rows] + device[rows]}
    )
    most = (
        pairs.group_by("path", "of").agg(pl.col("ns").sum()).sort(["path", "ns", "of"], descending=[False, True, False])
    )
    most = most.unique("path", keep="first", maintain_order=True)
    made_by: list[str | None] = [None] * paths.size
    for path, of in most.select("path", "of").iter_rows():
        made_by[path] = paths.texts[of]
    return {"backward_of": made_by, "backward_ns": host, "backward_device_ns": work}


def _inside_another(nesting: Nesting, forward: NDArray[np.intp], rows: NDArray[np.intp]) -> Mask:
    """Whether a row lies below another row with an arrow: its time is in that one's already. ``[len(rows)]``"""
    inside = np.zeros(rows.size, np.bool_)
    above = nesting.parent[rows]
    while (above >= 0).any():
        inside |= (above >= 0) & (forward[above] >= 0)
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
