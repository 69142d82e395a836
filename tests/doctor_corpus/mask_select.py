"""`x[x > 0]`: the size depends on the data."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def positive(x):
    chosen = x[x > 0]
    return chosen.square().sum() + x.sum()


for _ in range(4):
    positive(torch.randn(32, requires_grad=True)).backward()
