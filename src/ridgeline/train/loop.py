"""The loop: data, step, record, validate, checkpoint, until the last step or a request to stop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.profiler import record_function

from ridgeline.config import JobConfig
from ridgeline.errors import JobError
from ridgeline.parallel.collectives import Collectives
from ridgeline.parallel.mesh import Layout
from ridgeline.runs import Run
from ridgeline.train import checkpoint, nonfinite
from ridgeline.train.interrupt import StopRequest
from ridgeline.train.limits import Limits
from ridgeline.train.record import Recorder, memory_bytes
from ridgeline.train.schedule import learning_rate
from ridgeline.train.source import Batches
from ridgeline.train.state import TrainState
from ridgeline.train.step import Outcome, apply, evaluate, forward_backward, measure_norm, share

if TYPE_CHECKING:
    from ridgeline.compiler.blocks import CompileWatch

WARMUP_STEPS = 2  # after start or resume: allocator, caches and compile make them unlike the rest
Say = Callable[[str], None]


class StepListener(Protocol):
    """What is told at the end of each step: the profiler."""

    def step(self) -> None: ...


@dataclass
class Trainer:
    """Everything a step needs. ``recorder`` exists on rank 0 only."""

    job: JobConfig
    layout: Layout
    world: Collectives
    state: TrainState
    batches: Batches
    limits: Limits
    run: Run
    stop: StopRequest
    watch: CompileWatch | None
    recorder: Recorder | None
    last_loss: float = math.nan
    validation_loss: float = math.nan
    validated_at: int = -1
    saved_at: int = -1
    taken: int = 0
    skipped: list[int] = field(default_factory=list)
    started_at: int = 0


@dataclass
class Times:
    """Wall seconds of one step's parts."""

    data: float = 0.0
    compute: float = 0.0
    optimizer: float = 0.0


def run_steps(
    trainer: Trainer, last: int, profiler: StepListener | None, say: Say, checkpoints: Path | None = None
) -> str:
    """Take steps up to number ``last``; returns ``done`` or ``interrupted``. Saves below ``checkpoints`` if given."""
    trainer.started_at = trainer.state.step
    with _progress(trainer, last) as advance:
        while trainer.state.step < last:
            outcome = take_step(trainer, say)
            advance(outcome)
            if profiler is not None:
                profiler.step()
            if outcome.stop:
                break
            if checkpoints is not None:
                _periodic(trainer, last, checkpoints)
    if checkpoints is not None and trainer.state.step > trainer.started_at:
        save(trainer, checkpoints)
    return "done" if trainer.state.step >= last else "interrupted"


def take_step(trainer: Trainer, say: Say) -> Outcome:
    """One optimiser step, applied or skipped, and recorded."""
    state, job = trainer.state, trainer.job
    step, compiled, times = state.step + 1, _compilations(trainer), Times()
    began = time.perf_counter()
    with record_function("ridgeline.data"), _timed(times, "data", trainer.layout.device):
        tokens = trainer.batches.step(step, trainer.layout.rows(job.train.global_batch_size))
        tokens = tokens.to(trainer.layout.device)
    with _timed(times, "compute", trainer.layout.device):
        loss = forward_backward(state, tokens, job.train.micro_batch_size, trainer.batches.tokens_per_step)
        outcome = share(loss, trainer.stop.asked, trainer.world)
    rate = learning_rate(step, job.optimizer, job.train.steps)
    with record_function("ridgeline.optimizer"), _timed(times, "optimizer", trainer.layout.device):
        outcome = measure_norm(state, outcome)
        if outcome.finite:
            apply(state, job, outcome, rate)
        state.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    state.step, trainer.taken = step, trainer.taken + 1
    trainer.last_loss = outcome.loss if outcome.finite else trainer.last_loss
    steady = outcome.finite and trainer.taken > WARMUP_STEPS and _compilations(trainer) == compiled
    _record(trainer, outcome, rate, seconds, times, steady)
    if not outcome.finite:
        _nonfinite(trainer, step, outcome, say)
    return outcome


def validate(trainer: Trainer) -> float:
    """Mean loss per token over ``eval_batches`` fixed batches of the validation split."""
    if trainer.validated_at == trainer.state.step:
        return trainer.validation_loss
    began, section = time.perf_counter(), trainer.job.train
    rows = trainer.layout.rows(section.global_batch_size)
    total = torch.zeros((), dtype=torch.float32, device=trainer.layout.device)
    for index in range(section.eval_batches):
        tokens = trainer.batches.validation(index, rows).to(trainer.layout.device)
        total += evaluate(trainer.state, tokens, section.micro_batch_size)
    total = trainer.world.all_reduce(total)
    trainer.validation_loss = float(total) / (section.eval_batches * trainer.batches.tokens_per_step)
    trainer.validated_at = trainer.state.step
    if trainer.recorder is not None:
        trainer.recorder.validation(trainer.state.step, trainer.validation_loss, time.perf_counter() - began)
    return trainer.validation_loss


