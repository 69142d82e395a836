"""The same collective on several ranks: which rows of their traces are one, and how far their clocks differ.

A collective ends everywhere at once, or nearly: so ends, not starts, tell how far two clocks are apart::

    rank 0   [---- waits ----|-transfer-]
    rank 1            [ late |-transfer-]        start: when the rank came; end: the common moment
                                        ^ the difference of the two ends is the clocks', give or take some microseconds

Ranks of one host share a clock, whatever their ends say (a descheduled thread ends late), and are never shifted.
Collectives match by (group, sequence, operation, size); the sequence is the backend's own number, or the index in the
profiler step, so that a collective that one trace lost spoils one step of one group at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from ridgeline.profiling.analyses.bandwidth import Ceiling, with_bandwidth
from ridgeline.profiling.analyses.collectives import collectives
from ridgeline.profiling.table import TraceTable

COLUMNS = {
    "match_collectives": {
        "match": "number of the collective, by its earliest aligned arrival; the rows of one match are its ranks",
        "rank": "the rank",
        "op": "the operation",
        "name": "the c10d parent's name (of the lowest rank)",
        "group": "name of the process group; null when the trace does not say",
        "group_size": "ranks in the group; of the job when the trace does not say",
        "step": "profiler step it was called in (on the lowest rank); null outside of steps",
        "sequence": "the backend's number, else the index in the group and step",
        "bytes": "bytes: the larger of this rank's input and output; null when unknown",
        "arrival_ns": "ns: when this rank began to take part, on its own clock",
        "start_ns": "ns: start of its kernel or transfer, on its own clock",
        "end_ns": "ns: end of its kernel or transfer, on its own clock",
        "aligned_arrival_ns": "ns: arrival on the clock of the lowest rank (arrival - offset)",
        "complete": "whether the traces of all the group's ranks are here: only then is the last one the cause",
        "last": "whether this rank arrived last; false for all when two arrive at the same moment",
        "caused_wait_ns": "ns: of the last rank: its aligned arrival minus the next latest; 0 for others",
        "transfer_ns": "ns: min over ranks of end - start; the same in all rows of a match",
        "waiting_ns": "ns: end - arrival - transfer of this rank; transfer + waiting = end - arrival",
        "algorithm_bytes_per_second": "bytes/s: bytes / transfer",
        "bus_bytes_per_second": "bytes/s: algorithm bandwidth times nccl-tests' factor",
        "ceiling_share": "share: bus bandwidth / the measured ceiling; null without one",
    },
    "clock_offsets": {
        "rank": "the rank",
        "offset_ns": "ns: its clock minus the lowest rank's; null when nothing connects them",
        "uncertainty_ns": "ns: median distance of the ends from that offset, summed along the chain of hosts",
        "count": "matched collectives whose ends were compared",
        "evidence": "reference, same host, collective ends, or no matched collective",
    },
}
_CELL = ["group", "_step"]
_KEYS = [*_CELL, "sequence", "op"]
_EQUAL_SIZES = ("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter", "barrier")
_END_TOGETHER = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier")
_MATCH_SCHEMA: dict[str, Any] = {
    name: pl.String
    if name in ("op", "name", "group")
    else pl.Boolean
    if name in ("complete", "last")
    else pl.Float64
    if name.endswith(("per_second", "share"))
    else pl.Int64
    for name in COLUMNS["match_collectives"]
}
_OFFSET_SCHEMA = {
    "rank": pl.Int64,
    "offset_ns": pl.Int64,
    "uncertainty_ns": pl.Int64,
    "count": pl.Int64,
    "evidence": pl.String,
}


def match_collectives(tables: dict[int, TraceTable], ceiling: Ceiling = None, step: int | None = None) -> pl.DataFrame:
    """One row per matched collective and rank, with clocks aligned. Columns: ``COLUMNS``; empty when none match.

    ``step``: only the collectives called in that profiler step; all of the capture are matched and align the clocks.
    """
    return match_and_align(tables, ceiling, step)[0]


def match_and_align(
    tables: dict[int, TraceTable], ceiling: Ceiling = None, step: int | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The frames of ``match_collectives`` and ``clock_offsets`` in one go."""
    paired = _pairs(tables)
    offsets = _offsets(tables, paired)
    found = _measured(paired, offsets, _worlds(tables), ceiling)
    return (found if step is None else found.filter(pl.col("step") == step)), offsets


def clock_offsets(tables: dict[int, TraceTable]) -> pl.DataFrame:
    """How far each rank's clock is from the lowest rank's, and how sure that is. Columns: ``COLUMNS``."""
    return _offsets(tables, _pairs(tables))


