"""Events without a duration, instants and counters: gathered as columns, made into tuples only when somebody asks.

Few analyses read them and a trace with memory events holds as many as it holds operators, so the load keeps codes, times
and raw arguments, and the first one who looks pays for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.chunks import Event
from ridgeline.profiling.codes import Codes
from ridgeline.profiling.decimal_time import readable_ns
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.table import Mark


class Marks(Sequence[Mark]):
    """Marks in time order; ``make`` gives them, ``count`` of them, at the first look."""

    def __init__(self, count: int, make: Callable[[], tuple[Mark, ...]]) -> None:
        self._count, self._make = count, make
        self._made: tuple[Mark, ...] | None = None

    def all(self) -> tuple[Mark, ...]:
        """Every mark."""
        if self._made is None:
            self._made, self._make = self._make(), tuple
        return self._made

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Mark: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Mark, ...]: ...
    def __getitem__(self, at: int | slice) -> Mark | tuple[Mark, ...]:
        return self.all()[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.all() == tuple(other)

    __hash__ = None  # type: ignore[assignment]


class MarkColumns:
    """The marks met so far, in the file's order."""

    def __init__(self) -> None:
        self.unreadable = 0
        self._count, self._sorts, self._text = 0, Codes(), bytearray()
        self._parts: list[tuple[NDArray[np.int32], Times, Times]] = []

    def add(self, events: list[Event]) -> None:
        """Add these, but for those without a readable time, which are counted as ``unreadable``."""
        time, good = readable_ns([e.ts for e in events])
        kept = events if good.all() else list(compress(events, good.tolist()))
        fields = ([e.ph for e in kept], [e.name for e in kept], [e.pid for e in kept], [e.tid for e in kept])
        args = [e.args for e in kept]
        self._text += b"".join(args)  # a copy: raw arguments would keep the whole text alive
        self._parts.append((self._sorts.of(*fields), time[good], np.fromiter(map(len, args), np.int64, len(args))))
        self._count += len(kept)
        self.unreadable += len(events) - len(kept)

    def take(self, base: int) -> Marks:
        """All of them, their times from ``base`` (ns) on."""
        return Marks(self._count, lambda: self._tuples(base))

    def _tuples(self, base: int) -> tuple[Mark, ...]:
        sorts = [
            ("i" if phase == "I" else phase, str(name), (str(pid), str(tid))) for phase, name, pid, tid in self._sorts
        ]
        columns = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        code, time, size = columns if self._parts else (np.empty(0, np.int64),) * 3
        ends, text = np.cumsum(size), memoryview(self._text)
        spans = zip(code.tolist(), (time + base).tolist(), (ends - size).tolist(), ends.tolist(), strict=True)
        made = [Mark._make((*sorts[at], moment, bytes(text[low:high]))) for at, moment, low, high in spans]
        return tuple(sorted(made, key=lambda one: (one.time_ns, one.name)))
