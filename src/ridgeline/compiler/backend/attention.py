"""Attention patterns: spelled out by hand, and one query for each row of a cache."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from ridgeline.compiler.backend.match import always, of, pattern
from ridgeline.compiler.backend.terms import Term
from ridgeline.compiler.internals.graphs import known

MAX_GROUP = 8  # query heads to a key head, each an expression of its own


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
        *(of(dtype, 2, 2, n, 8) for n in (5, 7, 7)),
        0.731,
        of(dtype, 5, 7),
        torch.ones(5, 7, dtype=torch.bool),
        -7.7e31,
    ),
    _plain_heads,
    cuda=always,
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
        *(of(dtype, 2, 2, n, 8) for n in (1, 7, 7)),
        of(dtype, 2, 1, 1, 7),
        torch.ones(2, 1, 1, 7, dtype=torch.bool),
        0.731,
    ),
    _one_query,
    cpu=always,
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
