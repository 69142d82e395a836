"""Ten modes, named by text: after eight the function runs in eager."""

import torch

torch.manual_seed(0)


@torch.compile(backend="eager")
def named(x, mode):
    return x * len(mode)


for at in range(12):
    named(torch.randn(4), "m" * (at % 11 + 1))
