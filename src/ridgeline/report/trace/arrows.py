"""Arrows that an analysis found: where the critical path goes from one lane to another, and who waited for whom in a
collective. Launches and backwards are columns of their events, not arrows of this list.

An arrow goes from the event that was waited for to the event that waited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.table import TraceTable

MOST = 20_000
"""A page holds no more; those of the shortest waits are left out."""
LATE = "waited for the last rank"

Rows = Sequence[Mapping[str, Any]]
Arrow = tuple[tuple[int, int], tuple[int, int], str, int]
"""((rank, row), (rank, row), why, ns)."""


def crossings(segments: Rows, tables: Mapping[int, TraceTable]) -> Iterator[Arrow]:
    """Where consecutive segments of the critical path lie on different threads, streams or ranks; ``segments`` with
    ``start_ns``, ``end_ns``, ``type``, ``row`` and, of several tables, ``rank``."""
    alone = next(iter(tables)) if len(tables) == 1 else -1
    before: tuple[int, int] | None = None
    for one in sorted(segments, key=_start):
        row, rank = int(one.get("row", -1)), int(one.get("rank", alone))
        if row < 0 or rank not in tables or row >= len(tables[rank]):
            continue
        if before is not None and _thread(tables, *before) != _thread(tables, rank, row):
            yield before, (rank, row), str(one.get("type")), int(one["end_ns"]) - int(one["start_ns"])
        before = rank, row


def waits(collectives: Rows, tables: Mapping[int, TraceTable]) -> Iterator[Arrow]:
    """From the event of the rank that came last to those that waited for it; ``collectives`` as
    ``match_collectives`` gives them. Where not all ranks are known, nobody is the last one."""
    matches: dict[int, list[Mapping[str, Any]]] = {}
    for one in collectives:
        matches.setdefault(int(one["match"]), []).append(one)
    for rows in matches.values():
        last = [one for one in rows if one["last"] and one["complete"]]
        if len(last) != 1 or (cause := _find(last[0], tables)) is None:
            continue
        for one in rows:
            waited = _find(one, tables) if one is not last[0] and int(one["waiting_ns"]) > 0 else None
            if waited is not None:
                yield cause, waited, LATE, int(one["waiting_ns"])


def place(
    arrows: Sequence[Arrow], places: Mapping[int, NDArray[np.int64]], most: int = MOST
) -> tuple[dict[str, Any], int]:
    """(header entries: ``arrows`` as [from, to, why, ns] in positions of the page, ``why`` the texts; how many were left
    out). ``places[rank]``: a row's position, -1 for events that the page has not."""
    drawn = []
    for (rank, row), (other, target), why, ns in arrows:
        ends = int(places[rank][row]), int(places[other][target])
        if min(ends) >= 0 and ends[0] != ends[1]:
            drawn.append((*ends, why, ns))
    shown = sorted(sorted(drawn, key=_ns, reverse=True)[:most])
    texts = list(dict.fromkeys(why for _, _, why, _ in shown))
    coded = [[one, other, texts.index(why), ns] for one, other, why, ns in shown]
    return {"arrows": coded, "why": texts}, len(drawn) - len(shown)


def _start(segment: Mapping[str, Any]) -> int:
    return int(segment["start_ns"])


def _ns(arrow: tuple[int, int, str, int]) -> int:
    return arrow[3]


def _thread(tables: Mapping[int, TraceTable], rank: int, row: int) -> tuple[int, int]:
    return rank, int(tables[rank].thread[row])


def _find(collective: Mapping[str, Any], tables: Mapping[int, TraceTable]) -> tuple[int, int] | None:
    """The (rank, row) of a collective's kernel or transfer, by its exact times."""
    rank, begun = int(collective["rank"]), int(collective["start_ns"])
    if rank not in tables:
        return None
    table = tables[rank]
    rows = np.arange(*(int(np.searchsorted(table.start, begun, side=side)) for side in ("left", "right")))
    exact = rows[table.end[rows] == int(collective["end_ns"])]
    return (rank, int(exact[-1])) if exact.size else None
