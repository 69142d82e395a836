"""Read a pickle of plain data without executing anything: dicts with text keys, lists, tuples, text, bytes, numbers.

A pickle is a program for a small stack machine. This is such a machine without the opcodes that import, call or build
objects, so there is nothing to execute; an unlisted opcode is refused by its name. It is also bounded: memory grows with
the file and not with what the file claims (memo indices are keys of a dict, lengths are checked against what is left),
the stack and the number of containers have limits, and integers have the 8 bytes that sizes and addresses need.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError

MAX_BYTES = 4 << 30
MAX_CONTAINERS = 50_000_000
MAX_STACK = 100_000
_NAMES = {ord(one.code): one.name for one in pickletools.opcodes}


class PickleRefused(ValueError):
    """The pickle holds something that is not plain data, or claims more than it has; the message is one line."""


def read_plain_pickle(path: str | Path, max_bytes: int = MAX_BYTES) -> Any:
    """The value in the pickle file ``path`` (protocols 2 to 5).

    Raises:
        UserError: unreadable, larger than ``max_bytes``, cut off, or anything but plain data; one line.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise UserError(f"pickle {file}: {size} bytes, more than the limit of {max_bytes}")
        if not size:
            raise UserError(f"pickle {file}: empty")
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return plain_pickle(data)
    except PickleRefused as error:
        raise UserError(f"pickle {file}: {error}") from None
    except OSError as error:
        raise UserError(f"pickle {file}: cannot be read ({error.strerror or error})") from None


def plain_pickle(data: bytes | mmap.mmap) -> Any:
    """The value of a pickle of plain data.

    Raises:
        PickleRefused: see :func:`read_plain_pickle`.
    """
    if len(data) < 2 or data[0] != 0x80 or not 2 <= data[1] <= 5:
        raise PickleRefused("not a pickle of protocol 2 to 5")
    machine = _Machine(data)
    try:
        return machine.run()
    except (IndexError, struct.error):
        raise PickleRefused(f"cut off or damaged near byte {min(machine.at, len(data))} of {len(data)}") from None
    except (UnicodeDecodeError, OverflowError):
        raise PickleRefused(f"damaged text near byte {machine.at}") from None
    except KeyError:
        raise PickleRefused(f"damaged near byte {machine.at}: refers to a value it never stored") from None


class _Machine:
    """The stack machine. ``at`` is the next byte to read, ``marks`` the heights of the stack at open marks."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 2
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.containers = 0

    def run(self) -> Any:
        """Execute until STOP, and give the one value that is left."""
        while self.data[self.at] != _STOP:
            self.often()
            code = self.data[self.at]
            if code != _STOP:
                self.at += 1
                step = _OPCODES.get(code)
                if step is None:
                    raise PickleRefused(_refusal(code, self.at - 1))
                step(self)
        if len(self.stack) != 1 or self.marks:
            raise PickleRefused("damaged: more or less than one value at its end")
        return self.stack[0]

    def often(self) -> None:
        """Execute the opcodes that make up nine tenths of a snapshot (known keys, whole numbers) without a call each,
        up to the next other one. The stack's limit is checked for all opcodes here."""
        data, stack, memo, at = self.data, self.stack, self.memo, self.at
        push, mark, u4, i4 = stack.append, self.marks.append, _U4.unpack_from, _I4.unpack_from
        try:
            while len(stack) <= MAX_STACK:
                code = data[at]
                if code == _LONG_BINGET:
                    push(memo[u4(data, at + 1)[0]])
                    at += 5
                elif code == _BINGET:
                    push(memo[data[at + 1]])
                    at += 2
                elif code == _BININT1:
                    push(data[at + 1])
                    at += 2
                elif code == _BININT:
                    push(i4(data, at + 1)[0])
                    at += 5
                elif code == _LONG1 and data[at + 1] <= _LONGEST:
                    end = at + 2 + data[at + 1]
                    push(int.from_bytes(data[at + 2 : end], "little", signed=True))
                    at = end
                elif code == _MARK:
                    mark(len(stack))
                    at += 1
                elif code == _MEMOIZE:
                    memo[len(memo)] = stack[-1]
                    at += 1
                else:
                    break
        finally:
            self.at = at
        if len(stack) + len(self.marks) > MAX_STACK:
            raise PickleRefused(f"nested too deeply near byte {at}")

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, never more than there are."""
        end = self.at + count
        if end > self.size:
            raise PickleRefused(f"claims {count} bytes at byte {self.at} of {self.size}")
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, form: struct.Struct) -> int:
        """The next number."""
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return int(value)

    def since_mark(self) -> list[Any]:
        """What was pushed after the last open mark, taken off the stack."""
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def new(self, container: Any) -> None:
        """Push an empty container or a tuple and count it."""
        self.containers += 1
        if self.containers > MAX_CONTAINERS:
            raise PickleRefused(f"more than {MAX_CONTAINERS} containers")
        self.stack.append(container)

    def top(self, kind: type) -> Any:
        """The container on top of the stack, above the last open mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise PickleRefused(f"damaged near byte {self.at}: no {kind.__name__} below its items")
        found = self.stack[-1]
        if type(found) is not kind:
            raise PickleRefused(f"damaged near byte {self.at}: items for something that is no {kind.__name__}")
        return found

    def pop(self) -> Any:
        """The value on top, which must lie above the last open mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError
        return self.stack.pop()

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values into the dict on top; keys are text, so that no file can make them collide."""
        keys = items[::2]
        if len(items) % 2 or set(map(type, keys)) - _TEXT:
            raise PickleRefused(f"a dict whose keys are not text, near byte {self.at}")
        self.top(dict).update(zip(keys, items[1::2], strict=True))


