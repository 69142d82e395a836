"""Data flow: which operator wrote each tensor, which read it, and what that says about copies and memory.

::

    storage 7   written by aten::mm    read by aten::relu   read by MmBackward0's aten::mm      released
                   [-- version 0 ----------+---------------------------+----------------------------)
                                                                       last read ... released: kept for nothing

A write begins a new version. An access counts for the innermost operator that makes it: what a child read, its parent
did not read again. Roles follow from the flow alone: an activation is written in forward and read in backward, a
gradient is written in backward and handed to ``AccumulateGrad`` or read by the optimizer, and so on.

Tensors have identities only in an execution trace. Without one, the profiler's memory events say who wrote a tensor and
in which operator it was released; its readers stay null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import polars as pl

from ridgeline.profiling.analyses.execution import Node
from ridgeline.profiling.analyses.memory import instants, memory_allocations
from ridgeline.profiling.analyses.memory import why_empty as why_no_memory
from ridgeline.profiling.analyses.versions import Flow, Version, follow
from ridgeline.profiling.nesting import operators
from ridgeline.profiling.table import Kind, TraceTable

Window = tuple[int, int] | None

ROLES = ("parameter", "optimizer_state", "gradient", "activation", "input", "temporary", "unknown")
COLUMNS = {
    "tensor_flow": {
        "tensor": "text: storage, life and version; null without an execution trace",
        "bytes": "bytes: from its first to its last element (without an execution trace: of the allocation)",
        "dtype": "text: torch's C++ name of the type; null without an execution trace",
        "written_by": "text: operator that wrote this version; null when written before the capture",
        "first_read_by": "text: first operator that read it; null when none did or that is not known",
        "last_read_by": "text: last operator that read it",
        "reads": "operators that read it; null when not known",
        "role": "text: parameter, optimizer_state, gradient, activation, input, temporary or unknown",
        "written_at": "order in which operators ended; null without an execution trace",
        "last_read_at": "order in which operators ended",
        "written_ns": "ns: end of the operator that wrote it, or of its allocation; null without a profiler trace",
        "last_read_ns": "ns: end of the last operator that read it",
        "freed_ns": "ns: release of its memory; null when not recorded or later than the capture",
        "released_by": "text: operator open at the release, the last that can have used it",
        "lifetime_ns": "ns: freed_ns - written_ns",
        "kept_ns": "ns: freed_ns - last_read_ns: held after the last read",
    },
    "flow_summary": {
        "role": "text: as in tensor_flow",
        "tensors": "storages, each life counted once",
        "versions": "of those tensors: writes, and what was there before the capture",
        "bytes": "bytes: of those tensors, each at its largest; not all are there at one time",
        "reads": "operators that read them; null when not known",
    },
    "flow_findings": {
        "finding": "text: needless copy, kept after last read, or recomputation candidate",
        "operator": "text: operator that made the copy or wrote the tensor",
        "count": "tensors",
        "bytes": "bytes: of those tensors",
        "evidence": "text: the largest of them",
        "knob": "text: what to change",
    },
}
_TEXT = ("tensor", "dtype", "written_by", "first_read_by", "last_read_by", "role", "released_by")
_SCHEMA: dict[str, Any] = {name: pl.String if name in _TEXT else pl.Int64 for name in COLUMNS["tensor_flow"]}


def roles(versions: Sequence[Version]) -> list[str]:
    """What each version is, by who wrote and who read it, and what the optimizer does with its storage."""
    steps: dict[tuple[int, int], set[str]] = {}
    readers: dict[tuple[int, int], set[str]] = {}
    for one in versions:
        life = one.storage, one.life
        readers.setdefault(life, set()).update(phase.split()[0] for *_, phase in one.reads)
        if (one.written_in or "").startswith("optimizer"):
            steps.setdefault(life, set()).add(str(one.written_in))
    return [_role(one, steps.get((one.storage, one.life), set()), readers[one.storage, one.life]) for one in versions]


def _role(version: Version, steps: set[str], readers: set[str]) -> str:
    """``steps``: the optimizer steps that change its storage; ``readers``: the phases that read any version of it."""
    read_in = {phase.split()[0] for *_, phase in version.reads}
    written_in = (version.written_in or "before").split()[0]
    if version.accumulated or (written_in == "backward" and "optimizer" in read_in):
        return "gradient"
    if steps and written_in in ("before", "optimizer"):
        if readers & {"forward", "backward"}:
            return "parameter"
        # Memory that an optimizer step makes, and no later one touches, was only in its way.
        return "optimizer_state" if version.maker is None or len(steps) > 1 else "temporary"
    if written_in == "forward" and "backward" in read_in:
        return "activation"
    return "input" if version.written_by is None else "temporary"


def tensor_flow(
    nodes: Sequence[Node] | None = None, table: TraceTable | None = None, window: Window = None
) -> pl.DataFrame:
    """Every tensor version with its writer, readers, role and lifetime; in the order of the writes.

    ``nodes`` is an execution trace; with the profiler's trace of the same run as ``table`` the times are known too.
    With a table alone the frame holds its recorded allocations.
    """
    if nodes is None:
        frame = _from_memory(table) if table is not None else pl.DataFrame(schema=_SCHEMA)
    else:
        frame = _frame(_timed(follow(nodes), table), table)
    if window is None:
        return frame
    return frame.filter((pl.col("written_ns") >= window[0]) & (pl.col("written_ns") < window[1]))


def flow_summary(flow: pl.DataFrame) -> pl.DataFrame:
    """The rows of :func:`tensor_flow` by role, the most bytes first. Columns: ``COLUMNS``."""
    life = pl.col("tensor").str.replace(r"\.\d+$", "")
    each = (
        flow.with_row_index()
        .group_by("role", life.fill_null(pl.col("index").cast(pl.String)).alias("life"))
        .agg(pl.len().cast(pl.Int64).alias("versions"), pl.col("bytes").max(), pl.col("reads").sum(),
             pl.col("reads").is_not_null().any().alias("known"))
    )  # fmt: skip
    known = pl.when(pl.col("known").any()).then(pl.col("reads").sum()).alias("reads")
    found = each.group_by("role").agg(
        pl.len().cast(pl.Int64).alias("tensors"), pl.col("versions").sum(), pl.col("bytes").sum(), known
    )
    return found.sort("bytes", "role", descending=[True, False])


def why_empty(nodes: Sequence[Node] | None, table: TraceTable | None) -> str | None:
    """Why there is no data flow, why readers or times are not known, or that the two files do not belong together; None
    when all is known."""
    if nodes is not None:
        return None if table is None else _why_apart(nodes, table)
    missing = why_no_memory(table) if table is not None else "no trace was given"
    if missing:
        return f"{missing}; and no execution trace (torch.profiler.ExecutionTraceObserver) says who read what"
    return "readers are not known: pass an execution trace (torch.profiler.ExecutionTraceObserver)"


class _FunctionId(msgspec.Struct, gc=False):
    id: Any = msgspec.field(name="Record function id", default=None)


def _why_apart(nodes: Sequence[Node], table: TraceTable) -> str | None:
    """Whether an execution trace is of another capture: its calls have numbers, and the trace other names for them.

    It may begin before the trace and end after it, so calls that only one of them knows say nothing by themselves."""
    known, numbered = _numbered(table), [node for node in nodes if node.attribute("rf_id")]
    both = [node for node in numbered if node.attribute("rf_id") in known]
    same = len(_rows_of(both, table))
    if not numbered or (both and 2 * same >= len(both)):
        return None
    agree = f"{same} of {len(numbered)} numbered calls agree with the trace"
    return f"the execution trace is not of this capture: {agree}; times and releases are not known"


def _rows_of(nodes: Sequence[Node], table: TraceTable) -> dict[int, int]:
    """Node id -> row of the same call in the profiler's trace."""
    known = _numbered(table)
    found = {}
    for node in nodes:
        row = known.get(node.attribute("rf_id"))
        if row is not None and table.names[table.name[row]] == node.name:
            found[node.id] = row
    return found


