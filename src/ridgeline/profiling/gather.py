"""Gather decoded events into columns, batch by batch, so that the events themselves can be forgotten at once.

Every value that repeats becomes a code when it is met (categories, names, threads); times become int64 ns; arguments
stay raw text. Of a large trace only the arguments of collectives, copies and counters are kept (:class:`KeptArgs`):
a 5 GB trace then fits in a fraction of its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import compress
from typing import Any, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.chunks import Event
from ridgeline.profiling.classify import COLLECTIVE_OP
from ridgeline.profiling.codes import Codes
from ridgeline.profiling.decimal_time import readable_ns
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.marks import MarkColumns, Marks
from ridgeline.profiling.store import Store
from ridgeline.profiling.table import ANNOTATION_NAMES, DEVICE_KINDS, Kind, Mask, kind_of

_ROW, _ARROW, _MARK, _LABEL, _SKIP = range(5)
_COLLECTION = "Python GC"
_LAUNCH_KINDS = np.isin(np.arange(len(Kind)), (Kind.RUNTIME, *DEVICE_KINDS))
_KEPT_KINDS = np.isin(np.arange(len(Kind)), (Kind.MEMCPY, Kind.MEMSET, Kind.COUNTER_RANGE, Kind.DEVICE_OTHER))
_LABELS = ("process_name", "process_labels")
_NARROW = {
    "kind": np.int8,
    "name": np.int32,
    "thread": np.int16,
    "start": np.int64,
    "length": np.int32,
    "correlation": np.int32,
    "device": np.int16,
    "stream": np.int16,
    "keep": np.bool_,
    "args_bytes": np.int32,
}
"""What the columns are gathered in; a value that does not fit widens its column."""


class KeptArgs(Sequence[Any]):
    """Raw arguments of a table's rows in one buffer: of all rows, or of ``rows`` (sorted) and empty for the others."""

    def __init__(
        self, count: int, rows: NDArray[np.intp] | None, start: Times, end: Times, text: bytes | bytearray
    ) -> None:
        self._count, self._rows, self._start, self._end, self._text = count, rows, start, end, text

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, row: int) -> bytes: ...
    @overload
    def __getitem__(self, row: slice) -> list[bytes]: ...
    def __getitem__(self, row: int | slice) -> bytes | list[bytes]:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(self._count))]
        at = row + self._count if row < 0 else row
        if not 0 <= at < self._count:
            raise IndexError(row)
        if self._rows is not None:
            wanted, at = at, int(np.searchsorted(self._rows, at))
            if at == self._rows.size or self._rows[at] != wanted:
                return b""
        return bytes(memoryview(self._text)[self._start[at] : self._end[at]])

    def take(self, order: NDArray[np.intp]) -> KeptArgs:
        """The arguments of rows ``order``, in that order."""
        if self._rows is None:
            return KeptArgs(order.size, None, self._start[order], self._end[order], self._text)
        at = np.searchsorted(self._rows, order)
        found = np.flatnonzero(self._rows[np.minimum(at, self._rows.size - 1)] == order) if self._rows.size else at[:0]
        return KeptArgs(order.size, found, self._start[at[found]], self._end[at[found]], self._text)


class _Launch(msgspec.Struct, gc=False):
    correlation: int = -1
    device: int = -1
    stream: int = -1
    collective: Any = msgspec.field(default=None, name="Collective name")


class _OddLaunch(msgspec.Struct, gc=False):
    correlation: Any = None
    device: Any = None
    stream: Any = None
    collective: Any = msgspec.field(default=None, name="Collective name")


_LAUNCH_LIST = msgspec.json.Decoder(list[_Launch])
_ODD_LIST = msgspec.json.Decoder(list[_OddLaunch])
_ODD_ONE = msgspec.json.Decoder(_OddLaunch)


