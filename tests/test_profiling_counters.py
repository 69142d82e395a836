"""Queues, copies and hardware counters: by hand, against a count at every nanosecond, and on real traces."""

from __future__ import annotations

import gzip
import json
import random

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.profiling.analyses.counters import (
    COLUMNS,
    hardware_counters,
    memory_bandwidth,
    memory_bandwidth_series,
    queue_length,
    queue_summary,
    why_empty,
    why_no_counters,
)
from ridgeline.profiling.load import load_table
from test_profiling_launches import AMG, CUPTI, TRACES, call, captures, moved, needs_traces, row, table_of, work

NEGATIVE = "hta/negative_queue_length_values_check/rank0.json.gz"


def steps(table, stream):
    """(moment, events, launches) of one stream's queue."""
    return queue_length(table).filter(stream=stream).select("time_ns", "events", "launches").rows()


def test_the_running_kernel_is_still_in_the_queue():
    """HTA takes it out when it starts."""
    table = table_of([call(0, 10, 1), call(20, 10, 2), work("a", 50, 40, 1), work("b", 90, 10, 2)])
    assert steps(table, 7) == [(0, 1, 1), (20, 2, 2), (90, 1, 1), (100, 0, 0)]
    one = queue_summary(table, limit=2).row(0, named=True)
    assert one["mean_events"] == (20 * 1 + 70 * 2 + 10 * 1) / 100 and one["max_events"] == 2
    assert (one["span_ns"], one["full_ns"], one["unexplained_events"]) == (100, 70, 0)


def test_a_graph_is_many_events_and_one_launch():
    table = table_of([call(0, 10, 1, name="cudaGraphLaunch"), *(work("g", 50 + 10 * at, 10, 1) for at in range(3))])
    assert steps(table, 7) == [(0, 3, 1), (60, 2, 1), (70, 1, 1), (80, 0, 0)]


def test_work_from_before_the_capture_never_makes_a_queue_negative():
    table = table_of(
        [
            row("aten::a", "cpu_op", 0, 5),
            work("carried", 10, 10, 98),
            call(30, 5, 1),
            work("a", 40, 10, 1),
            work("lost", 60, 10, 99),
        ]
    )
    assert steps(table, 7) == [(0, 1, 1), (20, 0, 0), (30, 1, 1), (50, 0, 0)]
    assert queue_summary(table)["unexplained_events"].to_list() == [1]


def test_every_stream_is_kept():
    """HTA's time on a full queue keeps only the last stream of a rank."""
    events = [call(0, 1, 1), work("a", 10, 90, 1), call(5, 1, 2), work("b", 10, 40, 2, stream=20)]
    assert queue_summary(table_of(events), limit=1).select("stream", "full_ns").rows() == [(7, 100), (20, 45)]


@given(captures(), st.integers(0, 99))
def test_queues_are_what_a_count_at_every_nanosecond_gives(events, seed):
    random.Random(seed).shuffle(events)
    table = table_of(events)
    spans = [(one, round(one["ts"] * 1000), round((one["ts"] + one["dur"]) * 1000)) for one in events]
    calls = {one["args"]["correlation"]: start for one, start, _ in spans if one["cat"] == "cuda_runtime"}
    for stream in (7, 20):
        device = [
            (start, end, one["args"]["correlation"])
            for one, start, end in spans
            if one["cat"] in ("kernel", "gpu_memcpy") and one["tid"] == stream
        ]
        known = [one for one in device if one[2] in calls]
        frame = queue_length(table).filter(stream=stream)
        if any(one[2] not in calls for one in device):
            assert frame.is_empty() or (frame["events"].min() >= 0 and frame["events"][-1] == 0)
            continue
        held = [(min(calls[which], start), end, which) for start, end, which in known]
        spread: dict = {}
        for start, end, which in held:  # a launch holds its place from its call to the end of the last of its events
            first, last = spread.get(which, (start, end))
            spread[which] = min(first, start), max(last, end)
        for moment, count, launches in frame.select("time_ns", "events", "launches").rows():
            assert count == sum(start <= moment < end for start, end, _ in held)
            assert launches == sum(start <= moment < end for start, end in spread.values())
        if held:
            one = queue_summary(table).filter(stream=stream).row(0, named=True)
            assert one["mean_events"] * max(one["span_ns"], 1) == pytest.approx(
                sum(end - start for start, end, _ in held)
            )
    shifted = queue_length(table_of(moved(events, 4_000)))
    assert shifted.drop("time_ns").equals(queue_length(table).drop("time_ns"))


