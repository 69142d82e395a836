"""FLOPs and bytes of operators, and what they say beside time and ceilings; by hand, by torch's counter, on real traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.profiling.analyses.opcosts import OpArguments, cost
from ridgeline.profiling.analyses.roofline import COLUMNS, NO_LAUNCH, NO_SHAPES, notes, roofline, why_empty
from ridgeline.profiling.load import load_table, parse_table
from ridgeline.profiling.table import TraceTable
from test_profiling_synthetic import event, kernel, launch, step, text

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def arguments(*dims: list[int], kind: str = "float", concrete: list[str] | None = None) -> OpArguments:
    """Tensors of these sizes and one type; concrete arguments follow in their places."""
    types = [kind] * len(dims)
    made = OpArguments(dims=list(dims), types=types, concrete=[""] * len(dims))
    for one in (concrete or [])[len(dims) :]:
        made.dims.append([])
        made.types.append("Scalar")
        made.concrete.append(one)
    return made


def shaped(name: str, start: float, length: float, dims: list[Any], kind: str = "float", **more: Any) -> dict:
    """An operator with recorded shapes, all of one type."""
    types = [kind if one else "Scalar" for one in dims]
    return event(name, "cpu_op", start, length, **{"Input Dims": dims, "Input type": types, **more})


def table(events: list[dict]) -> TraceTable:
    return parse_table(text(events), "rank0.json")


def test_flops_are_those_of_torchs_counter() -> None:
    """Every matrix formula against torch.utils.flop_counter on the same sizes."""
    torch = pytest.importorskip("torch")
    from torch.utils import flop_counter as counter

    def counted(make: Any) -> int:
        with counter.FlopCounterMode(display=False) as mode:
            make()
        return int(mode.get_total_flops())

    a, b, bias = torch.ones(5, 7), torch.ones(7, 3), torch.ones(3)
    assert cost("aten::mm", arguments([5, 7], [7, 3])).flops == counted(lambda: a @ b)
    assert cost("aten::addmm", arguments([3], [5, 7], [7, 3])).flops == counted(lambda: torch.addmm(bias, a, b))
    assert cost("aten::linear", arguments([5, 7], [3, 7], [3])).flops == counted(
        lambda: torch.nn.functional.linear(a, b.t(), bias)
    )
    c, d = torch.ones(2, 4, 6), torch.ones(2, 6, 3)
    assert cost("aten::bmm", arguments([2, 4, 6], [2, 6, 3])).flops == counted(lambda: torch.bmm(c, d))
    assert cost("aten::baddbmm", arguments([2, 4, 3], [2, 4, 6], [2, 6, 3])).flops == counted(
        lambda: torch.baddbmm(torch.ones(2, 4, 3), c, d)
    )
    shapes = ([2, 3, 8, 4], [2, 3, 6, 4], [2, 3, 6, 4])
    sdpa = arguments(*shapes, concrete=["", "", "", "", "0.", "False"])
    assert cost("aten::scaled_dot_product_attention", sdpa).flops == counter.sdpa_flop_count(*shapes)
    back = arguments([2, 3, 8, 4], *shapes, [2, 3, 8, 4], [2, 3, 8], concrete=[""] * 6 + ["0.", "False"])
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    assert cost(name, back).flops == counter.sdpa_backward_flop_count([2, 3, 8, 4], *shapes)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "transposed", "groups"),
    [(1, 0, 1, False, 1), (2, 1, 1, False, 1), (1, 2, 2, False, 2), (2, 1, 1, True, 1)],
)
def test_convolution_flops_and_output(stride: int, padding: int, dilation: int, transposed: bool, groups: int) -> None:
    """FLOPs as torch counts them; bytes from the output that torch makes; backward for both gradients."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.ones(2, 4, 9, 8, requires_grad=True)
    weight = torch.ones((4, 6, 3, 3) if transposed else (6, 4 // groups, 3, 3), requires_grad=True)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups)
    with FlopCounterMode(display=False) as forward:
        out = torch.convolution(x, weight, None, *geometry)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    said = [str(one) for one in geometry]
    here = arguments(list(x.shape), list(weight.shape), concrete=["", "", *said])
    here.dims.insert(2, [])
    here.types.insert(2, "")
    here.concrete.insert(2, "")
    found = cost("aten::convolution", here)
    assert found.flops == forward.get_total_flops()
    assert found.bytes == 4 * (x.numel() + weight.numel() + out.numel())
    dims = [list(out.shape), list(x.shape), list(weight.shape), *[[]] * 8]
    grads = OpArguments(dims, ["float"] * 3 + [""] * 8, [], ["", "", "", "[0]", *said, "[True, True, False]"])
    both = cost("aten::convolution_backward", grads)
    # Torch 2.13 counts a grouped weight gradient without its groups; for it the identity is twice the forward pass.
    assert both.flops == 2 * found.flops
    if groups == 1:
        assert both.flops == backward.get_total_flops()


def test_bytes_by_hand() -> None:
    """Least traffic: inputs once, output once, in the type's size; a stride of 0 holds nothing new."""
    assert cost("aten::mm", arguments([4, 8], [8, 2], kind="c10::BFloat16")).bytes == 2 * (32 + 16 + 8)
    assert cost("aten::add", arguments([4, 8], [8])).bytes == 4 * (32 + 8 + 32)
    assert cost("aten::add_", arguments([4, 8], [4, 8])).flops == 32
    wide = OpArguments([[4, 8], [4, 8]], ["float", "float"], [[8, 1], [0, 0]], ["", ""])
    assert cost("aten::mul", wide).bytes == 4 * (32 + 1 + 32)
    assert cost("aten::copy_", OpArguments([[6], [6]], ["c10::Half", "float"], [], [])).bytes == 6 * (2 + 4)
    assert cost("aten::eq", arguments([10], [10])).bytes == 10 * (4 + 4 + 1)
    assert cost("aten::sum", arguments([4, 8], concrete=["", "[1]", "False"])).bytes == 4 * (32 + 4)
    assert cost("aten::sum", arguments([4, 8])).bytes == 4 * (32 + 1)
    indices = OpArguments([[100, 16], [3, 5]], ["c10::BFloat16", "long"], [], [])
    assert cost("aten::embedding", indices).bytes == 15 * (2 * 16 * 2 + 8)
    rows = OpArguments([[7, 16], [], [3]], ["float", "Scalar", "long"], [], ["", "0", ""])
    assert cost("aten::index_select", rows).bytes == 2 * 3 * 16 * 4 + 3 * 8
    condition = OpArguments([[4, 1], [4, 8], []], ["bool", "float", "float"], [], [])
    found = cost("aten::where", condition)
    assert (found.dtype, found.bytes) == ("float32", 4 + 4 * (32 + 1 + 32))


def test_causal_attention_counts_the_pairs_it_computes() -> None:
    """4 queries on 4 keys see 10 pairs; brute force for other lengths."""
    for queries, keys in ((4, 4), (3, 7), (7, 3)):
        shapes = ([1, 1, queries, 2], [1, 1, keys, 2], [1, 1, keys, 2])
        pairs = sum(key <= query for query in range(queries) for key in range(keys))
        causal = arguments(*shapes, concrete=["", "", "", "0.", "True"])
        assert cost("aten::_scaled_dot_product_flash_attention", causal).flops == 2 * pairs * 4


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("aten::mm", None),
        ("aten::mm", arguments([4, 8], [7, 2])),
        ("aten::mm", arguments([4, 8])),
        ("aten::mm", arguments([4, 8], [8, 2], kind="QInt8")),
        ("aten::mm", OpArguments([[-1, 8], [8, 2]], ["float"] * 2)),
        ("aten::mm", OpArguments(["x", None], ["float"] * 2)),
        ("aten::add", OpArguments([[[3]]], ["TensorList"])),
        ("aten::convolution", arguments([1, 2, 3, 3], [2, 2, 1, 1])),
        ("aten::nonzero", arguments([4])),
        ("mine::mm", arguments([4, 8], [8, 2])),
    ],
)
def test_what_cannot_be_counted_is_not(name: str, given: OpArguments | None) -> None:
    """No guess without shapes, types, concrete arguments or a formula, and no exception on nonsense."""
    assert cost(name, given) is None


