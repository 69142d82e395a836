"""``profile``: take the steps to look at (from a run, a configuration, or a trace someone else made), break them down,
judge them, and leave it all in a run."""

from __future__ import annotations

import glob
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ridgeline.errors import JobError, UserError
from ridgeline.profiling.breakdown import analyze
from ridgeline.profiling.capture import ProfileSpec
from ridgeline.profiling.load import TRACE_SUFFIXES
from ridgeline.profiling.results import PARTS, StepBreakdown
from ridgeline.profiling.verdict import Verdict, verdict
from ridgeline.runs import Run

TRACES = "traces"
"""Folder of the ranks' traces below a run's artifacts."""
PATIENCE_SECONDS = 60.0
"""How long rank 0 waits for the traces of the other ranks under an outer torchrun."""


@dataclass(frozen=True)
class Profiled:
    """A profile: its run (None when only a foreign trace was read), the breakdown and the verdict."""

    run: Run | None
    breakdown: StepBreakdown
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """What ``breakdown.json`` and ``--json`` hold."""
        document = {"run": self.run.id if self.run else None, "verdict": self.verdict.to_dict()}
        return {**document, **self.breakdown.to_dict()}


def is_trace(target: str | Path) -> bool:
    """Whether ``target`` is a trace file, a folder with traces that is no run, or a glob that matches traces."""
    path = Path(target)
    if glob.has_magic(str(target)) and not path.exists():
        return any(name.endswith(TRACE_SUFFIXES) for name in glob.iglob(str(target), recursive=True))
    if path.is_dir() and not (path / "run.json").is_file():
        return any(file.name.endswith(TRACE_SUFFIXES) for file in path.iterdir())
    return path.is_file() and path.name.endswith(TRACE_SUFFIXES)


def profile_target(
    target: str,
    overrides: Sequence[str] = (),
    *,
    spec: ProfileSpec | None = None,
    runs_root: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Profiled:
    """Profile ``target``: a training run (from its last checkpoint, left as it is), a TOML configuration (from its first
    step), a finished profile (read again), or a trace file or folder of anyone's (only read).

    Raises:
        UserError: no such target, or overrides for something that is only read.
        JobError: the job failed, or was interrupted before the recorded steps.
    """
    if is_trace(target):
        _refuse(overrides, target)
        breakdown = analyze(target)
        return Profiled(None, breakdown, verdict(breakdown))
    if not _is_config(target) and Run.open(target, runs_root).kind == "profile":
        _refuse(overrides, target)
        return judge(Run.open(target, runs_root))
    return record(take_steps(target, overrides, spec or ProfileSpec(), runs_root, say))


def take_steps(
    target: str,
    overrides: Sequence[str],
    spec: ProfileSpec,
    runs_root: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Train the steps to record, and nothing else; the run of kind ``profile`` that holds their traces.

    Under an outer torchrun every rank calls this.
    """
    if _is_config(target):
        return _fresh(target, overrides, spec, runs_root, say)
    return _resumed(Run.open(target, runs_root), overrides, spec, runs_root, say)


def _is_config(target: str) -> bool:
    return Path(target).suffix == ".toml" or Path(target).is_file()


def record(run: Run) -> Profiled:
    """Judge the traces a run holds; leave ``breakdown.json`` and headline figures in it.

    A training run that was profiled in place keeps its own ``step_seconds``; the traced ones go beside it.
    """
    result = judge(run)
    parts = shown_parts(result.breakdown)
    name = "step_seconds" if run.kind == "profile" else "profiled_step_seconds"
    run.save_json("breakdown.json", result.to_dict())
    run.summarize(
        bound_by=result.verdict.bound_by,
        verdict=result.verdict.line,
        knob=result.verdict.knob,
        predicted_gain_seconds=result.verdict.predicted_gain_seconds,
        parts=parts,
        profiler_cost=result.breakdown.profiler_cost(),
        **{name: result.breakdown.step_seconds},
    )
    return result


def judge(run: Run) -> Profiled:
    """Break down the traces of a run and judge them with its configuration, ceilings and utilisation. Only reads.

    Raises:
        JobError: the run holds no trace.
    """
    folder = run.path / "artifacts" / TRACES
    if not folder.is_dir() or not any(folder.iterdir()):
        raise JobError(f"run {run.id} ({run.status}) holds no trace: {run.info.get('error') or 'nothing was recorded'}")
    if "RANK" in os.environ:
        _await_ranks(folder, int(os.environ.get("WORLD_SIZE", "1")))
    breakdown = analyze(folder)
    mfu = untraced_mfu(run, int(breakdown.ranks[0].meta.get("wait") or 0))
    answer = verdict(breakdown, config=run.config, mfu=mfu, ceilings=run.load_json("ceilings.json"))
    return Profiled(run, breakdown, answer)


def untraced_mfu(run: Run, wait: int) -> float | None:
    """Utilisation of steps without tracing: of the run that was resumed, else of this run's first ``wait`` but one."""
    for parent in run.info.get("parents") or []:
        summary = run.path.parent / parent / "summary.json"
        if summary.is_file():
            return Run.open(summary.parent).summary.get("mfu")
    values = [line["mfu"] for line in run.metrics()[1:wait] if line.get("mfu") is not None]
    return statistics.median(values) if values else None


def shown_parts(breakdown: StepBreakdown) -> dict[str, float]:
    """Seconds per step of every part; copies and unknown work only where a device has them. They sum to the step."""
    seconds = breakdown.parts_seconds()
    return {part: seconds[part] for part in PARTS if seconds[part] or part not in ("memory_copies", "unknown")}


def _fresh(
    target: str,
    overrides: Sequence[str],
    spec: ProfileSpec,
    runs_root: str | Path | None,
    say: Callable[[str], None] | None,
) -> Run:
    from ridgeline.config import load_config
    from ridgeline.train import train

    job = load_config(target, list(overrides))
    run = None
    if int(os.environ.get("RANK", "0")) == 0:
        run = Run.create("profile", job.data.name, config=job.model_dump(mode="json"), root=runs_root)
    return train(job, run=run, profile=spec, runs_root=runs_root, **_talk(say))


def _resumed(
    source: Run,
    overrides: Sequence[str],
    spec: ProfileSpec,
    runs_root: str | Path | None,
    say: Callable[[str], None] | None,
) -> Run:
    from ridgeline.train import train
    from ridgeline.train.start import continued_config

    if source.kind != "train":
        raise UserError(f"profile {source.id}: is a run of kind {source.kind}; give one of kind train or profile")
    job = continued_config(source, list(overrides))
    return train(job, resume=str(source.path), profile=spec, runs_root=runs_root, **_talk(say))


def _talk(say: Callable[[str], None] | None) -> dict[str, Any]:
    return {} if say is None else {"say": say}


def _refuse(overrides: Sequence[str], target: str) -> None:
    if overrides:
        raise UserError(f"profile {target}: is only read, so '{overrides[0]}' can change nothing")


def _await_ranks(folder: Path, world: int) -> None:
    """Ranks of an outer launcher end on their own: give their traces a while to appear. The reader reports what lacks."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(folder.glob("rank*.json.gz"))) < world and time.monotonic() < deadline:
        time.sleep(0.2)
