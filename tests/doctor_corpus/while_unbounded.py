"""A loop without a bound: refused, how often it turns is not known."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def settle(x):
    while x.norm() > 1:
        x = x * 0.5
    return x


for _ in range(3):
    settle(4 * torch.ones(4))