def unmatched(tables: dict[int, TraceTable]) -> dict[int, tuple[int, int]]:
    """For each rank how many of its timed collectives have no partner in another rank's trace, and how many there are.
    Groups of one rank alone do not count."""
    matched = dict(match_collectives(tables).group_by("rank").len().rows())
    alone = pl.col("group_size").fill_null(_worlds(tables)) < 2
    counts = {
        rank: collectives(table).filter(pl.col("timed") & ~alone).height for rank, table in sorted(tables.items())
    }
    return {rank: (max(count - matched.get(rank, 0), 0), count) for rank, count in counts.items()}


def _pairs(tables: dict[int, TraceTable]) -> pl.DataFrame:
    """Rows of collectives that have a partner on another rank: those of ``collectives`` with ``rank`` and ``match``."""
    frames = [
        collectives(table).with_columns(pl.lit(rank, pl.Int64).alias("rank")) for rank, table in sorted(tables.items())
    ]
    empty = pl.DataFrame(schema={"rank": pl.Int64, "match": pl.Int64, "group": pl.String})
    if len(frames) < 2:
        return empty
    rows = _numbered(pl.concat(frames).filter(pl.col("timed")))
    rows = rows.join(_agreeing(rows), on=_KEYS, nulls_equal=True)
    return rows.with_columns(pl.struct(_KEYS).rank("dense").cast(pl.Int64).alias("match")) if len(rows) else empty


def _numbered(rows: pl.DataFrame) -> pl.DataFrame:
    """``sequence`` becomes the backend's number where all of a group have one, else the index in the group and step."""
    group = pl.concat_str("group", "group_ranks", separator=" ", ignore_nulls=True).alias("group")
    rows = rows.with_columns(group)
    number = pl.col("writer_sequence")
    unique = number.is_not_null().all() & (number.n_unique() == pl.len())
    rows = rows.with_columns(unique.over("rank", "group").alias("_own"))
    own = pl.col("_own").all().over("group")
    counted = pl.col("sequence").rank("ordinal").over("rank", "group", "step").cast(pl.Int64) - 1
    return rows.with_columns(
        pl.when(own).then("writer_sequence").otherwise(counted).alias("sequence"),
        pl.when(own).then(None).otherwise("step").alias("_step"),
        own.alias("_own"),
    )


def _agreeing(rows: pl.DataFrame) -> pl.DataFrame:
    """The keys on which at least two ranks have one row each and agree on its dtype and size; where sequences are counted, all
    ranks must have counted as many in that step and group, for an index means nothing after a loss."""
    counts = rows.group_by(*_CELL, "rank").agg(pl.len().alias("_n"), pl.col("_own").first())
    whole = counts.group_by(_CELL).agg((pl.col("_own").first() | (pl.col("_n").n_unique() == 1)).alias("_whole"))
    sized = pl.when(pl.col("op").is_in(_EQUAL_SIZES)).then("bytes")
    keys = (
        rows.with_columns(sized.alias("_size"))
        .group_by(_KEYS)
        .agg(
            pl.len().alias("_n"),
            pl.col("rank").n_unique().alias("_ranks"),
            pl.col("_size").drop_nulls().n_unique(),
            pl.col("dtype").drop_nulls().n_unique(),
        )
    )
    keys = keys.join(whole, on=_CELL, nulls_equal=True)
    alike = (pl.col("_size") <= 1) & (pl.col("dtype") <= 1)
    agree = pl.col("_whole") & (pl.col("_ranks") > 1) & (pl.col("_n") == pl.col("_ranks")) & alike
    return keys.filter(agree).select(_KEYS)


def _offsets(tables: dict[int, TraceTable], paired: pl.DataFrame) -> pl.DataFrame:
    """Walk from the lowest rank's host to all others over the pairs of hosts that share collectives."""
    ranks = sorted(tables)
    hosts, ends = _hosts(tables, paired), _ends(paired)
    found: dict[str, tuple[int, int, int]] = {hosts[ranks[0]]: (0, 0, 0)} if ranks else {}
    waiting = list(found)
    while waiting:
        near = waiting.pop(0)
        for far in sorted(set(hosts.values()) - set(found)):
            differences = _differences(
                ends, [r for r in ranks if hosts[r] == near], [r for r in ranks if hosts[r] == far]
            )
            if differences.size:
                middle = int(np.median(differences))
                spread = int(np.median(np.abs(differences - middle)))
                found[far] = (found[near][0] + middle, found[near][1] + spread, differences.size)
                waiting.append(far)
    return pl.DataFrame(
        [_offset_row(rank, ranks, hosts, found, ends) for rank in ranks], schema=_OFFSET_SCHEMA, orient="row"
    )


def _hosts(tables: dict[int, TraceTable], paired: pl.DataFrame) -> dict[int, str]:
    """The host whose clock each rank has. Containers of several nodes may bear one name: a rank that on the common clock
    would leave most collectives before they began has its own."""
    hosts: dict[int, str] = {}
    for rank in sorted(tables):
        name = tables[rank].meta.host
        first = next((one for one, host in hosts.items() if host == name), rank)
        hosts[rank] = name if name and not _contradicts(paired, first, rank) else f"rank {rank}"
    return hosts


