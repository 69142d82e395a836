"""The summary of a trace that programs read: what the capture lacks, where each rank's time went, who made others wait,
and what to try. Its keys are a contract; ns are integers of the trace's clock."""

from __future__ import annotations

from typing import Any

from ridgeline.profiling.trace import Trace
from ridgeline.profiling.trust import defects

RANK_KEYS = (
    "rank",
    "device",
    "steps",
    "span_ns",
    "busy_ns",
    "idle_ns",
    "compute_ns",
    "communication_ns",
    "exposed_communication_ns",
    "memory_ns",
    "unknown_ns",
    "overlap_fraction",
    "kernel_count",
)


def summarize(trace: Trace, step: int | None = None) -> dict[str, Any]:
    """``integrity``, ``ranks``, ``stragglers`` and ``findings``, over the whole capture or one step.

    Raises:
        UserError: no such step.
    """
    from ridgeline.profiling.explain import explain

    lacking = defects(trace)
    late = trace.stragglers(step=step)
    return {
        "integrity": [one.to_dict() for one in lacking],
        "ranks": rank_rows(trace, step),
        "stragglers": late.select("rank", "caused_wait_ns", "op", "operator").to_dicts(),
        "findings": [one.to_dict() for one in explain(trace, lacking, step=step)],
    }


def rank_rows(trace: Trace, step: int | None = None) -> list[dict[str, Any]]:
    """One dict of ``RANK_KEYS`` per rank."""
    from ridgeline.profiling.analyses.temporal import step_windows

    rows = trace.temporal_breakdown(step=step).to_dicts()
    for row in rows:
        row["steps"] = 1 if step is not None else len(step_windows(trace.tables[row["rank"]]))
    return [{key: row[key] for key in RANK_KEYS} for row in rows]
