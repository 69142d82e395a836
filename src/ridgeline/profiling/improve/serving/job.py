"""A served model as a job: what is served, the load it is held under, and one run of it in a process of its own.

One "step" is one pass over the load: all requests are handed to the engine at once, and the pass ends with the last token.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ridgeline.errors import JobError, UserError
from ridgeline.hardware.child import environment as clean_environment
from ridgeline.profiling.improve import process
from ridgeline.profiling.improve.knobs import Knob
from ridgeline.profiling.improve.serving.outputs import Outputs
from ridgeline.profiling.improve.trial import Plan, Trial
from ridgeline.runs import Run

SECONDS = 2.0
"""A run makes at least three passes over the load, then more until they have taken this long."""


@dataclass(frozen=True)
class Served:
    """What `ridgeline serve` was told, as far as it decides the speed. ``model`` is a folder or hub id."""

    model: str
    dtype: str = "bf16"
    compile: bool = True
    max_batch: int = 8
    max_context: int | None = None
    prefill_chunk: int | None = None


@dataclass(frozen=True)
class Load:
    """``streams`` requests at once, each of ``prompt_tokens`` that are continued by ``new_tokens``."""

    streams: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 32

    def __str__(self) -> str:
        return f"{self.streams} requests of {self.prompt_tokens} + {self.new_tokens} tokens"


def parse_load(text: str) -> Load:
    """``STREAMSxPROMPTxNEW``, such as ``8x64x32``."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--load {text}: expected STREAMSxPROMPTxNEW, such as 8x64x32")
    return Load(*map(int, parts))


def from_run(run: Run) -> tuple[Served, Load]:
    """What a run of ``serve`` served, and a load like the one it answered.

    Prompt and completion are the medians over its answered requests. The streams follow from Little's law: the mean batch of
    its decode steps, times the time a request spent in the server over the time it spent out of the queue.
    """
    known = {field.name for field in fields(Served)}
    served = Served(**{key: value for key, value in run.config.items() if key in known})
    rows = [row for row in run.metrics() if row.get("status") == 200 and row.get("completion_tokens")]
    if not rows:
        return served, Load(streams=served.max_batch)
    prompt, new = (round(statistics.median(row[key] for row in rows)) for key in ("prompt_tokens", "completion_tokens"))
    total, queued = (sum(row[key] or 0.0 for row in rows) for key in ("total_seconds", "queue_seconds"))
    running = float(run.summary.get("decode_batch_mean") or 1.0)
    streams = math.ceil(running * total / (total - queued)) if total > queued else math.ceil(running)
    return served, Load(max(1, streams), max(1, prompt), max(1, new))


class ServeJob:
    """See :class:`ridgeline.profiling.improve.trial.Job`. ``key=value`` overrides of knobs are fields of `Served`."""

    def __init__(self, served: Served, load: Load, folder: Path, plan: Plan) -> None:
        self.served, self.load, self.folder, self.plan = served, load, folder, plan
        self.name = f"{Path(served.model).name} under {load}"
        self.notes: list[str] = []
        self._count = 0

    def run(self, knobs: Sequence[Knob], plan: Plan, profile: bool = False, seed_offset: int = 0) -> Trial:
        """One process: the engine is loaded, warmed up, and given the load again and again.

        Raises:
            JobError: it failed or hung.
        """
        folder = (self.folder / f"run{self._count:02}").resolve()
        self._count += 1
        folder.mkdir(parents=True)
        changes = dict(one.split("=", 1) for knob in knobs for one in knob.overrides)
        served = replace(self.served, **{key: json.loads(value) for key, value in changes.items()})
        spec = {"served": asdict(served), "load": asdict(self.load), "folder": str(folder), "profile": profile}
        spec |= {"passes": plan.timed, "seconds": SECONDS}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        command = [sys.executable, "-m", "ridgeline.profiling.improve.serving.child", str(folder / "spec.json")]
        code = process.run(command, _environment(knobs), folder / "log.txt", plan.timeout)
        result = folder / "result.json"
        if not result.is_file():
            raise JobError(f"failed: {process.last_words(folder / 'log.txt')} (exit code {code})")
        return _trial(json.loads(result.read_text(encoding="utf-8")), folder / "traces" if profile else None)


def _environment(knobs: Sequence[Knob]) -> dict[str, str]:
    variables = {name: value for knob in knobs for name, value in knob.variables.items()}
    threads = int(variables.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return clean_environment(threads)


def _trial(document: dict[str, Any], traces: Path | None) -> Trial:
    best = [[{int(token): value for token, value in step} for step in one] for one in document["best"]]
    outputs = Outputs(document["tokens"], best, document["dtype"])
    seconds = statistics.median(document["passes"])
    ranks = [document["facts"]]
    return Trial(seconds, [], ranks=ranks, traces=traces, peak_memory_bytes=document["peak"], outputs=outputs)
