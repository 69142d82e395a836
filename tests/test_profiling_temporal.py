"""The temporal breakdown: identities on any trace, known answers on small and real ones, and HTA's defects."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.temporal import COLUMNS, temporal_breakdown
from ridgeline.profiling.load import parse_table
from ridgeline.profiling.trace import Trace

TRACES = Path(__file__).parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def event(name, ts, dur, cat="kernel", tid=7, **args):
    args = {"device": 0, "stream": tid, **args} if cat != "cpu_op" else args
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": args}


def table_of(events, base=0):
    return parse_table(json.dumps({"baseTimeNanoseconds": base, "traceEvents": events}).encode(), "t.json")


def one(events, **options):
    (row,) = temporal_breakdown(table_of(events), **options).to_dicts()
    return row


GEMM, NCCL = "sgemm_128x128", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
KINDS = st.sampled_from([(GEMM, "kernel"), (NCCL, "kernel"), ("Memcpy HtoD", "gpu_memcpy"), ("Memset", "gpu_memset")])
EVENTS = st.lists(st.tuples(KINDS, st.integers(0, 400), st.integers(0, 60), st.integers(1, 3)), min_size=1, max_size=25)


def built(drawn):
    """Times in whole nanoseconds, written as microseconds; the id keeps twins from being taken for copies of one."""
    return [
        event(name, ts / 1000, dur / 1000, cat, stream, correlation=at)
        for at, ((name, cat), ts, dur, stream) in enumerate(drawn)
    ]


def brute(drawn):
    """Nanosecond by nanosecond."""
    cells = {"compute": set(), "communication": set(), "memory": set()}
    for (name, cat), ts, dur, _ in drawn:
        role = "memory" if cat != "kernel" else "communication" if name == NCCL else "compute"
        cells[role].update(range(ts, ts + dur))
    return cells


@given(EVENTS)
def test_equal_to_counting_every_nanosecond(drawn):
    row, cells = one(built(drawn)), brute(drawn)
    busy = set.union(*cells.values())
    assert row["busy_ns"] == len(busy)
    assert row["span_ns"] == max(ts + dur for _, ts, dur, _ in drawn) - min(ts for _, ts, *_ in drawn)
    assert row["compute_ns"] == len(cells["compute"]) and row["memory_ns"] == len(cells["memory"])
    assert row["communication_ns"] == len(cells["communication"])
    assert row["exposed_communication_ns"] == len(cells["communication"] - cells["compute"])
    assert row["exposed_memory_ns"] == len(cells["memory"] - cells["compute"] - cells["communication"])


@given(EVENTS)
def test_the_parts_sum_to_the_span(drawn):
    row = one(built(drawn))
    parts = row["compute_ns"] + row["exposed_communication_ns"] + row["exposed_memory_ns"] + row["idle_ns"]
    assert parts == row["span_ns"] and row["idle_ns"] >= 0
    assert row["kernel_count"] == sum(cat == "kernel" for (_, cat), *_ in drawn)


@given(EVENTS, st.integers(0, 10**15), st.randoms(use_true_random=False))
def test_a_shift_a_shuffle_and_other_stream_numbers_change_nothing(drawn, shift, chance):
    moved = [((name, cat), ts, dur, 9 - stream) for (name, cat), ts, dur, stream in drawn]
    chance.shuffle(moved)
    (shifted,) = temporal_breakdown(table_of(built(moved), base=shift)).to_dicts()
    row = one(built(drawn))
    assert {k: v for k, v in shifted.items() if k != "start_ns"} == {k: v for k, v in row.items() if k != "start_ns"}
    assert not row["span_ns"] or shifted["start_ns"] == row["start_ns"] + shift


def test_kernels_below_a_microsecond_keep_their_length():
    """HTA rounds starts up and ends down, which makes idle of 0.8 us kernels and negative durations (defects 2 and 3)."""
    row = one([event(GEMM, 0.1 + at, 0.8) for at in range(100)])
    assert row["busy_ns"] == 80_000 and row["span_ns"] == 99_800 and row["idle_ns"] == 19_800


def test_overlapped_communication_is_not_lost_in_compute():
    """HTA counts communication under compute as compute alone; both unions stand here, and the exposed part."""
    row = one([event(GEMM, 0, 100), event(NCCL, 50, 100, tid=8)])
    assert (row["compute_ns"], row["communication_ns"], row["exposed_communication_ns"]) == (100_000, 100_000, 50_000)
    assert row["overlap_fraction"] == 0.5


def test_without_communication_the_overlap_is_null():
    assert one([event(GEMM, 0, 1)])["overlap_fraction"] is None


def test_a_device_row_of_an_unknown_kind_is_kept_and_said():
    table = table_of([event(GEMM, 0, 1), event("strange", 5, 2, cat="gpu_novelty")])
    (row,) = temporal_breakdown(table).to_dicts()
    assert (row["unknown_ns"], row["compute_ns"], row["kernel_count"]) == (2_000, 3_000, 1)
    from ridgeline.profiling.trust import defects

    (said,) = [one for one in defects(Trace.of([table])) if one.kind == "unknown_device_rows"]
    assert said.count == 1 and "strange" in said.message and "compute" in said.unsafe


def test_annotations_on_the_device_are_no_work():
    row = one([event(GEMM, 10, 5), event("ProfilerStep#1", 0, 100, cat="gpu_user_annotation")])
    assert (row["span_ns"], row["busy_ns"]) == (5_000, 5_000)


def steps(*spans):
    return [event(f"ProfilerStep#{at}", ts, dur, cat="user_annotation", tid=1) for at, (ts, dur) in enumerate(spans, 3)]


def test_steps_are_windows_and_a_wrong_one_is_named():
    events = [*steps((0, 100), (100, 50)), event(GEMM, 90, 30), event(NCCL, 130, 10)]
    rows = temporal_breakdown(table_of(events), steps=True).to_dicts()
    assert [(row["step"], row["span_ns"], row["compute_ns"]) for row in rows] == [
        (3, 100_000, 10_000),
        (4, 50_000, 20_000),
    ]
    assert one(events, step=4)["exposed_communication_ns"] == 10_000
    with pytest.raises(UserError, match="no step 9; its steps are 3 to 4"):
        temporal_breakdown(table_of(events), step=9)


def test_a_cpu_trace_is_split_over_its_steps():
    """Outermost operators of the driving thread less the collective's call; the transfer runs on a worker thread."""
    cpu = [
        *steps((0, 100)),
        event("aten::mm", 10, 30, cat="cpu_op", tid=1),
        event("aten::inner", 12, 5, cat="cpu_op", tid=1),
        event("c10d::allreduce_", 50, 5, cat="cpu_op", tid=1),
        event("gloo:all_reduce", 60, 20, cat="user_annotation", tid=2),
        event("aten::add", 70, 20, cat="cpu_op", tid=1),
    ]
    row = one(cpu)
    assert row["device"] == "cpu" and row["span_ns"] == 100_000
    assert row["compute_ns"] == 50_000
    assert row["communication_ns"] == 30_000, "from the call at 50 to the end of the transfer at 80"
    assert row["exposed_communication_ns"] == 20_000 and row["kernel_count"] == 0


