"""``ridgeline runs``: list, show, compare and report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb

app = new_app("List, show, compare and report runs.")


@app.command("list")
@verb
def list_(
    kind: str = typer.Option(None, "--kind", help="Only runs of this verb."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """All runs, oldest first."""
    from ridgeline.runs import list_runs

    found = list_runs(runs, kind)
    if as_json:
        emit([run.info for run in found])
        return
    table = Table("run", "status", "seconds", "headline")
    for run in found:
        table.add_row(run.id, run.info["status"], f"{run.info['seconds'] or ''}", headline(run.summary))
    console().print(table if found else "no runs yet: try `ridgeline demo`")


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
    document = {**found.info, "path": str(found.path), "config": found.config, "summary": found.summary, "files": files}
    if as_json:
        emit(document)
        return
    out = console()
    out.print(f"[bold]{found.id}[/bold]  {found.info['status']}  {found.info['seconds'] or '-'} s  {found.path}")
    out.print(f"command  {' '.join(found.info['command'])}")
    if found.info["parents"]:
        out.print(f"parents  {', '.join(found.info['parents'])}")
    if found.info["error"]:
        out.print(f"[red]error    {found.info['error']}[/red]")
    _figures(out, found.summary)
    metrics = found.metrics()
    if metrics:
        out.print(f"metrics  {len(metrics)} lines, last {_compact(metrics[-1])}")
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


def _figures(out: Console, summary: dict[str, Any]) -> None:
    if not summary:
        return
    table = Table("figure", "value", show_header=False)
    for key, value in summary.items():
        table.add_row(key, _short(value))
    out.print(table)


def _compact(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:120]
