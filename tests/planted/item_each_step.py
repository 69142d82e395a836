"""Planted: the loop reads every element of a tensor as a Python number, each step. ``--abort``: the process aborts as it
ends, as a library's destructors do now and then."""

import atexit
import os
import sys

if "--abort" in sys.argv:
    atexit.register(os.abort)  # before torch is imported: after everything that registers later

import torch


def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(64, 64)
    log = 0.0
    while True:
        errors = (model(data) - data).square()
        loss = errors.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log += sum(one.item() for one in errors.detach().flatten())  # the planted line


if __name__ == "__main__":
    main()
