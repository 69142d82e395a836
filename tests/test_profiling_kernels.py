"""Kernel breakdown: cases by hand, sums that must hold on any capture, and the defects of others on real traces."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.kernels import COLUMNS, NO_MODULE, NO_OPERATOR, kernel_breakdown, why_empty
from ridgeline.profiling.classify import step_rows
from ridgeline.profiling.load import load_table
from test_profiling_launches import CONTROL, CUPTI, TRACES, call, captures, moved, needs_traces, row, table_of, work
from test_profiling_synthetic import CPU_STEP

GLOO = "gloo/gloo_straggler_rank0.json.gz"


CASE = [
    row("ProfilerStep#1", "user_annotation", 0, 9_000),
    row("aten::linear", "cpu_op", 100, 1_000, **{"Input Dims": [[8, 16], [4, 16]]}),
    row("aten::addmm", "cpu_op", 200, 800, **{"Input Dims": [[4], [8, 16]]}),
    call(300, 100, 1),
    work("gemm", 2_000, 500, 1),
    call(500, 100, 2),
    work("gemm", 3_000, 700, 2),
    row("aten::copy_", "cpu_op", 1_200, 400),
    call(1_300, 50, 3, name="cudaMemcpyAsync"),
    work("Memcpy HtoD (Pageable -> Device)", 4_000, 900, 3, category="gpu_memcpy"),
    call(1_400, 50, 4, name="cudaMemsetAsync"),
    work("Memset (Device)", 5_000, 100, 4, category="gpu_memset"),
    call(1_700, 100, 5, name="cudaGraphLaunch"),
    work("gemm", 6_000, 300, 5),
    work("ncclDevKernel_AllReduce", 6_300, 250, 5, **{"Collective name": "allreduce"}),
    work("strange", 7_000, 40, -5, category="gpu_strange"),
    work("broken", 8_000, -40, 6),
]


def test_by_name_with_roles():
    frame = kernel_breakdown(table_of(CASE))
    assert frame.columns == ["name", "role", "count", "sum_ns", "min_ns", "mean_ns", "max_ns", "share"]
    assert frame.rows()[0] == ("gemm", "compute", 3, 1_500, 300, 500.0, 700, 1_500 / 2_790)
    assert frame.select("role", "count", "sum_ns").rows()[1:] == [
        ("copy", 1, 900),
        ("communication", 1, 250),
        ("set", 1, 100),
        ("unknown", 1, 40),
    ]
    assert set(frame.columns) <= set(COLUMNS["kernel_breakdown"])


def test_by_operator_and_shape():
    """The step's range is no operator; the graph was launched outside of any; both copies belong to aten::copy_."""
    table = table_of(CASE)
    assert kernel_breakdown(table, "operator").select("operator", "role", "count", "sum_ns").rows() == [
        ("aten::addmm", "compute", 2, 1_200),
        ("aten::copy_", "copy", 1, 900),
        (NO_OPERATOR, "compute", 1, 300),
        (NO_OPERATOR, "communication", 1, 250),
        ("aten::copy_", "set", 1, 100),
        (NO_OPERATOR, "unknown", 1, 40),
    ]
    shapes = kernel_breakdown(table, "shape").filter(pl.col("sum_ns") >= 900)
    assert shapes.select("operator", "input_dims").rows() == [("aten::addmm", "[[4],[8,16]]"), ("aten::copy_", "")]


def test_kernels_of_a_graph_belong_to_the_operator_around_its_launch():
    events = [
        row("Torch-Compiled Region: 0/0", "user_annotation", 0, 100),
        call(10, 20, 5, name="cudaGraphLaunch"),
        *(work(f"k{at}", 50 + 10 * at, 5, 5) for at in range(4)),
    ]
    rows = kernel_breakdown(table_of(events), "operator").select("operator", "count", "sum_ns").rows()
    assert rows == [("Torch-Compiled Region: 0/0", 4, 20)]


def test_by_module_and_backward_through_its_link():
    def arrow(phase, ns, tid):
        return {"ph": phase, "cat": "fwdbwd", "name": "fwdbwd", "id": 1, "pid": 1, "tid": tid, "ts": ns / 1000}

    events = [
        row("nn.Module: Net_0", "python_function", 0, 1_000),
        row("nn.Module: Linear_0", "python_function", 100, 400),
        row("linear.py(1): forward", "python_function", 110, 380),
        row("aten::linear", "cpu_op", 200, 200),
        call(250, 50, 1),
        work("fwd", 600, 100, 1),
        row("aten::relu", "cpu_op", 700, 100),
        call(720, 50, 2),
        work("relu", 900, 30, 2),
        row("autograd::engine::evaluate_function: AddmmBackward0", "cpu_op", 2_000, 300, (1, 2)),
        call(2_100, 50, 3, tid=2),
        work("bwd", 2_400, 70, 3),
        call(2_350, 50, 4, tid=2),  # after the backward node has ended
        work("late", 2_500, 11, 4),
        arrow("s", 200, 1),
        arrow("f", 2_000, 2),
    ]
    table = table_of(events, stacks=True)
    assert kernel_breakdown(table, "module").select("module", "count", "sum_ns").rows() == [
        ("nn.Module: Linear_0", 2, 170),
        ("nn.Module: Net_0", 1, 30),
        (NO_MODULE, 1, 11),
    ]
    plain = table_of(events)
    assert kernel_breakdown(plain, "module").is_empty() and "stacks=True" in (why_empty(plain, "module") or "")


