"""All analyses of a trace at once, as plain data for a page, as tracks for Perfetto, or as Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.overlays import waiting_and_transfer
from ridgeline.profiling.explain import explain
from ridgeline.profiling.export import annotate, to_parquet
from ridgeline.profiling.output import check_output
from ridgeline.profiling.summary import rank_rows
from ridgeline.profiling.trace import Trace, analysis
from ridgeline.profiling.trust import defects

Rows = list[dict[str, Any]]
MOST_SEGMENTS, MOST_PATHS, MOST_KERNELS, MOST_MOMENTS = 200_000, 2_000, 200, 5_000
"""What a page holds at most of each table; the rest would not be seen."""


def report_sections(trace: Trace, ceilings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What :func:`ridgeline.report.trace_page.write_trace_report` shows; ``why`` says what is absent and why."""
    lacking = defects(trace)
    why = {
        "kernels": _why(trace, "kernels"),
        "idle": _why(trace, "idle"),
        "calltree": _why(trace, "calltree"),
        "roofline": _why(trace, "roofline"),
        "memory": _why(trace, "memory"),
        "communication": trace.straggler_verdict().verdict,
    }
    found: dict[str, Any] = {
        "integrity": [one.to_dict() for one in lacking],
        "findings": [one.to_dict() for one in explain(trace, lacking)],
        "summary": rank_rows(trace),
        "idle": trace.idle_by_cause().filter(pl.col("idle_ns") > 0).to_dicts(),
        "kernels": trace.kernel_breakdown().sort("sum_ns", descending=True).head(MOST_KERNELS).to_dicts(),
        "critical_path": _path(trace),
        "communication": trace.wait_matrix().to_dicts(),
        "collectives": _collectives(trace),
        "calltree": _tree(trace),
        "roofline": _roofline(trace, ceilings),
        "memory": _memory(trace),
    }
    always = ("integrity", "findings")
    return {name: value for name, value in found.items() if value or name in always} | {
        "why": {k: v for k, v in why.items() if v}
    }


def to_perfetto(trace: Trace, out: Path) -> list[Path]:
    """The trace of one rank as Chrome JSON with its critical path, idle gaps and collectives as tracks of their own.

    Several ranks get a file each, ``NAME.rankN.json``.

    Raises:
        UserError: one of the files is a trace that was read, or cannot be written.
    """
    written, together = [], None
    files = {rank: out.with_name(_file_name(trace, out, rank)) for rank in trace.tables}
    for file in files.values():
        check_output("trace export", file, [table.meta.source for table in trace.tables.values()])
    if len(trace.tables) > 1:
        together = waiting_and_transfer(trace.match_collectives())
    for rank in trace.tables:
        one = trace.only(rank)
        tracks = {"idle": one.idle_gaps(top=1000), "collectives": one.collectives() if together is None else together}
        filled = {title: frame for title, frame in tracks.items() if not frame.is_empty()}
        written.append(annotate(one.tables[rank], files[rank], filled, one.critical_path()))
    return written


def _file_name(trace: Trace, out: Path, rank: int) -> str:
    return out.name if len(trace.tables) == 1 else out.name.replace(".json", f".rank{rank}.json", 1)


def frames() -> dict[str, Callable[[Trace], pl.DataFrame]]:
    """Every table of a trace by the name of its file."""
    return {
        "temporal": lambda t: t.temporal_breakdown(),
        "temporal_by_step": lambda t: t.temporal_breakdown(steps=True),
        "kernels": lambda t: t.kernel_breakdown("name"),
        "kernels_by_operator": lambda t: t.kernel_breakdown("operator"),
        "kernels_by_module": lambda t: t.kernel_breakdown("module"),
        "kernels_by_shape": lambda t: t.kernel_breakdown("shape"),
        "roles": lambda t: t.classify_kernels(),
        "launches": lambda t: t.launch_statistics(),
        "idle": lambda t: t.idle_by_cause(),
        "idle_gaps": lambda t: t.idle_gaps(top=1000),
        "queue": lambda t: t.queue_summary(),
        "memory_bandwidth": lambda t: t.memory_bandwidth(),
        "hardware_counters": lambda t: t.hardware_counters(),
        "sequences": lambda t: t.frequent_sequences(),
        "collectives": lambda t: t.collectives(),
        "overlap": lambda t: t.communication_overlap(),
        "stragglers": lambda t: t.stragglers(),
        "waits": lambda t: t.wait_matrix(),
        "matched_collectives": lambda t: t.match_collectives(),
        "clock_offsets": lambda t: t.clock_offsets(),
        "call_tree": lambda t: t.call_tree(),
        "critical_path": lambda t: t.critical_path(),
        "roofline": lambda t: t.roofline(),
        "memory_timeline": lambda t: t.memory_timeline(),
        "memory_peak": lambda t: t.memory_peak(),
        "memory_allocations": lambda t: t.memory_allocations(),
        "tensor_flow": lambda t: t.tensor_flow(),
        "flow_findings": lambda t: t.flow_findings(),
    }


def to_folder(trace: Trace, folder: Path) -> list[Path]:
    """Every table as ``NAME.parquet``; a table without rows keeps its columns. The folder is made.

    Raises:
        UserError: ``folder`` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"trace export {folder}: is a file; give a folder for Parquet, or a name that ends in .json")
    folder.mkdir(parents=True, exist_ok=True)
    return [to_parquet(make(trace), folder / f"{name}.parquet") for name, make in frames().items()]


def _why(trace: Trace, name: str) -> str | None:
    answer: str | None = analysis(name).why_empty(next(iter(trace.tables.values())))
    return answer


def _path(trace: Trace) -> Rows:
    """The path of one rank, or the one through all ranks; its longest segments, in time order."""
    found = trace.critical_path_across() if len(trace.tables) > 1 else trace.critical_path()
    return found.sort("duration_ns", descending=True).head(MOST_SEGMENTS).sort("start_ns").to_dicts()


def _collectives(trace: Trace) -> Rows:
    """Matched collectives, for the page's arrows from the rank that came last."""
    return trace.match_collectives().head(MOST_SEGMENTS).to_dicts()


def _tree(trace: Trace) -> Rows:
    """The largest paths, parents before children. A parent is never smaller than its child, so none is cut off."""
    found = trace.call_tree()
    return found.filter(pl.col("inclusive_ns").rank("ordinal", descending=True) <= MOST_PATHS).to_dicts()


def _roofline(trace: Trace, ceilings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    rows = trace.roofline(ceilings).filter(pl.col("flops") > 0)
    if rows.is_empty():
        return None
    limits = {**ceilings, "source": "measured on this machine"} if ceilings else None
    return {"operators": rows.to_dicts(), "ceilings": limits}


def _memory(trace: Trace) -> dict[str, Any] | None:
    frame = trace.memory_timeline()
    if frame.is_empty():
        return None
    thin = frame.gather_every(max(frame.height // MOST_MOMENTS, 1))
    return {"timeline": thin.to_dicts(), "peak": trace.memory_peak().to_dicts()}
