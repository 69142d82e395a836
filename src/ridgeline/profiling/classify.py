"""What each event is, by the best evidence in the trace, and which evidence that was.

Order of trust: arguments of the event, then what launched it or lies around it, then its name. A device
activity of a category nobody described stays "unknown"; it is not called compute.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Intervals, contains, empty, intersect, merge, subtract
from ridgeline.profiling.table import Kind, Mask, TraceTable

PHASES = ("data", "forward", "backward", "optimizer")

COLLECTIVE_OP = re.compile(r"(c10d::|_?c10d_functional::|record_param_comms|(gloo|nccl|mpi|ucc|xccl|hccl):)")
TRANSFER = re.compile(r"(gloo|mpi|ucc):")
COLLECTIVE_KERNEL = re.compile(
    r"nccl(Dev)?Kernel|rccl|nccl|oneccl|hccl|cross_device_reduce|multimem_|nvshmem|"
    r"(one|two)_shot_all_?reduce|all_?reduce_(fusion|kernel)|all_?gather_kernel|reduce_?scatter_kernel|deep_ep",
    re.IGNORECASE,
)
COMPILED_CALL = re.compile(r"## Call CompiledFxGraph|CompiledFxGraph")
COMPILED_REGION = re.compile(r"Torch-Compiled Region|CompiledFunction")
# Shells around other ops, and interpreter work that has a name: not computation of their own.
SHELL = re.compile(
    r"autograd::engine::evaluate_function|torch::autograd::|.*Backward\d*$|Torch-Compiled Region|CompiledFunction|"
    r"TorchDynamo Cache Lookup|Pregraph bytecode|AOTDispatcher |RegisterPostBackwardFunction"
)
LIBRARY_OP = re.compile(r".*::|.*cpp_fused")
"""Ops of the dispatcher (``aten::mm``, ``mine::op``) and inductor's C++ kernels. A name without either is a Python
autograd function or a range: what it computes, it computes in ops of its own."""
SYNCHRONIZE = re.compile(r"Synchronize", re.IGNORECASE)
STEP = re.compile(r"ProfilerStep#?(\d+)?")
_FALLBACK = {
    "data": re.compile(r"enumerate\(DataLoader\)#"),
    "optimizer": re.compile(r"Optimizer\.(step|zero_grad)#"),
    "forward": re.compile(r"DistributedDataParallel\.forward|FullyShardedDataParallel\.forward"),
}
_BACKWARD_NODE = re.compile(r"autograd::engine::evaluate_function")


@dataclass(frozen=True)
class Phases:
    """Where each phase of the loop ran on the host, disjoint, and the evidence for each."""

    ranges: dict[str, Intervals] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)


def find_phases(table: TraceTable) -> Phases:
    """Phases from the ``ridgeline.*`` ranges; for a foreign trace from the names torch itself gives."""
    ranges: dict[str, Intervals] = {}
    evidence: dict[str, str] = {}
    annotation = table.is_kind(Kind.ANNOTATION)
    for phase in PHASES:
        rows = annotation & table.named(f"ridgeline.{phase}".__eq__)
        how = f"ridgeline.{phase} ranges"
        if not rows.any() and phase in _FALLBACK:
            rows, how = (
                annotation & table.named(_FALLBACK[phase].match),
                f"{_first_name(table, _FALLBACK[phase])} ranges",
            )
        if not rows.any() and phase == "backward":
            rows, how = table.is_kind(Kind.CPU_OP) & table.named(_BACKWARD_NODE.match), "autograd node ops"
        ranges[phase] = table.intervals(rows)
        evidence[phase] = how if rows.any() else "none"
    taken = empty()
    for phase in ("data", "optimizer", "backward", "forward"):  # nested ranges: the more specific phase keeps the time
        ranges[phase] = subtract(ranges[phase], taken)
        taken = merge(taken, ranges[phase])
    return Phases(ranges, evidence)


def _first_name(table: TraceTable, pattern: re.Pattern[str]) -> str:
    return next((name for name in table.names if pattern.match(name)), pattern.pattern)


def step_rows(table: TraceTable) -> NDArray[np.intp]:
    """Rows of the profiler's whole step ranges on the host, in time order.

    A capture of ours that its loop cut short says how many steps it completed; the fragment after them is no step.
    """
    rows = np.flatnonzero(table.is_kind(Kind.ANNOTATION) & table.named(STEP.match))
    whole = table.meta.ridgeline.get("recorded")
    return rows if whole is None else rows[:whole]


def transfer_threads(table: TraceTable) -> set[int]:
    """Threads that only move data for a CPU backend: those that hold ``gloo:`` spans."""
    rows = table.is_kind(Kind.ANNOTATION, Kind.CPU_OP) & table.named(TRANSFER.match)
    return set(np.unique(table.thread[rows]).tolist())


def host_threads(table: TraceTable) -> list[int]:
    """Threads that drive the step: the one with the steps (else the busiest in ops), and those that run backward."""
    steps = step_rows(table)
    ops = table.is_kind(Kind.CPU_OP, Kind.RUNTIME) & ~np.isin(table.thread, list(transfer_threads(table)))
    threads = set(np.unique(table.thread[steps]).tolist())
    if not threads and ops.any():
        counts = np.bincount(table.thread[ops])
        threads = {int(counts.argmax())}
    backward = table.is_kind(Kind.CPU_OP) & table.named(_BACKWARD_NODE.match)
    return sorted(threads | set(np.unique(table.thread[backward]).tolist()))


@dataclass(frozen=True)
class DeviceRoles:
    """Masks over the table's rows (all ``[rows]``) of the accelerator's work, and how collectives were recognised."""

    compute: Mask
    optimizer: Mask
    collective: Mask
    copies: Mask
    unknown: Mask
    evidence: dict[str, int]


def device_roles(table: TraceTable, phases: Phases, launched: NDArray[np.intp]) -> DeviceRoles:
    """Sort device work into roles. ``launched[row]`` is the runtime call that launched a device row, or -1."""
    kernel = table.is_kind(Kind.KERNEL)
    by_argument = kernel & _names_with_argument(table, kernel, b'"Collective name"')
    by_launch = kernel & ~by_argument & _launched_by_collective(table, launched)
    by_name = kernel & ~by_argument & ~by_launch & table.named(COLLECTIVE_KERNEL.search)
    collective = by_argument | by_launch | by_name
    moment = np.where(launched >= 0, table.start[launched], np.iinfo(np.int64).min)
    optimizer = kernel & ~collective & contains(phases.ranges["optimizer"], moment)
    how = {"arguments": by_argument, "launch": by_launch, "name": by_name}
    return DeviceRoles(
        compute=kernel & ~collective & ~optimizer,
        optimizer=optimizer,
        collective=collective,
        copies=table.is_kind(Kind.MEMCPY, Kind.MEMSET),
        unknown=table.is_kind(Kind.DEVICE_OTHER),
        evidence={key: int(mask.sum()) for key, mask in how.items() if mask.any()},
    )


def _names_with_argument(table: TraceTable, rows: Mask, argument: bytes) -> Mask:
    """Rows whose name carries ``argument`` at its first appearance (one look per distinct name)."""
    at = np.flatnonzero(rows)
    names, first = np.unique(table.name[at], return_index=True)
    found = [
        code for code, one in zip(names.tolist(), at[first].tolist(), strict=True) if argument in bytes(table.args[one])
    ]
    return np.isin(table.name, found)


def _launched_by_collective(table: TraceTable, launched: NDArray[np.intp]) -> Mask:
    """Device rows launched from inside a ``nccl:`` range of the launching thread."""
    out = np.zeros(len(table), np.bool_)
    ranges = table.is_kind(Kind.ANNOTATION) & table.named(re.compile(r"(nccl|xccl|hccl):").match)
    rows = np.flatnonzero(launched >= 0)
    source = launched[rows]
    for thread in np.unique(table.thread[ranges]).tolist():
        inside = table.intervals(ranges & (table.thread == thread))
        out[rows] |= (table.thread[source] == thread) & contains(inside, table.start[source])
    return out


def launches(table: TraceTable) -> NDArray[np.intp]:
    """For every row the runtime call with the same correlation id, or -1. One call may launch many rows (graphs)."""
    out = np.full(len(table), -1, np.intp)
    device, runtime = np.flatnonzero(table.device_rows), np.flatnonzero(table.is_kind(Kind.RUNTIME))
    ids = table.correlation[runtime]
    runtime, ids = runtime[ids >= 0], ids[ids >= 0]
    if not device.size or not runtime.size:
        return out
    order = np.argsort(ids, kind="stable")
    wanted = table.correlation[device]
    at = np.minimum(np.searchsorted(ids[order], wanted), order.size - 1)
    found = (ids[order][at] == wanted) & (wanted >= 0)
    out[device[found]] = runtime[order[at[found]]]
    return out


def is_compiled(table: TraceTable) -> bool:
    """Whether the trace shows torch.compile's work: its regions, its graph calls, or kernels it generated."""
    return any(
        COMPILED_CALL.match(name) or COMPILED_REGION.match(name) or name.startswith("triton_") for name in table.names
    )


