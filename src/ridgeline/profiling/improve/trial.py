"""One run of a job with some knobs: of a user's command under the injection, or of our own configuration."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ridgeline.errors import JobError, UserError
from ridgeline.hardware.child import environment as clean_environment
from ridgeline.profiling.improve import process
from ridgeline.profiling.improve.injection import SPEC_VARIABLE
from ridgeline.profiling.improve.knobs import Knob, merged

if TYPE_CHECKING:
    from ridgeline.profiling.improve.serving.outputs import Outputs

INJECTION = Path(__file__).parent / "injection"
OBSERVED_STEPS = 5
"""Steps a baseline needs after the timed ones: one thrown away, three traced, one for call sites."""
WINDOW_SECONDS = 0.5


@dataclass(frozen=True)
class Trial:
    """What a run showed. ``losses`` are per step, summed over passes and ranks, which together are the global batch.
    A server has ``outputs`` instead, and its step is a pass over the load."""

    step_seconds: float
    losses: list[float]
    passes: list[int] = field(default_factory=list)
    orders: list[list[list[int]]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    traces: Path | None = None
    peak_memory_bytes: int = 0
    outputs: Outputs | None = None


@dataclass(frozen=True)
class Plan:
    """How long a run is. ``timeout`` in seconds; ``burst`` steps are timed as one."""

    warmup: int = 5
    timed: int = 20
    timeout: float = 600.0
    burst: int = 1


def fitting(plan: Plan, knobs: Iterable[Knob], step_seconds: float) -> Plan:
    """The plan for runs that are compared under these knobs.

    Short steps are taken more often, up to ten times, to fill :data:`WINDOW_SECONDS`. With W workers, W batches arrive
    at once and 2 W wait: the latter are used up before the clock starts, and time is taken over multiples of W.
    """
    burst = max((knob.burst for knob in knobs), default=1)
    timed = max(plan.timed, min(math.ceil(WINDOW_SECONDS / step_seconds), 10 * plan.timed))
    warmup = plan.warmup + (2 * burst if burst > 1 else 0)
    return replace(plan, warmup=warmup, timed=burst * max(2, math.ceil(timed / burst)), burst=burst)


class Job(Protocol):
    """A job that can be run again and again, each time in processes of its own. ``plan`` is of its baseline; ``notes``
    are what the user should know about runs that count all the same."""

    name: str
    plan: Plan
    notes: list[str]

    def run(self, knobs: Sequence[Knob], plan: Plan, profile: bool = False, seed_offset: int = 0) -> Trial:
        """Run it with these knobs.

        Raises:
            JobError: it failed, hung, or has no (or too few) steps.
        """


class UserJob:
    """A command that trains with PyTorch, run as it is under the injection."""

    def __init__(self, command: Sequence[str], folder: Path, plan: Plan) -> None:
        if not command:
            raise UserError("nothing to run: give a configuration, or a command after --")
        if command[0].endswith(".py"):
            command = [sys.executable, *command]
        self.command, self.folder, self.plan = list(command), folder, plan
        self.name = next((Path(one).stem for one in command if one.endswith(".py")), Path(command[0]).name)
        self.notes: list[str] = []
        self._count = 0

    def run(self, knobs: Sequence[Knob], plan: Plan, profile: bool = False, seed_offset: int = 0) -> Trial:
        """See :class:`Job`."""
        folder = (self.folder / f"run{self._count:02}").resolve()
        self._count += 1
        folder.mkdir(parents=True)
        spec = {
            "folder": str(folder),
            "warmup": plan.warmup,
            "timed": plan.timed,
            "profile": profile,
            "knobs": merged(knobs),
            "seed_offset": seed_offset,
            "deadline": time.time() + plan.timeout + 30,
        }
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        code = process.run(self.command, self._environment(folder, knobs), folder / "log.txt", plan.timeout)
        ranks = _ranks(folder)
        self._check(folder, ranks, code, plan, profile)
        _acted(ranks, merged(knobs))
        return _trial(ranks, plan, folder / "traces" if profile else None)

    def _environment(self, folder: Path, knobs: Sequence[Knob]) -> dict[str, str]:
        variables = {name: value for knob in knobs for name, value in knob.variables.items()}
        path = os.pathsep.join(filter(None, [str(INJECTION), os.environ.get("PYTHONPATH")]))
        return {
            "PYTHONHASHSEED": "0",
            **os.environ,
            **variables,
            "PYTHONPATH": path,
            SPEC_VARIABLE: str(folder / "spec.json"),
        }

    def _check(self, folder: Path, ranks: list[dict[str, Any]], code: int, plan: Plan, profile: bool) -> None:
        """Results of every rank, or one line that says what is missing. Their presence decides, not the exit code: gloo
        now and then aborts in its destructors after all is done. Such an end is noted."""
        least, log = min((one["steps"] for one in ranks), default=0), folder / "log.txt"
        needed = plan.warmup + plan.timed + OBSERVED_STEPS if profile else plan.warmup + self.plan.timed
        complete = ranks and len(ranks) >= ranks[0]["world"] and least >= needed
        complete = complete and (not profile or ranks[0]["complete"])
        if code != 0 and (complete or (ranks and process.aborted_at_exit(code, log))):
            self.notes.append(f"{folder.name} ended with exit code {code} after its results: {process.last_words(log)}")
        elif code != 0:
            raise JobError(f"failed: {process.last_words(log)}")
        if complete:
            return
        if not any(folder.glob("loaded-*")):
            raise JobError("no process of the job imported torch under our hooks (a Python started with -I or -E?)")
        if not ranks:
            raise JobError("the job ended without an optimiser step (torch.optim)")
        if least < needed:
            raise JobError(f"too few steps: the job took {least}, {needed} are needed (--steps, --warmup)")
        raise JobError(f"results of {len(ranks)} of {ranks[0]['world']} ranks")


def _ranks(folder: Path) -> list[dict[str, Any]]:
    files = folder.glob("rank*.json")
    return sorted((json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda one: one["rank"])


def _acted(ranks: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for section in wanted:
        if not any(section in one["applied"] for one in ranks):
            raise JobError(f"the knob found nothing to act on ({section})")


def _trial(ranks: list[dict[str, Any]], plan: Plan, traces: Path | None) -> Trial:
    """The slowest rank's time; losses summed over passes and ranks."""
    seconds = max(step_seconds(one["stamps"], plan.burst, one["facts"]["cuda"]) for one in ranks)
    steps = min(len(one["losses"]) for one in ranks)
    losses = [sum(sum(one["losses"][step]) for one in ranks) for step in range(steps)]
    passes = [sum(one["passes"][step] for one in ranks) for step in range(steps)]
    peak = max(one["peak_memory_bytes"] for one in ranks)
    return Trial(seconds, losses, passes, [one["orders"] for one in ranks], ranks, traces, peak)


