"""What a capture lost or cannot support, rank by rank, and which figures that makes unsafe: the head of every report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ridgeline.profiling import classify
from ridgeline.profiling.analyses.temporal import step_windows
from ridgeline.profiling.integrity import MEANING, Integrity, examine, missing_ranks
from ridgeline.profiling.table import Kind, TraceTable
from ridgeline.profiling.trace import Trace

UNSAFE = {
    "lost": ("idle", "compute", "critical path"),
    "unexplained": ("operator attribution",),
    "carry_over": ("operator attribution", "first step"),
    "no_device_timeline": ("compute", "idle", "kernels"),
    "missing_steps": ("per-step means",),
    "missing_ranks": ("stragglers", "critical path across ranks"),
    "unmatched_collectives": ("stragglers", "critical path across ranks"),
    "clock_offset": ("waits below the uncertainty",),
    "negative_duration": ("sums",),
    "unknown_device_rows": ("compute",),
    "repair": ("whatever the repaired text said",),
    "late_device_work": ("last step",),
}
"""By kind of defect, the figures to distrust. What is not listed harms nothing."""


@dataclass(frozen=True)
class Defect:
    """One thing the capture lacks. ``unsafe`` names the figures it touches; empty means it is only worth knowing."""

    rank: int | None
    kind: str
    count: int
    message: str
    unsafe: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "unsafe": list(self.unsafe)}


def defects(trace: Trace) -> list[Defect]:
    """Everything that the capture lost or cannot support; empty when it is whole."""
    found = [one for rank, table in trace.tables.items() for one in _of_rank(rank, table)]
    absent = missing_ranks(list(trace.tables), trace.world)
    if absent:
        held = len(trace.tables)
        found.append(_defect(None, "missing_ranks", len(absent), f"{held} of the job's {trace.world} ranks are here"))
    return [*found, *_alone(trace), *_clocks(trace)]


def _alone(trace: Trace) -> Iterator[Defect]:
    """Collectives that the traces of the other ranks do not have."""
    if len(trace.tables) < 2:
        return
    for rank, (count, of) in trace.unmatched_collectives().items():
        if count:
            text = (
                f"{count} of {of} collectives have no partner in another rank's trace: nothing is said of their waits"
            )
            yield _defect(rank, "unmatched_collectives", count, text)


def _clocks(trace: Trace) -> Iterator[Defect]:
    """Clocks of other hosts that had to be aligned, and how well that could be done."""
    if len(trace.tables) < 2:
        return
    for row in trace.clock_offsets().iter_rows(named=True):
        offset, doubt = row["offset_ns"], row["uncertainty_ns"]
        if offset is None:
            yield _defect(row["rank"], "clock_offset", 0, "no matched collective ties its clock to the other ranks'")
        elif offset:
            known = "of unknown uncertainty" if doubt is None else f"+- {doubt / 1e3:.1f} us"
            way = "ahead" if offset > 0 else "behind"
            text = f"its clock is {abs(offset) / 1e3:.1f} us {way}, {known} ({row['evidence']})"
            yield _defect(row["rank"], "clock_offset", abs(offset), text)


def _defect(rank: int | None, kind: str, count: int, message: str) -> Defect:
    return Defect(rank, kind, count, message, UNSAFE.get(kind, ()))


def _of_rank(rank: int, table: TraceTable) -> Iterator[Defect]:
    windows = step_windows(table)
    low, high = (np.array([one[at] for one in windows], np.int64) for at in (1, 2))
    found = examine(table, classify.launches(table), low, high, [one[0] for one in windows])
    for repair in table.meta.repairs:
        yield _defect(rank, "repair", 1, f"repaired while reading: {repair}")
    yield from _steps(rank, found)
    for kind, count in found.launches_without_kernel.items():
        yield _defect(rank, kind, count, f"{count} launches without a device event: {MEANING[kind]}")
    for kind, count in found.kernels_without_launch.items():
        yield _defect(rank, kind, count, f"{count} device events without a launch: {MEANING[kind]}")
    if found.negative_durations:
        n = found.negative_durations
        yield _defect(rank, "negative_duration", n, f"{n} events end before they start and were ignored")
    yield from _device(rank, table)
    if windows and found.device_ns_after_last_step > 0.05 * (high[-1] - low[0]):
        late = found.device_ns_after_last_step
        yield _defect(
            rank, "late_device_work", late, f"the device still worked {late / 1e6:.3f} ms after the last step"
        )


def _steps(rank: int, found: Integrity) -> Iterator[Defect]:
    if not found.steps_recorded:
        yield _defect(rank, "no_steps", 0, "no ProfilerStep in the trace: the whole capture is one window")
    if found.steps_expected is not None and found.steps_recorded < found.steps_expected:
        lost = found.steps_expected - found.steps_recorded
        text = f"only {found.steps_recorded} of {found.steps_expected} steps were recorded"
        yield _defect(rank, "missing_steps", lost, text)
    if found.steps_missing:
        text = f"steps {found.steps_missing} are missing between the recorded ones"
        yield _defect(rank, "missing_steps", len(found.steps_missing), text)


def _device(rank: int, table: TraceTable) -> Iterator[Defect]:
    launches = int((table.is_kind(Kind.RUNTIME) & table.named(lambda name: "Launch" in name)).sum())
    if launches and not table.has_device_timeline:
        yield _defect(rank, "no_device_timeline", launches, f"{launches} launches but no device timeline")
    strange = Counter(table.names[code] for code in table.name[table.is_kind(Kind.DEVICE_OTHER)].tolist())
    if strange:
        names = ", ".join(name for name, _ in strange.most_common(3))
        n = sum(strange.values())
        text = f"{n} device rows of a kind nobody described ({names}): counted as compute and as unknown"
        yield _defect(rank, "unknown_device_rows", n, text)
