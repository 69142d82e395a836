"""The patterns. On a GPU the replacements call the kernels room; on a CPU only those are applied that pay there."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.compiler.backend import operators  # noqa: F401  (registers what replacements call)
from ridgeline.compiler.backend.match import pattern
from ridgeline.compiler.backend.terms import Term
from ridgeline.compiler.internals.graphs import known
from ridgeline.kernels import layer_norm as layer_norms
from ridgeline.kernels import rms_norm as rms_norms
from ridgeline.kernels import rope as ropes
from ridgeline.kernels import swiglu as swiglus

MAX_GROUP = 8  # query heads to a key head, each an expression of its own
MAX_INT8_ROWS = 8
MIN_LOGITS = 2**30  # elements: it saves memory, not time (on a CPU it takes a third longer than Inductor's loss)


def _always(**_: Any) -> None:
    return None


def _weight_is_last_dim(x: Term, weight: Term, **more: Any) -> str | None:
    sides = [weight, *(t for t in (more.get("bias"),) if t is not None)]
    if any(len(side.shape) != 1 or not known(side.shape[0] == x.shape[-1]) for side in sides):
        return "the weight is no vector over the last dim"
    return "x and the weight differ in dtype" if any(side.dtype != x.dtype for side in sides) else None


@pattern(lambda dtype: (_of(dtype, 2, 8), _of(dtype, 8), 1.5e-6), _weight_is_last_dim, cuda=_always)
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


@pattern(lambda dtype: (_of(dtype, 2, 8), _of(dtype, 8), _of(dtype, 8), 1.5e-6), _weight_is_last_dim, cuda=_always)
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


@pattern(
    lambda dtype: (_of(dtype, 2, 3, 2, 8), _of(dtype, 2, 3, 1, 8), _of(dtype, 2, 3, 1, 8)), _same_width, cuda=_always
)
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


@pattern(
    lambda dtype: (_of(dtype, 2, 3, 2, 8), _of(dtype, 2, 3, 1, 4), _of(dtype, 2, 3, 1, 4)), _half_width, cuda=_always
)
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


@pattern(lambda dtype: (_of(dtype, 2, 8), _of(dtype, 2, 8), _of(dtype, 2, 16)), _same_shape, cuda=_always)
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


@pattern(lambda dtype: (_of(dtype, 2, 8), _of(dtype, 2, 8)), _same_shape, cuda=_always)
def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up``."""
    return F.gelu(gate) * up


