"""Classification by evidence, and each collective's operation, size, exposure and bandwidth, derived by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.bandwidth import bus_factor, collective_bandwidth
from ridgeline.profiling.analyses.collectives import COLUMNS, collectives, communication_overlap, why_no_collectives
from ridgeline.profiling.analyses.roles import classify_kernels, read_user_table
from ridgeline.profiling.communication import operation
from ridgeline.profiling.load import load_table, parse_table
from ridgeline.profiling.table import TraceTable
from test_profiling_synthetic import COMM_STREAM, MAIN, STREAM, WORKER, event, kernel, launch, step, text

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
with_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def table(events: list[dict], world: int = 2, **top: Any) -> TraceTable:
    """The table of these events."""
    return parse_table(text(events, 0, world, **top), "rank0.json")


def roles(events: list[dict], user: Any = None) -> dict[str, tuple[str, str, str]]:
    """name -> (role, evidence, confidence)."""
    return {name: (role, how, sure) for name, role, how, sure, *_ in classify_kernels(table(events), user).rows()}


def launched(name: str, inside: str, at: int, category: str = "cpu_op", stream: tuple[int, int] = STREAM) -> list[dict]:
    """A kernel, its launch, and the operator around the launch."""
    return [event(inside, category, at, 8), launch(at + 2, at), kernel(name, at + 10, 5, at, stream)]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([kernel("mystery", 0, 5, 1, **{"Collective name": "allreduce"})], ("communication", "arguments", "certain")),
        (launched("mystery", "nccl:all_reduce", 10, "user_annotation"), ("communication", "launch", "strong")),
        (launched("mystery", "record_param_comms", 10), ("communication", "launch", "strong")),
        (launched("mystery", "vllm::all_reduce", 10), ("communication", "launch", "strong")),
        (launched("mystery", "_C_custom_ar::all_reduce", 10), ("communication", "launch", "strong")),
        (launched("mystery", "mine::op", 10), ("compute", "launch", "strong")),
        ([kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 0, 5, 1)], ("communication", "name", "weak")),
        ([kernel("ncclKernel_AllReduce_RING_LL_Sum_float(y)", 0, 5, 1)], ("communication", "name", "weak")),
        (
            [kernel("void vllm::cross_device_reduce_1stage<c10::Half, 2>(z)", 0, 5, 1)],
            ("communication", "name", "weak"),
        ),
        ([kernel("allreduce_fusion_kernel_oneshot_lamport<8>", 0, 5, 1)], ("communication", "name", "weak")),
        ([kernel("quickreduce::allreduce_prototype_twoshot", 0, 5, 1)], ("communication", "name", "weak")),
        ([kernel("hipMemsetKernel", 0, 5, 1)], ("compute", "none", "none")),
        ([kernel("hip_fill_buffer", 0, 5, 1)], ("compute", "none", "none")),
        ([kernel("triton_poi_fused_all_gather_kernel_add_0", 0, 5, 1)], ("compute", "name", "weak")),
        ([event("Memcpy DtoD", "gpu_memcpy", 0, 5, STREAM)], ("memory", "category", "certain")),
        ([event("odd", "gpu_mystery", 0, 5, STREAM)], ("unknown", "none", "none")),
    ],
)
def test_each_evidence_in_its_order(events: list[dict], expected: tuple[str, str, str]) -> None:
    """Arguments before the launch before the name; ``hip`` says nothing (a rival takes it for communication), modern
    and custom all-reduces are known, and inductor's kernels carry names of what they fuse."""
    assert list(roles(events).values()) == [expected]


def test_a_copy_that_a_collective_makes_is_no_collective() -> None:
    """c10d flattens with ``aten::copy_`` inside the collective's range: the innermost operator decides."""
    events = [
        event("record_param_comms", "cpu_op", 0, 50),
        event("nccl:all_gather", "user_annotation", 5, 40),
        event("aten::copy_", "cpu_op", 10, 8),
        launch(12, 1),
        kernel("flatten", 30, 5, 1),
        launch(25, 2),
        kernel("moves", 40, 5, 2),
    ]
    assert roles(events) == {"flatten": ("compute", "launch", "strong"), "moves": ("communication", "launch", "strong")}


