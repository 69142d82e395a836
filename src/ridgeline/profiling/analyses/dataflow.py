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

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import polars as pl

from ridgeline.profiling.analyses import execution
from ridgeline.profiling.analyses.execution import Node, Tensor
from ridgeline.profiling.analyses.memory import instants, memory_allocations
from ridgeline.profiling.analyses.memory import why_empty as why_no_memory
from ridgeline.profiling.classify import SHELL
from ridgeline.profiling.nesting import operators
from ridgeline.profiling.table import Kind, TraceTable

Window = tuple[int, int] | None

ROLES = ("parameter", "optimizer_state", "gradient", "activation", "input", "temporary", "unknown")
_BACKWARD = re.compile(r"autograd::engine::evaluate_function")
_OPTIMIZER = re.compile(r"Optimizer\.step#")
_ACCUMULATE = "AccumulateGrad"
_UNWRITTEN = re.compile(r"aten::(empty|new_empty|resize_|set_)")
_SHAPE_ONLY = re.compile(r"aten::(empty|new_|resize_$|set_|\w+_like$)")
_PURE_WRITE = re.compile(r"aten::(copy_|fill_|zero_|normal_|uniform_|bernoulli_)$")

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


@dataclass
class _Version:
    """One version of a storage: from a write to the next, or to the end of its life."""

    storage: int
    life: int
    number: int
    bytes: int
    dtype: str
    written_by: Node | None = None
    written_at: int | None = None
    maker: Node | None = None
    written_in: str | None = None
    reads: list[tuple[Node, int, str]] = field(default_factory=list)
    accumulated: bool = False
    returned: bool = False

    @property
    def key(self) -> tuple[int, int, int]:
        """Storage, life and version."""
        return self.storage, self.life, self.number

    freed_ns: int | None = None
    released_by: str | None = None


@dataclass(frozen=True)
class _Copy:
    """A copy into memory made for it, in the type and layout of its source."""

    node: Node
    source: _Version
    at: int
    size: int


@dataclass
class Flow:
    """All versions and same-form copies of an execution trace."""

    nodes: Sequence[Node]
    versions: list[_Version] = field(default_factory=list)
    copies: list[_Copy] = field(default_factory=list)


class _Walk:
    """Follows the nodes in the order in which they ended."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.flow = Flow(nodes)
        self.by_id = {node.id: node for node in nodes}
        self.phase: dict[int, str] = {}
        self.current: dict[int, _Version] = {}
        self.lives: dict[int, int] = {}
        self.began: dict[int, int] = {}  # storage -> node that began its life; ids rise with the start of a node
        self.now = 0
        self.done: dict[int, tuple[set[int], set[int]]] = {}  # (read, written) storages below a node not yet ended

    def phase_of(self, node: Node | None) -> str:
        """The phase that a node runs in, by the ranges and autograd nodes around it; each optimizer step has its own."""
        chain = []
        found = "forward"
        while node is not None:
            known = self.phase.get(node.id)
            if known or _BACKWARD.match(node.name) or _OPTIMIZER.match(node.name):
                found = known or ("backward" if _BACKWARD.match(node.name) else f"optimizer {node.id}")
                break
            chain.append(node.id)
            node = self.by_id.get(node.ctrl_deps) if node.ctrl_deps != node.id else None
        self.phase.update(dict.fromkeys(chain, found))
        return found

    def step(self, at: int, node: Node) -> None:
        """Account for one node that ended as the ``at``-th."""
        self.now = node.id
        read, written = self.done.pop(node.id, (set(), set()))
        above = self.done.setdefault(node.ctrl_deps, (set(), set()))
        what = execution.effects(str(node.attribute("op_schema") or ""))
        if _ACCUMULATE in node.name:
            for _, tensor in execution.tensors(node.inputs):
                self.version(tensor).accumulated = True
        elif what.known or not SHELL.match(node.name):
            self.access(at, node, what, read, written)
        above[0].update(read)
        above[1].update(written)

    def access(self, at: int, node: Node, what: execution.Effects, read: set[int], written: set[int]) -> None:
        """Reads and writes of an operator that none of its children made."""
        given = list(execution.tensors(node.inputs))
        results = [one for _, one in execution.tensors(node.outputs)]
        mine = {one.storage for _, one in given}
        changed = [(place, one) for place, one in given if place in what.changes]
        made = [one for one in results if one.storage not in mine]
        if what.known and not changed and not any(what.fresh):
            return  # a view: it moves nothing
        phase = self.phase_of(node)
        blind = bool(_PURE_WRITE.match(node.name))
        self.note_copy(at, node, given)
        for place, one in [] if _SHAPE_ONLY.match(node.name) else given:
            if one.storage not in read and not (blind and place in what.changes):
                self.version(one).reads.append((node, at, phase))
                read.add(one.storage)
        for _, one in changed:
            if one.storage not in written:
                self.write(at, node, one, phase)
                written.add(one.storage)
        for one in made:
            self.create(at, node, one, phase, written)

    def version(self, tensor: Tensor) -> _Version:
        """The current version of a tensor's storage; one from before the capture when it has none."""
        found = self.current.get(tensor.storage)
        if found is None:
            found = self.begin(tensor)
        found.bytes = max(found.bytes, tensor.bytes)
        return found

    def live(self, tensor: Tensor) -> tuple[int, int, int]:
        """(life, version, bytes) with which a new life of a storage begins."""
        life = self.lives[tensor.storage] = self.lives.get(tensor.storage, -1) + 1
        self.began[tensor.storage] = self.now
        return life, 0, tensor.bytes

    def begin(self, tensor: Tensor) -> _Version:
        """A new life of a storage."""
        found = _Version(tensor.storage, *self.live(tensor), tensor.dtype)
        self.current[tensor.storage] = found
        self.flow.versions.append(found)
        return found

    def write(self, at: int, node: Node, tensor: Tensor, phase: str) -> None:
        """A write into existing memory: the first one of memory just made fills it, others begin a version."""
        old = self.version(tensor)
        if old.maker is not None and old.written_by is None and not old.reads:
            new = old
        else:
            new = _Version(old.storage, old.life, old.number + 1, old.bytes, old.dtype, maker=old.maker)
            self.flow.versions.append(new)
            self.current[tensor.storage] = new
        new.written_by, new.written_at, new.written_in = node, at, phase

    def create(self, at: int, node: Node, tensor: Tensor, phase: str, written: set[int]) -> None:
        """A result that is no argument: new memory. Its writer is the innermost operator that returns it filled,
        whatever helpers wrote into it before (``aten::addmm`` copies its bias there first)."""
        found = self.current.get(tensor.storage) if tensor.storage in written else None
        if found is None:
            found = self.begin(tensor)
        elif self.began[tensor.storage] < node.id:
            # The id of a storage that is gone was given to this one: what a child wrote belongs to a new life.
            found.life, found.number, found.bytes, found.dtype, found.maker = *self.live(tensor), tensor.dtype, node
        found.maker = found.maker or node
        if not found.returned and not _UNWRITTEN.match(node.name):
            found.written_by, found.written_at, found.written_in, found.returned = node, at, phase, True
        written.add(tensor.storage)

    def note_copy(self, at: int, node: Node, given: list[tuple[int, Tensor]]) -> None:
        """Remember a copy whose destination was made for it in the form of the source."""
        if node.name != "aten::copy_" or len(given) < 2:
            return
        (_, to), (_, source) = given[:2]
        target = self.version(to)
        fresh = target.maker is not None and target.written_by is None and not target.reads
        if fresh and to[2:] == source[2:] and to.storage != source.storage:
            self.flow.copies.append(_Copy(node, self.version(source), at, to.bytes))