def _contradicts(paired: pl.DataFrame, one: int, other: int) -> bool:
    if one == other or paired.is_empty():
        return False
    both = paired.filter(pl.col("rank").is_in([one, other]) & pl.col("op").is_in(_END_TOGETHER))
    spans = both.group_by("match").agg(pl.len(), pl.col("end_ns").min(), pl.col("arrival_ns").max())
    spans = spans.filter(pl.col("len") == 2)
    return 2 * spans.filter(pl.col("end_ns") < pl.col("arrival_ns")).height > spans.height


def _offset_row(
    rank: int,
    ranks: list[int],
    hosts: dict[int, str],
    found: dict[str, tuple[int, int, int]],
    ends: dict[int, dict[int, int]],
) -> tuple[int, int | None, int | None, int, str]:
    host, first = hosts[rank], ranks[0]
    if host not in found:
        return rank, None, None, 0, "no matched collective"
    if host != hosts[first]:
        return rank, *found[host], "collective ends"
    if rank == first:
        return rank, 0, 0, 0, "reference"
    apart = _differences(ends, [first], [rank])  # what the ends would have said: they cannot tell clocks closer
    return rank, 0, int(np.median(np.abs(apart))) if apart.size else 0, int(apart.size), "same host"


def _ends(paired: pl.DataFrame) -> dict[int, dict[int, int]]:
    """rank -> match -> end, of the operations that end together (of all when there is none of these)."""
    out: dict[int, dict[int, int]] = {}
    if paired.is_empty():
        return out
    together = paired.filter(pl.col("op").is_in(_END_TOGETHER))
    for rank, match, end in (paired if together.is_empty() else together).select("rank", "match", "end_ns").rows():
        out.setdefault(rank, {})[match] = end
    return out


def _differences(ends: dict[int, dict[int, int]], near: list[int], far: list[int]) -> Any:
    """Ends on ranks of the far host minus ends of the same collectives on the near one. ``[samples]`` ns"""
    out = []
    for one in near:
        for other in far:
            mine, theirs = ends.get(one, {}), ends.get(other, {})
            out += [theirs[match] - mine[match] for match in mine.keys() & theirs.keys()]
    return np.array(out, np.int64)


def _worlds(tables: dict[int, TraceTable]) -> int:
    """Ranks of the job: what the traces say, and at least those that are here."""
    return max([len(tables), *(table.meta.world or 1 for table in tables.values())])


def _aligned(paired: pl.DataFrame, offsets: pl.DataFrame) -> pl.DataFrame:
    """Paired rows with arrival and end on the common clock; ranks that nothing connects to it fall out."""
    known = offsets.select("rank", "offset_ns", "uncertainty_ns").drop_nulls()
    return paired.join(known, on="rank").with_columns(
        (pl.col("arrival_ns") - pl.col("offset_ns")).alias("aligned_arrival_ns"),
        (pl.col("end_ns") - pl.col("offset_ns")).alias("_end"),
    )


def _possible(rows: pl.DataFrame) -> pl.DataFrame:
    """Without false matches: nobody leaves a collective before the last has come, as far as the clocks can tell."""
    early = pl.col("_end").min().over("match") + 2 * pl.col("uncertainty_ns").max().over("match")
    impossible = (early < pl.col("aligned_arrival_ns").max().over("match")) & pl.col("op").is_in(_END_TOGETHER)
    return rows.filter(~impossible.fill_null(False)).filter(pl.len().over("match") > 1)


def _measured(paired: pl.DataFrame, offsets: pl.DataFrame, world: int, ceiling: Ceiling) -> pl.DataFrame:
    """The frame of ``match_collectives`` from paired rows and the clocks' offsets."""
    if paired.is_empty():
        return pl.DataFrame(schema=_MATCH_SCHEMA)
    size = pl.col("group_size").fill_null(world)
    rows = _possible(_aligned(paired, offsets))
    rows = rows.with_columns(
        (pl.len().over("match") >= size).alias("complete"),
        pl.col("duration_ns").min().over("match").alias("transfer_ns"),
        pl.col("name", "step").sort_by("rank").first().over("match"),
        size.alias("group_size"),
    )
    arrival = pl.col("aligned_arrival_ns")
    latest, second = arrival.max().over("match"), arrival.top_k(2).min().over("match")
    last = (arrival == latest) & (latest > second)
    rows = rows.with_columns(
        last.alias("last"),
        pl.when(last).then(latest - second).otherwise(0).alias("caused_wait_ns"),
        (pl.col("end_ns") - pl.col("arrival_ns") - pl.col("transfer_ns")).alias("waiting_ns"),
        pl.struct(arrival.min().over("match"), "match").rank("dense").cast(pl.Int64).alias("match"),
    )
    rows = rows.with_columns(pl.col("match") - 1)
    return with_bandwidth(rows, "transfer_ns", ceiling).select(*_MATCH_SCHEMA).sort("match", "rank")
