"""Who made whom wait: stragglers and the matrix of waits, from collectives matched across ranks.

::

    rank 0   [fwd][bwd][--- waits ---|xfer]
    rank 1   [fwd][bwd][--- waits ---|xfer]
    rank 2   [ slow operator  ][bwd] [xfer]      the last to come is the cause; its price is how much later it
                                                 came than the next latest

A rank is a *straggler* when it costs at least the threshold in more than half of the steps (with a single step or none:
when it costs so much more than any other rank). Being last now and then is noise: somebody always is. "No straggler" is an answer, and where ranks of a group are missing there is none at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.blame import NOTHING, blame
from ridgeline.profiling.analyses.matching import match_and_align, match_collectives
from ridgeline.profiling.analyses.temporal import step_windows
from ridgeline.profiling.communication import IDLE_GAP_NS, host_collectives, host_communication, straggler
from ridgeline.profiling.intervals import close_gaps, covered, merge
from ridgeline.profiling.table import TraceTable

COLUMNS = {
    "stragglers": {
        "rank": "the rank that others wait for",
        "caused_wait_ns": "ns: over matched collectives in which it arrived last, its arrival minus the next latest, summed",
        "count": "those collectives",
        "matched": "all matched collectives it took part in whose ranks are all here",
        "op": "name of the collective at which it caused most of the wait",
        "per_step_ns": "ns: what it costs in a typical step (the lower median over the steps)",
        "idle_ns": "ns: its median time per step without any recorded event (CPU traces; null on others)",
        "operator": "what it ran longer than the next latest before it came, step after step; or no recorded event",
        "evidence": "arrivals, idle steps, or both",
        "threshold_ns": "ns per step: the least that counts",
    },
    "wait_matrix": {
        "late_rank": "the rank that arrived last",
        "waiting_rank": "a rank that waited for it",
        "name": "the collective",
        "operator": "what the late rank ran longer than the next latest since they last met: of what it runs longer step "
        "after step the most, and what was longer this time alone when nothing else explains it; or no recorded event",
        "count": "collectives",
        "wait_ns": "ns: arrival of the late rank minus that of the waiting one, summed",
    },
}
MINIMUM_NS = 100_000
"""The least threshold: below it lies the jitter of host threads."""
SHARE = 0.01
"""Of a step: what counts by default."""
_STRAGGLER_SCHEMA: dict[str, Any] = {
    name: pl.String if name in ("op", "operator", "evidence") else pl.Int64 for name in COLUMNS["stragglers"]
}
_WAIT_SCHEMA: dict[str, Any] = {
    name: pl.String if name in ("name", "operator") else pl.Int64 for name in COLUMNS["wait_matrix"]
}


@dataclass(frozen=True)
class StragglerVerdict:
    """The answer with its threshold. ``verdict`` says in one sentence what was found, or why nothing can be said;
    ``possible`` is false in the latter case."""

    frame: pl.DataFrame
    threshold_ns: int
    verdict: str
    possible: bool


def stragglers(tables: dict[int, TraceTable], threshold_ns: int | None = None, step: int | None = None) -> pl.DataFrame:
    """Ranks that make others wait, the dearest first; empty when there is none. Columns: ``COLUMNS``."""
    return find_stragglers(tables, threshold_ns, step).frame


def find_stragglers(
    tables: dict[int, TraceTable], threshold_ns: int | None = None, step: int | None = None
) -> StragglerVerdict:
    """Stragglers, over the capture or in one profiler step, with the threshold used and a sentence. The default threshold
    is the largest of 100 us, 1 % of the median step, and the clocks' uncertainty."""
    empty = pl.DataFrame(schema=_STRAGGLER_SCHEMA)
    steps = {rank: [one for one in step_windows(t) if step in (None, one[0])] for rank, t in tables.items()}
    matches, offsets = match_and_align(tables, step=step)
    limit = threshold_ns if threshold_ns is not None else _threshold(tables, steps, offsets)
    whole = matches.filter("complete")
    if whole.is_empty():
        return StragglerVerdict(empty, limit, _why_not(tables, matches), False)
    typical = _typical(whole)
    idle = _idle_by_step(tables, steps) if not any(table.has_device_timeline for table in tables.values()) else {}
    asleep = straggler(idle)
    named = sorted(_dear(typical, whole, limit) | ({asleep["rank"]} if asleep else set()))
    rows = [_row(tables, whole, rank, typical, idle, limit, asleep) for rank in named]
    frame = pl.DataFrame(rows, schema=_STRAGGLER_SCHEMA, orient="row")
    return StragglerVerdict(
        frame.sort("caused_wait_ns", "rank", descending=[True, False]), limit, _say(named, limit), True
    )


