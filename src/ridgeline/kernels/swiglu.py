"""SwiGLU (Shazeer 2020, arXiv:2002.05202): ``silu(gate) * up``, both halves of one fused projection.

The idea: the gate and up projections read the same input, so they are one matrix of twice the height and one
GEMM; this operation reads its two halves and writes one. Bound by bandwidth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate_up`` ``[..., 2 * width]``, gate first -> ``[..., width]``."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def reference(gate_up: Tensor) -> Tensor:
    """The definition, in the input's own precision."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def flops(rows: int, width: int) -> int:
    """Forward: exponential, addition, division, multiplication per output."""
    return 4 * rows * width


def bytes_moved(rows: int, width: int, itemsize: int = 2) -> int:
    """Forward: read two halves, write one."""
    return 3 * rows * width * itemsize
