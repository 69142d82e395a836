"""A print in a module's forward: the setting."""

import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        h = self.linear(x)
        print("forward")
        return torch.relu(h)


model = torch.compile(Model(), backend="aot_eager")
for _ in range(4):
    model(torch.randn(4, 8)).sum().backward()
