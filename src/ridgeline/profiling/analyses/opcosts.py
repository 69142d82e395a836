"""FLOPs and bytes of one operator call, from the shapes and types the profiler wrote beside it.

A multiply-add counts as two FLOPs. Bytes are what a perfect kernel must move: every input read once, every output
written once (a dim of stride 0 holds nothing new). Formulas of the matrix classes are those of
``torch.utils.flop_counter``, except that causal attention counts the pairs that are not masked, and a grouped
convolution's weight gradient counts its groups.

=============== ====================================================================================
class           operators
=============== ====================================================================================
matmul          mm, addmm, bmm, baddbmm, mv, linear, scaled and integer mm, convolution, fused attention,
                forward and backward; counted on the outermost of nested calls, which then owns their time
memory          elementwise, copies, reductions, norms, softmax, embedding, gather; counted where the work is
=============== ====================================================================================

``None`` means that the call cannot be counted: no shapes, no type, an argument the formula needs is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from ridgeline.profiling.analyses.opcall import Call, Cost, OpArguments, Shape

__all__ = ["Cost", "OpArguments", "cost", "has_formula", "is_matmul"]

_Formula = Callable[[Call], Cost]


def _matrix(first: int) -> _Formula:
    """``[.., m, k] x [.., k, n]`` whose operands stand at ``first`` and ``first + 1``; before them an addend."""

    def formula(call: Call) -> Cost:
        a, b = call.shape(first), call.shape(first + 1)
        if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2]:
            raise ValueError("operands do not fit")
        out = prod(a[:-1]) * b[-1]
        moved = call.bytes_of(*range(first + 2)) + out * call.size_of(first)
        return call.made(2 * out * a[-1], moved, first)

    return formula


def _vector(call: Call) -> Cost:
    """``[m, k] x [k]``."""
    a = call.shape(0)
    return call.made(2 * prod(a), call.bytes_of(0, 1) + a[0] * call.size_of(0))


def _linear(call: Call) -> Cost:
    """``[.., k] x [n, k]`` and an optional bias."""
    x, weight = call.shape(0), call.shape(1)
    if not x or len(weight) != 2 or x[-1] != weight[1]:
        raise ValueError("operands do not fit")
    out = prod(x[:-1]) * weight[0]
    return call.made(2 * out * x[-1], call.bytes_of(0, 1, 2) + out * call.size_of(0))


def _spatial(x: Shape, weight: Shape, geometry: tuple[Any, Any, Any], transposed: bool, extra: Shape) -> Shape:
    """Output sizes of a convolution without batch and channels. Source: the formulas of torch.nn.ConvNd."""
    count = len(x) - 2
    stride, padding, dilation = (list(one) * (count if len(one) == 1 else 1) for one in geometry)
    extra = list(extra or [0]) * (count if len(extra or [0]) == 1 else 1)
    out = []
    for at in range(count):
        reach = dilation[at] * (weight[2 + at] - 1)
        if transposed:
            out.append((x[2 + at] - 1) * stride[at] - 2 * padding[at] + reach + extra[at] + 1)
        else:
            out.append((x[2 + at] + 2 * padding[at] - reach - 1) // stride[at] + 1)
    return out


def _convolution(call: Call) -> Cost:
    """aten::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    x, weight = call.shape(0), call.shape(1)
    if len(x) != len(weight) or len(x) < 3:
        raise ValueError("input without a batch")
    transposed = bool(call.value(6))
    groups = call.value(8)
    out = _spatial(x, weight, (call.value(3), call.value(4), call.value(5)), transposed, call.value(7))
    at_each = x[2:] if transposed else out
    channels = weight[1] * groups if transposed else weight[0]
    written = x[0] * channels * prod(out) * call.size_of(0)
    return call.made(2 * x[0] * prod(at_each) * prod(weight), call.bytes_of(0, 1, 2) + written)


def _convolution_backward(call: Call) -> Cost:
    """aten::convolution_backward(grad, input, weight, bias sizes, stride, padding, dilation, transposed,
    output_padding, groups, output_mask): as many FLOPs as forward for each of the two gradients asked for."""
    grad, x, weight = call.shape(0), call.shape(1), call.shape(2)
    transposed, asked = bool(call.value(7)), call.value(10)
    at_each = x[2:] if transposed else grad[2:]
    one = 2 * x[0] * prod(at_each) * prod(weight)
    moved = call.bytes_of(0)
    moved += call.bytes_of(2) + prod(x) * call.size_of(1) if asked[0] else 0
    moved += call.bytes_of(1) + prod(weight) * call.size_of(2) if asked[1] else 0
    return call.made(one * (int(asked[0]) + int(asked[1])), moved)


def _pairs(queries: int, keys: int, causal: bool) -> int:
    """(query, key) pairs that attention computes; torch aligns the causal mask to the first key."""
    if not causal:
        return queries * keys
    full = min(queries, keys)
    return full * (full + 1) // 2 + (queries - full) * keys


