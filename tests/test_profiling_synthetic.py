"""Synthetic traces whose answer is known by construction, and properties that hold for any trace."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.errors import UserError
from ridgeline.profiling.breakdown import break_down, combine
from ridgeline.profiling.load import parse_table
from ridgeline.profiling.results import PARTS, RankBreakdown

MAIN, WORKER, STREAM, COMM_STREAM = (1, 1), (1, 9), (0, 7), (0, 20)


def event(
    name: str, category: str, start_us: float, length_us: float, where: tuple[int, int] = MAIN, **args: Any
) -> dict:
    """One complete event; times in us."""
    pid, tid = where
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": pid,
        "tid": tid,
        "ts": start_us,
        "dur": length_us,
        "args": args,
    }


def step(number: int, start_us: float, length_us: float) -> dict:
    """A profiler step on the main thread."""
    return event(f"ProfilerStep#{number}", "user_annotation", start_us, length_us)


def phase(name: str, start_us: float, length_us: float) -> dict:
    """One of our loop's ranges."""
    return event(f"ridgeline.{name}", "user_annotation", start_us, length_us)


def kernel(
    name: str, start_us: float, length_us: float, correlation: int, stream: tuple[int, int] = STREAM, **args: Any
) -> dict:
    """A kernel on a stream."""
    return event(name, "kernel", start_us, length_us, stream, correlation=correlation, **args)


def launch(start_us: float, correlation: int, name: str = "cudaLaunchKernel") -> dict:
    """The runtime call that launches it, 2 us long."""
    return event(name, "cuda_runtime", start_us, 2, correlation=correlation)


def text(events: list[dict], rank: int = 0, world: int = 1, **top: Any) -> bytes:
    """The trace file's text."""
    info = {"backend": "gloo", "rank": rank, "world_size": world}
    return json.dumps({"distributedInfo": info, "host_name": "h", **top, "traceEvents": events}).encode()


def split(events: list[dict], rank: int = 0, world: int = 1, **top: Any) -> RankBreakdown:
    """The breakdown of these events."""
    return break_down(parse_table(text(events, rank, world, **top), f"rank{rank}.json"))


def micro(parts: dict[str, int]) -> dict[str, float]:
    """Parts in us, without the empty ones."""
    return {name: ns / 1000 for name, ns in parts.items() if ns}


CPU_STEP = [
    step(0, 0, 10_000),
    phase("data", 0, 1_000),
    phase("forward", 1_000, 3_000),
    event("aten::mm", "cpu_op", 1_100, 1_000),
    event("aten::gelu", "cpu_op", 2_200, 300),
    phase("backward", 4_000, 3_000),
    event("autograd::engine::evaluate_function: MmBackward0", "cpu_op", 4_000, 2_000),
    event("MmBackward0", "cpu_op", 4_100, 1_800),
    event("aten::mm", "cpu_op", 4_200, 1_600),
    event("c10d::allreduce_", "cpu_op", 6_000, 100),
    event("gloo:all_reduce", "user_annotation", 6_200, 700, WORKER),
    event("aten::copy_", "cpu_op", 6_800, 50, WORKER),
    phase("optimizer", 7_000, 1_000),
    event("aten::_fused_adamw_", "cpu_op", 7_100, 800),
]


def test_cpu_step_with_known_parts() -> None:
    """Every instant of a hand-made step is where its construction says."""
    (one,) = split(CPU_STEP).steps
    assert micro(one.parts) == {
        "data": 1_000,
        "compute": 1_000 + 300 + 1_600,
        "communication": 900,  # from the call's start to the end of the transfer
        "optimizer": 800,
        "host": 3_000 - 1_300 + 3_000 - 1_600 - 900 + 200,
        "idle": 2_000,  # nothing at all from 8 to 10 ms
    }
    assert one.hidden_communication_ns == 0
    assert one.exposed_by_collective == {"gloo:all_reduce@backward": 900_000}
    assert one.by_phase["host"] == {
        "data": 0,
        "forward": 1_700_000,
        "backward": 500_000,
        "optimizer": 200_000,
        "other": 0,
    }


