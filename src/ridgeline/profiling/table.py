"""The trace as columns: one row per timed event, names and threads as codes, times as exact int64 ns.

Rows are in a canonical order (start, longer first, thread, name), so no result depends on the order of a file.
Arguments stay raw JSON until someone needs one (:meth:`TraceTable.decode`); what every analysis of an accelerator
needs (correlation, stream, device) is a column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.intervals import Intervals, Times, merge, union

Mask = NDArray[np.bool_]
_Made = TypeVar("_Made")
_Shape = TypeVar("_Shape", bound=msgspec.Struct)


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
    "xpu_sync": Kind.SYNC,
    "cuda_profiler_range": Kind.COUNTER_RANGE,
    # Kineto's own aliases: MTIA's device events are kernels, Gaudi's rows are calls of its host runtime.
    "mtia_ccp_events": Kind.KERNEL,
    "hpu_op": Kind.RUNTIME,
}
_DEVICE_CATEGORY = ("gpu_", "concurrent_kernel", "mtia_", "collective_comm")
# Until torch 1.11 user ranges carried the category of operators.
ANNOTATION_NAMES = re.compile(r"(ProfilerStep|Optimizer\.(step|zero_grad)|enumerate\(DataLoader\))#")


def kind_of(category: str | None) -> Kind:
    """The kind of a Chrome category of any schema generation (2021's capitals, ROCm's, today's)."""
    name = (category or "").lower()
    if name in _CATEGORIES:
        return _CATEGORIES[name]
    if name.endswith(("runtime", "driver")):
        return Kind.RUNTIME
    return Kind.DEVICE_OTHER if name.startswith(_DEVICE_CATEGORY) else Kind.OTHER


@dataclass(frozen=True)
class TraceMeta:
    """What the file says of itself. ``ridgeline`` is the block that our own capture leaves.

    ``streamed``: the trace was too large to keep every argument; those of collectives, copies and counters are there,
    and there are no marks. ``repairs`` says in words what the reader mended, left out, or could not name.
    """

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
    streamed: bool = False


@dataclass(frozen=True)
class Links:
    """Arrows from a forward operator to its backward (``fwdbwd`` flow events); arrays are ``[links]``.

    An end is a thread's code and a moment: the operator that starts there, or the innermost one open then.
    """

    from_thread: NDArray[np.int32]
    from_time: Times
    to_thread: NDArray[np.int32]
    to_time: Times

    def __len__(self) -> int:
        return int(self.from_time.size)

    @staticmethod
    def none() -> Links:
        """No arrow."""
        codes, times = np.empty(0, np.int32), np.empty(0, np.int64)
        return Links(codes, times, codes, times)


class Mark(NamedTuple):
    """An event without a duration: an instant (``phase`` ``i``: ``[memory]`` of the profiler) or a counter (``C``)."""

    phase: str
    name: str
    thread: tuple[str, str]
    time_ns: int
    args: bytes


_BLOCK = 1 << 18
"""Rows worked on at once where a whole column's temporaries would be a good part of a large table."""


def look_up(values: NDArray[Any], codes: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """``values[codes]``, in blocks: indexing with narrow codes at once would first make wide ones. ``[codes]``"""
    out = np.empty(codes.size, values.dtype)
    for at in range(0, codes.size, _BLOCK):
        out[at : at + _BLOCK] = values[codes[at : at + _BLOCK]]
    return out


def distinct(codes: NDArray[np.integer[Any]]) -> list[int]:
    """The values of ``codes``, sorted, without negative ones. For codes, whose largest value is small."""
    seen = np.zeros(int(codes.max(initial=-1)) + 2, np.bool_)  # -1 falls on the last
    for at in range(0, codes.size, _BLOCK):
        seen[codes[at : at + _BLOCK]] = True
    found: list[int] = np.flatnonzero(seen[:-1]).tolist()
    return found


def values(numbers: NDArray[np.integer[Any]]) -> list[int]:
    """The values of ``numbers``, sorted."""
    ordered = np.sort(numbers)
    found: list[int] = ordered[np.append(True, ordered[1:] != ordered[:-1])[: ordered.size]].tolist()
    return found


def row_type(count: int) -> type[np.int32] | type[np.int64]:
    """What row numbers of a table of ``count`` rows are kept in."""
    return np.int32 if count < 2**31 else np.int64


def row_numbers(mask: Mask) -> NDArray[Any]:
    """``np.flatnonzero(mask)``, as narrow as row numbers can be."""
    out, at = np.empty(int(np.count_nonzero(mask)), row_type(mask.size)), 0
    for low in range(0, mask.size, _BLOCK):
        found = np.flatnonzero(mask[low : low + _BLOCK])
        out[at : at + found.size] = found + low
        at += found.size
    return out


@dataclass(frozen=True)
class TraceTable:
    """Columns of one rank's trace; every array is ``[rows]``. ``start`` and ``end`` are ns since the epoch's base.

    ``thread`` is a code into ``threads``, ``(pid, tid)`` as text; for device rows that pair is the device and stream.
    ``correlation`` (of device and runtime rows), ``device`` and ``stream`` (of device rows) are -1 where absent; in a
    streamed table they are int32 where that holds them.
    ``args[row]`` is raw JSON, empty where the event has none or a streamed load did not keep it.
    """

    meta: TraceMeta
    names: tuple[str, ...]
    threads: tuple[tuple[str, str], ...]
    kind: NDArray[np.int8]
    name: NDArray[np.int32]
    thread: NDArray[np.int32]
    start: Times
    end: Times
    args: Sequence[Any]
    correlation: Times
    device: NDArray[np.int32]
    stream: Times
    links: Links = field(default_factory=Links.none)
    marks: Sequence[Mark] = ()
    _made: dict[str, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return int(self.start.size)

    def is_kind(self, *kinds: Kind) -> Mask:
        """Rows of these kinds. ``[rows]``"""
        out = np.zeros(len(self), np.bool_)
        for kind in kinds:  # np.isin would need many times the memory
            out |= self.kind == int(kind)
        return out

    def named(self, test: Callable[[str], Any]) -> Mask:
        """Rows whose name passes ``test``, which is called once per distinct name. ``[rows]``"""
        return look_up(self.names_that(test), self.name)

    def names_that(self, test: Callable[[str], Any]) -> Mask:
        """Which names pass ``test``. ``[names]``"""
        return np.fromiter((bool(test(name)) for name in self.names), np.bool_, len(self.names))

    def on_threads(self, threads: Iterable[int]) -> Mask:
        """Rows of these threads. ``[rows]``"""
        wanted = np.zeros(len(self.threads), np.bool_)
        wanted[list(threads)] = True
        return look_up(wanted, self.thread)

    def intervals(self, rows: Mask | NDArray[np.intp]) -> Intervals:
        """The union of these rows' spans."""
        if rows.dtype != np.bool_ or rows.size <= _BLOCK:
            return union(self.start[rows], self.end[rows])
        parts = []
        for low in range(0, rows.size, _BLOCK):
            block = slice(low, low + _BLOCK)
            parts.append(union(self.start[block][rows[block]], self.end[block][rows[block]]))
        return merge(*parts)

    @property
    def device_rows(self) -> Mask:
        """Rows of work on an accelerator. ``[rows]``"""
        return self.is_kind(*DEVICE_KINDS)

    @property
    def has_device_timeline(self) -> bool:
        """Whether the file recorded any accelerator work."""
        return bool(self.device_rows.any())

    def once(self, what: str, make: Callable[[], _Made]) -> _Made:
        """What ``make`` derives from this table alone, made at the first call and kept: many analyses want the same."""
        if what not in self._made:
            self._made[what] = make()
        found: _Made = self._made[what]
        return found

    @property
    def duration(self) -> Times:
        """``end - start``; negative where the file says so. ``[rows]`` ns"""
        return self.end - self.start

    def select(self, rows: NDArray[np.intp]) -> TraceTable:
        """The table of these rows alone, in this order; names, threads, arrows and marks stay."""
        args = self.args.take(rows) if hasattr(self.args, "take") else [self.args[row] for row in rows.tolist()]
        return replace(
            self,
            kind=self.kind[rows],
            name=self.name[rows],
            thread=self.thread[rows],
            start=self.start[rows],
            end=self.end[rows],
            args=args,
            correlation=self.correlation[rows],
            device=self.device[rows],
            stream=self.stream[rows],
        )

    def decode(self, rows: NDArray[np.intp], shape: type[_Shape]) -> Iterator[_Shape | None]:
        """Arguments of these rows as ``shape`` (a msgspec Struct of the fields wanted, all with defaults); None where a
        row has no arguments or they do not fit."""
        read = msgspec.json.Decoder(shape).decode
        for row in rows.tolist():
            raw = self.args[row]
            try:
                yield read(raw) if raw else None
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                yield None
