"""``Trace``: a capture's ranks, and every analysis of them as a Polars frame.

    trace = Trace.load("runs/latest/artifacts/traces")     # a file, a folder of ranks, a glob, a merged file
    trace.temporal_breakdown()                             # one row per rank
    trace.kernel_breakdown(by="operator")

The methods only call the analyses, rank by rank, and put a ``rank`` column before theirs; what each column means is in
:mod:`ridgeline.profiling.columns`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
        cls,
        where: str | Path | Sequence[str | Path],
        *,
        stacks: bool = False,
        roles: str | Path | Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> Trace:
        """Read a trace; ``stacks`` keeps Python frames, which name modules and lines and cost memory.

        A rank that no file names gets the smallest number that is free. ``roles``: patterns of kernel names to roles, or
        a TOML or JSON file of them, which every analysis then honours.

        Raises:
            UserError: nothing there, damaged beyond repair, two files of one rank, or a wrong table of roles.
        """
        from ridgeline.profiling.load import load_tables

        patterns = analysis("roles").read_user_table(roles)  # before the trace: it may be large
        tables = load_tables(where, stacks=stacks, progress=progress)
        return cls.of([analysis("roles").with_roles(table, patterns) for table in tables], str(where))

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

    def properties(self) -> dict[str, Any]:
        """What the first rank's file says at its top: devices, versions."""
        from ridgeline.profiling.analyses.header import describe

        first = next(iter(self.tables.values())).meta.source
        return describe(first) if Path(first).is_file() else {}

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
        return self.per_rank(analysis("temporal").temporal_breakdown, steps=steps, step=step)

    def kernel_breakdown(self, by: str = "name", step: int | None = None) -> pl.DataFrame:
        """Device work by ``name``, ``operator``, ``module`` or ``shape``; without a device operators by own time."""
        return self.windowed(analysis("kernels").kernel_breakdown, step, by=by)

    def launch_statistics(self, step: int | None = None, **limits: int) -> pl.DataFrame:
        """Launch calls by name: their own time, the delay to the device, and what is short, slow or late."""
        return self.windowed(analysis("launches").launch_statistics, step, **limits)

    def idle_by_cause(self, step: int | None = None, **limits: int) -> pl.DataFrame:
        """Idle time of every stream and device by cause; the causes sum to the idle time."""
        return self.windowed(analysis("idle").idle_by_cause, step, **limits)

    def idle_gaps(self, top: int = 20, step: int | None = None) -> pl.DataFrame:
        """The longest gaps of each rank with cause, the operator around them and the next kernel."""
        return self.windowed(analysis("idle").idle_gaps, step, top=top)

    def queue_length(self, step: int | None = None) -> pl.DataFrame:
        """Device events outstanding per stream, as a step function of time."""
        return self.windowed(analysis("counters").queue_length, step)

    def queue_summary(self, step: int | None = None) -> pl.DataFrame:
        """Mean, largest and full queue per stream."""
        return self.windowed(analysis("counters").queue_summary, step)

    def memory_bandwidth(self, step: int | None = None) -> pl.DataFrame:
        """Copies and sets by kind: bytes, busy time, mean and peak rate."""
        return self.windowed(analysis("counters").memory_bandwidth, step)

    def hardware_counters(self) -> pl.DataFrame:
        """Counters of CUPTI's range profiler, when the capture has them."""
        return self.per_rank(analysis("counters").hardware_counters)

    def frequent_sequences(self, step: int | None = None, **options: Any) -> pl.DataFrame:
        """Runs of kernels that come again and again: what a fusion would save at most."""
        return self.windowed(analysis("sequences").frequent_sequences, step, **options)

    def classify_kernels(self, user_table: Any = None, step: int | None = None) -> pl.DataFrame:
        """The role of every kernel name, by which evidence, and how sure that is."""
        return self.windowed(analysis("roles").classify_kernels, step, user_table=user_table)

    def collectives(self, step: int | None = None, **options: Any) -> pl.DataFrame:
        """One row per collective: bytes, times, bandwidths, what of it was exposed, and who called it."""
        return self.windowed(analysis("collectives").collectives, step, **options)

    def collective_bandwidth(self, step: int | None = None, ceiling: Any = None) -> pl.DataFrame:
        """Bandwidth by operation, ranks and size; of the transfers alone where collectives match across ranks.

        ``ceiling``: measured bus bandwidth, one figure or one per operation.
        """
        matched = self.match_collectives(step)
        by = analysis("bandwidth").collective_bandwidth
        if not matched.is_empty():
            return by(matched.unique("match", keep="first", maintain_order=True), ceiling, time="transfer_ns")  # type: ignore[no-any-return]
        return by(self.collectives(step), ceiling)  # type: ignore[no-any-return]

    def communication_overlap(self, step: int | None = None) -> pl.DataFrame:
        """Communication and how much of it compute hides; null where there is none."""
        return self.windowed(analysis("collectives").communication_overlap, step)

    def stragglers(self, step: int | None = None, threshold_ns: int | None = None) -> pl.DataFrame:
        """Ranks that made others wait at collectives, the dearest first; empty when there is none."""
        frame: pl.DataFrame = analysis("ranks").stragglers(dict(self.tables), threshold_ns, step)
        return frame

    def straggler_verdict(self, step: int | None = None, threshold_ns: int | None = None) -> Any:
        """The same with its threshold and a sentence, also when nothing can be said."""
        return analysis("ranks").find_stragglers(dict(self.tables), threshold_ns, step)

    def wait_matrix(self, step: int | None = None) -> pl.DataFrame:
        """Who made whom wait, at which collective, and what the late rank ran meanwhile."""
        frame: pl.DataFrame = analysis("ranks").wait_matrix(dict(self.tables), step)
        return frame

    def match_collectives(self, step: int | None = None, ceiling: Any = None) -> pl.DataFrame:
        """Every collective once per rank: arrival on one clock, transfer, waiting, and who came last."""
        frame: pl.DataFrame = analysis("matching").match_collectives(dict(self.tables), ceiling, step)
        return frame

    def unmatched_collectives(self) -> dict[int, tuple[int, int]]:
        """rank -> how many of its collectives no other rank's trace has, and how many there are."""
        found: dict[int, tuple[int, int]] = analysis("matching").unmatched(dict(self.tables))
        return found

    def clock_offsets(self) -> pl.DataFrame:
        """Each rank's clock against the first's, with its uncertainty and what it rests on."""
        frame: pl.DataFrame = analysis("matching").clock_offsets(dict(self.tables))
        return frame

    def anti_patterns(self, step: int | None = None) -> pl.DataFrame:
        """Patterns that cost time for nothing, by place in the program, with what to change."""
        return self.windowed(analysis("antipatterns").anti_patterns, step)

    def call_tree(self, step: int | None = None) -> pl.DataFrame:
        """Every call path with its own and inclusive time on the host and the device."""
        return self.windowed(analysis("calltree").call_tree, step)

    def critical_path(self, step: int | None = None) -> pl.DataFrame:
        """The chain of events that set each rank's time, segment by segment; it tiles the window."""
        return self.windowed(analysis("critical_path").critical_path, step)

    def critical_path_across(self) -> pl.DataFrame:
        """The same over all ranks: at a collective it goes on with the rank that came last."""
        frame: pl.DataFrame = analysis("critical_path").critical_path_across(dict(self.tables))
        return frame

    def what_if(self, change: str | Sequence[str], step: int | None = None) -> pl.DataFrame:
        """The time predicted with a change, beside the measured one."""
        return self.windowed(analysis("whatif").what_if, step, change=change)

    def what_if_across(self, change: str | Sequence[str]) -> pl.DataFrame:
        """The same for all ranks together: a collective waits for the last one, whatever the change."""
        frame: pl.DataFrame = analysis("whatif").what_if_across(dict(self.tables), change)
        return frame

    def roofline(self, ceilings: Mapping[str, Any] | None = None, step: int | None = None) -> pl.DataFrame:
        """FLOPs, bytes and rates per operator, against the ceilings when they are known."""
        return self.windowed(analysis("roofline").roofline, step, ceilings=ceilings)

    def memory_timeline(self, step: int | None = None) -> pl.DataFrame:
        """Allocated bytes over time by category."""
        return self.windowed(analysis("memory").memory_timeline, step)

    def memory_peak(self) -> pl.DataFrame:
        """What the peak is made of."""
        return self.per_rank(analysis("memory").memory_peak)

    def memory_allocations(self, step: int | None = None) -> pl.DataFrame:
        """Every allocation with its operator, lifetime and category."""
        return self.windowed(analysis("memory").memory_allocations, step)

    def tensor_flow(self, execution: str | Path | None = None, step: int | None = None) -> pl.DataFrame:
        """Every version of every tensor: who wrote and who read it, its role, how long it was kept.

        ``execution``: torch's execution trace of the rank, or a folder of them with the ranks' names [default: what was
        recorded beside each rank's trace]. Without one only memory events speak, and readers are null.
        """
        nodes = self._executions(execution)
        frames: list[pl.DataFrame] = [
            analysis("dataflow")
            .tensor_flow(nodes.get(rank), table, self.window(rank, step))
            .select(_rank(rank), pl.all())
            for rank, table in self.tables.items()
        ]
        return pl.concat(frames, how="vertical_relaxed")

    def flow_findings(self, execution: str | Path | None = None, **limits: Any) -> pl.DataFrame:
        """Copies made for nothing, tensors kept after their last read, recomputation candidates; the most bytes first."""
        nodes = self._executions(execution)
        frames: list[pl.DataFrame] = [
            analysis("flow_findings").flow_findings(nodes.get(rank), table, **limits).select(_rank(rank), pl.all())
            for rank, table in self.tables.items()
        ]
        found: pl.DataFrame = pl.concat(frames, how="vertical_relaxed")
        return found.sort("bytes", descending=True, maintain_order=True)

    def why_no_flow(self, execution: str | Path | None = None) -> str | None:
        """What is missing to know the flow of every rank; None when nothing is."""
        nodes = self._executions(execution)
        why = [analysis("dataflow").why_empty(nodes.get(rank), table) for rank, table in self.tables.items()]
        return next((one for one in why if one), None)

    def _executions(self, given: str | Path | None) -> dict[int, Any]:
        """Nodes of the execution traces by rank, each file read once."""
        module = analysis("execution")
        files = module.execution_files({rank: table.meta.source for rank, table in self.tables.items()}, given)
        return {
            rank: self.tables[rank].once(f"execution trace {path}", partial(module.load_execution_trace, path))
            for rank, path in files.items()
        }


def _rank(rank: int) -> pl.Expr:
    return pl.lit(rank, pl.Int64).alias("rank")


def analysis(name: str) -> Any:
    """An analysis, imported when it is first asked for."""
    return importlib.import_module(f"ridgeline.profiling.analyses.{name}")
