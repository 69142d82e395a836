"""Planted bottlenecks in jobs that nobody edits: each is found at its line, fixed where a knob exists, and proven.
And a configuration of ours, whose knobs are overrides."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ridgeline.errors import JobError
from ridgeline.profiling.improve import Improvement, Plan, Row, findings_memory, improve
from ridgeline.profiling.improve.evidence import Baseline
from ridgeline.profiling.improve.knobs import keep_activations, tf32
from ridgeline.profiling.improve.plan import check_result, own_findings
from ridgeline.profiling.improve.trial import OwnJob, UserJob
from ridgeline.runs import Run
from train_tools import corpus, pretend_ceilings, tiny, toml

PLANTED = Path(__file__).parent / "planted"
PLAN = Plan(warmup=3, timed=10, timeout=100.0)
PYTHON = sys.executable


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the findings do not depend on the machine's cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def improved(script: str, runs: Path, *arguments: str, top: int = 1, knob: str | None = None) -> Improvement:
    """``ridgeline improve -- python SCRIPT ARGUMENTS`` with one round."""
    command = [PYTHON, str(PLANTED / script), *arguments]
    return improve(command, plan=PLAN, rounds=1, top=top, knob=knob, runs_root=runs)


def in_some_session(session: Callable[[], tuple[bool, Any]]) -> Any:
    """The result of the first of three sessions with the verdict that is expected, else of the last.

    In a session on a busy machine the noise floor rises, and what is measured then is rightly not called a gain.
    """
    for _ in range(3):
        expected, result = session()
        if expected:
            break
    return result


def kept_row(script: str, runs: Path, name: str, knob: str | None = None) -> tuple[Improvement, Row]:
    """The answer and the row of ``name``, of a session in which it was kept."""

    def session() -> tuple[bool, tuple[Improvement, Row]]:
        answer = improved(script, runs, knob=knob)
        row = row_of(answer, name)
        return row.kept, (answer, row)

    found: tuple[Improvement, Row] = in_some_session(session)
    return found


def row_of(answer: Improvement, name: str) -> Row:
    """The row of the finding of this name."""
    (row,) = [row for row in answer.rows if row.finding.name == name]
    return row


def planted_line(script: str, mark: str = "the planted line") -> str:
    """``file:line`` of the line that says it is the planted one."""
    lines = (PLANTED / script).read_text().splitlines()
    return f"{PLANTED / script}:{next(at for at, line in enumerate(lines, 1) if mark in line)}"


def test_a_slow_loader_through_the_command_line(tmp_path: Path) -> None:
    """Items sleep 8 ms, four in a batch: found at the sleep, fixed by workers, the gain proven; a run is left."""
    command = [PYTHON, "-m", "ridgeline", "improve", "--steps", "10", "--warmup", "3", "--rounds", "1", "--json"]
    command += ["--", PYTHON, str(PLANTED / "slow_loader.py"), "--an-option-of-the-script"]

    def session() -> tuple[bool, Any]:
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert shown.returncode == 0, shown.stderr
        return json.loads(shown.stdout)["findings"][0]["kept"], shown

    shown = in_some_session(session)
    document = json.loads(shown.stdout)
    first = document["findings"][0]
    assert first["name"] == "loader" and first["evidence"]["where"] == planted_line("slow_loader.py")
    assert first["seconds_per_step"] >= 4 * 0.008
    assert (
        Path(first["evidence"]["trace"]).name == "rank0.json.gz" and (tmp_path / first["evidence"]["trace"]).is_file()
    )
    assert first["kept"] and first["losses"]["difference"] == 0.0
    low, high = first["predicted_seconds"]
    assert 0 < low < high <= document["step_seconds"]
    assert first["gain"]["gain_seconds"] > first["gain"]["floor_seconds"]
    assert document["speedup"] > 1.2 and "num_workers=" in document["permanent"][0]
    run = Run.open(document["run"], tmp_path / "runs")
    assert (run.kind, run.info["status"], run.summary["kept"]) == ("improve", "done", ["workers"])
    assert run.load_json("improve.json") == document
    assert "workers: run 4 of 4" in shown.stderr


def test_a_gain_that_changes_the_result_is_refused(tmp_path: Path) -> None:
    """Random items drawn by workers are other items: the loader is as slow, and still nothing is kept."""
    answer = improved("slow_loader.py", tmp_path, "--random")
    row = row_of(answer, "loader")
    assert not row.kept and row.why.startswith("changed the result: losses differ by")
    assert answer.kept == [] and answer.speedup == 1.0


def test_items_computed_in_python(tmp_path: Path) -> None:
    """Found as preprocessing in the item's own function; workers prove a gain where the machine has a core to give."""
    row = row_of(improved("python_items.py", tmp_path), "loader")
    assert "preprocessing each item in Python" in row.finding.text
    file, _, line = row.finding.where.rpartition(":")
    assert file.endswith("python_items.py") and 11 <= int(line) <= 18
    assert row.tried and row.gain is not None
    assert row.kept == (row.gain.gain_seconds > row.gain.floor_seconds)
    if not row.kept and _second_core_is_free():
        row = row_of(improved("python_items.py", tmp_path), "loader")
    if not row.kept and not _second_core_is_free():
        pytest.skip("found and tried; this machine has no free second core now, so there is no gain to prove")
    assert row.kept


