"""Two captures compared: sums by hand, identities that must hold, and real pairs of two machines and two vendors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses import header
from ridgeline.profiling.analyses.diff import BY, COLUMNS, configuration_diff, diff
from ridgeline.profiling.analyses.header import describe
from ridgeline.profiling.load import load_table, parse_table
from ridgeline.profiling.table import TraceTable
from test_profiling_synthetic import COMM_STREAM, event, kernel, launch, step, text

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
with_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
BERT = "gaunernst_bert-small-uncased__1016001.json.gz"


def table(events: list[dict], rank: int = 0, world: int = 1, stacks: bool = False, **top: Any) -> TraceTable:
    """The table of these events."""
    return parse_table(text(events, rank, world, **top), f"rank{rank}.json", stacks=stacks)


def capture(steps: int, matmul_us: int, gemm: str, extra: list[dict] | None = None) -> TraceTable:
    """Steps of 1 ms with one linear: its matmul on the host (20 us) and on the device; a warm-up before the steps."""
    events = [event("aten::mm", "cpu_op", -500, 20), launch(-490, 999), kernel(gemm, -400, 300, 999), *(extra or [])]
    for number in range(steps):
        base = 1000 * number
        events += [
            step(number, base, 1000),
            event("aten::linear", "cpu_op", base + 10, 50),
            event("aten::mm", "cpu_op", base + 20, 20),
            launch(base + 25, number + 1),
            kernel(gemm, base + 100, matmul_us, number + 1),
        ]
    return table(events)


def test_operators_of_two_devices_match_where_kernels_do_not() -> None:
    """2 steps of 100 us of mm on one device, 4 steps of 60 us on another: 40 us less per step, by the operator; the
    warm-up lies outside of the steps and counts only over whole captures."""
    a, b = capture(2, 100, "nvidia_gemm"), capture(4, 60, "Cijk_Alik")
    rows = {row["name"]: row for row in diff(a, b).rows(named=True)}
    mm = rows["aten::mm"]
    assert (mm["count_a"], mm["count_b"], mm["total_ns_a"], mm["mean_ns_b"]) == (2, 4, 40_000, 20_000)
    assert (mm["device_ns_a"], mm["device_ns_b"]) == (200_000, 240_000)
    assert (mm["per_step_ns_a"], mm["per_step_ns_b"], mm["delta_ns"]) == (100_000, 60_000, -40_000)
    assert (mm["measure"], mm["per"], mm["only"]) == ("device", "step and rank", None)
    linear = rows["aten::linear"]
    assert (linear["total_ns_a"], linear["own_ns_a"], linear["device_ns_a"]) == (100_000, 60_000, 0)
    whole = diff(a, b, per_step=False).row(0, named=True)
    assert (whole["name"], whole["delta_ns"], whole["per"]) == ("aten::mm", 540_000 - 500_000, "capture")
    assert (whole["count_a"], whole["per_step_ns_a"]) == (3, None)
    kernels = diff(a, b, by="kernel")
    assert kernels.select("name", "only", "delta_ns").rows() == [
        ("nvidia_gemm", "A", -100_000),
        ("Cijk_Alik", "B", 60_000),
    ]


def test_a_kernel_belongs_to_the_step_that_launched_it() -> None:
    """The device runs behind its host: launched in the step, run after it; without a launch its start decides."""
    events = [
        step(0, 0, 100),
        launch(90, 1),
        kernel("late", 150, 10, 1),
        kernel("before", -5, 1, 7),
        kernel("in", 5, 2, 8),
    ]
    one = table(events)
    assert diff(one, one, by="kernel").select("name", "count_a").sort("name").rows() == [("in", 1), ("late", 1)]


def test_a_side_of_several_ranks_is_per_rank() -> None:
    """Two ranks that do the same are, per step and rank, what one is."""
    one = capture(2, 100, "gemm")
    assert diff([one, one], one)["delta_ns"].abs().max() == 0
    assert diff([one, one], one).filter(pl.col("name") == "aten::mm")["count_a"].to_list() == [4]


def test_without_a_device_the_operators_own_time_is_compared() -> None:
    """A parent is not blamed for its child."""
    a = table([event("outer", "cpu_op", 0, 100), event("inner", "cpu_op", 10, 20)])
    b = table([event("outer", "cpu_op", 0, 150), event("inner", "cpu_op", 10, 70)])
    assert diff(a, b).select("name", "delta_ns", "measure").rows() == [("inner", 50_000, "own"), ("outer", 0, "own")]


def test_modules_and_collectives() -> None:
    """Modules of tables with stacks; collectives by the name of their call."""
    events = [
        event("nn.Module: Linear_0", "python_function", 0, 100),
        event("aten::mm", "cpu_op", 10, 20),
        launch(12, 1),
        kernel("gemm", 50, 30, 1),
        event("nccl:all_reduce", "user_annotation", 120, 20),
        launch(125, 2),
        kernel("ncclDevKernel_Generic(x)", 200, 40, 2, COMM_STREAM),
    ]
    slow = [{**one, "dur": one["dur"] * 2} if one["cat"] == "kernel" else one for one in events]
    a, b = table(events, stacks=True), table(slow, stacks=True)
    assert diff(a, b, by="module").select("name", "device_ns_a", "delta_ns").rows() == [
        ("nn.Module: Linear_0", 30_000, 30_000)
    ]
    assert diff(a, b, by="collective").select("name", "count_b", "delta_ns").rows() == [("nccl:all_reduce", 1, 40_000)]
    assert diff(table(events), b, by="module")["only"].to_list() == ["B"]


def test_configuration_comes_apart_by_key() -> None:
    """Worlds, steps and our own metadata; equal captures differ in nothing."""
    a = table([step(0, 0, 10)], 0, 8, ridgeline={"precision": "bf16", "compile": False})
    b = table([step(0, 0, 10), step(1, 20, 10)], 0, 2, ridgeline={"precision": "fp32", "compile": False})
    assert configuration_diff(a, a).is_empty()
    rows = {key: (one, other) for key, one, other in configuration_diff(a, b).rows()}
    assert rows == {"world": ("8", "2"), "steps": ("1", "2"), "ridgeline.precision": ("bf16", "fp32")}
    assert "backend" in configuration_diff(a, b, only_differences=False)["key"].to_list()
    properties = ({"deviceProperties": [{"name": "X"}, {"name": "X"}]}, {"deviceProperties": [{"name": "Y"}]})
    assert configuration_diff(a, b, properties).row(0) == ("device", "2 x X", "1 x Y")


def test_wrong_requests_are_refused() -> None:
    """One line with the nearest valid value."""
    one, stepless = capture(1, 10, "gemm"), table([event("aten::mm", "cpu_op", 0, 5)])
    with pytest.raises(UserError, match=r"'kernels'.*did you mean 'kernel'"):
        diff(one, one, by="kernels")
    with pytest.raises(UserError, match="no ProfilerStep"):
        diff(one, stepless, per_step=True)
    with pytest.raises(UserError, match="holds no trace"):
        diff([], one)


events_strategy = st.lists(
    st.tuples(st.sampled_from(["aten::mm", "aten::add", "mine::op"]), st.integers(0, 300), st.integers(1, 40)),
    min_size=1,
    max_size=15,
)


def _capture_of(rows: list[tuple[str, int, int]]) -> TraceTable:
    events: list[dict] = []
    for at, (name, start, length) in enumerate(rows):
        where = (1, 100 + at)  # a thread each: any overlap is lawful
        events += [
            event(name, "cpu_op", start, length, where),
            event("cudaLaunchKernel", "cuda_runtime", start, 0.5, where, correlation=at + 1),
            kernel(f"k_{name}", 1000 + 50 * at, length, at + 1),
        ]
    return table(events)


@settings(max_examples=40, deadline=None)
@given(events_strategy, events_strategy, st.sampled_from(BY))
def test_identities(left: list[tuple[str, int, int]], right: list[tuple[str, int, int]], by: str) -> None:
    """Sums by brute force; A to B is minus B to A; a capture against itself is zero; means are between 0 and totals."""
    a, b = _capture_of(left), _capture_of(right)
    frame, back = diff(a, b, by), diff(b, a, by)
    assert list(frame.columns) == list(COLUMNS["diff"])
    assert dict(frame.select("name", "delta_ns").rows()) == {
        name: -delta for name, delta in back.select("name", "delta_ns").rows()
    }
    assert (diff(a, a, by)["delta_ns"] == 0).all()
    if by in ("operator", "kernel"):
        prefix = "k_" if by == "kernel" else ""
        for name, count, total, device in frame.select("name", "count_a", "total_ns_a", "device_ns_a").rows():
            mine = [1000 * length for one, _, length in left if prefix + one == name]
            assert (count, total, device) == (len(mine), sum(mine), sum(mine))


def test_describe_reads_the_top_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies before and after the events; of a file beyond the limit what lies before; nothing of a bare list."""
    document = {"deviceProperties": [{"id": 0, "name": "X"}], "traceEvents": [{"ph": "X"}] * 50, "cupti_version": 22}
    whole, packed, bare = tmp_path / "a.json", tmp_path / "b.json.gz", tmp_path / "c.json"
    whole.write_text(json.dumps(document))
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    bare.write_text("[]")
    for path in (whole, packed):
        assert describe(path) == {"deviceProperties": [{"id": 0, "name": "X"}], "cupti_version": 22}
    assert describe(bare) == {}
    monkeypatch.setattr(header, "LIMIT_BYTES", 100)
    assert describe(whole) == {"deviceProperties": [{"id": 0, "name": "X"}]}
    packed.write_bytes(packed.read_bytes()[:40])
    with pytest.raises(UserError, match="header cannot be read"):
        describe(packed)


