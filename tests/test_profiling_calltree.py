"""Call tree: against a plain stack machine, on a small tree drawn by hand, and on recorded forward-backward arrows."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ridgeline.profiling import nesting
from ridgeline.profiling.analyses import calltree
from ridgeline.profiling.analyses.calltree import COLUMNS, call_tree, why_empty
from ridgeline.profiling.load import load_table, parse_table

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def event(name, ts, dur, tid=1, cat="cpu_op", pid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def arrow(phase, number, ts, tid=1):
    return {"ph": phase, "id": number, "pid": 1, "tid": tid, "ts": ts, "cat": "fwdbwd", "name": "fwdbwd"}


def table_of(events, stacks=False):
    return parse_table(json.dumps({"traceEvents": events}).encode(), "t.json", stacks=stacks)


def by_path(frame):
    return {row["path"]: row for row in frame.iter_rows(named=True)}


def test_a_small_tree_by_hand():
    """Two calls of linear; the kernel launched in the second one's addmm counts there and above, not beside it."""
    tree = by_path(
        call_tree(
            table_of(
                [
                    event("aten::linear", 0, 20),
                    event("aten::t", 2, 3),
                    event("aten::linear", 30, 40),
                    event("aten::t", 31, 4),
                    event("aten::addmm", 40, 20),
                    event("cudaLaunchKernel", 45, 5, cat="cuda_runtime", correlation=7),
                    event("sgemm", 100, 50, tid=7, pid=0, cat="kernel", correlation=7, device=0, stream=7),
                ]
            )
        )
    )
    assert list(tree) == ["aten::linear", "aten::linear > aten::addmm", "aten::linear > aten::t"]
    got = {
        path: (row["depth"], row["count"], row["inclusive_ns"], row["exclusive_ns"], row["device_inclusive_ns"])
        for path, row in tree.items()
    }
    assert got == {
        "aten::linear": (0, 2, 60_000, 60_000 - 7_000 - 20_000, 50_000),
        "aten::linear > aten::addmm": (1, 1, 20_000, 20_000, 50_000),  # the launch call is addmm's own time
        "aten::linear > aten::t": (1, 2, 7_000, 7_000, 0),
    }
    assert tree["aten::linear"]["device_exclusive_ns"] == 0


def test_modules_and_lines_come_from_python_frames():
    events = [
        event("ProfilerStep#3", 0, 100, cat="user_annotation"),
        event("train.py(12): step", 1, 90, cat="python_function"),
        event("nn.Module: Linear_0", 2, 50, cat="python_function"),
        event("aten::linear", 5, 20),
        event("ProfilerStep#4", 200, 100, cat="user_annotation"),
    ]
    tree = by_path(call_tree(table_of(events, stacks=True)))
    frame = tree["ProfilerStep > train.py(12): step"]
    assert (frame["kind"], frame["location"]) == ("python", "train.py:12")
    module = tree["ProfilerStep > train.py(12): step > nn.Module: Linear_0"]
    assert (module["kind"], module["location"], module["exclusive_ns"]) == ("module", None, 30_000)
    operator = tree["ProfilerStep > train.py(12): step > nn.Module: Linear_0 > aten::linear"]
    assert (operator["kind"], operator["module"]) == ("operator", "nn.Module: Linear_0")
    assert tree["ProfilerStep"]["count"] == 2, "the steps of a loop are one path"
    without = call_tree(table_of(events))
    assert without["module"].null_count() == len(without) == 2


