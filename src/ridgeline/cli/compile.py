"""``ridgeline compile``: what torch.compile makes of a model, how accurate it is, and a package that starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, console, emit, new_app, say, verb
from ridgeline.cli.units import human_count, human_seconds
from ridgeline.errors import UserError

app = new_app("What torch.compile makes of a model, how accurate it is, and a package that starts fast.")


@app.callback()
def compile_verbs() -> None:
    """What torch.compile makes of a model, how accurate it is, and a package that starts fast."""


TARGET = typer.Argument(metavar="TARGET", help="module:name, file.py:name, a model folder, or 'demo'.")
BATCH = typer.Option(1, "--batch", min=1, help="Sequences, for a language model.")
SEQ_LEN = typer.Option(64, "--seq-len", min=1, help="Tokens of each, for a language model.")
SEED = typer.Option(0, "--seed", help="Seed of random weights and inputs.")


@app.command()
@verb
def view(
    target: str = TARGET,
    out: Path = typer.Option(Path("compile.html"), "--out", metavar="FILE", help="The page to write."),
    device: str = typer.Option(
        None, "--device", help="Bounds on this device: H100 or a datasheet row [default: this machine, measured]."
    ),
    backward: bool = typer.Option(False, "--backward", help="With gradients: forward and backward graphs."),
    batch: int = BATCH,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    as_json: bool = JSON_OPTION,
) -> None:
    """Python, torch IR, ATen IR, loops before and after fusion and generated code, side by side in one page.

    A click on a line lights up what it came from and what it became; fused kernels show the bytes and FLOPs they
    must move and compute, and what bounds them.
    """
    from ridgeline.compiler.target import resolve
    from ridgeline.compiler.view.collect import collect
    from ridgeline.compiler.view.roofline import device_named
    from ridgeline.report.compile_page import write_compile_page

    check_out(out, "--out")
    limits = device_named(device, lambda text, part: say(f"measuring this machine: {text}"))
    found = resolve(target, seed, batch, seq_len)
    say(f"compiling {found.name} with Inductor")
    result = collect(found, limits, backward)
    write_compile_page(result.to_dict(), out)
    kernels = [kernel.to_dict() for kernel in result.kernels]
    totals = result.totals()
    if as_json:
        emit({"file": str(out), "device": limits.to_dict(), "totals": totals, "kernels": kernels})
        return
    screen = console()
    screen.print(kernel_table(result.kernels, limits.name))
    line = f"graphs {totals['graphs']}, kernels {totals['kernels']}; {_bytes(totals['bytes_moved'])} moved "
    line += f"({_bytes(totals['bytes_unfused'])} without fusion), at best {_time(totals['floor_seconds'])}"
    screen.print(line, soft_wrap=True)
    screen.print(f"page {out}", soft_wrap=True, markup=False)


@app.command()
@verb
def accuracy(
    target: str = TARGET,
    backend: str = typer.Option(
        "inductor", "--backend", help="A registered backend, or the function module:name or file.py:name."
    ),
    repro: Path = typer.Option(Path("repro.py"), "--repro", metavar="FILE", help="Written when compiled is worse."),
    check: bool = typer.Option(False, "--check", help="Exit 1 when compiled is less accurate than eager."),
    batch: int = BATCH,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    as_json: bool = JSON_OPTION,
) -> None:
    """Eager and compiled against float64: which is closer, for every output and gradient.

    When compiled is more than twice as far away, the operator responsible is found by bisection, and a script that
    shows the fault by itself is written.
    """
    from ridgeline.compiler.accuracy.check import check as check_accuracy
    from ridgeline.compiler.target import resolve

    check_out(repro, "--repro")
    result = check_accuracy(resolve(target, seed, batch, seq_len), backend, repro, say)
    if as_json:
        emit(result.to_dict())
    else:
        print_accuracy(result)
    if check and result.worse:
        raise typer.Exit(1)


def print_accuracy(result: Any, most: int = 12) -> None:
    """The verdict, the tensors with the largest errors, and who is to blame."""
    screen = console()
    table = Table(
        title="Distance from float64: relative (2-norm) and largest absolute",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("tensor", overflow="fold")
    for name in ("eager", "compiled", "max eager", "max comp."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("closer", no_wrap=True)
    for one in sorted(result.rows, key=lambda row: (not row.worse, -row.compiled))[:most]:
        numbers = (one.eager, one.compiled, one.eager_largest, one.compiled_largest)
        closer = "eager (worse)" if one.worse else one.closer
        name = one.name.replace("gradient of", "grad")
        table.add_row(name, *(f"{value:.2g}" for value in numbers), closer)
    screen.print(table)
    if len(result.rows) > most:
        screen.print(f"and {len(result.rows) - most} more; --json has all of them")
    screen.print(result.verdict, soft_wrap=True, markup=False)
    if result.worse:
        _print_blame(screen, result)


def _print_blame(screen: Any, result: Any) -> None:
    if result.blame is None:
        screen.print("no graph alone shows it: the difference comes from several graphs together, or from guards")
        return
    found = result.blame
    place = f" at {found.file}:{found.line}" if found.file else ""
    company = f", together with {', '.join(found.company)}" if found.company else ", alone"
    screen.print(
        f"first responsible: {found.operator} (node {found.node}){place}{company}", soft_wrap=True, markup=False
    )
    cure = "; keeping eager's roundings cures it (emulate_precision_casts)" if found.cured_by_roundings else ""
    screen.print(f"it goes wrong in {found.stage}{cure}", soft_wrap=True, markup=False)
    if result.repro is not None:
        shown = "shows it" if result.repro_confirmed else "does NOT show it in a process of its own"
        screen.print(f"{result.repro} {shown} (inputs {result.repro_inputs})", soft_wrap=True, markup=False)


@app.command()
@verb
def package(
    target: str = TARGET,
    out: Path = typer.Argument(metavar="OUT", help="Folder to write; a package that is there is replaced."),
    program: bool = typer.Option(True, "--program/--no-program", help="The model compiled ahead of time."),
    cache: bool = typer.Option(True, "--cache/--no-cache", help="The compiler's caches, for torch.compile."),
    max_batch: int = typer.Option(64, "--max-batch", min=2, help="Largest batch, for a language model."),
    batch: int = BATCH,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    as_json: bool = JSON_OPTION,
) -> None:
    """A compiled model and the compiler's caches in one folder, for processes that must start fast.

    `ridgeline.compiler.package.load.load(OUT)` gives the model, with any batch and length, and needs no C++ compiler;
    `ridgeline compile restore OUT` puts the caches where torch.compile looks for them. A machine or a torch that the
    package was not made for is refused by name.
    """
    from ridgeline.compiler.package.build import Wanted, build
    from ridgeline.compiler.target import resolve

    if not program and not cache:
        raise UserError("--no-program --no-cache: nothing is left to write")
    wanted = Wanted(target, program, cache, max_batch, seed, batch, seq_len)
    document = build(resolve(target, seed, batch, seq_len), wanted, out, say)
    if as_json:
        emit({"folder": str(out), **document})
        return
    screen = console()
    for name, about in document["files"].items():
        screen.print(f"{out / name}  {_bytes(about['bytes'])}", soft_wrap=True, markup=False)
    made = document["made_for"]
    screen.print(f"for torch {made['torch']} on {made['architecture']}, {made['device']}", soft_wrap=True, markup=False)
    if program:
        shapes = ", ".join(" x ".join(map(str, one["shape"])) for one in document["inputs"])
        error = document["largest_relative_error"]
        screen.print(f"inputs {shapes}; differs from the model by at most {error:.2g}", soft_wrap=True, markup=False)


@app.command()
@verb
def restore(
    folder: Path = typer.Argument(metavar="PACKAGE", help="A folder that `compile package` wrote."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Put a package's caches where torch.compile looks for them on this machine."""
    from ridgeline.compiler.package.load import restore as restore_cache

    target, written = restore_cache(folder)
    if as_json:
        emit({"folder": str(target), "files": written})
    else:
        console().print(f"{written} files written to {target}", soft_wrap=True, markup=False)


