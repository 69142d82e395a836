"""Launch statistics by hand, against plain loops on random captures, and on real traces of three vendors' calls."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.profiling.analyses.launches import COLUMNS, launch_calls, launch_statistics, streams, why_empty
from ridgeline.profiling.load import load_table, parse_table
from test_profiling_synthetic import CPU_STEP

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
CONTROL, TEST = "hta/trace_diff/control/control.json.gz", "hta/trace_diff/test/test.json.gz"
AMG = "saf/amg_example_trace.json.gz"
XDIT = "tracelens/inference/xdit_sd_3.5/profile_trace_rank_0.json.gz"
VLLM = "tracelens/inference/vllm_prefilldecode_piecewise/graph_execution.json.gz"
CUPTI = "hta/cupti_profiler/benchmark_result_924719_1679055439_trace.json.gz"


def row(name, category, start_ns, length_ns, where=(1, 1), **args):
    """One event; times in ns, written as the us with decimals that a trace holds."""
    times = {"ts": start_ns / 1000, "dur": length_ns / 1000}
    return {"ph": "X", "name": name, "cat": category, "pid": where[0], "tid": where[1], **times, "args": args}


def call(start_ns, length_ns, correlation, name="cudaLaunchKernel", tid=1):
    """A runtime call."""
    return row(name, "cuda_runtime", start_ns, length_ns, (1, tid), correlation=correlation)


def work(name, start_ns, length_ns, correlation, stream=7, category="kernel", **args):
    """A device event."""
    place = {"device": 0, "stream": stream, "correlation": correlation}
    return row(name, category, start_ns, length_ns, (0, stream), **place, **args)


def table_of(events, stacks=False, **top):
    """The table of these events."""
    return parse_table(json.dumps({**top, "traceEvents": events}).encode(), "t.json", stacks)


@st.composite
def captures(draw):
    """Events of a small capture, in ns: operators that launch kernels, copies and graphs on two streams, with work that
    nobody launched, sub-microsecond and empty events, and overlaps within a stream."""
    events, at = [], draw(st.integers(0, 50))
    for correlation in range(draw(st.integers(0, 7))):
        length = draw(st.integers(1, 30))
        dims = [[draw(st.integers(1, 2)), 4]]
        events.append(
            row(draw(st.sampled_from(["aten::a", "aten::b"])), "cpu_op", at, length + 2, **{"Input Dims": dims})
        )
        events.append(call(at + 1, length, correlation))
        for _ in range(draw(st.integers(0, 3))):
            begin, category = at + draw(st.integers(0, 80)), draw(st.sampled_from(["kernel", "kernel", "gpu_memcpy"]))
            span, stream = draw(st.integers(0, 40)), draw(st.sampled_from([7, 20]))
            events.append(work(draw(st.sampled_from(["k", "m"])), begin, span, correlation, stream, category))
        at += length + 2 + draw(st.integers(0, 60))
    for _ in range(draw(st.integers(0, 2))):
        events.append(work("stray", draw(st.integers(0, 300)), draw(st.integers(0, 40)), 999))
    for number, one in enumerate(events):  # a file that says the very same thing twice means it once
        one["args"]["External id"] = number
    return events


def moved(events, by_us):
    """The same events later."""
    return [{**one, "ts": one["ts"] + by_us} for one in events]


def test_calls_by_hand():
    table = table_of(
        [
            call(0, 500, 1),
            work("k1", 1_500, 200, 1),
            call(1_000, 900, 2, name="cuLaunchKernel"),
            work("k2", 1_700, 5_000, 2),  # began 200 ns before its call returned
            call(2_000, 1_000, 3, name="hipGraphLaunch"),
            work("g2", 8_000, 300, 3),
            work("g1", 7_000, 400, 3, stream=20),
            call(5_000, 100, 4, name="cudaMemsetAsync"),  # launched nothing
            work("carried", 0, 10, 77),
        ]
    )
    frame = launch_calls(table)
    assert frame.columns == list(COLUMNS["launch_calls"])
    assert frame.drop("correlation").rows() == [
        ("cudaLaunchKernel", 0, 500, 1_000, 200, 1, "k1"),
        ("cuLaunchKernel", 1_000, 900, -200, 5_000, 1, "k2"),
        ("hipGraphLaunch", 2_000, 1_000, 4_000, 700, 2, "g1"),
    ]
    whole = launch_statistics(table, slow_call_ns=899, long_delay_ns=4_000)
    assert whole.columns == list(COLUMNS["launch_statistics"])
    assert whole["launch"].to_list() == ["(all)", "hipGraphLaunch", "cuLaunchKernel", "cudaLaunchKernel"]
    top = whole.row(0, named=True)
    # Short: k1 (200 of 500) and the graph (700 of 1,000). A delay of exactly the limit is not over it.
    assert (top["calls"], top["device_events"], top["short_calls"]) == (3, 4, 2)
    assert (top["slow_calls"], top["delayed_calls"]) == (2, 0)
    assert (top["delay_min_ns"], top["delay_median_ns"], top["delay_max_ns"]) == (-200, 1_000, 4_000)
    assert launch_calls(table, (1_000, 2_000))["launch"].to_list() == ["cuLaunchKernel"]


@given(captures(), st.integers(0, 99))
def test_statistics_are_those_of_plain_loops(events, seed):
    random.Random(seed).shuffle(events)
    frame = launch_calls(table_of(events))
    calls = {one["args"]["correlation"]: one for one in events if one["cat"] == "cuda_runtime"}
    made: dict[int, list] = {}
    for one in events:
        if one["cat"] in ("kernel", "gpu_memcpy") and one["args"]["correlation"] in calls:
            made.setdefault(one["args"]["correlation"], []).append((round(one["ts"] * 1000), round(one["dur"] * 1000)))
    expected = {}
    for key, spans in made.items():
        start, length = round(calls[key]["ts"] * 1000), round(calls[key]["dur"] * 1000)
        expected[key] = (start, length, min(spans)[0] - start - length, sum(d for _, d in spans), len(spans))
    got = {one[0]: one[1:] for one in frame.drop("launch", "first_event").rows()}
    assert got == expected
    for one in launch_statistics(table_of(events)).rows(named=True):
        assert one["call_min_ns"] <= one["call_mean_ns"] <= one["call_max_ns"]
        assert one["call_mean_ns"] * one["calls"] == pytest.approx(one["call_sum_ns"])
    later = launch_calls(table_of(moved(events, 5_000)))
    assert later.drop("start_ns", "first_event").rows() == frame.drop("start_ns", "first_event").rows()


def test_devices_and_streams_come_from_arguments_then_from_the_track():
    bare = row("k", "kernel", 0, 5, ("3", "stream 12"))
    table = table_of([bare, work("k", 10, 5, 1, stream=9), row("k", "kernel", 20, 5, ("gpu", "a"))])
    device, stream = streams(table)
    assert list(zip(device.tolist(), stream.tolist(), strict=True)) == [(3, 12), (0, 9), (-1, -1)]


def test_without_launches_it_says_why():
    assert "CPU alone" in (why_empty(table_of(CPU_STEP)) or "")
    assert "no timeline" in (why_empty(table_of([call(0, 5, 1)])) or "")
    assert "correlation" in (why_empty(table_of([work("k", 0, 5, 1)])) or "")
    assert why_empty(table_of([call(0, 5, 1), work("k", 9, 5, 1)])) is None
    assert launch_statistics(table_of(CPU_STEP)).is_empty() and launch_statistics(table_of([])).is_empty()
    assert launch_statistics(table_of([])).columns == list(COLUMNS["launch_statistics"])


@needs_traces
@pytest.mark.parametrize(
    ("trace", "name", "calls", "events"),
    [
        (AMG, "cudaGraphLaunch", 1, 554),
        (TEST, "cudaGraphLaunch", 12, 5_046),
        (VLLM, "hipGraphLaunch", 25, 361),
        (XDIT, "hipModuleLaunchKernel", 2_317, 2_317),
    ],
)
def test_launches_of_graphs_triton_and_rocm_are_counted(trace, name, calls, events):
    """HTA knows none of these names: its launch statistics are empty there."""
    frame = launch_statistics(load_table(TRACES / trace)).filter(launch=name)
    assert frame.select("calls", "device_events").rows() == [(calls, events)]


@needs_traces
def test_a_counter_capture_has_no_timeline():
    assert "no timeline" in (why_empty(load_table(TRACES / CUPTI)) or "")