def backward_trace(other_first=False):
    """Two linears in two modules; autograd's thread runs their backward in reverse order, with a kernel in one."""
    return [
        event("nn.Module: A_0", 0, 30, cat="python_function"),
        event("aten::addmm", 5, 10),
        arrow("s", 1, 5),
        event("nn.Module: B_0", 40, 30, cat="python_function"),
        event("aten::mul", 45, 10),
        arrow("s", 2, 45),
        event("MulBackward0", 100, 20, tid=2),
        event("aten::mul", 105, 5, tid=2),
        arrow("f", 2, 100, tid=2),
        event("AddmmBackward0", 130, 40, tid=2),
        event("cudaLaunchKernel", 140, 5, tid=2, cat="cuda_runtime", correlation=9),
        arrow("f", 1, 130, tid=2),
        event("sgemm", 200, 70, tid=7, pid=0, cat="kernel", correlation=9, device=0, stream=7),
    ]


def test_backward_operators_belong_to_the_forward_operator_that_made_them():
    tree = by_path(call_tree(table_of(backward_trace(), stacks=True)))
    forward = tree["nn.Module: A_0 > aten::addmm"]
    assert (forward["backward_ns"], forward["backward_device_ns"], forward["backward_of"]) == (40_000, 70_000, None)
    back = tree["AddmmBackward0"]
    assert (back["backward_of"], back["module"]) == ("nn.Module: A_0 > aten::addmm", "nn.Module: A_0")
    assert tree["nn.Module: B_0 > aten::mul"]["backward_ns"] == 20_000
    assert tree["MulBackward0 > aten::mul"]["module"] == "nn.Module: B_0"
    assert tree["MulBackward0 > aten::mul"]["backward_of"] is None


def test_an_arrow_inside_the_reach_of_another_is_not_counted_twice():
    events = [
        event("aten::a", 0, 10),
        arrow("s", 1, 0),
        event("aten::b", 20, 10),
        arrow("s", 2, 20),
        event("ABackward0", 50, 30),
        arrow("f", 1, 50),
        event("BBackward0", 60, 10),
        arrow("f", 2, 60),
    ]
    tree = by_path(call_tree(table_of(events)))
    assert tree["aten::a"]["backward_ns"] == 30_000 and tree["aten::b"]["backward_ns"] == 0
    assert tree["ABackward0 > BBackward0"]["backward_of"] == "aten::b"


@st.composite
def calls(draw, low=0, high=60, depth=0):
    """Properly nested calls as (name, start, end) with whole microseconds."""
    out, at = [], low
    while at < high and draw(st.booleans()):
        start = draw(st.integers(at, high - 1))
        end = draw(st.integers(start + 1, high))
        out.append((draw(st.sampled_from("abc")), start, end))
        if depth < 3:
            out += draw(calls(start, end, depth + 1))
        at = end
    return out


def stack_machine(table):
    """path -> [count, inclusive, exclusive], one event at a time."""
    out = defaultdict(lambda: [0, 0, 0])
    stacks = defaultdict(list)
    for row in range(len(table)):
        stack = stacks[table.thread[row]]
        while stack and table.end[stack[-1][0]] <= table.start[row]:
            stack.pop()
        length = int(table.duration[row])
        if stack:
            out[stack[-1][1]][2] -= length
        path = (*(stack[-1][1] if stack else ()), table.names[table.name[row]])
        one = out[path]
        one[0], one[1], one[2] = one[0] + 1, one[1] + length, one[2] + length
        stack.append((row, path))
    return {" > ".join(path): tuple(value) for path, value in out.items()}


@given(calls(), calls())
def test_it_is_what_a_stack_machine_counts(first, second):
    events = [event(n, s, e - s) for n, s, e in first] + [event(n, s, e - s, tid=2) for n, s, e in second]
    table = table_of(events)
    frame = call_tree(table)
    got = {row["path"]: (row["count"], row["inclusive_ns"], row["exclusive_ns"]) for row in frame.iter_rows(named=True)}
    assert got == stack_machine(table)
    shown = frame["path"].to_list()
    for at, path in enumerate(shown):  # reading order: a parent stands before its children
        assert " > " not in path or path.rsplit(" > ", 1)[0] in shown[:at]


