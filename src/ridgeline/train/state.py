"""What training changes: the sharded decoder, its optimizer, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ridgeline.config import JobConfig
from ridgeline.errors import UserError
from ridgeline.kernels.cross_entropy import linear_cross_entropy
from ridgeline.models import Decoder, DecoderConfig, config_from_section
from ridgeline.parallel import rng
from ridgeline.parallel.fsdp import fill_local, named_parameters, parallelize, sum_gradients
from ridgeline.parallel.mesh import Layout
from ridgeline.train.optimizer import build_optimizer, named_moments

Loss = Callable[..., torch.Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class TrainState:
    """``step`` counts optimiser steps, skipped ones included: it is the cursor into the sample order. ``applied``
    counts those that changed the weights. ``loss`` is the summed cross-entropy of hidden states, compiled or not."""

    decoder: Decoder
    config: DecoderConfig
    optimizer: torch.optim.AdamW
    loss: Loss = linear_cross_entropy
    step: int = 0
    applied: int = 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint holds as tensors, by name: masters and both moments."""
        tensors = {f"model.{name}": parameter for name, parameter in named_parameters(self.decoder)}
        moments = {f"optimizer.{name}": moment for name, moment in named_moments(self.decoder, self.optimizer)}
        return {**{name: p.detach() for name, p in tensors.items()}, **moments}


def model_config(job: JobConfig, vocab_size: int) -> DecoderConfig:
    """The decoder to train: from ``[model]``, or from the folder ``model.init`` names.

    Raises:
        UserError: the folder's vocabulary is not the dataset's, or its context is shorter than ``train.seq_len``.
    """
    if job.model.init is None:
        if job.model.vocab_size is not None and job.model.vocab_size < vocab_size:
            raise UserError(f"model.vocab_size {job.model.vocab_size} is smaller than the tokenizer's {vocab_size}")
        return config_from_section(job.model, vocab_size)
    from ridgeline.models import load_config

    config = load_config(job.model.init)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.init {job.model.init}: vocabulary {config.vocab_size} does not match the dataset's tokenizer "
            f"({vocab_size}); build the data with data.tokenizer.path={job.model.init}"
        )
    if config.positions == "learned" and config.context_length < job.train.seq_len:
        raise UserError(
            f"train.seq_len {job.train.seq_len} exceeds the context {config.context_length} of {job.model.init}"
        )
    return config


def build_state(job: JobConfig, config: DecoderConfig, layout: Layout) -> TrainState:
    """Build on the meta device, shard, then fill each rank's own part: no process ever holds the whole fp32 model.

    The values depend on ``train.seed`` (or ``model.init``) alone, bit for bit, whatever the layout.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    parallel = job.parallel
    parallelize(
        decoder,
        layout,
        dtype=DTYPES[job.train.dtype],
        reshard_after_forward=parallel.reshard_after_forward,
        activation_checkpointing=parallel.activation_checkpointing == "full",
        compile_blocks=_compiler(job),
    )
    sum_gradients(decoder)
    decoder.to_empty(device=layout.device)
    decoder.init_buffers(layout.device)
    if job.model.init is None:
        draw_parameters(decoder, config, job.train.seed)
    else:
        load_parameters(decoder, job.model.init)
    return TrainState(decoder, config, build_optimizer(decoder, job.optimizer), _loss(job))


def draw_parameters(decoder: nn.Module, config: DecoderConfig, seed: int) -> None:
    """Initialise this rank's rows: number ``i`` of the stream ``(seed, name)`` is element ``i`` of the parameter."""
    for name, parameter in named_parameters(decoder):
        std, mean = config.init_std(name), config.init_value(name)
        if std is None:
            fill_local(parameter, partial(_constant_rows, tuple(parameter.shape), mean))
        else:
            fill_local(parameter, partial(_normal_rows, seed, name, tuple(parameter.shape), mean, std))


def load_parameters(decoder: nn.Module, folder: str | Path) -> None:
    """Fill this rank's rows from a Hugging Face-layout folder."""
    from ridgeline.models import load

    source = dict(load(folder, dtype=torch.float32).named_parameters())
    for name, parameter in named_parameters(decoder):
        whole = source[name].detach()
        fill_local(parameter, partial(_rows_of, whole))


def _constant_rows(shape: tuple[int, ...], mean: float, first: int, count: int) -> np.ndarray:
    return np.full((count, *shape[1:]), mean, dtype=np.float32)


def _normal_rows(
    seed: int, name: str, shape: tuple[int, ...], mean: float, std: float, first: int, count: int
) -> np.ndarray:
    return rng.normal_rows(seed, name, shape, first, count) * np.float32(std) + np.float32(mean)


def _rows_of(whole: torch.Tensor, first: int, count: int) -> np.ndarray:
    return whole[first : first + count].numpy()


def _loss(job: JobConfig) -> Loss:
    if not job.train.compile:
        return linear_cross_entropy
    from ridgeline.compiler.blocks import compile_function

    return compile_function(linear_cross_entropy)


def _compiler(job: JobConfig) -> Callable[[Decoder], object] | None:
    if not job.train.compile:
        return None
    from ridgeline.compiler.blocks import compile_blocks

    return compile_blocks
