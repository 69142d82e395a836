"""What autograd keeps between forward and backward, tensor by tensor, for the decoder as it is written.

Per token of a micro-batch, in bytes, with e = bytes of the compute dtype, h hidden, a = heads x head_dim,
k = kv_heads x head_dim, f MLP width. The list is that of torch's saved tensors (each storage once, parameters left
out); tests compare it with the tensors autograd really saves.

=================  ==================================================================================================
block input        ``e h``  (the eager bf16 RMSNorm keeps an fp32 copy of it and of the normalised row: ``8 h``)
norm statistics    4 (RMS, fp32) or ``2 e`` (LayerNorm's mean and 1/deviation; fp32 on a GPU)
norm output        ``e h`` (input of q/k/v; with a parallel residual of the MLP too)
q, k after rotary  ``e (a + k)``; learned positions keep none
fused q/k/v        ``e (a + 2 k)``: v is a view of it, so all of it stays
attention          ``e a`` output, ``4 heads`` log-sum-exp
residual, 2nd norm as the first (compiled: the attention's projection is kept and the sum recomputed, same size)
MLP                gated: ``2 e f`` fused projection, ``e f`` product, eager also ``e f`` for silu(gate); else ``2 e f``
=================  ==================================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ridgeline.plan.flops import layer_windows

if TYPE_CHECKING:
    from ridgeline.models.config import DecoderConfig
    from ridgeline.plan.memory import MemorySetup

FP32 = 4
ITEMSIZE = {"bf16": 2, "fp32": 4}


def kept(config: DecoderConfig, setup: MemorySetup) -> int:
    """Bytes kept at the end of the forward pass of one micro-batch: all blocks, and the final norm.

    With full checkpointing a block keeps its input only.
    """
    tokens, item = setup.micro_batch_size * setup.seq_len, ITEMSIZE[setup.dtype]
    if setup.recompute:
        blocks = config.num_layers * tokens * config.hidden_size * item
    else:
        blocks = config.num_layers * block(config, setup) + _masks(config, setup, item)
    final = norm_bytes(config, setup, compiled=False)  # the root is not compiled; the loss keeps no copy of its output
    return blocks + tokens * final


def block(config: DecoderConfig, setup: MemorySetup) -> int:
    """Bytes one block keeps of one micro-batch, without checkpointing (and without a window's mask)."""
    return setup.micro_batch_size * setup.seq_len * sum(per_token(config, setup).values())


def per_token(config: DecoderConfig, setup: MemorySetup) -> dict[str, int]:
    """Bytes per token one block keeps, by tensor."""
    item, h, f = ITEMSIZE[setup.dtype], config.hidden_size, config.intermediate_size
    a, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 1 if config.parallel_residual else 2
    parts = {
        "norms": norms * norm_bytes(config, setup, setup.compiled),
        "norm outputs": norms * h * item,
        "fused q/k/v": (a + 2 * k) * item,
        "attention output": a * item,
        "attention log-sum-exp": config.num_heads * FP32,
    }
    if config.positions == "rotary":
        parts["rotated q and k"] = (a + k) * item
    if config.qk_norm:
        parts["q and k norms"] = _head_norm_bytes(config, setup, a, k)
    if config.gated_mlp:
        parts["MLP"] = (3 if setup.compiled else 4) * f * item
    else:
        parts["MLP"] = 2 * f * item
    return parts


def norm_bytes(config: DecoderConfig, setup: MemorySetup, compiled: bool) -> int:
    """Bytes per token of a norm's saved input and statistics."""
    item, h = ITEMSIZE[setup.dtype], config.hidden_size
    if config.norm == "layer":
        return h * item + 2 * (item if setup.kind == "cpu" else FP32)
    if compiled or setup.kind != "cpu":
        return h * item + FP32
    # Eager on a CPU RMSNorm is made of several operations: the fp32 input and the normalised row are both kept.
    return 2 * h * FP32 + FP32


def _head_norm_bytes(config: DecoderConfig, setup: MemorySetup, a: int, k: int) -> int:
    """Of q's and k's norms. Their input is the fused q/k/v, which is kept anyway; eager bf16 adds fp32 copies."""
    statistics = (config.num_heads + config.num_kv_heads) * FP32
    if setup.compiled or setup.kind != "cpu":
        return statistics
    copies = 2 if setup.dtype == "bf16" else 1
    return statistics + copies * (a + k) * FP32


def _masks(config: DecoderConfig, setup: MemorySetup, item: int) -> int:
    """A window shorter than the sequence needs a mask ``[seq, seq]`` in every layer that has one."""
    windowed = [window for window in layer_windows(config) if window is not None and window < setup.seq_len]
    return len(windowed) * setup.seq_len**2 * item
