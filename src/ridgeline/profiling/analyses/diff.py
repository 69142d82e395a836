"""Two captures side by side: what differs in how they were made, then where the time went.

Configuration comes first, for a difference of times between two devices, worlds or versions explains itself::

    1. configuration   device A100 / V100, world 8 / 2, torch 2.11 / 2.13, steps 2 / 2
    2. operators       aten::mm       200 calls, 4.1 ms per step  ->  200 calls, 2.6 ms     -1.5 ms
       kernels, modules, collectives  in the same form

Two vendors' kernels share no names; their operators do, so ``by="operator"`` also adds up the device time that each
operator launched. A side is one rank's table or a list of them: figures are then of all of them together, and
``per_step_ns`` is per step and rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ridgeline.errors import UserError, nearest
from ridgeline.profiling import classify
from ridgeline.profiling.analyses.collectives import collectives
from ridgeline.profiling.intervals import Intervals, contains, union
from ridgeline.profiling.nesting import launching_operator, nest
from ridgeline.profiling.ops import self_times
from ridgeline.profiling.table import Kind, Mask, TraceTable

COLUMNS = {
    "configuration": {
        "key": "what differs: device, world, version, steps, ...",
        "a": "value of side A as text; null when it does not say",
        "b": "value of side B",
    },
    "diff": {
        "name": "the operator, kernel, module, or collective",
        "only": "A or B when the other side lacks it; null when both have it",
        "count_a": "events on side A, of all its ranks",
        "count_b": "the same of side B",
        "total_ns_a": "ns: sum of their durations, of all ranks; of operators and modules on the host, inclusive",
        "total_ns_b": "the same of side B",
        "mean_ns_a": "ns: total / count, rounded down; null without any",
        "mean_ns_b": "the same of side B",
        "own_ns_a": "ns: their durations without their children (operators and modules); others: the total",
        "own_ns_b": "the same of side B",
        "device_ns_a": "ns: device work launched while it was the innermost; of kernels and collectives the total",
        "device_ns_b": "the same of side B",
        "per_step_ns_a": "ns: what is compared (see measure) per step and rank; null unless both sides have steps",
        "per_step_ns_b": "the same of side B",
        "delta_ns": "ns: what is compared, B - A: per step and rank when both have steps, else of the whole capture",
        "measure": "what is compared: device when both sides have a device timeline, else own",
        "per": "step and rank, or capture",
    },
}
BY = ("operator", "kernel", "module", "collective")
Side = TraceTable | Sequence[TraceTable]
_SUMS = ("count", "total_ns", "own_ns", "device_ns")
_DIFF_SCHEMA: dict[str, Any] = {
    name: pl.String if name in ("name", "only", "measure", "per") else pl.Int64 for name in COLUMNS["diff"]
}
_CONFIGURATION_SCHEMA = {"key": pl.String, "a": pl.String, "b": pl.String}


def diff(a: Side, b: Side, by: str = "operator", per_step: bool | None = None) -> pl.DataFrame:
    """What changed from ``a`` to ``b``, largest change first. Columns: ``COLUMNS``.

    Args:
        a: one rank's table, or several of one job.
        b: the other capture.
        by: one of ``BY``. Modules need tables loaded with stacks; the frame is empty without.
        per_step: compare per step and rank, counting only what starts inside (device work: is launched inside) the
            profiler's steps; None: when both sides have steps.

    Raises:
        UserError: an unknown ``by``, ``per_step`` asked for and a side has no steps, or a side without any table.
    """
    if by not in BY:
        raise UserError(f"diff by '{by}': not something to compare by{nearest(by, BY)}")
    left, right = _side(a), _side(b)
    steps = [sum(_steps(table) for table in side) for side in (left, right)]
    whole = all(_steps(table) for table in (*left, *right))
    if per_step and not whole:
        raise UserError("diff per step: a trace has no ProfilerStep; compare whole captures instead")
    stepped = whole if per_step is None else per_step
    device = all(table.has_device_timeline for table in (*left, *right))
    sums = [_sums(side, by, stepped) for side in (left, right)]
    return _compare(sums[0], sums[1], steps if stepped else None, "device" if device else "own")


def configuration_diff(
    a: Side,
    b: Side,
    properties: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None,
    only_differences: bool = True,
) -> pl.DataFrame:
    """How the two captures were made, one row per key. Columns: ``COLUMNS``. An empty frame: nothing differs.

    ``properties``: what the files say at their top (see ``describe``), of each side.
    """
    extra = properties or ({}, {})
    one, other = (_configuration(_side(side), more) for side, more in zip((a, b), extra, strict=True))
    keys = list(dict.fromkeys((*one, *other)))
    rows = [(key, one.get(key), other.get(key)) for key in keys]
    kept = [row for row in rows if not only_differences or row[1] != row[2]]
    return pl.DataFrame(kept, schema=_CONFIGURATION_SCHEMA, orient="row")


def _side(side: Side) -> list[TraceTable]:
    tables = [side] if isinstance(side, TraceTable) else list(side)
    if not tables:
        raise UserError("diff: a side holds no trace")
    return tables


def _steps(table: TraceTable) -> int:
    return int(classify.step_rows(table).size)


def _configuration(tables: list[TraceTable], properties: Mapping[str, Any]) -> dict[str, str | None]:
    """Keys and values as text; of several ranks the distinct values. The order of the keys is that of the report."""
    metas = [table.meta for table in tables]
    found: dict[str, Any] = {}
    for key, value in flatten(properties).items():
        found[key] = value
    found["world"] = _distinct(meta.world for meta in metas)
    found["backend"] = _distinct(meta.backend for meta in metas)
    found["host"] = _distinct(meta.host for meta in metas)
    found["ranks"] = ", ".join(str(meta.rank) for meta in metas if meta.rank is not None) or None
    found["traces"] = len(tables)
    found["steps"] = _distinct(_steps(table) for table in tables)
    found["timeline"] = _distinct("device" if table.has_device_timeline else "host only" for table in tables)
    for key in sorted({key for meta in metas for key in meta.ridgeline}):
        found[f"ridgeline.{key}"] = _distinct(meta.ridgeline.get(key) for meta in metas)
    return {key: None if value is None else str(value) for key, value in found.items()}


def _distinct(values: Any) -> str | None:
    texts = list(dict.fromkeys(str(one) for one in values if one is not None))
    return ", ".join(texts) or None


def flatten(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The top of a trace file in words: devices by name and number, then versions and switches, one key each."""
    out: dict[str, Any] = {}
    devices = properties.get("deviceProperties")
    if isinstance(devices, list) and devices:
        names = [str(one.get("name")) for one in devices if isinstance(one, dict)]
        out["device"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    for key, value in sorted(properties.items()):
        if key not in _NO_CONFIGURATION and isinstance(value, (str, int, float, bool)):
            out[key] = value
    return out


_NO_CONFIGURATION = ("traceName", "trace_id", "baseTimeNanoseconds", "displayTimeUnit", "host_name", "ridgeline")


def _sums(side: list[TraceTable], by: str, stepped: bool) -> pl.DataFrame:
    """name, count, total, own and device time over all ranks of a side."""
    how = {"operator": _operators, "kernel": _kernels, "module": _modules, "collective": _collectives}[by]
    frames = [how(table, _window(table) if stepped else None) for table in side]
    return pl.concat(frames).group_by("name").agg(pl.col(one).sum() for one in _SUMS)


def _window(table: TraceTable) -> Intervals:
    rows = classify.step_rows(table)
    return union(table.start[rows], table.end[rows])


def _inside(table: TraceTable, window: Intervals | None, moments: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.ones(moments.size, np.bool_) if window is None else contains(window, moments)


@dataclass(frozen=True)
class _Events:
    """Rows to add up by name: ``own`` and ``device`` are ns of each. Arrays are ``[rows]``."""

    names: NDArray[np.int32]
    total: NDArray[np.int64]
    own: NDArray[np.int64]
    device: NDArray[np.int64]
    counted: NDArray[np.int64]

    def frame(self, table: TraceTable) -> pl.DataFrame:
        """One row per name."""
        codes, inverse = np.unique(self.names, return_inverse=True)
        columns: dict[str, Any] = {"name": [table.names[code] for code in codes.tolist()]}
        for name, values in zip(_SUMS, (self.counted, self.total, self.own, self.device), strict=True):
            sums = np.zeros(codes.size, np.int64)
            np.add.at(sums, inverse.reshape(-1), values)
            columns[name] = sums
        return pl.DataFrame(columns, schema={"name": pl.String, **dict.fromkeys(_SUMS, pl.Int64)})


def _operators(table: TraceTable, window: Intervals | None) -> pl.DataFrame:
    """Operators and ranges of the host, without the profiler's steps."""
    steps = table.named(classify.STEP.match)
    return _nested(table, table.is_kind(Kind.CPU_OP, Kind.ANNOTATION) & ~steps, window)


def _modules(table: TraceTable, window: Intervals | None) -> pl.DataFrame:
    """``nn.Module`` frames of tables with Python stacks."""
    frames = table.is_kind(Kind.PYTHON) & table.named(lambda name: name.startswith("nn.Module: "))
    return _nested(table, frames, window)


def _nested(table: TraceTable, chosen: Mask, window: Intervals | None) -> pl.DataFrame:
    """Chosen host events with their own time and the device time launched while each was the innermost."""
    rows = np.flatnonzero(chosen)
    own = self_times(table.start[rows], table.end[rows], table.thread[rows])
    device = np.zeros(len(table), np.int64)
    if table.has_device_timeline and rows.size:
        above = launching_operator(nest(table, chosen), classify.launches(table))
        ran = np.flatnonzero(table.device_rows & (above >= 0))
        np.add.at(device, above[ran], np.maximum(table.duration[ran], 0))
    keep = _inside(table, window, table.start[rows])
    rows, own = rows[keep], own[keep]
    total = np.maximum(table.duration[rows], 0)
    return _Events(table.name[rows], total, own, device[rows], np.ones(rows.size, np.int64)).frame(table)


def _kernels(table: TraceTable, window: Intervals | None) -> pl.DataFrame:
    """Device events; those of a step are the ones launched in it, or without a launch those that start in it."""
    rows = np.flatnonzero(table.device_rows)
    launched = classify.launches(table)[rows]
    moments = np.where(launched >= 0, table.start[launched], table.start[rows]) if rows.size else table.start[rows]
    rows = rows[_inside(table, window, moments)]
    spent = np.maximum(table.duration[rows], 0)
    return _Events(table.name[rows], spent, spent, spent, np.ones(rows.size, np.int64)).frame(table)


def _collectives(table: TraceTable, window: Intervals | None) -> pl.DataFrame:
    """Collectives by the name of their call, from arrival to end."""
    found = collectives(table)
    moments = found["call_ns"].fill_null(found["arrival_ns"]).to_numpy()
    found = found.filter(pl.Series(_inside(table, window, moments), dtype=pl.Boolean))
    spent = (pl.col("end_ns") - pl.col("arrival_ns")).sum()
    grouped = found.group_by("name").agg(
        pl.len().cast(pl.Int64).alias("count"), *(spent.alias(one) for one in _SUMS[1:])
    )
    return grouped.select("name", *_SUMS)


def _compare(a: pl.DataFrame, b: pl.DataFrame, steps: list[int] | None, measure: str) -> pl.DataFrame:
    """The frame of ``diff`` from the sums of both sides; ``steps`` are steps times ranks of each, or None."""
    joined = a.join(b, on="name", how="full", coalesce=True, suffix="_b").rename({one: f"{one}_a" for one in _SUMS})
    joined = joined.with_columns(
        pl.when(pl.col("count_b").is_null())
        .then(pl.lit("A"))
        .when(pl.col("count_a").is_null())
        .then(pl.lit("B"))
        .alias("only")
    ).with_columns(pl.col(f"{one}_{side}").fill_null(0) for one in _SUMS for side in "ab")
    means = [
        pl.when(pl.col(f"count_{side}") > 0)
        .then(pl.col(f"total_ns_{side}") // pl.col(f"count_{side}"))
        .alias(f"mean_ns_{side}")
        for side in "ab"
    ]
    compared = [pl.col(f"{measure}_ns_{side}") for side in "ab"]
    per_step = [
        (value // steps[at] if steps else pl.lit(None, pl.Int64)).alias(f"per_step_ns_{'ab'[at]}")
        for at, value in enumerate(compared)
    ]
    out = joined.with_columns(*means, *per_step, pl.lit(measure).alias("measure"))
    values = [pl.col("per_step_ns_a"), pl.col("per_step_ns_b")] if steps else compared
    out = out.with_columns(
        (values[1] - values[0]).alias("delta_ns"), pl.lit("step and rank" if steps else "capture").alias("per")
    )
    return (
        out.select(*_DIFF_SCHEMA)
        .cast(pl.Schema(_DIFF_SCHEMA))
        .sort(pl.col("delta_ns").abs(), "name", descending=[True, False])
    )
