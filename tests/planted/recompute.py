"""Planted: every block is computed again in the backward, though there is memory for its activations. ``--reentrant`` uses the
older variant, whose backward calls backward."""

import sys

import torch
from torch.utils.checkpoint import checkpoint


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(256, 256)
        self.drop = torch.nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.linear(x)))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(256, 256)
        self.blocks = torch.nn.ModuleList([Block() for _ in range(6)])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant="--reentrant" in sys.argv)  # the planted line
        return x


def main():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(512, 256)
    while True:
        loss = (model(data) - data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
