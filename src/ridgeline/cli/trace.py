"""``ridgeline trace``: any PyTorch trace, from what it lacks to what to try."""

from __future__ import annotations

from pathlib import Path

import typer

from ridgeline.cli.common import JSON_OPTION, console, emit, new_app, verb
from ridgeline.cli.frames import print_frame
from ridgeline.cli.trace_memory import flow, memory
from ridgeline.cli.trace_tables import (
    HERE,
    PATH,
    RANK,
    ROLES,
    STEP,
    TOP,
    first_table,
    load,
    measured,
    print_findings,
    print_integrity,
    print_ranks,
    print_stragglers,
    show,
    since_start,
)
from ridgeline.errors import UserError

app = new_app("Analyse a PyTorch trace: a file, a folder of ranks, a glob, or a merged file.")


@app.command()
@verb
def summary(path: str = PATH, step: int = STEP, roles: Path = ROLES, as_json: bool = JSON_OPTION) -> None:
    """What the capture lacks, where each rank's time went, who made others wait, what to try."""
    from ridgeline.profiling.summary import summarize

    trace = load(path, roles=roles)
    document = summarize(trace, step)
    if as_json:
        emit(document)
        return
    print_integrity(document["integrity"])
    print_ranks(document["ranks"], step)
    print_stragglers(trace, step)
    print_findings(document["findings"], 5)


@app.command()
@verb
def explain(
    path: str = PATH, step: int = STEP, top: int = TOP, roles: Path = ROLES, as_json: bool = JSON_OPTION
) -> None:
    """Findings in seconds per step, each with its evidence, one knob and the gain to expect."""
    from ridgeline.profiling.explain import explain as judge
    from ridgeline.profiling.trust import defects

    trace = load(path, stacks=True, roles=roles)
    lacking = defects(trace)
    findings = [one.to_dict() for one in judge(trace, lacking, step=step)]
    integrity = [one.to_dict() for one in lacking]
    if as_json:
        emit({"integrity": integrity, "findings": findings})
        return
    print_integrity(integrity)
    print_findings(findings, top)


