"""Training and evaluation through one function: a graph for each mode."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def double(x):
    return x * 2


x = torch.randn(8, requires_grad=True)
for _ in range(2):
    double(x).sum().backward()
    with torch.no_grad():
        double(x)
