"""Recording a real loop on the CPU: what was planted is found, and nothing else is left behind."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from torch.profiler import record_function

from ridgeline.errors import JobError, UserError
from ridgeline.profiling import ProfileSpec, StepProfiler, analyze, capture, verdict
from ridgeline.profiling.analyses.execution import load_execution_trace
from ridgeline.profiling.results import StepBreakdown
from ridgeline.profiling.trace import Trace
from test_profiling_synthetic import check_sums

SPEC = ProfileSpec(wait=3, warmup=1, active=2)


def nothing() -> None:
    """No pause."""


def loop(
    folder: Path, steps: int, spec: ProfileSpec = SPEC, in_data: Callable[[], None] = nothing, between=nothing
) -> None:
    """A small training loop with our ranges."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    with StepProfiler(spec, folder, rank=0, world=1, fingerprint="f00d") as profiler:
        for _ in range(steps):
            with record_function("ridgeline.data"):
                in_data()
                x = torch.ones(32, 64)
            between()
            with record_function("ridgeline.forward"):
                loss = model(x).square().mean()
            with record_function("ridgeline.backward"):
                loss.backward()
            with record_function("ridgeline.optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            profiler.step()


def captured(folder: Path, **kw) -> StepBreakdown:
    """Run the loop past the capture's end and read it back."""
    loop(folder, SPEC.total_steps + 2, **kw)
    return analyze(folder)


def test_a_capture_tells_what_ran(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Steps, ops and their counts are those of the loop; the file is alone; the streams stay clean."""
    begun = time.perf_counter_ns()
    result = captured(tmp_path / "traces")
    whole = time.perf_counter_ns() - begun
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank0.json.gz"]
    (rank,) = result.ranks
    check_sums(rank)
    assert [step.step for step in rank.steps] == [4, 5]
    assert 0 < sum(step.span_ns for step in rank.steps) < whole
    counts = {row.name: row.count for row in rank.top_ops}
    # two layers forward; weight gradients of both and one input gradient backward; two steps
    assert (counts["aten::addmm"], counts["aten::mm"]) == (4, 6)
    assert rank.evidence["optimizer"] == "ridgeline.optimizer ranges"
    assert rank.integrity.clean and rank.integrity.notes == []
    assert (rank.meta["config_fingerprint"], rank.meta["active"]) == ("f00d", 2)
    assert len(rank.meta["untraced_step_seconds"]) == 2  # of three, the first is not counted
    cost = result.profiler_cost()
    assert cost is not None and cost["untraced_seconds"] > 0
    shown = capfd.readouterr()
    assert shown.out == "" and "USDT" not in shown.err


def test_an_execution_trace_lies_beside_the_trace(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of the recorded steps alone: both layers' parameters and their gradients, once per step, with their releases."""
    loop(tmp_path, SPEC.total_steps + 1, replace(SPEC, flow=True))
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["execution/rank0.json.gz", "rank0.json.gz"]
    trace = Trace.load(tmp_path)
    assert trace.why_no_flow() is None
    rows = trace.tensor_flow()
    gradients = rows.filter(pl.col("role") == "gradient")
    sizes = sorted(4 * count for count in (64 * 128, 128, 128 * 64, 64))
    assert sorted(gradients["bytes"].to_list()) == sorted(sizes * SPEC.active)
    released = rows.filter((pl.col("role") == "activation") & (pl.col("written_by") == "aten::gelu"))
    assert released.height == SPEC.active and released["freed_ns"].is_not_null().all()
    shown = capfd.readouterr()
    assert shown.out == "" and "execution_trace_observer" not in shown.err


def test_no_execution_trace_of_another_capture_stays(tmp_path: Path) -> None:
    """Recorded again without data flow, the old execution trace is gone; a failed loop keeps none, and the next can."""
    loop(tmp_path, SPEC.total_steps, replace(SPEC, flow=True))
    loop(tmp_path, SPEC.total_steps)
    assert not (tmp_path / "execution" / "rank0.json.gz").exists()
    with pytest.raises(JobError):
        loop(tmp_path / "b", 2, replace(SPEC, flow=True))
    assert list((tmp_path / "b").iterdir()) == []
    loop(tmp_path / "b", SPEC.total_steps, replace(SPEC, flow=True))
    assert (tmp_path / "b" / "execution" / "rank0.json.gz").is_file()


def test_a_second_observer_is_refused(tmp_path: Path) -> None:
    """torch allows one per process: said before the first step, nothing is left behind, and the other goes on."""
    other = torch.profiler.ExecutionTraceObserver().register_callback(str(tmp_path / "mine.json"))
    try:
        with pytest.raises(JobError, match="another ExecutionTraceObserver"):
            loop(tmp_path / "traces", SPEC.total_steps, replace(SPEC, flow=True))
        other.start()
        torch.ones(3).add(1)
    finally:
        other.unregister_callback()
    assert not list((tmp_path / "traces").rglob("*.json*"))
    assert "aten::add" in {node.name for node in load_execution_trace(tmp_path / "mine.json")}


def test_a_slow_loader_is_found_and_named(tmp_path: Path) -> None:
    """150 ms of sleep in the data range: the clock is the oracle, and the verdict says data."""
    result = captured(tmp_path, in_data=lambda: time.sleep(0.15))
    for step in result.ranks[0].steps:
        assert 150_000_000 <= step.parts["data"] < 300_000_000
    answer = verdict(result)
    assert answer.bound_by == "data"
    assert answer.predicted_gain_seconds == pytest.approx(result.parts_seconds()["data"])


def test_sleep_outside_every_range_is_idle(tmp_path: Path) -> None:
    """No event for 50 ms is idleness, not host overhead."""
    result = captured(tmp_path, between=lambda: time.sleep(0.05))
    for step in result.ranks[0].steps:
        assert 50_000_000 <= step.parts["idle"] < 200_000_000


def test_stdout_survives_and_other_messages_are_not_swallowed(capfd: pytest.CaptureFixture[str]) -> None:
    """C++ noise goes; a real message printed meanwhile comes out on stderr; stdout works again after."""
    import os

    with capture.without_noise():
        os.write(1, b"USDT:2026 profiler_start\n")
        os.write(1, b"printed on stdout meanwhile\n")
        os.write(2, b"a real warning\n")
    print("result")
    shown = capfd.readouterr()
    assert shown.out == "result\n"
    assert shown.err == "printed on stdout meanwhile\na real warning\n"


def test_a_loop_that_ends_too_early(tmp_path: Path) -> None:
    """Before the first recorded step there is nothing: an error with the numbers. Inside, what there is is kept."""
    with pytest.raises(JobError, match="ended after 3 steps and the first recorded one is number 5"):
        loop(tmp_path / "a", 3)
    with pytest.raises(JobError, match="ended after 4 steps"):
        loop(tmp_path / "a", 4)
    assert list((tmp_path / "a").iterdir()) == []
    loop(tmp_path / "b", 5)
    (rank,) = analyze(tmp_path / "b").ranks
    assert (rank.integrity.steps_recorded, rank.integrity.steps_expected) == (1, 2)
    assert not rank.integrity.clean


def test_a_failing_loop_leaves_no_trace_and_its_own_error(tmp_path: Path) -> None:
    """The loop's exception is the one that arrives, also in the middle of recording."""

    def fail() -> None:
        raise KeyError("mine")

    calls = iter([nothing] * 5 + [fail])
    with pytest.raises(KeyError, match="mine"):
        loop(tmp_path, 6, between=lambda: next(calls)())
    assert list(tmp_path.iterdir()) == []
    loop(tmp_path, SPEC.total_steps)  # the profiler is usable again


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace is written beside its name and renamed; no half file stays."""

    def full(plain: Path, packed: Path) -> None:
        packed.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(capture, "_compress", full)
    with pytest.raises(JobError, match=r"cannot write .*No space left"):
        loop(tmp_path, SPEC.total_steps)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_export_is_refused(tmp_path: Path) -> None:
    """What the profiler's own writer cut short must not become a trace."""
    (tmp_path / "x.json").write_text('{"traceEvents": [{"ph": "X"')
    with pytest.raises(OSError, match="truncated"):
        capture._compress(tmp_path / "x.json", tmp_path / "x.gz")


def test_specification_is_checked() -> None:
    """Wrong counts are the user's error."""
    with pytest.raises(UserError, match="steps must be at least 1"):
        ProfileSpec(active=0)
    with pytest.raises(UserError, match="wait must be at least 0"):
        ProfileSpec(wait=-1)
