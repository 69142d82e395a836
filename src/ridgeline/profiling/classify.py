"""What each event is, by the best evidence in the trace, and which evidence that was.

Order of trust for an event of a device::

    user table   a pattern of the reader's own                          certain
    category     the writer calls it a copy or a set                    certain
    arguments    "Collective name" and its companions                   certain
    launch       the innermost operator around the call that launched   strong
    name         patterns of libraries; the last resort                 weak
    none         a kernel without any of these counts as compute        none

*Unknown* is a device row of a category nobody described, and a kernel without evidence on a communication stream: one
whose every kernel with evidence is a collective while others of the device's streams hold none. It may be a collective
too. Both count as compute in totals and stand apart as unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.errors import UserError, nearest
from ridgeline.profiling.intervals import Intervals, contains, empty, intersect, merge, subtract
from ridgeline.profiling.nesting import launching_operator, operators
from ridgeline.profiling.table import Kind, Mask, TraceTable, distinct, look_up, row_numbers, row_type

PHASES = ("data", "forward", "backward", "optimizer")

COLLECTIVE_OP = re.compile(r"(c10d::|_?c10d_functional::|record_param_comms|(gloo|nccl|mpi|ucc|xccl|hccl):)")
TRANSFER = re.compile(r"(gloo|mpi|ucc):")
COLLECTIVE_KERNEL = re.compile(
    r"nccl|rccl|oneccl|hccl|^hcom_|msccl|cross_device_reduce|multimem_|nvshmem|userbuffers_|quickreduce|"
    r"(one|two)_?shot_?all_?reduce|all_?reduce_(fusion|kernel|prototype)|all_?gather_(kernel|lamport)|"
    r"reduce_?scatter_(kernel|cross_device)|deep_ep",
    re.IGNORECASE,
)
"""Kernels of communication libraries by name: NCCL and RCCL of any age (``ncclKernel_``, ``ncclDevKernel_``), and the
custom all-reduces of vLLM, SGLang, aiter and TensorRT-LLM. ``hip*`` is ROCm's prefix for everything, so no evidence."""
COLLECTIVE_LAUNCHER = re.compile(
    r"c10d::|_?c10d_functional::|record_param_comms|(nccl|xccl|hccl|rccl|ucc):|_C_custom_ar::|deep_ep::|"
    r"\w+::\w*(all_?reduce|all_?gather|reduce_?scatter|all_?to_?all)\w*$",
    re.IGNORECASE,
)
"""Operators and ranges whose own kernels communicate (their copies are launched from ``aten::`` operators inside)."""
COMPUTE_KERNEL = re.compile(
    r"triton_(poi|red|per|tem|for)_|at::native|at_cuda_detail|at_hip|gemm|cutlass|xmma|Cijk_|flash_|fmha|cudnn|miopen|"
    r"winograd|convolve|thrust::|cub::|hipcub|rocprim",
    re.IGNORECASE,
)
"""Kernels of compute libraries by name; inductor's carry the names of the operators they fuse, collectives too."""
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
    return table.once("phases", lambda: _find_phases(table))


def _find_phases(table: TraceTable) -> Phases:
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
    return set(distinct(table.thread[rows]))


def host_threads(table: TraceTable) -> list[int]:
    """Threads that drive the step: the one with the steps (else the busiest in ops), and those that run backward."""
    steps = step_rows(table)
    ops = table.is_kind(Kind.CPU_OP, Kind.RUNTIME) & ~table.on_threads(transfer_threads(table))
    threads = set(distinct(table.thread[steps]))
    if not threads and ops.any():
        counts = np.bincount(table.thread[ops])
        threads = {int(counts.argmax())}
    backward = table.is_kind(Kind.CPU_OP) & table.named(_BACKWARD_NODE.match)
    return sorted(threads | set(distinct(table.thread[backward])))


ROLES = ("compute", "optimizer", "communication", "memory", "unknown")
EVIDENCE = ("user table", "category", "arguments", "launch", "name", "stream", "none")
CONFIDENCE = {
    "user table": "certain",
    "category": "certain",
    "arguments": "certain",
    "launch": "strong",
    "name": "weak",
    "stream": "none",
    "none": "none",
}
"""How far each evidence carries. ``stream``: the stream speaks against the default and nothing for anything else."""
_SAMPLE = 32


