"""Every collective of a rank: what it was, what it moved, when it ran, and how much of it nothing hid.

A collective on an accelerator is a call on the host and a kernel; on a CPU backend it is a call and a transfer::

    host      --c10d::allreduce_--)                 call
    stream              [----- ncclDevKernel -----)     arrival = start: the kernel runs, and waits, from here
    compute   [=====)[======)         [====)
                        ^ hidden ^^^^^      ^exposed

    main      --c10d::allreduce_--)                 call = arrival
    worker                [---- gloo:all_reduce ----)   transfer; [arrival, end) is the collective

It has the name of its ``c10d`` parent, for what carries it out may be called otherwise: a reduce-scatter of FSDP2 is
``gloo:all_reduce`` on the worker thread and ``ncclDevKernel_Generic`` says nothing. Facts come from the arguments of the
kernel or of ``record_param_comms`` where the writer left them, else from the shapes of the call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.bandwidth import Ceiling, with_bandwidth
from ridgeline.profiling.analyses.message import Message, read_messages
from ridgeline.profiling.analyses.roles import UserTable, read_user_table
from ridgeline.profiling.analyses.temporal import activity, step_windows
from ridgeline.profiling.communication import operation, pair_calls
from ridgeline.profiling.intervals import Intervals, clip, covered, intersect, total
from ridgeline.profiling.nesting import Nesting, launching_operator, nest
from ridgeline.profiling.table import Kind, Mask, TraceTable

COLUMNS = {
    "collectives": {
        "op": "all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, ...; null when nothing says",
        "name": "the c10d parent's name; without one the record_param_comms argument, the range's or the kernel's name",
        "transfer": "name of the kernel, or of the backend's transfer; null for a call whose transfer is not recorded",
        "group": "name of the process group; null when the trace does not say",
        "group_size": "ranks in the group; of the whole job when the trace does not say (see group_evidence)",
        "group_ranks": "ranks of the group as the trace writes them; null when it does not say",
        "group_evidence": "arguments, or assumed: the trace names no group and the whole job is taken",
        "sequence": "index of the collective in its group, by the time of its call, from 0; those whose call lies before "
        "the capture come first",
        "writer_sequence": "the backend's own sequence number; null when the trace does not say",
        "step": "number of the profiler step it was called in; null outside of steps",
        "dtype": "of the elements; null when the trace does not say",
        "bytes": "bytes: the larger of this rank's input and output; null when the trace does not say",
        "call_ns": "ns: start of the call on the host; null when it lies before the capture",
        "arrival_ns": "ns: when this rank began to take part: its kernel's start; on a CPU backend its call's start",
        "start_ns": "ns: start of the kernel or transfer (of the call when no transfer is recorded)",
        "end_ns": "ns: end of the kernel or transfer (of the call when no transfer is recorded)",
        "duration_ns": "ns: end - start",
        "exposed_ns": "ns: part of [arrival, end) in which this rank computed nothing",
        "hidden_ns": "ns: the rest of [arrival, end); exposed + hidden = end - arrival",
        "operator": "outermost operator or range around the call (no steps, no phases); null without one",
        "module": "innermost nn.Module around the call; null unless the table has Python stacks",
        "thread": "the calling host thread, as pid/tid; null when the call is not recorded",
        "timed": "whether start and end are those of the transfer; false: of the call alone",
        "evidence": "how the kernel was recognised (user table, arguments, launch, name), or transfer or call on a CPU",
        "algorithm_bytes_per_second": "bytes/s: bytes / duration; a lower bound, for waiting is inside the duration",
        "bus_bytes_per_second": "bytes/s: algorithm bandwidth times nccl-tests' factor of the operation",
        "ceiling_share": "share: bus bandwidth / the measured ceiling; null without one",
    },
    "communication_overlap": {
        "communication_ns": "ns: union of collectives",
        "hidden_ns": "ns: part of it covered by compute",
        "exposed_ns": "ns: the rest",
        "overlap_fraction": "share: hidden / communication; null without communication",
    },
}
_TEXT = ("op", "name", "transfer", "group", "group_ranks", "group_evidence", "dtype", "operator", "module", "thread")
_SCHEMA: dict[str, Any] = {
    name: pl.String if name in (*_TEXT, "evidence") else pl.Boolean if name == "timed" else pl.Int64
    for name in list(COLUMNS["collectives"])[:-3]
}
_PHASE_PREFIX = "ridgeline."
_BEFORE = 10**18  # ns, about 30 years: puts what began before the capture ahead of all that began in it


def collectives(
    table: TraceTable,
    window: tuple[int, int] | None = None,
    user_table: UserTable = None,
    ceiling: Ceiling = None,
) -> pl.DataFrame:
    """One row per collective, by arrival. Columns: ``COLUMNS``.

    Args:
        table: one rank.
        window: ns; only collectives that arrive inside.
        user_table: patterns of kernel names to roles (see ``roles.read_user_table``).
        ceiling: measured bus bandwidth in bytes/s, one figure or one per operation.

    Raises:
        UserError: a wrong ``user_table``.
    """
    rows = _device_rows(table, user_table) if table.has_device_timeline else _host_rows(table)
    frame = pl.DataFrame(rows, schema=_SCHEMA, orient="row")
    if rows:
        busy, _ = _busy(table, user_table)
        arrival, end = frame["arrival_ns"].to_numpy(), frame["end_ns"].to_numpy()
        end = np.maximum(arrival, end)  # a damaged file may say otherwise
        hidden = covered(busy, arrival, end)
        frame = frame.with_columns(
            pl.Series("hidden_ns", hidden, pl.Int64), pl.Series("exposed_ns", end - arrival - hidden, pl.Int64)
        )
    # "sequence" holds the moment that orders the group's collectives until here.
    frame = frame.sort("arrival_ns", "end_ns", "name", nulls_last=True).with_columns(
        pl.col("sequence").rank("ordinal").over("group").cast(pl.Int64) - 1
    )
    if window is not None:
        frame = frame.filter(pl.col("arrival_ns").is_between(*window, closed="left"))
    timed = pl.when("timed").then("duration_ns").alias("_time")
    return with_bandwidth(frame.with_columns(timed), "_time", ceiling).drop("_time")


def why_no_collectives(table: TraceTable) -> str | None:
    """Why ``collectives`` has no row for this table, or None when it has some."""
    if not collectives(table).is_empty():
        return None
    calls = int((table.is_kind(Kind.CPU_OP) & table.named(classify.COLLECTIVE_OP.match)).sum())
    if not calls:
        return "no communication: no collective kernel, transfer or c10d call in the trace"
    alone = table.meta.world == 1
    return f"{calls} calls of collectives and no kernel of one" + (": the job is a single rank" if alone else "")


def communication_overlap(
    table: TraceTable, window: tuple[int, int] | None = None, user_table: UserTable = None
) -> pl.DataFrame:
    """One row: how much of the communication compute hides. Columns: ``COLUMNS``. The fraction is null, never NaN,
    without communication."""
    spent, hidden = 0, 0
    if len(table):
        compute, communication = _busy(table, user_table)
        communication = communication if window is None else clip(communication, *window)
        spent, hidden = total(communication), total(intersect(communication, compute))
    row = (spent, hidden, spent - hidden, hidden / spent if spent else None)
    schema = dict.fromkeys(COLUMNS["communication_overlap"], pl.Int64) | {"overlap_fraction": pl.Float64}
    return pl.DataFrame([row], schema=schema, orient="row")


def _busy(table: TraceTable, user_table: UserTable) -> tuple[Intervals, Intervals]:
    """(moments of compute, unknown kernels included; moments of communication), by the same roles as the rows."""
    if not table.has_device_timeline:
        found = activity(table)
        return found.compute, found.communication
    launched, phases = classify.launches(table), classify.find_phases(table)
    roles = classify.kernel_roles(table, phases, launched, read_user_table(user_table))
    return table.intervals(roles.has("compute", "optimizer", "unknown")), table.intervals(roles.has("communication"))


def _device_rows(table: TraceTable, user_table: UserTable) -> list[tuple[Any, ...]]:
    """Rows of the frame from a device's kernels. Kernels of one call are one collective."""
    launched = classify.launches(table)
    found = classify.kernel_roles(table, classify.find_phases(table), launched, read_user_table(user_table))
    kernels = np.flatnonzero(found.has("communication"))
    if not kernels.size:
        return []
    host = _host_nesting(table)
    above = launching_operator(host, launched[kernels])
    call = _climb(host, above, table.named(lambda name: name.startswith("c10d::")))
    record = _climb(host, above, table.named("record_param_comms".__eq__))
    ranges = _climb(host, above, table.named(classify.COLLECTIVE_LAUNCHER.match) & ~_record(table))
    # One call may launch several kernels; carried-over kernels and those of graphs have no call of their own.
    owner = np.where(record >= 0, record, np.where(ranges >= 0, ranges, -1 - kernels))
    _, first, inverse = np.unique(owner, return_index=True, return_inverse=True)
    start = np.full(first.size, np.iinfo(np.int64).max)
    end = np.full(first.size, np.iinfo(np.int64).min)
    np.minimum.at(start, inverse, table.start[kernels])
    np.maximum.at(end, inverse, table.end[kernels])
    kernels, above, call, record, ranges = (one[first] for one in (kernels, above, call, record, ranges))
    called = np.where(call >= 0, call, np.where(record >= 0, record, ranges))
    facts = read_messages(table, [kernels, record, call, ranges])
    how = [classify.EVIDENCE[code] for code in found.evidence[kernels].tolist()]
    names = _names(table, [call, record, ranges, kernels], facts)
    # In a group's order work from before the capture comes first, by its start; a graph's kernel with its launch.
    source = launched[kernels]
    order = np.where(called >= 0, table.start[called], np.where(source >= 0, table.start[source], start - _BEFORE))
    return _frame_rows(table, host, called, kernels, (start, start, end, order), facts, names, how)