@app.command()
@verb
def partition(
    target: str = TARGET,
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would run where; compile nothing."),
    engine: str = typer.Option("openvino", "--engine", help="The engine that takes what it supports."),
    training: bool = typer.Option(False, "--training", help="With gradients: the graphs of a training step."),
    batch: int = BATCH,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    as_json: bool = JSON_OPTION,
) -> None:
    """Which parts of a model an external engine would take: operators, bytes across each border, refusals with reasons."""
    from ridgeline.compiler.backend.partition import dry_run as partition_dry_run
    from ridgeline.compiler.failures import compiling
    from ridgeline.compiler.target import resolve

    if not dry_run:
        raise UserError(
            "partition: only --dry-run is a verb; to run it, torch.compile with the backend's engine option"
        )
    found = resolve(target, seed, batch, seq_len)
    with compiling(found.name):
        report = partition_dry_run(
            lambda *values: found.call(*values, **found.kwargs), *found.args, engine=engine, training=training
        )
    if as_json:
        emit({"target": found.name, **report.to_dict()})
    else:
        console().print(str(report), soft_wrap=True, markup=False)


def check_out(file: Path, option: str) -> None:
    """Refuse a file in a folder that is not there, before any work.

    Raises:
        UserError: there is no such folder.
    """
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: no folder {file.parent}")


def kernel_table(kernels: list[Any], device: str, most: int = 12) -> Table:
    """The kernels with the longest floors."""
    table = Table(
        title=f"Predicted on {device}, from the fusions made here",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("kernel", no_wrap=True)
    for name in ("moves", "FLOP", "FLOP/B", "at best"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    table.add_column("from", overflow="fold", min_width=12)
    for one in sorted(kernels, key=lambda kernel: -(kernel.floor_seconds or 0.0))[:most]:
        place = f"{Path(one.sources[0]['file']).name}:{one.sources[0]['line']}" if one.sources else "-"
        intensity = "-" if one.intensity is None else f"{one.intensity:.3g}"
        floor = "-" if one.floor_seconds is None else _time(one.floor_seconds)
        flops = "-" if one.flops is None else human_count(one.flops)
        name = one.name.removeprefix("cpp_fused_").removeprefix("triton_").removeprefix("torch.ops.")
        name = name if len(name) <= 17 else f"{name[:11]}...{name[-3:]}"
        table.add_row(name, _bytes(one.bytes_moved), flops, intensity, floor, one.bound, place)
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count % 1 else f"{int(count)} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _time(seconds: float) -> str:
    return f"{seconds * 1e9:.3g} ns" if seconds < 1e-6 else human_seconds(seconds)
