"""A branch that changes its tensor in place: refused, the caller could see it."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def clipped(x):
    if x.abs().max() > 1:
        x *= 0.5
    return x + 1


for _ in range(4):
    clipped(torch.randn(8))
