"""A first batch of one, which is taken for a constant."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def total(x):
    return (x * 2).sum()


for size in (1, 5, 6):
    total(torch.randn(size, 8, requires_grad=True)).backward()
