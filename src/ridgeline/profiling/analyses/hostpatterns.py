"""Anti-patterns of the host: waiting for the device, Python loops over a dim, the optimizer and the loader."""

from __future__ import annotations

import re

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.analyses.opcall import OpArguments
from ridgeline.profiling.analyses.patterns import Case, Found
from ridgeline.profiling.classify import STEP, SYNCHRONIZE, host_threads
from ridgeline.profiling.table import Kind, Mask

_ITEM = re.compile(r"aten::(item|_local_scalar_dense|is_nonzero)$")
_COPY = re.compile(r"aten::(copy_|_to_copy|to|_pin_memory)$")
_BETWEEN = re.compile(r"(DtoH|HtoD|DeviceToHost|HostToDevice|Device -> Host|Host -> Device)", re.IGNORECASE)
_MEMCPY_CALL = re.compile(r"(cuda|hip|cu|mu|xpu)Memcpy", re.IGNORECASE)
_OPTIMIZER = re.compile(r"Optimizer\.step#")
_ZERO_GRAD = re.compile(r"Optimizer\.zero_grad#")
_ZEROING = re.compile(r"aten::(zero_|fill_|_foreach_zero_)$")
_GROUPED = re.compile(r"aten::_(foreach|fused)|CompiledFxGraph|Torch-Compiled Region|^triton_")
_GROUPED_KERNEL = re.compile(r"multi_tensor_apply")
_LOADER = re.compile(r"enumerate\(DataLoader\)#_SingleProcess")
_INDEXING = re.compile(r"aten::(select|slice|index|narrow)$")

LOOP_LENGTH = 8
"""Successive places of one tensor from which indexing counts as a loop."""
SMALL_OPS = 16
"""Operators in an optimizer step from which it counts as many."""
_BLOCKING_NS = 1_000


def _inside(case: Case, name: re.Pattern[str]) -> Mask:
    """Operators and ranges of this name. ``[rows]``"""
    return case.table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & case.table.named(name.search)


def _waits(case: Case) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(runtime calls that wait for the device, operators around them or -1): synchronising calls, and copies between
    host and device that are synchronous or whose memory is pageable."""
    table, calls = case.table, case.host_calls()
    device = np.flatnonzero(table.is_kind(Kind.MEMCPY) & table.named(_BETWEEN.search))
    crossing = np.zeros(len(table), np.bool_)
    crossing[case.launched[device[case.launched[device] >= 0]]] = True
    sync = table.named(SYNCHRONIZE.search)
    calls = calls[sync[calls] | (crossing & table.named(_MEMCPY_CALL.search))[calls]]
    return calls, case.enclosing(calls)


def _split(case: Case) -> dict[str, tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Waiting calls by what they belong to: ``item``, ``copy`` or ``other``; each (calls, owning operators or -1)."""
    calls, around = _waits(case)
    item = case.topmost(around, _inside(case, _ITEM))
    copy = case.topmost(around, _inside(case, _COPY))
    memcpy = case.table.named(_MEMCPY_CALL.search)[calls] if calls.size else np.zeros(0, np.bool_)
    of_item = item >= 0
    of_copy = ~of_item & ((copy >= 0) | memcpy)
    other = ~of_item & ~of_copy
    return {
        "item": (calls[of_item], item[of_item]),
        "copy": (calls[of_copy], np.where(copy >= 0, copy, around)[of_copy]),
        "other": (calls[other], around[other]),
    }


def items(case: Case) -> Found:
    """``.item()`` and friends: on a device trace those that wait, on a CPU trace all but the optimizer's own."""
    if case.table.has_device_timeline:
        rows = np.unique(_split(case)["item"][1])
        return Found(rows, case.length(rows))
    named = _inside(case, _ITEM)
    rows = case.rows(named)
    rows = rows[(case.topmost(rows, named) == rows) & (case.topmost(rows, _inside(case, _OPTIMIZER)) < 0)]
    return Found(rows, case.length(rows))


def copies(case: Case) -> Found:
    """Copies between host and device in which the host waits: a synchronising call, or more than 1 us in the copy's."""
    calls, owner = _split(case)["copy"]
    sync = case.table.named(SYNCHRONIZE.search)[calls]
    copying = np.isin(owner, owner[~sync]) | (owner < 0)
    return _per_owner(case, calls[copying], owner[copying])


def synchronisations(case: Case) -> Found:
    """Calls that wait for the device outside items and copies, of a thread that runs operators. The profiler's own
    at the end of a capture lie outside the steps; without steps only those inside an operator or range count."""
    calls, around = _split(case)["other"]
    return _per_owner(case, calls[around >= 0], around[around >= 0])


