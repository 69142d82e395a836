"""Causal attention with grouped key/value heads and an optional sliding window.

The idea: softmax(q k^T / sqrt(head_dim)) v without ever holding the ``[seq, seq]`` scores (Dao et al. 2022,
arXiv:2205.14135): torch's fused kernels walk the keys in tiles and keep a running maximum and sum. Grouped-query
attention (Ainslie et al. 2023, arXiv:2305.13245) shares each key/value head among ``heads / kv_heads`` queries.
A window of ``w`` lets position ``i`` see ``i - w + 1 .. i``.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ridgeline.hardware.inventory import cpu_inventory
from ridgeline.kernels.blocked_attention import blocked_attention

# Between these lengths the blocked form wins, once compiled, on a CPU without matrix units (AVX512-BF16, 2 cores, 512
# positions, forward + backward: half the time of the fused kernel; run eagerly it is slower than that). Above them the
# lead shrinks to a tenth and compiling the written-out blocks takes a minute and more.
BLOCKED_SEQ = (256, 1024)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, blocked: bool = False) -> Tensor:
    """Causal self-attention over one sequence from its start.

    ``q`` ``[batch, seq, heads, head_dim]``, ``k`` and ``v`` ``[batch, seq, kv_heads, head_dim]`` -> as ``q``.
    ``blocked`` allows the blocked form where it wins (see `blocked_pays`): compiled, on a CPU, at the lengths of
    `BLOCKED_SEQ`.
    """
    seq, grouped = q.shape[1], q.shape[2] != k.shape[2]
    if blocked and torch.compiler.is_compiling() and q.device.type == "cpu" and BLOCKED_SEQ[0] <= seq <= BLOCKED_SEQ[1]:
        return blocked_attention(q, k, v, window)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if window is None or seq <= window else causal_mask(seq, window, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


@functools.cache
def blocked_pays() -> bool:
    """Whether this CPU lacks AMX tiles, which torch's fused kernel is built for."""
    return not (cpu_inventory()["features"] or {}).get("amx_tile")


def causal_mask(seq: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean ``[seq, seq]``, true where the query (row) may see the key (column)."""
    index = torch.arange(seq, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def reference(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The definition, in the inputs' own precision, with the scores written out."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~causal_mask(q.shape[1], window, q.device), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def pairs(seq: int, window: int | None = None) -> int:
    """Query-key pairs a causal row set of ``seq`` visits: ``seq (seq + 1) / 2``, fewer under a window."""
    full = seq * (seq + 1) // 2
    beyond = max(0, seq - window) if window is not None else 0
    return full - beyond * (beyond + 1) // 2


def flops(batch: int, seq: int, heads: int, head_dim: int, window: int | None = None) -> int:
    """Forward: two GEMMs over the visited pairs, 4 head_dim per pair and head (softmax not counted)."""
    return 4 * batch * heads * head_dim * pairs(seq, window)


def bytes_moved(batch: int, seq: int, heads: int, kv_heads: int, head_dim: int, itemsize: int = 2) -> int:
    """Forward with perfect reuse: read q, k, v once, write the output once."""
    return batch * seq * (2 * heads + 2 * kv_heads) * head_dim * itemsize
