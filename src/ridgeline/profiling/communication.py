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

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.classify import COLLECTIVE_OP, TRANSFER
from ridgeline.profiling.intervals import Intervals, Times, merge, union
from ridgeline.profiling.nesting import nest
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


_OPERATIONS = (
    ("reducescatter", "reduce_scatter"),
    ("allreduce", "all_reduce"),
    ("crossdevicereduce", "all_reduce"),
    ("quickreduce", "all_reduce"),
    ("allgather", "all_gather"),
    ("alltoall", "all_to_all"),
    ("sendrecv", "send_recv"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("send", "send"),
    ("recv", "recv"),
    ("gather", "gather"),
    ("scatter", "scatter"),
    ("reduce", "reduce"),
)
OPERATIONS = tuple(dict.fromkeys(name for _, name in _OPERATIONS))
"""The collectives and transfers there are, in the words of torch.distributed."""


def operation(name: str) -> str | None:
    """Which of ``OPERATIONS`` an event's name speaks of: ``c10d::_reduce_scatter_base_``, ``gloo:all_reduce``,
    ``ncclDevKernel_AllGather_RING_LL(...)``; None when it says none (``ncclDevKernel_Generic``)."""
    letters = re.sub(r"[^a-z]", "", name.split("(")[0].lower())
    return next((found for word, found in _OPERATIONS if word in letters), None)


@dataclass(frozen=True)
class HostPairs:
    """Rows of a CPU backend's collectives: the call and the transfer of each, -1 where the trace lacks one of them.

    Arrays are ``[collectives]``, in order of the transfer, calls without one last.
    """

    call: NDArray[np.intp]
    transfer: NDArray[np.intp]


def pair_calls(table: TraceTable, threads: list[int]) -> HostPairs:
    """Give each transfer the earliest call of its operation that no transfer has yet: a backend's queue is served in
    order. gloo makes a reduce-scatter of an all-reduce, so these two share a queue."""
    transfers = np.flatnonzero(table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & table.named(TRANSFER.match))
    calls = collective_calls(table, threads)
    queues: dict[str | None, list[int]] = {}
    for row in calls.tolist():  # collectives are few: a loop reads best
        queues.setdefault(_queue(table, row), []).append(row)
    paired = np.full(transfers.size, -1, np.intp)
    for at, row in enumerate(transfers.tolist()):
        waiting = queues.get(_queue(table, row))
        if waiting and table.start[waiting[0]] <= table.start[row]:
            paired[at] = waiting.pop(0)
    rest = np.array(sorted(row for queue in queues.values() for row in queue), np.intp)
    return HostPairs(np.concatenate((paired, rest)), np.concatenate((transfers, np.full(rest.size, -1, np.intp))))


def collective_calls(table: TraceTable, threads: list[int]) -> NDArray[np.intp]:
    """Rows of the ``c10d`` calls of these threads that communicate; of nested ones (a functional collective and what it
    calls) the innermost."""
    names = table.named(lambda name: re.match(r"_?c10d(_functional)?::", name) and operation(name))
    chosen = table.is_kind(Kind.CPU_OP) & table.on_threads(threads) & names
    parents = nest(table, chosen).parent[chosen]
    chosen[parents[parents >= 0]] = False
    return np.flatnonzero(chosen)


def _queue(table: TraceTable, row: int) -> str | None:
    found = operation(table.names[table.name[row]])
    return "all_reduce" if found == "reduce_scatter" else found


def host_collectives(table: TraceTable, threads: list[int]) -> Collectives:
    """The collectives of a CPU backend. A transfer whose call lies before the capture arrives when it starts."""
    pairs = pair_calls(table, threads)
    moved = pairs.transfer >= 0
    call, transfer = pairs.call[moved], pairs.transfer[moved]
    arrival = np.where(call >= 0, table.start[call], table.start[transfer])
    names = tuple(table.names[code] for code in table.name[transfer].tolist())
    return Collectives(names, arrival, table.start[transfer], table.end[transfer])


def host_communication(table: TraceTable, threads: list[int], collectives: Collectives) -> Intervals:
    """Every moment a collective was under way on a CPU backend: queued, transferring, or being called."""
    calls = table.on_threads(threads) & table.is_kind(Kind.CPU_OP) & table.named(COLLECTIVE_OP.match)
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
