"""What the baseline run of a user's job left, in the form the rules ask for: seconds per step, places in the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.profiling.breakdown import analyze
from ridgeline.profiling.classify import find_phases, host_threads, step_rows
from ridgeline.profiling.improve.trial import Trial
from ridgeline.profiling.intervals import contains, merge, total
from ridgeline.profiling.load import find_traces, load_table
from ridgeline.profiling.nesting import operators
from ridgeline.profiling.results import StepBreakdown
from ridgeline.profiling.table import Kind, TraceTable

SYNCHRONISING = frozenset(
    {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "cpu", "numpy", "nonzero"}
)
"""Torch calls that wait for the device, or turn a tensor into Python numbers."""


@dataclass(frozen=True)
class Small:
    """The leaf operators of a step: how many, and their seconds in sum."""

    count: float
    seconds: float

    @property
    def mean_seconds(self) -> float:
        """Seconds per operator."""
        return self.seconds / self.count if self.count else 0.0


class Baseline:
    """The unchanged job: its untraced time per step, its trace, and what the hooks and the sampler saw."""

    def __init__(self, trial: Trial) -> None:
        assert trial.traces is not None
        self.trial, self.step_seconds, self.ranks = trial, trial.step_seconds, trial.ranks
        self.traces: Path = trial.traces
        self.facts: dict[str, Any] = trial.ranks[0]["facts"]

    @cached_property
    def breakdown(self) -> StepBreakdown:
        """Parts of the traced steps."""
        return analyze(self.traces)

    @cached_property
    def table(self) -> TraceTable:
        """The first rank's trace."""
        return load_table(find_traces(self.traces)[0])

    @cached_property
    def tables(self) -> dict[int, TraceTable]:
        """Every rank's trace."""
        found = [load_table(file) for file in find_traces(self.traces)]
        return {one.meta.rank if one.meta.rank is not None else at: one for at, one in enumerate(found)}

    @property
    def scale(self) -> float:
        """Traced seconds to untraced ones: tracing slows every step down, and a gain is of steps without it."""
        traced = self.breakdown.step_seconds
        return min(1.0, self.step_seconds / traced) if traced else 1.0

    def part(self, name: str) -> float:
        """Untraced seconds per step of a part of the breakdown, mean over the ranks."""
        return self.breakdown.parts_seconds()[name] * self.scale

    def phase(self, name: str, *phases: str) -> float:
        """Untraced seconds per step of a part in these phases."""
        found = self.breakdown.seconds_by_phase(name)
        return sum(found.get(phase, 0.0) for phase in phases) * self.scale

    def data_seconds(self, kind: str) -> float:
        """Seconds per step a rank waits for its loader (``wait``), or its processor time of it (``cpu``); the largest."""
        return float(max(one["data"][kind] / (len(one["stamps"]) - 1) for one in self.ranks))

    def seconds_at(self, rank: int) -> dict[str, float]:
        """Seconds per step by ``file:line`` of the user's code, from samples of the untraced steps."""
        return {where: share * self.step_seconds for where, share in self.ranks[rank]["samples"] if where}

    def calls(self, wanted: Callable[[str], bool]) -> dict[str, int]:
        """Calls per step of the torch functions that pass ``wanted``, by ``file:line``, most first."""
        found: dict[str, int] = {}
        for where, name, count in self.ranks[0]["sites"]:
            if where and wanted(name):
                found[where] = found.get(where, 0) + count
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def hottest(self, rank: int = 0, among: Callable[[str], bool] = bool) -> str:
        """The ``file:line`` with most seconds, or nothing."""
        found = {where: seconds for where, seconds in self.seconds_at(rank).items() if among(where)}
        return max(found, key=lambda where: found[where]) if found else ""

    @cached_property
    def leaves(self) -> Small:
        """Operators of the first rank's forward and backward that call no other operator, per traced step."""
        table = self.table
        nesting = operators(table)
        leaf = table.is_kind(Kind.CPU_OP) & np.isin(table.thread, host_threads(table))
        leaf[nesting.parent[nesting.parent >= 0]] = False
        phases = find_phases(table).ranges
        rows = leaf & contains(merge(phases["forward"], phases["backward"]), table.start)
        count = max(len(step_rows(table)), 1)
        return Small(float(rows.sum()) / count, float(table.duration[rows].sum()) / count / 1e9 * self.scale)

    def kernel_seconds(self, wanted: Callable[[str], bool]) -> float:
        """Untraced seconds per step inside device kernels whose names pass, first rank."""
        rows = self.table.is_kind(Kind.KERNEL) & self.table.named(wanted)
        steps = max(len(step_rows(self.table)), 1)
        return total(self.table.intervals(rows)) / steps / 1e9 * self.scale

    def operator_seconds(self, *names: str) -> float:
        """Untraced seconds per step inside operators of these names, first rank, nested ones once."""
        rows = self.table.is_kind(Kind.CPU_OP) & self.table.named(lambda name: name in names)
        steps = max(len(step_rows(self.table)), 1)
        return total(self.table.intervals(rows)) / steps / 1e9 * self.scale
