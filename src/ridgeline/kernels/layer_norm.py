"""LayerNorm (Ba et al. 2016, arXiv:1607.06450): zero mean and unit variance per row, then scale and shift.

The idea: like RMSNorm it is one read and one write of memory; mean and variance are accumulated in fp32 in one
pass. GPT-2 and GPT-J use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dim. ``x`` ``[..., dim]``, ``weight`` and ``bias`` ``[dim]`` -> ``[..., dim]``."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, in ``x``'s own precision, with the biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight
    return scaled if bias is None else scaled + bias


def flops(rows: int, dim: int) -> int:
    """Forward: sum, subtraction, square, sum, scale, weight and shift per element; a root and divisions per row."""
    return rows * (7 * dim + 4)


def bytes_moved(rows: int, dim: int, itemsize: int = 2) -> int:
    """Forward: read and write each element once, read weight and bias once."""
    return (2 * rows * dim + 2 * dim) * itemsize
