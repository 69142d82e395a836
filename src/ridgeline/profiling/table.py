"""The trace as columns: one row per timed event, names and threads as codes, times as exact int64 ns.

Rows are in a canonical order (start, longer first, thread, name), so no result depends on the order of a file.
Arguments stay raw JSON until someone needs one (:meth:`TraceTable.correlations`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Intervals, Times, union

Mask = NDArray[np.bool_]


class Kind(IntEnum):
    """What an event is, after the three schema generations are made one."""

    CPU_OP = 0
    ANNOTATION = 1
    PYTHON = 2
    RUNTIME = 3
    KERNEL = 4
    MEMCPY = 5
    MEMSET = 6
    DEVICE_OTHER = 7
    GPU_ANNOTATION = 8
    SYNC = 9
    COUNTER_RANGE = 10
    OTHER = 11


DEVICE_KINDS = (Kind.KERNEL, Kind.MEMCPY, Kind.MEMSET, Kind.DEVICE_OTHER)
"""Work on an accelerator's timeline."""

_CATEGORIES = {
    "cpu_op": Kind.CPU_OP,
    "operator": Kind.CPU_OP,
    "user_annotation": Kind.ANNOTATION,
    "python_function": Kind.PYTHON,
    "kernel": Kind.KERNEL,
    "gpu_memcpy": Kind.MEMCPY,
    "memcpy": Kind.MEMCPY,
    "gpu_memset": Kind.MEMSET,
    "memset": Kind.MEMSET,
    "gpu_user_annotation": Kind.GPU_ANNOTATION,
    "cuda_sync": Kind.SYNC,
    "cuda_profiler_range": Kind.COUNTER_RANGE,
}
# Until torch 1.11 user ranges carried the category of operators.
ANNOTATION_NAMES = re.compile(r"(ProfilerStep|Optimizer\.(step|zero_grad)|enumerate\(DataLoader\))#")


def kind_of(category: str | None) -> Kind:
    """The kind of a Chrome category of any schema generation (2021's capitals, ROCm's, today's)."""
    name = (category or "").lower()
    if name in _CATEGORIES:
        return _CATEGORIES[name]
    if name.endswith(("runtime", "driver")):
        return Kind.RUNTIME
    return Kind.DEVICE_OTHER if name.startswith(("gpu_", "concurrent_kernel")) else Kind.OTHER


@dataclass(frozen=True)
class TraceMeta:
    """What the file says of itself. ``ridgeline`` is the block that our own capture leaves."""

    source: str
    rank: int | None = None
    world: int | None = None
    host: str | None = None
    backend: str | None = None
    schema: str = "object"
    ridgeline: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    raw_bytes: int = 0


class _Arguments(msgspec.Struct, gc=False):
    correlation: Any = None
    stream: Any = None


@dataclass(frozen=True)
class TraceTable:
    """Columns of one rank's trace; every array is ``[rows]``. ``start`` and ``end`` are ns since the epoch's base."""

    meta: TraceMeta
    names: tuple[str, ...]
    threads: tuple[tuple[str, str], ...]
    kind: NDArray[np.int8]
    name: NDArray[np.int32]
    thread: NDArray[np.int32]
    start: Times
    end: Times
    args: list[Any]

    def __len__(self) -> int:
        return int(self.start.size)

    def is_kind(self, *kinds: Kind) -> Mask:
        """Rows of these kinds. ``[rows]``"""
        return np.isin(self.kind, kinds)

    def named(self, test: Callable[[str], Any]) -> Mask:
        """Rows whose name passes ``test``, which is called once per distinct name. ``[rows]``"""
        verdicts = np.fromiter((bool(test(name)) for name in self.names), np.bool_, len(self.names))
        return verdicts[self.name] if len(self.names) else np.zeros(len(self), np.bool_)

    def intervals(self, rows: Mask | NDArray[np.intp]) -> Intervals:
        """The union of these rows' spans."""
        return union(self.start[rows], self.end[rows])

    @property
    def device_rows(self) -> Mask:
        """Rows of work on an accelerator. ``[rows]``"""
        return self.is_kind(*DEVICE_KINDS)

    @property
    def has_device_timeline(self) -> bool:
        """Whether the file recorded any accelerator work."""
        return bool(self.device_rows.any())

    def correlations(self, rows: NDArray[np.intp]) -> Times:
        """The launch correlation id of each row, -1 where it has none. ``[len(rows)]``"""
        decode = msgspec.json.Decoder(_Arguments).decode
        out = np.full(rows.size, -1, np.int64)
        for at, row in enumerate(rows.tolist()):
            raw = self.args[row]
            value = decode(raw).correlation if raw else None
            if isinstance(value, int) and 0 <= value < 2**63:
                out[at] = value
        return out
