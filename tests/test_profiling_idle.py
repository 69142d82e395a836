"""Idle by cause: every cause drawn by hand, a plain judge of single nanoseconds on random captures, real traces."""

from __future__ import annotations

import json
import random
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.profiling.analyses import idle
from ridgeline.profiling.analyses.idle import CAUSES, COLUMNS, garbage_rows, idle_by_cause, idle_gaps, why_empty
from ridgeline.profiling.load import load_table, parse_table
from test_profiling_launches import (
    AMG,
    CONTROL,
    CUPTI,
    TRACES,
    call,
    captures,
    moved,
    needs_traces,
    row,
    table_of,
    work,
)


def causes(table, stream=None, **limits):
    """{cause: ns} of a stream, or of the device, without the empty ones; after a check of the identities."""
    frame = idle_by_cause(table, **limits)
    assert frame.columns == list(COLUMNS["idle_by_cause"])
    for _, one in frame.group_by("device", "stream"):
        assert one["cause"].to_list() == list(CAUSES) and (one["drained_ns"] <= one["idle_ns"]).all()
        assert one["idle_ns"].sum() + one["busy_ns"][0] == one["span_ns"][0]
        assert one["share"].sum() == pytest.approx(1 - one["busy_ns"][0] / max(one["span_ns"][0], 1))
    here = pl.col("stream").is_null() if stream is None else pl.col("stream") == stream
    return {one["cause"]: one["idle_ns"] for one in frame.filter(here).rows(named=True) if one["idle_ns"]}


def gap(*between, launch_at=9_000, launch_ns=500, begins=10_000):
    """Kernel to 1,000, then ``between`` on the host, then a kernel launched as told."""
    return table_of(
        [
            call(0, 100, 1),
            work("first", 500, 500, 1),
            *between,
            call(launch_at, launch_ns, 2),
            work("second", begins, 100, 2),
        ]
    )


def test_a_late_host_by_what_it_did():
    """From 1,000 to 9,000 no launch: the loader to 3,000, a collection to 3,500, a wait to 5,500, an operator 6,000 to
    7,000; the launch takes 500 and the device 500 more to start, which is launching too."""
    table = gap(
        row("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", "user_annotation", 800, 2_200),
        row("aten::stack", "cpu_op", 900, 1_000),  # the loader's own work is the loader's
        row("Python GC", "python_gc", 3_000, 500),
        row("cudaStreamSynchronize", "cuda_runtime", 3_200, 2_300),
        row("aten::mul", "cpu_op", 6_000, 1_000),
        row("aten::elsewhere", "cpu_op", 1_000, 8_000, (1, 5)),  # another thread's work excuses nothing
    )
    assert causes(table) == {
        "data_loader": 2_000,
        "garbage_collection": 500,
        "synchronization": 2_000,
        "operators": 1_000,
        "python": 500 + 2_000,
        "launch_overhead": 1_000,
    }
    assert causes(table, launch_latency_ns=200) == {**causes(table), "launch_overhead": 700, "kernel_wait": 300}
    worst = idle_gaps(table, top=1)
    assert worst.columns == list(COLUMNS["idle_gaps"])
    assert worst["start_ns"].item() == 1_000 and worst["idle_ns"].item() == 9_000
    assert worst.select("cause", "cause_ns", "next_event").rows() == [("python", 2_500, "second")]
    assert (worst["operator"].item(), worst["next_operator"].item()) == ("(no operator)", "(no operator)")


def test_a_gap_that_a_synchronising_call_made():
    """The host waits for the first kernel, so nothing is queued behind it: the whole gap is that wait's price."""
    table = gap(row("cudaStreamSynchronize", "cuda_runtime", 600, 900))
    assert causes(table) == {"synchronization": 500, "python": 7_500, "launch_overhead": 1_000}
    frame = idle_by_cause(table).filter(pl.col("stream").is_null())
    assert (frame["drained_ns"] == frame["idle_ns"]).all() and idle_gaps(table)["drained"].to_list() == [True]
    for other in (gap(), gap(row("cudaStreamSynchronize", "cuda_runtime", 600, 900, (1, 5)))):
        assert idle_by_cause(other)["drained_ns"].sum() == 0 and idle_gaps(other)["drained"].to_list() == [False]


def test_work_launched_in_time_waits_for_something_else():
    assert causes(gap(launch_at=200, launch_ns=100)) == {"kernel_wait": 9_000}
    # The call was under way for 200 ns after the device had run dry, then the work waited.
    waiting = gap(launch_at=700, launch_ns=500)
    assert causes(waiting, launch_latency_ns=0) == {"launch_overhead": 200, "kernel_wait": 8_800}


