"""A break in a callee splits the caller too."""

import torch

torch.manual_seed(0)


def inner(x):
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


@torch.compile(backend="aot_eager")
def outer(x):
    return inner(x * 2) + 1


for _ in range(4):
    outer(torch.randn(8))
