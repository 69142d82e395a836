"""The verdict: what bounds a step of known parts, knobs that exist, and gains that are the measured times."""

from __future__ import annotations

from typing import Any

import pytest

from ridgeline.config import JobConfig
from ridgeline.config.load import parse_config
from ridgeline.profiling.breakdown import combine
from ridgeline.profiling.results import StepBreakdown
from ridgeline.profiling.verdict import Verdict, verdict
from test_profiling_synthetic import GPU_STEP, WORKER, event, phase, split, step


def config(**changes: Any) -> dict[str, Any]:
    """A job of ours; ``train__compile=False`` sets a key."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return parse_config({}, [one.lower() for one in overrides]).model_dump(mode="json")


def both_ranks(events: list[dict]) -> StepBreakdown:
    """The same step on two ranks of one host."""
    return combine([split(events, rank=rank, world=2) for rank in (0, 1)])


COMMUNICATION = [
    step(0, 0, 10_000),
    phase("forward", 0, 3_000),
    event("aten::mm", "cpu_op", 0, 2_000),
    event("c10d::_allgather_base_", "cpu_op", 2_000, 100),
    event("gloo:all_gather", "user_annotation", 2_100, 900, WORKER),
    phase("backward", 3_000, 7_000),
    event("c10d::_allgather_base_", "cpu_op", 3_000, 100),
    event("gloo:all_gather", "user_annotation", 3_100, 2_900, WORKER),
    event("aten::mm", "cpu_op", 6_000, 1_000),
    event("c10d::_reduce_scatter_base_", "cpu_op", 7_000, 100),
    event("gloo:all_reduce", "user_annotation", 7_100, 2_900, WORKER),
]
HOST = [
    step(0, 0, 10_000),
    phase("forward", 0, 4_000),
    event("aten::mm", "cpu_op", 100, 500),
    event("aten::mul", "cpu_op", 700, 1_000),
    phase("backward", 4_000, 5_500),
    phase("optimizer", 9_500, 500),
]
COMPUTE = [
    step(0, 0, 10_000),
    phase("forward", 0, 3_000),
    event("aten::mm", "cpu_op", 0, 3_000),
    phase("backward", 3_000, 7_000),
    event("aten::mm", "cpu_op", 3_000, 7_000),
]


def check_knobs_exist(answer: Verdict) -> None:
    """Every knob proposed for a job of ours is a key the configuration accepts, with a value it accepts."""
    for finding in answer.findings:
        if finding.knob.startswith(("removing", "data.path")):
            continue
        key = finding.knob.split("=")[0]
        section, name = key.split(".")
        assert name in type(getattr(JobConfig(), section)).model_fields, finding.knob
        parse_config({"train": {"global_batch_size": 1024, "micro_batch_size": 1}}, [finding.knob])


def test_communication_and_its_three_knobs() -> None:
    """The gathers of backward are the gain of keeping parameters; all exposed time that of one process."""
    answer = verdict(both_ranks(COMMUNICATION), config=config(parallel__procs=2, train__micro_batch_size=4))
    assert answer.bound_by == "communication"
    assert answer.line.startswith(
        "communication bounds the step: 70% exposed communication (0.0070 s) of 0.0100 s per step"
    )
    gains = {finding.knob: finding.gain_seconds for finding in answer.findings}
    assert gains["parallel.reshard_after_forward=false"] == pytest.approx(0.003)
    assert gains["parallel.procs=1"] == pytest.approx(0.007)
    assert answer.knob == "parallel.procs=1" and answer.predicted_gain_seconds == pytest.approx(0.007)
    check_knobs_exist(answer)
    kept = config(parallel__procs=2, train__micro_batch_size=4, parallel__reshard_after_forward=False)
    assert "parallel.reshard_after_forward=false" not in {
        f.knob for f in verdict(both_ranks(COMMUNICATION), config=kept).findings
    }


def test_host_bound_eager_and_compiled() -> None:
    """Eager: compile. Compiled already and accumulating: a larger micro batch halves the passes. Neither: nothing."""
    breakdown = combine([split(HOST)])
    eager = verdict(breakdown, config=config(train__compile=False))
    assert (eager.bound_by, eager.knob) == ("host", "train.compile=true")
    assert eager.predicted_gain_seconds == pytest.approx((0.008 + 0.001) / 2)
    check_knobs_exist(eager)
    compiled = verdict(breakdown, config=config(train__micro_batch_size=2))
    assert compiled.knob == "train.micro_batch_size=4"
    assert compiled.predicted_gain_seconds == pytest.approx(0.004)
    check_knobs_exist(compiled)
    done = verdict(breakdown, config=config())
    assert (done.bound_by, done.knob, done.predicted_gain_seconds) == ("host", None, 0.0)
    assert "No knob we know" in done.line


def test_compute_bound_knobs() -> None:
    """fp32 against the measured ceilings; recomputation against the measured forward."""
    breakdown = combine([split(COMPUTE)])
    ceilings = {"gemm_flops_per_second": {"fp32": 1e11, "bf16": 4e11}}
    low = verdict(breakdown, config=config(train__dtype="fp32"), ceilings=ceilings)
    assert (low.bound_by, low.knob) == ("compute", "train.dtype=bf16")
    assert low.predicted_gain_seconds == pytest.approx(0.010 * 0.75)
    check_knobs_exist(low)
    again = verdict(breakdown, config=config(parallel__activation_checkpointing="full"))
    assert again.knob == "parallel.activation_checkpointing=none"
    assert again.predicted_gain_seconds == pytest.approx(0.003)
    unknown = verdict(breakdown, config=config(train__dtype="fp32"))  # no ceiling, no guess
    assert unknown.knob is None


def test_near_the_ceiling_is_an_answer() -> None:
    """At a high measured utilisation compute is not a complaint."""
    breakdown = combine([split(COMPUTE)])
    assert verdict(breakdown, config=config(), mfu=0.3).bound_by == "compute"
    high = verdict(breakdown, config=config(), mfu=0.71)
    assert high.bound_by == "balanced"
    assert "near the device's ceiling" in high.line and "MFU 71.0%" in high.line


def test_optimizer_bound() -> None:
    """Its cost is spread over more tokens, and the line says what that changes."""
    events = [step(0, 0, 1_000), phase("optimizer", 0, 1_000), event("aten::_fused_adamw_", "cpu_op", 0, 900)]
    answer = verdict(combine([split(events)]), config=config())
    assert (answer.bound_by, answer.knob) == ("optimizer", "train.global_batch_size=16")
    assert "halves the updates" in answer.line
    check_knobs_exist(answer)


def test_foreign_traces_get_pytorch_names() -> None:
    """Nobody has to use our trainer: the knobs are then PyTorch's."""
    answer = verdict(combine([split([e for e in GPU_STEP if e["name"] != "cudaDeviceSynchronize"])]))
    assert answer.findings and not any(f.knob.startswith(("train.", "parallel.", "data.")) for f in answer.findings)


def test_one_line() -> None:
    """The verdict is one line, and its JSON holds all findings in order of gain."""
    answer = verdict(both_ranks(COMMUNICATION), config=config(parallel__procs=2, train__micro_batch_size=4))
    assert "\n" not in answer.line
    gains = [finding["gain_seconds"] for finding in answer.to_dict()["findings"]]
    assert gains == sorted(gains, reverse=True)
