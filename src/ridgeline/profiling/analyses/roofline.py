"""Roofline per operator: what it computed and moved, in what time, against what the device can do.

::

    attainable(intensity) = min(matmul ceiling of the dtype, intensity x read bandwidth)

             ____________________  compute bound: FLOPs / ceiling is the longer of the two ideal times
            /
           /                       memory bound: bytes / bandwidth is

Each nanosecond of device time belongs to one operator: a kernel to the outermost operator of the matrix class around its
launch (``aten::linear`` owns its ``aten::addmm``, an attention its softmax), else to the innermost operator. On a CPU
trace the time is each operator's own. Operators that cannot be counted keep their time and say why, so the times sum to
the whole. Ceilings are never guessed: without them the columns that need one are null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling import classify
from ridgeline.profiling.analyses import opcosts
from ridgeline.profiling.intervals import Times, total, union
from ridgeline.profiling.nesting import Nesting, launching_operator, operators
from ridgeline.profiling.ops import self_times
from ridgeline.profiling.table import Kind, TraceTable

Window = tuple[int, int] | None

COLUMNS = {
    "operator": "text: the operator that owns the time; null for device work launched by none we know",
    "input_dims": "text: sizes of its inputs as the profiler wrote them; null when not recorded",
    "dtype": "text: the type it computes in, tf32 where the kernels' names say so; null when not counted",
    "count": "calls that took device time (device rows where there is no operator)",
    "flops": "FLOPs of all calls, a multiply-add being two; null when not counted",
    "bytes": "bytes: least traffic, each input read once and the output written once; null when not counted",
    "device_time_ns": "ns: sum of its device events' durations; on a CPU trace the operator's own time",
    "flops_per_second": "FLOP/s: flops / device_time_ns",
    "bytes_per_second": "B/s: bytes / device_time_ns",
    "intensity_flops_per_byte": "FLOP/B: flops / bytes",
    "bound": "compute or memory: which ideal time is longer; null without ceilings",
    "ideal_ns": "ns: max(flops / matmul ceiling of the dtype, bytes / read bandwidth); null without ceilings",
    "share_of_ceiling": "fraction: ideal_ns / device_time_ns; above 1 when caches beat the measured bandwidth",
    "lost_ns": "ns: device_time_ns - ideal_ns",
    "lost_share": "fraction: lost_ns / wall time of the window (of the steps, or of the capture)",
    "mfu": "fraction: FLOPs of matrix operators / (matmul ceiling x wall time); rows sum to the window's MFU",
    "not_counted": "text: why flops and bytes are null; null when counted",
}
_SCHEMA: dict[str, Any] = {
    "operator": pl.String, "input_dims": pl.String, "dtype": pl.String, "count": pl.Int64, "flops": pl.Int64,
    "bytes": pl.Int64, "device_time_ns": pl.Int64, "matmul": pl.Boolean, "not_counted": pl.String,
}  # fmt: skip

CEILING_NAMES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), "fp8"),
}
"""torch's name of a type -> the name of its matmul ceiling where they differ; ``tf32`` keeps its own."""
TF32_KERNEL = re.compile(r"tf32|(?<![a-z0-9])s1688", re.IGNORECASE)

NO_OPERATOR = "launched by no operator we know"
NO_LAUNCH = "its launch was not recorded"
NO_SHAPES = "shapes or types were not recorded (record_shapes=True)"
NO_FORMULA = "no formula for this operator"


def roofline(table: TraceTable, ceilings: Mapping[str, Any] | None = None, window: Window = None) -> pl.DataFrame:
    """One row per operator, input sizes and dtype, most device time first.

    ``ceilings`` holds ``gemm_flops_per_second`` (a dict by dtype) and ``read_bytes_per_second``, as
    ``ridgeline.hardware`` measures them.
    """
    rows = _calls(table, window)
    frame = pl.DataFrame(rows, schema=_SCHEMA, orient="row")
    grouped = frame.group_by("operator", "input_dims", "dtype", "matmul", "not_counted").agg(
        pl.col("count").sum(), _sum_or_null("flops"), _sum_or_null("bytes"), pl.col("device_time_ns").sum()
    )
    return _against(grouped, ceilings or {}, wall_ns(table, window))