def test_every_column_is_defined():
    assert set(temporal_breakdown(table_of([event(GEMM, 0, 1)])).columns) == set(COLUMNS)


KNOWN = {  # busy share, overlap, idle us: raw nanoseconds of the files, rounded as quoted
    "hta/trace_diff/control/control.json.gz": (0.8364, 0.462, None),
    "hta/trace_diff/test/test.json.gz": (0.9634, 0.708, None),
    "hta/nccl_parser_config/nccl_data.json.gz": (0.2384, 0.156, None),
    "hta/trace_filter/sampled_rank-0.json.gz": (None, 0.149, 675_191),
    "hta/trace_filter/sampled_rank-1.json.gz": (None, 0.199, 651_136),
    "tracelens/mi300/resnet_act_checkpoint.json.gz": (0.9704, 0.222, 2_566),
    "tracelens/mi300/Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz": (0.915, None, 4_023),
    "tracelens/h100/facebook_timesformer-base-finetuned-k400__1016002.json.gz": (0.990, None, 1_559),
    "tracelens/inference/vllm_prefilldecode_piecewise/graph_execution.json.gz": (0.998, None, 381),
}


@needs_traces
@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_of_real_traces(name):
    busy, overlap, idle = KNOWN[name]
    (row,) = Trace.load(TRACES / name).temporal_breakdown().to_dicts()
    assert busy is None or row["busy_ns"] / row["span_ns"] == pytest.approx(busy, abs=5e-4)
    assert overlap is None or row["overlap_fraction"] == pytest.approx(overlap, abs=1e-3)
    assert idle is None or row["idle_ns"] / 1000 == pytest.approx(idle, abs=1)


@needs_traces
def test_ranks_in_any_order_give_the_same_rows():
    files = [TRACES / f"hta/trace_filter/sampled_rank-{at}.json.gz" for at in (0, 1)]
    random.Random(0).shuffle(files)
    frames = [Trace.load(order).temporal_breakdown() for order in (files, files[::-1])]
    assert frames[0].equals(frames[1]) and frames[0]["rank"].to_list() == [0, 1]
    assert np.all(frames[0]["busy_ns"].to_numpy() <= frames[0]["span_ns"].to_numpy())