@with_traces
def test_another_gpu_and_another_world_are_said_first() -> None:
    """HTA's own pair to diff: an A100 of 8 ranks against a V100 of 2."""
    paths = [TRACES / f"hta/trace_diff/{name}/{name}.json.gz" for name in ("control", "test")]
    a, b = (load_table(path) for path in paths)
    rows = configuration_diff(a, b, (describe(paths[0]), describe(paths[1]))).rows()
    assert rows == [
        ("device", "8 x NVIDIA A100-PG509-200", "2 x Tesla V100-SXM2-16GB"),
        ("world", "8", "2"),
        ("ranks", "3", "1"),
    ]
    reduces = diff(a, b, by="collective").filter(pl.col("name") == "c10d::allreduce_").row(0, named=True)
    assert (reduces["count_a"], reduces["count_b"]) == (18, 18)


@with_traces
def test_two_vendors_align_by_operator() -> None:
    """The same model on H100 and MI300X: every operator has its match, most kernels have none; and the device time of
    the operators is all the device time there is on either side (each kernel was launched by one)."""
    paths = [TRACES / "tracelens" / vendor / BERT for vendor in ("h100", "mi300")]
    a, b = (load_table(path) for path in paths)
    operators = diff(a, b)
    assert operators["only"].null_count() == len(operators)
    assert diff(a, b, by="kernel")["only"].drop_nulls().len() == 18
    for side, one in (("a", a), ("b", b)):
        assert operators[f"device_ns_{side}"].sum() == int(one.duration[one.device_rows].sum())
    (device,) = configuration_diff(a, b, (describe(paths[0]), describe(paths[1]))).head(1).rows()
    assert device == ("device", "1 x NVIDIA H100 80GB HBM3", "1 x AMD Instinct MI300X VF")
