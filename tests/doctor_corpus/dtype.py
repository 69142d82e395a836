"""Inputs of two dtypes."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def double(x):
    return x * 2


for _ in range(2):
    double(torch.randn(4))
    double(torch.randn(4).double())
