"""The verbs of ``ridgeline trace`` about memory: what the peak is made of, and who wrote and read each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ridgeline.cli.common import JSON_OPTION, console, emit, verb
from ridgeline.cli.trace_tables import PATH, RANK, TOP, first_table, load, print_flow_findings, show

if TYPE_CHECKING:
    import polars as pl


@verb
def memory(path: str = PATH, top: int = TOP, as_json: bool = JSON_OPTION) -> None:
    """The peak and what it is made of: a trace with memory events, or a CUDA memory snapshot (.pickle)."""
    if path.endswith((".pickle", ".pkl")):
        _snapshot(path, top, as_json)
        return
    from ridgeline.profiling.analyses.memory import why_empty

    trace = load(path)
    show(trace.memory_peak(), "What the peak is made of", top, as_json, why_empty(first_table(trace)))


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
        console().print(why, soft_wrap=True, markup=False)
    if tensors.is_empty():
        return
    show(flow_summary(tensors), "Tensors by role", 100, False)
    print_flow_findings(findings, top, min_bytes)
    columns = ["rank", "tensor", "bytes", "role", "written_by", "first_read_by", "last_read_by", "reads"]
    show(tensors.sort("bytes", descending=True), "The largest tensors", top, False, None, [*columns, "kept_ns"])


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
        console().print(f"- {sentence}", soft_wrap=True, markup=False)


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
