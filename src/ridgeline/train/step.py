"""One optimiser step: micro-batches forward and backward, global norm, clipping, update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from ridgeline.config import JobConfig
from ridgeline.kernels.cross_entropy import linear_cross_entropy
from ridgeline.parallel.collectives import Collectives
from ridgeline.parallel.fsdp import accumulate, release
from ridgeline.parallel.norm import clip_factor, global_norm, gradients, scale_
from ridgeline.train.optimizer import set_learning_rate
from ridgeline.train.state import TrainState


@dataclass(frozen=True)
class Outcome:
    """Loss and gradient norm of the whole job's step; ``stop`` is true when any rank was asked to end."""

    loss: float
    stop: bool
    grad_norm: float = math.nan

    @property
    def finite(self) -> bool:
        """Whether the step may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def forward_backward(state: TrainState, tokens: torch.Tensor, micro_batch: int, token_count: int) -> torch.Tensor:
    """Gradients of this rank's ``tokens`` ``[rows, seq + 1]``; returns its share of the loss, a scalar.

    Each micro-batch's summed loss is divided by ``token_count``, the tokens of the whole step over all ranks, so that
    micro-batches and ranks add up to the mean (a mean of means is wrong as soon as parts differ in tokens).
    """
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    decoder, parts = state.decoder, torch.split(tokens, micro_batch)
    for index, part in enumerate(parts):
        accumulate(decoder, last=index == len(parts) - 1)
        with record_function("ridgeline.forward"):
            hidden = decoder(part[:, :-1])
            targets = part[:, 1:].contiguous()
            loss = state.loss(hidden, decoder.head_weight, targets, decoder.head_bias) / token_count
        with record_function("ridgeline.backward"):
            torch.autograd.backward(loss)
        total += loss.detach()
    return total


def share(loss: torch.Tensor, stop: bool, world: Collectives) -> Outcome:
    """Add the ranks' losses; a request to stop on one rank reaches all at the same step."""
    values = world.all_reduce(torch.stack([loss, torch.tensor(float(stop), device=loss.device)]))
    return Outcome(float(values[0]), float(values[1]) > 0)


def measure_norm(state: TrainState, outcome: Outcome) -> Outcome:
    """The outcome with the global gradient norm before clipping."""
    norm = float(global_norm(gradients(state.decoder.parameters())))
    return Outcome(outcome.loss, outcome.stop, norm)


def apply(state: TrainState, job: JobConfig, outcome: Outcome, rate: float) -> None:
    """Clip and update."""
    factor = clip_factor(outcome.grad_norm, job.optimizer.clip_norm)
    if factor < 1.0:
        scale_(gradients(state.decoder.parameters()), factor)
    set_learning_rate(state.optimizer, rate)
    state.optimizer.step()
    state.applied += 1


def evaluate(state: TrainState, tokens: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """Summed loss of this rank's ``tokens`` ``[rows, seq + 1]``.

    The blocks run as in training, with gradients recorded and dropped: under ``no_grad`` each would be compiled a
    second time, which costs more than the validation.
    """
    decoder = state.decoder
    total = torch.zeros((), dtype=torch.float32, device=tokens.device)
    for part in torch.split(tokens, micro_batch):
        hidden = decoder(part[:, :-1]).detach()
        with torch.no_grad():
            total += linear_cross_entropy(hidden, decoder.head_weight, part[:, 1:].contiguous(), decoder.head_bias)
    release(decoder)
    return total
