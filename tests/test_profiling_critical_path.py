"""Critical path: traces drawn by hand, recorded ones with answers read off their raw events, and what holds for any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.profiling.analyses.critical_path import (
    COLUMNS,
    critical_path,
    critical_path_across,
    critical_path_summary,
    matched_rows,
    why_empty,
)
from ridgeline.profiling.classify import launches, step_rows
from ridgeline.profiling.load import load_table, parse_table

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def event(name, ts, dur, tid=1, cat="cpu_op", pid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def launch(ts, dur, correlation, tid=1, name="cudaLaunchKernel"):
    return event(name, ts, dur, tid, cat="cuda_runtime", correlation=correlation)


def kernel(name, ts, dur, correlation, stream=7, cat="kernel"):
    return event(name, ts, dur, stream, cat=cat, pid=0, correlation=correlation, device=0, stream=stream)


def table_of(events, rank=0, **top):
    info = {"rank": rank, "world_size": 2}
    return parse_table(json.dumps({"distributedInfo": info, **top, "traceEvents": events}).encode(), "t.json")


def steps(path):
    """(type, name, us) of every segment."""
    return [(row["type"], row["name"], row["duration_ns"] / 1000) for row in path.iter_rows(named=True)]


def check_tiling(path, low, high):
    assert path["start_ns"][0] == low and path["end_ns"][-1] == high
    assert (path["end_ns"][:-1] == path["start_ns"][1:]).all()
    assert (path["duration_ns"] > 0).all() and path["duration_ns"].sum() == high - low


QUEUED = [
    event("aten::x", 0, 100),
    launch(20, 10, 1),
    kernel("a", 40, 50, 1),
    launch(50, 10, 2),
    kernel("b", 95, 100, 2),
    event("aten::item", 105, 110),
    launch(110, 100, 3, name="cudaStreamSynchronize"),
]
"""Kernel a starts 20 us after its launch on an empty stream, b 5 us after a, for it was launched long before."""


def test_a_queued_kernel_and_a_synchronisation_by_hand():
    table = table_of(QUEUED)
    path = critical_path(table)
    assert steps(path) == [
        ("operator", "aten::x", 20),
        ("launch delay", "a", 20),
        ("kernel", "a", 50),
        ("kernel-kernel gap", "b", 5),
        ("kernel", "b", 100),
        ("sync wait", "cudaStreamSynchronize", 15),
        ("operator", "aten::item", 5),
    ]
    check_tiling(path, 0, 215_000)
    assert path["thread"].to_list() == ["1/1", "0/7", "0/7", "0/7", "0/7", "1/1", "1/1"]
    summary = critical_path_summary(path)
    assert summary.row(0) == ("kernel", 2, 150_000, 150 / 215) and summary["total_ns"].sum() == 215_000
    assert critical_path_summary(path, "name")["name"][0] == "b"


def test_a_window_clips_what_crosses_it():
    path = critical_path(table_of(QUEUED), (60_000, 150_000))
    assert steps(path) == [("kernel", "a", 30), ("kernel-kernel gap", "b", 5), ("kernel", "b", 55)]
    check_tiling(path, 60_000, 150_000)


def test_a_host_that_is_late_is_the_path():
    """Kernels much shorter than the time between launches: only the last one's end is the device's."""
    table = table_of(
        [event("aten::x", 0, 300), launch(10, 5, 1), kernel("a", 20, 5, 1), launch(200, 5, 2), kernel("b", 210, 200, 2)]
    )
    assert steps(critical_path(table)) == [
        ("operator", "aten::x", 10),
        ("runtime call", "cudaLaunchKernel", 5),
        ("operator", "aten::x", 185),
        ("launch delay", "b", 10),
        ("kernel", "b", 200),
    ]


def waiting_streams(**top):
    """b on stream 8 was launched at 30 and starts at 105, 5 us after a on stream 7."""
    return [
        event("aten::x", 0, 60),
        launch(10, 2, 1),
        kernel("a", 20, 80, 1),
        launch(15, 1, 5, name="cudaEventRecord"),
        launch(25, 1, 6, name="cudaStreamWaitEvent"),
        launch(30, 2, 2),
        kernel("b", 105, 40, 2, stream=8),
        launch(40, 2, 3),
        kernel("other", 50, 53, 3, stream=9),
    ]


def test_waits_between_streams_as_recorded_and_as_inferred():
    """Recorded, the wait is for stream 7; without records it is for whatever ended last before b, on stream 9."""
    sync = event("Stream Wait Event", 25, 1, tid=8, cat="cuda_sync", pid=0, stream=8, correlation=6)
    sync["args"] |= {"wait_on_stream": 7, "wait_on_cuda_event_record_corr_id": 5}
    recorded = steps(critical_path(table_of([*waiting_streams(), sync])))
    assert recorded[-3:] == [("kernel", "a", 80), ("stream wait", "b", 5), ("kernel", "b", 40)]
    inferred = steps(critical_path(table_of(waiting_streams())))
    assert inferred[-3:] == [("kernel", "other", 53), ("stream wait", "b", 2), ("kernel", "b", 40)]


def test_a_synchronisation_waits_for_its_own_stream_or_event():
    """The call waits for what was launched on stream 7 before the record at 35; c and the kernel of stream 8 end later,
    still inside the call. Without the record the last one to end is taken."""
    events = [
        event("aten::x", 0, 50),
        launch(10, 2, 1),
        kernel("a", 15, 80, 1),
        launch(20, 2, 2),
        kernel("b", 25, 72, 2, stream=8),
        launch(35, 1, 5, name="cudaEventRecord"),
        launch(40, 2, 3),
        kernel("c", 96, 3, 3),
        launch(50, 60, 6, name="cudaEventSynchronize"),
    ]
    sync = event("Event Sync", 50, 60, tid=-1, cat="cuda_sync", pid=0, stream=-1, correlation=6)
    sync["args"] |= {"wait_on_stream": 7, "wait_on_cuda_event_record_corr_id": 5}
    found = steps(critical_path(table_of([*events, sync])))
    assert found[-2:] == [("kernel", "a", 80), ("sync wait", "cudaEventSynchronize", 15)]
    assert steps(critical_path(table_of(events)))[-1] == ("sync wait", "cudaEventSynchronize", 11)


def test_the_backward_thread_is_followed_and_left_again():
    node = "autograd::engine::evaluate_function: MmBackward0"
    table = table_of(
        [
            event("ProfilerStep#1", 0, 1_000, cat="user_annotation"),
            event("aten::mm", 0, 100),
            event(node, 120, 300, tid=2),
            event(node, 430, 300, tid=2),
            event("aten::add_", 760, 200),
        ]
    )
    assert steps(critical_path(table)) == [
        ("operator", "aten::mm", 100),
        ("thread hand-over", node, 20),
        ("operator", node, 300),
        ("host gap", "(no event)", 10),
        ("operator", node, 300),
        ("thread hand-over", node, 30),
        ("operator", "aten::add_", 200),
        ("host gap", "ProfilerStep#1", 40),
    ]


def test_a_backward_thread_of_which_a_sample_is_left_is_followed_too():
    """Two nodes of a backward pass of 800 us are left: between them the backward thread is silent, not the main one."""
    node = "autograd::engine::evaluate_function: MmBackward0"
    recorded = [
        event("ProfilerStep#1", 0, 1000, cat="user_annotation"),
        event("aten::mm", 0, 100),
        event(node, 120, 30, tid=2),
        event(node, 850, 50, tid=2),
        event("aten::add_", 930, 70),
    ]
    path = critical_path(table_of(recorded))
    check_tiling(path, 0, 1_000_000)
    assert steps(path) == [
        ("operator", "aten::mm", 100.0),
        ("thread hand-over", node, 20.0),
        ("operator", node, 30.0),
        ("host gap", "(no event)", 700.0),
        ("operator", node, 50.0),
        ("thread hand-over", node, 30.0),
        ("operator", "aten::add_", 70.0),
    ]
    assert path["thread"].to_list() == ["1/1", "1/2", "1/2", "1/2", "1/2", "1/2", "1/1"]
    # Another helper, whose work is no evidence that anyone waits for it, must fill half of the silence itself.
    other = [{**one, "name": "gloo:all_reduce"} if one["tid"] == 2 else one for one in recorded]
    assert ("host gap", "ProfilerStep#1", 830.0) in steps(critical_path(table_of(other)))
    # A short backward pass in a long silence does not explain it.
    brief = [*recorded[:3], recorded[-1]]
    assert ("host gap", "ProfilerStep#1", 830.0) in steps(critical_path(table_of(brief)))


@needs_traces
@pytest.mark.parametrize("rank", [0, 1])
def test_the_backward_pass_of_a_sampled_trace_is_on_the_backward_thread(rank):
    """Its writer kept 34 of 223 ms of backward work a step: those 223 ms are the backward thread's all the same."""
    table = load_table(TRACES / f"hta/trace_filter/sampled_rank-{rank}.json.gz")
    path = critical_path(table)
    gaps = path.filter((pl.col("type") == "host gap") & (pl.col("name") == "## backward ##"))
    assert gaps["duration_ns"].sum() < 10_000_000
    codes = table.thread[table.named(lambda name: name.startswith("autograd::engine::evaluate_function"))]
    (thread,) = {"/".join(table.threads[code]) for code in codes.tolist()}
    there = path.filter(pl.col("thread") == thread)["duration_ns"].sum()
    assert there > 2 * 200_000_000


