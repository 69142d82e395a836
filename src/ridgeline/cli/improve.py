"""``ridgeline improve``: find what holds a job back, try the knob, prove the gain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, progress_line, verb
from ridgeline.cli.units import human_bytes, human_seconds
from ridgeline.errors import UserError

app = new_app("Find what holds a training job or a server back, try the knob, prove the gain.")

TARGET = typer.Argument(
    None,
    metavar="CONFIG|RUN [section.key=value ...] | -- COMMAND ...",
    help="A TOML file, a run of train or serve, or after -- a training command or `ridgeline serve MODEL ...`.",
)


@app.command()
@verb
def improve(
    target: list[str] = TARGET,
    steps: int = typer.Option(20, "--steps", min=2, help="Timed steps of every run (of a server: passes, at most)."),
    warmup: int = typer.Option(5, "--warmup", min=1, help="Steps before, left out: compilation, allocation, caches."),
    rounds: int = typer.Option(2, "--rounds", min=1, help="Times A B B A for every knob."),
    top: int = typer.Option(3, "--top", min=0, help="Findings whose knobs are tried."),
    knob: str = typer.Option(
        None, "--knob", metavar="NAME", help="Try only this one: workers, fused, compile, autocast, ..."
    ),
    load: str = typer.Option(
        None, "--load", metavar="SxPxN", help="For a server: S requests of P prompt and N new tokens, such as 8x64x32."
    ),
    scores: bool = typer.Option(False, "--scores", help="Only list predicted against measured over all runs here."),
    timeout: float = typer.Option(600.0, "--timeout", min=1.0, help="Seconds one run may take."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Profile a job or a server, apply the knob of each large finding in interleaved runs, and keep what is proven.

    A command, `ridgeline improve -- python train.py --lr 1e-3` or `-- torchrun ...`, runs as it is, without edits, and is
    ended after the steps that are needed; what the script itself writes in them stays. A knob is kept when it is
    faster beyond the noise floor of this very session and the losses stay the same. A server is given the same load in
    every run, and its greedy answers must stay the same.
    """
    from ridgeline.profiling.improve import Plan, parse_load
    from ridgeline.profiling.improve import improve as improve_job

    if scores:
        _print_scores(target, runs, as_json)
        return
    if not target:
        raise UserError("improve: nothing to run: give a configuration, a run, or a command after --")
    given = parse_load(load) if load is not None else None
    aim = served_model(target, runs) or target
    with progress_line() as say:
        plan = Plan(warmup, steps, timeout)
        answer = improve_job(aim, load=given, plan=plan, rounds=rounds, top=top, knob=knob, runs_root=runs, say=say)
    if as_json:
        emit(answer.to_dict())
    else:
        print_answer(console(), answer)


def served_model(words: list[str], runs: Path | None) -> Any | None:
    """What ``[python -m] ridgeline serve MODEL --options`` would serve, or None for any other command."""
    program = [Path(one).name for one in words]
    at = 3 if program[1:3] == ["-m", "ridgeline"] else 1 if program[:1] == ["ridgeline"] else 0
    if program[at : at + 1] != ["serve"] or at == 0:
        return None
    from ridgeline.cli import serve
    from ridgeline.inference import resolve_model
    from ridgeline.profiling.improve import Served

    usage_error: Any = typer.BadParameter.__mro__[1]  # click's, or the one that typer brings along since 0.26
    try:
        with typer.main.get_command(serve.app).make_context("serve", words[at + 1 :]) as context:
            options = context.params
    except usage_error as error:
        raise UserError(f"serve: {error.format_message()}") from None
    folder = resolve_model(options["model"], options["runs"] or runs, lambda line: print(line, file=sys.stderr))
    names = ("dtype", "max_batch", "max_context", "prefill_chunk")
    return Served(str(folder), compile=not options["no_compile"], **{name: options[name] for name in names})


def _print_scores(target: list[str] | None, runs: Path | None, as_json: bool) -> None:
    from ridgeline.profiling.improve.scores import by_knob, collect

    if target:
        raise UserError(f"--scores lists what is recorded already and takes no job ('{target[0]}')")
    found = collect(runs)
    table = by_knob(found)
    if as_json:
        emit({"knobs": table, "scores": [one.to_dict() for one in found]})
        return
    shown = Table(title="Share of the step saved, predicted and measured", title_justify="left")
    for name in ("knob", "measured", "kept", "inside", "predicted", "gain", "off by"):
        shown.add_column(name, justify="left" if name == "knob" else "right")
    for row in table:
        span = f"{row['mean_low']:.0%} .. {row['mean_high']:.0%}"
        counts = (str(row[name]) for name in ("measured_knobs", "kept", "inside"))
        shown.add_row(row["knob"], *counts, span, f"{row['mean_measured']:.0%}", f"{row['mean_error']:.0%}")
    out = console()
    out.print(shown)
    out.print("means over measured knobs; off by: how far the gain lies outside of the predicted interval", style="dim")


def print_answer(out: Console, answer: Any) -> None:
    """The table, then per finding what was seen and what to edit."""
    if answer.load is not None:
        out.print(f"step = a pass over {answer.load}: {answer.tokens_per_second:.1f} new tokens/s", markup=False)
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
    for note in answer.notes:
        out.print(f"note: {note}", style="dim", soft_wrap=True, markup=False)
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
    if row.memory and abs(row.memory[1] / max(row.memory[0], 1) - 1) > 0.05:
        peak = " -> ".join(human_bytes(one) for one in row.memory)
        out.print(f"   peak memory {peak}", style="dim", soft_wrap=True, markup=False)
    if not row.kept:
        out.print(f"   {row.finding.advice}", style="dim", soft_wrap=True, markup=False)