def _attention(first: int, causal_at: int, matmuls: int) -> _Formula:
    """Fused attention on ``[batch, heads, seq, dim]``: ``matmuls`` = 2 forward, 5 backward (which recomputes the
    scores). Query, key and value stand from ``first``; ``causal_at`` is the place of ``is_causal``."""

    def formula(call: Call) -> Cost:
        q, k, v = (call.shape(first + at) for at in range(3))
        if len(q) != 4 or len(k) != 4 or q[-1] != k[-1]:
            raise ValueError("not [batch, heads, seq, dim]")
        pairs = q[0] * q[1] * _pairs(q[2], k[2], bool(call.value(causal_at)))
        inner = q[3] + v[3] if matmuls == 2 else 3 * q[3] + 2 * v[3]
        size = call.size_of(first)
        out = q[0] * q[1] * q[2] * v[3] * size
        inputs = call.bytes_of(first, first + 1, first + 2)
        moved = inputs + out if matmuls == 2 else 2 * inputs + 2 * out  # backward: also grad and out, then three grads
        return call.made(2 * pairs * inner, moved, first)

    return formula


def _widest(call: Call, places: Sequence[int]) -> int:
    """Elements of the broadcast of these tensors."""
    shapes = [call.shape(at) for at in places]
    wide = max(len(shape) for shape in shapes)
    aligned = [[1] * (wide - len(shape)) + shape for shape in shapes]
    return prod(0 if 0 in sizes else max(sizes) for sizes in zip(*aligned, strict=True))


def _elementwise(call: Call) -> Cost:
    """One FLOP for each element of the result; every tensor read, the result written."""
    places = call.tensors()
    out, kind = _widest(call, places), max(places, key=call.rank_of)
    return call.made(out, call.bytes_of(*places) + out * call.size_of(kind), kind, matmul=False)


def _comparison(call: Call) -> Cost:
    """Elementwise with a result of one byte."""
    places = call.tensors()
    out = _widest(call, places)
    return call.made(out, call.bytes_of(*places) + out, matmul=False)


def _copy(call: Call) -> Cost:
    """Source read, destination written: ``copy_(self, source)``."""
    written = prod(call.shape(0)) * call.size_of(0)
    return call.made(0, written + call.bytes_of(1), matmul=False)


def _duplicate(call: Call) -> Cost:
    """Read once, written once."""
    return call.made(0, call.bytes_of(0) + prod(call.shape(0)) * call.size_of(0), matmul=False)


def _fill(call: Call) -> Cost:
    """Written only."""
    return call.made(0, prod(call.shape(0)) * call.size_of(0), matmul=False)


def _reduction(call: Call) -> Cost:
    """One FLOP for each element read; what is written is counted only when the dims are known to be given."""
    shape = call.shape(0)
    return call.made(prod(shape), call.bytes_of(0) + _left_over(call, shape) * call.size_of(0), matmul=False)


def _left_over(call: Call, shape: Shape) -> int:
    """Elements of a reduction's result: all dims reduced unless the second argument names some."""
    try:
        dims = call.value(1)
    except (LookupError, ValueError):
        return 1
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    if not isinstance(dims, list) or not dims or not shape:
        return 1
    gone = {one % len(shape) for one in dims}
    return prod(size for at, size in enumerate(shape) if at not in gone)


def _streamed(reads: int, flops: int) -> _Formula:
    """Norms and softmax: ``reads`` tensors of the first one's size read (with small parameters), one written."""

    def formula(call: Call) -> Cost:
        shape = prod(call.shape(0))
        moved = call.bytes_of(*call.tensors()) + shape * call.size_of(0)
        if len([at for at in call.tensors() if prod(call.shape(at)) == shape]) < reads:
            raise ValueError("an operand has no shape")
        return call.made(flops * shape, moved, matmul=False)

    return formula


def _embedding(call: Call) -> Cost:
    """Rows of ``weight [v, d]`` that the indices name are read and written."""
    rows = prod(call.shape(1)) * call.shape(0)[-1] * call.size_of(0)
    return call.made(0, 2 * rows + call.bytes_of(1), matmul=False)


def _embedding_backward(call: Call) -> Cost:
    """Gradient and indices read, the whole table written: ``(grad, indices, number of rows, ..)``."""
    grad = call.shape(0)
    return call.made(prod(grad), call.bytes_of(0, 1) + call.value(2) * grad[-1] * call.size_of(0), matmul=False)


def _gather(call: Call) -> Cost:
    """``gather(self, dim, index)``: as many elements as the index has are read and written."""
    return call.made(0, 2 * prod(call.shape(2)) * call.size_of(0) + call.bytes_of(2), matmul=False)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


