"""``ridgeline runs``: list, show, compare and report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, say, verb
from ridgeline.errors import UserError

app = new_app("List, show, compare and report runs.")

PIPED = 1000  # columns of a list that no terminal shows: what a headline may take


@app.command("list")
@verb
def list_(
    kind: str = typer.Option(None, "--kind", help="Only runs of this verb."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """All runs, oldest first."""
    from ridgeline.runs.run import scan_runs

    found, damaged = scan_runs(runs, kind)
    if as_json:
        emit([{**run.info, "status": run.status} for run in found])
    else:
        out = console()
        rows = [[run.id, run.status, f"{run.info['seconds'] or ''}", _headline_of(run, damaged)] for run in found]
        if rows:
            _print_list(out, rows)
        else:
            out.print("no runs yet: try `ridgeline demo`")
    for line in damaged:
        say(line)


def _headline_of(run: Any, damaged: list[str]) -> str:
    try:
        return headline(run.summary)
    except UserError as error:
        damaged.append(str(error))
        return "summary.json is damaged"


def _print_list(out: Console, rows: list[list[str]]) -> None:
    """Only the headline gives way to a narrow terminal: an id cut short is of no use. A pipe gets whole lines."""
    names = ["run", "status", "seconds", "headline"]
    table = Table()
    for name in names[:3]:
        table.add_column(name, no_wrap=True)
    table.add_column(names[3], overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    fixed = sum(max(len(row[column]) for row in (names, *rows)) for column in range(3))
    least = fixed + len(names[3]) + 3 * len(names) + 1  # a border and two blanks for each column, and the last border
    out.width = max(out.width if out.is_terminal else PIPED, least)
    out.print(table)


@app.command()
@verb
def show(
    run: str = typer.Argument(help="Run id, unique prefix, folder, or latest[:KIND]."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """One run: what it was, its configuration, figures and files."""
    from ridgeline.runs import Run

    found = Run.open(run, runs)
    files = sorted(str(p.relative_to(found.path)) for p in found.path.rglob("*") if p.is_file())
    document = {**found.info, "status": found.status, "path": str(found.path), "config": found.config}
    document |= {"summary": found.summary, "files": files}
    if as_json:
        emit(document)
        return
    out = console()
    seconds = found.info["seconds"] or "-"
    out.print(f"[bold]{found.id}[/bold]  {found.status}  {seconds} s  {escape(str(found.path))}", soft_wrap=True)
    for what, command in (("command", found.info["command"]), *(("resumed", again) for again in found.info["resumes"])):
        out.print(f"{what}  {' '.join(map(str, command))}", markup=False, soft_wrap=True)
    if found.info["parents"]:
        out.print(f"parents  {', '.join(map(str, found.info['parents']))}", markup=False, soft_wrap=True)
    if found.info["error"]:
        out.print(f"error    {found.info['error']}", style="red", markup=False, soft_wrap=True)
    _figures(out, found.summary)
    _metrics(out, found)
    out.print(f"files    {', '.join(files[:12])}{f' and {len(files) - 12} more' if len(files) > 12 else ''}")


@app.command()
@verb
def compare(
    a: str = typer.Argument(help="The run to compare against."),
    b: str = typer.Argument(help="The run that changed something."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """What differs in the configuration first, then speed, memory and quality."""
    from ridgeline.runs import Run, compare_runs

    result = compare_runs(Run.open(a, runs), Run.open(b, runs))
    if as_json:
        emit(result.to_dict())
        return
    out = console()
    factors = Table("factor", "where", "A", "B", title="What differs")
    for row in result.differences:
        factors.add_row(row.key, row.where, str(row.a), str(row.b))
    out.print(factors if result.differences else "What differs: nothing")
    figures = Table("figure", "A", "B", "B / A", title="What it did")
    for figure in result.figures:
        ratio = f"{figure.ratio:.3f}" if figure.ratio is not None else "-"
        figures.add_row(f"{figure.group}: {figure.key}", f"{figure.a:.6g}", f"{figure.b:.6g}", ratio)
    out.print(figures)
    out.print(f"[bold]{result.attribution}[/bold]")


@app.command()
@verb
def report(
    run: list[str] = typer.Argument(help="One or more runs; a demo run brings the runs of its stages along."),
    out: Path = typer.Option(
        None, "--out", help="HTML file to write [default: artifacts/report.html of the first run]."
    ),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """One self-contained HTML report."""
    from ridgeline.report import write_report
    from ridgeline.runs import Run

    started = time.perf_counter()
    found = [Run.open(reference, runs) for reference in run]
    target = out or found[0].artifact("report.html")
    write_report(found, target)
    if as_json:
        emit({"report": str(target), "runs": [item.id for item in found]})
    else:
        console().print(f"{target} ({target.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - started:.1f} s)")


def headline(summary: dict[str, Any]) -> str:
    """The few figures worth a line in the list."""
    wanted = (
        "final_loss",
        "validation_loss",
        "tokens_per_second",
        "mfu",
        "bound_by",
        "ttft_p50",
        "documents",
        "tokens",
    )
    return "  ".join(f"{key} {_short(summary[key])}" for key in wanted if summary.get(key) is not None)


def _metrics(out: Console, run: Any) -> None:
    """How many lines, and the last; a damaged line is named, and the rest of the run shown all the same."""
    try:
        metrics = run.metrics()
    except UserError as error:
        say(str(error))
        return
    if metrics:
        out.print(f"metrics  {len(metrics)} lines, last {_compact(metrics[-1])}", markup=False)


def _figures(out: Console, summary: dict[str, Any]) -> None:
    if not summary:
        return
    table = Table("figure", "value", show_header=False)
    for key, value in summary.items():
        table.add_row(escape(key), escape(_short(value)))
    out.print(table)


def _compact(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:120]
