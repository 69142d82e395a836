"""The ops that took the time: kernels on an accelerator, or CPU ops by their own time without what they call."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.classify import COMPILED_CALL, TRANSFER
from ridgeline.profiling.intervals import Times, contains, union
from ridgeline.profiling.nesting import trees
from ridgeline.profiling.table import Kind, Mask, TraceTable, distinct, row_numbers

MATMUL = re.compile(
    r"^aten::(mm|addmm|bmm|baddbmm|_scaled_mm|mkldnn_linear|mkldnn_convolution|_convolution|cudnn_convolution|"
    r"_scaled_dot_product_.*|_flash_attention_.*|_efficient_attention_.*)$|^mkldnn::|^mkl::|"
    r"gemm|cutlass|xmma|Cijk_|flash_fwd|flash_bwd|attn_fwd|fmha|winograd|convolve|_mma_|_matmul_",
    re.IGNORECASE,
)
"""Names of ops and kernels that do a model's counted FLOPs."""


@dataclass(frozen=True)
class OpRow:
    """One line of the table. ``share`` is of the time of the steps it was counted in."""

    name: str
    kind: str
    count: int
    self_ns: int
    share: float


def self_times(start: Times, end: Times, thread: NDArray[np.int32]) -> Times:
    """Each event's duration without its direct children on the same thread. ``[rows]`` ns, never negative.

    Rows must be in the table's order (start, longer first). Nesting depth is the number of earlier events of
    the thread still open; a child's parent is the latest event one level up. For properly nested events the
    self times of a thread sum to the length of their union.
    """
    own: Times = np.maximum(end - start, 0)
    timed = end > start  # an empty event has no time of its own and no children
    for one in distinct(thread):
        for rows, depth in trees(start, end, row_numbers(timed & (thread == one))):
            for level in range(1, int(depth.max()) + 1):
                children, above = rows[depth == level], rows[depth == level - 1]
                parents = above[np.searchsorted(above, children) - 1]
                inside = np.clip(np.minimum(end[children], end[parents]) - start[children], 0, None)
                np.subtract.at(own, parents, inside)
    np.maximum(own, 0, out=own)
    return own


@dataclass(frozen=True)
class OpTimes:
    """The ops that start inside the steps, each with its own time. Arrays are ``[ops]``."""

    table: TraceTable
    rows: NDArray[np.intp]
    own: Times
    span_ns: int

    def top(self, limit: int = 15) -> list[OpRow]:
        """The largest by self time, grouped by name."""
        return _rank(self, limit)

    def matmul_ns(self) -> int:
        """Self time of matrix multiplications, convolutions and fused attention."""
        return int(self.own[self.table.named(MATMUL.search)[self.rows]].sum())


def op_times(table: TraceTable, threads: list[int], low: Times, high: Times) -> OpTimes:
    """The ops that start inside the windows ``[low[i], high[i])``: kernels, or without a device timeline CPU ops."""
    windows = union(low, high)
    inside = contains(windows, table.start)
    if table.has_device_timeline:
        rows = np.flatnonzero(table.device_rows & inside)
        own = table.end[rows] - table.start[rows]
    else:
        rows = np.flatnonzero(_host_ops(table, threads) & inside)
        own = self_times(table.start[rows], table.end[rows], table.thread[rows])
    return OpTimes(table, rows, own, int((windows.end - windows.start).sum()))


def _host_ops(table: TraceTable, threads: list[int]) -> Mask:
    """CPU ops and compiled calls of the host's threads, and the transfers of a CPU backend's worker threads."""
    here = table.on_threads(threads)
    calls = table.is_kind(Kind.ANNOTATION) & table.named(COMPILED_CALL.match)
    moves = table.is_kind(Kind.ANNOTATION, Kind.CPU_OP) & table.named(TRANSFER.match)
    return (here & (table.is_kind(Kind.CPU_OP) | calls)) | moves


def _rank(times: OpTimes, limit: int) -> list[OpRow]:
    table, rows = times.table, times.rows
    codes, first, inverse, counts = np.unique(
        table.name[rows], return_index=True, return_inverse=True, return_counts=True
    )
    sums = np.zeros(codes.size, np.int64)
    np.add.at(sums, inverse, times.own)
    kinds = [Kind(int(code)).name.lower() for code in table.kind[rows[first]]]
    order = np.argsort(-sums, kind="stable")[:limit]
    return [
        OpRow(
            table.names[codes[at]], kinds[at], int(counts[at]), int(sums[at]), float(sums[at] / max(times.span_ns, 1))
        )
        for at in order.tolist()
    ]
