"""A step counter on the module: compiled for each of its values."""

import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        return self.linear(x) / self.steps


model = torch.compile(Model(), backend="aot_eager")
for _ in range(5):
    model(torch.randn(4, 8)).sum().backward()
