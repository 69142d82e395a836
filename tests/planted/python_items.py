"""Planted: every item is computed in pure Python, on the core that should train."""

import torch
from torch.utils.data import DataLoader, Dataset


class Computed(Dataset):
    def __len__(self):
        return 4000

    def __getitem__(self, index):
        values = []
        for column in range(16):
            state = index * 16 + column
            for _ in range(400):
                state = (state * 1103515245 + 12345) % 2147483648  # the planted lines
            values.append(state / 2147483648)
        return torch.tensor(values)


def main():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in DataLoader(Computed(), batch_size=32):
        loss = (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
