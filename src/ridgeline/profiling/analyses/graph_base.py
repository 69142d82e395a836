"""The dependency graph of a trace: what each start and each end had to wait for.

Every event of one rank is two nodes, its start and its end, numbered so that each edge leads to a higher number::

    main thread   [ aten::mm   [launch) )[ .item()  [sync .......... ) )
                               |                     ^ sync
                        launch |     kernel-kernel   |
    stream 7                   +-->[ kernel a )->[ kernel b )

A node has one *binding* edge, from the cause that came last: it spans exactly the time between the two nodes, so that
walking binding edges back from the end tiles the window. Its other causes are *slack* edges that came earlier; they
hold the least time they need (``least``), never more than was measured. Longest paths over all edges therefore give
back every measured time, and a change of some weights predicts new ones.

Arrays only, no graph library; building is a fixed number of sweeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.nesting import Nesting, nest
from ridgeline.profiling.table import DEVICE_KINDS, Kind, Mask, TraceTable

Nodes = NDArray[np.intp]
AUTOGRAD_NODE = re.compile(r"autograd::engine::evaluate_function")


class Edge(IntEnum):
    """Why time passes between two nodes."""

    OPERATOR = 0
    RUNTIME = 1
    PYTHON = 2
    HOST_GAP = 3
    KERNEL = 4
    COPY = 5
    COLLECTIVE = 6
    LAUNCH = 7
    GAP = 8
    STREAM_WAIT = 9
    SYNC = 10
    HANDOVER = 11
    OUTSIDE = 12


EDGE_NAMES = {
    Edge.OPERATOR: "operator",
    Edge.RUNTIME: "runtime call",
    Edge.PYTHON: "python",
    Edge.HOST_GAP: "host gap",
    Edge.KERNEL: "kernel",
    Edge.COPY: "memory copy",
    Edge.COLLECTIVE: "collective",
    Edge.LAUNCH: "launch delay",
    Edge.GAP: "kernel-kernel gap",
    Edge.STREAM_WAIT: "stream wait",
    Edge.SYNC: "sync wait",
    Edge.HANDOVER: "thread hand-over",
    Edge.OUTSIDE: "not recorded",
}


@dataclass(frozen=True)
class Edges:
    """Slack edges; every array is ``[edges]``. ``least`` is in ns, ``row`` the table row that gives an edge its name."""

    src: Nodes
    dst: Nodes
    least: Times
    kind: NDArray[np.int8]
    row: Nodes

    @staticmethod
    def join(parts: list[Edges]) -> Edges:
        """All edges of ``parts``."""
        if not parts:
            none = np.empty(0, np.intp)
            return Edges(none, none, none.astype(np.int64), none.astype(np.int8), none)
        return Edges(*(np.concatenate([getattr(one, name) for one in parts]) for name in Edges.__annotations__))


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order; node 0 is the window's start, the last node its end. Arrays are ``[nodes]``.

    ``owner[n]`` is the table (of ``tables``) that ``row[n]`` belongs to, ``row`` is -1 for the two outer nodes.
    ``back``, ``kind`` and ``label`` describe the binding edge into a node: where from, why, and whose name it has
    (a row, -1 for none). ``time`` is int64 ns, clipped to the window.
    """

    tables: tuple[TraceTable, ...]
    owner: NDArray[np.int32]
    row: Nodes
    time: Times
    back: Nodes
    kind: NDArray[np.int8]
    label: Nodes
    slack: Edges

    @property
    def span_ns(self) -> int:
        """Length of the window."""
        return int(self.time[-1] - self.time[0])