def _numbered(table: TraceTable) -> dict[int, int]:
    """Number of a recorded call -> its row."""
    rows = np.flatnonzero(table.is_kind(Kind.CPU_OP, Kind.ANNOTATION))
    return {
        one.id: row
        for row, one in zip(rows.tolist(), table.decode(rows, _FunctionId), strict=True)
        if one is not None and isinstance(one.id, int) and one.id > 0
    }


def _timed(flow: Flow, table: TraceTable | None) -> Flow:
    """Join the memory events of the trace to the storages that their operators made."""
    if table is None:
        return flow
    rows = _rows_of(flow.nodes, table)
    events, ops = instants(table), operators(table)
    inner = ops.innermost(events.thread, events.time)
    made: dict[int, list[int]] = {}
    for at in np.flatnonzero((events.bytes > 0) & (inner >= 0)).tolist():
        made.setdefault(int(inner[at]), []).append(at)
    last: dict[tuple[int, int], Version] = {}
    for version in flow.versions:
        last[version.storage, version.life] = version
    for version in last.values():
        waiting = made.get(rows.get(version.maker.id, -1) if version.maker else -1, [])
        fits = [at for at in waiting if events.bytes[at] >= version.bytes]
        if fits and version.bytes:
            at = min(fits, key=lambda one: (int(events.bytes[one]), one))
            waiting.remove(at)
            freed = int(events.partner[at])
            if freed >= 0:
                version.freed_ns = int(events.time[freed])
                version.released_by = table.names[table.name[inner[freed]]] if inner[freed] >= 0 else None
    return flow


