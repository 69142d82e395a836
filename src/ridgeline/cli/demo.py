"""``ridgeline demo``: the whole line on embedded defaults."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb

app = new_app("The whole line on embedded defaults.")


@app.command()
@verb
def demo(
    config: Path = typer.Argument(
        None, help="Configuration [default: examples/demo.toml, or quick.toml with --quick]."
    ),
    quick: bool = typer.Option(False, "--quick", help="The same line at toy size, in under 90 seconds."),
    port: int = typer.Option(None, "--port", help="Port of the endpoint [default: a free one]."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Text, tokens, plan, model, profile, endpoint, report: each stage is a public verb that is printed as it runs."""
    from ridgeline.line import default_config, run_line
    from ridgeline.runs import runs_root

    out = console(as_json)
    document = run_line(
        config or default_config(quick),
        quick=quick,
        runs=runs_root(runs),
        announce=lambda command: out.print(f"[bold blue]$[/bold blue] {command}", soft_wrap=True),
        port=port,
    )
    if as_json:
        emit(document)
        return
    table = Table("stage", "seconds", "run", title="The line")
    for name, run_id in document["runs"].items():
        table.add_row(name, f"{document['stage_seconds'][name]:.1f}", run_id or "")
    out.print(table)
    for name, value in document["figures"].items():
        out.print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    out.print(f"\n{document['seconds']:.0f} s in all. The report: [bold]{document['report']}[/bold]", soft_wrap=True)
