"""Kernel breakdown: what the accelerator's time went to, by kernel, by operator, by module, by input shape.

Every device event is one row's: the sums of a breakdown add up to the summed durations of all device events::

    aten::linear      [----------------------)        the module, the operator and its shapes are those of
      aten::addmm        [-------)                    the launch call's moment on the launching thread
        cudaLaunchKernel    [--)
    stream 7                      [==gemm==)          counted once, as (gemm), (aten::addmm), (aten::addmm, shapes)

All kernels of a graph belong to the operator around the graph's launch. Without an accelerator the rows are the
operators' own times (without what they call), in the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.errors import UserError, nearest
from ridgeline.profiling import classify
from ridgeline.profiling.analyses.launches import texts, why_no_timeline
from ridgeline.profiling.codes import Codes
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.nesting import Nesting, nest
from ridgeline.profiling.ops import op_times
from ridgeline.profiling.table import Kind, Mask, TraceTable, distinct

By = Literal["name", "operator", "module", "shape"]
KEYS: dict[str, tuple[str, ...]] = {
    "name": ("name",),
    "operator": ("operator",),
    "module": ("module",),
    "shape": ("operator", "input_dims"),
}
ROLES = ("compute", "communication", "copy", "set", "unknown")
NO_OPERATOR, NO_MODULE, MODULE = "(no operator)", "(no module)", "nn.Module: "

COLUMNS: dict[str, dict[str, str]] = {
    "kernel_breakdown": {
        "name": "name (by='name'): the kernel, copy or set; on a CPU trace the operator",
        "operator": "name (by='operator', 'shape'): innermost operator or compiled region around the launch call",
        "input_dims": "text (by='shape'): the operator's input shapes as recorded, empty where it has none",
        "module": "name (by='module'): innermost nn.Module around the launch call; of backward work, its forward's",
        "role": "class: compute, communication, copy, set or unknown, by evidence",
        "count": "count: device events (on a CPU trace: calls of the operator) that start in the window",
        "sum_ns": "ns: their summed durations (on a CPU trace: own times, without what they call)",
        "min_ns": "ns: the shortest",
        "mean_ns": "ns: sum_ns / count",
        "max_ns": "ns: the longest",
        "share": "fraction: sum_ns of the summed durations of all rows",
    }
}


class _Work(NamedTuple):
    """What is counted: table rows, the time of each, its role (a code into ``ROLES``), and where it was launched. Arrays are ``[work]``."""

    rows: NDArray[np.intp]
    time: Times
    role: NDArray[np.int8]
    thread: NDArray[np.int32]
    moment: Times
    launched: Mask


def kernel_breakdown(table: TraceTable, by: By = "name", window: tuple[int, int] | None = None) -> pl.DataFrame:
    """Count, sum, min, mean, max and share of the device's time by what made it, most time first.

    One row per key and role: an operator that launches kernels and copies has a row for each.

    Raises:
        UserError: ``by`` is none of name, operator, module, shape.
    """
    if by not in KEYS:
        raise UserError(f"kernels by '{by}': no such grouping{nearest(by, KEYS)}")
    work = _work(table, window) if why_empty(table, by) is None else _nothing()
    keys = dict(zip(KEYS[by], _keys(table, work, by), strict=True)) | {"role": (ROLES, work.role)}
    frame = pl.DataFrame({**{key: codes for key, (_, codes) in keys.items()}, "time": work.time})
    time = pl.col("time")
    grouped = frame.group_by(list(keys)).agg(
        count=pl.len().cast(pl.Int64),
        sum_ns=time.sum(),
        min_ns=time.min(),
        mean_ns=time.mean(),
        max_ns=time.max(),
    )
    whole = max(int(work.time.sum()), 1)
    named = {key: texts(labels, grouped[key].to_numpy()) for key, (labels, _) in keys.items()}
    shared = grouped.with_columns(share=pl.col("sum_ns") / whole, **named)
    return shared.sort(["sum_ns", *keys], descending=[True] + [False] * len(keys))


def why_empty(table: TraceTable, by: By = "name") -> str | None:
    """Why this breakdown has no answer for this trace, or None when it has one."""
    if not table.has_device_timeline:
        if (table.is_kind(Kind.RUNTIME) & table.named(lambda name: "Launch" in name)).any():
            return why_no_timeline(table)
        if not table.is_kind(Kind.CPU_OP).any():
            return "no device event and no operator in this trace"
    if by == "module" and not _module_rows(table).any():
        return "no module in this trace: capture with with_stack=True and load with stacks=True"
    if by == "shape" and table.meta.streamed:
        return "no input shapes: a trace of this size is streamed, and the arguments of operators are not kept"
    if by == "shape" and not _dims(table, np.flatnonzero(table.is_kind(Kind.CPU_OP)))[1].any():
        return "no input shapes in this trace: capture with record_shapes=True"
    return None


def _nothing() -> _Work:
    none, times = np.empty(0, np.intp), np.empty(0, np.int64)
    return _Work(none, times, np.empty(0, np.int8), np.empty(0, np.int32), times, np.empty(0, np.bool_))


def _work(table: TraceTable, window: tuple[int, int] | None) -> _Work:
    low, high = window if window is not None else (int(table.start.min()), int(table.start.max()) + 1)
    if table.has_device_timeline:
        return _device_work(table, low, high)
    times = op_times(table, classify.host_threads(table), np.array([low]), np.array([high]))
    sound = table.end[times.rows] >= table.start[times.rows]
    rows = times.rows[sound]
    collective = table.named(classify.COLLECTIVE_OP.match)[rows]
    role = np.where(collective, ROLES.index("communication"), ROLES.index("compute")).astype(np.int8)
    return _Work(rows, times.own[sound], role, table.thread[rows], table.start[rows], np.ones(rows.size, np.bool_))


def _device_work(table: TraceTable, low: int, high: int) -> _Work:
    """Device events that start in ``[low, high)``; those that end before they start are left out."""
    launched = classify.launches(table)
    roles = classify.device_roles(table, classify.find_phases(table), launched)
    inside = (table.start >= low) & (table.start < high) & (table.end >= table.start)
    rows = np.flatnonzero(table.device_rows & inside)
    masks = (
        roles.compute | roles.optimizer,
        roles.collective,
        table.is_kind(Kind.MEMCPY),
        table.is_kind(Kind.MEMSET),
    )
    role = np.select([mask[rows] for mask in masks], range(len(masks)), len(masks)).astype(np.int8)
    call = np.maximum(launched[rows], 0)
    return _Work(
        rows, table.end[rows] - table.start[rows], role, table.thread[call], table.start[call], launched[rows] >= 0
    )


_Labelled = tuple[Sequence[str], NDArray[Any]]
"""Distinct texts, and for every piece of work which of them is its own: long names are not written once a row."""


def _keys(table: TraceTable, work: _Work, by: By) -> list[_Labelled]:
    if by == "name":
        return [(table.names, table.name[work.rows])]
    if by == "module":
        return [_named(table, _modules(table, work), NO_MODULE)]
    owner = _owners(table, work)
    operator = _named(table, owner, NO_OPERATOR)
    return [operator] if by == "operator" else [operator, _dims(table, owner)]


def _named(table: TraceTable, rows: NDArray[np.intp], missing: str) -> _Labelled:
    """The names of table rows, ``missing`` for -1."""
    labels = table.names if missing in table.names else (*table.names, missing)
    code = np.where(rows >= 0, table.name[rows], labels.index(missing)) if len(table) else rows
    return labels, code


def operator_nesting(table: TraceTable) -> Nesting:
    """Nesting of operators and compiled regions: ranges of the user and the profiler's steps name no operator."""
    regions = table.named(lambda n: classify.COMPILED_CALL.match(n) or classify.COMPILED_REGION.match(n))
    return nest(table, table.is_kind(Kind.CPU_OP) | (table.is_kind(Kind.ANNOTATION) & regions))