def notes(frame: pl.DataFrame, cpu: bool) -> list[str]:
    """What a reader of :func:`roofline` must know before believing shares of more than the ceiling; empty without any."""
    over = frame.filter(pl.col("share_of_ceiling") > 1)
    cached, fast = over.filter(pl.col("bound") == "memory").height, over.filter(pl.col("bound") == "compute").height
    out = []
    if cached:
        where = "from the CPU's caches" if cpu else "from the device's cache"
        out.append(f"{cached} rows are faster than memory can be read: their data came {where} (the ceiling is measured on "
                   "buffers far larger than any cache), so their share of it is above 100 % and their loss negative")  # fmt: skip
    if fast:
        out.append(f"{fast} rows are faster than the matmul ceiling: it was measured on another machine, or on a busy one "
                   "(`ridgeline env --refresh` measures it again)")  # fmt: skip
    return out


def why_empty(table: TraceTable) -> str | None:
    """Why :func:`roofline` has nothing to count, or None."""
    if not (table.has_device_timeline or table.is_kind(Kind.CPU_OP).any()):
        return "the trace has neither device work nor operators"
    ops = np.flatnonzero(table.is_kind(Kind.CPU_OP))
    if not any(b'"Input Dims"' in bytes(table.args[row]) for row in ops.tolist()):
        return "no operator's shapes were recorded: profile with record_shapes=True"
    return None


def wall_ns(table: TraceTable, window: Window = None) -> int:
    """Wall time that shares refer to: the window, else the profiled steps, else the span of the counted work. ns"""
    if window is not None:
        return window[1] - window[0]
    steps = classify.step_rows(table)
    if steps.size:
        return total(union(table.start[steps], table.end[steps]))
    rows = table.device_rows if table.has_device_timeline else table.is_kind(Kind.CPU_OP)
    return int(table.end[rows].max() - table.start[rows].min()) if rows.any() else 0


def _sum_or_null(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_null().all()).then(None).otherwise(pl.col(name).sum()).alias(name)


@dataclass(frozen=True)
class _Work:
    """Timed pieces of work and the host row that owns each (-1 for none). Arrays are ``[pieces]``."""

    owner: NDArray[np.intp]
    spent: Times
    launched: NDArray[np.bool_]
    tf32: NDArray[np.bool_]


