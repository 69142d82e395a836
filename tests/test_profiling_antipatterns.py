"""Every anti-pattern once where it is and once where it is not, in traces made by hand, and known facts of real ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.profiling.analyses.antipatterns import COLUMNS, PATTERNS, anti_patterns, why_empty
from ridgeline.profiling.load import load_table, parse_table
from test_profiling_roofline import shaped
from test_profiling_synthetic import STREAM, event, kernel, launch, step, text

TRACES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")


def found(events: list[dict], stacks: bool = False) -> dict[str, dict]:
    """Findings by name; each has one place in these traces."""
    frame = anti_patterns(parse_table(text(events), "rank0.json", stacks))
    assert frame.columns == list(COLUMNS)
    rows = {row["finding"]: row for row in frame.to_dicts()}
    assert len(rows) == frame.height
    assert set(rows) <= {pattern.name for pattern in PATTERNS}
    return rows


def runtime(name: str, start: float, length: float, correlation: int = 0) -> dict:
    """A runtime call of the main thread."""
    return event(name, "cuda_runtime", start, length, correlation=correlation)


def copied(name: str, start: float, correlation: int) -> dict:
    """A copy on the device."""
    return event(name, "gpu_memcpy", start, 5, STREAM, correlation=correlation)


GPU = [step(0, 0, 10_000), event("aten::mm", "cpu_op", 10, 20), launch(12, 1), kernel("k", 50, 10, 1)]
ITEM = [
    event("aten::item", "cpu_op", 1_000, 500),
    event("aten::_local_scalar_dense", "cpu_op", 1_010, 480),
    runtime("cudaMemcpyAsync", 1_020, 10, 2),
    runtime("cudaStreamSynchronize", 1_040, 400, 3),
    copied("Memcpy DtoH (Device -> Pinned)", 1_300, 2),
]


def test_item_in_the_loop() -> None:
    """Its wait counts there and is neither a copy nor a synchronisation; on a host tensor it costs the device nothing."""
    rows = found([*GPU, *ITEM])
    assert set(rows) == {"item in the loop"}
    row = rows["item in the loop"]
    assert (row["count"], row["cost_ns"], row["start_ns"], row["end_ns"]) == (1, 500_000, 1_000_000, 1_500_000)
    assert row["where"] == "aten::item" and row["knob"]
    assert not found([*GPU, *ITEM[:2]])  # the tensor was on the host
    assert set(found([step(0, 0, 10_000), *ITEM[:2]])) == {"item in the loop"}  # a CPU trace
    in_optimizer = event("Optimizer.step#Adam.step", "user_annotation", 900, 700)
    assert not found([step(0, 0, 10_000), *ITEM[:2], in_optimizer])
    outside = [{**one, "ts": one["ts"] + 20_000} for one in ITEM]
    assert not found([*GPU, *outside])


def test_place_in_the_users_code() -> None:
    """With stacks loaded the line; without them (stacks=False) the operators around it."""
    frames = [
        event("train.py(33): log", "python_function", 950, 600),
        event("torch/_tensor.py(9): item", "python_function", 960, 580),
    ]
    assert found([*GPU, *ITEM, *frames], stacks=True)["item in the loop"]["where"] == "train.py(33): log"
    assert found([*GPU, *ITEM, *frames])["item in the loop"]["where"] == "aten::item"


COPY = [
    event("aten::to", "cpu_op", 2_000, 300),
    event("aten::copy_", "cpu_op", 2_010, 280),
    runtime("cudaMemcpyAsync", 2_020, 100, 4),
    runtime("cudaStreamSynchronize", 2_130, 150, 5),
    copied("Memcpy HtoD (Pageable -> Device)", 2_100, 4),
]


def test_host_device_copies() -> None:
    """The waiting copy costs its calls; between devices, or without a wait, it is none."""
    row = found([*GPU, *COPY])["host-device copy"]
    assert (row["count"], row["cost_ns"]) == (1, 250_000)
    assert row["where"] == "aten::to"
    on_device = [
        *COPY[:2],
        runtime("cudaMemcpyAsync", 2_020, 100, 4),
        copied("Memcpy DtoD (Device -> Device)", 2_100, 4),
    ]
    assert not found([*GPU, *on_device])
    quick = [*COPY[:2], runtime("cudaMemcpyAsync", 2_020, 0.5, 4), copied("Memcpy HtoD (Pinned -> Device)", 2_100, 4)]
    assert not found([*GPU, *quick])


def test_synchronisation() -> None:
    """In the step under an operator or range; the profiler's own at the end of the capture is none."""
    inside = [event("aten::nonzero", "cpu_op", 3_000, 300), runtime("cudaStreamSynchronize", 3_050, 200, 6)]
    row = found([*GPU, *inside])["synchronisation"]
    assert (row["count"], row["cost_ns"], row["where"]) == (1, 200_000, "aten::nonzero")
    assert not found([*GPU, runtime("cudaDeviceSynchronize", 10_500, 900, 7)])


