"""Torch's CUDA memory snapshots (``torch.cuda.memory._dump_snapshot``), read as plain data and never executed.

A snapshot has two halves. ``segments`` is the state when it was written: pieces of device memory, cut into blocks::

    segment  [ block: tensor | free | block: tensor |      free      ]   reserved = all of it
                               ^ cached, but cannot be returned to the device while its neighbours live

``device_traces`` is the history before that, newest last, limited in length: ``alloc``, ``free_requested``,
``segment_alloc``, ``oom`` and others, each with its stack. What was held before the history began is the state less the
history. Sizes of tensors are the requested ones; what rounding adds stands in ``rounding_bytes``.
Format: the docstring of ``torch.cuda.memory._snapshot``, torch 2.11 to 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.errors import UserError
from ridgeline.profiling.analyses.memory import pair
from ridgeline.profiling.analyses.pickles import MAX_BYTES, read_plain_pickle
from ridgeline.profiling.intervals import Times

ALLOC, FREE, OOM = "alloc", "free_requested", "oom"
_RESERVING = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_LIBRARY_FRAME = re.compile(r"(^|/)(torch|site-packages|dist-packages)/|^<|^\?\?|\.(cpp|cc|cu|h|hpp|c|S)$")
_FILE = re.compile(r":(\d+|None) .*$", re.DOTALL)
BEFORE = "before the recorded history"
_SHOWN_FRAMES = 6
_INT64 = 2**63

COLUMNS = {
    "snapshot_timeline": {
        "device": "text: cuda and its index",
        "event": "place in the device's history, from 0",
        "time_ns": "ns since the epoch; null when the history has no times",
        "action": "text: alloc, free_requested, segment_alloc, segment_free, oom, ..",
        "bytes": "bytes: size of what was asked, released or reserved",
        "allocated_bytes": "bytes: requested by live tensors after the event",
        "reserved_bytes": "bytes: held by the allocator after the event",
    },
    "snapshot_peak": {
        "device": "text: cuda and its index",
        "where": "text: file:line function, the innermost frame of the stack outside torch",
        "stack": "text: the innermost frames, one a line",
        "count": "allocations held at the peak; null for what the history does not explain",
        "bytes": "bytes: their sum; the rows of a device sum to its peak",
        "share": "fraction: of the device's peak",
    },
    "snapshot_segments": {
        "device": "text: cuda and its index",
        "address": "address of the segment",
        "stream": "stream that it serves",
        "kind": "text: small or large",
        "total_bytes": "bytes: reserved",
        "active_bytes": "bytes: in blocks in use, or waiting for another stream",
        "free_bytes": "bytes: total_bytes - active_bytes",
        "largest_free_bytes": "bytes: the largest free block",
        "rounding_bytes": "bytes: of active_bytes, what no tensor asked for",
        "trapped_bytes": "bytes: free, but in a segment with live blocks: cannot be returned to the device",
    },
}


@dataclass(frozen=True)
class Blocks:
    """Blocks of all segments; arrays are ``[blocks]``. ``segment`` counts :attr:`Snapshot.segments`' rows."""

    segment: NDArray[np.int64]
    address: Times
    size: Times
    requested: Times
    active: NDArray[np.bool_]
    waiting: NDArray[np.bool_]
    stack: NDArray[np.int64]