def save(trainer: Trainer, root: Path) -> None:
    """Write a checkpoint of the present step, unless it is there already."""
    state = trainer.state
    if trainer.saved_at == state.step:
        return
    facts = {
        "applied": state.applied,
        "seed": trainer.job.train.seed,
        "dataset": trainer.batches.dataset.fingerprint,
        "global_batch_size": trainer.job.train.global_batch_size,
        "seq_len": trainer.job.train.seq_len,
    }
    checkpoint.save(state.tensors(), root, state.step, facts, trainer.job.train.keep_checkpoints)
    trainer.saved_at = state.step


def summary(trainer: Trainer, seconds: float) -> dict[str, Any]:
    """Headline figures of the session. Rank 0 only."""
    recorder, limits = trainer.recorder, trainer.limits
    assert recorder is not None
    medians = recorder.medians()
    rate = medians.get("tokens_per_second")
    figures: dict[str, Any] = {
        "final_loss": trainer.last_loss,
        "tokens_per_second": rate,
        "step_seconds": medians.get("step_seconds"),
        "data_seconds": medians.get("data_seconds"),
        "compute_seconds": medians.get("compute_seconds"),
        "optimizer_seconds": medians.get("optimizer_seconds"),
        "steady_steps": recorder.steady_steps,
        "mfu": limits.mfu(rate) if rate else None,
        "mfu_formula": f"({limits.formula}) x tokens/s / ceiling",
        "mfu_denominator": limits.denominator,
        "steps": trainer.state.step,
        "skipped_steps": len(trainer.skipped),
        "parameters": trainer.state.config.num_parameters,
        "processes": trainer.layout.world_size,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": recorder.peak_memory_bytes,
    }
    if trainer.validated_at >= 0:
        figures["validation_loss"] = trainer.validation_loss
    if trainer.watch is not None:
        report = trainer.watch.report()
        trainer.run.save_json("compile.json", report.to_dict())
        figures |= {
            "compile_seconds": report.seconds,
            "graph_breaks": report.graph_breaks,
            "recompiles": report.recompiles,
        }
    return figures


def _periodic(trainer: Trainer, last: int, checkpoints: Path) -> None:
    section, step = trainer.job.train, trainer.state.step
    if section.eval_every and step % section.eval_every == 0:
        validate(trainer)
    if section.checkpoint_every and step % section.checkpoint_every == 0 and step < last:
        save(trainer, checkpoints)


def _nonfinite(trainer: Trainer, step: int, outcome: Outcome, say: Say) -> None:
    line = nonfinite.keep_batch(trainer.run, trainer.batches, step, outcome) if trainer.recorder else ""
    if trainer.job.train.on_nonfinite == "stop":
        raise JobError(line or f"step {step} is not finite")
    trainer.skipped.append(step)
    say(f"skipped: {line}")


def _record(trainer: Trainer, outcome: Outcome, rate: float, seconds: float, times: Times, steady: bool) -> None:
    if trainer.recorder is None:
        return
    # A skipped step trained on nothing.
    tokens = trainer.batches.tokens_per_step if outcome.finite else 0
    values = {
        "step": trainer.state.step,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "learning_rate": rate,
        "tokens": trainer.state.applied * trainer.batches.tokens_per_step,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "data_seconds": times.data,
        "compute_seconds": times.compute,
        "optimizer_seconds": times.optimizer,
        "mfu": trainer.limits.mfu(tokens / seconds),
        "memory_bytes": memory_bytes(trainer.layout.device),
    }
    trainer.recorder.step(values, steady)


def _compilations(trainer: Trainer) -> int:
    return trainer.watch.compilations if trainer.watch is not None else 0


@contextmanager
def _timed(times: Times, part: str, device: torch.device) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    setattr(times, part, time.perf_counter() - began)


@contextmanager
def _progress(trainer: Trainer, last: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on stderr for people; nothing when stderr is not a terminal or this is not rank 0."""
    if trainer.recorder is None or not sys.stderr.isatty():
        yield lambda outcome: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("train", total=last, completed=trainer.state.step, loss=math.nan, rate=0.0)
        clock = time.perf_counter()

        def advance(outcome: Outcome) -> None:
            nonlocal clock
            now = time.perf_counter()
            rate, clock = trainer.batches.tokens_per_step / (now - clock), now
            bar.update(task, completed=trainer.state.step, loss=outcome.loss, rate=rate)

        yield advance
