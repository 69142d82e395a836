"""The patterns. On a GPU the replacements call the kernels room; on a CPU only those are applied that pay there."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.compiler.backend import operators  # noqa: F401  (registers what replacements call)
from ridgeline.compiler.backend.attention import attention, decode_attention
from ridgeline.compiler.backend.match import always, of, pattern
from ridgeline.compiler.backend.terms import Term
from ridgeline.compiler.internals.graphs import known
from ridgeline.kernels import layer_norm as layer_norms
from ridgeline.kernels import rms_norm as rms_norms
from ridgeline.kernels import rope as ropes
from ridgeline.kernels import swiglu as swiglus

MAX_INT8_ROWS = 8
MIN_LOGITS = 2**30  # elements: it saves memory, not time (on a CPU it takes a third longer than Inductor's loss)


def _weight_is_last_dim(x: Term, weight: Term, **more: Any) -> str | None:
    sides = [weight, *(t for t in (more.get("bias"),) if t is not None)]
    if any(len(side.shape) != 1 or not known(side.shape[0] == x.shape[-1]) for side in sides):
        return "the weight is no vector over the last dim"
    return "x and the weight differ in dtype" if any(side.dtype != x.dtype for side in sides) else None


@pattern(lambda dtype: (of(dtype, 2, 8), of(dtype, 8), 1.5e-6), _weight_is_last_dim, cuda=always)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm. With a residual, ``x`` is the sum, which may be used elsewhere."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@rms_norm.spelling
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    high = x.float()
    return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@rms_norm.spelling
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    high = x.float()
    return (weight.float() * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


@rms_norm.replacement
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norms.rms_norm(x, weight, eps)


@pattern(lambda dtype: (of(dtype, 2, 8), of(dtype, 8), of(dtype, 8), 1.5e-6), _weight_is_last_dim, cuda=always)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm with the biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


@layer_norm.spelling
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    high = x.float()
    centred = high - high.mean(-1, keepdim=True)
    return weight * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) + bias


@layer_norm.replacement
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norms.layer_norm(x, weight, bias, eps)


def _same_width(x: Term, cos: Term, sin: Term, half: float = 1, **_: Any) -> str | None:
    if cos.shape != sin.shape or not known(cos.shape[-1] == x.shape[-1]):
        return "cos and sin do not cover the last dim"
    return None


@pattern(lambda dtype: (of(dtype, 2, 3, 2, 8), of(dtype, 2, 3, 1, 8), of(dtype, 2, 3, 1, 8)), _same_width, cuda=always)
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions by ``rotate_half``, tables as wide as the heads."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@rope.replacement
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, -1), sin.chunk(2, -1)
    return torch.cat((first * cos_first - second * sin_first, second * cos_second + first * sin_second), -1)


def _half_width(x: Term, cos: Term, sin: Term) -> str | None:
    if cos.shape != sin.shape or not known(2 * cos.shape[-1] == x.shape[-1]):
        return "cos and sin do not cover half of the last dim"
    return None


@pattern(lambda dtype: (of(dtype, 2, 3, 2, 8), of(dtype, 2, 3, 1, 4), of(dtype, 2, 3, 1, 4)), _half_width, cuda=always)
def rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on halves, tables half as wide as the heads."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@rope_half.replacement
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ropes.rotate(x, cos, sin)


def _same_shape(gate: Term | None = None, up: Term | None = None, **_: Any) -> str | None:
    if gate is None or up is None:
        return None
    alike = gate.shape is not None and up.shape is not None and known(len(gate.shape) == len(up.shape))
    alike = alike and all(known(a == b) for a, b in zip(gate.shape, up.shape, strict=True))
    return None if alike and gate.dtype == up.dtype else "gate and up differ in shape or dtype"


@pattern(lambda dtype: (of(dtype, 2, 8), of(dtype, 2, 8), of(dtype, 2, 16)), _same_shape, cuda=always)
def swiglu(gate: Tensor, up: Tensor, both: Tensor) -> Tensor:
    """``silu(gate) * up``, of two tensors or the halves of one."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


@swiglu.spelling
def _(gate: Tensor, up: Tensor, both: Tensor) -> Tensor:
    return F.silu(gate) * up


@swiglu.replacement
def _(gate: Tensor, up: Tensor, both: Tensor | None) -> Tensor:
    return swiglus.swiglu(both) if both is not None else F.silu(gate) * up


@pattern(lambda dtype: (of(dtype, 2, 8), of(dtype, 2, 8)), _same_shape, cuda=always)
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up``."""
    return F.gelu(gate) * up


@geglu.replacement
def _(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


@pattern(lambda dtype: (of(dtype, 2, 8), of(dtype, 2, 8)), _same_shape, cuda=always)
def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` by the tanh formula."""
    return F.gelu(gate, approximate="tanh") * up