@app.command()
@verb
def kernels(
    path: str = PATH,
    by: str = typer.Option("name", "--by", help="name, operator, module or shape."),
    step: int = STEP,
    rank: int = RANK,
    top: int = TOP,
    roles: Path = typer.Option(None, "--roles", help="TOML or JSON of name patterns to roles: shows the evidence."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Device work by name, operator, module or shape: count, sum, shortest, mean, longest, share."""
    from ridgeline.profiling.analyses.kernels import why_empty

    trace = load(path, stacks=by == "module").only(rank)
    if roles is not None:
        show(trace.classify_kernels(str(roles), step), "Roles of kernels", top, as_json)
        return
    why = why_empty(first_table(trace), by)
    show(trace.kernel_breakdown(by, step), f"Device work by {by}", top, as_json, why)


@app.command()
@verb
def launches(path: str = PATH, step: int = STEP, rank: int = RANK, as_json: bool = JSON_OPTION) -> None:
    """Launch calls: their time, the delay to the device, and what is short, slow or late."""
    from ridgeline.profiling.analyses.launches import why_empty

    trace = load(path).only(rank)
    columns = [
        "rank",
        "launch",
        "calls",
        "device_events",
        "call_mean_ns",
        "call_max_ns",
        "delay_median_ns",
        "delay_max_ns",
    ]
    columns += ["device_sum_ns", "short_calls", "slow_calls", "delayed_calls"]
    show(trace.launch_statistics(step), "Launches", 100, as_json, why_empty(first_table(trace)), columns)


@app.command()
@verb
def comm(
    path: str = PATH,
    step: int = STEP,
    top: int = TOP,
    roles: Path = ROLES,
    here: bool = HERE,
    as_json: bool = JSON_OPTION,
) -> None:
    """Collectives with bytes and bandwidths (beside the ceilings with --here), what of them was exposed, who waited."""
    from ridgeline.profiling.analyses.bandwidth import bus_ceilings
    from ridgeline.profiling.analyses.collectives import why_no_collectives

    trace, limits = load(path, roles=roles), bus_ceilings(measured(here)) or None
    found, overlap, late = (
        trace.collectives(step, ceiling=limits),
        trace.communication_overlap(step),
        trace.stragglers(step),
    )
    rates = trace.collective_bandwidth(step, limits)
    if as_json:
        document = {"collectives": found, "bandwidth": rates, "overlap": overlap, "stragglers": late}
        emit({name: frame.to_dicts() for name, frame in document.items()})
        return
    out = console()
    if found.is_empty():
        out.print(why_no_collectives(first_table(trace)) or "no collective in this window")
        return
    names = ["rank", "name", "group", "bytes", "duration_ns", "exposed_ns", "bus_bytes_per_second", "ceiling_share"]
    names.append("operator")
    print_frame(found.sort("exposed_ns", descending=True), "Collectives, the most exposed first", names, top)
    columns = ["op", "group_size", "bytes", "count", "time_ns", "bus_bytes_per_second", "best_bus_bytes_per_second"]
    show(
        rates, "Bandwidth by operation", top, False, "no size", [*columns, "ceiling_bytes_per_second", "ceiling_share"]
    )
    print_frame(overlap, "Communication and what hides it")
    print_stragglers(trace, step)


@app.command()
@verb
def counters(path: str = PATH, step: int = STEP, rank: int = RANK, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """Work waiting in each stream's queue, bytes per second of copies, hardware counters; or why there are none."""
    from ridgeline.profiling.analyses.counters import why_empty, why_no_counters

    trace = load(path).only(rank)
    why, none = why_empty(first_table(trace)), why_no_counters(first_table(trace))
    queues, copies, hardware = trace.queue_summary(step), trace.memory_bandwidth(step), trace.hardware_counters()
    if as_json:
        frames = {"queues": queues, "copies": copies, "hardware": hardware}
        emit(
            {name: frame.to_dicts() for name, frame in frames.items()} | {"why_no_queues": why, "why_no_hardware": none}
        )
        return
    show(queues, "Queues of the streams", 100, False, why)
    if why is None:
        show(copies, "Copies and sets", 100, False, "no copy in this window")
    counted = hardware.filter(hardware["sum"] != 0).sort("metric", "sum", descending=[False, True])
    show(counted, "Hardware counters that counted", top, False, none or "none counted anything")


@app.command()
@verb
def idle(
    path: str = PATH,
    step: int = STEP,
    rank: int = RANK,
    top: int = TOP,
    roles: Path = ROLES,
    as_json: bool = JSON_OPTION,
) -> None:
    """Idle time by cause, per stream and device, and the longest gaps."""
    from ridgeline.profiling.analyses.idle import why_empty

    trace = load(path, roles=roles).only(rank)
    causes, gaps = trace.idle_by_cause(step), trace.idle_gaps(top, step)
    if as_json:
        emit({"causes": causes.to_dicts(), "gaps": gaps.to_dicts()})
        return
    show(
        causes.filter(causes["idle_ns"] > 0),
        "Idle time by cause",
        100,
        False,
        why_empty(first_table(trace)) or "never idle",
    )
    show(since_start(trace, gaps), "The longest gaps, times since the capture's start", top, False, "no gap")


@app.command("critical-path")
@verb
def critical_path(
    path: str = PATH,
    step: int = STEP,
    rank: int = RANK,
    top: int = TOP,
    across: bool = typer.Option(False, "--across", help="One path over all ranks, through the rank that came last."),
    roles: Path = ROLES,
    as_json: bool = JSON_OPTION,
) -> None:
    """What set the time: the chain of events from the end back to the start, by kind and by name."""
    from ridgeline.profiling.analyses.critical_path import critical_path_summary

    trace = load(path, roles=roles).only(rank)
    if across and step is not None:
        raise UserError("critical-path --across follows the whole capture: leave out --step")
    found = trace.critical_path_across() if across else trace.critical_path(step)
    if as_json:
        emit({"segments": found.to_dicts()})
        return
    for by in ("type", "name", *(["rank"] if across else [])):
        show(critical_path_summary(found, by), f"Critical path by {by}", top, False, "nothing to follow")


@app.command()
@verb
def tree(path: str = PATH, step: int = STEP, rank: int = RANK, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """Call paths (modules, operators, Python) with own and inclusive time on host and device."""
    import polars as pl

    from ridgeline.profiling.analyses.calltree import why_empty

    trace = load(path, stacks=True).only(rank)
    found = trace.call_tree(step)
    if as_json:
        show(found, "", top, True, why_empty(first_table(trace)))
        return
    largest = found.filter(found["inclusive_ns"].rank("ordinal", descending=True) <= top)
    names = [f"{'  ' * row['depth']}{row['name']}" for row in largest.iter_rows(named=True)]
    columns = [
        "rank",
        "name",
        "count",
        "inclusive_ns",
        "exclusive_ns",
        "device_inclusive_ns",
        "backward_device_ns",
        "where",
    ]
    largest = largest.with_columns(name=pl.Series(names, dtype=pl.String))
    show(largest, f"Call tree: its {top} largest paths", top, False, why_empty(first_table(trace)), columns)


@app.command()
@verb
def sequences(
    path: str = PATH, step: int = STEP, rank: int = RANK, top: int = TOP, as_json: bool = JSON_OPTION
) -> None:
    """Runs of kernels that come again and again: candidates for fusion."""
    from ridgeline.profiling.analyses.sequences import why_empty

    trace = load(path).only(rank)
    show(trace.frequent_sequences(step, top=top), "Frequent sequences", top, as_json, why_empty(first_table(trace)))


@app.command()
@verb
def roofline(
    path: str = PATH,
    step: int = STEP,
    rank: int = RANK,
    top: int = TOP,
    here: bool = HERE,
    as_json: bool = JSON_OPTION,
) -> None:
    """FLOPs, bytes and rates per operator; against the ceilings with --here."""
    from ridgeline.profiling.analyses.roofline import notes, why_empty

    trace = load(path).only(rank)
    found = trace.roofline(measured(here), step).sort("device_time_ns", descending=True)
    names = ["rank", "operator", "dtype", "count", "device_time_ns", "flops_per_second", "bytes_per_second"]
    names += ["intensity_flops_per_byte", "bound", "share_of_ceiling", "lost_ns", "not_counted"]
    why, remarks = why_empty(first_table(trace)), notes(found, trace.device == "cpu")
    if as_json:
        emit({"rows": found.to_dicts(), "why_empty": why if found.is_empty() else None, "notes": remarks})
        return
    show(found, "Roofline, the longest first", top, False, why, names)
    for line in remarks:
        console().print(f"- {line}", style="dim", soft_wrap=True, markup=False)


@app.command()
@verb
def whatif(
    path: str = PATH,
    change: list[str] = typer.Option([], "--change", help="no-launch-gap, free-communication, kernel:REGEX=0.5, ..."),
    step: int = STEP,
    rank: int = RANK,
    roles: Path = ROLES,
    as_json: bool = JSON_OPTION,
) -> None:
    """The time predicted with a change, from a replay of the dependency graph [default: every change without a name]."""
    from ridgeline.profiling.analyses.whatif import CHANGES

    trace = load(path, roles=roles).only(rank)
    asked = change or [name for name in CHANGES if ":" not in name]
    together = len(trace.tables) > 1 and step is None
    found = trace.what_if_across(asked) if together else trace.what_if(asked, step)
    show(found, "What if, all ranks together" if together else "What if", 100, as_json, "no event to replay")


@app.command()
@verb
def diff(
    a: str = typer.Argument(..., metavar="A", help="A trace, a folder of ranks, or a run."),
    b: str = typer.Argument(..., metavar="B", help="The other one."),
    by: str = typer.Option("operator", "--by", help="operator, kernel, module or collective."),
    per_step: bool = typer.Option(None, "--per-step/--whole", help="[default: per step when both have steps]"),
    top: int = TOP,
    as_json: bool = JSON_OPTION,
) -> None:
    """What changed from A to B: how they were made first, then the largest changes of time."""
    from ridgeline.profiling.analyses.diff import configuration_diff
    from ridgeline.profiling.analyses.diff import diff as compare

    one, other = load(a, stacks=by == "module"), load(b, stacks=by == "module")
    sides = list(one.tables.values()), list(other.tables.values())
    made = configuration_diff(*sides, (one.properties(), other.properties()))
    changed = compare(*sides, by, per_step)
    if as_json:
        emit({"configuration": made.to_dicts(), "changes": changed.to_dicts()})
        return
    show(made, "Configuration", 100, False, "the configurations do not differ")
    compared = (
        ["total_ns_a", "total_ns_b"] if changed["per_step_ns_a"].is_null().all() else ["per_step_ns_a", "per_step_ns_b"]
    )
    columns = ["name", "only", "count_a", "count_b", *compared, "delta_ns", "measure", "per"]
    show(changed, f"Changes by {by}", top, False, f"no {by} in either trace", columns)


@app.command()
@verb
def export(
    path: str = PATH,
    out: Path = typer.Option(..., "--out", help="FILE.json or .json.gz for Perfetto, or a folder for Parquet."),
    as_json: bool = JSON_OPTION,
) -> None:
    """Write the trace with our annotations for Perfetto, or every table as Parquet."""
    from ridgeline.profiling.dump import to_folder, to_perfetto

    trace = load(path, stacks=True)
    written = to_perfetto(trace, out) if out.name.endswith((".json", ".json.gz")) else to_folder(trace, out)
    if as_json:
        emit({"files": [str(file) for file in written]})
        return
    for file in written:
        console().print(f"wrote {file}", soft_wrap=True, markup=False)


def _title(path: str) -> str:
    """The name of the file or folder; of a pattern the folder it looks in."""
    file = Path(path).resolve()
    return file.parent.name if any(mark in file.name for mark in "*?[") and not file.exists() else file.name


@app.command()
@verb
def report(
    path: str = PATH,
    out: Path = typer.Option(Path("trace-report.html"), "--out", help="The page to write."),
    here: bool = HERE,
    as_json: bool = JSON_OPTION,
) -> None:
    """One self-contained page: timeline, breakdown, communication, call tree, roofline, memory."""
    from ridgeline.profiling.dump import report_sections
    from ridgeline.profiling.output import check_output
    from ridgeline.report.trace_page import write_trace_report

    check_output("trace report", out, ())  # before the work; the page's writer knows the traces too
    trace, limits = load(path, stacks=True), measured(here)
    check_output("trace report", out, [table.meta.source for table in trace.tables.values()])
    with console(True).status("analysing"):
        sections = report_sections(trace, limits)
        write_trace_report(list(trace.tables.values()), out, f"Trace {_title(path)}", sections)
    if as_json:
        emit({"report": str(out)})
    else:
        console().print(f"wrote {out}", soft_wrap=True, markup=False)


for _verb in (memory, flow):
    app.command()(_verb)
