"""``ridgeline trace``: any PyTorch trace, from what it lacks to what to try."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ridgeline.cli.common import JSON_OPTION, console, emit, new_app, verb
from ridgeline.cli.frames import print_frame
from ridgeline.cli.trace_tables import (
    load,
    print_findings,
    print_flow_findings,
    print_integrity,
    print_ranks,
    print_stragglers,
    show,
    since_start,
)
from ridgeline.errors import UserError

if TYPE_CHECKING:
    import polars as pl

    from ridgeline.profiling.table import TraceTable
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
    print_ranks(document["ranks"], step)
    print_stragglers(trace, step)
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
    why = why_empty(_first(trace), by)
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
    show(trace.launch_statistics(step), "Launches", 100, as_json, why_empty(_first(trace)), columns)


@app.command()
@verb
def comm(path: str = PATH, step: int = STEP, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """Collectives with bytes and bandwidths, what of them was exposed, and who made whom wait."""
    from ridgeline.profiling.analyses.collectives import why_no_collectives

    trace = load(path)
    found, overlap, late = trace.collectives(step), trace.communication_overlap(step), trace.stragglers(step)
    if as_json:
        emit({"collectives": found.to_dicts(), "overlap": overlap.to_dicts(), "stragglers": late.to_dicts()})
        return
    out = console()
    if found.is_empty():
        out.print(why_no_collectives(_first(trace)) or "no collective in this window")
        return
    names = ["rank", "name", "group", "bytes", "duration_ns", "exposed_ns", "bus_bytes_per_second", "operator"]
    print_frame(found.sort("exposed_ns", descending=True), "Collectives, the most exposed first", names, top)
    print_frame(overlap, "Communication and what hides it")
    print_stragglers(trace, step)


@app.command()
@verb
def idle(path: str = PATH, step: int = STEP, rank: int = RANK, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """Idle time by cause, per stream and device, and the longest gaps."""
    from ridgeline.profiling.analyses.idle import why_empty

    trace = load(path).only(rank)
    causes, gaps = trace.idle_by_cause(step), trace.idle_gaps(top, step)
    if as_json:
        emit({"causes": causes.to_dicts(), "gaps": gaps.to_dicts()})
        return
    show(
        causes.filter(causes["idle_ns"] > 0), "Idle time by cause", 100, False, why_empty(_first(trace)) or "never idle"
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
    as_json: bool = JSON_OPTION,
) -> None:
    """What set the time: the chain of events from the end back to the start, by kind and by name."""
    from ridgeline.profiling.analyses.critical_path import critical_path_summary

    trace = load(path).only(rank)
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
        show(found, "", top, True, why_empty(_first(trace)))
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
    show(largest, f"Call tree: its {top} largest paths", top, False, why_empty(_first(trace)), columns)


@app.command()
@verb
def sequences(
    path: str = PATH, step: int = STEP, rank: int = RANK, top: int = TOP, as_json: bool = JSON_OPTION
) -> None:
    """Runs of kernels that come again and again: candidates for fusion."""
    from ridgeline.profiling.analyses.sequences import why_empty

    trace = load(path).only(rank)
    show(trace.frequent_sequences(step, top=top), "Frequent sequences", top, as_json, why_empty(_first(trace)))


@app.command()
@verb
def roofline(
    path: str = PATH,
    step: int = STEP,
    rank: int = RANK,
    top: int = TOP,
    here: bool = typer.Option(False, "--here", help="The trace was taken on this machine: use its measured ceilings."),
    as_json: bool = JSON_OPTION,
) -> None:
    """FLOPs, bytes and rates per operator; against the ceilings with --here."""
    from ridgeline.profiling.analyses.roofline import why_empty

    trace = load(path).only(rank)
    limits = None
    if here:
        from ridgeline.hardware import ceilings

        limits = ceilings().to_dict()
    found = trace.roofline(limits, step).sort("device_time_ns", descending=True)
    names = ["rank", "operator", "dtype", "count", "device_time_ns", "flops_per_second", "bytes_per_second"]
    names += ["intensity_flops_per_byte", "bound", "share_of_ceiling", "lost_ns", "not_counted"]
    show(found, "Roofline, the longest first", top, as_json, why_empty(_first(trace)), names)


@app.command()
@verb
def memory(path: str = PATH, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """The peak and what it is made of: a trace with memory events, or a CUDA memory snapshot (.pickle)."""
    if path.endswith((".pickle", ".pkl")):
        _snapshot(path, top, as_json)
        return
    from ridgeline.profiling.analyses.memory import why_empty

    trace = load(path)
    show(trace.memory_peak(), "What the peak is made of", top, as_json, why_empty(_first(trace)))


@app.command()
@verb
def flow(
    path: str = PATH,
    execution: Path = typer.Option(
        None,
        "--execution-trace",
        help="torch's ExecutionTraceObserver file, or a folder of them by rank [default: recorded beside the trace].",
    ),
    min_bytes: int = typer.Option(1 << 20, "--min-bytes", min=1, help="Smaller tensors are no finding."),
    rank: int = RANK,
    top: int = TOP,
    as_json: bool = JSON_OPTION,
) -> None:
    """Who wrote and who read each tensor: copies for nothing, tensors kept too long, what to recompute instead.

    `ridgeline profile --flow` records what this needs; PATH may also be an execution trace alone.
    """
    from ridgeline.profiling.analyses.dataflow import flow_summary

    tensors, findings, why = _flow(path, execution, rank, min_bytes)
    if as_json:
        summary = flow_summary(tensors).to_dicts()
        emit({"summary": summary, "findings": findings.to_dicts(), "tensors": tensors.to_dicts(), "why_not_all": why})
        return
    if why:
        console().print(why, soft_wrap=True)
    if tensors.is_empty():
        return
    show(flow_summary(tensors), "Tensors by role", 100, False)
    print_flow_findings(findings, top, min_bytes)
    columns = ["rank", "tensor", "bytes", "role", "written_by", "first_read_by", "last_read_by", "reads"]
    show(tensors.sort("bytes", descending=True), "The largest tensors", top, False, None, [*columns, "kept_ns"])


@app.command()
@verb
def whatif(
    path: str = PATH,
    change: list[str] = typer.Option([], "--change", help="no-launch-gap, free-communication, kernel:REGEX=0.5, ..."),
    step: int = STEP,
    rank: int = RANK,
    as_json: bool = JSON_OPTION,
) -> None:
    """The time predicted with a change, from a replay of the dependency graph [default: every change without a name]."""
    from ridgeline.profiling.analyses.whatif import CHANGES

    trace = load(path).only(rank)
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
        console().print(f"wrote {file}", soft_wrap=True)


@app.command()
@verb
def report(
    path: str = PATH,
    out: Path = typer.Option(Path("trace-report.html"), "--out", help="The page to write."),
    here: bool = typer.Option(False, "--here", help="The trace was taken on this machine: use its measured ceilings."),
    as_json: bool = JSON_OPTION,
) -> None:
    """One self-contained page: timeline, breakdown, communication, call tree, roofline, memory."""
    from ridgeline.profiling.dump import report_sections
    from ridgeline.report.trace_page import write_trace_report

    trace, limits = load(path, stacks=True), None
    if here:
        from ridgeline.hardware import ceilings

        limits = ceilings().to_dict()
    with console(True).status("analysing"):
        sections = report_sections(trace, limits)
        write_trace_report(list(trace.tables.values()), out, f"Trace {Path(path).name}", sections)
    if as_json:
        emit({"report": str(out)})
    else:
        console().print(f"wrote {out}", soft_wrap=True)


def _first(trace: Trace) -> TraceTable:
    return next(iter(trace.tables.values()))


def _flow(
    path: str, execution: Path | None, rank: int | None, least: int
) -> tuple[pl.DataFrame, pl.DataFrame, str | None]:
    """Tensors, findings, and what is missing to know more."""
    from ridgeline.profiling.analyses.execution import is_execution_trace, load_execution_trace

    if Path(path).is_file() and is_execution_trace(path):
        from ridgeline.profiling.analyses.dataflow import tensor_flow
        from ridgeline.profiling.analyses.flow_findings import flow_findings

        nodes = load_execution_trace(path)
        why = "times and releases are not known: give the profiler's trace, with this file as --execution-trace"
        return tensor_flow(nodes), flow_findings(nodes, min_bytes=least), why
    trace = load(path).only(rank)
    found = trace.tensor_flow(execution), trace.flow_findings(execution, min_bytes=least)
    return *found, trace.why_no_flow(execution)


def _snapshot(path: str, top: int, as_json: bool) -> None:
    """A memory snapshot: its peak by place, and the out-of-memory in it, if there is one."""
    from ridgeline.profiling.analyses.oom import explain_oom
    from ridgeline.profiling.analyses.snapshot import read_snapshot, snapshot_peak, why_no_history

    found = read_snapshot(path)
    peak, report = snapshot_peak(found), explain_oom(found)
    if as_json:
        emit({"peak": peak.to_dicts(), "out_of_memory": report.to_dict() if report else None})
        return
    show(peak, "What the peak is made of", top, False, why_no_history(found) or "no allocation")
    for sentence in report.sentences if report else ():
        console().print(f"- {sentence}", soft_wrap=True)
