"""Planted: rank 1 does something else for 50 ms in every step, and rank 0 waits for it. Started by torchrun."""

import time

import torch
import torch.distributed as dist


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = torch.randn(64, 64)
    while True:
        if dist.get_rank() == 1:
            time.sleep(0.05)  # the planted line
        loss = (model(data) - data).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