def wait_matrix(tables: dict[int, TraceTable], step: int | None = None) -> pl.DataFrame:
    """Who made whom wait, where, and what the late rank was doing, dearest first. Columns: ``COLUMNS``. Only
    collectives whose ranks are all here count."""
    whole = match_collectives(tables, step=step).filter("complete")
    late = whole.filter("last")
    if late.is_empty():
        return pl.DataFrame(schema=_WAIT_SCHEMA)
    causes = pl.DataFrame(
        {"match": late["match"], "late_rank": late["rank"], "operator": blame(tables, whole)},
        schema={"match": pl.Int64, "late_rank": pl.Int64, "operator": pl.String},
    )
    latest = pl.col("aligned_arrival_ns").max().over("match")
    waits = whole.with_columns((latest - pl.col("aligned_arrival_ns")).alias("wait_ns")).filter(~pl.col("last"))
    grouped = (
        waits.join(causes, on="match")
        .rename({"rank": "waiting_rank"})
        .group_by("late_rank", "waiting_rank", "name", "operator")
        .agg(pl.len().cast(pl.Int64).alias("count"), pl.col("wait_ns").sum())
    )
    order = ["wait_ns", "late_rank", "waiting_rank", "name", "operator"]
    return grouped.select(*_WAIT_SCHEMA).sort(order, descending=[True, False, False, False, False])


def _threshold(
    tables: dict[int, TraceTable], steps: dict[int, list[tuple[int, int, int]]], offsets: pl.DataFrame
) -> int:
    spans = [end - start for windows in steps.values() for _, start, end in windows]
    spans = spans or [int(table.end.max() - table.start.min()) for table in tables.values() if len(table)]
    unsure = offsets["uncertainty_ns"].drop_nulls().to_list()
    return int(max([MINIMUM_NS, int(SHARE * np.median(spans)) if spans else 0, *unsure]))


def _typical(whole: pl.DataFrame) -> dict[int, int]:
    """rank -> what it costs in a typical step: the lower median over all steps, so that it must be last in more than
    half of them. Collectives outside of steps are one step of their own when there is no other."""
    inside = whole.filter(pl.col("step").is_not_null())
    rows = inside if len(inside) else whole
    per_step = rows.group_by("rank", "step").agg(pl.col("caused_wait_ns").sum())
    low = per_step.group_by("rank").agg(pl.col("caused_wait_ns").sort().get((pl.len() - 1) // 2))
    return dict(low.rows())


def _dear(typical: dict[int, int], whole: pl.DataFrame, limit: int) -> set[int]:
    """Ranks whose typical cost reaches the threshold; with one step there is no typical, so what they cost more than any
    other rank does."""
    if whole["step"].drop_nulls().n_unique() > 1:
        return {rank for rank, cost in typical.items() if cost >= limit}
    others = {rank: max([cost for one, cost in typical.items() if one != rank], default=0) for rank in typical}
    return {rank for rank, cost in typical.items() if cost - others[rank] >= limit}


def _idle_by_step(tables: dict[int, TraceTable], steps: dict[int, list[tuple[int, int, int]]]) -> dict[int, list[int]]:
    """rank -> ns of each step without any event of its host threads; empty unless all ranks have steps."""
    if not all(steps.values()):
        return {}
    out = {}
    for rank, table in tables.items():
        threads = classify.host_threads(table)
        active, _ = classify.host_activity(table, threads)
        moving = host_communication(table, threads, host_collectives(table, threads))
        busy = merge(close_gaps(active, IDLE_GAP_NS), moving)
        low = np.array([start for _, start, _ in steps[rank]], np.int64)
        high = np.array([end for _, _, end in steps[rank]], np.int64)
        out[rank] = (high - low - covered(busy, low, high)).tolist()
    return out


def _row(
    tables: dict[int, TraceTable],
    whole: pl.DataFrame,
    rank: int,
    typical: dict[int, int],
    idle: dict[int, list[int]],
    limit: int,
    asleep: dict[str, Any] | None,
) -> tuple[Any, ...]:
    mine = whole.filter(pl.col("rank") == rank)
    last = mine.filter("last")
    by_name = last.group_by("name").agg(pl.col("caused_wait_ns").sum()).sort("caused_wait_ns", "name", descending=True)
    sleeps = asleep is not None and asleep["rank"] == rank  # sure evidence, step by step; arrivals carry noise
    causes = pl.DataFrame({"operator": blame(tables, whole, rank), "wait": last["caused_wait_ns"]})
    ran = causes.group_by("operator").agg(pl.col("wait").sum()).sort("wait", "operator", descending=True)
    how = ["arrivals"] if typical.get(rank, 0) >= limit else []
    how += ["idle steps"] if sleeps else []
    return (
        rank,
        int(mine["caused_wait_ns"].sum()),
        len(last),
        len(mine),
        by_name["name"][0] if len(by_name) else None,
        typical.get(rank, 0),
        int(np.median(idle[rank])) if idle.get(rank) else None,
        NOTHING if sleeps else ran["operator"][0] if len(ran) else None,
        " and ".join(how),
        limit,
    )


def _why_not(tables: dict[int, TraceTable], matches: pl.DataFrame) -> str:
    """Why there is no verdict, in a sentence."""
    if len(tables) < 2:
        return "no verdict on stragglers: only one rank's trace is here"
    world = max(table.meta.world or 1 for table in tables.values())
    if len(matches):
        return (
            f"no verdict on stragglers: traces of {len(tables)} of {world} ranks are here, the last one may be missing"
        )
    return "no verdict on stragglers: no collective of one rank matches one of another"


def _say(named: list[int], limit: int) -> str:
    if not named:
        return f"no straggler: no rank costs the others {limit / 1e6:.3g} ms in more than half of the steps"
    who = ", ".join(str(rank) for rank in named)
    return f"rank{'s' if len(named) > 1 else ''} {who} made the others wait (threshold {limit / 1e6:.3g} ms per step)"