def _per_owner(case: Case, calls: NDArray[np.intp], owner: NDArray[np.intp]) -> Found:
    """One sighting per owning operator (per call where none is known), costing its waiting calls."""
    step = case.table.named(STEP.match)[owner] & (owner >= 0)
    owner = np.where((owner >= 0) & ~step, owner, calls)
    rows, inverse = np.unique(owner, return_inverse=True)
    cost = np.zeros(rows.size, np.int64)
    np.add.at(cost, inverse.reshape(-1), case.length(calls))
    waited = cost >= _BLOCKING_NS
    return Found(rows[waited], cost[waited])


def loop_indexing(case: Case) -> Found:
    """Selects or slices of one tensor's sizes at many successive places, called from Python and not from an operator."""
    table = case.table
    rows = case.rows(table.is_kind(Kind.CPU_OP) & table.named(_INDEXING.match))
    parent = case.ops.parent[rows]
    rows = rows[(parent < 0) | (table.kind[parent] != Kind.CPU_OP)]
    groups: dict[tuple[int, int, int, bytes], list[tuple[int, int]]] = {}
    for row, arguments in zip(rows.tolist(), table.decode(rows, OpArguments), strict=True):
        place = _place(arguments)
        if place is not None and arguments is not None:
            same = msgspec.json.encode((arguments.dims, arguments.concrete[1:2]))
            key = (int(table.thread[row]), int(case.ops.parent[row]), int(table.name[row]), same)
            groups.setdefault(key, []).append((row, place))
    found = [row for seen in groups.values() if _is_loop([place for _, place in seen]) for row, _ in seen]
    out = np.array(sorted(found), np.intp)
    return Found(out, case.length(out))


def _place(arguments: OpArguments | None) -> int | None:
    """Where a select or slice starts: its third argument."""
    try:
        return int(arguments.concrete[2]) if arguments is not None else None
    except (IndexError, ValueError, TypeError):
        return None


def _is_loop(places: list[int]) -> bool:
    """Whether at least :data:`LOOP_LENGTH` places follow each other at one distance somewhere in the list."""
    steps = np.diff(np.array(places, np.int64))
    if steps.size < LOOP_LENGTH - 1:
        return False
    same = np.concatenate(([False], (steps[1:] == steps[:-1]) & (steps[1:] != 0)))
    edges = np.flatnonzero(~same)
    longest = int(np.diff(np.append(edges, steps.size)).max())
    return longest + 1 >= LOOP_LENGTH


def single_tensor_optimizer(case: Case) -> Found:
    """Optimizer steps of many operators with no foreach, fused or compiled one among them. Apex's fused optimizers
    have no operator of their own: their kernels say it, under hundreds of small additions to step counters."""
    table = case.table
    steps = case.rows(_inside(case, _OPTIMIZER))
    parent = case.ops.parent
    direct = np.flatnonzero(table.is_kind(Kind.CPU_OP) & (parent >= 0))
    counts = np.bincount(parent[direct], minlength=len(table))
    grouped = np.flatnonzero(table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & table.named(_GROUPED.search))
    kernels = np.flatnonzero(table.is_kind(Kind.KERNEL) & table.named(_GROUPED_KERNEL.search))
    launchers = np.concatenate((grouped, case.operator[kernels]))
    above = case.topmost(launchers, _inside(case, _OPTIMIZER))
    rows = steps[(counts[steps] >= SMALL_OPS) & ~np.isin(steps, above)]
    return Found(rows, case.length(rows))


def synchronous_loader(case: Case) -> Found:
    """Batches made by the driving thread itself."""
    table = case.table
    rows = case.rows(_inside(case, _LOADER) & np.isin(table.thread, host_threads(table)))
    return Found(rows, case.length(rows))


def zeroed_gradients(case: Case) -> Found:
    """``zero_grad`` calls that write zeros: the device time of those kernels, on a CPU trace the operators' time."""
    table = case.table
    calls = case.rows(_inside(case, _ZERO_GRAD))
    if not calls.size:
        return Found.none()
    zeroing = np.flatnonzero(table.is_kind(Kind.CPU_OP) & table.named(_ZEROING.match))
    outermost = zeroing[case.topmost(zeroing, table.is_kind(Kind.CPU_OP)) == zeroing]
    above = case.topmost(outermost, _inside(case, _ZERO_GRAD))
    rows = calls[np.isin(calls, above)]
    if table.has_device_timeline:
        return Found(rows, case.device_time(rows, np.ones(len(table), np.bool_)))
    cost = np.zeros(rows.size, np.int64)
    mine = np.isin(above, rows)
    np.add.at(cost, np.searchsorted(rows, above[mine]), case.length(outermost[mine]))
    return Found(rows, cost)
