"""`tolist()` of floats: a break that nothing from outside removes."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def first(x):
    numbers = x.relu().tolist()
    return x * numbers[0]


for _ in range(4):
    first(torch.randn(8))
