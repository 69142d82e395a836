"""``Trace``: a capture's ranks, and every analysis of them as a Polars frame.

    trace = Trace.load("runs/latest/artifacts/traces")     # a file, a folder of ranks, a glob, a merged file
    trace.temporal_breakdown()                             # one row per rank
    trace.kernel_breakdown(by="operator")

The methods only call the analyses, rank by rank, and put a ``rank`` column before theirs; what each column means is in
:mod:`ridgeline.profiling.columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ridgeline.errors import UserError, nearest
from ridgeline.profiling.table import TraceTable

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Trace:
    """The tables of a capture by rank. ``source`` is what the user named."""

    tables: Mapping[int, TraceTable]
    source: str

    @classmethod
    def load(
        cls, where: str | Path | Sequence[str | Path], *, stacks: bool = False, progress: Progress | None = None
    ) -> Trace:
        """Read a trace; ``stacks`` keeps Python frames, which name modules and lines and cost memory.

        A rank that no file names gets the smallest number that is free.

        Raises:
            UserError: nothing there, damaged beyond repair, or two files of one rank.
        """
        from ridgeline.profiling.load import load_tables

        return cls.of(load_tables(where, stacks=stacks, progress=progress), str(where))

    @classmethod
    def of(cls, tables: Sequence[TraceTable], source: str = "") -> Trace:
        """Tables that are already read."""
        ranks: dict[int, TraceTable] = {}
        for table in (one for one in tables if one.meta.rank is not None):
            rank = table.meta.rank
            assert rank is not None
            if rank in ranks:
                both = f"{ranks[rank].meta.source} and {table.meta.source}"
                raise UserError(f"traces {both}: both are rank {rank}; give the files of one job")
            ranks[rank] = table
        for table in (one for one in tables if one.meta.rank is None):
            ranks[next(at for at in range(len(tables) + 1) if at not in ranks)] = table
        for table in tables:
            if not len(table):
                raise UserError(f"trace {table.meta.source}: holds no timed event")
        return cls(dict(sorted(ranks.items())), source)

    @property
    def world(self) -> int:
        """Ranks of the job, as far as the files say."""
        return max([len(self.tables), *(table.meta.world or 1 for table in self.tables.values())])

    @property
    def device(self) -> str:
        """``gpu`` when any rank has a device timeline, else ``cpu``."""
        return "gpu" if any(table.has_device_timeline for table in self.tables.values()) else "cpu"

    def only(self, rank: int | None) -> Trace:
        """The same trace with one rank.

        Raises:
            UserError: no such rank.
        """
        if rank is None:
            return self
        if rank not in self.tables:
            known = [str(one) for one in self.tables]
            raise UserError(f"trace {self.source}: no rank {rank}{nearest(str(rank), known)}")
        return Trace({rank: self.tables[rank]}, self.source)

    def window(self, rank: int, step: int | None) -> tuple[int, int] | None:
        """Start and end of a profiler step of a rank, ns; None for the whole capture.

        Raises:
            UserError: no such step.
        """
        from ridgeline.profiling.analyses.temporal import step_window

        return None if step is None else step_window(self.tables[rank], step)

    def per_rank(self, analysis: Callable[..., pl.DataFrame], *args: Any, **options: Any) -> pl.DataFrame:
        """``analysis(table, ...)`` of every rank, below each other, with the rank in front."""
        frames = [
            analysis(table, *args, **options).select(pl.lit(rank, pl.Int64).alias("rank"), pl.all())
            for rank, table in self.tables.items()
        ]
        return pl.concat(frames, how="vertical_relaxed")

    def windowed(self, analysis: Callable[..., pl.DataFrame], step: int | None, **options: Any) -> pl.DataFrame:
        """As :meth:`per_rank`, each rank in its own window of ``step``."""
        frames = [
            analysis(table, window=self.window(rank, step), **options).select(
                pl.lit(rank, pl.Int64).alias("rank"), pl.all()
            )
            for rank, table in self.tables.items()
        ]
        return pl.concat(frames, how="vertical_relaxed")

    def temporal_breakdown(self, *, steps: bool = False, step: int | None = None) -> pl.DataFrame:
        """Compute, communication, copies and idle, over the capture, per step, or of one step."""
        from ridgeline.profiling.analyses.temporal import temporal_breakdown

        return self.per_rank(temporal_breakdown, steps=steps, step=step)