GPU = [
    step(0, 0, 1000),
    shaped("aten::linear", 0, 100, [[64, 32], [16, 32], [16]]),
    shaped("aten::addmm", 10, 80, [[16], [64, 32], [32, 16]]),
    launch(20, 1),
    launch(30, 2),
    kernel("ampere_sgemm_tn", 100, 10, 1),
    kernel("splitKreduce", 110, 5, 2),
    shaped("aten::relu", 200, 20, [[64, 16]]),
    launch(205, 3),
    kernel("relu_kernel", 300, 4, 3),
    event("aten::nonzero", "cpu_op", 400, 20),
    launch(405, 4),
    kernel("nonzero_kernel", 500, 7, 4),
    kernel("carried_over", 1, 3, 99),
]
CEILINGS = {"gemm_flops_per_second": {"fp32": 1e10, "bf16": 4e10}, "read_bytes_per_second": 1e9}


def test_gpu_roofline_by_hand() -> None:
    """The linear owns its addmm's two kernels; 2*64*32*16 FLOPs in 15 us; the rest is listed with its time."""
    rows = {row["operator"]: row for row in roofline(table(GPU), CEILINGS).to_dicts()}
    linear = rows["aten::linear"]
    moved = 4 * (64 * 32 + 16 * 32 + 16 + 64 * 16)
    assert (linear["count"], linear["flops"], linear["bytes"]) == (1, 65_536, moved)
    assert linear["device_time_ns"] == 15_000
    assert linear["flops_per_second"] == pytest.approx(65_536 / 15e-6)
    assert linear["intensity_flops_per_byte"] == pytest.approx(65_536 / moved)
    # 6.55 us of multiplication against 14.4 us of reading
    assert (linear["bound"], linear["ideal_ns"]) == ("memory", moved)
    assert linear["share_of_ceiling"] == pytest.approx(moved / 15_000)
    assert linear["lost_ns"] == 15_000 - moved and linear["lost_share"] == pytest.approx((15_000 - moved) / 1e6)
    assert linear["mfu"] == pytest.approx(65_536 / (1e10 * 1e-3))
    assert rows["aten::relu"]["bytes"] == 2 * 4 * 1024 and rows["aten::relu"]["mfu"] is None
    assert rows["aten::nonzero"]["flops"] is None and rows["aten::nonzero"]["not_counted"]
    assert (rows[None]["not_counted"], rows[None]["device_time_ns"]) == (NO_LAUNCH, 3_000)
    assert sum(row["device_time_ns"] for row in rows.values()) == 29_000


