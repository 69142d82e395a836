"""What a breakdown says: steps of a rank, a rank, all ranks; their means, and the JSON of it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.profiling.communication import Collectives, RankWait
from ridgeline.profiling.integrity import Integrity
from ridgeline.profiling.ops import OpRow

PARTS = ("compute", "communication", "data", "optimizer", "host", "memory_copies", "idle", "unknown")
SPLIT_PARTS = ("compute", "communication", "host")
"""The parts that are also told apart by phase."""


@dataclass(frozen=True)
class StepParts:
    """One step of one rank; ns.

    ``parts`` sums to ``end_ns - start_ns``; hidden communication lies inside the other parts. ``by_phase[part]``
    splits compute, communication and host by the phase they fell in, and sums to the part.
    """

    step: int | None
    start_ns: int
    end_ns: int
    parts: dict[str, int]
    hidden_communication_ns: int
    by_phase: dict[str, dict[str, int]]
    exposed_by_collective: dict[str, int]

    @property
    def span_ns(self) -> int:
        """Length of the step."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class DeviceSpan:
    """The accelerator over its whole span, from its first to its last activity; ns."""

    span_ns: int
    busy_ns: int
    compute_ns: int
    communication_ns: int
    overlap_ns: int

    @property
    def busy_share(self) -> float:
        """Busy part of the span."""
        return self.busy_ns / self.span_ns if self.span_ns else 0.0

    @property
    def overlap_share(self) -> float | None:
        """Part of the communication that runs under compute; None when there was no communication."""
        return self.overlap_ns / self.communication_ns if self.communication_ns else None


@dataclass(frozen=True)
class RankBreakdown:
    """One rank: its steps, its ops, what its trace lacks, and which evidence the split rests on."""

    rank: int
    source: str
    device: str
    window: str
    steps: list[StepParts]
    evidence: dict[str, Any]
    top_ops: list[OpRow]
    matmul_ns: int
    integrity: Integrity
    device_span: DeviceSpan | None
    collectives: Collectives = field(repr=False)
    meta: dict[str, Any] = field(default_factory=dict)

    def mean_seconds(self) -> dict[str, float]:
        """Mean seconds per step of every part; they sum to :attr:`step_seconds`."""
        return _mean([step.parts for step in self.steps], PARTS)

    @property
    def step_seconds(self) -> float:
        """Mean seconds per step."""
        return sum(step.span_ns for step in self.steps) / max(len(self.steps), 1) / 1e9


@dataclass(frozen=True)
class StepBreakdown:
    """All ranks of one capture."""

    ranks: list[RankBreakdown]
    world: int
    missing_ranks: list[int]
    waits: list[RankWait]
    transfer_seconds: float
    matched_collectives: int
    straggler: dict[str, Any] | None

    def parts_seconds(self) -> dict[str, float]:
        """Mean seconds per step of every part over the ranks."""
        return _mean_of([rank.mean_seconds() for rank in self.ranks])

    def seconds_by_phase(self, part: str) -> dict[str, float]:
        """One of ``SPLIT_PARTS`` by the phase it fell in, mean seconds per step over the ranks."""
        return _mean_of([_mean([s.by_phase[part] for s in rank.steps]) for rank in self.ranks])

    def matmul_seconds(self) -> float:
        """Self time of matrix multiplications, mean seconds per step over the ranks."""
        return sum(rank.matmul_ns / max(len(rank.steps), 1) for rank in self.ranks) / max(len(self.ranks), 1) / 1e9

    @property
    def compiled(self) -> bool:
        """Whether the steps ran torch.compile's graphs."""
        return all(rank.evidence["compiled"] for rank in self.ranks)

    def exposed_seconds_by_collective(self) -> dict[str, float]:
        """Exposed communication by ``collective@phase``, mean seconds per step over the ranks."""
        return _mean_of([_mean([s.exposed_by_collective for s in rank.steps]) for rank in self.ranks])

    def hidden_seconds(self) -> float:
        """Communication under compute, mean seconds per step over the ranks."""
        per_rank = [sum(s.hidden_communication_ns for s in r.steps) / max(len(r.steps), 1) for r in self.ranks]
        return sum(per_rank) / max(len(per_rank), 1) / 1e9

    @property
    def step_seconds(self) -> float:
        """Mean seconds per step over the ranks."""
        return sum(rank.step_seconds for rank in self.ranks) / max(len(self.ranks), 1)

    @property
    def device(self) -> str:
        """``gpu`` or ``cpu``."""
        return self.ranks[0].device

    def profiler_cost(self) -> dict[str, float] | None:
        """Traced against untraced seconds per step, from the untraced steps our capture timed; None if it had none."""
        untraced = [r.meta["untraced_step_seconds"] for r in self.ranks if r.meta.get("untraced_step_seconds")]
        if not untraced:
            return None
        before, traced = float(np.mean([np.median(u) for u in untraced])), self.step_seconds
        return {"traced_seconds": traced, "untraced_seconds": before, "overhead": traced / before - 1}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ns stay integers."""
        return {
            "device": self.device,
            "world": self.world,
            "missing_ranks": self.missing_ranks,
            "step_seconds": self.step_seconds,
            "parts": self.parts_seconds(),
            "hidden_communication_seconds": self.hidden_seconds(),
            "seconds_by_phase": {part: self.seconds_by_phase(part) for part in SPLIT_PARTS},
            "matmul_seconds": self.matmul_seconds(),
            "compiled": self.compiled,
            "exposed_seconds_by_collective": self.exposed_seconds_by_collective(),
            "profiler_cost": self.profiler_cost(),
            "straggler": self.straggler,
            "matched_collectives": self.matched_collectives,
            "transfer_seconds": self.transfer_seconds,
            "waits": [asdict(one) for one in self.waits],
            "ranks": {str(rank.rank): _rank_dict(rank) for rank in self.ranks},
        }


def _mean(rows: list[dict[str, int]], keys: Sequence[str] | None = None) -> dict[str, float]:
    """Mean seconds per key over steps; a key that a step lacks counts as 0 there."""
    wanted = keys if keys is not None else sorted({key for row in rows for key in row})
    return {key: sum(row.get(key, 0) for row in rows) / max(len(rows), 1) / 1e9 for key in wanted}


def _mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {key: sum(row.get(key, 0.0) for row in rows) / max(len(rows), 1) for key in keys}


def _rank_dict(rank: RankBreakdown) -> dict[str, Any]:
    span = rank.device_span
    return {
        "rank": rank.rank,
        "source": Path(rank.source).name,
        "device": rank.device,
        "window": rank.window,
        "step_seconds": rank.step_seconds,
        "parts": rank.mean_seconds(),
        "steps": [asdict(step) for step in rank.steps],
        "evidence": rank.evidence,
        "top_ops": [asdict(row) for row in rank.top_ops],
        "integrity": asdict(rank.integrity),
        "device_span": {**asdict(span), "busy_share": span.busy_share, "overlap_share": span.overlap_share}
        if span
        else None,
    }