def _owners(table: TraceTable, work: _Work) -> NDArray[np.intp]:
    """The operator row each piece of work belongs to, or -1: on a CPU trace itself. ``[work]``"""
    if not table.has_device_timeline:
        return work.rows
    found = operator_nesting(table).innermost(work.thread, work.moment)
    return np.where(work.launched, found, -1)


class _Dims(msgspec.Struct):
    new: msgspec.Raw = msgspec.field(name="Input Dims", default=msgspec.Raw(b""))
    old: msgspec.Raw = msgspec.field(name="Input dims", default=msgspec.Raw(b""))


def _dims(table: TraceTable, owner: NDArray[np.intp]) -> _Labelled:
    """The recorded input shapes of operator rows as compact text, empty for -1 and where there are none. ``[owner]``"""
    codes = Codes({"": 0})
    rows, inverse = np.unique(owner, return_inverse=True)
    found = table.decode(np.maximum(rows, 0), _Dims) if len(table) else iter(())
    labels = [
        bytes(one.new or one.old).translate(None, b" \n\r\t").decode() if one is not None and row >= 0 else ""
        for row, one in zip(rows.tolist(), found, strict=False)
    ]
    label = codes.of(labels)
    return list(codes), label[inverse.reshape(-1)]


def _module_rows(table: TraceTable) -> Mask:
    return table.is_kind(Kind.PYTHON) & table.named(lambda name: name.startswith(MODULE))


def _modules(table: TraceTable, work: _Work) -> NDArray[np.intp]:
    """The innermost module's row at each launch, or -1; backward work takes that of the forward operator linked to it."""
    modules = nest(table, _module_rows(table))
    found = np.where(work.launched, modules.innermost(work.thread, work.moment), -1)
    missing = np.flatnonzero((found < 0) & work.launched)
    if len(table.links) and missing.size:
        thread, moment = _forward_of(table, work.thread[missing], work.moment[missing])
        found[missing] = modules.innermost(thread, moment)
    return found


def _forward_of(table: TraceTable, thread: NDArray[np.int32], moment: Times) -> tuple[NDArray[np.int32], Times]:
    """Where the forward operator ran whose backward is open on ``thread[i]`` at ``moment[i]``; thread -1 where none."""
    links, operators = table.links, operator_nesting(table)
    target = operators.innermost(links.to_thread, links.to_time)
    ends = np.where(target >= 0, table.end[target], np.iinfo(np.int64).min)
    out_thread, out_time = np.full(thread.size, -1, np.int32), np.zeros(thread.size, np.int64)
    for one in distinct(thread):
        asked = np.flatnonzero(thread == one)
        here = np.flatnonzero(links.to_thread == one)
        here = here[np.argsort(links.to_time[here], kind="stable")]
        if not here.size:
            continue
        latest = np.searchsorted(links.to_time[here], moment[asked], side="right") - 1
        link = here[np.maximum(latest, 0)]
        open_ = (latest >= 0) & (ends[link] > moment[asked])
        out_thread[asked[open_]], out_time[asked[open_]] = links.from_thread[link[open_]], links.from_time[link[open_]]
    return out_thread, out_time
