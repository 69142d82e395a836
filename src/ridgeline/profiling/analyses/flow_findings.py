"""What the data flow says should change: copies made for nothing, tensors kept too long, recomputation candidates."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from ridgeline.profiling.analyses import opcosts
from ridgeline.profiling.analyses.dataflow import COLUMNS, tensor_flow
from ridgeline.profiling.analyses.execution import Node
from ridgeline.profiling.analyses.versions import Flow, follow
from ridgeline.profiling.table import TraceTable

_KNOBS = {
    "needless copy": "use the source itself: drop the clone, contiguous or to that makes this copy",
    "kept after last read": "drop the reference after the last use (del, or a smaller scope)",
    "recomputation candidate": "checkpoint the operator that writes it (torch.utils.checkpoint) instead of keeping it",
}
_SCHEMA = {name: pl.Int64 if name in ("count", "bytes") else pl.String for name in COLUMNS["flow_findings"]}


def flow_findings(
    nodes: Sequence[Node] | None = None,
    table: TraceTable | None = None,
    min_bytes: int = 1 << 20,
    min_share: float = 0.1,
) -> pl.DataFrame:
    """Findings by operator, the most bytes first.

    A tensor is named when it has at least ``min_bytes``, and was kept, or lay between write and read, for at least
    ``min_share`` of the capture. Needless copies need an execution trace; the others a profiler trace with memory.
    """
    frame = tensor_flow(nodes, table)
    rows = _kept(frame, min_share) + _recompute(frame, min_share)
    if nodes is not None:
        rows += _copies(follow(nodes))
    large = [row for row in rows if row[2] >= min_bytes]
    found = pl.DataFrame(large, schema={"finding": pl.String, "operator": pl.String, "bytes": pl.Int64,
                                        "evidence": pl.String}, orient="row")  # fmt: skip
    grouped = (
        found.sort("bytes", "evidence", descending=[True, False])
        .group_by("finding", "operator")
        .agg(count=pl.len().cast(pl.Int64), bytes=pl.col("bytes").sum(), evidence=pl.col("evidence").first())
    )
    knob = pl.col("finding").replace_strict(_KNOBS, default=None, return_dtype=pl.String)
    return (
        grouped.with_columns(knob=knob)
        .select(*_SCHEMA)
        .sort("bytes", "finding", "operator", descending=[True, False, False])
    )


_Row = tuple[str, str | None, int, str]


def _copies(flow: Flow) -> list[_Row]:
    """Copies of a version written in the capture that nothing reads or overwrites afterwards."""
    parents = {node.id: node for node in flow.nodes}
    latest: dict[tuple[int, int], int] = {}
    for one in flow.versions:
        latest[one.storage, one.life] = max(one.number, latest.get((one.storage, one.life), 0))
    out: list[_Row] = []
    for copy in flow.copies:
        source = copy.source
        current = latest.get((source.storage, source.life)) == source.number
        # A gradient stays reachable as .grad: that the flow does not read it again does not make its copy needless.
        if (
            source.written_by is not None
            and not source.accumulated
            and current
            and all(at <= copy.at for _, at, _ in source.reads)
        ):
            above = parents.get(copy.node.ctrl_deps)
            name = above.name if above is not None and above.name.startswith("aten::") else copy.node.name
            out.append(("needless copy", name, copy.size,
                        f"{copy.size} bytes of {source.dtype} written by {source.written_by.name}, not used after"))  # fmt: skip
    return out


def _kept(frame: pl.DataFrame, min_share: float) -> list[_Row]:
    span = _span(frame, "written_ns", "freed_ns")
    long = (
        frame.filter((pl.col("kept_ns") >= min_share * span) & (pl.col("role") != "parameter")) if span else frame[:0]
    )
    return [
        ("kept after last read", row["written_by"], row["bytes"],
         f"{row['bytes']} bytes held {row['kept_ns'] / 1e6:.3f} ms after {row['last_read_by']} read them last")
        for row in long.to_dicts()
    ]  # fmt: skip


def _recompute(frame: pl.DataFrame, min_share: float) -> list[_Row]:
    """Activations of operators that only stream memory, far between write and last use."""
    timed = _span(frame, "written_ns", "freed_ns")
    ordered = _span(frame, "written_at", "last_read_at")
    far = (
        pl.coalesce(pl.col("last_read_ns"), pl.col("freed_ns")) - pl.col("written_ns") >= min_share * timed
        if timed
        else pl.col("last_read_at") - pl.col("written_at") >= min_share * ordered
    )
    return [
        ("recomputation candidate", row["written_by"], row["bytes"],
         f"{row['bytes']} bytes written by {row['written_by']}, needed again in "
         f"{row['last_read_by'] or row['released_by']}")
        for row in frame.filter((pl.col("role") == "activation") & far).to_dicts()
        if opcosts.has_formula(row["written_by"] or "") and not opcosts.is_matmul(row["written_by"])
    ]  # fmt: skip


def _span(frame: pl.DataFrame, first: str, last: str) -> int:
    start, end = frame[first].min(), frame[last].max()
    return int(end) - int(start) if start is not None and end is not None else 0  # type: ignore[arg-type]
