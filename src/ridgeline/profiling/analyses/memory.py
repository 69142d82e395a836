"""Memory from a profiler trace with ``profile_memory=True``: what was allocated when, by what, and for what.

Each ``[memory]`` instant is one allocation (positive bytes) or release (negative); an address joins the two::

    phase       | forward        | backward        | optimizer |
    activation    [------------------------)                       made in forward, released in backward
    gradient                          [--------------------------  made in backward, alive in the optimizer
    state                                              [---------  made in the optimizer, never released
    temporary       [--)                  [--)             [--)    released in the phase that made it
    before      -----------------------------------------------    parameters and state of earlier steps

A category is given only on such evidence, which stands beside it; what has none is ``unknown``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.profiling.analyses.places import Places
from ridgeline.profiling.classify import STEP, Phases, find_phases
from ridgeline.profiling.intervals import Times, close_gaps, contains
from ridgeline.profiling.table import TraceTable

Window = tuple[int, int] | None

CATEGORIES = ("before_capture", "activations", "gradients", "optimizer_state", "temporaries", "unknown")
# The numbers of c10::DeviceType.
_DEVICES = {0: "cpu", 1: "cuda", 6: "hip", 12: "xpu", 13: "mps", 15: "hpu", 19: "mtia", 20: "privateuseone"}
_ENGINE_GAP_NS = 100_000
_PHASES = ("forward", "backward", "optimizer")

COLUMNS = {
    "memory_timeline": {
        "device": "text: device type and index",
        "time_ns": "ns: moment of the allocation or release",
        "allocated_bytes": "bytes: held after it, what was held before the capture included",
        "reserved_bytes": "bytes: held by the caching allocator; null where it has none",
        **{f"{name}_bytes": f"bytes: of which {name.replace('_', ' ')}" for name in CATEGORIES},
        "unrecorded_bytes": "bytes: what the allocator itself reports beyond the recorded events; 0 in a whole capture",
    },
    "memory_allocations": {
        "device": "text: device type and index",
        "time_ns": "ns: moment of the allocation",
        "freed_ns": "ns: moment of the release; null when it outlives the capture",
        "bytes": "bytes: size",
        "operator": "text: innermost operator or range open on that thread; null when none was",
        "where": "text: file(line): function of the user's code with stacks loaded, else the operators around it",
        "phase": "text: forward, backward or optimizer",
        "category": "text: one of the timeline's categories",
        "evidence": "text: why that category",
        "at_peak": "bool: held when its device's allocated bytes were largest",
    },
    "memory_peak": {
        "device": "text: device type and index",
        "time_ns": "ns: moment of the largest allocated bytes",
        "category": "text: one of the timeline's categories",
        "operator": "text: operator that allocated; null for what was held before the capture",
        "where": "text: as in memory_allocations",
        "count": "allocations held at the peak",
        "bytes": "bytes: their sum; over all rows of a device they sum to its peak",
        "share": "fraction: of the device's peak",
    },
}


class _Instant(msgspec.Struct, gc=False):
    bytes: int = msgspec.field(name="Bytes", default=0)
    address: int = msgspec.field(name="Addr", default=0)
    device_type: int = msgspec.field(name="Device Type", default=0)
    device_id: int = msgspec.field(name="Device Id", default=0)
    allocated: int | None = msgspec.field(name="Total Allocated", default=None)
    reserved: int = msgspec.field(name="Total Reserved", default=0)
    order: int = msgspec.field(name="Ev Idx", default=0)


@dataclass(frozen=True)
class Instants:
    """All ``[memory]`` instants in order; arrays are ``[events]``. ``partner`` is the event that releases an
    allocation (or was released by one), -1 for none; ``total`` is -1 where the allocator did not report it."""

    time: Times
    thread: NDArray[np.int32]
    device: NDArray[np.int64]
    devices: tuple[str, ...]
    bytes: Times
    total: Times
    reserved: Times
    partner: NDArray[np.intp]

    def __len__(self) -> int:
        return int(self.time.size)


def pair(keys: NDArray[np.int64], signed: Times) -> NDArray[np.intp]:
    """Join each allocation with the release that follows it at its address; -1 without one. ``[events]``

    ``keys`` are addresses (unique per device), ``signed`` bytes: positive allocates, negative releases; both in time
    order. An address is used again only after its release, so its events alternate; others stay unpaired.
    """
    partner = np.full(keys.size, -1, np.intp)
    order = np.lexsort((np.arange(keys.size), keys))
    first, second = order[:-1], order[1:]
    joined = (keys[first] == keys[second]) & (signed[first] > 0) & (signed[second] < 0)
    partner[first[joined]], partner[second[joined]] = second[joined], first[joined]
    return partner


def instants(table: TraceTable) -> Instants:
    """The table's memory events, by time and the profiler's own order, with allocations and releases joined."""
    read = msgspec.json.Decoder(_Instant).decode
    threads = {pair: code for code, pair in enumerate(table.threads)}
    found = []
    for mark in table.marks:
        if mark.name == "[memory]" and mark.args:
            one = read(mark.args)
            found.append((mark.time_ns, one.order, threads.get(mark.thread, -1), one))
    found.sort(key=lambda item: item[:2])
    kinds = sorted({(one.device_type, one.device_id) for *_, one in found})
    code = {kind: at for at, kind in enumerate(kinds)}
    values = [
        (at, thread, code[one.device_type, one.device_id], one.bytes, -1 if one.allocated is None else one.allocated,
         one.reserved, one.address)
        for at, _, thread, one in found
    ]  # fmt: skip
    time, thread, device, size, total, reserved, address = np.array(values, np.int64).reshape(-1, 7).T
    distinct = np.unique(address, return_inverse=True)[1].reshape(-1)
    names = tuple(_device_name(*kind) for kind in kinds)
    partner = pair(distinct * max(len(kinds), 1) + device, size)
    return Instants(time, thread.astype(np.int32), device, names, size, total, reserved, partner)


def _device_name(kind: int, index: int) -> str:
    name = _DEVICES.get(kind, f"device type {kind}")
    return name if index < 0 or kind == 0 else f"{name}:{index}"


def why_empty(table: TraceTable) -> str | None:
    """Why there is no memory timeline, or None."""
    if any(mark.name == "[memory]" for mark in table.marks):
        return None
    return "the trace holds no memory events: profile with profile_memory=True, or pass a memory snapshot"


def memory_timeline(table: TraceTable, window: Window = None) -> pl.DataFrame:
    """Allocated bytes after every event, by category. Rows by device and time."""
    events = instants(table)
    category, _, _ = _categorise(table, events)
    columns = list(COLUMNS["memory_timeline"])
    frames = [_timeline(events, category, code) for code in range(len(events.devices))]
    frame = pl.concat(frames) if frames else _empty(columns, text=("device",))
    return _within(frame.select(columns), window)


def memory_allocations(table: TraceTable, window: Window = None) -> pl.DataFrame:
    """Every recorded allocation with its operator, place, lifetime and category."""
    events = instants(table)
    made = np.flatnonzero(events.bytes > 0)
    category, evidence, phase = _categorise(table, events)
    operator, where = _named(table, events, made)
    held = np.zeros(len(events), np.bool_)
    for code in range(len(events.devices)):
        held |= _held_at(events, code, _peak(events, code)[0])
    partner = events.partner[made]
    released = np.where(partner >= 0, events.time[partner], -1) if made.size else made
    data = {
        "device": [events.devices[code] for code in events.device[made].tolist()],
        "time_ns": events.time[made],
        "freed_ns": pl.Series(released, dtype=pl.Int64).replace(-1, None),
        "bytes": events.bytes[made],
        "operator": operator,
        "where": where,
        "phase": [_PHASES[code] for code in phase[made].tolist()],
        "category": [CATEGORIES[code] for code in category[made].tolist()],
        "evidence": [evidence[at] for at in made.tolist()],
        "at_peak": held[made],
    }
    text = dict.fromkeys(("device", "operator", "where", "phase", "category", "evidence"), pl.String)
    frame = pl.DataFrame(data, schema_overrides={**text, "at_peak": pl.Boolean})
    return _within(frame, window)


def memory_peak(table: TraceTable) -> pl.DataFrame:
    """What was held when each device's allocated bytes were largest, by category and place; the most first."""
    events, out = instants(table), []
    held = memory_allocations(table).filter("at_peak")
    for code, device in enumerate(events.devices):
        at, peak = _peak(events, code)
        grouped = (
            held.filter(pl.col("device") == device)
            .group_by("device", "category", "operator", "where")
            .agg(count=pl.len().cast(pl.Int64), bytes=pl.col("bytes").sum())
        )
        before = peak - int(grouped["bytes"].sum())
        rows = pl.DataFrame([(device, "before_capture", None, None, None, before)], schema=grouped.schema, orient="row")
        grouped = pl.concat([grouped, rows.filter(pl.col("bytes") != 0)])
        share = pl.col("bytes") / peak if peak else pl.lit(None, pl.Float64)
        out.append(grouped.with_columns(time_ns=pl.lit(int(events.time[at])), share=share))
    columns = list(COLUMNS["memory_peak"])
    if not out:
        return _empty(columns, text=("device", "category", "operator", "where"))
    order = ["device", "bytes", "category", "operator", "where"]
    return pl.concat(out).select(columns).sort(order, descending=[False, True, False, False, False])


