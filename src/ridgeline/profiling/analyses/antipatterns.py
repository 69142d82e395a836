"""Habits that cost time and have a known cure, found by what the trace shows of them.

=============================== ==========================================================================
finding                         shown by
=============================== ==========================================================================
item in the loop                ``aten::item`` that waits for the device (on a CPU trace: any, outside the optimizer)
host-device copy                copies between host and device that make the host wait
synchronisation                 other runtime calls that wait for the device
for-loop indexing               one tensor selected or sliced at many successive places, call by call
fp32 matmul without TF32        single-precision products on plain cores of a GPU that has TF32
single-tensor optimizer         many small operators and no foreach or fused one in ``Optimizer.step``
synchronous loader              ``enumerate(DataLoader)`` that loads in the driving process
gradients not set to None       zeroing kernels or operators in ``Optimizer.zero_grad``
bias before batch norm          a convolution or linear layer with a bias, then batch norm, which removes it
shapes not multiples of 8       16-bit matrix products whose contiguous dims are not (tensor cores need 16 bytes)
=============================== ==========================================================================

A wait inside an item or a copy counts there and nowhere else. Costs of different findings may overlap otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from ridgeline.profiling.analyses import hostpatterns, matrixpatterns
from ridgeline.profiling.analyses.patterns import Case, Found, Window
from ridgeline.profiling.table import Kind, TraceTable

COLUMNS = {
    "finding": "text: one of the table above",
    "count": "times it was seen in the capture (or window)",
    "cost_ns": "ns: time it took in the capture; on the host or the device, as 'cost' says",
    "cost": "text: what cost_ns is a sum of",
    "where": "text: file(line): function of the user's code with stacks loaded, else the operators around it",
    "start_ns": "ns: start of the first sighting there",
    "end_ns": "ns: end of the last sighting there",
    "knob": "text: what to change",
}
_SCHEMA = {name: pl.Int64 if name in ("count", "cost_ns", "start_ns", "end_ns") else pl.String for name in COLUMNS}


@dataclass(frozen=True)
class Pattern:
    """A finding's detector with the words that go with it."""

    name: str
    find: Callable[[Case], Found]
    cost: str
    knob: str


PATTERNS = (
    Pattern(
        "item in the loop",
        hostpatterns.items,
        "host time in aten::item",
        "keep the value on the device: log it every N steps, or after the loop",
    ),
    Pattern(
        "host-device copy",
        hostpatterns.copies,
        "host time in the waiting copy",
        "copy from pinned memory with non_blocking=True, or leave the tensor on the device",
    ),
    Pattern(
        "synchronisation",
        hostpatterns.synchronisations,
        "host time waiting",
        "drop the synchronize; avoid operators whose result size depends on the data (nonzero, masks)",
    ),
    Pattern(
        "for-loop indexing",
        hostpatterns.loop_indexing,
        "host time in the indexing operators",
        "one batched operation instead of a Python loop over a dim (unbind, stack, vectorised indexing)",
    ),
    Pattern(
        "fp32 matmul without TF32",
        matrixpatterns.without_tf32,
        "device time of the kernels",
        "torch.set_float32_matmul_precision('high'), or bf16 autocast",
    ),
    Pattern(
        "single-tensor optimizer",
        hostpatterns.single_tensor_optimizer,
        "host time in Optimizer.step",
        "foreach=True or fused=True in the optimizer",
    ),
    Pattern(
        "synchronous loader",
        hostpatterns.synchronous_loader,
        "host time waiting for a batch",
        "num_workers > 0 with persistent_workers=True and pin_memory=True",
    ),
    Pattern(
        "gradients not set to None",
        hostpatterns.zeroed_gradients,
        "device time of the zeroing, on a CPU trace the operators' time",
        "optimizer.zero_grad(set_to_none=True)",
    ),
    Pattern(
        "bias before batch norm",
        matrixpatterns.bias_before_norm,
        "time of the bias additions that run by themselves; 0 where they are part of the product",
        "bias=False in the layer before the batch norm",
    ),
    Pattern(
        "shapes not multiples of 8",
        matrixpatterns.unaligned_shapes,
        "device time of these products: an upper bound of the gain",
        "pad the dims (vocabulary, hidden size) to multiples of 8",
    ),
)


def anti_patterns(table: TraceTable, window: Window = None) -> pl.DataFrame:
    """Findings by place, the most costly first."""
    case, rows = Case.of(table, window), []
    for pattern in PATTERNS:
        rows += _grouped(case, pattern, pattern.find(case))
    frame = pl.DataFrame(rows, schema=_SCHEMA, orient="row")
    return frame.sort("cost_ns", "finding", "where", descending=[True, False, False])


def why_empty(table: TraceTable) -> str | None:
    """What the trace lacks that some patterns need, or None."""
    ops = np.flatnonzero(table.is_kind(Kind.CPU_OP))
    if not ops.size:
        return "the trace has no operators of the host"
    missing = []
    if not any(b'"Input Dims"' in bytes(table.args[row]) for row in ops.tolist()):
        missing.append("shapes (record_shapes=True): loop indexing, bias and shape patterns cannot be seen")
    if not table.has_device_timeline:
        missing.append("a device timeline: TF32 and shape patterns, copies and synchronisation cannot be seen")
    return f"the trace has no {'; no '.join(missing)}" if missing else None


def _grouped(case: Case, pattern: Pattern, found: Found) -> list[tuple[str, int, int, str, str, int, int, str]]:
    """One row per place where the pattern was seen."""
    table, rows = case.table, found.rows
    out: dict[str, list[int]] = {}
    places = case.places.of_rows(rows)
    for where, row, cost in zip(places, rows.tolist(), found.cost.tolist(), strict=True):
        start, end = int(table.start[row]), int(table.end[row])
        one = out.setdefault(where, [0, 0, start, end])
        one[0], one[1], one[2], one[3] = one[0] + 1, one[1] + cost, min(one[2], start), max(one[3], end)
    return [
        (pattern.name, count, cost, pattern.cost, where, start, end, pattern.knob)
        for where, (count, cost, start, end) in out.items()
    ]