def test_cpu_communication_under_compute_is_hidden() -> None:
    """A transfer that runs while the main thread computes costs nothing."""
    events = [
        step(3, 0, 5_000),
        event("c10d::allreduce_", "cpu_op", 100, 100),
        event("gloo:all_reduce", "user_annotation", 300, 3_000, WORKER),
        event("aten::mm", "cpu_op", 200, 2_800),
    ]
    (one,) = split(events).steps
    assert micro(one.parts)["communication"] == 100 + 300
    assert one.hidden_communication_ns == 2_800_000
    assert one.step == 3


def test_compiled_call_counts_and_its_wrapper_is_overhead() -> None:
    """Inductor's C++ loops leave no op: the graph call is the computation, the guards around it are the host's."""
    events = [
        step(0, 0, 1_000),
        event("Torch-Compiled Region: 0/0", "cpu_op", 100, 500),
        event("CompiledFunction", "cpu_op", 200, 350),
        event("## Call CompiledFxGraph abc ##", "user_annotation", 250, 200),
        event("aten::addmm", "cpu_op", 300, 50),
    ]
    result = split(events)
    assert micro(result.steps[0].parts) == {"compute": 200, "host": 300, "idle": 500}
    assert result.evidence["compiled"]
    own = {row.name.split(" ")[0]: row.self_ns for row in result.top_ops}
    assert own["aten::addmm"] == 50_000 and own["##"] == 150_000


GPU_STEP = [
    step(7, 0, 1_000),
    phase("data", 0, 100),
    phase("forward", 100, 300),
    event("aten::mm", "cpu_op", 100, 50),
    launch(110, 1),
    kernel("gemm", 150, 200, 1),
    launch(160, 2),
    kernel("ncclDevKernel_AllReduce", 300, 150, 2, COMM_STREAM, **{"Collective name": "allreduce"}),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 440, 60, STREAM, correlation=3),
    launch(170, 3, "cudaMemcpyAsync"),
    phase("optimizer", 400, 100),
    launch(410, 4),
    kernel("multi_tensor_apply", 520, 80, 4),
    event("cudaDeviceSynchronize", "cuda_runtime", 600, 400, correlation=9),
]


def test_gpu_step_with_known_parts() -> None:
    """Kernels by role and launch phase, collectives exposed and hidden, and what the host did while the device idled."""
    result = split(GPU_STEP)
    (one,) = result.steps
    assert micro(one.parts) == {
        "compute": 200,
        "communication": 100,
        "memory_copies": 50,
        "optimizer": 80,
        "data": 100,
        "host": 50 + 20,  # 100..150 and 500..520: the host launches, the device waits
        "idle": 400,  # blocked in a synchronisation
    }
    assert one.hidden_communication_ns == 50_000
    assert result.device == "gpu"
    assert result.evidence["communication"] == {"arguments": 1}
    assert result.device_span is not None
    assert (result.device_span.span_ns, result.device_span.busy_ns) == (450_000, 430_000)
    assert result.device_span.overlap_share == pytest.approx(1 / 3)


def test_a_collective_is_recognised_without_its_name() -> None:
    """Evidence before names: a kernel called anything is a collective when NCCL's range launched it."""
    events = [
        step(0, 0, 100),
        event("nccl:all_gather", "user_annotation", 10, 10),
        launch(12, 5),
        kernel("mystery_kernel", 30, 20, 5),
        launch(25, 6),
        kernel("hipLaunchUtility", 60, 10, 6),
    ]
    result = split(events)
    assert micro(result.steps[0].parts)["communication"] == 20
    assert micro(result.steps[0].parts)["compute"] == 10  # a name that begins with hip is no evidence
    assert result.evidence["communication"] == {"launch": 1}


def test_device_work_of_an_unknown_category_stays_unknown() -> None:
    """It is not called compute without notice."""
    events = [step(0, 0, 100), event("who knows", "gpu_new_engine", 10, 30, STREAM), kernel("k", 50, 10, 1)]
    assert micro(split(events).steps[0].parts)["unknown"] == 30


def test_no_communication_is_none_and_not_nan() -> None:
    """The overlap of nothing has no value."""
    result = split([step(0, 0, 100), kernel("k", 50, 10, 1)])
    assert result.device_span is not None and result.device_span.overlap_share is None