def test_unknown_is_a_kernel_without_evidence_on_a_communication_stream() -> None:
    """It counts as compute only where the stream gives no reason for doubt."""
    nccl = kernel("ncclDevKernel_Generic(x)", 0, 5, 1, COMM_STREAM)
    odd, known = kernel("odd", 10, 5, 2, COMM_STREAM), kernel("elementwise", 0, 50, 3)
    assert roles([nccl, odd, known])["odd"] == ("unknown", "stream", "none")
    assert roles([nccl, odd])["odd"] == ("compute", "none", "none")  # one stream for all is no communication stream
    gemm = kernel("cutlass_gemm", 20, 5, 4, COMM_STREAM)
    assert roles([nccl, odd, known, gemm])["odd"] == ("compute", "none", "none")


def test_carried_over_kernels_do_not_hide_the_arguments_of_the_rest() -> None:
    """The first ones of a capture lost their arguments; a look at the first alone would miss the name."""
    events = [
        kernel("opaque", at * 10, 5, at, **({"Collective name": "allreduce"} if at > 2 else {})) for at in range(9)
    ]
    assert roles(events) == {"opaque": ("communication", "arguments", "certain")}
    once = [kernel("shared", at * 10, 5, at, **({"Collective name": "x"} if at == 4 else {})) for at in range(9)]
    assert roles(once) == {"shared": ("compute", "none", "none")}  # one in nine does not speak for the others


def test_work_from_before_the_capture_comes_first_in_its_group() -> None:
    """It was called before all that was called in the capture, though its kernel runs after the first call."""
    carried = kernel("ncclKernel_AllReduce_a", 50, 10, 77)
    events = [
        event("nccl:all_reduce", "user_annotation", 0, 20),
        launch(5, 1),
        kernel("ncclKernel_b", 100, 9, 1),
        carried,
    ]
    frame = collectives(table([*events, step(4, -10, 500)]))
    assert frame.select("transfer", "sequence", "step").rows() == [
        ("ncclKernel_AllReduce_a", 0, None),
        ("ncclKernel_b", 1, 4),
    ]


def test_the_readers_table_wins(tmp_path: Path) -> None:
    """From a mapping, TOML or JSON; before every other evidence."""
    events = [kernel("ncclDevKernel_AllReduce(x)", 0, 5, 1), kernel("my_exchange_7", 10, 5, 2)]
    wanted = {"^my_exchange": "communication", "nccl": "compute"}
    (tmp_path / "roles.toml").write_text('[roles]\n"^my_exchange" = "communication"\n"nccl" = "compute"\n')
    (tmp_path / "roles.json").write_text(json.dumps(wanted))
    for user in (wanted, tmp_path / "roles.toml", str(tmp_path / "roles.json")):
        found = roles(events, user)
        assert found["my_exchange_7"] == ("communication", "user table", "certain")
        assert found["ncclDevKernel_AllReduce(x)"] == ("compute", "user table", "certain")
    events.append(kernel("gemm", 12, 2, 3, COMM_STREAM))
    (row,) = collectives(table(events), user_table=wanted).rows(named=True)
    assert (row["transfer"], row["hidden_ns"], row["exposed_ns"]) == ("my_exchange_7", 2_000, 3_000)
    assert communication_overlap(table(events), user_table=wanted)["overlap_fraction"].to_list() == [0.4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"x" = "comunication"', r"no role 'comunication' \(did you mean 'communication'\?\)"),
        ('"(" = "compute"', "not a regular expression"),
        ("x = ", "not TOML or JSON"),
        ('"x" = 3', "both text"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    """What, where, and the nearest valid value."""
    path = tmp_path / "roles.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_user_table(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("c10d::_reduce_scatter_base_", "reduce_scatter"),
        ("c10d::allgather_into_tensor_coalesced_", "all_gather"),
        ("c10d::alltoall_base_", "all_to_all"),
        ("gloo:all_reduce", "all_reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce_scatter"),
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclWorkElem)", "send_recv"),
        ("ncclDevKernel_Generic(ncclDevKernelArgsStorage<4096ul>)", None),
        ("_c10d_functional::wait_tensor", None),
        ("void vllm::cross_device_reduce_2stage<c10::BFloat16, 8>(RankData*)", "all_reduce"),
    ],
)
def test_operations_by_name(name: str, op: str | None) -> None:
    """All the ways writers spell them."""
    assert operation(name) == op


