"""`.item()` kept on the module for a log: only the setting helps."""

import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.last = 0.0

    def forward(self, x):
        h = self.linear(x)
        self.last = h.mean().item()
        return torch.relu(h)


model = torch.compile(Model(), backend="aot_eager")
for _ in range(4):
    model(torch.randn(4, 8)).sum().backward()
