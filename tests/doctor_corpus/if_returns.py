"""Two returns, chosen by a tensor."""

import torch

torch.manual_seed(0)


@torch.compile(backend="aot_eager")
def either(x):
    if x.sum() > 0:
        return torch.relu(x)
    return -x


for sign in (1.0, -1.0, 1.0, -1.0):
    either(sign * torch.rand(8)).sum()