def step_seconds(stamps: Sequence[float], burst: int = 1, asynchronous: bool = False) -> float:
    """Seconds per step from the ends of steps: the median over groups of ``burst`` steps, which one hiccup of the
    machine does not move; the mean where the device runs behind the host, which is synchronised at both ends only."""
    ends = stamps[::burst]
    if asynchronous or len(ends) < 3:
        return (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    return statistics.median(b - a for a, b in itertools.pairwise(ends)) / burst


class OwnJob:
    """A configuration of ours: ``ridgeline profile`` takes its first steps, untraced but for the last."""

    def __init__(self, config: str, overrides: Sequence[str], folder: Path, plan: Plan) -> None:
        from ridgeline.config import load_config

        self.job = load_config(config, list(overrides))
        self.config, self.overrides, self.folder, self.plan = config, list(overrides), folder, plan
        self.name = self.job.data.name
        self.notes: list[str] = []
        self._count = 0

    def run(self, knobs: Sequence[Knob], plan: Plan, profile: bool = False, seed_offset: int = 0) -> Trial:
        """See :class:`Job`."""
        from ridgeline.runs import list_runs

        root = (self.folder / f"run{self._count:02}").resolve()
        self._count += 1
        root.mkdir(parents=True)
        changes = [*self.overrides, *(one for knob in knobs for one in knob.overrides)]
        changes.append(f"train.seed={self.job.train.seed + seed_offset}")
        wait = plan.warmup + plan.timed
        command = [sys.executable, "-m", "ridgeline", "profile", self.config, *changes, "--wait", str(wait)]
        command += ["--warmup", "1" if profile else "0", "--steps", "3" if profile else "1", "--runs", str(root)]
        code = process.run(command, _own_environment(knobs), root / "log.txt", plan.timeout)
        if code != 0:
            raise JobError(f"failed: {process.last_words(root / 'log.txt')}")
        run = list_runs(root)[-1]
        rows = [row for row in run.metrics() if "step_seconds" in row]
        return _own_trial(rows, plan, run.path / "artifacts" / "traces" if profile else None)


def _own_trial(rows: list[dict[str, Any]], plan: Plan, traces: Path | None) -> Trial:
    timed = rows[plan.warmup : plan.warmup + plan.timed]
    steady = [row["step_seconds"] for row in timed if row.get("steady")]
    if not steady:
        raise JobError(f"too few steps: none of {len(timed)} was steady (compiling, or non-finite)")
    losses = [math.nan if row["loss"] is None else row["loss"] for row in rows]
    peak = max(int(row.get("memory_bytes") or 0) for row in rows)
    return Trial(statistics.median(steady), losses, traces=traces, peak_memory_bytes=peak)


def _own_environment(knobs: Sequence[Knob]) -> dict[str, str]:
    variables = {name: value for knob in knobs for name, value in knob.variables.items()}
    threads = int(variables.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return clean_environment(threads)