class Builder:
    """The graph under construction: nodes, and causes that later rules may replace while the old ones become slack."""

    def __init__(self, table: TraceTable, low: int, high: int) -> None:
        self.table, self.low, self.high = table, low, high
        self.driving = driving_threads(table)
        self.host_rows = _host_rows(table, self.driving)
        inside = (table.start < high) & (table.end > low)
        inside |= (table.start == table.end) & (table.start >= low) & (table.start <= high)
        self.rows = np.flatnonzero((self.host_rows | table.device_rows) & inside & (table.end >= table.start))
        self._number()
        self.back = np.zeros(self.time.size, np.intp)
        self.kind = np.full(self.time.size, Edge.OUTSIDE, np.int8)
        self.label = self.row.copy()
        self.slack: list[Edges] = []
        self.nesting: Nesting = nest(table, self._chosen(self.host_rows))

    def _chosen(self, rows: Mask) -> Mask:
        inside = np.zeros(len(self.table), np.bool_)
        inside[self.rows] = True
        return rows & inside

    def _number(self) -> None:
        """Number the nodes: by time, and at one moment ends of longer events, then the rest in the table's order."""
        table, rows = self.table, self.rows
        start, end = np.clip(table.start[rows], self.low, self.high), np.clip(table.end[rows], self.low, self.high)
        time = np.concatenate((start, end))
        is_end = np.repeat([False, True], rows.size)
        both = np.concatenate((rows, rows))
        first = np.where(is_end & np.tile(end > start, 2), -1, both)
        # Ends at one moment close from the inside: the later row first.
        order = np.lexsort((np.where(first < 0, -both, is_end), first, time))
        self.time = np.concatenate(([self.low], time[order], [self.high]))
        self.row = np.concatenate(([-1], both[order], [-1])).astype(np.intp)
        self.is_end = np.concatenate(([False], is_end[order], [False]))
        self.start_node, self.end_node = (np.full(len(table), -1, np.intp) for _ in range(2))
        at = np.arange(1, self.time.size - 1)
        inner = self.is_end[1:-1]
        self.start_node[self.row[1:-1][~inner]] = at[~inner]
        self.end_node[self.row[1:-1][inner]] = at[inner]

    def bind(self, dst: Nodes, src: Nodes, kind: Edge | NDArray[np.int8], label: Nodes) -> None:
        """Make ``src`` the binding cause of ``dst``. All arrays are ``[edges]``, ``src < dst``."""
        self.back[dst], self.kind[dst], self.label[dst] = src, kind, label

    def rebind(self, dst: Nodes, src: Nodes, kind: Edge, label: Nodes) -> None:
        """Like :meth:`bind`, but what bound ``dst`` before stays as a slack edge that needs no time."""
        self.loosen(self.back[dst], dst, np.zeros(dst.size, np.int64), self.kind[dst], self.label[dst])
        self.bind(dst, src, kind, label)

    def loosen(self, src: Nodes, dst: Nodes, least: Times, kind: Edge | NDArray[np.int8], label: Nodes) -> None:
        """Add slack edges, ``least`` at most the time that was measured."""
        kinds = np.broadcast_to(np.asarray(kind, np.int8), dst.shape)
        self.slack.append(Edges(src, dst, np.minimum(least, self.time[dst] - self.time[src]), kinds, label))

    def graph(self) -> Graph:
        """The finished graph."""
        owner = np.zeros(self.time.size, np.int32)
        return Graph(
            (self.table,), owner, self.row, self.time, self.back, self.kind, self.label, Edges.join(self.slack)
        )


def before(nodes: Nodes, moments: Nodes) -> Nodes:
    """For each of ``moments`` the last of the sorted ``nodes`` with a lower number, or -1. ``[len(moments)]``"""
    if not nodes.size:
        return np.full(moments.shape, -1, np.intp)
    at = np.searchsorted(nodes, moments) - 1
    return np.where(at >= 0, nodes[np.maximum(at, 0)], -1)


def driving_threads(table: TraceTable) -> list[int]:
    """The threads whose own pace matters: those with profiler steps, else the one with most operators and calls.

    A thread that runs the backward pass drives only if hardly anything happens elsewhere (a CPU's main thread).
    """
    steps = np.unique(table.thread[classify.step_rows(table)]).tolist()
    if steps:
        return sorted(steps)
    work = table.is_kind(Kind.CPU_OP, Kind.RUNTIME) & ~np.isin(table.thread, list(classify.transfer_threads(table)))
    if not work.any():
        work = table.is_kind(Kind.CPU_OP, Kind.RUNTIME, Kind.ANNOTATION, Kind.PYTHON)
    counts = np.bincount(table.thread[work], minlength=len(table.threads))
    if not counts.any():
        return []
    others = np.where(np.isin(np.arange(counts.size), backward_threads(table)), 0, counts)
    return [int((others if 10 * others.max() >= counts.max() else counts).argmax())]


def backward_threads(table: TraceTable) -> list[int]:
    """Threads that run nodes of autograd."""
    nodes = table.is_kind(Kind.CPU_OP) & table.named(AUTOGRAD_NODE.match)
    return [int(code) for code in np.unique(table.thread[nodes])]


def _host_rows(table: TraceTable, driving: list[int]) -> Mask:
    """Rows that make a host thread's time line. Python frames count on the driving threads alone: elsewhere they only
    say that a helper sleeps."""
    python = table.is_kind(Kind.PYTHON) & np.isin(table.thread, driving)
    return table.is_kind(Kind.CPU_OP, Kind.ANNOTATION, Kind.RUNTIME) | python


def whole(table: TraceTable) -> tuple[int, int]:
    """The window of everything that takes part: first start and last end of host and device events, in ns."""
    rows = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION, Kind.RUNTIME, *DEVICE_KINDS)
    if not rows.any():
        return 0, 0
    return int(table.start[rows].min()), int(table.end[rows].max())


def row_of(mask_of: Callable[[str], object], table: TraceTable) -> Mask:
    """Host rows (operators and ranges) whose name passes. ``[rows]``"""
    return table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & table.named(mask_of)