def test_gaps_within_one_graph_and_without_a_launch():
    table = table_of(
        [
            call(0, 100, 1, name="cudaGraphLaunch"),
            work("a", 500, 100, 1),
            work("b", 650, 100, 1),
            work("stray", 900, 100, 99),
            work("c", 1_000, 10, 1, stream=20),
        ]
    )
    assert causes(table) == {"graph_gap": 50, "unknown": 150} == causes(table, stream=7)
    assert causes(table, stream=20) == {}


def test_nanoseconds_are_nanoseconds():
    """HTA compares its 30 ns limit with microseconds and rounds every event inwards; a hole of 29 ns is one of 29 ns."""
    events = [call(at, 1, at) for at in range(4)] + [work("k", 1_000 + 400 * at, 371, at) for at in range(4)]
    table = table_of(events)
    assert causes(table) == {"kernel_wait": 3 * 29}
    frame = idle_by_cause(table).filter(cause="kernel_wait", stream=7)
    assert frame.select("gaps", "busy_ns", "span_ns").rows() == [(3, 4 * 371, 3 * 400 + 371)]


def test_waits_recorded_as_events_of_their_own():
    table = gap(
        row("Stream Sync", "cuda_sync", 2_000, 3_000, (0, 7)), row("Stream Wait Event", "cuda_sync", 6_000, 900)
    )
    assert causes(table)["synchronization"] == 3_000


def judge(events, low, high):
    """{(stream or None, cause): ns} by looking at each single nanosecond, and by the definitions alone."""
    at = [(one, round(one["ts"] * 1000), round((one["ts"] + one["dur"]) * 1000)) for one in events]
    calls = {one["args"]["correlation"]: (start, end) for one, start, end in at if one["cat"] == "cuda_runtime"}
    busy_host = [(start, end) for one, start, end in at if one["cat"] in ("cpu_op", "cuda_runtime")]
    out: Counter = Counter()
    for stream in (None, 7, 20):
        mine = sorted(
            (max(start, low), min(end, high), one["args"]["correlation"])
            for one, start, end in at
            if one["cat"] in ("kernel", "gpu_memcpy") and stream in (None, one["tid"]) and start < high and end > low
            if end > start
        )
        for now in range(mine[0][0], max(end for _, end, _ in mine)) if mine else ():
            if any(start <= now < end for start, end, _ in mine):
                continue
            dry = max(end for _, end, _ in mine if end <= now)
            begin = min(start for start, _, _ in mine if start > now)
            following = {which for start, _, which in mine if start == begin}
            earlier = {which for _, end, which in mine if end == dry}
            if len(following) > 1 or len(earlier) > 1:
                out["ambiguous"] += 1
                continue
            which = following.pop()
            if which not in calls:
                cause = "unknown"
            elif earlier == {which}:
                cause = "graph_gap"
            elif now < calls[which][0]:
                cause = "operators" if any(start <= now < end for start, end in busy_host) else "python"
            elif now < calls[which][1] or (calls[which][1] > dry and now < calls[which][1] + 10):
                cause = "launch_overhead"
            else:
                cause = "kernel_wait"
            out[stream, cause] += 1
    return out


@given(captures(), st.integers(0, 120), st.integers(120, 400))
def test_every_nanosecond_has_the_cause_that_the_definitions_give_it(events, low, high):
    expected = judge(events, low, high)
    table = table_of(events)
    if expected.pop("ambiguous", 0) or not table.has_device_timeline:
        return
    got: Counter = Counter()
    for one in idle_by_cause(table, window=(low, high), launch_latency_ns=10).rows(named=True):
        got[one["stream"], one["cause"]] += one["idle_ns"]
        assert one["gaps"] <= one["idle_ns"]
    assert +got == expected


@given(captures(), st.integers(0, 99))
def test_parts_sum_and_nothing_depends_on_order_or_clock(events, seed):
    table = table_of(events)
    frame = idle_by_cause(table)
    if table.has_device_timeline:
        causes(table)
    random.Random(seed).shuffle(events)
    assert idle_by_cause(table_of(moved(events, 3_000))).drop("cause").equals(frame.drop("cause")) or _ties(events)
    longest = idle_gaps(table, top=1_000)
    assert longest["idle_ns"].sum() == frame.filter(pl.col("stream").is_null())["idle_ns"].sum()
    assert (longest["cause_ns"] <= longest["idle_ns"]).all()


def _ties(events):
    """Whether two device events share a start or an end: which of them a gap belongs to is then the file's order."""
    device = [one for one in events if one["cat"] in ("kernel", "gpu_memcpy")]
    ends = [round((one["ts"] + one["dur"]) * 1000) for one in device]
    return len({one["ts"] for one in device}) < len(device) or len(set(ends)) < len(ends)


def step(at, start_ns, length_ns):
    return row(f"ProfilerStep#{at}", "user_annotation", start_ns, length_ns)