def cpu_compute(table: TraceTable, threads: list[int]) -> Intervals:
    """Where these threads computed: ops and compiled graphs, without shells, Python between ops, and collectives."""
    named = table.named
    candidates = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION)
    ops = table.is_kind(Kind.CPU_OP) & named(LIBRARY_OP.match) & ~named(SHELL.match) & ~named(COLLECTIVE_OP.match)
    calls = candidates & named(COMPILED_CALL.match)
    if not calls.any():
        calls = candidates & named(COMPILED_REGION.match)
    collective = candidates & named(COLLECTIVE_OP.match)
    out = empty()
    for thread in threads:
        here = table.thread == thread
        busy = subtract(table.intervals((ops | calls) & here), table.intervals(collective & here))
        out = merge(out, busy)
    return out


def host_activity(table: TraceTable, threads: list[int]) -> tuple[Intervals, Intervals]:
    """(moments with any event of the host's threads, moments blocked in a synchronising call)."""
    here = np.isin(table.thread, threads)
    kinds = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION, Kind.RUNTIME)
    active = table.intervals(here & kinds & ~table.named(STEP.match))
    blocked = table.intervals(here & table.is_kind(Kind.RUNTIME) & table.named(SYNCHRONIZE.search))
    return active, intersect(blocked, active)
