"""``ridgeline env``: what this machine is, what it reaches, and what its maker says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ridgeline.cli.common import JSON_OPTION, RUNS_OPTION, console, emit, new_app, verb
from ridgeline.cli.units import human_bytes, human_rate

app = new_app("Devices and their measured ceilings, beside the datasheet's.")


@app.command()
@verb
def env(
    refresh: bool = typer.Option(False, "--refresh", help="Measure again instead of reading the cache."),
    quick: bool = typer.Option(
        False, "--quick", help="Smaller sizes, under 8 s; a cached measurement is used whichever it was."
    ),
    device: str = typer.Option(None, "--device", help="cpu or cuda [default: the GPU when there is one]."),
    runs: Path = RUNS_OPTION,
    as_json: bool = JSON_OPTION,
) -> None:
    """Print the inventory and the ceilings; leave a run of kind ``env``."""
    from ridgeline.hardware import inventory
    from ridgeline.runs import Run

    out = console(as_json)
    with Run.create("env", root=runs) as run:
        found = inventory()
        measured = measure_with_progress(refresh, quick, device)
        if (measured.disturbed or (measured.quick and not quick)) and not refresh:
            measured = measure_with_progress(True, quick, device)  # cached in a hurry or in company: try once more
        run.save_json("inventory.json", found)
        run.save_json("ceilings.json", measured.to_dict())
        figures = measured.to_dict()
        run.summarize(**{key: figures[key] for key in ("device", "kind", "gemm_flops_per_second", "measured_at")})
        if as_json:
            emit({"run": run.id, "inventory": found, "ceilings": figures})
            return
        print_inventory(out, found)
        print_ceilings(out, figures)
        out.print(f"run {run.path}")


def measure_with_progress(refresh: bool, quick: bool, device: str | None) -> Any:
    """:func:`ridgeline.hardware.ceilings` under a progress bar on stderr; notices are printed and stay."""
    from ridgeline.hardware import ceilings

    err = console(as_json=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("ceilings", total=1.0)

        def progress(text: str, fraction: float) -> None:
            if text.startswith("cache "):
                err.print(f"note: {text}")
            bar.update(task, completed=fraction, description=text)

        return ceilings(refresh=refresh, quick=quick, progress=progress, device=device)


def print_inventory(out: Console, found: dict[str, Any]) -> None:
    """What the machine is; a dash where the system does not tell."""
    cpu, memory = found["cpu"], found["memory"]
    features = None if cpu["features"] is None else " ".join(name for name, there in cpu["features"].items() if there)
    missing = (
        None if cpu["features"] is None else " ".join(name for name, there in cpu["features"].items() if not there)
    )
    table = Table(title="Machine", show_header=False, title_justify="left")
    quota = f", quota {cpu['quota_cores']:g}" if cpu["quota_cores"] else ""
    table.add_row("CPU", f"{cpu['name'] or '-'}")
    table.add_row(
        "sockets / cores / threads", f"{cpu['sockets'] or '-'} / {cpu['cores'] or '-'} / {cpu['threads'] or '-'}"
    )
    table.add_row("allowed here", f"{cpu['threads_allowed'] or '-'} threads{quota}; {cpu['threads_usable']} used")
    table.add_row("has", features or "-")
    table.add_row("has not", missing or "-")
    caches = [
        f"L{row['level']} {row['type'].lower()} {row['instances']} x {human_bytes(row['bytes'])}"
        for row in cpu["caches"]
    ]
    table.add_row("caches", ", ".join(caches) or "-")
    limit = f", limited to {human_bytes(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
    table.add_row(
        "memory", f"{human_bytes(memory['total_bytes'])}, {human_bytes(memory['available_bytes'])} free{limit}"
    )
    for node in found["numa"]:
        table.add_row(f"NUMA node {node['node']}", f"CPUs {node['cpus'] or '-'}, {human_bytes(node['memory_bytes'])}")
    for nic in found["nics"]:
        speed = f"{nic['bits_per_second'] / 1e9:g} Gbit/s" if nic["bits_per_second"] else "speed unknown"
        table.add_row(
            f"interface {nic['name']}", f"{nic['state'] or '-'}, {speed}{', virtual' if nic['virtual'] else ''}"
        )
    for gpu in found["gpus"]:
        table.add_row(f"GPU {gpu['index']}", f"{gpu['name']}, {human_bytes(gpu['memory_bytes'])}, {gpu['runtime']}")
    for link in found["gpu_links"] or []:
        access = "peer access" if link["peer_access"] else "no peer access"
        table.add_row(f"link {link['pair'][0]}-{link['pair'][1]}", f"{link['link'] or 'kind unknown'}, {access}")
    out.print(table)


def print_ceilings(out: Console, figures: dict[str, Any]) -> None:
    """Measured beside datasheet, with their ratio."""
    sheet = figures["datasheet"] or {"flops_per_second": {}}
    table = Table(
        title=f"Ceilings of {figures['device']} ({figures['kind']}, {figures['threads']} threads)", title_justify="left"
    )
    for title in ("", "measured", "datasheet", "measured/datasheet"):
        table.add_column(title, justify="right" if title else "left")

    def row(name: str, value: float | None, peak: float | None, unit: str) -> None:
        ratio = f"{value / peak:.1%}" if value and peak else "-"
        table.add_row(name, human_rate(value, unit), human_rate(peak, unit), ratio)

    for dtype in {**figures["gemm_flops_per_second"], **sheet["flops_per_second"]}:
        rate = figures["gemm_flops_per_second"].get(dtype)
        row(f"GEMM {dtype}", rate, sheet["flops_per_second"].get(dtype), "OP/s" if dtype == "int8" else "FLOP/s")
    row("exponentials, fp32", figures["elementwise_per_second"], None, "/s")
    row("copy (read + write)", figures["copy_bytes_per_second"], sheet.get("bytes_per_second"), "B/s")
    row("read", figures["read_bytes_per_second"], sheet.get("bytes_per_second"), "B/s")
    ranks = f"{figures['collective_ranks']} processes, {figures['backend']}, bus"
    row(f"all-reduce ({ranks})", figures["all_reduce_bytes_per_second"], None, "B/s")
    row(f"all-gather ({ranks})", figures["all_gather_bytes_per_second"], None, "B/s")
    out.print(table)
    kind = "quick measurement" if figures["quick"] else "full measurement"
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    out.print(f"{kind} of {figures['measured_at']}, {figures['seconds']:g} s, {versions}; --refresh measures again")
    for note in figures["notes"]:
        out.print(f"note: {note}")