def selecting(places: list[int], name: str = "aten::select") -> list[dict]:
    """Selects of one tensor at these places, 10 us each."""
    return [
        shaped(name, 4_000 + 20 * at, 10, [[64, 32], [], []], **{"Concrete Inputs": ["", "0", str(place)]})
        for at, place in enumerate(places)
    ]


def test_loop_indexing() -> None:
    """Eight successive places are a loop; seven, scattered places, and an operator's own selects are none."""
    row = found([step(0, 0, 10_000), *selecting(list(range(10)))])["for-loop indexing"]
    assert (row["count"], row["cost_ns"]) == (10, 100_000)
    assert "for-loop indexing" in found([step(0, 0, 10_000), *selecting(list(range(0, 64, 8)), "aten::slice")])
    for places in (list(range(7)), [0, 5, 1, 9, 2, 30, 4, 8, 11, 3], [0] * 20):
        assert not found([step(0, 0, 10_000), *selecting(places)])
    within = event("aten::unbind", "cpu_op", 3_990, 1_000)
    assert not found([step(0, 0, 10_000), within, *selecting(list(range(10)))])


def product(name: str, other: str = "ampere_bf16_s16816gemm") -> list[dict]:
    """A product by this kernel, and another kernel that shows what the GPU is."""
    return [
        *GPU,
        event("aten::mm", "cpu_op", 100, 20),
        launch(105, 8),
        kernel(name, 200, 70, 8),
        kernel(other, 300, 1, 1),
    ]


def test_fp32_without_tf32() -> None:
    """Plain single-precision kernels on a GPU with TF32; not with TF32, and not where the GPU has none."""
    row = found(product("ampere_sgemm_128x64_tn"))["fp32 matmul without TF32"]
    assert (row["count"], row["cost_ns"], row["where"]) == (1, 70_000, "aten::mm")
    assert not found(product("cutlass_80_tensorop_s1688gemm_128x128"))
    assert not found(product("volta_sgemm_128x64_tn", "volta_fp16_s884gemm"))
    assert found(product("volta_sgemm_128x64_tn"))  # an Ampere GPU that runs an older kernel


def stepping(names: list[str]) -> list[dict]:
    """An optimizer step of these operators."""
    ops = [event(name, "cpu_op", 5_010 + 10 * at, 8) for at, name in enumerate(names)]
    return [step(0, 0, 10_000), event("Optimizer.step#AdamW.step", "user_annotation", 5_000, 900), *ops]


def test_single_tensor_optimizer() -> None:
    """Many operators and no grouped one; few, foreach and fused steps are fine."""
    names = ["aten::mul_", "aten::add_", "aten::sqrt", "aten::addcdiv_"] * 5
    row = found(stepping(names))["single-tensor optimizer"]
    assert (row["count"], row["cost_ns"], row["where"]) == (1, 900_000, "Optimizer.step#AdamW.step")
    assert not found(stepping(names[:8]))
    assert not found(stepping([*names, "aten::_foreach_add_"]))
    assert not found(stepping([*names, "aten::_fused_adamw_"]))
    apex = [launch(5_850, 11), kernel("void multi_tensor_apply_kernel<AdamFunctor>", 6_000, 40, 11)]
    assert not found([*stepping(names), *apex])