@dataclass(frozen=True)
class History:
    """One device's events, oldest first; arrays are ``[events]``. ``free`` is what the device had left at an ``oom``,
    -1 elsewhere; ``time_ns`` is -1 where none was recorded."""

    action: tuple[str, ...]
    address: Times
    size: Times
    time_ns: Times
    free: Times
    stack: NDArray[np.int64]

    def signed(self) -> Times:
        """Requested bytes: positive for allocations, negative for releases, 0 for other events."""
        sign = np.array([{ALLOC: 1, FREE: -1}.get(one, 0) for one in self.action], np.int64)
        return sign * self.size

    def reserving(self) -> Times:
        """Bytes reserved (positive) and returned (negative)."""
        return np.array([_RESERVING.get(one, 0) for one in self.action], np.int64) * self.size


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as columns. ``segments`` has rows (device, address, stream, kind, total bytes); ``stacks[code]`` are
    frames, innermost first, as ``file:line function``."""

    source: str
    segments: tuple[tuple[int, int, int, str, int], ...]
    blocks: Blocks
    histories: dict[int, History]
    stacks: tuple[tuple[str, ...], ...]

    @property
    def devices(self) -> list[int]:
        """Devices with memory or history."""
        used = {at for at, history in self.histories.items() if history.action}
        return sorted(used | {segment[0] for segment in self.segments})

    def of_device(self, device: int) -> NDArray[np.bool_]:
        """Blocks of this device. ``[blocks]``"""
        owner = np.array([segment[0] for segment in self.segments], np.int64)
        return owner[self.blocks.segment] == device if owner.size else np.zeros(self.blocks.size.size, np.bool_)


class _Stacks:
    """Codes for stacks. The same list of frames (snapshots share them) is looked at once."""

    def __init__(self) -> None:
        self._by_list: dict[int, int] = {}
        self._by_text: dict[tuple[str, ...], int] = {(): 0}

    def code(self, frames: Any) -> int:
        """The code of a list of frames; 0 for none."""
        if not isinstance(frames, list):
            return 0
        known = self._by_list.get(id(frames))
        if known is None:
            text = tuple(_frame(one) for one in frames if isinstance(one, dict))
            known = self._by_list[id(frames)] = self._by_text.setdefault(text, len(self._by_text))
        return known

    def all(self) -> tuple[tuple[str, ...], ...]:
        """Stacks by code."""
        return tuple(self._by_text)


def _frame(frame: dict[str, Any]) -> str:
    return f"{frame.get('filename')}:{frame.get('line')} {frame.get('name')}"


def read_snapshot(path: str | Path, max_bytes: int = MAX_BYTES) -> Snapshot:
    """Read a snapshot file.

    Raises:
        UserError: unreadable, not plain data, or not a memory snapshot; one line that says which.
    """
    found = read_plain_pickle(path, max_bytes)
    return snapshot_of(found, str(path), Path(path).stat().st_size)


def snapshot_of(found: Any, source: str, size: int | None = None) -> Snapshot:
    """The snapshot of an unpickled dict. ``size`` is the file's: lists shared many times over may not exceed it.

    Raises:
        UserError: not a memory snapshot.
    """
    if not isinstance(found, dict) or not isinstance(found.get("segments"), list):
        raise UserError(f"memory snapshot {source}: not one (a dict with 'segments' and 'device_traces' is expected)")
    traces = found.get("device_traces") or []
    try:
        lists = [traces, *traces, *(segment["blocks"] for segment in found["segments"])]
        if size is not None and sum(len(one) for one in lists) + len(found["segments"]) > size:
            raise UserError(f"memory snapshot {source}: lists more entries than its {size} bytes can hold")
        stacks = _Stacks()
        segments, blocks = _segments(found["segments"], stacks)
        histories = {device: _history(entries, stacks) for device, entries in enumerate(traces)}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"memory snapshot {source}: an entry is not as torch writes it ({error!r})") from None
    return Snapshot(source, segments, blocks, histories, stacks.all())


def _segments(found: list[Any], stacks: _Stacks) -> tuple[tuple[tuple[int, int, int, str, int], ...], Blocks]:
    segments: list[tuple[int, int, int, str, int]] = []
    rows: list[tuple[int, ...]] = []
    for at, one in enumerate(found):
        address, device, stream = _whole(one["address"]), _whole(one.get("device", 0)), _whole(one.get("stream", 0))
        segments.append((device, address, stream, str(one.get("segment_type", "")), _whole(one["total_size"])))
        for block in one["blocks"]:
            size = _whole(block["size"])
            state = block["state"]
            asked = _whole(block.get("requested_size", size)) if state.startswith("active") else 0
            # Blocks without an address (older writers) follow each other.
            place = _whole(block.get("address", address))
            rows.append((at, place, size, asked, state == "active_allocated", state == "active_awaiting_free"
                         or state == "active_pending_free", stacks.code(block.get("frames"))))  # fmt: skip
            address = place + size
    segment, place_of, size_of, requested, active, waiting, stack = np.array(rows, np.int64).reshape(-1, 7).T
    blocks = Blocks(segment, place_of, size_of, requested, active.astype(np.bool_), waiting.astype(np.bool_), stack)
    return tuple(segments), blocks


def _history(entries: list[Any], stacks: _Stacks) -> History:
    rows = [
        (_whole(one.get("addr", -1)), _whole(one.get("size", 0)), _whole(one.get("time_us", -1)),
         _whole(one.get("device_free", -1)), stacks.code(one.get("frames")))
        for one in entries
    ]  # fmt: skip
    address, size, time, free, stack = np.array(rows, np.int64).reshape(-1, 5).T
    time_ns = np.where(time >= 0, np.minimum(time, (_INT64 - 1) // 1000) * 1000, -1)
    return History(tuple(str(one["action"]) for one in entries), address, size, time_ns, free, stack)


def _whole(value: Any) -> int:
    """An integer as int64 holds it; addresses above that wrap, which keeps them apart."""
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is no whole number")
    return value if -_INT64 <= value < _INT64 else (value + _INT64) % (2 * _INT64) - _INT64


def device_name(device: int) -> str:
    """How frames name a device."""
    return f"cuda:{device}"


def levels(snapshot: Snapshot, device: int) -> tuple[Times, Times]:
    """(allocated, reserved) bytes after each event of a device, from the state at the end backwards. ``[events]``"""
    history, here = snapshot.histories[device], snapshot.of_device(device)
    signed, reserving = history.signed(), history.reserving()
    held = int(snapshot.blocks.requested[here & snapshot.blocks.active].sum())
    total = sum(segment[4] for segment in snapshot.segments if segment[0] == device)
    return held - signed.sum() + np.cumsum(signed), total - reserving.sum() + np.cumsum(reserving)


def snapshot_timeline(snapshot: Snapshot) -> pl.DataFrame:
    """Allocated and reserved bytes after every recorded event."""
    frames = []
    for device, history in snapshot.histories.items():
        allocated, reserved = levels(snapshot, device)
        data = {
            "device": pl.Series([device_name(device)] * len(history.action), dtype=pl.String),
            "event": np.arange(len(history.action)),
            "time_ns": pl.Series(history.time_ns, dtype=pl.Int64).replace(-1, None),
            "action": pl.Series(history.action, dtype=pl.String),
            "bytes": history.size,
            "allocated_bytes": allocated,
            "reserved_bytes": reserved,
        }
        frames.append(pl.DataFrame(data))
    text = ("device", "action")
    empty = {name: pl.String if name in text else pl.Int64 for name in COLUMNS["snapshot_timeline"]}
    return pl.concat(frames) if frames else pl.DataFrame(schema=empty)


def why_no_history(snapshot: Snapshot) -> str | None:
    """Why there is no timeline, or None."""
    if any(history.action for history in snapshot.histories.values()):
        return None
    return "the snapshot holds no history: call torch.cuda.memory._record_memory_history() before the work"


def snapshot_peak(snapshot: Snapshot) -> pl.DataFrame:
    """What was held at each device's peak (without history: at the end), grouped by place; the most first."""
    frames = []
    for device in snapshot.devices:
        history = snapshot.histories.get(device)
        at = int(levels(snapshot, device)[0].argmax()) if history and history.action else -1
        frames.append(holders(snapshot, device, at))
    return pl.concat(frames) if frames else pl.DataFrame(schema=_HOLDERS)