def _base(events: Instants, code: int) -> int:
    """Bytes held on a device before its first recorded event: the allocator's own figure, or what is released later
    without having been allocated. Never less than the latter."""
    mine = np.flatnonzero(events.device == code)
    orphans = int(-events.bytes[mine][(events.bytes[mine] < 0) & (events.partner[mine] < 0)].sum())
    reported = events.total[mine[0]] - events.bytes[mine[0]] if events.total[mine[0]] >= 0 else 0
    return max(int(reported), orphans)


def _allocated(events: Instants, code: int) -> tuple[NDArray[np.intp], Times]:
    """(events of a device, bytes held after each)."""
    mine = np.flatnonzero(events.device == code)
    return mine, _base(events, code) + np.cumsum(events.bytes[mine])


def _peak(events: Instants, code: int) -> tuple[int, int]:
    """(event after which a device holds most, how much). The base can be the most: then the first event."""
    mine, held = _allocated(events, code)
    at = int(held.argmax())
    return int(mine[at]), int(held[at])


def _held_at(events: Instants, code: int, at: int) -> NDArray[np.bool_]:
    """Allocations of a device that event ``at`` finds or makes, and that are released later or never. ``[events]``"""
    order = np.arange(len(events))
    open_still = (events.partner < 0) | (events.partner > at)
    held: NDArray[np.bool_] = (events.device == code) & (events.bytes > 0) & (order <= at) & open_still
    return held