def _record(table: TraceTable) -> Mask:
    return table.named("record_param_comms".__eq__)


def _host_rows(table: TraceTable) -> list[tuple[Any, ...]]:
    """Rows of the frame from a CPU backend's calls and transfers, or from the calls of a trace without its device."""
    pairs = pair_calls(table, classify.host_threads(table))
    call, transfer = pairs.call, pairs.transfer
    if not call.size:
        call = np.flatnonzero(table.is_kind(Kind.ANNOTATION) & table.named(lambda n: n.startswith(("nccl:", "xccl:"))))
        transfer = np.full(call.size, -1, np.intp)
    if not call.size:
        return []
    timed = np.where(transfer >= 0, transfer, call)
    arrival = np.where(call >= 0, table.start[call], table.start[transfer])
    host = _host_nesting(table)
    record = _climb(host, call, _record(table))
    facts = read_messages(table, [record, call, transfer])
    how = ["transfer" if one >= 0 else "call" for one in transfer.tolist()]
    names = _names(table, [call, transfer], facts)
    order = np.where(call >= 0, arrival, arrival - _BEFORE)
    times = (arrival, table.start[timed], table.end[timed], order)
    return _frame_rows(table, host, call, transfer, times, facts, names, how)


def _frame_rows(
    table: TraceTable,
    host: Nesting,
    call: Any,
    transfer: Any,
    times: tuple[Any, Any, Any, Any],
    facts: list[Message],
    names: list[tuple[str | None, str]],
    how: list[str],
) -> list[tuple[Any, ...]]:
    """The frame's rows in the order of its columns; ``times`` are arrival, start, end, and the moment that orders a
    group. Exposure is filled in later, and the sequence made of that moment."""
    operators = _named(table, _outermost(host, call))
    modules = _named(table, _modules(table, call))
    steps = _steps(table, times[3])
    rows = []
    for at, (fact, (op, name)) in enumerate(zip(facts, names, strict=True)):
        arrival, start, end, order = (int(one[at]) for one in times)
        made, ran = int(call[at]), int(transfer[at])
        rows.append(
            (
                op,
                name,
                table.names[table.name[ran]] if ran >= 0 else None,
                fact.group,
                fact.group_size if fact.group_size is not None else table.meta.world,
                fact.group_ranks,
                "arguments" if fact.group_size is not None else "assumed",
                order,
                fact.sequence,
                steps[at],
                fact.dtype,
                fact.size(op, table.meta.world),
                int(table.start[made]) if made >= 0 else None,
                arrival,
                start,
                end,
                end - start,
                0,
                0,
                operators[at],
                modules[at],
                "/".join(table.threads[table.thread[made]]) if made >= 0 else None,
                ran >= 0,
                how[at],
            )
        )
    return rows