def follow(nodes: Sequence[Node]) -> Flow:
    """Versions and copies of an execution trace."""
    walk = _Walk(nodes)
    for at, node in enumerate(nodes):
        walk.step(at, node)
    walk.flow.versions = [one for one in walk.flow.versions if one.written_by or one.reads or one.accumulated]
    return walk.flow


def roles(versions: Sequence[_Version]) -> list[str]:
    """What each version is, by who wrote and who read it, and what the optimizer does with its storage."""
    steps: dict[tuple[int, int], set[str]] = {}
    readers: dict[tuple[int, int], set[str]] = {}
    for one in versions:
        life = one.storage, one.life
        readers.setdefault(life, set()).update(phase.split()[0] for *_, phase in one.reads)
        if (one.written_in or "").startswith("optimizer"):
            steps.setdefault(life, set()).add(str(one.written_in))
    return [_role(one, steps.get((one.storage, one.life), set()), readers[one.storage, one.life]) for one in versions]


def _role(version: _Version, steps: set[str], readers: set[str]) -> str:
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


def why_empty(nodes: Sequence[Node] | None, table: TraceTable | None) -> str | None:
    """Why there is no data flow, or why readers are not known; None when all is."""
    if nodes is not None:
        return None
    missing = why_no_memory(table) if table is not None else "no trace was given"
    if missing:
        return f"{missing}; and no execution trace (torch.profiler.ExecutionTraceObserver) says who read what"
    return "readers are not known: pass an execution trace (torch.profiler.ExecutionTraceObserver)"


class _FunctionId(msgspec.Struct, gc=False):
    id: Any = msgspec.field(name="Record function id", default=None)


def _rows_of(nodes: Sequence[Node], table: TraceTable) -> dict[int, int]:
    """Node id -> row of the same call in the profiler's trace."""
    rows = np.flatnonzero(table.is_kind(Kind.CPU_OP, Kind.ANNOTATION))
    known = {
        one.id: row
        for row, one in zip(rows.tolist(), table.decode(rows, _FunctionId), strict=True)
        if one is not None and isinstance(one.id, int) and one.id > 0
    }
    found = {}
    for node in nodes:
        row = known.get(node.attribute("rf_id"))
        if row is not None and table.names[table.name[row]] == node.name:
            found[node.id] = row
    return found


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
    last: dict[tuple[int, int], _Version] = {}
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