def test_schema_of_2021_and_the_bare_list_agree_with_today() -> None:
    """Capitalised categories, ranges filed as operators, and a bare list give the same parts."""
    old = {"kernel": "Kernel", "cuda_runtime": "Runtime", "gpu_memcpy": "Memcpy", "cpu_op": "Operator"}
    events = [e for e in GPU_STEP if not e["name"].startswith("ridgeline")] + [
        event("Optimizer.step#AdamW.step", "user_annotation", 400, 100),
        event("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", "user_annotation", 0, 100),
    ]
    aged = [{**e, "cat": "Operator" if "#" in e["name"] else old.get(e["cat"], e["cat"])} for e in events]
    today = split(events)
    assert today.evidence["optimizer"] == "Optimizer.step#AdamW.step ranges"
    assert today.evidence["backward"] == "none"
    assert [s.parts for s in split(aged).steps] == [s.parts for s in today.steps]
    bare = break_down(parse_table(json.dumps(aged).encode(), "rank3.json"))
    assert [s.parts for s in bare.steps] == [s.parts for s in today.steps]
    assert bare.rank == 3


def test_a_graph_launch_owns_all_its_kernels_and_the_rest_is_classed() -> None:
    """One call may launch many kernels; mismatches are told apart by what they are."""
    events = [
        step(0, 0, 1_000),
        kernel("carried", 5, 10, 77),
        launch(20, 1, "cudaGraphLaunch"),
        kernel("a", 30, 10, 1),
        kernel("b", 50, 10, 1),
        launch(60, 2, "cudaMemsetAsync"),
        launch(70, 3),
        event("cudaStreamBeginCapture", "cuda_runtime", 80, 1, correlation=50),
        launch(85, 4),
        event("cudaStreamEndCapture", "cuda_runtime", 90, 1, correlation=51),
        kernel("orphan", 200, 10, 78),
    ]
    lost = split(events).integrity
    assert lost.launches_without_kernel == {"elided_memset": 1, "graph_capture": 1, "lost": 1}
    assert lost.kernels_without_launch == {"carry_over": 1, "unexplained": 1}
    assert not lost.clean


def test_missing_steps_and_ranks_are_reported() -> None:
    """The number of files and steps is held against what the job says it had."""
    block = {"active": 3, "wait": 1, "warmup": 1}
    events = [step(2, 0, 10), step(4, 20, 10), event("aten::mm", "cpu_op", 1, 5)]
    one = split(events, rank=2, world=4, ridgeline=block)
    assert one.integrity.steps_missing == [3]
    assert (one.integrity.steps_recorded, one.integrity.steps_expected) == (2, 3)
    assert not one.integrity.clean
    assert combine([one]).missing_ranks == [0, 1, 3]


def test_launches_without_any_gpu_timeline_are_no_idle_gpu() -> None:
    """A counter capture holds launches and no kernels: say so."""
    result = split([step(0, 0, 100), event("aten::mm", "cpu_op", 10, 50), launch(20, 1)])
    assert result.device == "cpu"
    assert any("no GPU timeline" in note for note in result.integrity.notes)


def test_a_trace_without_steps_is_one_window() -> None:
    """The window is stated."""
    result = split([event("aten::mm", "cpu_op", 10, 50), event("aten::mm", "cpu_op", 100, 50)])
    assert (result.window, len(result.steps), result.steps[0].span_ns) == ("capture", 1, 140_000)


def test_waiting_and_transfer_of_matched_collectives() -> None:
    """The rank that arrives last waits least; the shortest hold of a collective is its cost."""

    def rank_events(arrival: float) -> list[dict]:
        return [
            step(0, 0, 20_000),
            event("aten::mm", "cpu_op", 0, arrival),
            event("c10d::allreduce_", "cpu_op", arrival, 100),
            event("gloo:all_reduce", "user_annotation", 9_200, 800, WORKER),
            event("aten::mm", "cpu_op", 10_000, 10_000),
        ]

    both = combine([split(rank_events(at), rank=r, world=2) for r, at in ((0, 2_000.0), (1, 9_000.0))])
    assert both.matched_collectives == 1
    assert both.transfer_seconds == pytest.approx(0.001)
    assert [(w.rank, w.last_arrivals, round(w.waiting_seconds, 6)) for w in both.waits] == [(0, 0, 0.007), (1, 1, 0.0)]
    assert both.straggler is None  # arriving last once proves nothing