def _timeline(events: Instants, category: NDArray[np.int8], code: int) -> pl.DataFrame:
    mine, held = _allocated(events, code)
    size, kind = events.bytes[mine], category[mine]
    parts = {
        f"{name}_bytes": np.cumsum(np.where(kind == at, size, 0)) + (_base(events, code) if at == 0 else 0)
        for at, name in enumerate(CATEGORIES)
    }
    total, reserved = events.total[mine], events.reserved[mine]
    return pl.DataFrame(
        {
            "device": pl.Series([events.devices[code]] * mine.size, dtype=pl.String),
            "time_ns": events.time[mine],
            "allocated_bytes": held,
            "reserved_bytes": pl.Series(reserved, dtype=pl.Int64).replace(0, None),
            **parts,
            "unrecorded_bytes": np.where(total >= 0, total - held, 0),
        }
    )


def phases_at(table: TraceTable, moments: Times, phases: Phases | None = None) -> NDArray[np.int8]:
    """0 forward, 1 backward, 2 optimizer at each moment. What the autograd engine does in the short holes between two
    nodes is still backward. ``[moments]``"""
    ranges = (phases or find_phases(table)).ranges
    out = np.zeros(moments.size, np.int8)
    out[contains(close_gaps(ranges["backward"], _ENGINE_GAP_NS), moments)] = 1
    out[contains(ranges["optimizer"], moments)] = 2
    return out