def test_work_from_before_the_capture_has_no_cause():
    table = table_of([event("aten::x", 0, 50), kernel("old", 10, 90, 77)])
    assert steps(critical_path(table)) == [("not recorded", "old", 10), ("kernel", "old", 90)]


def test_a_long_hole_before_queued_work_is_not_called_a_gap():
    """b was launched while a ran, and starts 60 us after it: whatever kept it is not in the trace."""
    table = table_of(
        [event("aten::x", 0, 60), launch(5, 2, 1), kernel("a", 10, 90, 1), launch(20, 2, 2), kernel("b", 160, 10, 2)]
    )
    assert steps(critical_path(table))[-3:] == [("kernel", "a", 90), ("not recorded", "b", 60), ("kernel", "b", 10)]


@needs_traces
def test_lost_kernels_are_not_mistaken_for_launch_overhead():
    """Between a kernel's end and a memset launched 130 ms earlier lie 64.652 ms with nothing on any stream."""
    table = load_table(TRACES / "hta/negative_queue_length_values_check/rank0.json.gz")
    holes = critical_path(table).filter((pl.col("type") == "not recorded") & (pl.col("duration_ns") == 64_652_000))
    assert holes["name"].to_list() == ["Memset (Device)"]


def test_a_blocking_copy_waits_for_itself():
    table = table_of(
        [
            event("aten::x", 0, 100),
            launch(10, 70, 1, name="cudaMemcpyAsync"),
            kernel("Memcpy DtoH", 20, 50, 1, cat="gpu_memcpy"),
        ]
    )
    assert steps(critical_path(table)) == [
        ("operator", "aten::x", 10),
        ("launch delay", "Memcpy DtoH", 10),
        ("memory copy", "Memcpy DtoH", 50),
        ("sync wait", "cudaMemcpyAsync", 10),
        ("operator", "aten::x", 20),
    ]