def test_synchronous_loader() -> None:
    """A single-process loader on the driving thread; worker processes are fine."""
    name = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"
    row = found([step(0, 0, 10_000), event(name, "user_annotation", 100, 2_000)])["synchronous loader"]
    assert (row["count"], row["cost_ns"], row["where"]) == (1, 2_000_000, name)
    workers = "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__"
    assert not found([step(0, 0, 10_000), event(workers, "user_annotation", 100, 2_000)])


def zeroing(name: str = "aten::zero_") -> list[dict]:
    return [
        step(0, 0, 10_000),
        event("Optimizer.zero_grad#AdamW.zero_grad", "user_annotation", 6_000, 500),
        event(name, "cpu_op", 6_010, 100),
        event("aten::fill_", "cpu_op", 6_020, 60),
    ]


def test_gradients_not_set_to_none() -> None:
    """Zeroing operators on a CPU trace, their kernels on a device trace; a zero_grad that only drops is fine."""
    row = found(zeroing())["gradients not set to None"]
    assert (row["count"], row["cost_ns"]) == (1, 100_000)
    device = [*zeroing(), launch(6_030, 9), kernel("vectorized_elementwise_kernel<FillFunctor>", 7_000, 33, 9)]
    assert found(device)["gradients not set to None"]["cost_ns"] == 33_000
    assert not found(zeroing()[:2])
    assert not found([zeroing()[0], *zeroing()[2:]])


def normed(bias: list[int], between: list[dict] | None = None, channels: int = 8) -> list[dict]:
    """A convolution with its own addition of the bias, then a batch norm that counts its batches."""
    return [
        step(0, 0, 10_000),
        shaped("aten::conv2d", 7_000, 100, [[2, 4, 9, 9], [8, 4, 3, 3], bias]),
        shaped("aten::add_", 7_050, 30, [[2, 8, 7, 7], [1, 8, 1, 1]]),
        *(between or []),
        event("aten::add_", "cpu_op", 7_150, 10, **{"Input Dims": [[], []], "Input type": ["long int", "Scalar"]}),
        shaped("aten::batch_norm", 7_200, 90, [[2, channels, 7, 7], [channels], [channels], [channels], [channels]]),
    ]


def test_bias_before_batch_norm() -> None:
    """The lost bias costs its own addition; without a bias, or with something between the two, it is no finding."""
    row = found(normed([8]))["bias before batch norm"]
    assert (row["count"], row["cost_ns"], row["where"]) == (1, 30_000, "aten::conv2d")
    assert not found(normed([]))
    assert not found(normed([8], [shaped("aten::relu", 7_110, 20, [[2, 8, 7, 7]])]))
    assert not found(normed([8], channels=16))


def halves(dims: list[Any], kind: str = "c10::BFloat16", **more: Any) -> list[dict]:
    return [*GPU, shaped("aten::mm", 8_000, 50, dims, kind, **more), launch(8_010, 10), kernel("gemm", 8_100, 60, 10)]


def test_shapes_not_multiples_of_8() -> None:
    """Contiguous dims of 16-bit products; other types, aligned dims, rows and vectors are fine."""
    row = found(halves([[64, 33], [33, 128]]))["shapes not multiples of 8"]
    assert (row["count"], row["cost_ns"]) == (1, 60_000)
    assert "shapes not multiples of 8" in found(halves([[64, 32], [32, 50257]], "c10::Half"))
    for fine in ([[64, 32], [32, 128]], [[7, 32], [32, 128]], [[64, 32], [32, 1]]):
        assert not found(halves(fine))
    assert not found(halves([[64, 33], [33, 128]], "float"))
    # The inner dim of 33 lies across both operands: their contiguous dims are 64 and 128.
    assert not found(halves([[64, 33], [33, 128]], **{"Input Strides": [[1, 64], [128, 1]]}))


