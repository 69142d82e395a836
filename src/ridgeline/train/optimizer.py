"""AdamW over fp32 master weights, its state made before the first step so that it can be saved, loaded and counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ridgeline.config import OptimizerSection
from ridgeline.parallel.fsdp import named_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(decoder: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only (embeddings included), never on norms and biases."""
    matrices = [p for _, p in named_parameters(decoder) if p.ndim >= 2]
    vectors = [p for _, p in named_parameters(decoder) if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_applied_steps(optimizer: torch.optim.Optimizer, applied: int) -> None:
    """The number of updates so far, which AdamW's bias correction depends on (skipped steps do not count)."""
    for state in optimizer.state.values():
        state["step"].fill_(float(applied))


def named_moments(decoder: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """``(parameter name . moment, tensor)`` of the whole optimizer state but for the step count."""
    for name, parameter in named_parameters(decoder):
        for moment in MOMENTS:
            yield f"{name}.{moment}", optimizer.state[parameter][moment]