def _frame(flow: Flow, table: TraceTable | None) -> pl.DataFrame:
    rows = _rows_of(flow.nodes, table) if table is not None else {}

    def end(node: Node | None) -> int | None:
        return int(table.end[rows[node.id]]) if table is not None and node and node.id in rows else None

    out = []
    known = zip(flow.versions, roles(flow.versions), strict=True)
    for one, role in sorted(known, key=lambda item: (item[0].written_at or -1, *item[0].key)):
        reads = [read for read in one.reads if read[0] is not one.written_by]
        first, last = (reads[0][0], reads[-1][0]) if reads else (None, None)
        written, read, freed = end(one.written_by), end(last), one.freed_ns
        out.append({
            "tensor": f"{one.storage}.{one.life}.{one.number}", "bytes": one.bytes, "dtype": one.dtype,
            "written_by": one.written_by and one.written_by.name, "first_read_by": first and first.name,
            "last_read_by": last and last.name, "reads": len(reads),
            "role": role, "written_at": one.written_at,
            "last_read_at": reads[-1][1] if reads else None, "written_ns": written, "last_read_ns": read,
            "freed_ns": freed, "released_by": one.released_by,
            "lifetime_ns": max(freed - written, 0) if freed is not None and written is not None else None,
            "kept_ns": max(freed - read, 0) if freed is not None and read is not None else None,
        })  # fmt: skip
    return pl.DataFrame(out, schema=_SCHEMA)


_MEMORY_ROLES = {
    "activations": "activation",
    "gradients": "gradient",
    "optimizer_state": "optimizer_state",
    "temporaries": "temporary",
}


def _from_memory(table: TraceTable) -> pl.DataFrame:
    """What the profiler's memory events say: who allocated, in what it was released; readers are not known."""
    made = memory_allocations(table)
    events, ops = instants(table), operators(table)
    rows = np.flatnonzero(events.bytes > 0)
    inner = ops.innermost(events.thread, events.time)
    released = [
        table.names[table.name[inner[freed]]] if freed >= 0 and inner[freed] >= 0 else None
        for freed in events.partner[rows].tolist()
    ]
    known = {"bytes": made["bytes"], "written_by": made["operator"], "written_ns": made["time_ns"]}
    roles = made["category"].replace_strict(_MEMORY_ROLES, default="unknown", return_dtype=pl.String)
    frame = pl.DataFrame({**known, "role": roles, "freed_ns": made["freed_ns"], "released_by": released},
                         schema_overrides={"released_by": pl.String, "written_by": pl.String})  # fmt: skip
    frame = frame.with_columns(lifetime_ns=pl.col("freed_ns") - pl.col("written_ns"))
    return frame.with_columns(
        pl.lit(None, kind).alias(name) for name, kind in _SCHEMA.items() if name not in frame.columns
    ).select(*_SCHEMA)
