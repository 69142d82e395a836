"""The host's part of the dependency graph: threads as chains, and who waits for whom among them.

A driving thread is one unbroken chain. A helper (autograd's thread, gloo's workers) sleeps between its outermost
events, so the first node after a sleep is caused by the driving thread, and the driving thread's silence while a helper
works is a wait for it::

    main      [ backward (nothing recorded) ............ ][ optimizer
                 | hand-over                             ^ hand-over
    autograd     +->[ MmBackward0 )[ AddBackward0 ) -----+
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.analyses.graph_base import Builder, Edge, Nodes, backward_threads, before, row_of
from ridgeline.profiling.classify import COLLECTIVE_OP, host_threads
from ridgeline.profiling.communication import pair_calls
from ridgeline.profiling.intervals import Intervals, Times, covered, union
from ridgeline.profiling.table import Kind

LEAST_WAIT_NS = 20_000
"""A silence of the driving thread shorter than this is its own work, whatever a helper does meanwhile."""


def chains(made: Builder) -> None:
    """Bind every host node to the one before it on its thread, or a helper's first one to the driving thread."""
    table = made.table
    host = np.flatnonzero(made.row >= 0)
    host = host[made.host_rows[made.row[host]]]
    thread = table.thread[made.row[host]]
    driver = host[np.isin(thread, made.driving)]
    autograd = set(backward_threads(made.table)) - set(made.driving)
    wakers = host[np.isin(thread, [*made.driving, *autograd])]
    for one in np.unique(thread).tolist():
        nodes = host[thread == one]
        inner = _open_after(made, nodes)
        if one in made.driving:
            made.bind(nodes[:1], np.zeros(1, np.intp), Edge.HOST_GAP, np.full(1, -1))
            made.bind(nodes[1:], nodes[:-1], _why(made, inner[:-1]), inner[:-1])
        else:
            _helper(made, nodes, inner, driver if one in autograd else wakers)


def _open_after(made: Builder, nodes: Nodes) -> Nodes:
    """The innermost row open just after each node, or -1. ``[nodes]``"""
    moments = made.time[nodes]
    return made.nesting.innermost(made.table.thread[made.row[nodes]], moments)


def _why(made: Builder, inner: Nodes) -> NDArray[np.int8]:
    """Kind of the time spent while ``inner`` (rows, -1 for none) is innermost. ``[len(inner)]``"""
    table = made.table
    kinds = np.full(inner.size, Edge.HOST_GAP, np.int8)
    known = inner >= 0
    of = table.kind[inner]
    for kind, edge in ((Kind.CPU_OP, Edge.OPERATOR), (Kind.RUNTIME, Edge.RUNTIME), (Kind.PYTHON, Edge.PYTHON)):
        kinds[known & (of == kind)] = edge
    kinds[known & row_of(COLLECTIVE_OP.match, table)[inner]] = Edge.COLLECTIVE
    return kinds


def _helper(made: Builder, nodes: Nodes, inner: Nodes, wakers: Nodes) -> None:
    """A helper thread: a chain whose outermost starts are handed over by whoever was active last before them, itself
    or one of ``wakers``. It does one thing after another, so its own end stays a cause when another thread wakes it."""
    no_rows = np.full(1, -1)
    made.bind(nodes[:1], np.zeros(1, np.intp), Edge.OUTSIDE, no_rows)
    made.bind(nodes[1:], nodes[:-1], _why(made, inner[:-1]), inner[:-1])
    asleep = np.concatenate(([True], inner[:-1] < 0))
    woken = nodes[asleep]
    cause = before(wakers, woken)
    others = cause > made.back[woken]
    made.rebind(woken[others], cause[others], Edge.HANDOVER, made.row[woken[others]])


def waits_for_helpers(made: Builder) -> None:
    """Rebind the driving threads' silences that a helper's work fills, and the ends of calls that wait for a transfer."""
    pairs = pair_calls(made.table, host_threads(made.table))
    paired = (pairs.call >= 0) & (pairs.transfer >= 0)
    paired[paired] &= (made.start_node[pairs.call[paired]] >= 0) & (made.start_node[pairs.transfer[paired]] >= 0)
    moves, asked = pairs.transfer[paired], pairs.call[paired]
    begun = made.start_node[asked] < made.start_node[moves]
    made.rebind(made.start_node[moves[begun]], made.start_node[asked[begun]], Edge.HANDOVER, moves[begun])
    ended = made.end_node[moves] < made.end_node[asked]
    made.rebind(made.end_node[asked[ended]], made.end_node[moves[ended]], Edge.SYNC, asked[ended])
    table = made.table
    outer = made.nesting.depth == 0
    others = np.unique(table.thread[outer & ~np.isin(table.thread, made.driving)]).tolist()
    autograd = set(backward_threads(made.table)) - set(made.driving)
    for one in made.driving:
        for helper in sorted(others, key=lambda thread: (thread not in autograd, thread)):
            _fill_silences(made, one, np.flatnonzero(outer & (table.thread == helper)), helper in autograd)


def _fill_silences(made: Builder, driving: int, rows: Nodes, autograd: bool) -> None:
    """Bind the end of a silence of ``driving`` to the helper's last outermost row in it, when that fills half of it.

    Autograd runs nodes only while a caller is blocked in its engine: from its first node in a silence to its last the
    driving thread waits, also where the capture has nothing between two of them (a sampled trace).
    """
    table, rows = made.table, rows[made.start_node[rows] >= 0]
    nodes = np.flatnonzero((made.row >= 0) & (table.thread[made.row] == driving))
    nodes = nodes[made.host_rows[made.row[nodes]] & np.isin(made.kind[nodes], (Edge.HOST_GAP, Edge.PYTHON))]
    if not rows.size or not nodes.size:
        return
    busy = union(table.start[rows], table.end[rows])
    low, high = made.time[made.back[nodes]], made.time[nodes]
    ends = np.sort(made.end_node[rows])
    last = before(ends, nodes)
    filled = _reach(busy, low, high) if autograd else covered(busy, low, high)
    fills = (high - low > LEAST_WAIT_NS) & (2 * filled >= high - low)
    fills &= last > made.back[nodes]
    made.rebind(nodes[fills], last[fills], Edge.HANDOVER, made.row[last[fills]])


def _reach(busy: Intervals, low: Times, high: Times) -> Times:
    """From the first moment of ``busy`` in each ``[low, high)`` to the last; 0 where there is none. ns"""
    first = np.searchsorted(busy.end, low, side="right")
    last = np.searchsorted(busy.start, high) - 1
    any_inside = last >= first
    first, last = np.minimum(first, busy.end.size - 1), np.maximum(last, 0)
    reach = np.minimum(busy.end[last], high) - np.maximum(busy.start[first], low)
    return np.where(any_inside, reach, 0)
