"""``ridgeline train CONFIG``: pretrain a model, or continue one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.config import JobConfig, load_config
from ridgeline.errors import UserError
from ridgeline.runs import Run

app = new_app("Pretrain a model, or continue one.")

IMPLAUSIBLE_MFU = 0.9
ARGUMENTS = typer.Argument(None, metavar="[CONFIG] [section.key=value ...]", help="TOML file, then overrides.")


@app.command()
@verb
def train(
    arguments: list[str] = ARGUMENTS,
    procs: int = typer.Option(None, "--procs", min=1, help="Processes on this machine [default: parallel.procs]."),
    resume: str = typer.Option(None, "--resume", metavar="RUN", help="Continue this run from its last checkpoint."),
    init: str = typer.Option(None, "--init", metavar="MODEL", help="Start from this Hugging Face-layout folder."),
    profile: bool = typer.Option(False, "--profile", help="Record a few steps of this run with the profiler."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Train a model on 1 or more local processes (or inside an outer torchrun).

    Metrics, checkpoints, the exported model and the plan's prediction beside the measurement are left in a run.
    SIGTERM and Ctrl-C write a checkpoint and end with exit code 0 and status "interrupted"; --resume continues.
    """
    overrides = _overrides(arguments, procs, init)
    job = _job(arguments, overrides, resume, runs)
    from ridgeline.parallel.mesh import outer_world
    from ridgeline.profiling import ProfileSpec
    from ridgeline.train import train as train_job
    from ridgeline.train.worker import leave

    rank, world = outer_world() or (0, 1)
    if world == 1:
        _prepare(job)
    target = _resumed_in_place(job, resume, runs) if profile and resume else None
    run = train_job(job, run=target, resume=resume, profile=ProfileSpec() if profile else None, runs_root=runs)
    if rank == 0:
        _show(run, as_json)
    if world > 1:
        leave(0)


def _prepare(job: JobConfig) -> None:
    """What takes long before the first step, under its own progress bars: the dataset and the device's ceilings."""
    from ridgeline.cli.data import build_bar
    from ridgeline.cli.env import measure_with_progress
    from ridgeline.train.source import ensure_dataset
    from ridgeline.train.worker import say_on_stderr

    with build_bar() as progress:
        ensure_dataset(job.data, say_on_stderr, progress)
    measure_with_progress(refresh=False, quick=False, device=None)


def _overrides(arguments: list[str] | None, procs: int | None, init: str | None) -> list[str]:
    overrides = [argument for argument in arguments or [] if "=" in argument]
    if init is not None:
        overrides.append(f"model.init={init}")
    if procs is not None:
        overrides.append(f"parallel.procs={procs}")
    return overrides


def _job(arguments: list[str] | None, overrides: list[str], resume: str | None, runs: Path | None) -> JobConfig:
    files = [argument for argument in arguments or [] if "=" not in argument]
    if len(files) > 1:
        raise UserError(f"one configuration at a time, got {', '.join(files)}")
    if files:
        return _fitting(partial(load_config, files[0]), overrides)
    if resume is None:
        raise UserError("give a configuration (such as examples/demo.toml) or --resume RUN")
    from ridgeline.train.start import continued_config

    return _fitting(partial(continued_config, Run.open(resume, runs)), overrides)


def _fitting(load: Callable[[list[str]], JobConfig], overrides: list[str]) -> JobConfig:
    """Load; where ``--procs`` leaves a rank fewer rows than a micro-batch, the micro-batch is cut to them, and said."""
    try:
        return load(overrides)
    except UserError:
        others = [override for override in overrides if not override.startswith("parallel.procs=")]
        if len(others) == len(overrides) or any("micro_batch_size" in override for override in others):
            raise
        train, procs = load(others).train, int(overrides[-1].partition("=")[2])
        rows, left = divmod(train.global_batch_size, procs)
        if left or rows >= train.micro_batch_size:
            raise
        job = load([*overrides, f"train.micro_batch_size={rows}"])
        console(True).print(
            f"train.micro_batch_size {train.micro_batch_size} -> {rows}: the share of each of {procs} processes"
        )
        return job


def _resumed_in_place(job: JobConfig, resume: str, runs: Path | None) -> Run:
    """``--resume --profile``: the profiled steps belong to the run that goes on."""
    run = Run.open(resume, runs)
    run.reopen()
    run.save_json("config.json", job.model_dump(mode="json"))
    return run


def _show(run: Run, as_json: bool) -> None:
    rows = run.load_json("comparison.json") or []
    verdict = _verdict(run)
    if as_json:
        document = {"run": run.id, "status": run.info["status"], "summary": run.summary, "predicted": rows}
        emit({**document, "verdict": verdict} if verdict else document)
        return
    out, summary = console(), run.summary
    if run.info["status"] == "interrupted":
        out.print(
            f"interrupted at step {summary.get('steps', 0)}; continue with: ridgeline train --resume {run.id}",
            soft_wrap=True,
        )
    out.print(_figures(summary), soft_wrap=True)
    if rows:
        out.print(_comparison(rows))
    out.print(
        f"MFU = {summary.get('mfu_formula')}; against {summary.get('mfu_denominator')}", style="dim", soft_wrap=True
    )
    if summary.get("mfu") and summary["mfu"] > IMPLAUSIBLE_MFU:
        out.print("this is above 90 %: the ceiling was probably measured on a busy machine; `ridgeline env --refresh`")
    if verdict:
        out.print(verdict, soft_wrap=True)
    if (run.path / "artifacts/model").is_dir():
        out.print(f"model {run.path / 'artifacts/model'}", soft_wrap=True)
    out.print(f"run {run.id}", soft_wrap=True)


def _verdict(run: Run) -> str | None:
    """The profile's one line, when steps of this run were recorded."""
    if not (run.path / "artifacts/traces").is_dir():
        return None
    from ridgeline.profiling.session import record

    return record(run).verdict.line


def _figures(summary: dict[str, Any]) -> str:
    parts = [f"step {summary.get('steps')}", f"loss {_number(summary.get('final_loss'))}"]
    if "validation_loss" in summary:
        parts.append(f"validation loss {_number(summary['validation_loss'])}")
    if summary.get("compile_seconds") is not None:
        breaks, again = summary["graph_breaks"], summary["recompiles"]
        parts.append(f"compiled in {summary['compile_seconds']:.1f} s, {breaks} graph breaks, {again} recompiles")
    if summary.get("skipped_steps"):
        parts.append(f"{summary['skipped_steps']} steps skipped")
    return ", ".join(parts)


def _comparison(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "predicted", "measured", "predicted / measured"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        cells = [_number(row["predicted"], row["unit"]), _number(row["measured"], row["unit"])]
        table.add_row(row["name"], *cells, "-" if row["ratio"] is None else f"{row['ratio']:.2f}")
    return table


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