def test_more_than_the_ceiling_carries_a_note() -> None:
    """The linear takes 15 us: its 14.4 kB at 0.5 GB/s would take longer, and so would its 65,536 FLOPs at 4 GFLOP/s."""
    quick = CEILINGS | {"read_bytes_per_second": 4e9}
    assert notes(roofline(table(GPU), quick), False) == []
    (cached,) = notes(roofline(table(GPU), CEILINGS | {"read_bytes_per_second": 5e8}), False)
    assert "2 rows are faster than memory" in cached and "cache" in cached
    slow = {"gemm_flops_per_second": {"fp32": 4e9}, "read_bytes_per_second": 4e9}
    (fast,) = notes(roofline(table(GPU), slow), False)
    assert "faster than the matmul ceiling" in fast
    assert notes(roofline(table(GPU), None), False) == []


def test_without_ceilings_nothing_is_guessed() -> None:
    """Columns that need a ceiling are null; so are those of a dtype whose ceiling is not known."""
    needing = ["bound", "ideal_ns", "share_of_ceiling", "lost_ns", "lost_share", "mfu"]
    for ceilings in (None, {}, {"gemm_flops_per_second": {"bf16": 1e12}, "read_bytes_per_second": 1e9}):
        frame = roofline(table(GPU), ceilings)
        assert frame.columns == list(COLUMNS)
        assert frame.filter(pl.col("operator") == "aten::linear").select(needing).row(0) == (None,) * 6
    assert roofline(table(GPU)).select(pl.col(needing).is_null().all()).row(0) == (True,) * 6


def test_compute_bound_and_tf32() -> None:
    """A square product is bound by the ceiling of the type its kernels really used."""
    events = [
        shaped("aten::mm", 0, 10, [[512, 512], [512, 512]]),
        launch(1, 1),
        kernel("cutlass_80_tensorop_s1688gemm_128x128", 20, 100, 1),
    ]
    rates = {"gemm_flops_per_second": {"fp32": 1e13, "tf32": 5e13}, "read_bytes_per_second": 1e12}
    (row,) = roofline(table(events), rates).to_dicts()
    assert (row["dtype"], row["bound"], row["ideal_ns"]) == ("tf32", "compute", round(2 * 512**3 / 5e13 * 1e9))