def test_what_a_trace_lacks_is_said() -> None:
    """No operators, no shapes, no device: a sentence each, and an empty frame with its columns."""
    empty = parse_table(text([]), "r0.json")
    assert anti_patterns(empty).is_empty() and anti_patterns(empty).columns == list(COLUMNS)
    assert "no operators" in (why_empty(empty) or "")
    assert "record_shapes" in (why_empty(parse_table(text(GPU), "r0.json")) or "")
    assert "device timeline" in (why_empty(parse_table(text(normed([8])), "r0.json")) or "")
    assert why_empty(parse_table(text(halves([[8, 8], [8, 8]])), "r0.json")) is None


@settings(max_examples=25, deadline=None)
@given(
    parts=st.lists(st.sampled_from(range(5)), unique=True),
    shift=st.integers(0, 10**6),
    seed=st.randoms(use_true_random=False),
    cut=st.integers(0, 10_000),
)
def test_findings_do_not_depend_on_order_time_or_each_other(
    parts: list, shift: int, seed: random.Random, cut: int
) -> None:
    """Any mix of habits gives each its own finding, whatever the order in the file; two windows add up."""
    kinds = [ITEM, COPY, selecting(list(range(9))), stepping(["aten::mul_"] * 20)[1:], zeroing()[1:]]
    names = [
        "item in the loop",
        "host-device copy",
        "for-loop indexing",
        "single-tensor optimizer",
        "gradients not set to None",
    ]
    events = [*GPU, *(one for part in parts for one in kinds[part])]
    rows = found(events)
    assert set(rows) == {names[part] for part in parts}
    moved = [{**one, "ts": one["ts"] + shift} for one in seed.sample(events, len(events))]
    frame = anti_patterns(parse_table(text(moved), "r0.json"))
    times = ["start_ns", "end_ns"]
    whole = anti_patterns(parse_table(text(events), "r0.json"))
    assert frame.drop(times).equals(whole.drop(times))
    assert (frame["start_ns"] - whole["start_ns"]).to_list() == [shift * 1000] * frame.height
    if 2 not in parts:  # a loop that is cut in two is two shorter ones
        table = parse_table(text(events), "r0.json")
        halves_of = [anti_patterns(table, window) for window in ((0, cut * 1000), (cut * 1000, 10**10))]
        assert sum(half["count"].sum() for half in halves_of) == whole["count"].sum()


@needs_traces
@pytest.mark.parametrize(
    ("name", "present", "absent"),
    [
        (
            "hta/df_index_resolver/df_index_resolver",
            {"single-tensor optimizer": 5, "gradients not set to None": 5},
            {"synchronous loader", "item in the loop"},
        ),
        # Apex's FusedAdam counts its steps in 257 small additions a step; its work is in multi_tensor_apply.
        ("hta/trace_diff/control/control", {"item in the loop": 24}, {"single-tensor optimizer", "synchronous loader"}),
        ("hta/ns_resolution_trace/rank-0.Apr_03_18_51_38.1102.pt.trace", {}, {"fp32 matmul without TF32"}),  # a V100
        ("param/resnet_kineto", {}, {"synchronous loader"}),  # loads in worker processes
        (
            "tracelens/mi300/google_owlv2-large-patch14-ensemble__1016001",
            {"synchronous loader": 6},
            {"item in the loop"},
        ),
        ("tracelens/h100/gaunernst_bert-small-uncased__1016001", {}, {"single-tensor optimizer", "for-loop indexing"}),
    ],
)
def test_known_facts_of_real_traces(name: str, present: dict[str, int], absent: set[str]) -> None:
    """What is known of these programs; and costs are never negative."""
    frame = anti_patterns(load_table(TRACES / f"{name}.json.gz"))
    counts = dict(frame.group_by("finding").agg(pl.col("count").sum()).iter_rows())
    assert {finding: counts.get(finding) for finding in present} == present
    assert not absent & set(counts)
    assert frame["cost_ns"].min() is None or frame["cost_ns"].min() >= 0
