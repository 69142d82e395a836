"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467): scale each row to unit root mean square.

The idea: LayerNorm without the mean and the shift. Two passes over the row are needed (sum of squares, then
scale), but the row fits in cache, so the cost is one read and one write of memory: the operation is bound by
bandwidth, and worth fusing with its neighbours. The sum of squares is taken in fp32 whatever the input is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim. ``x`` ``[..., dim]``, ``weight`` ``[dim]`` -> ``[..., dim]`` in ``x``'s dtype."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in ``x``'s own precision: ``x / sqrt(mean(x^2) + eps) * weight``."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def flops(rows: int, dim: int) -> int:
    """Forward: square, add, two multiplications per element; root and division per row."""
    return rows * (4 * dim + 3)


def bytes_moved(rows: int, dim: int, itemsize: int = 2) -> int:
    """Forward: read and write each element once, read the weight once."""
    return (2 * rows * dim + dim) * itemsize
