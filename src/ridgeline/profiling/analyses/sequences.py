"""Frequent kernel sequences: runs of kernels that come again and again, the candidates for fusion.

The kernels of a stream are a text; a sequence is an n-gram of it. Codes of length n are made from codes of
length n - 1 and the next kernel, so equal codes are equal sequences: no hash that could collide, and no loop over
events::

    stream   A B C A B C D A B C        (A, B, C) three times
             [---] [---]   [---]        its gaps, A-B and B-C, are the most that one fused kernel could save
                                        beside memory traffic

Occurrences of one sequence never share a kernel (A A A A holds (A, A) twice), and unless asked otherwise neither do
two sequences of the list: the best takes its kernels, the next is counted in what is left, so that the list adds up.
A sequence ends where a copy, a set, a collective or a pause of the stream comes between.
"""

from __future__ import annotations

import heapq
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.errors import UserError, nearest
from ridgeline.profiling import classify
from ridgeline.profiling.analyses.launches import streams, why_no_timeline
from ridgeline.profiling.intervals import Times
from ridgeline.profiling.nesting import nest
from ridgeline.profiling.table import Kind, TraceTable

PAUSE_NS = 100_000
"""A hole of this length in a stream ends a sequence: it is the host's or a dependency's, and no fusion closes it."""
Order = Literal["gap_ns", "kernel_ns", "count"]
_ORDERS = ("gap_ns", "kernel_ns", "count")
Codes = NDArray[np.int64]

COLUMNS: dict[str, dict[str, str]] = {
    "frequent_sequences": {
        "device": "id: device, -1 where the file names none",
        "stream": "id: stream, -1 where the file names none",
        "length": "count: kernels in the sequence",
        "count": "count: occurrences that share no kernel with each other (nor, if distinct, with a row above)",
        "kernel_ns": "ns: summed durations of their kernels",
        "gap_ns": "ns: summed pauses between the kernels of each occurrence, the most that fusing could save in gaps",
        "sequence": "names: the kernels in order",
    }
}


def why_empty(table: TraceTable) -> str | None:
    """Why there are no sequences to look for, or None."""
    if not table.has_device_timeline:
        return why_no_timeline(table)
    return None if table.is_kind(Kind.KERNEL).any() else "no kernel in this trace: only copies and sets"


class _Text(NamedTuple):
    """Kernels in stream order. ``symbol`` codes (device, stream, name); ``joined[i]``: i and i + 1 may be one sequence."""

    rows: NDArray[np.intp]
    symbol: Codes
    joined: NDArray[np.bool_]
    time: Times
    gap: Times


class _Level(NamedTuple):
    """Every occurrence of every sequence of one length: code and place in the text (``[occurrences]``, by place), how
    often each code occurs, and how often without sharing a kernel (``[codes]``, 0 where below the least count)."""

    code: Codes
    where: NDArray[np.intp]
    total: Codes
    apart: Codes


class _Found(NamedTuple):
    """Sequences of one length; arrays are ``[sequences]``. ``first`` is where one begins in the text."""

    length: int
    code: Codes
    first: NDArray[np.intp]
    apart: Codes
    kernel_ns: Times
    gap_ns: Times


class _Places(NamedTuple):
    """Where the sequences of one length begin, by code, then by place; ``[occurrences]``."""

    code: Codes
    where: NDArray[np.intp]


def frequent_sequences(
    table: TraceTable,
    length: tuple[int, int] = (2, 5),
    top: int = 20,
    operator: str | None = None,
    order: Order = "gap_ns",
    min_count: int = 2,
    pause_ns: int = PAUSE_NS,
    window: tuple[int, int] | None = None,
    distinct: bool = True,
) -> pl.DataFrame:
    """The ``top`` sequences of ``length[0]`` to ``length[1]`` kernels that occur at least ``min_count`` times.

    A sequence that only occurs inside one longer sequence is not listed beside it. With ``operator`` only kernels
    launched inside one call of that operator make a sequence. With ``distinct`` no kernel is in two rows, and the rows'
    figures may be added; without, every sequence is counted in the whole stream.

    Raises:
        UserError: a length below 2 or out of order, an unknown order, an operator that is not in the trace.
    """
    low, high = length
    if not 2 <= low <= high:
        raise UserError(f"sequence length {low} to {high}: give two numbers of at least 2, the smaller first")
    if order not in _ORDERS:
        raise UserError(f"sequences ordered by '{order}': no such order{nearest(order, _ORDERS)}")
    text = _text(table, operator, pause_ns, window)
    found, places = _count(text, high, min_count)
    if distinct:
        found = _distinct(text, found[low - 2 :], places[low - 2 :], order, top, min_count)
    else:
        found = found[low - 2 :]
    return (
        _frame(table, text, found)
        .sort(
            [order, "kernel_ns", "length", "device", "stream", "sequence_text"],
            descending=[True, True, True, False, False, False],
        )
        .drop("sequence_text")
        .head(top)
    )


