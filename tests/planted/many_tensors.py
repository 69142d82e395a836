"""Planted: tiny kernels in the optimiser, which handles each of very many small tensors by itself."""

import torch


def main():
    torch.manual_seed(0)
    shifts = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(4)) for _ in range(300)])
    optimizer = torch.optim.AdamW(shifts.parameters(), lr=0.01)  # the planted line
    while True:
        loss = torch.cat(list(shifts)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