def test_cpu_trace_uses_own_time() -> None:
    """The matrix op owns what it calls; a shell keeps only its own; the times sum to the union of the thread."""
    events = [
        shaped("aten::matmul", 0, 100, [[8, 4], [4, 2]]),
        shaped("aten::mm", 10, 80, [[8, 4], [4, 2]]),
        shaped("aten::resize_", 20, 5, [[8, 2]]),
        shaped("aten::relu", 200, 20, [[8, 2]]),
    ]
    rows = {row["operator"]: row for row in roofline(table(events)).to_dicts()}
    assert rows["aten::mm"]["device_time_ns"] == 80_000 and rows["aten::mm"]["flops"] == 2 * 8 * 4 * 2
    assert rows["aten::matmul"]["device_time_ns"] == 20_000
    assert sum(row["device_time_ns"] for row in rows.values()) == 120_000


def test_no_shapes_says_so() -> None:
    """An operator with a formula but no shapes is listed with the reason, and so is the whole trace."""
    bare = table([event("aten::mm", "cpu_op", 0, 10)])
    assert roofline(bare)["not_counted"].to_list() == [NO_SHAPES]
    assert "record_shapes" in (why_empty(bare) or "")
    assert why_empty(table(GPU)) is None
    assert roofline(table([])).is_empty() and why_empty(table([]))


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 30)), max_size=12),
    shift=st.integers(0, 10**6),
    cut=st.integers(0, 12),
    seed=st.randoms(use_true_random=False),
)
def test_times_sum_and_nothing_depends_on_order(calls: list, shift: int, cut: int, seed: Any) -> None:
    """Sum of times = device time; two windows add up; shuffling and shifting change nothing."""
    names = ("aten::mm", "aten::relu", "aten::nonzero")
    events: list[dict] = []
    for at, (which, size, took) in enumerate(calls):
        events.append(shaped(names[which], at * 100, 50, [[size, 4], [4, size]][: 2 if which == 0 else 1]))
        events += [launch(at * 100 + 10, at + 1), kernel(f"k{which}", at * 100 + 20, took, at + 1)]
    whole = roofline(table(events), CEILINGS)
    assert whole["device_time_ns"].sum() == 1000 * sum(took for *_, took in calls)
    moved = [{**one, "ts": one["ts"] + shift} for one in seed.sample(events, len(events))]
    assert roofline(table(moved), CEILINGS).drop("mfu", "lost_share").equals(whole.drop("mfu", "lost_share"))
    edges = (0, cut * 100_000, 10**10)
    parts = [roofline(table(events), None, (edges[at], edges[at + 1])) for at in (0, 1)]
    for column in ("count", "flops", "bytes", "device_time_ns"):
        assert sum(part[column].sum() for part in parts) == whole[column].sum()


@needs_traces
@pytest.mark.parametrize("name", ["h100/gaunernst_bert-small-uncased__1016001", "mi300/resnet_act_checkpoint"])
def test_real_traces_account_for_all_device_time(name: str) -> None:
    """Known answers: every device nanosecond is in one row; conv and matmul FLOPs by hand."""
    real = load_table(TRACES / "tracelens" / f"{name}.json.gz")
    frame = roofline(real)
    assert frame["device_time_ns"].sum() == int(np.maximum(real.duration[real.device_rows], 0).sum())
    if "resnet" in name:
        # The stem: 10 x 3 x 224 x 224 with 64 filters of 3 x 7 x 7, stride 2, padding 3: output 112 x 112.
        stem = frame.filter(
            pl.col("input_dims").str.starts_with("[[10,3,224,224],[64,3,7,7]")
            & (pl.col("operator") == "aten::convolution")
        )
        assert stem["flops"][0] == stem["count"][0] * 2 * 10 * 64 * 112 * 112 * 3 * 49
        lost = frame.filter(pl.col("not_counted") == NO_LAUNCH)
        assert lost["count"].sum() == 968  # kernels carried over from before the capture
