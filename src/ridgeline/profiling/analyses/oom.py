"""Why an allocation failed, and what would have to shrink: the ``oom`` event of a memory snapshot, explained.

The allocator looks for a cached block that is large enough, asks the device for a new segment, returns what cached
segments are wholly free, asks again, and gives up. So a request fails for want of memory, or because what is free lies
in pieces between live tensors (fragmentation); the two need different cures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ridgeline.profiling.analyses.snapshot import (
    OOM,
    Snapshot,
    device_name,
    holders,
    levels,
    snapshot_segments,
)


@dataclass(frozen=True)
class OomReport:
    """An out-of-memory error. All sizes in bytes; ``missing_bytes`` is what had to be freed for the request to fit.

    ``holders`` has the columns of ``snapshot_peak`` at that moment, the most first; ``enough`` counts how many of its
    first rows hold together at least what is missing. Cached and trapped bytes are those when the snapshot was written.
    """

    device: str
    requested_bytes: int
    device_free_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int
    cached_bytes: int
    largest_free_block_bytes: int
    trapped_bytes: int
    missing_bytes: int
    fragmented: bool
    enough: int
    holders: pl.DataFrame
    sentences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, holders as a list of rows."""
        plain = {name: value for name, value in vars(self).items() if name not in ("holders", "sentences")}
        return {**plain, "holders": self.holders.to_dicts(), "sentences": list(self.sentences)}


def explain_oom(snapshot: Snapshot) -> OomReport | None:
    """Explain the last failed allocation of the snapshot; None when it recorded none (see :func:`why_no_oom`)."""
    found = [
        (int(history.time_ns[at]), device, at)
        for device, history in snapshot.histories.items()
        for at, action in enumerate(history.action)
        if action == OOM
    ]
    if not found:
        return None
    _, device, at = max(found)
    history = snapshot.histories[device]
    allocated, reserved = (int(one[at]) for one in levels(snapshot, device))
    segments = snapshot_segments(snapshot).filter(pl.col("device") == device_name(device))
    cached, trapped = int(segments["free_bytes"].sum()), int(segments["trapped_bytes"].sum())
    largest = int(segments["largest_free_bytes"].max() or 0) if segments.height else 0  # type: ignore[arg-type]
    asked, free = int(history.size[at]), int(history.free[at])
    missing = max(0, asked - max(free, 0) - (cached - trapped))
    held = holders(snapshot, device, at)
    reached = np.flatnonzero(np.cumsum(held["bytes"].to_numpy()) >= missing)
    enough = int(reached[0]) + 1 if reached.size and missing else 0
    report = OomReport(
        device=device_name(device),
        requested_bytes=asked,
        device_free_bytes=free if free >= 0 else None,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        cached_bytes=cached,
        largest_free_block_bytes=largest,
        trapped_bytes=trapped,
        missing_bytes=missing,
        fragmented=trapped >= asked > largest,
        enough=enough,
        holders=held,
        sentences=(),
    )
    return OomReport(**{**vars(report), "sentences": tuple(_sentences(report))})


def why_no_oom(snapshot: Snapshot) -> str | None:
    """Why there is nothing to explain, or None."""
    if any(OOM in history.action for history in snapshot.histories.values()):
        return None
    return "the snapshot records no failed allocation: record history, and dump it from an out-of-memory handler"


def _sentences(report: OomReport) -> list[str]:
    free = "an unknown amount" if report.device_free_bytes is None else size_text(report.device_free_bytes)
    out = [
        f"{report.device} was asked for {size_text(report.requested_bytes)} with {free} free on the device; the allocator "
        f"held {size_text(report.reserved_bytes)}, of which live tensors {size_text(report.allocated_bytes)}."
    ]
    if report.fragmented:
        out.append(
            f"{size_text(report.trapped_bytes)} is cached in pieces of at most {size_text(report.largest_free_block_bytes)}"
            " between live tensors: fragmentation. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lets pieces join."
        )
    if report.missing_bytes:
        out.append(f"{size_text(report.missing_bytes)} had to be freed first. The largest holders then:")
        for row in report.holders.head(max(report.enough, 3)).to_dicts():
            out.append(f"{size_text(row['bytes'])} ({(row['share'] or 0):.0%}): {row['where']}")
    return out


def size_text(size: int) -> str:
    """Bytes as people read them, in powers of 1024."""
    value, units = float(size), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units:
        if abs(value) < 1024 or unit == units[-1]:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError
