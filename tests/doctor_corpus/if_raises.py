"""A check that raises: no rewrite keeps it, and the reason is named."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def checked(x):
    if torch.isnan(x).any():
        raise ValueError("not a number")
    return x * 2


for _ in range(4):
    checked(torch.randn(8))