def test_bus_factors_are_those_of_nccl_tests() -> None:
    """doc/PERFORMANCE.md of nccl-tests, for 8 ranks: 2*7/8 and 7/8."""
    assert bus_factor("all_reduce", 8) == 1.75
    for op in ("all_gather", "reduce_scatter", "all_to_all"):
        assert bus_factor(op, 8) == 0.875
    assert bus_factor("broadcast", 8) == bus_factor("reduce", 8) == bus_factor("send_recv", 8) == 1
    assert bus_factor("all_reduce", 1) is None
    assert bus_factor("barrier", 8) is None
    assert bus_factor(None, 8) is None


def test_a_device_collective_with_nccls_arguments() -> None:
    """1,000 float32 in 100 us over 4 ranks: 40 MB/s, times 2*3/4 on the bus; 60 of its 100 us are under compute."""
    arguments = {"Collective name": "allreduce", "In msg nelems": 1000, "Out msg nelems": 1000, "dtype": "Float"}
    arguments |= {"Group size": 4, "Process Group Name": "7", "Process Group Ranks": "[0, 1, 2, 3]", "Seq": 12}
    events = [
        step(3, 0, 500),
        event("DistributedDataParallel.forward", "cpu_op", 5, 100),
        event("c10d::allreduce_", "cpu_op", 10, 50),
        event("record_param_comms", "cpu_op", 12, 40),
        event("nccl:all_reduce", "user_annotation", 14, 30),
        launch(20, 1),
        kernel("ncclDevKernel_Generic(x)", 200, 100, 1, COMM_STREAM, **arguments),
        kernel("gemm", 150, 110, 2),
    ]
    (row,) = collectives(table(events, 8), ceiling={"all_reduce": 120e6}).rows(named=True)
    assert (row["op"], row["name"], row["transfer"]) == ("all_reduce", "c10d::allreduce_", "ncclDevKernel_Generic(x)")
    assert (row["group"], row["group_size"], row["group_evidence"]) == ("7", 4, "arguments")
    assert (row["bytes"], row["dtype"], row["writer_sequence"], row["step"]) == (4000, "float32", 12, 3)
    assert (row["call_ns"], row["arrival_ns"], row["end_ns"]) == (10_000, 200_000, 300_000)
    assert (row["exposed_ns"], row["hidden_ns"]) == (40_000, 60_000)
    assert row["operator"] == "DistributedDataParallel.forward"
    assert row["evidence"] == "arguments"
    assert row["algorithm_bytes_per_second"] == pytest.approx(40e6)
    assert row["bus_bytes_per_second"] == pytest.approx(60e6)
    assert row["ceiling_share"] == pytest.approx(0.5)


def test_sizes_from_shapes_when_there_are_no_arguments() -> None:
    """An all-gather's size is all that is gathered: from both shapes of the call, or the input times the ranks."""
    shapes = {"Input Dims": [[64, 4], [8, 4], []], "Input type": ["c10::BFloat16", "c10::BFloat16", ""]}
    range_shapes = {"Input Dims": [[8, 4]], "Input type": ["c10::BFloat16"]}
    outer = event("c10d::_allgather_base_", "cpu_op", 0, 50, **shapes)
    inner = event("nccl:_all_gather_base", "user_annotation", 5, 40, **range_shapes)
    tail = [launch(10, 1), kernel("ncclDevKernel_AllGather_RING_LL(x)", 60, 10, 1)]
    for events in ([outer, inner, *tail], [inner, *tail]):
        (row,) = collectives(table(events, 8)).rows(named=True)
        assert (row["op"], row["bytes"], row["group_evidence"]) == ("all_gather", 64 * 4 * 2, "assumed")


