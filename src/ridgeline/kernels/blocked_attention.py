"""Causal attention for CPUs without matrix units: blocks of queries, batched GEMMs.

The idea: torch's fused CPU kernel reaches its speed through AMX tiles; without them it runs at the rate of plain
vector code, several times below what a bf16 batched GEMM gets. So cut the queries into blocks of 128 rows, give
each block only the keys it may see (62.5 % of the square at four blocks), and let the GEMM library do the work.
As in FlashAttention (Dao et al. 2022, arXiv:2205.14135) the forward pass keeps the output and the log-sum-exp of each row,
and the backward pass makes the probabilities again from them. It makes them transposed, as keys times queries: a compiler
that saw the forward's very product would keep those fp32 scores instead (Inductor does), and memory would be quadratic.
Scores pass through the input's precision between the two GEMMs, as in the unfused formula; softmax and sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK_ROWS = 128


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """``q`` ``[batch, seq, heads, head_dim]``, ``k`` and ``v`` ``[batch, seq, kv_heads, head_dim]`` -> as ``q``.

    The same function as `attention.attention`; it pays from a few hundred positions on.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _BlockedAttention.apply
    return apply(q, k, v, window)[0]


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        rows, keys, values = _grouped(q, k.shape[2]), _keys(k), _keys(v)
        outs, sums = [], []
        for first, last in _blocks(q.shape[1]):
            low = _lowest(first, window)
            scores = _scores(rows[:, :, first:last], keys[:, low:last], first, low, window)
            peak = scores.amax(-1, keepdim=True)
            weights = (scores - peak).exp()
            total = weights.sum(-1, keepdim=True)
            mixed = _times((weights / total).to(v.dtype), values[:, low:last])
            outs.append(mixed)
            sums.append(peak + total.log())
        out = _ungrouped(torch.cat(outs, 2), q.shape)
        lse = torch.cat(sums, 2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.window = window
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        groups = k.shape[2]
        rows, keys, values = _grouped(q, groups), _keys(k), _keys(v)
        d_rows = _grouped(grads[0], groups)
        delta = (d_rows.float() * _grouped(out, groups).float()).sum(-1, keepdim=True)
        d_q, scale = [], q.shape[-1] ** -0.5
        d_k, d_v = torch.zeros_like(keys, dtype=torch.float32), torch.zeros_like(values, dtype=torch.float32)
        for first, last in _blocks(q.shape[1]):
            low = _lowest(first, ctx.window)
            block, d_block = _flat(rows[:, :, first:last]), _flat(d_rows[:, :, first:last])
            weights = (
                _scores_by_key(rows[:, :, first:last], keys[:, low:last], first, low, ctx.window)
                - _flat(lse[:, :, first:last]).transpose(1, 2)
            ).exp()
            d_weights = torch.bmm(values[:, low:last], d_block.transpose(1, 2)).float()
            d_scores = (weights * (d_weights - _flat(delta[:, :, first:last]).transpose(1, 2)) * scale).to(q.dtype)
            d_v[:, low:last] += torch.bmm(weights.to(v.dtype), d_block)
            d_k[:, low:last] += torch.bmm(d_scores, block)
            d_q.append(torch.bmm(d_scores.transpose(1, 2), keys[:, low:last]).reshape(rows[:, :, first:last].shape))
        return _ungrouped(torch.cat(d_q, 2), q.shape), _from_keys(d_k, k), _from_keys(d_v, v), None


def _blocks(seq: int) -> list[tuple[int, int]]:
    return [(first, min(first + BLOCK_ROWS, seq)) for first in range(0, seq, BLOCK_ROWS)]


def _lowest(first: int, window: int | None) -> int:
    """The first key that any row of a block starting at ``first`` can see."""
    return 0 if window is None else max(0, first - window + 1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """``[batch, seq, heads, d]`` -> ``[batch * kv_heads, heads per group, seq, d]``."""
    batch, seq, heads, dim = x.shape
    x = x.reshape(batch, seq, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * groups, heads // groups, seq, dim)


def _ungrouped(x: Tensor, shape: torch.Size) -> Tensor:
    batch, seq, heads, dim = shape
    return x.reshape(batch, heads, seq, dim).transpose(1, 2)


def _keys(x: Tensor) -> Tensor:
    """``[batch, seq, kv_heads, d]`` -> ``[batch * kv_heads, seq, d]``."""
    batch, seq, heads, dim = x.shape
    return x.transpose(1, 2).reshape(batch * heads, seq, dim)


def _from_keys(x: Tensor, like: Tensor) -> Tensor:
    batch, seq, heads, dim = like.shape
    return x.to(like.dtype).reshape(batch, heads, seq, dim).transpose(1, 2)


def _flat(x: Tensor) -> Tensor:
    """``[n, group, rows, d]`` -> ``[n, group * rows, d]``: the group's rows share one GEMM."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


def _times(a: Tensor, b: Tensor) -> Tensor:
    """``[n, group, rows, x] @ [n, x, y]``."""
    return torch.bmm(_flat(a), b).reshape(*a.shape[:3], b.shape[2])


def _scores(block: Tensor, keys: Tensor, first: int, low: int, window: int | None) -> Tensor:
    """Masked, scaled scores of a block of rows in fp32: ``[n, group, rows, keys]``."""
    scores: Tensor = _times(block, keys.transpose(-1, -2)).float() * block.shape[-1] ** -0.5
    row = torch.arange(first, first + block.shape[2], device=keys.device)[:, None]
    column = torch.arange(low, low + keys.shape[1], device=keys.device)[None]
    return scores.masked_fill(_hidden(row, column, window), float("-inf"))


def _scores_by_key(block: Tensor, keys: Tensor, first: int, low: int, window: int | None) -> Tensor:
    """The transpose, as a product of its own: ``[n, keys, group * rows]``."""
    group, rows = block.shape[1:3]
    scores: Tensor = torch.bmm(keys, _flat(block).transpose(1, 2)).float() * block.shape[-1] ** -0.5
    row = torch.arange(first, first + rows, device=keys.device).repeat(group)[None]
    column = torch.arange(low, low + keys.shape[1], device=keys.device)[:, None]
    return scores.masked_fill(_hidden(row, column, window), float("-inf"))


def _hidden(row: Tensor, column: Tensor, window: int | None) -> Tensor:
    hidden = column > row
    return hidden if window is None else hidden | (row - column >= window)