def _second_core_is_free() -> bool:
    """Whether two busy processes take hardly longer than one."""
    code = "sum(i * i for i in range(6_000_000))"
    seconds = []
    for count in (1, 2):
        began = time.perf_counter()
        for process in [subprocess.Popen([PYTHON, "-c", code]) for _ in range(count)]:
            process.wait()
        seconds.append(time.perf_counter() - began)
    return seconds[1] < 1.3 * seconds[0]


def test_item_in_every_step(tmp_path: Path) -> None:
    """4,096 calls on one line; no knob from outside can remove them, so the line is named and nothing is tried. The
    process aborts as it ends, after its results were complete: they count, and the abort is told."""
    answer = improved("item_each_step.py", tmp_path, "--abort", top=0)
    row = row_of(answer, "synchronisation")
    (note,) = answer.notes
    assert note.startswith("run00 ended with exit code -6 after its results") and answer.to_dict()["notes"] == [note]
    assert row.finding.where == planted_line("item_each_step.py") and "4096 calls of .item()" in row.finding.text
    assert row.finding.knob is None and not row.tried
    low, high = row.finding.predicted
    assert 0 < low <= high and row.finding.seconds > 0.3 * 0.001  # at least 0.1 us a call


def test_tiny_kernels_in_the_optimizer(tmp_path: Path) -> None:
    """300 tensors, one by one: found at the optimiser, sped up by the fused kernel, losses within 1e-4."""
    answer, row = kept_row("many_tensors.py", tmp_path, "optimizer", "fused")
    assert row.finding.where == planted_line("many_tensors.py") and "300 tensors, not fused" in row.finding.text
    assert row.kept and answer.speedup > 1.2
    assert row.result is not None and row.result.difference < 1e-4


@pytest.mark.slow
def test_tiny_kernels_in_the_model(tmp_path: Path) -> None:
    """Hundreds of operators below a microsecond: found at their line, compiled in place, the step shorter."""
    answer, row = kept_row("tiny_kernels.py", tmp_path, "small operators", "compile")
    assert row.finding.where == planted_line("tiny_kernels.py") and "Chain" in row.finding.text
    assert row.kept and answer.speedup > 1.2


def test_activations_computed_again(tmp_path: Path) -> None:
    """Checkpointed blocks, found at the line; kept activations give the same losses to the bit, dropout included, though the
    reentrant variant makes a backward within the backward for every block."""
    job = UserJob([PYTHON, str(PLANTED / "recompute.py"), "--reentrant"], tmp_path, PLAN)
    base = job.run((), PLAN, profile=True)
    (found,) = findings_memory.recomputation(Baseline(base))
    assert found.where == planted_line("recompute.py") and 0 < found.predicted[0] < found.seconds
    kept = job.run([keep_activations()], PLAN)
    assert set(base.passes) == {1} and check_result([base], kept, keep_activations()).difference == 0
    assert kept.ranks[0]["applied"] == ["checkpoint"] and kept.ranks[0]["data"]["recompute"] == 0


def test_a_straggling_rank_under_torchrun(tmp_path: Path) -> None:
    """Rank 1 sleeps 50 ms a step: rank 1 is named with the line, and about 50 ms."""
    launcher = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answer = improve([*launcher, str(PLANTED / "straggler.py")], plan=PLAN, top=0, runs_root=tmp_path)
    row = row_of(answer, "straggler")
    assert row.finding.rank == 1 and row.finding.where == planted_line("straggler.py")
    assert 0.020 < row.finding.seconds < 0.200 and row.finding.knob is None
    assert row.finding.trace.endswith("rank1.json.gz")


