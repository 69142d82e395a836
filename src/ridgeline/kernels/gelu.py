"""GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): ``x * P(normal <= x)``, exact or by the tanh formula.

The idea: elementwise, one read and one write; it should be the epilogue of the GEMM before it. GPT-2 and GPT-J
were trained with the tanh formula, which differs from the exact one by up to 5e-4: they are not interchangeable.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """Elementwise on any shape; ``tanh`` chooses the approximation."""
    return F.gelu(x, approximate="tanh" if tanh else "none")


def reference(x: Tensor, tanh: bool) -> Tensor:
    """The definitions, in ``x``'s own precision."""
    if tanh:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def flops(rows: int, width: int) -> int:
    """Forward, counted as eight operations per element (the tanh formula)."""
    return 8 * rows * width


def bytes_moved(rows: int, width: int, itemsize: int = 2) -> int:
    """Forward: read and write each element once."""
    return 2 * rows * width * itemsize
