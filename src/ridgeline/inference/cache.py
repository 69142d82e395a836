"""Keys and values of what has been computed: one contiguous slab per slot, so that a decode step reads it in place.

Per layer two tensors ``[slots, kv_heads, context, head_dim]``. The address space is taken once, at load, within a
memory limit; pages are filled by the system as tokens come (anonymous memory), so short requests use little.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from ridgeline.errors import UserError
from ridgeline.models.config import DecoderConfig

GRANULE = 64  # attention reads the cache in whole granules of tokens


class KVCache:
    """``keys[layer]`` and ``values[layer]`` are ``[slots, kv_heads, capacity, head_dim]`` and a little larger.

    The spare slot and granule are never used: with them no step reads a whole slab, a size at which the compiler would
    make one more graph.
    """

    def __init__(
        self, config: DecoderConfig, slots: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self.context = context  # tokens a sequence may hold
        self.capacity = -(-context // GRANULE) * GRANULE
        shape = (slots + 1, config.num_kv_heads, self.capacity + GRANULE, config.head_dim)
        self.keys = [lazy_zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.values = [lazy_zeros(shape, dtype, device) for _ in range(config.num_layers)]
        self.bytes_per_token = token_bytes(config, dtype)

    @property
    def bytes(self) -> int:
        """What the sequences of all slots together can come to fill."""
        return self.slots * self.capacity * self.bytes_per_token

    def window(self, tokens: int) -> int:
        """Positions to read so that the first ``tokens`` are among them."""
        return min(self.capacity, -(-tokens // GRANULE) * GRANULE)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` positions of one slot over another's."""
        for slab in (*self.keys, *self.values):
            slab[target, :, :tokens].copy_(slab[source, :, :tokens])

    def clear(self, slot: int) -> None:
        """Zero a slot: after non-finite values, which masked attention would still spread (0 times NaN)."""
        for slab in (*self.keys, *self.values):
            slab[slot].zero_()


def token_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def fit_context(config: DecoderConfig, slots: int, wanted: int | None, dtype: torch.dtype, limit_bytes: int) -> int:
    """The context every slot can have: ``wanted``, or without it the model's own, less when memory is short.

    Raises:
        UserError: ``wanted`` exceeds what the model or ``limit_bytes`` allows, or memory holds no useful context.
    """
    per_token = slots * token_bytes(config, dtype)
    room = limit_bytes // per_token // GRANULE * GRANULE
    if wanted is None:
        context = min(config.context_length, room)
        if context < min(GRANULE, config.context_length):
            raise UserError(
                f"the KV cache of {slots} slots does not fit its limit of {limit_bytes} bytes: {room} tokens"
            )
        return context
    if not 2 <= wanted <= config.context_length:
        raise UserError(f"max_context = {wanted}: must be from 2 to the model's context of {config.context_length}")
    if wanted > room:
        raise UserError(
            f"max_context = {wanted} with max_batch = {slots} needs {wanted * per_token} bytes of KV cache, more than "
            f"its limit of {limit_bytes}; at most {room} tokens fit"
        )
    return wanted


def memory_limit(device: torch.device, share: float = 0.5) -> int:
    """Bytes the cache may take by default: a share of what is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share)
    import psutil

    return int(psutil.virtual_memory().available * share)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the pages come into being when they are written. (`torch.zeros` would touch them all.)"""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
