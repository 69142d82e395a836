"""A counter in a global: dynamic by its source."""

import torch

torch.manual_seed(0)

calls = 0


@torch.compile(backend="aot_eager")
def step(x):
    global calls
    calls += 1
    return x * calls


for _ in range(5):
    step(torch.randn(8))
