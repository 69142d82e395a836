"""Parents and launching operators against a plain stack machine, and on small cases drawn by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.profiling import nesting
from ridgeline.profiling.classify import launches
from ridgeline.profiling.load import parse_table
from ridgeline.profiling.nesting import launching_operator, nest, operators


def table_of(events):
    return parse_table(json.dumps({"traceEvents": events}).encode(), "t.json")


def event(name, ts, dur, tid=1, cat="cpu_op", **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


@st.composite
def calls(draw, low=0, high=60, depth=0):
    """Properly nested calls as (start, end) with whole microseconds."""
    out, at = [], low
    while at < high and draw(st.booleans()):
        start = draw(st.integers(at, high - 1))
        end = draw(st.integers(start + 1, high))
        out.append((start, end))
        if depth < 3:
            out += draw(calls(start, end, depth + 1))
        at = end
    return out


@given(calls())
def test_parents_are_those_of_a_stack_machine(spans):
    table = table_of([event(f"op{at:03}", start, end - start) for at, (start, end) in enumerate(spans)])
    found = operators(table)
    stack: list[int] = []
    for row in range(len(table)):
        while stack and table.end[stack[-1]] <= table.start[row]:
            stack.pop()
        assert found.depth[row] == len(stack)
        assert found.parent[row] == (stack[-1] if stack else -1)
        stack.append(row)
    roots = found.outermost()
    assert all(found.depth[root] == 0 for root in roots.tolist())
    with pytest.MonkeyPatch.context() as patch:  # by pieces of a tree or two
        patch.setattr(nesting, "_TREES", 2)
        pieces = nest(table, np.ones(len(table), np.bool_))
    assert pieces.parent.tolist() == found.parent.tolist() and pieces.depth.tolist() == found.depth.tolist()


def test_deep_calls_keep_their_depth():
    """Deeper than a byte counts, with an event without length at the bottom."""
    deep = 300
    table = table_of([event(f"f{at:03}", at, 2 * (deep - at)) for at in range(deep)] + [event("empty", deep, 0)])
    found = nest(table, np.ones(deep + 1, np.bool_))
    assert found.depth.tolist() == list(range(deep + 1)) and found.parent.tolist() == list(range(-1, deep))


@given(calls(), st.lists(st.integers(0, 61), max_size=8))
def test_the_innermost_is_the_shortest_that_is_open(spans, moments):
    table = table_of([event(f"op{at:03}", start, end - start) for at, (start, end) in enumerate(spans)])
    asked = np.array(moments, np.int64) * 1000
    found = operators(table).innermost(np.zeros(asked.size, np.int32), asked)
    for row, moment in zip(found.tolist(), asked.tolist(), strict=True):
        around = [at for at in range(len(table)) if table.start[at] <= moment < table.end[at]]
        assert (row == -1) == (not around)
        assert not around or table.duration[row] == min(table.duration[at] for at in around)


def test_a_kernel_belongs_to_the_operator_that_launched_it():
    table = table_of(
        [
            event("aten::linear", 0, 100),
            event("aten::addmm", 10, 50),
            event("cudaLaunchKernel", 20, 5, cat="cuda_runtime", correlation=7),
            event("aten::relu", 200, 5, tid=2),
            event("sgemm", 300, 40, tid=3, cat="kernel", correlation=7, device=0, stream=3),
            event("stray", 400, 40, tid=3, cat="kernel", correlation=8, device=0, stream=3),
        ]
    )
    owner = launching_operator(operators(table), launches(table))
    names = {table.names[table.name[row]]: owner[row] for row in range(len(table))}
    assert table.names[table.name[names["sgemm"]]] == "aten::addmm" and names["stray"] == -1
    assert table.stream[table.name == table.names.index("sgemm")].tolist() == [3]


def test_an_event_without_length_lies_in_what_is_open():
    table = table_of([event("outer", 0, 10), event("empty", 5, 0), event("alone", 20, 0)])
    found = nest(table, np.ones(3, np.bool_))
    assert found.parent.tolist() == [-1, 0, -1] and found.depth.tolist() == [0, 1, 0]
