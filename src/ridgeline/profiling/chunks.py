"""Decode a trace half a megabyte at a time, on event boundaries, whatever its lines look like.

::

    {"schemaVersion": 1, ..., "traceEvents": [ {..}, {..}, {..}, {..} ], "traceName": ...}
    '------------- head -------------------' '-chunk--' '-chunk--' '------- tail -------'

A chunk is cut at the last ``},{`` in it. That may lie in a string or in nested arguments, so the decode is the proof:
with a whole event at its start, a piece between brackets is JSON only if it also ends with a whole event. Where the
array of events closes, the decoder says where the rest begins. What does not decode is mended by name or, event by
event, left out and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

CHUNK = 1 << 19
_RUN = 256
"""Events tried together once a chunk is known to hold a damaged one."""
_JOIN = 16
"""How many pieces may belong to one event (a list of objects in its arguments has boundaries of its own)."""
_SPACE = 1 << 10
"""More white space than this is not looked for between two events."""
_MOST_DAMAGED = 2000
_LONGEST_HEAD = 256 << 20

_BOUNDARY = re.compile(rb"\}\s*,\s*\{")
_EVENTS = re.compile(rb'"traceEvents"\s*:\s*\[')
_LIST = re.compile(rb"\s*\[")
_CLOSE = re.compile(rb"\}\s*,?\s*\]")
_BOM = b"\xef\xbb\xbf"
_Failed = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Event(msgspec.Struct, gc=False):
    """What every analysis needs of an event; times and arguments stay text."""

    ph: str = ""
    name: Any = ""
    cat: str | None = None
    pid: Any = None
    tid: Any = None
    ts: msgspec.Raw = msgspec.Raw(b"0")
    dur: msgspec.Raw = msgspec.Raw(b"0")
    args: msgspec.Raw = msgspec.Raw(b"")
    id: Any = None


class Header(msgspec.Struct):
    """The keys around the events."""

    baseTimeNanoseconds: Any = 0
    distributedInfo: Any = None
    host_name: Any = None
    ridgeline: Any = None
    ridgeline_recorded: Any = None


_EVENT_LIST = msgspec.json.Decoder(list[Event])


class NotATrace(Exception):
    """The text cannot be read as a trace; its message says why."""


class Chunks:
    """The events of a text that comes in blocks. Iterate once; the other attributes are complete after that."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks = iter(blocks)
        self._over = False
        self._head = self._tail = b""
        self._damaged = self.count = self.raw_bytes = 0
        self._mended: Counter[str] = Counter()
        self._closed = self.bare = False

    def __iter__(self) -> Iterator[list[Event]]:
        """Batches of events.

        Raises:
            NotATrace: no events in it, or too much damage.
        """
        pending = self._open()
        while not (self._closed or (self._over and not pending)):
            batch, pending = self._batch(pending)
            self.count += len(batch)
            yield batch
            if self._over and not self._closed:
                break
        self._tail = pending if self._closed else b""
        if self._closed:
            self._read_tail()
        elif not self.count:
            raise NotATrace(f"not a whole profiler trace (cut off or damaged in its first event, of {self._size()})")

    @property
    def repairs(self) -> tuple[str, ...]:
        """What was mended or left out, in words."""
        said = list(self._mended)
        if self._damaged:
            said.append(f"{self._damaged} damaged events left out")
        if not self._closed:
            said.append(f"cut off after {self.count} events")
        return tuple(said)

    def header(self) -> Header:
        """The keys before and after the events; those that are damaged are left out, which becomes a repair."""
        if self.bare:
            return Header()
        body = self._head + self._tail if self._closed else self._head + b"]}"
        for text in (body, repair(body)[0], self._head + b"]}"):
            try:
                found = msgspec.json.decode(text, type=Header)
            except _Failed:
                continue
            if text is not body:
                self._mended[f"keys around the events are damaged and were left out ({len(self._tail)} bytes)"] += 1
            return found
        self._mended["the keys around the events are damaged and were left out"] += 1
        return Header()

    def _open(self) -> bytes:
        """Read to the first event."""
        text = self._next().removeprefix(_BOM)
        if _LIST.match(text):
            self.bare = True
            return text[text.index(b"[") + 1 :]
        looked = 0
        while not (found := _EVENTS.search(text, looked)):
            looked = max(0, len(text) - 64)
            if self._over or len(text) > _LONGEST_HEAD:
                raise NotATrace(self._why_not(text))
            text += self._next()
        self._head = text[: found.end()]
        return text[found.end() :]

    def _why_not(self, text: bytes) -> str:
        try:
            msgspec.json.decode(text, type=msgspec.Raw)
        except _Failed as error:
            return f"not a whole profiler trace ({error}, of {self._size()})"
        return "not a profiler trace (JSON without 'traceEvents')"

    def _size(self) -> str:
        return f"{self.raw_bytes} bytes"

    def _next(self) -> bytes:
        block = next(self._blocks, None)
        self._over = block is None
        self.raw_bytes += len(block or b"")
        return block or b""

    def _batch(self, pending: bytes) -> tuple[list[Event], bytes]:
        """(the next events, the text behind them). What is whole is decoded where it was put together, without a copy."""
        text = self._more(pending)
        cut = 0 if self._over else _last_boundary(text)
        if not cut:
            return self._take(bytes(text[1:]))
        rest = bytes(text[cut:])
        text[cut:] = b"]"
        try:
            return _events(text), rest.lstrip()[1:]
        except _Failed:
            return self._take(bytes(text[1:-1]) + rest)

    def _more(self, pending: bytes) -> bytearray:
        """A bracket, ``pending`` and at least a chunk more, unless the text is over."""
        parts, got = [b"[", pending], 0
        while got < CHUNK and not self._over:
            parts.append(self._next())
            got += len(parts[-1])
        return bytearray().join(parts)

    def _take(self, text: bytes) -> tuple[list[Event], bytes]:
        """(events at the start of the text, what is left of it)."""
        if self._over and (guess := self._guess_end(text)):
            return guess[0], text[guess[1] :]
        cut = len(text) if self._over else _last_boundary(text)
        if not cut:
            return [], text
        piece = text[:cut]
        try:
            batch = _decode(piece)
        except _Failed as error:
            end = self._end_of_array(piece, error)
            if end is not None:
                return end[0], text[end[1] :]
            mended, what = repair(piece)
            if not what:
                return self._salvage(text)
            self._mended.update(what)
            return self._take(mended + text[cut:])
        if self._over:  # the events end, but not the array
            return batch, b""
        return batch, text[cut:].lstrip()[1:]

    def _end_of_array(self, piece: bytes, error: Exception) -> tuple[list[Event], int] | None:
        """(the events before the closing bracket, where that is), if the decoder met it inside ``piece``."""
        at = re.search(r"trailing characters \(byte (\d+)\)", str(error))
        end = int(at.group(1)) - 1 if at else 0
        for _ in range(3):
            end = piece.rfind(b"]", 0, end)
            if end < 0:
                return None
            try:
                events = _decode(piece[:end])
            except _Failed:
                continue
            self._closed = True
            return events, end
        return None

    def _guess_end(self, text: bytes) -> tuple[list[Event], int] | None:
        """Like :meth:`_end_of_array` for the usual file, whose last ``}]`` closes the events: it spares a decode."""
        end = text.rfind(b"]")
        while end > 0 and text[:end].rstrip()[-1:] != b"}":
            end = text.rfind(b"]", 0, end)
        try:
            events = _decode(text[:end]) if end > 0 else None
        except _Failed:
            return None
        self._closed = events is not None
        return (events, end) if events is not None else None

    def _salvage(self, text: bytes) -> tuple[list[Event], bytes]:
        """Like :meth:`_take` for a text with something damaged in it: every event that can be had."""
        cuts = [found.span() for found in _BOUNDARY.finditer(text)]
        starts = [0, *(stop - 1 for _, stop in cuts)]
        ends = [*(start + 1 for start, _ in cuts), len(text)]
        events: list[Event] = []
        at, last = 0, len(starts) - 1
        while at < last:
            run = min(at + _RUN, last)
            try:
                events += _decode(text[starts[at] : ends[run - 1]])
                at = run
            except _Failed:
                while at < run:
                    one, size = self._one(text, starts, ends, at)
                    if self._closed:
                        return events + one, text[size:]
                    if not size and not self._over and at + _JOIN > last:
                        return events, text[starts[at] :]
                    self._drop(not size)
                    events += one
                    at += max(size, 1)
        if not self._over:
            return events, text[starts[last] :] if at <= last else b""
        if at <= last:
            one, size = self._one(text, starts, ends, last)
            if self._closed:
                return events + one, text[size:]
            events += one
        return events, b""

    def _one(self, text: bytes, starts: list[int], ends: list[int], at: int) -> tuple[list[Event], int]:
        """(the event that starts at piece ``at``, of how many pieces it is made), none and 0 if it is damaged; where
        the array closes behind it, that position instead of the number."""
        usable = len(starts) - at - (not self._over)  # more text may belong to the last piece
        for size in range(1, min(_JOIN, usable) + 1):
            begin, piece = starts[at], text[starts[at] : ends[at + size - 1]]
            try:
                return _decode(piece), size
            except _Failed as error:
                found = self._end_of_array(piece, error) or self._comma_end(piece)
            if found:
                return found[0], begin + found[1]
        return [], 0

    def _comma_end(self, piece: bytes) -> tuple[list[Event], int] | None:
        """The closing bracket after a comma too many."""
        for found in list(_CLOSE.finditer(piece))[:3]:
            if b"," not in found.group():
                continue
            try:
                events = _decode(piece[: found.start() + 1])
            except _Failed:
                continue
            self._mended["a comma before the end of the events"] += 1
            self._closed = True
            return events, found.end() - 1
        return None

    def _drop(self, damaged: bool) -> None:
        self._damaged += damaged
        if self._damaged > _MOST_DAMAGED:
            raise NotATrace(f"not a whole profiler trace (more than {_MOST_DAMAGED} damaged events)")

    def _read_tail(self) -> None:
        parts, size = [self._tail], len(self._tail)
        while not self._over:
            block = self._next()
            size += len(block)
            parts = [*parts, block] if size <= _LONGEST_HEAD else []  # no JSON then, which header() reports
        self._tail = b"".join(parts)