def test_a_cpu_trace_counts_operators_by_their_own_time():
    table = table_of(
        [
            row("aten::linear", "cpu_op", 0, 1_000, **{"Input dims": [[2, 3]]}),
            row("aten::mm", "cpu_op", 100, 600, **{"Input dims": [[2, 3]]}),
            row("aten::mm", "cpu_op", 2_000, 500, **{"Input dims": [[4, 3]]}),
            row("c10d::allreduce_", "cpu_op", 3_000, 50),
        ]
    )
    assert kernel_breakdown(table).select("name", "role", "count", "sum_ns", "max_ns").rows() == [
        ("aten::mm", "compute", 2, 1_100, 600),
        ("aten::linear", "compute", 1, 400, 400),
        ("c10d::allreduce_", "communication", 1, 50, 50),
    ]
    shapes = kernel_breakdown(table, "shape").select("operator", "input_dims", "sum_ns").rows()
    assert shapes[:2] == [("aten::mm", "[[2,3]]", 600), ("aten::mm", "[[4,3]]", 500)]


@given(captures(), st.integers(0, 99), st.sampled_from(["name", "operator", "shape"]))
def test_any_breakdown_adds_up_to_the_device_time(events, seed, by):
    table = table_of(events)
    frame = kernel_breakdown(table, by)
    device = [one for one in events if one["cat"] in ("kernel", "gpu_memcpy")]
    if not device:
        return
    assert frame["sum_ns"].sum() == sum(round(one["dur"] * 1000) for one in device) or frame.is_empty()
    assert frame.is_empty() == (why_empty(table, by) is not None)
    for one in frame.rows(named=True):
        assert one["min_ns"] <= one["mean_ns"] <= one["max_ns"] <= one["sum_ns"]
        assert one["mean_ns"] * one["count"] == pytest.approx(one["sum_ns"])
    if frame["sum_ns"].sum():
        assert frame["share"].sum() == pytest.approx(1)
    random.Random(seed).shuffle(events)
    assert kernel_breakdown(table_of(moved(events, 7_000)), by).equals(frame)


@given(captures(), st.integers(-10, 400))
def test_two_windows_add_up_to_the_whole(events, cut):
    table = table_of(events)
    whole, sums = kernel_breakdown(table), defaultdict(int)
    for window in ((-1_000, cut), (cut, 10_000)):
        for one in kernel_breakdown(table, window=window).rows(named=True):
            sums[one["name"], one["role"]] += one["sum_ns"]
    assert sums == {(one["name"], one["role"]): one["sum_ns"] for one in whole.rows(named=True)}


def test_what_cannot_be_answered_says_why():
    with pytest.raises(UserError, match="did you mean 'operator'"):
        kernel_breakdown(table_of(CASE), "operators")  # type: ignore[arg-type]
    assert "no timeline" in (why_empty(table_of([call(0, 5, 1)])) or "")
    assert "record_shapes" in (why_empty(table_of([call(0, 5, 1), work("k", 9, 5, 1)]), "shape") or "")
    whole = table_of(CASE)
    assert "streamed" in (why_empty(replace(whole, meta=replace(whole.meta, streamed=True)), "shape") or "")
    for by in ("name", "operator", "module", "shape"):
        assert kernel_breakdown(table_of([]), by).is_empty() and why_empty(table_of([]), by)
    assert why_empty(table_of(CPU_STEP)) is None


@needs_traces
def test_statistics_stay_statistics_with_many_kernels():
    """HTA's max, min and mean become the sum once a trace has more than ten kernel names: for CatArrayBatchedCopy it
    prints max 6,878 us. HTA drops the last step, so here the window ends where that step starts."""
    table = load_table(TRACES / CONTROL)
    frame = kernel_breakdown(table, window=(int(table.start.min()), int(table.start[step_rows(table)[-1]])))
    several = frame.filter((pl.col("count") > 1) & (pl.col("min_ns") > 0))
    assert several.height > 50 and (several["max_ns"] < several["sum_ns"]).all()
    cat = frame.filter(pl.col("name").str.contains("CatArrayBatchedCopy<float, unsigned int, 2, 128", literal=True))
    assert cat.select("count", "sum_ns", "min_ns", "max_ns").rows() == [(60, 6_878_000, 6_000, 550_000)]
    assert cat["mean_ns"].item() == pytest.approx(6_878_000 / 60)


@needs_traces
def test_real_cpu_and_counter_traces():
    gloo = kernel_breakdown(load_table(TRACES / GLOO))
    assert {"compute", "communication"} == set(gloo["role"]) and gloo["share"].sum() == pytest.approx(1)
    assert kernel_breakdown(load_table(TRACES / CUPTI)).is_empty()