class Columns:
    """The columns of everything added so far, in the file's order."""

    def __init__(self, stacks: bool) -> None:
        self._stacks = stacks
        self._sorts, self.names, self.threads, self.ids = Codes(), Codes(), Codes(), Codes()
        self._roles = np.empty(0, np.int8)
        self._kinds = np.empty(0, np.int8)
        self._collective_names = np.empty(0, np.bool_)
        self._counts = np.empty(0, np.int64)
        self._stores = {key: Store(dtype) for key, dtype in _NARROW.items()}
        self._arrows: list[NDArray[np.int64]] = []
        self.streaming = False
        self._text = bytearray()
        self._marks = MarkColumns()
        self.labels: dict[str, str] = {}
        self.first_args: dict[int, bytes] = {}
        self.unreadable = 0

    def add(self, events: list[Event]) -> None:
        """Sort the events by what they are, and take what each sort needs."""
        if not events:
            return
        sort = self._sorts.of([e.ph for e in events], [e.cat for e in events])
        self._learn_sorts()
        role = self._with_collections(events, self._roles[sort])
        counted = sort[(role != _ROW) | (self._roles[sort] == _ROW)]
        self._counts[: len(self._sorts)] += np.bincount(counted, minlength=len(self._sorts))
        rows = events
        if (role != _ROW).any():
            self._other(events, role)
            rows = list(compress(events, (role == _ROW).tolist()))
            sort = sort[role == _ROW]
        if rows:
            self._add_rows(rows, self._kinds[sort])

    def _with_collections(self, events: list[Event], role: NDArray[np.int8]) -> NDArray[np.int8]:
        """Python's garbage collections carry the category of stacks, and are wanted without them too."""
        left_out = role == _SKIP
        if self._stacks or not left_out.any():
            return role
        names = [event.name for event in compress(events, left_out.tolist())]
        if _COLLECTION in names:
            found = [name == _COLLECTION for name in names]
            role[np.flatnonzero(left_out)[np.array(found, np.bool_)]] = _ROW
        return role

    def _learn_sorts(self) -> None:
        """The role and kind of every (phase, category) met so far."""
        if self._roles.size < len(self._sorts):
            met = list(self._sorts)
            self._roles = np.array([self._role(*one) for one in met], np.int8)
            self._kinds = np.array([kind_of(category) for _, category in met], np.int8)
            self._counts = np.concatenate((self._counts, np.zeros(len(met) - self._counts.size, np.int64)))

    def _role(self, phase: str, category: str | None) -> int:
        if phase == "X" and category != "Trace" and (self._stacks or category != "python_function"):
            return _ROW
        if category == "fwdbwd":
            return _ARROW
        if phase in ("i", "I", "C"):
            return _MARK
        return _LABEL if phase == "M" else _SKIP

    def _other(self, events: list[Event], role: NDArray[np.int8]) -> None:
        for event in compress(events, (role == _LABEL).tolist()):
            if event.name in _LABELS:
                self._label(event)
        if (role == _ARROW).any():
            self._add_arrows(list(compress(events, (role == _ARROW).tolist())))
        if not self.streaming and (role == _MARK).any():
            self._marks.add(list(compress(events, (role == _MARK).tolist())))

    def _label(self, event: Event) -> None:
        try:
            text = msgspec.json.decode(event.args)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if isinstance(text, dict):
            said = str(text.get("name") or text.get("labels") or "")
            before = self.labels.get(str(event.pid))
            self.labels[str(event.pid)] = f"{before}\n{said}" if before else said

    def _add_rows(self, events: list[Event], kind: NDArray[np.int8]) -> None:
        start, good = readable_ns([e.ts for e in events])
        length, whole = readable_ns([e.dur for e in events])
        good &= whole
        if not good.all():
            self.unreadable += int((~good).sum())
            events = list(compress(events, good.tolist()))
            start, length, kind = start[good], length[good], kind[good]
        args = [e.args for e in events]
        name = self.names.of([e.name for e in events])
        thread = self.threads.of([e.pid for e in events], [e.tid for e in events])
        correlation, device, stream, collective = launch_columns(kind, args)
        keep = collective | _KEPT_KINDS[kind] | self._is_collective()[name]
        self._remember_first(thread, args)
        columns: dict[str, NDArray[Any]] = {
            "kind": kind,
            "name": name,
            "thread": thread,
            "start": start,
            "length": length,
        }
        columns |= {"correlation": correlation, "device": device, "stream": stream, "keep": keep}
        args = list(compress(args, keep.tolist())) if self.streaming else args
        self._text += b"".join(args)
        columns["args_bytes"] = np.fromiter(map(len, args), np.int64, len(args))
        for key, column in columns.items():
            self._stores[key].append(column)

    def _is_collective(self) -> Mask:
        """Which names are of collectives on the host. ``[names]``"""
        known = self._collective_names.size
        if known < len(self.names):
            new = [bool(COLLECTIVE_OP.match(str(one))) for one in list(self.names)[known:]]
            self._collective_names = np.concatenate((self._collective_names, np.array(new, np.bool_)))
        return self._collective_names

    def _remember_first(self, thread: NDArray[np.int32], args: list[Any]) -> None:
        """The arguments of every thread's first event: a merged file may name the rank there."""
        if len(self.first_args) < len(self.threads):
            codes, at = np.unique(thread, return_index=True)
            for code, one in zip(codes.tolist(), at.tolist(), strict=True):
                self.first_args.setdefault(code, bytes(args[one]))

    def _add_arrows(self, events: list[Event]) -> None:
        time, good = readable_ns([e.ts for e in events])
        begins = np.array([e.ph == "s" for e in events], np.int64)
        threads = self.threads.of([e.pid for e in events], [e.tid for e in events])
        ids = self.ids.of([e.id for e in events])
        self._arrows.append(np.stack((begins, ids.astype(np.int64), threads.astype(np.int64), time))[:, good])

    def stream(self) -> None:
        """From now on keep the arguments of chosen rows only, and no marks; forget what is held beyond that."""
        if self.streaming:
            return
        self.streaming, self._marks = True, MarkColumns()
        keep, size = self._stores["keep"].take(np.bool_), self._stores["args_bytes"].take(np.int64)
        end = np.cumsum(size)[keep]
        text, size = memoryview(self._text), size[keep]
        spans = zip((end - size).tolist(), end.tolist(), strict=True)
        self._text = bytearray().join([text[low:high] for low, high in spans])
        self._stores["keep"].append(keep)
        self._stores["args_bytes"].append(size)

    def take(self, key: str, dtype: Any) -> NDArray[Any]:
        """The whole column in the file's order; it is given up here, so that no more than one is ever held twice."""
        return self._stores.pop(key).take(dtype)

    def take_args(self, order: NDArray[np.intp]) -> KeptArgs:
        """The arguments of rows ``order``, in that order."""
        keep, size = self.take("keep", np.bool_), self.take("args_bytes", np.int64)
        end = np.cumsum(size)
        rows = np.flatnonzero(keep) if self.streaming else None
        return KeptArgs(keep.size, rows, end - size, end, self._text).take(order)

    def arrows(self) -> NDArray[np.int64]:
        """Flow events as rows (begins, id, thread, ns). ``[4, arrows]``"""
        return np.concatenate(self._arrows, axis=1) if self._arrows else np.empty((4, 0), np.int64)

    def marks(self, base: int) -> Marks:
        """Instants and counters in time order; none of a large trace."""
        self.unreadable += self._marks.unreadable
        return self._marks.take(base)

    def skipped(self) -> dict[str, int]:
        """How many events of every other sort were left out, by ``phase:category``."""
        left = Counter[str]()
        for (phase, category), role, count in zip(self._sorts, self._roles, self._counts.tolist(), strict=True):
            if role in (_SKIP, _LABEL) or (role == _MARK and self.streaming):
                left[f"{phase}:{category or ''}"] += count
        return dict(sorted(left.items()))

    def annotation_names(self, names: tuple[str, ...]) -> Mask:
        """Which names are of ranges that old writers called operators. ``[names]``"""
        return np.fromiter((bool(ANNOTATION_NAMES.match(one)) for one in names), np.bool_, len(names))