_HOLDERS: dict[str, Any] = {
    "device": pl.String, "where": pl.String, "stack": pl.String, "count": pl.Int64, "bytes": pl.Int64,
    "share": pl.Float64,
}  # fmt: skip


def holders(snapshot: Snapshot, device: int, at: int) -> pl.DataFrame:
    """Allocations that live after event ``at`` of a device's history (-1: when the snapshot was written), by stack."""
    stack, size = _live(snapshot, device, at)
    codes, inverse = np.unique(stack, return_inverse=True)
    sums, counts = np.zeros(codes.size, np.int64), np.bincount(inverse.reshape(-1), minlength=codes.size)
    np.add.at(sums, inverse.reshape(-1), size)
    if at >= 0:
        whole = int(levels(snapshot, device)[0][at])
    else:
        whole = int(size.sum())
    found: list[tuple[str, str, int | None, int]] = [
        (*(_text(snapshot.stacks[code]) if code >= 0 else (BEFORE, "")), count, total)
        for code, count, total in zip(codes.tolist(), counts.tolist(), sums.tolist(), strict=True)
    ]
    if whole != size.sum():
        found.append(("not explained by the history", "", None, whole - int(size.sum())))
    rows = [(device_name(device), *row, row[3] / whole if whole else None) for row in found]
    return pl.DataFrame(rows, schema=_HOLDERS, orient="row").sort(
        "bytes", "where", "stack", descending=[True, False, False]
    )