def owners(table: TraceTable, nesting: Nesting, asked: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each innermost operator in ``asked`` (or -1) the operator that owns its time: the outermost countable one
    of the matrix class around it, else itself. ``[asked]``"""
    matrix = np.flatnonzero(table.is_kind(Kind.CPU_OP) & table.named(opcosts.is_matmul))
    countable = np.zeros(len(table), np.bool_)
    for row, arguments in zip(matrix.tolist(), table.decode(matrix, opcosts.OpArguments), strict=True):
        countable[row] = opcosts.cost(table.names[table.name[row]], arguments) is not None
    own, above = asked.copy(), asked.copy()
    while (above >= 0).any():
        hit = (above >= 0) & countable[above]
        own[hit] = above[hit]
        above = np.where(above >= 0, nesting.parent[above], -1)
    return own


def _work(table: TraceTable, window: Window) -> _Work:
    if table.has_device_timeline:
        launched = classify.launches(table)
        nesting = operators(table)
        rows = _starting(table, np.flatnonzero(table.device_rows), window)
        inner = launching_operator(nesting, launched)[rows]
        spent = np.maximum(table.end[rows] - table.start[rows], 0)
    else:
        nesting = operators(table)
        ops = np.flatnonzero(table.is_kind(Kind.CPU_OP))
        own = self_times(table.start[ops], table.end[ops], table.thread[ops])
        inside = np.isin(ops, _starting(table, ops, window))
        rows = inner = ops[inside]
        launched, spent = np.full(len(table), 0, np.intp), own[inside]
    ranges = (inner >= 0) & (table.kind[inner] != Kind.CPU_OP)
    while ranges.any():  # out of named ranges (nccl:all_reduce) to the operator around them
        inner = np.where(ranges, nesting.parent[inner], inner)
        ranges = (inner >= 0) & (table.kind[inner] != Kind.CPU_OP)
    tf32 = table.is_kind(Kind.KERNEL) & table.named(TF32_KERNEL.search)
    return _Work(owners(table, nesting, inner), spent, launched[rows] >= 0, tf32[rows])


def _starting(table: TraceTable, rows: NDArray[np.intp], window: Window) -> NDArray[np.intp]:
    """Those rows that start inside the window."""
    if window is None:
        return rows
    return rows[(table.start[rows] >= window[0]) & (table.start[rows] < window[1])]


def _calls(table: TraceTable, window: Window) -> list[tuple[Any, ...]]:
    """One tuple per owning call, and one per reason for the work that none owns."""
    work = _work(table, window)
    owner, first = np.unique(work.owner, return_inverse=True)
    spent = np.zeros(owner.size, np.int64)
    np.add.at(spent, first, work.spent)
    fast = np.bincount(first, work.tf32, owner.size) > 0
    known = owner >= 0
    decoded = table.decode(owner[known], opcosts.OpArguments)
    calls = zip(owner[known].tolist(), spent[known].tolist(), fast[known].tolist(), decoded, strict=True)
    out = [_call(table.names[table.name[row]], arguments, took, tf32) for row, took, tf32, arguments in calls]
    for launched, why in ((True, NO_OPERATOR), (False, NO_LAUNCH)):
        rest = (work.owner < 0) & (work.launched == launched)
        if rest.any():
            out.append((None, None, None, int(rest.sum()), None, None, int(work.spent[rest].sum()), False, why))
    return out


def _call(name: str, arguments: opcosts.OpArguments | None, took: int, tf32: bool) -> tuple[Any, ...]:
    found = opcosts.cost(name, arguments)
    dims = msgspec.json.encode(arguments.dims).decode() if arguments is not None and arguments.dims else None
    if found is not None:
        dtype = "tf32" if tf32 and found.matmul and found.dtype == "float32" else found.dtype
        return name, dims, dtype, 1, found.flops, found.bytes, took, found.matmul, None
    why = NO_SHAPES if opcosts.has_formula(name) else NO_FORMULA
    return name, dims, None, 1, None, None, took, False, why


def _against(frame: pl.DataFrame, ceilings: Mapping[str, Any], wall: int) -> pl.DataFrame:
    """Add rates, ideal times and shares."""
    gemm = {str(dtype): float(rate) for dtype, rate in (ceilings.get("gemm_flops_per_second") or {}).items() if rate}
    gemm |= {ours: gemm[theirs] for ours, theirs in CEILING_NAMES.items() if theirs in gemm}
    read = ceilings.get("read_bytes_per_second") or None
    taken, flops, moved = pl.col("device_time_ns"), pl.col("flops"), pl.col("bytes")
    peak = (
        pl.col("dtype").replace_strict(gemm, default=None, return_dtype=pl.Float64)
        if gemm
        else pl.lit(None, pl.Float64)
    )
    bandwidth = pl.lit(read, pl.Float64)
    compute_ns, memory_ns = flops / peak * 1e9, moved / bandwidth * 1e9
    # Work of the memory class runs outside the matrix units: its ceiling is the bandwidth, whatever its dtype's peak.
    compute_ns = pl.when(pl.col("matmul")).then(compute_ns).otherwise(pl.when(memory_ns.is_not_null()).then(0.0))
    bound = (
        pl.when(compute_ns >= memory_ns)
        .then(pl.lit("compute"))
        .when(memory_ns.is_not_null() & compute_ns.is_not_null())
    )
    ideal = pl.when(compute_ns.is_not_null() & memory_ns.is_not_null()).then(pl.max_horizontal(compute_ns, memory_ns))
    return (
        frame.with_columns(
            flops_per_second=_rate(flops, taken),
            bytes_per_second=_rate(moved, taken),
            intensity_flops_per_byte=pl.when(moved > 0).then(flops / moved),
            bound=bound.then(pl.lit("memory")),
            ideal_ns=ideal.round().cast(pl.Int64),
            mfu=pl.when(pl.col("matmul") & (wall > 0)).then(flops / (peak * max(wall, 1) / 1e9)),
        )
        .with_columns(
            share_of_ceiling=pl.when(taken > 0).then(pl.col("ideal_ns") / taken), lost_ns=taken - pl.col("ideal_ns")
        )
        .with_columns(lost_share=pl.when(wall > 0).then(pl.col("lost_ns") / max(wall, 1)))
        .select(*COLUMNS)
        .sort("device_time_ns", "operator", "input_dims", "dtype", "not_counted", descending=[True, *[False] * 4])
    )


def _rate(amount: pl.Expr, taken: pl.Expr) -> pl.Expr:
    return pl.when(taken > 0).then(amount / taken * 1e9)
