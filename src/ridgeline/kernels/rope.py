"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): rotate pairs of a head's dims by position.

The idea: pair ``i`` turns by the angle ``position * inverse_frequency[i]``, so that a query-key product depends
on the distance only. Two conventions of which dims form a pair are in use and are permutations of one another:
*half* (Llama, Qwen: dim ``i`` with ``i + dim/2``) and *interleaved* (GPT-J: ``2i`` with ``2i + 1``). Only the
first ``2 * len(cos)`` dims turn (partial rotary); the rest pass. One read and one write of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate heads. ``x`` ``[batch, seq, heads, head_dim]``, ``cos``/``sin`` ``[batch or 1, seq, 1, rope_dim / 2]``."""
    half = cos.shape[-1]
    turned = x[..., : 2 * half]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    else:
        first, second = turned[..., :half], turned[..., half:]
        out = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return out if 2 * half == x.shape[-1] else torch.cat((out, x[..., 2 * half :]), -1)


def cos_sin(positions: Tensor, inverse_frequencies: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles in fp32, tables in ``dtype``. ``positions`` ``[batch, seq]`` -> two of ``[batch, seq, 1, rope_dim / 2]``.

    ``factor`` multiplies both (YaRN's attention factor; 1 otherwise).
    """
    angles = positions[..., None, None].float() * inverse_frequencies
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def reference(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, interleaved: bool = False) -> Tensor:
    """The same rotation as multiplication of complex numbers, in ``x``'s own precision (full rotary only)."""
    turn = torch.polar(torch.ones_like(angle := positions[..., None, None] * inverse_frequencies), angle)
    if interleaved:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def flops(tokens: int, heads: int, rope_dim: int) -> int:
    """Forward: four multiplications and two additions per pair."""
    return tokens * heads * 3 * rope_dim


def bytes_moved(tokens: int, heads: int, head_dim: int, rope_dim: int, itemsize: int = 2) -> int:
    """Forward: read and write each element once, read the tables once per token."""
    return tokens * (2 * heads * head_dim + rope_dim) * itemsize
