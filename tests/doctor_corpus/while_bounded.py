"""A loop that a tensor ends, with a bound: all turns under torch.cond."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def settle(x):
    error = x.norm()
    i = 0
    while i < 3 and error > 1:
        x = x * 0.5
        error = x.norm()
        i += 1
    return x


for size in (4.0, 0.1, 4.0, 0.1):
    settle((size * torch.ones(4)).requires_grad_()).sum().backward()
