"""A logger's method: refused as setting, moved by the rewrite."""

import logging

import torch

torch.manual_seed(0)

logger = logging.getLogger("corpus")


@torch.compile(backend="aot_eager")
def step(x):
    h = x * 2
    logger.warning("at %s", h.sum())
    return h + 1


for _ in range(4):
    step(torch.randn(8))