def _spans(phases: Phases, moments: Times) -> NDArray[np.intp]:
    """A number for the stretch of one phase that each moment lies in: equal numbers, same stretch. ``[moments]``"""
    backward, optimizer = close_gaps(phases.ranges["backward"], _ENGINE_GAP_NS), phases.ranges["optimizer"]
    edges = np.sort(np.concatenate((*backward, *optimizer)))
    return np.searchsorted(edges, moments, side="right")


def _categorise(table: TraceTable, events: Instants) -> tuple[NDArray[np.int8], Sequence[str], NDArray[np.int8]]:
    """(category code of every event, evidence of every event, phase code of every event)."""
    phases = find_phases(table)
    phase = phases_at(table, events.time, phases)
    has_backward = phases.ranges["backward"].start.size > 0
    partner, made = events.partner, events.bytes > 0
    freed = np.where(partner >= 0, phase[partner], -1) if len(events) else phase
    end = np.where(partner >= 0, events.time[partner], np.iinfo(np.int64).max) if len(events) else events.time
    starts = phases.ranges["optimizer"].start
    upcoming = np.append(starts, np.iinfo(np.int64).max)[np.searchsorted(starts, events.time, side="right")]
    reaches = (upcoming < np.iinfo(np.int64).max) & (end > upcoming)
    between = (partner >= 0) & (_spans(phases, events.time) == _spans(phases, np.where(partner >= 0, end, 0)))
    rules: list[tuple[NDArray[np.bool_], int, str]] = [
        ((phase == 2) & (partner < 0), 3, "made in the optimizer, never released"),
        ((phase == 1) & reaches, 2, "made in backward, alive when the optimizer starts"),
        ((phase == 0) & (freed == 1), 1, "made in forward, released in backward"),
        (between & ~reaches, 4, "released in the phase that made it"),
        ((phase == 2) & (partner >= 0), 4, "made in the optimizer and released"),
        (
            (phase == 1) & (partner >= 0) & (upcoming < np.iinfo(np.int64).max),
            4,
            "made in backward, released before an optimizer starts",
        ),
        ((phase == 0) & (partner >= 0) & ~has_backward, 4, "released in the capture, which has no backward"),
    ]
    category = np.full(len(events), 5, np.int8)
    evidence = np.full(len(events), "alive at the end of the capture, or held past the backward that reads it", object)
    for rule, code, why in reversed(rules):
        category[rule & made], evidence[rule & made] = code, why
    back = np.flatnonzero(~made)
    category[back] = np.where(partner[back] >= 0, category[partner[back]], 0) if back.size else 0
    return category, evidence.tolist(), phase


def _named(table: TraceTable, events: Instants, made: NDArray[np.intp]) -> tuple[list[str | None], list[str | None]]:
    """(operator, place in the program) of each allocation."""
    places = Places(table)
    thread, time = events.thread[made], events.time[made]
    rows = places.ops.innermost(thread, time)
    rows[(rows >= 0) & table.named(STEP.match)[rows]] = -1
    frames = places.frames(thread, time)
    known = np.flatnonzero(rows >= 0)
    paths = dict(zip(known.tolist(), places.of_rows(rows[known]), strict=True))
    operator = [table.names[table.name[row]] if row >= 0 else None for row in rows.tolist()]
    where = [
        table.names[table.name[frame]] if frame >= 0 else paths.get(at) for at, frame in enumerate(frames.tolist())
    ]
    return operator, where


def _within(frame: pl.DataFrame, window: Window) -> pl.DataFrame:
    if window is None:
        return frame
    return frame.filter((pl.col("time_ns") >= window[0]) & (pl.col("time_ns") < window[1]))


def _empty(columns: list[str], text: tuple[str, ...]) -> pl.DataFrame:
    kinds: dict[str, Any] = {name: pl.String if name in text else pl.Int64 for name in columns}
    return pl.DataFrame(schema={name: pl.Float64 if name == "share" else kind for name, kind in kinds.items()})