def launch_columns(kind: NDArray[np.int8], args: list[Any]) -> tuple[Times, NDArray[np.int32], Times, Mask]:
    """Correlation, device and stream of the rows that have them, -1 elsewhere, and which rows carry the arguments of a
    collective. Each ``[rows]``."""
    correlation, stream = np.full(kind.size, -1, np.int64), np.full(kind.size, -1, np.int64)
    device, collective = np.full(kind.size, -1, np.int32), np.zeros(kind.size, np.bool_)
    rows = np.flatnonzero(_LAUNCH_KINDS[kind])
    if not rows.size:
        return correlation, device, stream, collective
    found, plain = _decode_launches([args[row] for row in rows.tolist()])
    correlation[rows] = _ids([one.correlation for one in found], 2**63, plain)
    on_device = kind[rows] != Kind.RUNTIME
    there, some = rows[on_device], list(compress(found, on_device.tolist()))
    device[there] = _ids([one.device for one in some], 2**31, plain)
    stream[there] = _ids([one.stream for one in some], 2**63, plain)
    collective[there] = [one.collective is not None for one in some]
    return correlation, device, stream, collective


def _decode_launches(args: list[Any]) -> tuple[list[Any], bool]:
    """All of them in one call of the decoder, one by one only if one of them is odd; and whether their ids are integers
    for certain."""
    text = b"[" + b",".join([one if one else b"{}" for one in args]) + b"]"
    for decoder in (_LAUNCH_LIST, _ODD_LIST):
        try:
            return decoder.decode(text), decoder is _LAUNCH_LIST
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return [_odd_launch(one) for one in args], False


def _odd_launch(raw: Any) -> _OddLaunch:
    try:
        return _ODD_ONE.decode(raw or b"{}")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _OddLaunch()


def _ids(values: list[Any], limit: int, integers: bool) -> Times:
    """Non-negative integers below ``limit`` (ids are written as numbers or as text), -1 for anything else."""
    if integers or set(map(type, values)) <= {int}:
        try:
            found = np.array(values, np.int64)
        except OverflowError:
            pass
        else:
            return np.where((found >= 0) & (found < limit), found, -1)
    return np.fromiter((_id(value, limit) for value in values), np.int64, len(values))


def _id(value: Any, limit: int) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    return value if type(value) is int and 0 <= value < limit else -1