def two_ranks(late):
    """Rank 1 begins its all-reduce ``late`` us after rank 0; it ends everywhere 20 us after the last arrival."""
    tables = {}
    for rank, come in ((0, 100), (1, 100 + late)):
        done = 100 + late + 20
        tables[rank] = table_of(
            [
                event("ProfilerStep#1", 0, done + 30, cat="user_annotation"),
                event("aten::mm", 5, come - 10),
                event("c10d::allreduce_", come, 2),
                event("gloo:all_reduce", come + 2, done - come - 2, tid=9, cat="user_annotation"),
                event("aten::add_", done + 2, 20 + rank),
            ],
            rank,
            host_name="h",
        )
    return tables


def test_the_path_moves_to_the_rank_that_came_last():
    path = critical_path_across(two_ranks(late=500))
    check_tiling(path, 0, 650_000)
    ranks = [
        (row["rank"], row["type"], row["name"]) for row in path.iter_rows(named=True) if row["duration_ns"] > 9_000
    ]
    assert ranks[0] == (1, "operator", "aten::mm"), "rank 0 waited for this one"
    on_first = path.filter(pl.col("rank") == 0)
    assert on_first["duration_ns"].sum() <= 50_000, "rank 0 is on the path after the collective at most"
    assert critical_path_summary(path, "rank").filter(pl.col("rank") == 1)["total_ns"][0] >= 600_000
    tables = two_ranks(late=500)
    assert len(matched_rows(tables)) == 1
    assert critical_path_across(dict(reversed(tables.items()))).equals(path), "the order of ranks does not matter"


