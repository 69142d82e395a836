"""Bandwidth of collectives: what a rank moved, and what the busiest link must have carried for it.

*Algorithm bandwidth* is size over time. *Bus bandwidth* corrects it for the traffic an algorithm needs, so that it can be
held against a link whatever the operation and the number of ranks (nccl-tests, doc/PERFORMANCE.md)::

    all_reduce                                   2 (n - 1) / n
    all_gather, reduce_scatter, all_to_all,
    gather, scatter                                (n - 1) / n
    broadcast, reduce, send, recv, send_recv              1

Size is that of nccl-tests: the larger of a rank's input and output (of an all-gather all that is gathered).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

COLUMNS = {
    "collective_bandwidth": {
        "op": "the operation: all_reduce, all_gather, ...",
        "group_size": "ranks in the process group; null when the trace does not say",
        "bytes": "bytes: the larger of a rank's input and output; null when the trace does not say",
        "count": "collectives of this operation, group size and size",
        "time_ns": "ns: sum of their times; waiting for late ranks is inside, so bandwidths are lower bounds",
        "fastest_ns": "ns: the shortest of them",
        "algorithm_bytes_per_second": "bytes/s: bytes * count / time",
        "bus_bytes_per_second": "bytes/s: algorithm bandwidth times the operation's factor (nccl-tests)",
        "best_bus_bytes_per_second": "bytes/s: bus bandwidth of the fastest one",
        "ceiling_bytes_per_second": "bytes/s: the measured ceiling held against it; null without one",
        "ceiling_share": "share: best bus bandwidth / ceiling",
    }
}
_PART = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
_WHOLE = ("broadcast", "reduce", "send", "recv", "send_recv")
Ceiling = float | Mapping[str, float] | None
"""Bus bandwidth in bytes/s that the machine reaches: one figure, or one per operation."""


def bus_ceilings(ceilings: Mapping[str, Any]) -> dict[str, float]:
    """The bus bandwidth that ``ridgeline.hardware`` measured, by operation; an operation it did not measure has none."""
    rates = {op: ceilings.get(f"{op}_bytes_per_second") for op in ("all_reduce", "all_gather")}
    return {op: float(rate) for op, rate in rates.items() if rate}


def bus_factor(op: str | None, ranks: int | None) -> float | None:
    """Bus bandwidth over algorithm bandwidth; None where it is not defined (a barrier, one rank, an unknown size)."""
    if op in _WHOLE:
        return 1.0
    if not ranks or ranks < 2:
        return None
    if op == "all_reduce":
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if op in _PART else None


def ceiling_of(op: str | None, ceiling: Ceiling) -> float | None:
    """The ceiling that holds for an operation, or None."""
    if ceiling is None or isinstance(ceiling, (int, float)):
        return ceiling
    return ceiling.get(op) if op is not None else None


def with_bandwidth(frame: pl.DataFrame, time: str, ceiling: Ceiling = None) -> pl.DataFrame:
    """``frame`` (columns ``op``, ``group_size``, ``bytes`` and the time in ns named ``time``) with the columns
    ``algorithm_bytes_per_second``, ``bus_bytes_per_second`` and ``ceiling_share``; null where something is unknown."""
    factor, limit = _factors(frame, ceiling)
    seconds = pl.when(pl.col(time) > 0).then(pl.col(time) / 1e9)
    algorithm = pl.col("bytes") / seconds
    return frame.with_columns(
        algorithm.alias("algorithm_bytes_per_second"),
        (algorithm * factor).alias("bus_bytes_per_second"),
        (algorithm * factor / limit).alias("ceiling_share"),
    )


def collective_bandwidth(frame: pl.DataFrame, ceiling: Ceiling = None, time: str = "duration_ns") -> pl.DataFrame:
    """Bandwidth by operation, group size and size of the rows of ``collectives`` (or, with ``time="transfer_ns"``, of
    ``match_collectives``, where waiting is no longer inside). Columns: ``COLUMNS``."""
    keys = ["op", "group_size", "bytes"]
    timed = pl.col("timed") if "timed" in frame.columns else pl.lit(True)
    grouped = (
        frame.filter(timed & (pl.col(time) > 0))
        .group_by(keys)
        .agg(
            pl.len().cast(pl.Int64).alias("count"),
            pl.col(time).sum().alias("time_ns"),
            pl.col(time).min().alias("fastest_ns"),
        )
        .sort("time_ns", *keys, descending=[True, False, False, False], nulls_last=True)
    )
    factor, limit = _factors(grouped, ceiling)
    algorithm = pl.col("bytes") * pl.col("count") / (pl.col("time_ns") / 1e9)
    best = pl.col("bytes") / (pl.col("fastest_ns") / 1e9) * factor
    return grouped.with_columns(
        algorithm.alias("algorithm_bytes_per_second"),
        (algorithm * factor).alias("bus_bytes_per_second"),
        best.alias("best_bus_bytes_per_second"),
        limit.alias("ceiling_bytes_per_second"),
        (best / limit).alias("ceiling_share"),
    )


def _factors(frame: pl.DataFrame, ceiling: Ceiling) -> tuple[pl.Series, pl.Series]:
    """(bus factor, ceiling) of every row. ``[rows]``"""
    pairs = frame.select("op", "group_size").rows()
    factor = pl.Series("factor", [bus_factor(op, ranks) for op, ranks in pairs], pl.Float64)
    return factor, pl.Series("limit", [ceiling_of(op, ceiling) for op, _ in pairs], pl.Float64)
