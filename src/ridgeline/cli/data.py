"""``ridgeline data``: build a dataset, ask what became of a document, look at what was built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb

if TYPE_CHECKING:
    from ridgeline.data import BuildReport, Fate

app = new_app("Build a token dataset from raw text; ask why a document was dropped.")

DATASET_OPTION = typer.Option(None, "--dataset", help="Folder of the dataset [default: that of the latest data run].")


@app.command()
@verb
def build(
    config: Path = typer.Argument(help="TOML file with a [data] table."),
    overrides: list[str] = typer.Argument(None, help="section.key=value, such as data.workers=2."),
    rebuild: bool = typer.Option(False, "--rebuild", help="Start anew where another configuration's work lies."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Read, filter, deduplicate, tokenise, split and shard a corpus. Run it again to continue after a kill."""
    from ridgeline.config import load_config
    from ridgeline.data import build as build_dataset
    from ridgeline.runs import Run

    job = load_config(config, overrides or ())
    with Run.create("data", job.data.name, config=job.model_dump(mode="json"), root=runs) as run:
        with build_bar() as progress:
            report = build_dataset(job.data, progress, rebuild=rebuild)
        document = {"run": run.id, **report.to_dict(), "folder": str(Path(report.folder).resolve())}
        run.save_json("report.json", document)
        run.summarize(folder=document["folder"], **report.figures())
    if as_json:
        emit(document)
    else:
        _print_report(report, run.id)


@app.command()
@verb
def why(
    document: str = typer.Argument(
        metavar="DOC", help="Id, source path or its end, SOURCE@OFFSET, or a unique beginning."
    ),
    dataset: Path = DATASET_OPTION,
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """What became of a document, by which rule, and every value that was measured on it."""
    from ridgeline.data import why as ask

    fate = ask(dataset or _latest(runs), document)
    if as_json:
        emit(fate.to_dict())
    else:
        _print_fate(fate)


@app.command()
@verb
def show(
    dataset: Path = typer.Argument(None, help="Folder of the dataset [default: that of the latest data run]."),
    verify: bool = typer.Option(False, "--verify", help="Compare the checksum of every file too."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """What a dataset holds."""
    from ridgeline.data import Dataset

    found = Dataset.open(dataset or _latest(runs))
    if verify:
        found.verify()
    if as_json:
        emit({"path": str(found.path), "verified": verify, **found.manifest})
        return
    manifest, out = found.manifest, console()
    checked = "checksums agree" if verify else "sizes agree; --verify compares checksums"
    out.print(f"[bold]{manifest['name']}[/bold]  {found.path}  ({checked})")
    sources = manifest["sources"]
    size = sum(source["bytes"] for source in sources)
    out.print(f"sources      {len(sources):,} files, {size / 1e6:,.1f} MB: {', '.join(manifest['config']['sources'])}")
    out.print(
        f"vocabulary   {found.vocab_size:,} tokens, {manifest['dtype']}, end of document {manifest['end_token']} "
        f"= {found.end_token_id}, hash {found.vocab_hash[:12]}"
    )
    out.print(f"fingerprint  {found.fingerprint}")
    out.print(_table(manifest["documents"], manifest["splits"]))


def _print_report(report: BuildReport, run_id: str) -> None:
    out = console()
    documents = {"read": report.documents, "kept": report.kept, "dropped": report.dropped}
    out.print(_table(documents, report.splits))
    out.print(
        f"{report.files:,} files, {report.source_bytes / 1e6:,.1f} MB; vocabulary {report.vocab_size:,} "
        f"({report.dtype}, hash {report.vocab_hash[:12]})"
    )
    if report.reused:
        out.print(f"already built: {report.folder} ({report.seconds:.1f} s to check)")
    else:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.passes.items())
        workers = f"{report.workers} process{'es' if report.workers > 1 else ''}"
        out.print(
            f"[bold]{report.seconds:.1f} s[/bold], {report.megabytes_per_second:.2f} MB/s of source on {workers} ({parts})"
        )
    if report.resumed_shards:
        out.print(f"{report.resumed_shards:,} shards were there from an earlier build")
    for note in report.notes:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(f"dataset {report.folder}   run {run_id}")


def _table(documents: Any, splits: Any) -> Any:
    from rich.table import Table

    table = Table("", "documents", "share", "tokens")
    for column in table.columns[1:]:
        column.justify = "right"
    read = max(documents["read"], 1)
    for name, split in splits.items():
        count = split["documents"]
        table.add_row(f"kept: {name}", f"{count:,}", f"{count / read:.1%}", f"{split['tokens']:,}")
    for reason, count in documents["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}", f"{count / read:.1%}", "")
    table.add_section()
    tokens = sum(split["tokens"] for split in splits.values())
    table.add_row("read", f"{documents['read']:,}", "", f"{tokens:,}")
    return table


def _print_fate(fate: Fate) -> None:
    from rich.table import Table

    from ridgeline.data.features import FEATURES

    out, row = console(), fate.row
    place = f" @ {row['offset']:,}" if row["offset"] else ""
    out.print(f"[bold]{row['id']}[/bold]  {row['source']}{place}  {row['length']:,} bytes", soft_wrap=True)
    out.print(fate.line, soft_wrap=True)
    if row["broken"] and "," in row["broken"]:
        out.print(f"rules broken: {row['broken'].replace(',', ', ')}", soft_wrap=True)
    if row["characters"] is None or row["characters"] != row["characters"]:
        return
    limits: dict[str, list[str]] = {}
    for rule in fate.limits:
        limits.setdefault(rule.feature, []).append(f"{'>=' if rule.side == 'min' else '<='} {rule.limit:g}")
    broken = {rule.feature for rule in fate.limits if rule.name in (row["broken"] or "").split(",")}
    table = Table("measured", "value", "limit", "")
    for name in FEATURES:
        verdict = "[red]broken[/red]" if name in broken else "ok" if name in limits else ""
        table.add_row(name, f"{row[name]:.4g}", " and ".join(limits.get(name, [])), verdict)
    out.print(table)


def _latest(runs: Path | None) -> Path:
    """The dataset of the newest data run that left one."""
    from ridgeline.errors import UserError
    from ridgeline.runs import list_runs

    for run in reversed(list_runs(runs, "data")):
        folder = run.summary.get("folder") or run.config.get("data", {}).get("path")
        if folder and Path(folder).is_dir():
            return Path(folder)
    raise UserError("no dataset: no data run left one here; name its folder")


@contextmanager
def build_bar() -> Iterator[Callable[[str, int, int | None, str], None]]:
    """A progress bar on stderr, one line per pass; nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    stderr = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<17}"),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show_progress(stage: str, done: int, total: int | None, unit: str) -> None:
            if stage not in tasks:
                for other in tasks.values():
                    bar.update(other, total=1, completed=1)
                tasks[stage] = bar.add_task(stage, total=total, done="")
            text = f"{done / 1e6:,.1f} M {unit}" if done >= 1e6 else f"{done:,} {unit}"
            bar.update(tasks[stage], completed=done if total else 0, total=total, done=text)

        yield show_progress