def test_clocks_of_two_hosts_are_aligned_first():
    """Rank 1's clock is 7 ms ahead: the same path, for the collective ends at one moment on both."""
    tables = two_ranks(late=500)
    late = tables[1]
    ahead = replace(late, start=late.start + 7_000_000, end=late.end + 7_000_000, meta=replace(late.meta, host="other"))
    assert critical_path_across({0: tables[0], 1: ahead}).equals(critical_path_across(tables))


def test_nothing_to_follow():
    table = table_of([])
    assert critical_path(table).columns == list(COLUMNS["critical_path"]) and critical_path(table).is_empty()
    assert why_empty(table) == "the trace holds no host or device event with a duration"
    assert critical_path_across({0: table}).columns == list(COLUMNS["critical_path_across"])


@st.composite
def captures(draw):
    """Any host events on two threads, some launching, and kernels that start after their launch, streams in order."""
    events, free = [], {7: 0, 8: 0}
    at = 0
    for number in range(draw(st.integers(1, 10))):
        at += draw(st.integers(0, 20))
        length = draw(st.integers(0, 30))
        kind = draw(st.sampled_from(["op", "launch", "sync", "helper"]))
        if kind == "op":
            events.append(event(f"op{number}", at, length))
        elif kind == "helper":
            events.append(event(f"help{number}", at, length, tid=2))
        elif kind == "sync":
            events.append(launch(at, length, 100 + number, name="cudaDeviceSynchronize"))
        else:
            stream = draw(st.sampled_from([7, 8]))
            events.append(launch(at, length, number))
            begun = max(at, free[stream]) + draw(st.integers(0, 15))
            lasts = draw(st.integers(0, 40))
            events.append(kernel(f"k{number}", begun, lasts, number, stream))
            free[stream] = begun + lasts
        at += draw(st.integers(0, length))
    return events


@given(captures(), st.integers(0, 10_000), st.randoms())
def test_any_path_tiles_and_neither_order_nor_clock_matters(events, shift, shuffled):
    table = table_of(events)
    path = critical_path(table)
    if why_empty(table) is not None:
        assert path.is_empty()
        return
    check_tiling(path, int(table.start.min()), int(table.end.max()))
    moved = [{**one, "ts": one["ts"] + shift} for one in events]
    shuffled.shuffle(moved)
    again = critical_path(table_of(moved))
    times = [pl.col("start_ns") - shift * 1000, pl.col("end_ns") - shift * 1000]
    assert again.with_columns(times).equals(path)


