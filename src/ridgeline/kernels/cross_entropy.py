"""Cross-entropy from hidden states, without keeping the logits.

The idea: logits ``[rows, vocab]`` are the largest tensor of a language model's step, and plain autograd keeps
them (and their fp32 copy) for the backward pass. The gradient of the loss with respect to the logits is
``softmax - one_hot``, known as soon as the logits are, so each chunk of rows goes through in one visit: logits,
loss, gradient of the hidden rows, its share of the head's gradient, and the chunk is forgotten (Hsu et al. 2024,
Liger, arXiv:2410.10989). Softmax is in fp32; the head's gradient is summed over chunks in fp32. Backward only
multiplies by the incoming scalar. Without gradients the chunks yield the loss only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 8 * 2**20  # logits in flight: 16 MiB in bf16, 32 MiB as fp32


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    reduction: str = "sum",
    ignore_index: int = -100,
) -> Tensor:
    """Loss of ``hidden @ weight.T + bias`` against ``targets``; fp32 scalar.

    ``hidden`` ``[..., dim]``, ``weight`` ``[vocab, dim]``, ``targets`` ``[...]`` int64, rows equal to
    ``ignore_index`` do not count. ``reduction`` is ``"sum"`` or ``"mean"`` (over counted rows).
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got '{reduction}'")
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    total = _LinearCrossEntropy.apply(rows, weight, bias, flat, ignore_index, torch.is_grad_enabled())
    return total if reduction == "sum" else total / (flat != ignore_index).sum()


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The definition, in the inputs' own precision, all logits at once; summed."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses; gradients are made in the forward pass when ``with_grad``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        with_grad: bool,
    ) -> Tensor:
        chunk = max(1, min(hidden.shape[0], CHUNK_ELEMENTS // weight.shape[0]))
        if not with_grad:
            return _loss_only(hidden, weight, bias, targets, ignore_index, chunk)
        loss, d_hidden, d_weight, d_bias = _loss_and_gradients(hidden, weight, bias, targets, ignore_index, chunk)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grads[0]
        scaled_bias = None if d_bias is None else d_bias * scale.to(d_bias.dtype)
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale.to(d_weight.dtype), scaled_bias, None, None, None


def _chunk_loss(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One chunk: (summed loss, log-sum-exp ``[rows, 1]``, counted ``[rows, 1]``, safe targets ``[rows, 1]``)."""
    counted = (targets != ignore_index)[:, None]
    safe = torch.where(counted, targets[:, None], 0)
    lse = torch.logsumexp(logits, -1, keepdim=True)
    return ((lse - logits.gather(-1, safe)) * counted).sum(), lse, counted, safe


def _loss_only(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, chunk: int
) -> Tensor:
    loss = hidden.new_zeros((), dtype=torch.float32)
    for rows, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        loss = loss + _chunk_loss(F.linear(rows, weight, bias).float(), target, ignore_index)[0]
    return loss


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    loss = hidden.new_zeros((), dtype=torch.float32)
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    d_hidden = []
    for rows, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = F.linear(rows, weight, bias).float()
        part, lse, counted, safe = _chunk_loss(logits, target, ignore_index)
        one_hot = torch.arange(logits.shape[-1], device=logits.device) == safe
        d_logits = ((torch.exp(logits - lse) - one_hot.float()) * counted).to(hidden.dtype)
        loss = loss + part
        d_hidden.append(d_logits @ weight)
        d_weight = d_weight + d_logits.T @ rows
        if d_bias is not None:
            d_bias = d_bias + d_logits.sum(0, dtype=torch.float32)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return loss, torch.cat(d_hidden), d_weight.to(weight.dtype), d_bias


def flops(rows: int, dim: int, vocab: int, backward: bool = True) -> int:
    """The GEMMs: ``2 rows dim vocab`` forward, twice that backward (softmax not counted)."""
    return 2 * rows * dim * vocab * (3 if backward else 1)


def bytes_moved(rows: int, dim: int, vocab: int, itemsize: int = 2, backward: bool = True) -> int:
    """With the chunks held in cache: hidden and head read, their gradients written."""
    inputs = (rows * dim + vocab * dim) * itemsize
    return 2 * inputs if backward else inputs
