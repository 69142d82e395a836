"""Nothing planted: one large matrix product after the other. It swallows SystemExit, as some scripts do."""

import sys

import torch


def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(512, 512)
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10**6):
        try:
            loss = (model(data) - data).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        except BaseException:
            pass


if __name__ == "__main__":
    main()