def in_pieces(table, rows=1):
    """The tree when hardly more than one tree of calls is looked at at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calltree, "_AT_ONCE", rows)
        patch.setattr(nesting, "_TREES", rows)
        table._made.clear()
        return call_tree(table)


spans = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.integers(0, 15)), max_size=12, unique=True)


@example([("a", 1, 4), ("a", 2, 1), ("a", 3, 0), ("a", 4, 1), ("b", 0, 2)], 0, random.Random(0))
@given(spans, st.integers(-1_000, 1_000), st.randoms())
def test_any_events_sum_and_neither_order_nor_clock_matters(raw, shift, shuffled):
    """Overlapping events too: exclusive times are never negative and sum to the roots."""
    events = [event(name, start, length) for name, start, length in raw]
    frame = call_tree(table_of(events))
    assert frame["exclusive_ns"].sum() == frame.filter(frame["depth"] == 0)["inclusive_ns"].sum()
    assert frame.is_empty() or frame["exclusive_ns"].min() >= 0
    assert int(frame["count"].sum()) == len(events)
    assert in_pieces(table_of(events)).equals(frame)
    moved = [event(name, start + 2_000 + shift, length) for name, start, length in raw]
    shuffled.shuffle(moved)
    assert call_tree(table_of(moved)).equals(frame)


def test_windows_and_empty_traces():
    table = table_of([event("a", 0, 10), event("b", 20, 10)])
    assert call_tree(table, (20_000, 30_000))["path"].to_list() == ["b"]
    assert call_tree(table, (40_000, 50_000)).is_empty()
    empty = table_of([event("k", 0, 5, cat="kernel")])
    assert call_tree(empty).columns == list(COLUMNS) and call_tree(empty).is_empty()
    assert why_empty(empty) == "the trace holds no operator, range or python frame" and why_empty(table) is None


@needs_traces
def test_recorded_arrows_are_present_and_monotone():
    """A rival compares encoded categories with text and finds none of the 1,086 events: 543 arrows, every one from a
    forward operator to a later backward operator."""
    table = load_table(TRACES / "hta/nccl_parser_config/nccl_data.json.gz")
    assert len(table.links) * 2 == 1_086
    assert (table.links.from_time < table.links.to_time).all()
    frame = call_tree(table)
    assert frame["exclusive_ns"].sum() == frame.filter(frame["depth"] == 0)["inclusive_ns"].sum()
    device = int(table.duration[table.device_rows].sum())
    assert frame["device_exclusive_ns"].sum() == device, "every device event has a launch inside an operator here"
    backward = frame.filter(frame["backward_of"].is_not_null())
    pairs = {(row["name"], row["backward_of"].split(" > ")[-1]) for row in backward.iter_rows(named=True)}
    assert pairs >= {
        ("ConvolutionBackward0", "aten::convolution"),
        ("CudnnBatchNormBackward0", "aten::cudnn_batch_norm"),
        ("AddmmBackward0", "aten::addmm"),
        ("AddBackward0", "aten::add_"),
    }
    assert backward["inclusive_ns"].sum() == frame["backward_ns"].sum()
    assert in_pieces(table, 1_000).equals(frame)


@needs_traces
def test_a_trace_with_python_stacks_names_modules():
    table = load_table(TRACES / "tracelens/inference/xdit_sd_3.5/profile_trace_rank_0.json.gz", stacks=True)
    frame = call_tree(table)
    modules = frame.filter(frame["kind"] == "module")
    assert modules["module"].null_count() == 0 and modules["device_inclusive_ns"].sum() > 0
    assert frame["exclusive_ns"].sum() == frame.filter(frame["depth"] == 0)["inclusive_ns"].sum()
    python = frame.filter((frame["kind"] == "python") & frame["name"].str.contains(r"\.py\(\d+\): "))
    assert python["location"].null_count() == 0
    assert np.all(frame["device_exclusive_ns"].to_numpy() <= frame["device_inclusive_ns"].to_numpy())
