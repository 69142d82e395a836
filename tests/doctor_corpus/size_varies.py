"""Batches of several sizes, the static way: compiled for each."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def total(x):
    return (x * 2).sum()


for size in (4, 5, 6, 7):
    total(torch.randn(size, 8, requires_grad=True)).backward()