def _text(table: TraceTable, operator: str | None, pause_ns: int, window: tuple[int, int] | None) -> _Text:
    """All device events by stream and time; what is no fusible kernel only separates."""
    launched = classify.launches(table)
    rows = np.flatnonzero(table.device_rows & (table.end >= table.start))
    if window is not None:
        rows = rows[(table.start[rows] >= window[0]) & (table.start[rows] < window[1])]
    device, stream = (column[rows] for column in streams(table))
    order = np.lexsort((rows, stream, device))
    rows, device, stream = rows[order], device[order], stream[order]
    roles = classify.device_roles(table, classify.find_phases(table), launched)
    fusible = (roles.compute | roles.optimizer)[rows]
    new = np.append(False, (device[1:] != device[:-1]) | (stream[1:] != stream[:-1]))[: rows.size]
    place = np.cumsum(new)
    gap = _pauses(table, rows, place)
    joined = ~new[1:] & (gap < pause_ns) & fusible[1:] & fusible[:-1]
    if operator is not None:
        call = _calls_of(table, operator, launched)[rows]
        joined &= (call[1:] == call[:-1]) & (call[1:] >= 0)
    symbol = np.unique(place * len(table.names) + table.name[rows], return_inverse=True)[1].reshape(-1)
    last = np.zeros(min(rows.size, 1), np.int64)  # nothing follows the last event
    return _Text(rows, symbol, np.append(joined, last > 0), table.duration[rows], np.append(gap, last))


def _pauses(table: TraceTable, rows: NDArray[np.intp], place: Codes) -> Times:
    """From the latest end so far of a stream to its next event, 0 where they overlap. ``[rows - 1]`` ns"""
    if not rows.size:
        return np.empty(0, np.int64)
    begin = int(table.start[rows].min())
    shift = place * (int(table.end[rows].max()) - begin + 1)  # keeps one stream's ends from reaching into the next
    reach = np.maximum.accumulate(table.end[rows] - begin + shift)
    gap: Times = np.maximum(table.start[rows][1:] - begin + shift[1:] - reach[:-1], 0)
    return gap


def _calls_of(table: TraceTable, operator: str, launched: NDArray[np.intp]) -> NDArray[np.intp]:
    """For every row the outermost call of ``operator`` around its launch, or -1. ``[rows]``"""
    kinds = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION)
    chosen = kinds & table.named(operator.__eq__)
    if not chosen.any():
        known = {table.names[code] for code in np.unique(table.name[kinds]).tolist()}
        raise UserError(f"operator '{operator}': not in trace {table.meta.source}{_hint(operator, known)}")
    nesting, out = nest(table, chosen), np.full(len(table), -1, np.intp)
    rows = np.flatnonzero(launched >= 0)
    around = nesting.innermost(table.thread[launched[rows]], table.start[launched[rows]])
    out[rows] = np.where(around >= 0, nesting.outermost()[around], -1)
    return out


def _hint(operator: str, known: set[str]) -> str:
    """The nearest name; a whole list of a trace's operators would be no single line."""
    text = nearest(operator, known)
    return text if text.startswith(" (did you mean") else ""


def _count(text: _Text, longest: int, min_count: int) -> tuple[list[_Found], list[_Places]]:
    """Sequences of 2 to ``longest`` kernels, without those that only occur inside a longer one, and where each is."""
    found: list[_Found] = []
    places: list[_Places] = []
    code, where = text.symbol, np.arange(text.rows.size)
    width = int(text.symbol.max(initial=0)) + 1
    shorter: _Level | None = None
    for length in range(2, longest + 1):
        kept = np.flatnonzero(text.joined[where + length - 2])
        prefix, where = code[kept], where[kept]
        pairs = prefix * width + text.symbol[where + length - 1]
        _, code, count = np.unique(pairs, return_inverse=True, return_counts=True)
        code = code.reshape(-1)
        often = np.flatnonzero(count[code] >= min_count)
        often = often[np.argsort(code[often], kind="stable")]
        places.append(_Places(code[often], where[often]))
        fresh = _occurrences(text, length, places[-1], min_count)
        apart = np.zeros(count.size, np.int64)
        apart[fresh.code] = fresh.apart
        level = _Level(code, where, count, apart)
        if shorter is not None:
            found[-1] = _closed(found[-1], shorter, level, prefix)
        found.append(fresh)
        shorter = level
    return found, places


def _closed(found: _Found, shorter: _Level, longer: _Level, prefix: Codes) -> _Found:
    """``found`` without the sequences that are each time the head, or each time the tail, of one and the same longer
    sequence. ``prefix`` is the shorter code at the head of each of the longer ones."""
    tail = shorter.code[np.searchsorted(shorter.where, longer.where + 1)]
    inside = np.zeros(shorter.total.size, np.bool_)
    for part in (prefix, tail):
        same = (longer.total[longer.code] == shorter.total[part]) & (longer.apart[longer.code] == shorter.apart[part])
        inside[part[same]] = True
    alone = ~inside[found.code]
    return _Found(found.length, *(column[alone] for column in found[1:]))