def _names(table: TraceTable, candidates: list[Any], facts: list[Message]) -> list[tuple[str | None, str]]:
    """(operation, name) of every collective: the first candidate row whose name speaks of an operation. ``[n]``"""
    out = []
    for at, fact in enumerate(facts):
        names = [table.names[table.name[rows[at]]] for rows in candidates if rows[at] >= 0]
        if fact.collective:  # stands for record_param_comms, whose name says nothing
            names = [one for one in names if one.startswith("c10d::")] + [fact.collective, *names]
        speaking = [one for one in names if operation(one)]
        name = speaking[0] if speaking else names[0]
        out.append((operation(name), name))
    return out


def _host_nesting(table: TraceTable) -> Nesting:
    """Operators and ranges, without the profiler's steps and the phases of our loop."""
    skip = table.named(lambda name: classify.STEP.match(name) or name.startswith(_PHASE_PREFIX))
    return nest(table, table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & ~skip)


def _climb(host: Nesting, rows: Any, wanted: Mask) -> Any:
    """For each row the closest of itself and its parents that is ``wanted``, or -1. ``[len(rows)]``"""
    out, at = np.full(len(rows), -1, np.intp), np.array(rows, np.intp)
    while (at >= 0).any():
        hit = (at >= 0) & wanted[at]
        out[hit] = at[hit]
        at = np.where((at >= 0) & ~hit, host.parent[at], -1)
    return out


