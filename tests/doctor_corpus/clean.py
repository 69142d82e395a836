"""Nothing to fix."""

import torch

torch.manual_seed(0)

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
compiled = torch.compile(model, backend="aot_eager")
for _ in range(4):
    compiled(torch.randn(4, 8)).sum().backward()
