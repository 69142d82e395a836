"""Nothing planted: seven steps, then an end with thousands of tensors in the last frame, whose destructors run Python."""

import sys
import time

import torch


class Owner:
    def __del__(self):
        sum(range(50))


def main():
    sys.setswitchinterval(1e-6)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(7):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    tensors = [torch.zeros(2) for _ in range(30000)]
    for one in tensors:
        one.owner = Owner()
    time.sleep(0.02)


if __name__ == "__main__":
    main()
