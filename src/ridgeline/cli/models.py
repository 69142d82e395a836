"""``ridgeline models``: import a GGUF file, show what a model folder holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.cli.units import human_bytes

app = new_app("Import and inspect models.")


@app.command("import")
@verb
def import_model(
    file: str = typer.Argument(..., help="A GGUF file, or package:NAME/GLOB for one inside an installed package."),
    out: Path = typer.Argument(..., help="Folder to write: config.json, *.safetensors, tokenizer, chat template."),
    dtype: str = typer.Option("bf16", "--dtype", help="bf16, fp16 or fp32."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Turn a GGUF file into a Hugging Face-layout folder; leave a run of kind ``models``."""
    from ridgeline.models.gguf import import_gguf, resolve
    from ridgeline.runs import Run

    source = resolve(file)
    err = console(as_json=True)
    columns = (TextColumn("dequantising"), BarColumn(), MofNCompleteColumn())
    with Run.create(
        "models", "import", config={"file": str(source), "out": str(out), "dtype": dtype}, root=runs
    ) as run:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("")
            made = import_gguf(source, out, dtype, lambda done, total: bar.update(task, completed=done, total=total))
        figures = {
            "model": str(made.path),
            "family": made.config.family,
            "parameters": made.parameters,
            "dtype": made.dtype,
            "quantizations": made.quantizations,
            "source_bytes": made.source_bytes,
            "seconds": round(made.seconds, 3),
        }
        run.summarize(**figures)
        if as_json:
            emit({"run": run.id, **figures, "config": dataclasses.asdict(made.config)})
            return
        stored = ", ".join(f"{count} {kind}" for kind, count in made.quantizations.items())
        console().print(
            f"{made.path}: {made.config.family}, {made.parameters:,} parameters in {made.dtype}, "
            f"from {human_bytes(made.source_bytes)} ({stored} tensors) in {made.seconds:.1f} s"
        )
        console().print(f"run {run.path}")


@app.command("show")
@verb
def show(
    path: str = typer.Argument(..., help="A model folder, a Hugging Face id, or a .gguf file."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Family, shapes, parameters, stored types and bytes, without reading the weights."""
    from ridgeline.models.describe import describe

    found = describe(path)
    if as_json:
        emit(found)
        return
    print_model(console(), found)


def print_model(out: Console, found: dict[str, Any]) -> None:
    """The headline, the settings that differ from their neutral value, and the tensors."""
    stored = ", ".join(f"{human_bytes(size)} {dtype}" for dtype, size in found["dtype_bytes"].items())
    out.print(f"{found['path']}: {found['family']}, {found['parameters']:,} parameters, {stored}")
    settings = {name: value for name, value in found["config"].items() if value not in (None, False, (), 0)}
    out.print("  ".join(f"{name}={value}" for name, value in settings.items() if name != "family"))
    table = Table(box=None)
    for name in ("tensor", "count", "shape", "dtype", "parameters", "bytes"):
        justify: Literal["left", "right"] = "left" if name in ("tensor", "shape", "dtype") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in found["tensors"]:
        shape = " x ".join(str(size) for size in row["shape"])
        count, parameters = str(row["count"]), f"{row['parameters']:,}"
        table.add_row(row["name"], count, shape, row["dtype"], parameters, human_bytes(row["bytes"]))
    out.print(table)