def test_gloo_collectives_are_named_by_their_call() -> None:
    """FSDP2's reduce-scatter is carried out as ``gloo:all_reduce``; an all-gather queued between does not confuse the
    pairing; a transfer without a call came before the capture, a call without a transfer has no time of its own."""
    events = [
        event("aten::mm", "cpu_op", 0, 900),
        event("gloo:all_reduce", "user_annotation", 50, 40, WORKER),
        event("c10d::_allgather_base_", "cpu_op", 100, 10),
        event("c10d::_reduce_scatter_base_", "cpu_op", 120, 10, **{"Input Dims": [[2], [4]], "Input type": ["float"]}),
        event("gloo:all_reduce", "user_annotation", 200, 100, WORKER),
        event("gloo:all_gather", "user_annotation", 310, 50, WORKER),
        event("c10d::broadcast_", "cpu_op", 400, 10),
    ]
    frame = collectives(table(events))
    assert frame.select("name", "transfer", "arrival_ns", "start_ns", "timed").rows() == [
        ("gloo:all_reduce", "gloo:all_reduce", 50_000, 50_000, True),
        ("c10d::_allgather_base_", "gloo:all_gather", 100_000, 310_000, True),
        ("c10d::_reduce_scatter_base_", "gloo:all_reduce", 120_000, 200_000, True),
        ("c10d::broadcast_", None, 400_000, 400_000, False),
    ]
    assert frame["bytes"].to_list() == [None, None, 16, None]
    assert frame["sequence"].to_list() == [0, 1, 2, 3]


def test_overlap_is_null_without_communication() -> None:
    """Never NaN; and the reason is a sentence."""
    alone = table([kernel("gemm", 0, 10, 1)])
    assert communication_overlap(alone).rows() == [(0, 0, 0, None)]
    assert collectives(alone).is_empty()
    assert list(collectives(alone).columns) == list(COLUMNS["collectives"])
    assert "no communication" in (why_no_collectives(alone) or "")
    both = table([kernel("gemm", 0, 10, 1), kernel("ncclKernel_x", 5, 20, 2, COMM_STREAM)])
    assert communication_overlap(both).rows() == [(20_000, 5_000, 15_000, 0.25)]
    odd = table([event("odd", "gpu_mystery", 0, 10, STREAM), kernel("ncclKernel_x", 5, 20, 2, COMM_STREAM)])
    assert communication_overlap(odd).rows() == [(20_000, 5_000, 15_000, 0.25)]  # unknown work counts as compute
    assert communication_overlap(both, window=(0, 15_000)).rows() == [(10_000, 5_000, 5_000, 0.5)]
    assert why_no_collectives(both) is None


