"""Planted: a model of very many tiny operators, each of which costs its dispatch."""

import torch


class Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        for _ in range(80):
            x = x * self.scale + 0.01  # the planted line
        return x


def main():
    torch.manual_seed(0)
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    data = torch.randn(8, 8)
    while True:
        loss = model(data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