def _decode(piece: bytes) -> list[Event]:
    """The events of ``piece``, which must be whole."""
    return _events(b"[" + piece + b"]")


def _events(text: bytes | bytearray) -> list[Event]:
    """The events of an array, which must be UTF-8 everywhere (the decoder looks only where it reads)."""
    if not text.isascii():
        text.decode()
    return _EVENT_LIST.decode(text)


def _last_boundary(text: bytes | bytearray) -> int:
    """Where the last event that seems whole ends, 0 if there is none."""
    end = len(text)
    while (end := text.rfind(b"{", 0, end)) > 0:
        before = text[max(0, end - _SPACE) : end].rstrip()
        if before.endswith(b",") and (before := before[:-1].rstrip()).endswith(b"}"):
            return end - min(end, _SPACE) + len(before)
    return 0


def repair(data: bytes) -> tuple[bytes, tuple[str, ...]]:
    """Make text of real writers' defects JSON: bytes that are not UTF-8, control characters in strings, NaN and Inf."""
    steps: dict[str, Callable[[bytes], bytes]] = {
        "bytes that are not UTF-8 replaced": lambda raw: raw.decode("utf-8", "replace").encode(),
        "control characters in strings replaced": lambda raw: raw.translate(_CONTROL_TO_SPACE),
        "NaN and Infinity read as null": lambda raw: _NOT_FINITE.sub(rb"\1null", raw),
    }
    done = []
    for what, step in steps.items():
        after = step(data)
        # Line feeds and tabs between tokens are lawful: only a change of length or of other bytes is a repair.
        if after.split() != data.split() if what.startswith("control") else after != data:
            done.append(what)
        data = after
    return data, tuple(done)


_CONTROL_TO_SPACE = bytes(32 if code < 32 else code for code in range(256))
_NOT_FINITE = re.compile(rb"([:,\[]\s*)[-+]?(?:nan|inf(?:inity)?)\b(?=\s*[,\]}])", re.IGNORECASE)
