"""``ridgeline trace``: any PyTorch trace, from what it lacks to what to try."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ridgeline.cli.common import JSON_OPTION, console, emit, new_app, verb
from ridgeline.cli.frames import frame_table

if TYPE_CHECKING:
    import polars as pl

    from ridgeline.profiling.trace import Trace

app = new_app("Analyse a PyTorch trace: a file, a folder of ranks, a glob, or a merged file.")

PATH = typer.Argument(..., metavar="PATH", help="A trace (.json, .gz, .zst), a folder of ranks, a glob, or a run.")
STEP = typer.Option(None, "--step", help="Only this profiler step [default: the whole capture].")
RANK = typer.Option(None, "--rank", help="Only this rank.")
TOP = typer.Option(15, "--top", min=1, help="Rows to print; --json prints all.")


@app.command()
@verb
def summary(path: str = PATH, step: int = STEP, as_json: bool = JSON_OPTION) -> None:
    """What the capture lacks, where each rank's time went, who made others wait, what to try."""
    from ridgeline.profiling.summary import summarize

    trace = load(path)
    document = summarize(trace, step)
    if as_json:
        emit(document)
        return
    print_integrity(document["integrity"])
    print_rows(
        document["ranks"], f"Where the time went, {'step ' + str(step) if step is not None else 'whole capture'}"
    )
    if document["stragglers"]:
        print_rows(document["stragglers"], "Ranks that made others wait")
    elif len(trace.tables) > 1:
        console().print("no straggler")
    print_findings(document["findings"], 5)


@app.command()
@verb
def explain(path: str = PATH, step: int = STEP, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """Findings in seconds per step, each with its evidence, one knob and the gain to expect."""
    from ridgeline.profiling.explain import explain as judge
    from ridgeline.profiling.trust import defects

    trace = load(path, stacks=True)
    lacking = defects(trace)
    findings = [one.to_dict() for one in judge(trace, lacking, step=step)]
    integrity = [one.to_dict() for one in lacking]
    if as_json:
        emit({"integrity": integrity, "findings": findings})
        return
    print_integrity(integrity)
    print_findings(findings, top)


def load(path: str, stacks: bool = False) -> Trace:
    """Read with a progress bar; a run's id stands for the traces it holds."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from ridgeline.profiling.trace import Trace

    with Progress("reading", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console(True)) as bar:
        task = bar.add_task("read", total=None)
        trace = Trace.load(
            located(path), stacks=stacks, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
        bar.remove_task(task)
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


def print_integrity(defects: Sequence[dict[str, Any]]) -> None:
    """The head of every report."""
    out = console()
    if not defects:
        out.print("integrity: nothing is missing", style="dim")
    for one in defects:
        where = "" if one["rank"] is None else f"rank {one['rank']}: "
        unsafe = f" [yellow]unsafe: {', '.join(one['unsafe'])}[/yellow]" if one["unsafe"] else ""
        out.print(f"integrity: {where}{one['message']}{unsafe}", soft_wrap=True)


def print_rows(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Plain rows as a table."""
    import polars as pl

    console().print(frame_table(pl.DataFrame(rows, infer_schema_length=None), title))


def print_findings(findings: Sequence[dict[str, Any]], top: int) -> None:
    """Ranked, each with evidence and knob."""
    out = console()
    if not findings:
        out.print("no finding: nothing we know is predicted to save time")
    for at, one in enumerate(findings[:top], 1):
        low, high = one["gain_seconds"]
        knob = f" Try {one['knob']}: saves {low:.4f} to {high:.4f} s {one['per']}." if one["knob"] else " No knob."
        unsafe = f" [yellow]Unsafe: {', '.join(one['unsafe'])}.[/yellow]" if one["unsafe"] else ""
        out.print(
            f"{at}. [bold]{one['title']}[/bold]: {one['seconds']:.4f} s {one['per']}.{knob}{unsafe}", soft_wrap=True
        )
        out.print(f"   {one['evidence']}", style="dim", soft_wrap=True)


def show(frame: pl.DataFrame, title: str, top: int, as_json: bool, why: str | None = None) -> None:
    """A frame as a table or as rows; an empty one with the reason."""
    if as_json:
        emit({"rows": frame.to_dicts(), "why_empty": why if frame.is_empty() else None})
    elif frame.is_empty():
        console().print(why or "nothing to show")
    else:
        console().print(frame_table(frame, title, top=top))
