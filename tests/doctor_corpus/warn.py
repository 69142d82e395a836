"""A warning at each call: the setting."""

import warnings

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def step(x):
    h = x * 2
    warnings.warn("old", stacklevel=1)
    return h + 1


for _ in range(4):
    step(torch.randn(8))
