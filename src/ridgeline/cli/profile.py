"""``ridgeline profile``: where a step's time goes, and what to try."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.cli.units import human_seconds

app = new_app("Where a training step's time goes, and what to try.")

TITLES = {
    "communication": "communication (exposed)",
    "host": "host overhead",
    "memory_copies": "memory copies",
    "unknown": "unknown device work",
}


@app.command()
@verb
def profile(
    target: str = typer.Argument(..., metavar="RUN|CONFIG|TRACE", help="A training run, a TOML file, or a trace."),
    overrides: list[str] = typer.Argument(None, metavar="[section.key=value ...]", help="Change the configuration."),
    steps: int = typer.Option(3, "--steps", min=1, help="Steps to record."),
    wait: int = typer.Option(4, "--wait", min=0, help="Untraced steps before; all but the first are timed."),
    warmup: int = typer.Option(1, "--warmup", min=0, help="Traced steps that are thrown away."),
    stack: bool = typer.Option(False, "--stack", help="Record Python stacks too: larger and slower."),
    flow: bool = typer.Option(False, "--flow", help="Record who writes and reads each tensor, for `trace flow RUN`."),
    procs: int = typer.Option(None, "--procs", min=1, help="Processes on this machine [default: parallel.procs]."),
    ops: int = typer.Option(8, "--ops", min=0, help="Lines of the op table."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Record a few steps on every rank and split their time; the parts of a step sum to the step.

    RUN continues from its last checkpoint and is left as it is; CONFIG starts fresh; a trace file, or a folder with one
    per rank, from any PyTorch job is only read.
    """
    from ridgeline.profiling import ProfileSpec, profile_target

    changes = list(overrides or []) + ([f"parallel.procs={procs}"] if procs is not None else [])
    spec = ProfileSpec(wait=wait, warmup=warmup, active=steps, with_stack=stack, flow=flow)
    if int(os.environ.get("RANK", "0")) != 0:  # under an outer torchrun only rank 0 reads and prints
        from ridgeline.profiling.session import take_steps

        take_steps(target, changes, spec, runs)
        return
    result = profile_target(target, changes, spec=spec, runs_root=runs)
    if as_json:
        emit(result.to_dict())
        return
    print_profile(console(), result, ops)


def print_profile(out: Console, result: Any, ops: int = 8) -> None:
    """The split per rank, the ops, what the trace lacks, what tracing cost, and the verdict."""
    breakdown = result.breakdown
    out.print(split_table(breakdown))
    if ops:
        out.print(ops_table(breakdown, ops))
    for line in remarks(breakdown):
        out.print(f"- {line}", style="dim", soft_wrap=True, markup=False)
    out.print(f"\n[bold]{result.verdict.line}[/bold]", soft_wrap=True)
    if result.run is not None:
        out.print(f"run {result.run.path}", soft_wrap=True)


def split_table(breakdown: Any) -> Table:
    """One column per rank: seconds per step and share of it."""
    from ridgeline.profiling.session import shown_parts

    first = breakdown.ranks[0]
    counted = f"mean of {len(first.steps)} steps" if first.window == "step" else "the whole capture"
    table = Table(title=f"A step on {breakdown.device.upper()}, {counted}", title_justify="left")
    table.add_column("part")
    for rank in breakdown.ranks:
        table.add_column(f"rank {rank.rank}", justify="right")
        table.add_column("%", justify="right")
    for part in shown_parts(breakdown):
        cells = []
        for rank in breakdown.ranks:
            seconds, step = rank.mean_seconds()[part], rank.step_seconds or 1.0
            cells += [human_seconds(seconds), f"{seconds / step:.1%}"]
        table.add_row(TITLES.get(part, part), *cells)
    table.add_section()
    table.add_row("step", *(x for r in breakdown.ranks for x in (human_seconds(r.step_seconds), "100 %")))
    hidden = [sum(s.hidden_communication_ns for s in r.steps) / max(len(r.steps), 1) / 1e9 for r in breakdown.ranks]
    if any(hidden):
        table.add_row("communication (hidden)", *(x for one in hidden for x in (human_seconds(one), "inside")))
    return table


def ops_table(breakdown: Any, limit: int) -> Table:
    """The largest ops of the first rank by their own time."""
    rank = breakdown.ranks[0]
    table = Table(title=f"Largest ops of rank {rank.rank}, own time per step", title_justify="left")
    table.add_column("op", overflow="ellipsis", no_wrap=True)
    for name in ("calls", "time", "% of step"):
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    steps = max(len(rank.steps), 1)
    for row in rank.top_ops[:limit]:
        calls = f"{row.count / steps:.4g}"
        table.add_row(Text(row.name[:44]), calls, human_seconds(row.self_ns / steps / 1e9), f"{row.share:.1%}")
    return table


def remarks(breakdown: Any) -> list[str]:
    """Evidence, integrity, waiting and cost, one line each."""
    from ridgeline.profiling.integrity import describe

    first = breakdown.ranks[0]
    lines = ["evidence: " + "; ".join(f"{name}: {how}" for name, how in first.evidence.items())]
    for rank in breakdown.ranks:
        lines += [f"rank {rank.rank}: {line}" for line in describe(rank.integrity, rank.step_seconds, len(rank.steps))]
    if breakdown.missing_ranks:
        lines.append(f"traces of {len(breakdown.missing_ranks)} of {breakdown.world} ranks are not here")
    for wait in breakdown.waits:
        text = f"rank {wait.rank} waits {human_seconds(wait.waiting_seconds)} per step for others"
        lines.append(f"{text}; arrived last at {wait.last_arrivals} of {breakdown.matched_collectives} collectives")
    cost = breakdown.profiler_cost()
    if cost is None:
        lines.append("what tracing itself costs is not known: no untraced step was timed")
    else:
        traced, untraced = human_seconds(cost["traced_seconds"]), human_seconds(cost["untraced_seconds"])
        share = f"tracing costs {cost['overhead']:.1%}" if cost["overhead"] > 0 else "tracing costs less than the noise"
        lines.append(f"{share}: {traced} per traced step, {untraced} untraced")
    return lines