@geglu.replacement
def _(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


@pattern(lambda dtype: (_of(dtype, 2, 8), _of(dtype, 2, 8)), _same_shape, cuda=_always)
def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` by the tanh formula."""
    return F.gelu(gate, approximate="tanh") * up


@geglu_tanh.replacement
def _(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _plain_heads(
    q: Term, k: Term, v: Term, bias: Term | None = None, mask: Term | None = None, fill: float = -torch.inf, **_: Any
) -> str | None:
    if any(t.shape is None or len(t.shape) != 4 or t.dtype != q.dtype for t in (q, k, v)):
        return "queries, keys and values are not all [batch, heads, positions, dim] of one dtype"
    if not all(known(a == b) for t in (k, v) for a, b in zip(q.shape[:2], t.shape[:2], strict=True)):
        return "batch or heads are broadcast"
    if not _masks(q, bias, mask):
        return "the mask has another dtype"
    return None if fill <= -1e30 else f"masked scores are {fill:g}, which still get weight"


@pattern(
    lambda dtype: (
        *(_of(dtype, 2, 2, n, 8) for n in (5, 7, 7)),
        0.731,
        _of(dtype, 5, 7),
        torch.ones(5, 7, dtype=torch.bool),
        -7.7e31,
    ),
    _plain_heads,
    cuda=_always,
)
def attention(q, k, v, scale, bias, mask, fill):  # type: ignore[no-untyped-def]
    """Scaled dot-product attention spelled out, with an additive or a boolean mask, softmax in any precision."""
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def _attention(scaled: bool, masked: str, high: bool):  # type: ignore[no-untyped-def]
    def search(q, k, v, scale, bias, mask, fill):  # type: ignore[no-untyped-def]
        scores = q @ k.transpose(-1, -2)
        scores = scores * scale if scaled else scores
        if masked == "add":
            scores = scores + bias
        if masked == "fill":
            scores = scores.masked_fill(mask, fill)
        return scores.softmax(-1, dtype=torch.float32 if high else None).to(v.dtype) @ v

    return search


for _scaled, _masked, _high in product((True, False), ("", "add", "fill"), (False, True)):
    attention.spelling(_attention(_scaled, _masked, _high))


@attention.replacement
def _(q, k, v, scale, bias, mask, fill, grouped):  # type: ignore[no-untyped-def]
    if mask is not None:
        bias = ~mask if fill == -torch.inf else torch.where(mask, fill, 0.0).to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, bias, scale=1.0 if scale is None else scale, enable_gqa=bool(grouped)
    )


@attention.preparation
def _(bound: dict[str, Any]) -> dict[str, Any]:
    """Repeated key and value heads are what grouped-query attention is."""
    k, v = bound["k"], bound["v"]
    if k.op == v.op == "repeat_heads" and k.args[1:] == v.args[1:] and k.args[2] == 1:
        return {**bound, "k": k.args[0], "v": v.args[0], "grouped": True}
    return bound


def _one_query(q: Term, k: Term, v: Term, bias: Term | None = None, mask: Term | None = None, **_: Any) -> str | None:
    if torch.is_grad_enabled() or not known(q.shape[2] == 1):
        return "training, or more than one query for each row of the cache"
    more = [t for t in (bias, mask) if t is not None]
    if any(len(t.shape) != 4 or not known(t.shape[1] == 1) or not known(t.shape[2] == 1) for t in more):
        return "the mask differs between heads"
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int) or q.shape[1] // k.shape[1] > MAX_GROUP:
        return "the number of heads varies, or too many share a key"
    return None if q.dtype == k.dtype == v.dtype and _masks(q, bias, mask) else "unequal dtypes"


def _masks(q: Term, bias: Term | None, mask: Term | None) -> bool:
    """Whether an additive mask is of the queries' dtype and a boolean one boolean."""
    return (bias is None or bias.dtype == q.dtype) and (mask is None or mask.dtype == torch.bool)


@pattern(
    lambda dtype: (
        *(_of(dtype, 2, 2, n, 8) for n in (1, 7, 7)),
        _of(dtype, 2, 1, 1, 7),
        torch.ones(2, 1, 1, 7, dtype=torch.bool),
        0.731,
    ),
    _one_query,
    cpu=_always,
)
def decode_attention(q, k, v, bias, mask, scale):  # type: ignore[no-untyped-def]
    """A query for each row of a cache. The fused kernel is made for many; written out, a key is read once for its group."""
    return F.scaled_dot_product_attention(q, k, v)


def _fused(masked: str, scaled: bool, grouped: bool):  # type: ignore[no-untyped-def]
    def search(q, k, v, bias, mask, scale):  # type: ignore[no-untyped-def]
        chosen = {"": None, "add": bias, "bool": mask}[masked]
        factor = scale if scaled else None
        return F.scaled_dot_product_attention(q, k, v, chosen, scale=factor, enable_gqa=grouped)

    return search


for _masked, _scaled, _grouped in product(("", "add", "bool"), (False, True), (False, True)):
    decode_attention.spelling(_fused(_masked, _scaled, _grouped))


@decode_attention.replacement
def _(q, k, v, bias, mask, scale):  # type: ignore[no-untyped-def]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weights = []
    for one in q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]).unbind(2):
        scores = (one[:, :, None].float() * k.float()).sum(-1) * factor
        scores = scores if bias is None else scores + bias[:, :, 0]
        scores = scores if mask is None else scores.masked_fill(~mask[:, :, 0], -torch.inf)
        weights.append((scores - scores.amax(-1, keepdim=True)).exp())
    out = [(one[..., None] * v.float()).sum(2) / one.sum(-1, keepdim=True) for one in weights]
    return torch.stack(out, 2).to(q.dtype).reshape(*q.shape[:3], v.shape[-1])


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
    lambda dtype: (_of(dtype, 3, 8), _of(dtype, 5, 8), torch.zeros(3, dtype=torch.int64), _of(dtype, 5)),
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


@pattern(lambda dtype: (_of(dtype, 3, 8), torch.zeros(3, dtype=torch.int64)), _rows_and_targets, cuda=_always)
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
    lambda dtype: (_of(dtype, 3, 8), torch.ones(5, 8, dtype=torch.int8), _of(dtype, 5), _of(dtype, 5, 1)),
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


def _of(dtype: torch.dtype, *shape: int) -> Tensor:
    """An example; its values do not matter."""
    return torch.ones(shape, dtype=dtype, requires_grad=True)


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
