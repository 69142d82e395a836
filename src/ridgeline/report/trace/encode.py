"""Columns of events as one small binary block that a browser turns into typed arrays.

Events are ordered by rank, lane (a thread or a stream), row (nesting depth) and start. No two events of a row overlap,
so a row's starts and its ends are both sorted, and the page finds what is visible by binary search::

    lane    thread 12    row 0   [aten::linear--------)   [aten::relu--)
                         row 1      [aten::addmm--)
    coded                        start deltas, durations, name codes, partners, ...: LEB128; roles: one byte each

The streams follow one another, are deflated together and written as base64. Times are ns from the page's origin, exact
in the browser up to 2**53 ns (104 days).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.report.trace.lanes import Lane

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class RankEvents:
    """One rank's events in page order; arrays are ``[events]``. ``start`` is ns from the origin, ``name`` a code into
    ``names``. ``partner`` is the call that launched a device event and ``forward`` the operator whose backward an
    operator is: positions in this order or -1. ``correlation`` is the id of a call, -1 for none. ``row`` is the event's
    row in the table, -1 for a segment of the critical path."""

    label: str
    lanes: list[Lane]
    steps: list[list[Any]]
    names: Sequence[str]
    lane: Codes
    depth: Codes
    start: Codes
    duration: Codes
    name: Codes
    role: NDArray[np.uint8]
    partner: Codes
    forward: Codes
    correlation: Codes
    row: Codes


def encode(ranks: Sequence[RankEvents], names: Sequence[Codes], sets: Sequence[Codes]) -> tuple[dict[str, Any], str]:
    """(the header's count, sizes and ranks; the block). ``names[rank]`` maps a rank's name codes to the page's;
    ``sets[rank]`` holds the code of each event's arguments, 0 for none."""
    streams: dict[str, list[Codes]] = {}
    described = []
    for rank, code, used in zip(ranks, names, sets, strict=True):
        first = np.concatenate(([True], (np.diff(rank.lane) != 0) | (np.diff(rank.depth) != 0)))[: rank.start.size]
        for name, values in _streams(rank, code, used, first).items():
            streams.setdefault(name, []).append(values)
        described.append(_describe(rank, np.flatnonzero(first)))
    parts = {name: varint(np.concatenate(values)) for name, values in streams.items()}
    parts["role"] = np.concatenate([rank.role for rank in ranks]).tobytes()
    header = {
        "count": len(parts["role"]),
        "sizes": {name: len(data) for name, data in parts.items()},
        "ranks": described,
    }
    return header, deflate(b"".join(parts.values()))


def _streams(rank: RankEvents, code: Codes, used: Codes, first: NDArray[np.bool_]) -> dict[str, Codes]:
    """What is written as LEB128, all non-negative. ``first`` marks the first event of each row."""
    start = rank.start
    before = np.concatenate(([0], start[:-1]))[: start.size]
    return {
        "start": np.where(first, start, start - before),
        "duration": rank.duration,
        "name": code[rank.name],
        "partner": _away(rank.partner),
        "forward": _away(rank.forward),
        "correlation": _changes(rank.correlation),
        "arguments": used,
    }


def _away(other: Codes) -> Codes:
    """Positions as distances from one's own: 0 for none, else 1 + the distance, its sign in the lowest bit."""
    return np.where(other < 0, 0, 1 + zigzag(other - np.arange(other.size)))


def _changes(values: Codes) -> Codes:
    """0 for none (-1), else 1 + the difference from the last value before it, its sign in the lowest bit."""
    out = np.zeros(values.size, np.int64)
    has = np.flatnonzero(values >= 0)
    out[has] = 1 + zigzag(np.diff(values[has], prepend=0))
    return out


def zigzag(values: Codes) -> Codes:
    """0, -1, 1, -2, 2 ... as 0, 1, 2, 3, 4 ..."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def deflate(data: bytes) -> str:
    """Deflated (RFC 1950), as base64."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _describe(rank: RankEvents, firsts: NDArray[np.intp]) -> dict[str, Any]:
    """A rank's lanes, each with its rows as event counts (an empty row counts 0), and its step markers."""
    counts = np.diff(np.append(firsts, rank.start.size))
    rows: list[list[int]] = [[] for _ in rank.lanes]
    for at, count in zip(firsts.tolist(), counts.tolist(), strict=True):
        mine, depth = rows[int(rank.lane[at])], int(rank.depth[at])
        mine += [0] * (depth - len(mine)) + [count]
    lanes = [
        {"label": lane.label, "kind": lane.kind, "thread": lane.thread, "part": lane.part, "rows": mine}
        for lane, mine in zip(rank.lanes, rows, strict=True)
    ]
    return {"label": rank.label, "lanes": lanes, "steps": rank.steps}


def varint(values: Codes) -> bytes:
    """Unsigned LEB128 of non-negative values, without a loop over them."""
    rest = values.astype(np.uint64)
    length = np.ones(rest.size, np.int64)
    for bits in range(7, 64, 7):
        length += rest >= np.uint64(1 << bits)
    offset = np.cumsum(length) - length
    out = np.empty(int(length.sum()), np.uint8)
    for at in range(int(length.max(initial=0))):
        has = length > at
        piece = (rest[has] >> np.uint64(7 * at)) & np.uint64(127)
        out[offset[has] + at] = piece | np.where(length[has] > at + 1, 128, 0).astype(np.uint64)
    return out.tobytes()
