"""Planted: element-wise operators over activations many times larger than any cache of a core."""

import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(64))
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        for _ in range(10):
            x = torch.tanh(x * self.scale + 0.1)
        return self.linear(x)


def main():
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = torch.randn(65536, 64)
    while True:
        loss = model(data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