@dataclass(frozen=True)
class KernelRoles:
    """Role and evidence of every row as codes into ``ROLES`` and ``EVIDENCE``, -1 for rows off a device. ``[rows]``"""

    role: NDArray[np.int8]
    evidence: NDArray[np.int8]

    def has(self, *roles: str) -> Mask:
        """Rows of these roles. ``[rows]``"""
        out = np.zeros(self.role.size, np.bool_)
        for one in roles:
            out |= self.role == ROLES.index(one)
        return out


@dataclass(frozen=True)
class DeviceRoles:
    """Masks over the table's rows (all ``[rows]``) of the accelerator's work, and how collectives were recognised."""

    compute: Mask
    optimizer: Mask
    collective: Mask
    copies: Mask
    unknown: Mask
    evidence: dict[str, int]


def device_roles(
    table: TraceTable, phases: Phases, launched: NDArray[Any], user_table: Mapping[str, str] | None = None
) -> DeviceRoles:
    """Sort device work into roles. ``launched[row]`` is the runtime call that launched a device row, or -1.

    Raises:
        UserError: a wrong pattern or role in ``user_table``.
    """
    found = kernel_roles(table, phases, launched, user_table)
    collective = found.has("communication")
    how = {name: int((collective & (found.evidence == code)).sum()) for code, name in enumerate(EVIDENCE)}
    return DeviceRoles(
        compute=found.has("compute"),
        optimizer=found.has("optimizer"),
        collective=collective,
        copies=found.has("memory"),
        unknown=found.has("unknown"),
        evidence={name: count for name, count in how.items() if count},
    )


def kernel_roles(
    table: TraceTable, phases: Phases, launched: NDArray[Any], user_table: Mapping[str, str] | None = None
) -> KernelRoles:
    """The role of every device row by the first evidence that speaks (the module's table).

    ``user_table`` maps a regular expression, searched in the name, to one of ``ROLES``; its first match wins.

    Raises:
        UserError: a wrong pattern or role in ``user_table``.
    """
    if not user_table:
        return table.once("kernel roles", lambda: _kernel_roles(table, phases, launched, {}))
    return _kernel_roles(table, phases, launched, user_table)


def _kernel_roles(
    table: TraceTable, phases: Phases, launched: NDArray[Any], user_table: Mapping[str, str]
) -> KernelRoles:
    role, evidence = np.full(len(table), -1, np.int8), np.full(len(table), -1, np.int8)
    kernel = table.is_kind(Kind.KERNEL)
    by_launch, computed = _launchers(table, launched)

    def settle(rows: Mask, what: str, how: str) -> None:
        open_rows = rows & (role < 0)
        role[open_rows], evidence[open_rows] = ROLES.index(what), EVIDENCE.index(how)

    for pattern, what in checked_roles(user_table):
        settle(table.device_rows & table.named(pattern.search), what, "user table")
    settle(table.is_kind(Kind.MEMCPY, Kind.MEMSET), "memory", "category")
    settle(table.is_kind(Kind.DEVICE_OTHER), "unknown", "none")
    settle(kernel & _names_with_argument(table, kernel, b'"Collective name"'), "communication", "arguments")
    settle(kernel & by_launch, "communication", "launch")
    named_compute, named_collective = _by_name(table, kernel)
    settle(kernel & named_collective, "communication", "name")
    settle(kernel & _launched_in(table, launched, phases.ranges["optimizer"]), "optimizer", "launch")
    settle(kernel & computed, "compute", "launch")
    settle(kernel & named_compute, "compute", "name")
    settle(kernel & _beside_collectives(table, kernel, role), "unknown", "stream")
    settle(kernel, "compute", "none")
    return KernelRoles(role, evidence)