def _refusal(code: int, at: int) -> str:
    name = _NAMES.get(code)
    if name is None:
        return f"damaged: no opcode 0x{code:02x} exists (byte {at})"
    return f"refused: {name} at byte {at} is not plain data; a memory snapshot needs none"


_U1, _U2, _U4, _U8 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q"))
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_TEXT = {str}
_STOP, _BINGET, _LONG_BINGET, _BININT1, _BININT, _MEMOIZE, _MARK, _LONG1 = b".hjKJ\x94(\x8a"
_LONGEST = 9  # bytes of an integer: 8 and a sign


def _sized(length: struct.Struct, text: bool) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        raw = machine.take(machine.number(length))
        machine.stack.append(raw.decode("utf-8", "surrogatepass") if text else raw)

    return step


def _integer(form: struct.Struct) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.number(form))


def _long(machine: _Machine) -> None:
    raise PickleRefused(f"an integer of {machine.number(_U1)} bytes near byte {machine.at}")


def _float(machine: _Machine) -> None:
    (value,) = _F8.unpack_from(machine.data, machine.at)
    machine.at += 8
    machine.stack.append(value)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.new(tuple(reversed(items)))

    return step


def _store(form: struct.Struct) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.memo[machine.number(form)] = machine.stack[-1]

    return step


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value)


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    machine.set_items([machine.pop(), value])


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _appends(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.top(list).extend(items)


_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    ord("M"): _integer(_U2),
    0x8A: _long,  # only those too long
    ord("G"): _float,
    ord("N"): _constant(None),
    0x88: _constant(True),
    0x89: _constant(False),
    0x8C: _sized(_U1, True),
    ord("X"): _sized(_U4, True),
    0x8D: _sized(_U8, True),
    ord("C"): _sized(_U1, False),
    ord("B"): _sized(_U4, False),
    0x8E: _sized(_U8, False),
    ord("}"): lambda machine: machine.new({}),
    ord("]"): lambda machine: machine.new([]),
    ord(")"): lambda machine: machine.new(()),
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("t"): lambda machine: machine.new(tuple(machine.since_mark())),
    ord("s"): _set_item,
    ord("u"): lambda machine: machine.set_items(machine.since_mark()),
    ord("a"): _append,
    ord("e"): _appends,
    ord("q"): _store(_U1),
    ord("r"): _store(_U4),
    0x95: lambda machine: machine.number(_U8),  # a frame's length: only a hint to readers of streams
}
"""Every opcode that is executed besides those of :meth:`_Machine.often`; no other is."""
