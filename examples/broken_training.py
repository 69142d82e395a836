"""A training script with the troubles of real ones, for `ridgeline doctor examples/broken_training.py`.

It trains, and its losses are right: nothing here raises. Each numbered line makes torch.compile split a graph, compile
again or give up. The backend traces as Inductor does and needs no C++ compiler; pass another one as the first argument.
"""

import logging
import sys

import torch
import torch.nn.functional as F

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "aot_eager"
STEPS, WIDTH, CLASSES = 20, 32, 5


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(WIDTH, WIDTH)
        self.outer = torch.nn.Linear(WIDTH, CLASSES)
        self.seen = 0

    def forward(self, x):
        self.seen += 1  # 1. a counter that is a constant of the graph: compiled again until the limit, then eager
        warmup = 1.0 - 0.5 / self.seen
        return self.outer(F.gelu(self.inner(x)) * warmup)


@torch.compile(backend=BACKEND)
def normalize(x):
    peak = x.abs().max().item()  # 2. a number taken out of the graph at every step
    x = x / peak
    if x.mean() > 0:  # 3. a tensor decides a branch
        x = x * 0.5
    print("normalized", tuple(x.shape))  # 4. a print inside
    return x


@torch.compile(backend=BACKEND)
def hard_examples(losses):  # 5. batches of several sizes; 6. how many are chosen depends on the data
    chosen = losses[losses > losses.detach().median()]
    return chosen.mean() * 1.5 + losses.mean()


@torch.compile(backend=BACKEND)
def total(parts):  # 7. a dict of varying length: one graph for each
    return sum(part.square().sum() for part in parts.values())


@torch.compile(backend=BACKEND)
def report(x, weight):
    energy = (x * weight).sum()
    logging.warning("energy is fine")  # 8. a log line inside
    return energy + weight.sum()


@torch.compile(backend=BACKEND)
def similarity(a, b):  # 9. called with other strides; 10. with and without gradients
    return (a @ b).tanh().mean()


def main():
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=BACKEND)
    for step in range(STEPS):
        x = normalize(torch.randn(16 - step % 4, WIDTH) + 0.05)
        labels = torch.arange(len(x)) % CLASSES
        loss = hard_examples(F.cross_entropy(compiled(x), labels, reduction="none"))
        weights = {str(at): one for at, one in enumerate(model.parameters()) if at <= step % 3}
        loss = loss + 1e-3 * total(weights) + 1e-3 * report(x[:8], model.inner.weight[:8])
        square = model.inner.weight if step % 2 else model.inner.weight.t()
        loss = loss + 1e-3 * similarity(square, model.inner.weight)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            similarity(model.inner.weight, model.inner.weight)
    print(f"loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