def _occurrences(text: _Text, length: int, places: _Places, min_count: int) -> _Found:
    """Count, time and gaps of the sequences, over occurrences that share no kernel, from the left."""
    taken = _apart(places.code, places.where, length)
    code, where = places.code[taken], places.where[taken]
    codes, first, inverse, count = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    kernels, gaps = np.zeros(codes.size, np.int64), np.zeros(codes.size, np.int64)
    for step in range(length):
        np.add.at(kernels, inverse, text.time[where + step])
        if step + 1 < length:
            np.add.at(gaps, inverse, text.gap[where + step])
    keep = count >= min_count
    return _Found(length, codes[keep], where[first][keep], count[keep], kernels[keep], gaps[keep])


def _distinct(
    text: _Text, found: list[_Found], places: list[_Places], order: Order, top: int, min_count: int
) -> list[_Found]:
    """The best sequence, then the best in the kernels that it leaves, and so on; ``top`` of them, one per ``_Found``.

    A sequence can only lose to those before it, so its old figure bounds the new one: each is counted again only when
    its turn comes, and goes back when another may be better.
    """
    free = np.ones(text.rows.size, np.bool_)
    heap = [(*_key(one, at, order), level, at) for level, one in enumerate(found) for at in range(one.code.size)]
    heapq.heapify(heap)
    out: list[_Found] = []
    while heap and len(out) < top:
        *_, level, at = heapq.heappop(heap)
        one, (code, where) = found[level], places[level]
        low, high = np.searchsorted(code, [one.code[at], one.code[at] + 1])
        inside = where[low:high, None] + np.arange(one.length)
        left = where[low:high][free[inside].all(axis=1)]
        now = _occurrences(text, one.length, _Places(np.full(left.size, one.code[at]), left), min_count)
        if not now.code.size:
            continue
        now = now._replace(first=one.first[at : at + 1])
        key = (*_key(now, 0, order), level, at)
        if heap and key > heap[0]:
            heapq.heappush(heap, key)
            continue
        out.append(now)
        free[left[_apart(np.zeros(left.size, np.int64), left, one.length)][:, None] + np.arange(one.length)] = False
    return out


def _key(found: _Found, at: int, order: Order) -> tuple[int, int, int, int]:
    """What sorts first is better: more of what was asked for, then more time, then longer, then earlier."""
    figures = {"gap_ns": found.gap_ns, "kernel_ns": found.kernel_ns, "count": found.apart}
    return -int(figures[order][at]), -int(found.kernel_ns[at]), -found.length, int(found.first[at])


def _apart(code: Codes, where: NDArray[np.intp], length: int) -> NDArray[np.intp]:
    """The occurrences that a walk from the left takes when it skips all that overlap the last one it took.

    ``code`` is sorted, ``where`` ascending within a code. Each occurrence points to the next it allows; the taken ones
    are those reached from the first of a code, found by doubling the pointers.
    """
    size = code.size
    place = code * (int(where.max(initial=0)) + length + 1)
    follow = np.searchsorted(place + where, place + where + length)
    inside = follow < size
    inside[inside] = code[follow[inside]] == code[inside]
    follow = np.append(np.where(inside, follow, size), size)
    taken = np.zeros(size + 1, np.bool_)
    taken[:-1] = np.concatenate(([True], code[1:] != code[:-1])) if size else False
    reached = np.flatnonzero(taken)
    while reached.size and (follow[reached] < size).any():
        taken[follow[reached]] = True
        reached = np.flatnonzero(taken[:-1])
        follow = follow[follow]
    return np.flatnonzero(taken[:-1])


def _frame(table: TraceTable, text: _Text, found: list[_Found]) -> pl.DataFrame:
    device, stream = streams(table)
    parts = [pl.DataFrame(schema=_SCHEMA)]
    for one in found:
        rows = text.rows[one.first]
        names = [
            [table.names[table.name[row]] for row in text.rows[first : first + one.length].tolist()]
            for first in one.first.tolist()
        ]
        columns = {
            "device": device[rows],
            "stream": stream[rows],
            "length": np.full(rows.size, one.length, np.int64),
            "count": one.apart,
            "kernel_ns": one.kernel_ns,
            "gap_ns": one.gap_ns,
            "sequence": names,
            "sequence_text": ["\n".join(each) for each in names],
        }
        parts.append(pl.DataFrame(columns, schema=_SCHEMA))
    return pl.concat(parts)


_SCHEMA = {
    **dict.fromkeys(("device", "stream", "length", "count", "kernel_ns", "gap_ns"), pl.Int64()),
    "sequence": pl.List(pl.String),
    "sequence_text": pl.String(),
}