def copy(kind, start_ns, length_ns, correlation, **args):
    """A copy of some bytes."""
    return work(f"Memcpy {kind} (a -> b)", start_ns, length_ns, correlation, category="gpu_memcpy", **args)


def test_bandwidth_by_hand():
    table = table_of(
        [
            copy("HtoD", 0, 100, 1, bytes=1_000),  # 10 GB/s, and 20 more from 50 to 100
            copy("HtoD", 50, 100, 2, bytes=2_000, stream=20),
            copy("DtoH", 200, 0, 3, bytes=64),
            copy("DtoH", 300, 10, 4),
            work("Memset (Device)", 400, 10, 5, category="gpu_memset", bytes=50),
            work("Memcpy (unknown)", 500, 10, 6, category="gpu_memcpy", bytes=20),
        ]
    )
    frame = memory_bandwidth(table)
    assert frame.columns == list(COLUMNS["memory_bandwidth"])
    assert frame.drop("device").rows() == [
        ("DtoH", 2, 2, 0, 0, 0, None, None),
        ("HtoD", 2, 0, 3_000, 200, 150, 20.0, 30.0),
        ("memset", 1, 0, 50, 10, 10, 5.0, 5.0),
        ("other", 1, 0, 20, 10, 10, 2.0, 2.0),
    ]
    series = memory_bandwidth_series(table).filter(kind="HtoD")
    assert series.select("time_ns", "gb_per_s").rows() == [(0, 10.0), (50, 30.0), (100, 20.0), (150, 0.0)]
    assert memory_bandwidth(table, window=(40, 60)).select("count", "bytes").rows() == [(1, 2_000)]


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40), st.integers(0, 10_000)), min_size=1, max_size=8))
def test_bytes_are_the_area_under_the_rate(copies):
    table = table_of([copy("DtoD", start, span, at, bytes=size) for at, (start, span, size) in enumerate(copies)])
    total = memory_bandwidth(table).row(0, named=True)
    series = memory_bandwidth_series(table)
    held = series["time_ns"].diff().shift(-1).fill_null(0)
    assert (series["gb_per_s"] * held).sum() == pytest.approx(total["bytes"]) and total["bytes"] == sum(
        c[2] for c in copies
    )
    assert total["busy_ns"] <= total["sum_ns"] and total["mean_gb_per_s"] <= total["peak_gb_per_s"] * (1 + 1e-9)


def test_hardware_counters_by_hand():
    table = table_of(
        [
            row("gemm", "cuda_profiler_range", 0, 10, flops=4, note="x"),
            row("gemm", "cuda_profiler_range", 10, 10, flops=6, stalls=0.5),
        ]
    )
    assert hardware_counters(table).rows() == [
        ("gemm", "flops", 2, 10, 4, 5, 6),
        ("gemm", "stalls", 1, 0.5, 0.5, 0.5, 0.5),
    ]
    nothing = table_of([])
    assert "range profiler" in (why_no_counters(nothing) or "") and why_empty(nothing)
    for function, name in (
        (hardware_counters, "hardware_counters"),
        (memory_bandwidth, "memory_bandwidth"),
        (memory_bandwidth_series, "memory_bandwidth_series"),
        (queue_length, "queue_length"),
        (queue_summary, "queue_summary"),
    ):
        assert function(nothing).is_empty() and function(nothing).columns == list(COLUMNS[name])


@needs_traces
def test_real_counters_are_those_of_the_file():
    with gzip.open(TRACES / CUPTI) as file:
        ranges = [one for one in json.load(file)["traceEvents"] if one.get("cat") == "cuda_profiler_range"]
    frame = hardware_counters(load_table(TRACES / CUPTI))
    metric = "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum"
    assert frame.filter(metric=metric)["sum"].sum() == sum(one["args"][metric] for one in ranges) > 0
    assert frame.filter(metric=metric)["count"].sum() == len(ranges) == 77 and frame["metric"].n_unique() == 9


@needs_traces
@pytest.mark.parametrize("name", [NEGATIVE, AMG, "hta/trace_diff/test/test.json.gz"])
def test_real_queues_are_never_negative_and_end_empty(name):
    table = load_table(TRACES / name)
    frame = queue_length(table)
    for _, one in frame.group_by("device", "stream"):
        assert one["events"].min() >= 0 and one["events"][-1] == 0 and (one["launches"] <= one["events"]).all()
        assert one["time_ns"].is_sorted()
    summary = queue_summary(table)
    assert summary["device_events"].sum() + summary["unexplained_events"].sum() == int(table.device_rows.sum())
    if name == AMG:  # one launch of a graph of 554 kernels
        assert summary.filter(pl.col("stream") == 164).select("max_events", "max_launches").rows() == [(554, 1)]