spans = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 80), st.booleans()), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(spans, st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_exposure_against_brute_force(rows: list[tuple[int, int, bool]], shift: int, shuffle: random.Random) -> None:
    """Microsecond by microsecond; nothing depends on the clock's base or the order of the file."""
    events = [
        kernel("ncclKernel_AllReduce" if comm else "gemm", start, length, at, COMM_STREAM if comm else STREAM)
        for at, (start, length, comm) in enumerate(rows)
    ]
    frame = collectives(table(events))
    busy = {us for start, length, comm in rows if not comm for us in range(start, start + length)}
    for row in frame.rows(named=True):
        mine = range(row["start_ns"] // 1000, row["end_ns"] // 1000)
        assert row["hidden_ns"] == 1000 * sum(us in busy for us in mine)
        assert row["hidden_ns"] + row["exposed_ns"] == row["end_ns"] - row["arrival_ns"]
    talking = {us for start, length, comm in rows if comm for us in range(start, start + length)}
    spent, hidden, exposed, share = communication_overlap(table(events)).row(0)
    assert (spent, hidden, exposed) == (1000 * len(talking), 1000 * len(talking & busy), 1000 * len(talking - busy))
    assert share == (hidden / spent if spent else None)
    moved = [{**one, "ts": one["ts"] + shift} for one in events]
    shuffle.shuffle(moved)
    again = collectives(table(moved))
    assert again["exposed_ns"].to_list() == frame["exposed_ns"].to_list()
    assert (again["arrival_ns"] - 1000 * shift).to_list() == frame["arrival_ns"].to_list()


def test_bandwidth_by_size() -> None:
    """Two of 4,000 bytes in 100 and 300 us: 20 MB/s together, the best 40 MB/s; calls without a transfer do not count."""
    frame = pl.DataFrame(
        {"op": ["all_gather"] * 3, "group_size": [4] * 3, "bytes": [4000] * 3, "duration_ns": [100_000, 300_000, 1]}
    ).with_columns(timed=pl.Series([True, True, False]))
    (row,) = collective_bandwidth(frame, ceiling=60e6).rows(named=True)
    assert (row["count"], row["time_ns"], row["fastest_ns"]) == (2, 400_000, 100_000)
    assert row["algorithm_bytes_per_second"] == pytest.approx(20e6)
    assert row["bus_bytes_per_second"] == pytest.approx(15e6)
    assert row["best_bus_bytes_per_second"] == pytest.approx(30e6)
    assert row["ceiling_share"] == pytest.approx(0.5)


@with_traces
@pytest.mark.parametrize(
    ("name", "count", "percent"),
    [
        ("hta/trace_diff/control/control.json.gz", 60, 46.2),
        ("hta/df_index_resolver/df_index_resolver.json.gz", 2020, 0.0),
        ("hta/nccl_parser_config/nccl_data.json.gz", 21, 15.6),
        ("hta/trace_filter/sampled_rank-1.json.gz", None, 19.9),
        ("tracelens/mi300/resnet_act_checkpoint.json.gz", 17, 22.2),
    ],
)
def test_known_overlap_of_real_traces(name: str, count: int | None, percent: float) -> None:
    """Published answers; with the count of NCCL's kernels in the file."""
    real = load_table(TRACES / name)
    assert 100 * communication_overlap(real)["overlap_fraction"][0] == pytest.approx(percent, abs=0.06)
    frame = collectives(real)
    assert count is None or len(frame) == count
    assert (frame["hidden_ns"] + frame["exposed_ns"] == frame["end_ns"] - frame["arrival_ns"]).all()


@with_traces
def test_facts_of_real_collectives() -> None:
    """Sizes as the files state them; a single rank's job has calls and no kernel."""
    frame = collectives(load_table(TRACES / "hta/nccl_parser_config/nccl_data.json.gz"))
    assert frame.row(0, named=True)["bytes"] == 53120 * 4
    assert frame["name"].unique().sort().to_list() == ["c10d::allreduce_", "c10d::broadcast_"]
    assert frame["group_ranks"].unique().to_list() == ["[0, 1]"]
    gloo = collectives(load_table(TRACES / "gloo/gloo_straggler_rank0.json.gz"))
    assert gloo.select("name", "bytes", "group_size").unique().rows() == [("c10d::allreduce_", 263168 * 4, 2)]
    single = load_table(TRACES / "hta/ns_resolution_trace/rank-0.Apr_03_18_51_38.1102.pt.trace.json.gz")
    assert "single rank" in (why_no_collectives(single) or "")
    hostless = collectives(load_table(TRACES / "hta/rank_non_gpu/rank_non_gpu.json.gz"))
    assert hostless["timed"].to_list() == [False] * 6
    assert hostless["bus_bytes_per_second"].null_count() == 6


def test_modules_need_stacks() -> None:
    """The innermost module around the call, when the table kept Python frames."""
    events = [
        event("nn.Module: Model_0", "python_function", 0, 100),
        event("nn.Module: Linear_3", "python_function", 5, 50),
        event("c10d::allreduce_", "cpu_op", 10, 10),
        event("gloo:all_reduce", "user_annotation", 20, 10, WORKER),
    ]
    assert MAIN != WORKER
    with_stacks = parse_table(text(events), "rank0.json", stacks=True)
    assert collectives(with_stacks)["module"].to_list() == ["nn.Module: Linear_3"]
    assert collectives(table(events))["module"].to_list() == [None]


ODD = [None, -5, 2**70, "x", [], [[]], [[2**62, 8]], [["a"]], {"a": 1}, True, 3.5, "[0, 1]", "Float"]


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "Collective name",
                "In msg nelems",
                "Group size",
                "dtype",
                "Seq",
                "Input Dims",
                "Input type",
                "Process Group Name",
            ]
        ),
        st.sampled_from(ODD),
    ),
    st.integers(-50, 50),
)
def test_odd_arguments_are_no_facts_and_no_crash(arguments: dict[str, Any], length: int) -> None:
    """What a damaged file may hold: the row stays, with nulls; counts that no column holds are not stated."""
    events = [
        step(10**30, 0, 900),
        kernel("ncclKernel_AllReduce(x)", 100, length, 1, COMM_STREAM, **arguments),
        kernel("gemm", 90, 40, 2),
    ]
    (row,) = collectives(table(events)).rows(named=True)
    assert row["bytes"] is None or 0 <= row["bytes"] < 2**63
    assert row["hidden_ns"] >= 0 and row["exposed_ns"] >= 0
    assert row["hidden_ns"] + row["exposed_ns"] == max(0, 1000 * length)
