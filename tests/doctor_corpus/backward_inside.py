"""`backward()` within the compiled function."""

import torch

torch.manual_seed(0)

weight = torch.randn(8, requires_grad=True)


@torch.compile(backend="aot_eager")
def step(x):
    loss = (x * weight).square().mean()
    loss.backward()
    return loss


for _ in range(3):
    step(torch.randn(8))
