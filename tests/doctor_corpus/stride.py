"""A transposed input: another layout, another graph."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def double(x):
    return x * 2


x = torch.randn(4, 6)
for _ in range(2):
    double(x)
    double(torch.randn(6, 4).t())