def test_two_files_of_one_rank_are_refused() -> None:
    """Two captures mixed in one folder would be averaged in silence."""
    with pytest.raises(UserError, match="both are rank 0"):
        combine([split(CPU_STEP), split(CPU_STEP)])


NAMES = {
    "cpu_op": ["aten::mm", "aten::add", "c10d::allreduce_", "MmBackward0", "autograd::engine::evaluate_function: X"],
    "user_annotation": ["ridgeline.data", "ridgeline.optimizer", "ridgeline.forward", "gloo:all_reduce", "mine"],
    "cuda_runtime": ["cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemsetAsync"],
    "kernel": ["gemm", "ncclDevKernel_AllGather", "elementwise"],
    "gpu_memcpy": ["Memcpy HtoD"],
    "gpu_new": ["unheard of"],
}


@st.composite
def traces(draw: st.DrawFn, device: bool | None = None) -> list[dict]:
    """Any events, nested or not, on any threads, some of zero or sub-microsecond length, in one to three steps."""
    with_device = draw(st.booleans()) if device is None else device
    kinds = ["cpu_op", "user_annotation", "cuda_runtime"] + (["kernel", "gpu_memcpy", "gpu_new"] if with_device else [])
    out = []
    for number in range(draw(st.integers(1, 3))):
        out.append(step(number, number * 5_000, draw(st.integers(1, 5_000))))
    for at in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(kinds))
        start, length = draw(st.integers(-200_000, 15_000_000)), draw(st.integers(0, 3_000_000))  # ns
        where = (
            (0, draw(st.integers(7, 8)))
            if kind in ("kernel", "gpu_memcpy", "gpu_new")
            else (1, draw(st.integers(1, 3)))
        )
        name = draw(st.sampled_from(NAMES[kind]))
        out.append(event(name, kind, start / 1000, length / 1000, where, correlation=draw(st.integers(0, 9)), at=at))
    return out


def check_sums(result: RankBreakdown) -> None:
    """The identities of a breakdown."""
    for one in result.steps:
        assert set(one.parts) == set(PARTS)
        assert sum(one.parts.values()) == one.span_ns
        assert min(one.parts.values()) >= 0
        assert 0 <= one.hidden_communication_ns <= one.span_ns - one.parts["communication"]
        for part, by in one.by_phase.items():
            assert sum(by.values()) == one.parts[part]
            assert min(by.values()) >= 0
        assert sum(one.exposed_by_collective.values()) >= 0
    assert result.integrity.device_ns_after_last_step >= 0
    assert sum(result.mean_seconds().values()) == pytest.approx(result.step_seconds, rel=1e-12)
    if result.device_span:
        span = result.device_span
        assert 0 <= span.overlap_ns <= span.communication_ns <= span.busy_ns <= span.span_ns


@settings(max_examples=120, deadline=None)
@given(traces())
def test_parts_sum_to_the_step(events: list[dict]) -> None:
    """Exactly, in ns, whatever the trace."""
    check_sums(split(events))


def comparable(result: RankBreakdown) -> Any:
    """What must not change with the order or the origin of time."""
    steps = [
        (s.step, s.span_ns, s.parts, s.hidden_communication_ns, s.by_phase, s.exposed_by_collective)
        for s in result.steps
    ]
    return steps, result.evidence, result.top_ops, result.integrity, result.device_span


@settings(max_examples=60, deadline=None)
@given(traces(), st.integers(0, 2**40), st.randoms(use_true_random=False))
def test_time_shift_and_file_order_change_nothing(events: list[dict], shift: int, order: random.Random) -> None:
    """The answer depends on neither the clock's origin nor the order of events in the file."""
    before = comparable(split(events))
    moved = [{**e, "ts": e["ts"] + shift // 2**20 * 1_000} for e in events]
    order.shuffle(moved)
    after = comparable(split(moved, baseTimeNanoseconds=shift))
    assert after == before


@settings(max_examples=25, deadline=None)
@given(st.lists(traces(device=False), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_ranks_changes_nothing(ranks: list[list[dict]], order: random.Random) -> None:
    """Ranks are known by their number, not by their place in a list."""
    results = [split(events, rank=r, world=len(ranks)) for r, events in enumerate(ranks)]
    document = combine(results).to_dict()
    order.shuffle(results)
    assert combine(results).to_dict() == document