def _index_select(call: Call) -> Cost:
    """``index_select(self, dim, index)``: the slices that the index names are read and written."""
    shape = call.shape(0)
    taken = prod(shape) // max(shape[call.value(1)], 1) * prod(call.shape(2))
    return call.made(0, 2 * taken * call.size_of(0) + call.bytes_of(2), matmul=False)


_MATMUL: dict[str, _Formula] = {
    **dict.fromkeys(("mm", "bmm", "_scaled_mm", "_int_mm"), _matrix(0)),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "_addmm_activation"), _matrix(1)),
    "mv": _vector,
    **dict.fromkeys(("linear", "mkldnn_linear"), _linear),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _convolution),
    "convolution_backward": _convolution_backward,
    "scaled_dot_product_attention": _attention(0, 5, 2),
    "_scaled_dot_product_flash_attention": _attention(0, 4, 2),
    "_scaled_dot_product_flash_attention_for_cpu": _attention(0, 4, 2),
    "_scaled_dot_product_efficient_attention": _attention(0, 6, 2),
    "_scaled_dot_product_cudnn_attention": _attention(0, 6, 2),
    "_scaled_dot_product_fused_attention_overrideable": _attention(0, 5, 2),
    "_scaled_dot_product_flash_attention_backward": _attention(1, 11, 5),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention(1, 7, 5),
    "_scaled_dot_product_efficient_attention_backward": _attention(1, 11, 5),
    "_scaled_dot_product_cudnn_attention_backward": _attention(1, 14, 5),
}
_ELEMENTWISE = _words(
    "add sub mul div rsub neg abs sign exp exp2 expm1 log log1p log2 sqrt rsqrt pow square reciprocal sin cos tanh "
    "sigmoid relu leaky_relu gelu silu elu hardtanh hardswish hardsigmoid softplus mish clamp clamp_min clamp_max "
    "maximum minimum where masked_fill lerp addcmul addcdiv threshold floor ceil round trunc remainder fmod erf atan2 "
    "gelu_backward silu_backward sigmoid_backward tanh_backward threshold_backward hardtanh_backward "
    "leaky_relu_backward elu_backward native_dropout_backward _masked_scale bitwise_and bitwise_or bitwise_xor "
    "bitwise_not tril triu"
)
_COMPARE = _words("eq ne lt gt le ge logical_and logical_or logical_not logical_xor isnan isinf isfinite")
_REDUCE = _words(
    "sum mean amax amin max min norm linalg_vector_norm var std argmax argmin any all prod logsumexp var_mean"
)
_MEMORY: dict[str, _Formula] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_COMPARE, _comparison),
    **dict.fromkeys(_REDUCE, _reduction),
    **dict.fromkeys(("copy_", "_copy_from"), _copy),
    **dict.fromkeys(("clone", "contiguous", "_to_copy", "cumsum", "flip", "roll", "native_dropout"), _duplicate),
    **dict.fromkeys(("fill_", "zero_", "normal_", "uniform_", "bernoulli_"), _fill),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), _streamed(1, 5)),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _streamed(2, 4)),
    **dict.fromkeys(
        (
            "native_layer_norm",
            "native_batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
            "native_group_norm",
            "_fused_rms_norm",
            "rms_norm",
            "batch_norm_elemt",
        ),
        _streamed(1, 5),
    ),
    **dict.fromkeys(
        (
            "native_layer_norm_backward",
            "native_batch_norm_backward",
            "cudnn_batch_norm_backward",
            "miopen_batch_norm_backward",
            "native_group_norm_backward",
            "_fused_rms_norm_backward",
        ),
        _streamed(2, 8),
    ),
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "gather": _gather,
    "index_select": _index_select,
}
_NAME = re.compile(r"aten::(\w+)$")


def is_matmul(name: str) -> bool:
    """Whether this operator's name is of the matrix class."""
    found = _NAME.match(name)
    return bool(found) and found[1] in _MATMUL  # type: ignore[index]


def has_formula(name: str) -> bool:
    """Whether calls of this operator can be counted when their shapes are recorded."""
    return _formula(name) is not None


def cost(name: str, arguments: OpArguments | None) -> Cost | None:
    """FLOPs and bytes of a call of ``name``, or None when they cannot be known from what was recorded."""
    formula = _formula(name)
    if formula is None or arguments is None or not arguments.dims:
        return None
    try:
        return formula(Call(arguments))
    except (LookupError, ValueError, TypeError, ArithmeticError):
        return None


def _formula(name: str) -> _Formula | None:
    found = _NAME.match(name)
    if not found:
        return None
    bare = found[1]
    known = _MATMUL.get(bare) or _MEMORY.get(bare)
    return known or (_MEMORY.get(bare[:-1]) if bare.endswith("_") and bare[:-1] in _IN_PLACE else None)


_IN_PLACE = frozenset((*_ELEMENTWISE, *_COMPARE))
