"""Frames made ready to be drawn over a trace (``export.annotate(..., tracks=...)``): start, end and name of every slice.

A matched collective becomes two slices, so that a viewer shows at a glance who waited and how long the data took::

    rank 0   [waiting for rank 1: all_reduce )[transfer: all_reduce )
    rank 1                              [wait )[transfer: all_reduce )
"""

from __future__ import annotations

import polars as pl

COLUMNS: dict[str, dict[str, str]] = {
    "waiting_and_transfer": {
        "rank": "count: the rank",
        "start_ns": "ns: where the slice begins, on the rank's own clock",
        "end_ns": "ns: where it ends",
        "name": "text: waiting or transfer, and the collective",
        "caused_by_rank": "count: the rank that came last, null when no single one did or its trace is missing",
        "bytes": "bytes: size of the collective, null when unknown",
        "match": "count: number of the matched collective, the same on all its ranks",
    }
}


def waiting_and_transfer(matches: pl.DataFrame) -> pl.DataFrame:
    """Two slices per row of ``matching.match_collectives``: from arrival until the transfer, and the transfer (the
    shortest over the ranks, ending where this rank's ends). Slices without length are left out. Columns: ``COLUMNS``."""
    late = matches.filter(pl.col("last")).select("match", pl.col("rank").alias("caused_by_rank"))
    rows = matches.join(late, on="match", how="left")
    begun = pl.col("end_ns") - pl.col("transfer_ns")
    parts = []
    for what, start, end in (("waiting", pl.col("arrival_ns"), begun), ("transfer", begun, pl.col("end_ns"))):
        name = pl.format(f"{what}: {{}}", pl.col("name").fill_null("collective"))
        times = (start.alias("start_ns"), end.alias("end_ns"), name.alias("name"))
        parts.append(rows.select("rank", *times, "caused_by_rank", "bytes", "match"))
    slices = pl.concat(parts).filter(pl.col("end_ns") > pl.col("start_ns"))
    return slices.sort("rank", "start_ns", "end_ns")