def _outermost(host: Nesting, rows: Any) -> Any:
    """For each row the outermost one around it other than itself, or -1. ``[len(rows)]``"""
    root = host.outermost(rows)
    return np.where(root == rows, -1, root)


def _modules(table: TraceTable, rows: Any) -> Any:
    """The innermost ``nn.Module`` frame around each row, or -1. ``[len(rows)]``"""
    frames = table.is_kind(Kind.PYTHON) & table.named(lambda name: name.startswith("nn.Module: "))
    out = np.full(len(rows), -1, np.intp)
    known = np.flatnonzero(np.asarray(rows) >= 0)
    if frames.any() and known.size:
        asked = np.asarray(rows)[known]
        out[known] = nest(table, frames).innermost(table.thread[asked], table.start[asked])
    return out


def _named(table: TraceTable, rows: Any) -> list[str | None]:
    return [table.names[table.name[row]] if row >= 0 else None for row in rows.tolist()]


def _steps(table: TraceTable, moments: Any) -> list[int | None]:
    """The number of the profiler step that holds each moment, or None."""
    windows = step_windows(table)
    starts = np.array([start for _, start, _ in windows], np.int64)
    at = np.searchsorted(starts, moments, side="right") - 1
    return [
        windows[one][0] if one >= 0 and moment < windows[one][2] and windows[one][0] < 2**63 else None
        for one, moment in zip(at.tolist(), moments.tolist(), strict=True)
    ]