@needs_traces
def test_the_end_of_a_recorded_multi_stream_trace():
    """Read off the file: the last kernel is launched at ...035 us, starts at ...050, runs 123 us to ...173; the device
    synchronisation that waits for it returns at ...186. Its stream's memset and the event it waited for end earlier."""
    table = load_table(TRACES / "hta/critical_path/cuda_event_sync_multi_stream/event_sync_trace.json.gz")
    path = critical_path(table)
    assert steps(path)[-3:] == [
        ("launch delay", "ampere_sgemm_128x64_nn", 15),
        ("kernel", "ampere_sgemm_128x64_nn", 123),
        ("sync wait", "cudaDeviceSynchronize", 13),
    ]
    check_tiling(path, int(table.start.min()), int(table.end.max()))


@needs_traces
@pytest.mark.parametrize(
    "name",
    [
        "hta/critical_path/alexnet/benchmark_result_2869224_1695835535_trace.json.gz",
        "hta/critical_path/simple_add/benchmark_result_493459_1694039959_trace.json.gz",
        "hta/nccl_parser_config/nccl_data.json.gz",
        "hta/trace_diff/test/test.json.gz",
        "tracelens/mi300/resnet_act_checkpoint.json.gz",
        "param/resnet_kineto.json.gz",
        "gloo/gloo_straggler_rank0.json.gz",
    ],
)
def test_recorded_traces_are_tiled_and_so_is_each_step(name):
    table = load_table(TRACES / name)
    path = critical_path(table)
    check_tiling(path, path["start_ns"][0], path["end_ns"][-1])
    for row in step_rows(table)[:2].tolist():
        window = int(table.start[row]), int(table.end[row])
        check_tiling(critical_path(table, window), *window)


@needs_traces
def test_kernels_of_a_graph_launch_are_on_the_path():
    """One call launches 554 events; a rival leaves them all out."""
    table = load_table(TRACES / "saf/amg_example_trace.json.gz")
    launched = launches(table)
    (call,) = [row for row in set(launched[launched >= 0].tolist()) if (launched == row).sum() == 554]
    path = critical_path(table)
    on_path = path.filter(pl.col("type").is_in(["kernel", "memory copy"]))["row"].to_numpy()
    assert (launched[on_path] == call).sum() > 400


@needs_traces
def test_a_busy_device_and_a_late_host_are_told_apart():
    """97.0 % busy with collectives at work; 7.9 % busy, so the host is the path."""
    busy = critical_path_summary(critical_path(load_table(TRACES / "tracelens/mi300/resnet_act_checkpoint.json.gz")))
    shares = dict(busy.select("type", "share").iter_rows())
    assert shares["collective"] > 0.5 and shares["collective"] + shares["kernel"] > 0.9
    bert = load_table(TRACES / "tracelens/h100/gaunernst_bert-small-uncased__1016001.json.gz")
    late = dict(critical_path_summary(critical_path(bert)).select("type", "share").iter_rows())
    assert late["operator"] + late["host gap"] + late["runtime call"] > 0.95


@needs_traces
def test_the_path_of_two_ranks_goes_through_the_planted_gap():
    """Rank 1 sleeps 3 ms at the head of every step. It came last to the transfers of the first and the third step, so
    there the path goes through its head: 4.9 and 3.1 ms without an event. Rank 0 came last to the second one."""
    tables = {rank: load_table(TRACES / f"gloo/gloo_straggler_rank{rank}.json.gz") for rank in (0, 1)}
    path = critical_path_across(tables)
    gaps = path.filter((pl.col("type") == "host gap") & (pl.col("duration_ns") > 1_000_000))
    assert [(row["rank"], row["name"], round(row["duration_ns"] / 1e6, 1)) for row in gaps.iter_rows(named=True)] == [
        (1, "ProfilerStep#2", 4.9),
        (1, "ProfilerStep#4", 3.1),
    ]
    check_tiling(path, path["start_ns"][0], path["end_ns"][-1])
    assert set(path["rank"].unique()) == {0, 1}