def checked_roles(user_table: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """The reader's patterns, compiled.

    Raises:
        UserError: a pattern that is no regular expression, or a role that is not one of ``ROLES``.
    """
    out = []
    for pattern, role in user_table.items():
        if role not in ROLES:
            raise UserError(f"role table, pattern '{pattern}': no role '{role}'{nearest(str(role), ROLES)}")
        try:
            out.append((re.compile(pattern), role))
        except re.error as error:
            raise UserError(f"role table, pattern '{pattern}': not a regular expression ({error})") from None
    return out


def _by_name(table: TraceTable, kernel: Mask) -> tuple[Mask, Mask]:
    """(rows with the name of a compute library's kernel, rows with that of a communication library's and not the former).

    Names of kernels are long and the patterns many, so no name is searched for what it need not be."""
    open_names = np.zeros(len(table.names), np.bool_)
    open_names[distinct(table.name[kernel])] = True
    found = []
    for pattern in (COMPUTE_KERNEL, COLLECTIVE_KERNEL):
        one = np.zeros(len(table.names), np.bool_)
        for code in np.flatnonzero(open_names).tolist():
            one[code] = pattern.search(table.names[code]) is not None
        open_names &= ~one
        found.append(look_up(one, table.name))
    return found[0], found[1]


def _names_with_argument(table: TraceTable, rows: Mask, argument: bytes) -> Mask:
    """Rows whose name carries ``argument`` in at least half of a sample spread over its rows (work carried over from
    before the capture lost its arguments, so one look at the first would not do)."""
    at = np.flatnonzero(rows)
    if not at.size:
        return np.zeros(len(table), np.bool_)
    order = np.argsort(table.name[at], kind="stable")
    codes, first = np.unique(table.name[at[order]], return_index=True)
    found = []
    for code, low, high in zip(codes.tolist(), first.tolist(), [*first[1:].tolist(), at.size], strict=True):
        sample = at[order[sorted(set(np.linspace(low, high - 1, _SAMPLE).astype(np.intp).tolist()))]].tolist()
        open_, wanted = len(sample), (len(sample) + 1) // 2
        for one in sample:  # until it is decided
            open_, wanted = open_ - 1, wanted - (argument in table.args[one])
            if wanted <= 0 or wanted > open_:
                break
        if wanted <= 0:
            found.append(code)
    named = np.zeros(len(table.names), np.bool_)
    named[found] = True
    return look_up(named, table.name)


def _launchers(table: TraceTable, launched: NDArray[Any]) -> tuple[Mask, Mask]:
    """(rows launched from inside a collective's own operator, rows launched from any other library operator)."""
    by_collective, by_library = np.zeros(len(table), np.bool_), np.zeros(len(table), np.bool_)
    rows = np.flatnonzero(launched >= 0)
    if not rows.size:
        return by_collective, by_library
    above = launching_operator(operators(table), launched[rows])
    rows, above = rows[above >= 0], above[above >= 0]
    collective, library = table.names_that(COLLECTIVE_LAUNCHER.match), table.names_that(LIBRARY_OP.match)
    by_collective[rows] = collective[table.name[above]]
    by_library[rows] = library[table.name[above]] & (table.kind[above] == Kind.CPU_OP) & ~by_collective[rows]
    return by_collective, by_library


def _launched_in(table: TraceTable, launched: NDArray[Any], where: Intervals) -> Mask:
    """Rows whose launch call starts in ``where``. ``[rows]``"""
    out = np.zeros(len(table), np.bool_)
    rows = np.flatnonzero(launched >= 0)
    out[rows] = contains(where, table.start[launched[rows]])
    return out


def _beside_collectives(table: TraceTable, kernel: Mask, role: NDArray[np.int8]) -> Mask:
    """Rows of communication streams: all their kernels with a role by now communicate, others do not. ``[rows]``

    A job that runs everything on one stream has no communication stream."""
    streams = len(table.threads)
    communicate = kernel & (role == ROLES.index("communication"))
    yes = np.bincount(table.thread[communicate], minlength=streams)
    no = np.bincount(table.thread[kernel & (role >= 0) & ~communicate], minlength=streams)
    every = np.bincount(table.thread[kernel], minlength=streams)
    if not ((every > 0) & (yes == 0)).any():
        return np.zeros(len(table), np.bool_)
    return look_up((yes > 0) & (no == 0), table.thread)


def launches(table: TraceTable) -> NDArray[Any]:
    """For every row the runtime call with the same correlation id, or -1. One call may launch many rows (graphs)."""
    return table.once("launches", lambda: _launches(table))


def _launches(table: TraceTable) -> NDArray[Any]:
    out = np.full(len(table), -1, row_type(len(table)))
    device, runtime = row_numbers(table.device_rows), row_numbers(table.is_kind(Kind.RUNTIME))
    ids = table.correlation[runtime]
    runtime, ids = runtime[ids >= 0], ids[ids >= 0]
    if not device.size or not runtime.size:
        return out
    order = np.argsort(ids, kind="stable")
    wanted = table.correlation[device]
    ids = ids[order]
    at = np.minimum(np.searchsorted(ids, wanted), order.size - 1)
    found = (ids[at] == wanted) & (wanted >= 0)
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
    here = table.on_threads(threads)
    kinds = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION, Kind.RUNTIME)
    active = table.intervals(here & kinds & ~table.named(STEP.match))
    blocked = table.intervals(here & table.is_kind(Kind.RUNTIME) & table.named(SYNCHRONIZE.search))
    return active, intersect(blocked, active)
