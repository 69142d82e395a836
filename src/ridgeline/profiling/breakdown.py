"""Where each step's time went, on each rank: parts that are disjoint and sum exactly to the step.

Every instant of a step goes to one part, the first in this order that claims it:

=================== ============================================== =============================================
part                on an accelerator's trace                      on a CPU trace
=================== ============================================== =============================================
data                (after all device work) the data phase         the data phase
compute             kernels that are not collectives               ops and compiled graphs of the host's threads
optimizer           kernels launched in the optimiser phase        ops in the optimiser phase
communication       collectives while none of the above runs       the same: exposed communication
memory_copies       copies and sets while none of the above runs   -
unknown             device activity of a category we do not know   -
host                the host is at work and the device waits       Python between ops, named phases, shells
idle                the rest: no event anywhere, or blocked        the rest: at least 1 ms without any event
=================== ============================================== =============================================

Communication that runs under compute is *hidden*; it costs nothing and is reported beside the sum.
Pure functions: table in, numbers out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.errors import UserError
from ridgeline.profiling import classify
from ridgeline.profiling.communication import (
    IDLE_GAP_NS,
    Collectives,
    host_collectives,
    host_communication,
    straggler,
    waits,
)
from ridgeline.profiling.integrity import examine, missing_ranks
from ridgeline.profiling.intervals import (
    Intervals,
    Times,
    close_gaps,
    contains,
    covered,
    disjoint,
    empty,
    intersect,
    merge,
    subtract,
    total,
    union,
)
from ridgeline.profiling.load import load_tables
from ridgeline.profiling.ops import op_times
from ridgeline.profiling.results import PARTS, SPLIT_PARTS, DeviceSpan, RankBreakdown, StepBreakdown, StepParts
from ridgeline.profiling.table import TraceTable


def analyze(where: str | Path | Sequence[str | Path]) -> StepBreakdown:
    """Break down a trace file, a folder that holds one file per rank, or a list of files.

    Raises:
        UserError: no trace, a damaged one, one without a timed event, or two files of one rank.
    """
    return combine([break_down(table, fallback_rank=at) for at, table in enumerate(load_tables(where))])


def combine(ranks: list[RankBreakdown]) -> StepBreakdown:
    """Put the ranks of one capture together, in rank order."""
    ranks = sorted(ranks, key=lambda one: one.rank)
    for one, other in itertools.pairwise(ranks):
        if one.rank == other.rank:
            raise UserError(
                f"traces {one.source} and {other.source}: both are rank {one.rank}; profile one job at a time"
            )
    world = max([len(ranks), *(rank.meta.get("world") or 1 for rank in ranks)])
    steps = min(len(rank.steps) for rank in ranks)
    wait, transfer, matched = waits({rank.rank: rank.collectives for rank in ranks}, steps)
    idle = {rank.rank: [step.parts["idle"] for step in rank.steps] for rank in ranks}
    lost = missing_ranks([rank.rank for rank in ranks], world)
    return StepBreakdown(ranks, world, lost, wait, transfer, matched, straggler(idle))


def break_down(table: TraceTable, fallback_rank: int = 0) -> RankBreakdown:
    """Break down one rank's table (a pure function of it)."""
    if not len(table):
        raise UserError(f"trace {table.meta.source}: holds no timed event")
    phases, threads = classify.find_phases(table), classify.host_threads(table)
    launched = classify.launches(table)
    collectives = host_collectives(table, threads)
    span = None
    if table.has_device_timeline:
        sets, communication, how, span = _device_sets(table, phases, threads, launched)
    else:
        sets, communication, how = _host_sets(table, phases, threads, collectives)
    labels, low, high, window = _windows(table)
    ops = op_times(table, threads, low, high)
    pieces = dict(zip(sets, disjoint(*sets.values()), strict=True))
    split = {
        part: {phase: intersect(pieces[part], where) for phase, where in phases.ranges.items()} for part in SPLIT_PARTS
    }
    by_collective = _exposed_by_collective(pieces["communication"], collectives, phases)
    steps = _steps(labels, low, high, pieces, communication, split, by_collective)
    return RankBreakdown(
        rank=table.meta.rank if table.meta.rank is not None else fallback_rank,
        source=table.meta.source,
        device="gpu" if table.has_device_timeline else "cpu",
        window=window,
        steps=steps,
        evidence={**phases.evidence, **how, "compiled": classify.is_compiled(table)},
        top_ops=ops.top(),
        matmul_ns=ops.matmul_ns(),
        integrity=examine(table, launched, low, high, [label for label in labels if label is not None]),
        device_span=span,
        collectives=_within(collectives, low, high),
        meta={"world": table.meta.world, "host": table.meta.host, **table.meta.ridgeline},
    )