@geglu_tanh.replacement
def _(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _many_logits(x: Term, weight: Term, target: Term, bias: Term | None = None) -> str | None:
    rows, vocab = target.shape[0], weight.shape[0]
    if isinstance(rows, int) and isinstance(vocab, int) and rows * vocab >= MIN_LOGITS:
        return None
    return "the logits are not that large, or vary with the batch: keeping them is faster"


def _head(x: Term, weight: Term, target: Term, bias: Term | None = None) -> str | None:
    if len(weight.shape) != 2 or target.dtype != torch.int64 or x.dtype != weight.dtype:
        return "the head is no matrix in the dtype of the hidden states, or targets are no indices"
    return None


@pattern(
    lambda dtype: (of(dtype, 3, 8), of(dtype, 5, 8), torch.zeros(3, dtype=torch.int64), of(dtype, 5)),
    _head,
    cuda=_many_logits,
)
def linear_cross_entropy(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    """The head and its loss, without keeping the logits."""
    return F.cross_entropy(F.linear(x, weight).float(), target)


@linear_cross_entropy.spelling
def _(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


@linear_cross_entropy.spelling
def _(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


@linear_cross_entropy.replacement
def _(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    loss: Tensor = torch.ops.ridgeline.linear_cross_entropy(x, weight, target, bias, training)[0]
    return loss


@linear_cross_entropy.preparation
def _(bound: dict[str, Any]) -> dict[str, Any]:
    """Without gradients, none are made."""
    return {**bound, "training": torch.is_grad_enabled()}


def _rows_and_targets(x: Term, target: Term) -> str | None:
    return None if len(x.shape) == 2 and target.dtype == torch.int64 else "logits are no matrix"


@pattern(lambda dtype: (of(dtype, 3, 8), torch.zeros(3, dtype=torch.int64)), _rows_and_targets, cuda=always)
def cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-probability of the targets."""
    return -x.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1).mean()


@cross_entropy.spelling
def _(x: Tensor, target: Tensor) -> Tensor:
    return -x.log_softmax(-1).gather(1, target.unsqueeze(1)).mean()


@cross_entropy.spelling
def _(x: Tensor, target: Tensor) -> Tensor:
    return (torch.logsumexp(x, -1) - x.gather(1, target.unsqueeze(1)).squeeze(1)).mean()


@cross_entropy.spelling
def _(x: Tensor, target: Tensor) -> Tensor:
    return (-x.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)).mean()


@cross_entropy.spelling
def _(x: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(x.log_softmax(-1), target)


@cross_entropy.replacement
def _(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target)


def _int8_shapes(x: Term, weight: Term, scale: Term | None = None, column: Term | None = None) -> str | None:
    factors = scale or column
    assert factors is not None
    if torch.is_grad_enabled():
        return "training: the int8 product has no gradient"
    if weight.dtype != torch.int8 or len(weight.shape) != 2 or not known(prod(factors.shape) == weight.shape[0]):
        return "no int8 matrix with a scale for each row"
    return "the scale has another dtype" if factors.dtype != x.dtype else None


def _few_bf16_rows(x: Term, weight: Term, **_: Term) -> str | None:
    few = x.shape is not None and all(isinstance(size, int) for size in x.shape) and prod(x.shape[:-1]) <= MAX_INT8_ROWS
    return None if few and x.dtype == torch.bfloat16 else "torch's int8 product pays for few rows in bf16 only"


@pattern(
    lambda dtype: (of(dtype, 3, 8), torch.ones(5, 8, dtype=torch.int8), of(dtype, 5), of(dtype, 5, 1)),
    _int8_shapes,
    cpu=_few_bf16_rows,
)
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, column: Tensor) -> Tensor:
    """A linear with an int8 weight and a scale for each row of it."""
    return F.linear(x, weight.to(x.dtype)) * scale


@int8_linear.spelling
def _(x: Tensor, weight: Tensor, scale: Tensor, column: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * scale.unsqueeze(1))


@int8_linear.spelling
def _(x: Tensor, weight: Tensor, scale: Tensor, column: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype) * column)


@int8_linear.replacement
def _(x: Tensor, weight: Tensor, scale: Tensor | None, column: Tensor) -> Tensor:
    rows, factors = x.reshape(-1, x.shape[-1]), column.flatten() if scale is None else scale
    out: Tensor = torch.ops.aten._weight_int8pack_mm(rows, weight, factors).reshape(*x.shape[:-1], weight.shape[0])
    return out


PATTERNS = (
    linear_cross_entropy,
    cross_entropy,
    attention,
    decode_attention,
    int8_linear,
    rms_norm,
    layer_norm,
    rope,
    rope_half,
    swiglu,
    geglu,
    geglu_tanh,
)
