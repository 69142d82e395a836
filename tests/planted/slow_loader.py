"""Planted: every item sleeps, so that the step waits for its batch. ``--random`` makes the items depend on the worker."""

import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset


class Slow(Dataset):
    def __len__(self):
        return 4000

    def __getitem__(self, index):
        time.sleep(0.008)  # the planted line
        if "--random" in sys.argv:
            return torch.randn(16)
        return torch.full((16,), index / 4000.0)


def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in DataLoader(Slow(), batch_size=4, shuffle=True):
        loss = (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
