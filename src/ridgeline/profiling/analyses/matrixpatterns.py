"""Anti-patterns of matrix work: precision, shapes, and a bias that the next layer removes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.profiling.analyses.opcall import OpArguments
from ridgeline.profiling.analyses.patterns import Case, Found
from ridgeline.profiling.table import Kind

# cuBLAS and CUTLASS name single-precision products on plain cores "sgemm" (SIMT); tensor cores have other names.
_PLAIN_FP32 = re.compile(r"sgemm|simt_s|_s_simt", re.IGNORECASE)
_TENSOR_CORE = re.compile(r"tf32|tensorop|s1688|s16816|bf16|f16_s", re.IGNORECASE)
# Only a GPU with TF32 (Ampere or newer) runs kernels built for it: the evidence that the knob exists here.
_HAS_TF32 = re.compile(
    r"ampere_|sm8\d|sm9\d|sm_?1[02]\d|hopper|cutlass_[89]\d|cutlass3x|(?<![a-z])nvjet", re.IGNORECASE
)

_LAYER = re.compile(r"aten::(conv(1d|2d|3d|_transpose[123]d)|convolution|linear|addmm)$")
_NORM = re.compile(r"aten::(batch_norm|_batch_norm_impl_index|native_batch_norm|cudnn_batch_norm)$")
_COUNTER = re.compile(r"aten::add_$")  # BatchNorm counts its batches just before it normalises
_ADDITION = re.compile(r"aten::(add|add_)$")
_PRODUCT = re.compile(r"aten::(mm|addmm|bmm|baddbmm)$")
_SIXTEEN_BIT = ("c10::BFloat16", "c10::Half")
ALIGNMENT = 8


def without_tf32(case: Case) -> Found:
    """Single-precision products on plain cores, by the operator that launched them, on GPUs that have TF32."""
    table = case.table
    if not any(_HAS_TF32.search(name) for name in table.names):
        return Found.none()
    plain = table.named(lambda name: _PLAIN_FP32.search(name) and not _TENSOR_CORE.search(name))
    kernels = np.flatnonzero(table.is_kind(Kind.KERNEL) & plain)
    operator = case.operator[kernels]
    inside = (operator >= 0) & case.inside[operator]
    rows, inverse = np.unique(operator[inside], return_inverse=True)
    cost = np.zeros(rows.size, np.int64)
    np.add.at(cost, inverse.reshape(-1), case.length(kernels[inside]))
    return Found(rows, cost)


def bias_before_norm(case: Case) -> Found:
    """Layers with a bias whose next sibling is a batch norm over as many channels."""
    table = case.table
    ops = np.flatnonzero(table.is_kind(Kind.CPU_OP))
    ops = ops[np.lexsort((ops, case.ops.parent[ops], table.thread[ops]))]
    counting = table.named(_COUNTER.match)[ops] & ~_followed_by(case, ops, _LAYER)
    ops = ops[~counting | ~_scalar(case, ops, counting)]
    layer, norm = table.named(_LAYER.match)[ops[:-1]], table.named(_NORM.match)[ops[1:]]
    siblings = (case.ops.parent[ops[:-1]] == case.ops.parent[ops[1:]]) & (
        table.thread[ops[:-1]] == table.thread[ops[1:]]
    )
    at = np.flatnonzero(layer & norm & siblings & case.inside[ops[:-1]])
    first, second = ops[:-1][at], ops[1:][at]
    pairs = zip(first.tolist(), table.decode(first, OpArguments), table.decode(second, OpArguments), strict=True)
    rows = np.array([row for row, layer_of, norm_of in pairs if _bias_is_lost(table.names[table.name[row]], layer_of, norm_of)], np.intp)  # fmt: skip
    return Found(rows, _addition_time(case, rows))


def _followed_by(case: Case, ops: NDArray[np.intp], name: re.Pattern[str]) -> NDArray[np.bool_]:
    """Whether the next row has this name. ``[ops]``"""
    named = case.table.named(name.match)[ops]
    return np.append(named[1:], False)


def _scalar(case: Case, ops: NDArray[np.intp], asked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of the asked rows, those whose first argument is one integer (the batch counter). ``[ops]``"""
    out = np.zeros(ops.size, np.bool_)
    at = np.flatnonzero(asked)
    for place, found in zip(at.tolist(), case.table.decode(ops[at], OpArguments), strict=True):
        out[place] = bool(found and found.dims and found.dims[0] == [] and found.types[:1] in (["long int"], ["long"]))
    return out


def _bias_is_lost(name: str, layer: OpArguments | None, norm: OpArguments | None) -> bool:
    """Whether the layer has a bias of as many elements as the norm has channels."""
    try:
        if layer is None or norm is None:
            return False
        bias = layer.dims[0] if name.endswith("addmm") else layer.dims[2]
        channels = norm.dims[0][1]
        return bool(bias == [channels])
    except (IndexError, TypeError):
        return False


def _addition_time(case: Case, rows: NDArray[np.intp]) -> NDArray[np.int64]:
    """Time of the additions that the layers launch by themselves: kernels, on a CPU trace operators. ``[rows]``"""
    table = case.table
    layers = np.zeros(len(table), np.bool_)
    layers[rows] = True
    adding = np.flatnonzero(table.is_kind(Kind.CPU_OP) & table.named(_ADDITION.match))
    owner = case.topmost(adding, layers)
    adding, owner = adding[owner >= 0], owner[owner >= 0]
    taken = (
        case.device_time(adding, np.ones(len(table), np.bool_)) if table.has_device_timeline else case.length(adding)
    )
    cost = np.zeros(rows.size, np.int64)
    order = np.argsort(rows, kind="stable")
    if rows.size:
        np.add.at(cost, order[np.searchsorted(rows[order], owner)], taken)
    return cost


def unaligned_shapes(case: Case) -> Found:
    """16-bit products on a device with a contiguous dim that is no multiple of 8."""
    table = case.table
    if not table.has_device_timeline:
        return Found.none()
    rows = case.rows(table.is_kind(Kind.CPU_OP) & table.named(_PRODUCT.match))
    bad = [
        row
        for row, found in zip(rows.tolist(), table.decode(rows, OpArguments), strict=True)
        if _is_unaligned(table.names[table.name[row]], found)
    ]
    rows = np.array(bad, np.intp)
    cost = case.device_time(rows, table.is_kind(Kind.KERNEL)) if rows.size else np.zeros(0, np.int64)
    return Found(rows[cost > 0], cost[cost > 0])


def _is_unaligned(name: str, found: OpArguments | None) -> bool:
    """Whether an operand's contiguous dim, or the output's last, is no multiple of 8. A dim of 1 is a vector's."""
    first = 1 if "add" in name else 0
    try:
        if found is None or found.types[first] not in _SIXTEEN_BIT:
            return False
        a, b = found.dims[first], found.dims[first + 1]
        strides: Any = found.strides[first : first + 2] if len(found.strides) > first + 1 else [None, None]
        dims = [_contiguous(a, strides[0]), _contiguous(b, strides[1]), b[-1]]
        return any(isinstance(dim, int) and dim > 1 and dim % ALIGNMENT for dim in dims)
    except (IndexError, TypeError):
        return False


def _contiguous(shape: list[int], strides: list[int] | None) -> int:
    """Size of the dim whose elements lie side by side; the last when strides were not recorded."""
    if not strides or len(strides) != len(shape):
        return shape[-1]
    return next((size for size, stride in zip(shape[::-1], strides[::-1], strict=True) if stride == 1), shape[-1])
