"""`.item()` as a factor: a break that a setting or a rewrite removes."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def scaled(x):
    peak = x.abs().max().item()
    return x / peak


for _ in range(4):
    scaled(torch.randn(8, requires_grad=True)).sum().backward()
