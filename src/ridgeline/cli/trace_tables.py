"""What the verbs of ``ridgeline trace`` share: reading with a progress bar, and options, and tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from ridgeline.cli.common import console, emit, say
from ridgeline.cli.frames import print_frame
from ridgeline.cli.units import human_bytes, human_seconds

if TYPE_CHECKING:
    import polars as pl

    from ridgeline.profiling.table import TraceTable
    from ridgeline.profiling.trace import Trace


PATH = typer.Argument(..., metavar="PATH", help="A trace (.json, .gz, .zst), a folder of ranks, a glob, or a run.")
STEP = typer.Option(None, "--step", help="Only this profiler step [default: the whole capture].")
RANK = typer.Option(None, "--rank", help="Only this rank.")
ROLES = typer.Option(
    None, "--roles", help="TOML or JSON of kernel name patterns to roles, for what nothing else tells."
)
HERE = typer.Option(False, "--here", help="The trace was taken on this machine: use its measured ceilings.")
TOP = typer.Option(15, "--top", min=1, help="Rows to print; --json prints all.")


def load(path: str, stacks: bool = False, roles: Path | None = None) -> Trace:
    """Read with a progress bar; a run's id stands for the traces it holds, ``roles`` for a file of the user's."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from ridgeline.profiling.trace import Trace

    err = console(True)
    columns = ("reading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("read", total=None)
        trace = Trace.load(
            located(path),
            stacks=stacks,
            roles=roles,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        bar.remove_task(task)
    if roles is not None and trace.device == "cpu":
        say(f"--roles {roles}: changes nothing, for the trace has no device work")
    return trace


def located(path: str) -> str:
    """A path or glob as it is; a run (id, folder, or ``latest``) as the folder of its traces."""
    folder = Path(path)
    if (folder / "run.json").is_file():
        return str(folder / "artifacts" / "traces")
    if folder.exists() or any(sign in path for sign in "*?[") or "/" in path or "." in path:
        return path
    from ridgeline.profiling.session import TRACES
    from ridgeline.runs import Run

    return str(Run.open(path).path / "artifacts" / TRACES)


def since_start(trace: Trace, frame: pl.DataFrame) -> pl.DataFrame:
    """Moments of a rank's clock as time since its first event, for people."""
    import polars as pl

    begun = {rank: int(table.start.min()) for rank, table in trace.tables.items()}
    moments = [name for name in ("start_ns", "end_ns", "time_ns") if name in frame.columns]
    zero = pl.col("rank").replace_strict(begun, return_dtype=pl.Int64)
    return frame.with_columns([pl.col(name) - zero for name in moments])


def print_stragglers(trace: Trace, step: int | None) -> None:
    """Who made others wait, or that nobody did, or why nobody can say."""
    found = trace.straggler_verdict(step)
    if not found.frame.is_empty():
        columns = ["rank", "caused_wait_ns", "count", "matched", "per_step_ns", "op", "operator", "evidence"]
        print_frame(found.frame, "Ranks that made others wait", columns)
    if len(trace.tables) > 1 or not found.possible:
        console().print(found.verdict, soft_wrap=True, markup=False)


def print_integrity(defects: Sequence[dict[str, Any]]) -> None:
    """The head of every report."""
    out = console()
    if not defects:
        out.print("integrity: nothing is missing", style="dim")
    for one in defects:
        where = "" if one["rank"] is None else f"rank {one['rank']}: "
        unsafe = f" [yellow]unsafe: {', '.join(one['unsafe'])}[/yellow]" if one["unsafe"] else ""
        out.print(f"integrity: {where}{escape(one['message'])}{unsafe}", soft_wrap=True)


def print_ranks(rows: Sequence[dict[str, Any]], step: int | None) -> None:
    """One line per rank; copies, unknown work and kernels only where there are any."""
    import polars as pl

    frame = pl.DataFrame(rows, infer_schema_length=None)
    empty = [name for name in ("memory_ns", "unknown_ns", "kernel_count") if not frame[name].sum()]
    shown = {"exposed_communication_ns": "exposed_ns", "overlap_fraction": "hidden_share", "kernel_count": "kernels"}
    title = f"Where the time went, {'the whole capture' if step is None else f'step {step}'}"
    print_frame(frame.drop(empty).rename({k: v for k, v in shown.items() if k not in empty}), title)


def print_findings(findings: Sequence[dict[str, Any]], top: int) -> None:
    """Ranked, each with evidence and knob."""
    out = console()
    if not findings:
        out.print("no finding: nothing we know is predicted to save time")
    for at, one in enumerate(findings[:top], 1):
        low, high = one["gain_seconds"]
        knob = (
            f" Try {escape(one['knob'])}: saves {human_seconds(low)} to {human_seconds(high)} {one['per']}."
            if one["knob"]
            else " No knob."
        )
        unsafe = f" [yellow]Unsafe: {', '.join(one['unsafe'])}.[/yellow]" if one["unsafe"] else ""
        out.print(
            f"{at}. [bold]{escape(one['title'])}[/bold]: {human_seconds(one['seconds'])} {one['per']}.{knob}{unsafe}",
            soft_wrap=True,
        )
        out.print(f"   {one['evidence']}", style="dim", soft_wrap=True, markup=False)


def print_flow_findings(findings: pl.DataFrame, top: int, least: int) -> None:
    """What the data flow says, the most bytes first."""
    out = console()
    if findings.is_empty():
        out.print(f"no finding of at least {human_bytes(least)}")
    for at, one in enumerate(findings.head(top).iter_rows(named=True), 1):
        where = f" on rank {one['rank']}" if "rank" in one else ""
        size = f"{one['count']} tensors, {human_bytes(one['bytes'])}"
        out.print(
            f"{at}. [bold]{one['finding']}[/bold]{where}, {escape(one['operator'])}: {size}. Try: {one['knob']}.",
            soft_wrap=True,
        )
        out.print(f"   the largest: {one['evidence']}", style="dim", soft_wrap=True, markup=False)


def show(
    frame: pl.DataFrame,
    title: str,
    top: int,
    as_json: bool,
    why: str | None = None,
    columns: Sequence[str] | None = None,
) -> None:
    """A frame as a table or as rows; an empty one with the reason."""
    if as_json:
        emit({"rows": frame.to_dicts(), "why_empty": why if frame.is_empty() else None})
    elif frame.is_empty():
        console().print(why or "nothing to show", markup=False)
    else:
        print_frame(frame, title, columns, top)


def measured(here: bool) -> dict[str, Any]:
    """This machine's ceilings when the trace was taken on it, else none."""
    if not here:
        return {}
    from ridgeline.hardware import ceilings

    return ceilings().to_dict()


def first_table(trace: Trace) -> TraceTable:
    return next(iter(trace.tables.values()))
