"""A model with a lock cannot be copied: its state is."""

import threading

import torch

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.lock = threading.Lock()

    def forward(self, x):
        h = self.linear(x)
        return h * h.detach().max().item()


model = torch.compile(Model(), backend="aot_eager")
for _ in range(4):
    model(torch.randn(4, 8)).sum().backward()
