"""`if tensor:` with a logarithm on one side: torch.cond."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def guarded(x):
    if x.min() > 0:
        y = torch.log(x)
    else:
        y = x * 0.1
    return y


for shift in (0.5, -0.5, 0.5, -0.5):
    guarded((torch.rand(8) + shift).requires_grad_()).sum().backward()
