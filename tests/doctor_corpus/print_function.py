"""A print of a tensor in a compiled function: moved to a wrapper."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def step(x):
    h = torch.tanh(x)
    print("mean", h.mean())
    return h * 2


for _ in range(4):
    step(torch.randn(8, requires_grad=True)).sum().backward()
