"""`torch.autograd.grad` within the compiled function."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def step(x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(x.square().sum(), x)
    return slope + 1


for _ in range(3):
    step(torch.randn(8))
