"""Arithmetic on sets of half-open time intervals, in int64 nanoseconds, without a Python loop over events.

A set is kept sorted and disjoint::

    events    [--a--)   [--b--)
                 [--c--)      [d)
    union     [--------)[----)[d)      touching pieces are merged
    total     the length of the union; it never exceeds the span from the first start to the last end

Everything is exact: there is no float in this file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
_BLOCK = 1 << 18


class Intervals(NamedTuple):
    """Sorted, disjoint, non-empty half-open intervals ``[start, end)``; both arrays are ``[n]`` int64 ns."""

    start: Times
    end: Times


def empty() -> Intervals:
    """The empty set."""
    nothing = np.empty(0, np.int64)
    return Intervals(nothing, nothing)


def union(start: Times, end: Times) -> Intervals:
    """The union of any intervals ``[start, end)``; empty and negative ones are ignored."""
    keep = end > start
    start, end = start[keep], end[keep]
    if not start.size:
        return empty()
    if (start[1:] < start[:-1]).any():  # a table's rows come sorted
        order = np.argsort(start, kind="stable")
        start, end = start[order], end[order]
    reach = np.maximum.accumulate(end)
    first = np.concatenate(([True], start[1:] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return Intervals(start[first], reach[last])


def merge(*sets: Intervals) -> Intervals:
    """The union of sets."""
    some = [one for one in sets if one.start.size]
    if len(some) < 2:
        return some[0] if some else empty()
    return union(np.concatenate([s.start for s in some]), np.concatenate([s.end for s in some]))


def total(a: Intervals) -> int:
    """Length in ns."""
    return int((a.end - a.start).sum())


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """What lies in both."""
    return _select(a, b, 3) if a.start.size and b.start.size else empty()


def subtract(a: Intervals, b: Intervals) -> Intervals:
    """What lies in ``a`` and not in ``b``."""
    return _select(a, b, 1) if a.start.size and b.start.size else a


def _select(a: Intervals, b: Intervals, wanted: int) -> Intervals:
    """Sweep the edges: ``a`` counts 1 and ``b`` counts 2, so 1 = only a, 2 = only b, 3 = both."""
    edges = np.concatenate((a.start, a.end, b.start, b.end))
    steps = np.repeat(np.array([1, -1, 2, -2], np.int8), [a.start.size, a.end.size, b.start.size, b.end.size])
    order = np.argsort(edges, kind="stable")
    steps, edges = steps[order], edges[order]
    del order
    hit = np.cumsum(steps, dtype=np.int8)[:-1] == wanted
    return union(edges[:-1][hit], edges[1:][hit])


def clip(a: Intervals, low: int, high: int) -> Intervals:
    """The part inside ``[low, high)``."""
    return union(np.clip(a.start, low, high), np.clip(a.end, low, high))


def close_gaps(a: Intervals, limit: int) -> Intervals:
    """Fill the holes of at most ``limit`` ns between neighbours."""
    if a.start.size < 2:
        return a
    cut = a.start[1:] - a.end[:-1] > limit
    return Intervals(a.start[np.concatenate(([True], cut))], a.end[np.concatenate((cut, [True]))])


def covered(a: Intervals, low: Times, high: Times) -> Times:
    """Length of ``a`` inside each window ``[low[i], high[i])``; windows may overlap. ``[windows]`` ns."""
    return _before(a, high) - _before(a, low)


def contains(a: Intervals, moments: Times) -> NDArray[np.bool_]:
    """Whether each moment lies in ``a``. ``[moments]``"""
    out = np.zeros(moments.shape, np.bool_)
    for low in range(0, moments.size if a.start.size else 0, _BLOCK):  # no columns of places beside a large table
        some = moments[low : low + _BLOCK]
        at = np.searchsorted(a.start, some, side="right") - 1
        out[low : low + _BLOCK] = (at >= 0) & (some < a.end[np.maximum(at, 0)])
    return out


def disjoint(*sets: Intervals) -> list[Intervals]:
    """Give every instant to the first set that covers it: the results are disjoint and have the same union."""
    taken, out = empty(), []
    for one in sets:
        out.append(subtract(one, taken))
        taken = merge(taken, one)
    return out


def _before(a: Intervals, moments: Times) -> Times:
    """Length of ``a`` before each moment."""
    lengths = np.concatenate(([0], np.cumsum(a.end - a.start)))
    at = np.searchsorted(a.start, moments, side="right")
    if not a.start.size:
        return np.zeros(np.shape(moments), np.int64)
    last = np.maximum(at - 1, 0)
    beyond = np.where(at > 0, np.maximum(a.end[last] - moments, 0), 0)
    return lengths[at] - beyond