def _live(snapshot: Snapshot, device: int, at: int) -> tuple[NDArray[np.int64], Times]:
    """(stack codes, sizes) of what lives after event ``at``; code -1 = allocated before the history, since released."""
    blocks, here = snapshot.blocks, snapshot.of_device(device)
    state = here & blocks.active
    if at < 0:
        return blocks.stack[state], blocks.requested[state]
    history = snapshot.histories[device]
    signed, order = history.signed(), np.arange(len(history.action))
    partner = np.full(order.size, -1, np.intp)
    moving = np.flatnonzero(signed != 0)
    joined = pair(history.address[moving], signed[moving])
    partner[moving[joined >= 0]] = moving[joined[joined >= 0]]
    made = (signed > 0) & (order <= at) & ((partner < 0) | (partner > at))
    orphans = (signed < 0) & (partner < 0) & (order > at)
    in_history = np.isin(blocks.address, history.address[(signed > 0) & (partner < 0)])
    older = state & ~in_history
    stack = np.concatenate((history.stack[made], blocks.stack[older], np.full(int(orphans.sum()), -1)))
    return stack, np.concatenate((history.size[made], blocks.requested[older], history.size[orphans]))


def _text(stack: tuple[str, ...]) -> tuple[str, str]:
    """(innermost frame outside torch, the innermost frames as text)."""
    user = next((frame for frame in stack if not _LIBRARY_FRAME.search(_FILE.sub("", frame))), None)
    where = user or (stack[0] if stack else "no stack recorded")
    return where, "\n".join(stack[:_SHOWN_FRAMES])


def snapshot_segments(snapshot: Snapshot) -> pl.DataFrame:
    """One row per segment: what is used, what is free, and how much of it cannot be returned."""
    blocks, count = snapshot.blocks, len(snapshot.segments)
    used = blocks.active | blocks.waiting
    active, asked, largest = (np.zeros(count, np.int64) for _ in range(3))
    np.add.at(active, blocks.segment[used], blocks.size[used])
    np.add.at(asked, blocks.segment[used], blocks.requested[used])
    np.maximum.at(largest, blocks.segment[~used], blocks.size[~used])
    rows = list(_unzip(snapshot.segments))
    total = np.array(rows[4], np.int64)
    return pl.DataFrame(
        {
            "device": pl.Series([device_name(device) for device in rows[0]], dtype=pl.String),
            "address": pl.Series(rows[1], dtype=pl.Int64),
            "stream": pl.Series(rows[2], dtype=pl.Int64),
            "kind": pl.Series(rows[3], dtype=pl.String),
            "total_bytes": total,
            "active_bytes": active,
            "free_bytes": total - active,
            "largest_free_bytes": largest,
            "rounding_bytes": active - asked,
            "trapped_bytes": np.where(active > 0, total - active, 0),
        }
    )


def _unzip(rows: Iterable[tuple[Any, ...]]) -> Iterable[list[Any]]:
    rows = list(rows)
    return ([row[at] for row in rows] for at in range(5))