def test_a_cpu_trace_is_idle_where_its_driving_thread_shows_nothing():
    ms = 1_000_000
    table = table_of(
        [
            step(1, 0, 20 * ms),
            row("enumerate(DataLoader)#X.__next__", "user_annotation", 0, 4 * ms),
            row("aten::mm", "cpu_op", 4 * ms, ms),
            row("aten::mm", "cpu_op", 5 * ms + ms // 2, ms // 2),  # half a millisecond of Python is no idleness
            row("preprocess", "user_annotation", 8 * ms, 2 * ms),
            row("aten::mm", "cpu_op", 11 * ms, 9 * ms),
            row("aten::worker", "cpu_op", 0, 20 * ms, (1, 9)),  # no driving thread
        ]
    )
    assert why_empty(table) is None
    frame = idle_by_cause(table)
    assert frame["device"].null_count() == frame.height == len(CAUSES)
    assert causes(table) == {"data_loader": 4 * ms, "python": 2 * ms, "unknown": 3 * ms}
    assert frame.select("busy_ns", "span_ns").row(0) == (11 * ms, 20 * ms)
    assert idle_gaps(table).select("start_ns", "idle_ns", "cause", "next_event").rows() == [
        (6 * ms, 5 * ms, "unknown", "aten::mm"),
        (0, 4 * ms, "data_loader", "aten::mm"),
    ]


def test_without_a_timeline_it_says_why():
    assert "no timeline" in (why_empty(table_of([call(0, 5, 1)])) or "")
    for table in (table_of([]), table_of([call(0, 5, 1)])):
        assert why_empty(table) and idle_by_cause(table).is_empty() and idle_gaps(table).is_empty()
    alone = table_of([work("k", 0, 5, 1)])
    assert causes(alone) == {} and idle_by_cause(alone)["span_ns"].to_list() == [5] * 2 * len(CAUSES)


@needs_traces
@pytest.mark.parametrize(
    ("name", "idle_us"),
    [
        ("hta/ns_resolution_trace/rank-0.Apr_03_18_51_38.1102.pt.trace.json.gz", 7_567),
        ("hta/trace_filter/sampled_rank-0.json.gz", 675_191),
        ("tracelens/h100/facebook_timesformer-base-finetuned-k400__1016002.json.gz", 1_559),
        ("tracelens/mi300/resnet_act_checkpoint.json.gz", 2_566),
        (AMG, None),
        (CONTROL, None),
    ],
)
def test_real_idle_time_is_that_of_the_raw_nanoseconds(name, idle_us):
    table = load_table(TRACES / name)
    parts = causes(table)
    if idle_us is not None:
        # The published figures of a file with an epoch in its floats are blurred by some us; ours are decimal.
        assert sum(parts.values()) / 1000 == pytest.approx(idle_us, abs=8 if "ns_resolution" in name else 1.5)
    longest = idle_gaps(table, top=1_000_000)
    assert longest["idle_ns"].sum() == sum(parts.values()) and longest["idle_ns"].is_sorted(descending=True)
    if name == AMG:
        assert parts["graph_gap"] == causes(table, stream=164)["graph_gap"] == 262_000


@needs_traces
def test_the_planted_straggler_sleeps_and_its_peer_does_not():
    """Rank 1 sleeps 3 ms in every step: 4.9, 3.1 and 3.1 ms without any event; rank 0 has no such hole."""
    sleepy, other = (load_table(TRACES / f"gloo/gloo_straggler_rank{rank}.json.gz") for rank in (1, 0))
    assert causes(other) == {}
    found = idle_gaps(sleepy)
    assert [round(ns / 1e6, 1) for ns in found["idle_ns"]] == [4.9, 3.1, 3.1] and set(found["cause"]) == {"unknown"}
    assert why_empty(load_table(TRACES / CUPTI)) is not None


def test_garbage_collections_are_seen_without_stacks() -> None:
    """torch writes them under the category of Python frames, which a load without stacks leaves out."""
    events = [
        {"ph": "X", "cat": "python_function", "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": 5, "args": {}}
        for name, ts in (("file.py(1): work", 0), ("Python GC", 10))
    ]
    table = parse_table(json.dumps({"traceEvents": events}).encode(), "t.json")
    assert [table.names[code] for code in table.name.tolist()] == ["Python GC"]
    assert table.meta.skipped == {"X:python_function": 1}
    assert garbage_rows(table).tolist() == [True]


@given(captures())
def test_gaps_explained_one_by_one_are_the_same(events):
    table = table_of(events)
    whole, gaps = idle_by_cause(table), idle_gaps(table, top=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle, "_AT_ONCE", 1)
        assert idle_by_cause(table).equals(whole) and idle_gaps(table, top=5).equals(gaps)


def test_an_empty_window_has_no_gap():
    table = table_of([work("k", 0, 100, 1), work("k", 200, 100, 2)])
    assert idle_by_cause(table, window=(50, 50)).is_empty() and idle_gaps(table, window=(50, 50)).is_empty()