def _windows(table: TraceTable) -> tuple[list[int | None], Times, Times, str]:
    """(step numbers, starts, ends, kind): the profiler's steps, or the whole capture when it has none."""
    rows = classify.step_rows(table)
    if not rows.size:
        return [None], table.start.min(keepdims=True), table.end.max(keepdims=True), "capture"
    numbers: list[int | None] = []
    for code in table.name[rows].tolist():
        match = classify.STEP.match(table.names[code])
        numbers.append(int(match.group(1)) if match and match.group(1) else None)
    return numbers, table.start[rows], table.end[rows], "step"


def _device_sets(
    table: TraceTable, phases: classify.Phases, threads: list[int], launched: Any
) -> tuple[dict[str, Intervals], Intervals, dict[str, Any], DeviceSpan]:
    """What claims an instant of an accelerator's trace, in order of precedence."""
    roles = classify.device_roles(table, phases, launched)
    compute, collective = table.intervals(roles.compute), table.intervals(roles.collective)
    optimizer = table.intervals(roles.optimizer)
    active, blocked = classify.host_activity(table, threads)
    sets = {
        "compute": compute,
        "optimizer": optimizer,
        "communication": collective,
        "memory_copies": table.intervals(roles.copies),
        "unknown": table.intervals(roles.unknown),
        "data": phases.ranges["data"],
        "host": subtract(close_gaps(active, IDLE_GAP_NS), blocked),
    }
    busy = table.intervals(table.device_rows)
    work = merge(compute, optimizer)
    span = DeviceSpan(
        span_ns=int(busy.end[-1] - busy.start[0]) if busy.start.size else 0,
        busy_ns=total(busy),
        compute_ns=total(work),
        communication_ns=total(collective),
        overlap_ns=total(intersect(work, collective)),
    )
    return sets, collective, {"communication": roles.evidence or "no collective kernel"}, span


def _host_sets(
    table: TraceTable, phases: classify.Phases, threads: list[int], collectives: Collectives
) -> tuple[dict[str, Intervals], Intervals, dict[str, Any]]:
    """What claims an instant of a CPU trace, in order of precedence."""
    work = classify.cpu_compute(table, threads)
    communication = host_communication(table, threads, collectives)
    active, _ = classify.host_activity(table, threads)
    sets = {
        "data": phases.ranges["data"],
        "optimizer": intersect(work, phases.ranges["optimizer"]),
        "compute": work,
        "communication": communication,
        "memory_copies": empty(),
        "unknown": empty(),
        "host": close_gaps(active, IDLE_GAP_NS),
    }
    how = "c10d calls and gloo transfers" if communication.start.size else "no collective"
    return sets, communication, {"communication": how}


def _steps(
    labels: list[int | None],
    low: Times,
    high: Times,
    pieces: dict[str, Intervals],
    communication: Intervals,
    split: dict[str, dict[str, Intervals]],
    by_collective: dict[str, Intervals],
) -> list[StepParts]:
    """The parts of every step ``[low[i], high[i])``; each set is measured once, against all of them."""

    def inside(sets: dict[str, Intervals]) -> dict[str, list[int]]:
        return {name: covered(one, low, high).tolist() for name, one in sets.items()}

    parts, exposed = inside(pieces), inside(by_collective)
    by_phase = {name: inside(by) for name, by in split.items()}
    whole = covered(communication, low, high).tolist()
    out = []
    for at, label in enumerate(labels):
        start, end = int(low[at]), int(high[at])
        mine = {name: spent[at] for name, spent in parts.items()}
        mine["idle"] = (end - start) - sum(mine.values())
        phases = {name: {phase: spent[at] for phase, spent in by.items()} for name, by in by_phase.items()}
        for name, by in phases.items():
            by["other"] = mine[name] - sum(by.values())
        out.append(
            StepParts(
                step=label,
                start_ns=start,
                end_ns=end,
                parts={name: mine[name] for name in PARTS},
                hidden_communication_ns=whole[at] - mine["communication"],
                by_phase=phases,
                exposed_by_collective={name: spent[at] for name, spent in exposed.items()},
            )
        )
    return out


def _exposed_by_collective(
    exposed: Intervals, collectives: Collectives, phases: classify.Phases
) -> dict[str, Intervals]:
    """Exposed communication by the collective's name and the phase it fell in, as ``gloo:all_gather@backward``."""
    out = {}
    for name in sorted(set(collectives.names)):
        mine = np.array([one == name for one in collectives.names])
        where = intersect(exposed, Collectives((), *(x[mine] for x in _times(collectives))).occupied)
        for phase, ranges in phases.ranges.items():
            part = intersect(where, ranges)
            if part.start.size:
                out[f"{name}@{phase}"] = part
    return out


def _within(collectives: Collectives, low: Times, high: Times) -> Collectives:
    """Those that arrived inside a step."""
    inside = np.flatnonzero(contains(union(low, high), collectives.arrival))
    names = tuple(collectives.names[at] for at in inside.tolist())
    return Collectives(names, *(x[inside] for x in _times(collectives)))


def _times(collectives: Collectives) -> tuple[Times, Times, Times]:
    return collectives.arrival, collectives.start, collectives.end
