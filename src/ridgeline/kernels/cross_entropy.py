"""Cross-entropy from hidden states, without keeping the logits.

The idea: logits ``[rows, vocab]`` are the largest tensor of a language model's step, and plain autograd keeps
them (and their fp32 copy) for the backward pass. The gradient of the loss with respect to the logits is
``softmax - one_hot``, known as soon as the logits are, so each chunk of rows goes through in one visit: logits,
loss, gradient of the hidden rows, its share of the head's gradient, and the chunk is forgotten (Hsu et al. 2024,
Liger, arXiv:2410.10989). Softmax is in fp32; the head's gradient is summed over chunks in fp32. Backward only
multiplies by the incoming scalar. Without gradients the chunks yield the loss only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 8 * 2**20  # logits in flight: 16 MiB in bf16
MIN_CHUNK_ROWS = 256  # fewer rows make slow GEMMs, and a pass over the head's gradient for each
PIECE_ROWS = 64


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
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    total = apply(rows, weight, bias, flat, ignore_index, torch.is_grad_enabled())
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
        chunk = chunk_rows(hidden.shape[0], weight.shape[0])
        if not with_grad:
            return loss_only(hidden, weight, bias, targets, ignore_index, chunk)
        loss, d_hidden, d_weight, d_bias = loss_and_gradients(hidden, weight, bias, targets, ignore_index, chunk)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return loss

    @staticmethod
    @once_differentiable  # the gradients are constants by then: a second derivative would be wrong, so it is refused
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = grads[0]
        scaled_bias = None if d_bias is None else d_bias * scale.to(d_bias.dtype)
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale.to(d_weight.dtype), scaled_bias, None, None, None


def chunk_rows(rows: int, vocab: int) -> int:
    """Rows of logits that are held at a time, between 1 and ``rows``."""
    return max(1, min(rows, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab)))


def _log_probabilities(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 log-softmax ``[rows, vocab]``; of the targets, counted rows, targets safe to index with: ``[rows, 1]``."""
    counted = (targets != ignore_index)[:, None]
    safe = torch.where(counted, targets[:, None], 0)
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p, log_p.gather(-1, safe), counted, safe


def loss_only(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, chunk: int
) -> Tensor:
    """Loss in fp32, summed over counted rows, ``chunk`` rows of ``hidden`` ``[rows, hidden]`` at a time; no autograd of its own."""
    loss = hidden.new_zeros((), dtype=torch.float32)
    for rows, target in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        _, chosen, counted, _ = _log_probabilities(F.linear(rows, weight, bias), target, ignore_index)
        loss = loss - torch.where(counted, chosen, 0.0).sum()
    return loss


def _loss_and_d_logits(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(summed loss in fp32, its gradient ``[rows, vocab]`` in the logits' dtype) of one piece.

    The target's entry is ``p - 1 = expm1(log p)``: exact where ``p`` is near 1.
    """
    log_p, chosen, counted, safe = _log_probabilities(logits, targets, ignore_index)
    gradient = log_p.exp().scatter(-1, safe, torch.expm1(chosen))
    loss = -torch.where(counted, chosen, 0.0).sum()
    return loss, torch.where(counted, gradient, 0.0).to(logits.dtype)


def loss_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The summed loss and its gradients of hidden ``[rows, hidden]``, weight ``[vocab, hidden]`` and bias, in one pass."""
    loss = hidden.new_zeros((), dtype=torch.float32)
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    d_hidden = []
    # Eager on a CPU, each elementwise pass should find its rows in the L2 cache; the compiler fuses the passes itself.
    eager_cpu = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    for rows, target in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        logits = F.linear(rows, weight, bias)
        if eager_cpu:
            loss, d_logits = loss + _in_pieces(logits, target, ignore_index), logits
        else:
            part, d_logits = _loss_and_d_logits(logits, target, ignore_index)
            loss = loss + part
        d_hidden.append(d_logits @ weight)
        d_weight += d_logits.T @ rows
        if d_bias is not None:
            d_bias += d_logits.sum(0, dtype=torch.float32)
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return loss, torch.cat(d_hidden), d_weight.to(weight.dtype), d_bias


def _in_pieces(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Replace ``logits`` by their gradient, `PIECE_ROWS` rows at a time; the summed loss."""
    loss = logits.new_zeros((), dtype=torch.float32)
    for piece, target in zip(torch.split(logits, PIECE_ROWS), torch.split(targets, PIECE_ROWS), strict=True):
        log_p, chosen, counted, safe = _log_probabilities(piece, target, ignore_index)
        loss -= torch.where(counted, chosen, 0.0).sum()
        piece.copy_(log_p.exp_().scatter_(-1, safe, torch.expm1(chosen)).masked_fill_(~counted, 0.0))
    return loss


def flops(rows: int, dim: int, vocab: int, backward: bool = True) -> int:
    """The GEMMs: ``2 rows dim vocab`` forward, twice that backward (softmax not counted)."""
    return 2 * rows * dim * vocab * (3 if backward else 1)


def bytes_moved(rows: int, dim: int, vocab: int, itemsize: int = 2, backward: bool = True) -> int:
    """With the chunks held in cache: hidden and head read, their gradients written."""
    inputs = (rows * dim + vocab * dim) * itemsize
    return 2 * inputs if backward else inputs