def test_a_knob_that_does_nothing(tmp_path: Path) -> None:
    """TF32 means nothing to a CPU: the same losses to the bit. The script swallows SystemExit, and its process ends all the
    same, long before its million steps are done."""
    job = UserJob([PYTHON, str(PLANTED / "nothing.py")], tmp_path, PLAN)
    base, changed = job.run((), PLAN), job.run([tf32()], PLAN)
    assert check_result([base], changed, tf32()).difference == 0 and job.notes == []
    assert [one.ranks[0]["applied"] for one in (base, changed)] == [[], ["backends"]]
    assert changed.ranks[0]["steps"] == PLAN.warmup + PLAN.timed


def test_jobs_that_cannot_be_improved_say_why_in_one_line(tmp_path: Path) -> None:
    """No torch, no optimiser step, too few steps, a failure, a hang. The job with too few steps ends with tensors in its
    frames, which the sampler must not keep: freed by a thread that the interpreter is ending, they abort the process."""
    early = str(PLANTED / "ends_early.py")
    for command, message in {
        (PYTHON, "-c", "pass"): "no process of the job imported torch",
        (PYTHON, "-c", "import torch"): "ended without an optimiser step",
        (PYTHON, early): r"too few steps: the job took 7, 18 are needed",
        (PYTHON, "-c", "raise ValueError('bad data')"): "failed: ValueError: bad data",
    }.items():
        with pytest.raises(JobError, match=message) as error:
            improve(command, plan=PLAN, runs_root=tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(JobError, match="still running after 1 s"):
        improve([PYTHON, "-c", "import time; time.sleep(60)"], plan=Plan(timeout=1.0), runs_root=tmp_path)
    assert all(Run.open(folder).info["status"] == "failed" for folder in tmp_path.iterdir())
    assert "RIDGELINE_IMPROVE_SPEC" not in os.environ


def test_a_configuration_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Knobs are overrides: two rows a pass instead of one halve the passes, the losses stay, no model is exported."""
    (tmp_path / "cache").mkdir()
    pretend_ceilings(tmp_path / "cache")
    monkeypatch.setenv("RIDGELINE_CACHE", str(tmp_path / "cache"))
    config = toml(tiny(corpus(tmp_path), train__micro_batch_size=1), tmp_path / "tiny.toml")
    plan = Plan(warmup=2, timed=4, timeout=100.0)
    job = OwnJob(str(config), ["train.seed=3"], tmp_path / "trials", plan)
    base = job.run((), plan, profile=True)
    found = [one for one in own_findings(job, base) if one.knob and one.knob.name == "micro-batch"]
    assert found and found[0].knob is not None and found[0].predicted[1] > 0
    assert found[0].knob.overrides == ("train.micro_batch_size=2",)
    halved = job.run([found[0].knob], plan)
    assert check_result([base], halved, found[0].knob).same and halved.step_seconds > 0
    config_used = Run.open("latest", tmp_path / "trials" / "run01").config["train"]
    assert (config_used["micro_batch_size"], config_used["global_batch_size"], config_used["seed"]) == (2, 8, 3)
    assert not list(tmp_path.glob("trials/*/*/artifacts/model"))


def test_sigterm_takes_the_job_with_it(tmp_path: Path) -> None:
    command = [PYTHON, "-m", "ridgeline", "improve", "--steps", "10000", "--runs", str(tmp_path)]
    command += ["--", PYTHON, str(PLANTED / "slow_loader.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as verb:
        deadline, jobs = time.monotonic() + 60, []
        while not jobs and time.monotonic() < deadline:
            below = psutil.Process(verb.pid).children(recursive=True)
            with contextlib.suppress(psutil.NoSuchProcess):
                jobs = [one for one in below if any("slow_loader.py" in word for word in one.cmdline())]
            time.sleep(0.05)
        assert jobs
        verb.terminate()
        _, errors = verb.communicate(timeout=30)
    assert verb.returncode == 143 and "Traceback" not in errors
    assert psutil.wait_procs(jobs, timeout=10)[1] == []
