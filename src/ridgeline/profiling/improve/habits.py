"""Habits that the trace analysis knows and no rule of ours measures better, as findings of a user's job."""

from __future__ import annotations

from collections.abc import Iterator

from ridgeline.profiling.analyses.antipatterns import anti_patterns
from ridgeline.profiling.classify import step_rows
from ridgeline.profiling.improve import knobs
from ridgeline.profiling.improve.evidence import Baseline
from ridgeline.profiling.improve.knobs import Knob

KNOBS: dict[str, Knob | None] = {
    "fp32 matmul without TF32": knobs.tf32(),
    "host-device copy": None,
    "synchronisation": None,
    "for-loop indexing": None,
    "gradients not set to None": None,
    "bias before batch norm": None,
    "shapes not multiples of 8": None,
}
"""Finding of :func:`anti_patterns` -> its knob; loaders, optimisers and ``.item()`` have rules of their own."""


def habits(base: Baseline) -> Iterator[tuple[str, float, str, str, Knob | None]]:
    """(name, seconds per untraced step, where, what to change, knob) of the first rank, most costly first."""
    steps = max(len(step_rows(base.table)), 1)
    for row in anti_patterns(base.table).iter_rows(named=True):
        if row["finding"] in KNOBS:
            seconds = row["cost_ns"] / steps / 1e9 * base.scale
            yield row["finding"], seconds, row["where"], row["knob"], KNOBS[row["finding"]]
