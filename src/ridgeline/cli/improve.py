"""``ridgeline improve``: find what holds a job back, try the knob, prove the gain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.cli.units import human_seconds

app = new_app("Find what holds a training job back, try the knob, prove the gain.")

TARGET = typer.Argument(
    metavar="CONFIG [section.key=value ...] | -- COMMAND ...", help="A TOML file, or a training command after --."
)


@app.command()
@verb
def improve(
    target: list[str] = TARGET,
    steps: int = typer.Option(20, "--steps", min=2, help="Timed steps of every run."),
    warmup: int = typer.Option(5, "--warmup", min=1, help="Steps before, left out: compilation, allocation, caches."),
    rounds: int = typer.Option(2, "--rounds", min=1, help="Times A B B A for every knob."),
    top: int = typer.Option(3, "--top", min=0, help="Findings whose knobs are tried."),
    knob: str = typer.Option(
        None, "--knob", metavar="NAME", help="Try only this one: workers, fused, compile, autocast, ..."
    ),
    timeout: float = typer.Option(600.0, "--timeout", min=1.0, help="Seconds one run may take."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Profile a job, apply the knob of each large finding in interleaved runs, and keep what is proven.

    A command, `ridgeline improve -- python train.py --lr 1e-3` or `-- torchrun ...`, runs as it is, without edits, and is
    ended after the steps that are needed; what the script itself writes in them stays. A knob is kept when it is
    faster beyond the noise floor of this very session and the losses stay the same.
    """
    from ridgeline.profiling.improve import Plan
    from ridgeline.profiling.improve import improve as improve_job

    with _progress() as say:
        plan = Plan(warmup, steps, timeout)
        answer = improve_job(target, plan=plan, rounds=rounds, top=top, knob=knob, runs_root=runs, say=say)
    if as_json:
        emit(answer.to_dict())
    else:
        print_answer(console(), answer)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What runs now, on stderr: one line that changes on a terminal, one line each elsewhere."""
    stderr = Console(stderr=True, highlight=False)
    if not stderr.is_terminal:
        yield lambda line: stderr.print(line, soft_wrap=True, markup=False)
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda line: bar.update(task, description=line)


def print_answer(out: Console, answer: Any) -> None:
    """The table, then per finding what was seen and what to edit."""
    if not answer.rows:
        out.print(f"step {human_seconds(answer.before_seconds)}: no finding of 3 % of it or more")
    else:
        out.print(answer_table(answer))
        for number, row in enumerate(answer.rows, 1):
            _print_row(out, number, row)
    kept = [row.finding.knob.permanent for row in answer.kept]
    if kept:
        out.print(f"\nkept, {answer.speedup:.2f} times as fast together; to make it permanent:", markup=False)
        for line in kept:
            out.print(f"  {line}", soft_wrap=True, markup=False)
    else:
        out.print("\nnothing kept: the job stays as it is")
    out.print(f"run {answer.run.path}", soft_wrap=True, markup=False)


def answer_table(answer: Any) -> Table:
    """Finding, knob, predicted interval, measured gain, floor, kept or not."""
    table = Table(title=f"Seconds saved of a step of {human_seconds(answer.before_seconds)}", title_justify="left")
    for name in ("", "finding", "knob"):
        table.add_column(name, overflow="fold")
    for name in ("predicted", "measured", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kept")
    for number, row in enumerate(answer.rows, 1):
        low, high = row.finding.predicted
        measured = ["-", "-"]
        if row.gain is not None:
            measured = [_signed(row.gain.gain_seconds), human_seconds(row.gain.floor_seconds)]
        name = row.finding.knob.name if row.finding.knob else "-"
        kept = "kept" if row.kept else "no" if row.tried else "not tried"
        span = f"{human_seconds(low)} .. {human_seconds(high)}"
        table.add_row(str(number), row.finding.name, name, span, *measured, kept)
    return table


def _signed(seconds: float) -> str:
    return f"{'-' if seconds < 0 else ''}{human_seconds(abs(seconds))}"


def _print_row(out: Console, number: int, row: Any) -> None:
    place = f" at {row.finding.where}" if row.finding.where else ""
    out.print(f"{number}. {row.finding.text}{place} (rank {row.finding.rank})", soft_wrap=True, markup=False)
    verdict = "kept" if row.kept else "not kept" if row.tried else "not tried"
    out.print(f"   {verdict}: {row.why}", style="dim", soft_wrap=True, markup=False)
    if not row.kept:
        out.print(f"   {row.finding.advice}", style="dim", soft_wrap=True, markup=False)
