"""Collectives: where they lie on one rank's time line, and across ranks who waited for whom.

On the CPU a gloo collective is two events: ``c10d::allreduce_`` on the calling thread, whose start is the
rank's *arrival*, and ``gloo:all_reduce`` on a worker thread, which is the *transfer*::

    main    --c10d--)........................ (waits, or goes on computing)
    worker             [----- gloo -----)
            ^arrival   ^transfer        ^done      the collective occupies [arrival, done)

The transfer starts when the last rank has arrived, give or take a descheduled worker thread, so the shortest
transfer of a collective over the ranks is its cost and the rest of each rank's is waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.profiling.classify import COLLECTIVE_OP, TRANSFER
from ridgeline.profiling.intervals import Intervals, Times, merge, union
from ridgeline.profiling.table import Kind, TraceTable

IDLE_GAP_NS = 1_000_000
"""A hole of this length without any event is idleness; a shorter one is Python between two ops."""


@dataclass(frozen=True)
class Collectives:
    """One rank's collectives in order of arrival; arrays are ``[collectives]``, ns."""

    names: tuple[str, ...]
    arrival: Times
    start: Times
    end: Times

    @property
    def occupied(self) -> Intervals:
        """From each arrival to the end of its transfer."""
        return union(self.arrival, self.end)


def host_collectives(table: TraceTable, threads: list[int]) -> Collectives:
    """The collectives of a CPU backend. A transfer whose call lies before the capture arrives when it starts."""
    kinds = table.is_kind(Kind.CPU_OP, Kind.ANNOTATION)
    transfers = np.flatnonzero(kinds & table.named(TRANSFER.match))
    calls = np.flatnonzero(
        table.is_kind(Kind.CPU_OP) & np.isin(table.thread, threads) & table.named(lambda n: n.startswith("c10d::"))
    )
    arrival = table.start[transfers].copy()
    waiting = table.start[calls].tolist()
    at = 0
    for index, begun in enumerate(table.start[transfers].tolist()):  # collectives are few: a loop reads best
        if at < len(waiting) and waiting[at] <= begun:
            arrival[index] = waiting[at]
            at += 1
    names = tuple(table.names[code] for code in table.name[transfers].tolist())
    return Collectives(names, arrival, table.start[transfers], table.end[transfers])


def host_communication(table: TraceTable, threads: list[int], collectives: Collectives) -> Intervals:
    """Every moment a collective was under way on a CPU backend: queued, transferring, or being called."""
    calls = np.isin(table.thread, threads) & table.is_kind(Kind.CPU_OP) & table.named(COLLECTIVE_OP.match)
    return merge(collectives.occupied, table.intervals(calls))


@dataclass(frozen=True)
class RankWait:
    """How one rank stands among the others over the matched collectives. Seconds are per step."""

    rank: int
    last_arrivals: int
    waiting_seconds: float


def waits(ranks: dict[int, Collectives], steps: int) -> tuple[list[RankWait], float, int]:
    """(per rank waiting, transfer seconds per step, collectives matched); nothing when the ranks' sequences differ.

    Waiting of a rank is its transfer beyond the shortest of the same collective plus its time from arrival to
    transfer start beyond the smallest: no clock of two ranks is ever compared, but for who arrived last.
    """
    sequences = {one.names for one in ranks.values()}
    if len(ranks) < 2 or len(sequences) != 1 or not next(iter(sequences)):
        return [], 0.0, 0
    held = np.stack([one.end - one.arrival for one in ranks.values()])
    cost = held.min(axis=0)
    last = np.stack([one.arrival for one in ranks.values()]).argmax(axis=0)
    per_step = 1e9 * max(steps, 1)
    out = [
        RankWait(rank, int((last == at).sum()), float((held[at] - cost).sum() / per_step))
        for at, rank in enumerate(ranks)
    ]
    return out, float(cost.sum() / per_step), int(cost.size)


def straggler(idle_by_rank: dict[int, list[int]]) -> dict[str, Any] | None:
    """The rank that is idle in *every* step while no other is, or None: an arrival order alone proves nothing.

    ``idle_by_rank[rank]`` are ns per step without any event. A rank is named when its least idle step exceeds
    ``IDLE_GAP_NS`` and is at least three times the largest median of the others.
    """
    if len(idle_by_rank) < 2:
        return None
    least = {rank: min(idle, default=0) for rank, idle in idle_by_rank.items()}
    suspect = max(least, key=lambda rank: least[rank])
    others = max(
        (float(np.median(idle)) for rank, idle in idle_by_rank.items() if rank != suspect and idle), default=0.0
    )
    if least[suspect] < max(IDLE_GAP_NS, 3 * others):
        return None
    return {"rank": suspect, "idle_seconds": float(np.median(idle_by_rank[suspect])) / 1e9}
