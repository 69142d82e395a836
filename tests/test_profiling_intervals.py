"""Interval arithmetic and self times against brute force over single nanoseconds."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.profiling import intervals
from ridgeline.profiling.intervals import Intervals
from ridgeline.profiling.ops import self_times

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(-2, 12)), max_size=12)


def make(spans: list[tuple[int, int]]) -> tuple[Intervals, set[int]]:
    """The set under test and the same as a Python set of instants."""
    start = np.array([a for a, _ in spans], np.int64)
    length = np.array([n for _, n in spans], np.int64)
    return intervals.union(start, start + length), {t for a, n in spans for t in range(a, a + n)}


def instants(a: Intervals) -> set[int]:
    """Back to instants; also checks the canonical form."""
    assert (a.start < a.end).all() and (a.start[1:] > a.end[:-1]).all()
    return {t for low, high in zip(a.start.tolist(), a.end.tolist(), strict=True) for t in range(low, high)}


@settings(max_examples=300, deadline=None)
@given(SPANS, SPANS, st.integers(0, 5))
def test_set_operations(one: list[tuple[int, int]], two: list[tuple[int, int]], gap: int) -> None:
    """Union, intersection, difference, measure, membership, clipping: the same as on sets of instants."""
    (a, sa), (b, sb) = make(one), make(two)
    assert instants(a) == sa
    assert instants(intervals.merge(a, b)) == sa | sb
    assert instants(intervals.intersect(a, b)) == sa & sb
    assert instants(intervals.subtract(a, b)) == sa - sb
    assert intervals.total(a) == len(sa)
    assert instants(intervals.clip(a, 5, 20)) == {t for t in sa if 5 <= t < 20}
    moments = np.arange(-3, 60)
    assert intervals.contains(a, moments).tolist() == [t in sa for t in moments.tolist()]
    pieces = intervals.disjoint(a, b)
    assert [instants(p) for p in pieces] == [sa, sb - sa]
    closed = instants(intervals.close_gaps(a, gap))
    assert closed >= sa and (not sa or (min(closed), max(closed)) == (min(sa), max(sa)))


@settings(max_examples=200, deadline=None)
@given(SPANS, st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_windows_add_up(spans: list[tuple[int, int]], x: int, y: int, z: int) -> None:
    """What is covered in a window is what is covered in its two halves."""
    low, middle, high = sorted((x, y, z))
    a, inside = make(spans)
    whole, left, right = intervals.covered(a, np.array([low, low, middle]), np.array([high, middle, high])).tolist()
    assert whole == left + right == len({t for t in inside if low <= t < high})


@st.composite
def nested(draw: st.DrawFn, low: int = 0, high: int = 200, depth: int = 0) -> list[tuple[int, int]]:
    """Properly nested spans inside [low, high)."""
    out: list[tuple[int, int]] = []
    at = low
    for _ in range(draw(st.integers(0, 3))):
        if at >= high:
            break
        start = draw(st.integers(at, high))
        end = draw(st.integers(start, high))
        out.append((start, end))
        if depth < 3 and end - start > 1:
            out += draw(nested(start, end, depth + 1))
        at = end
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(nested(), min_size=1, max_size=3))
def test_self_times_sum_to_the_union(threads: list[list[tuple[int, int]]]) -> None:
    """On each thread the self times of nested events add up to the time the thread had any event."""
    rows = [(start, -end, thread) for thread, spans in enumerate(threads) for start, end in spans]
    rows.sort()
    start = np.array([r[0] for r in rows], np.int64)
    end = np.array([-r[1] for r in rows], np.int64)
    thread = np.array([r[2] for r in rows], np.int32)
    own = self_times(start, end, thread)
    assert (own >= 0).all() and (own <= end - start).all()
    for one in range(len(threads)):
        here = thread == one
        assert own[here].sum() == intervals.total(intervals.union(start[here], end[here]))
