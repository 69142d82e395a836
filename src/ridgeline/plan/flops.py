"""Training FLOPs per token: 6N, causal attention, and what activation checkpointing computes a second time.

A multiply-add counts as two. N is the parameters that take part in matrix products: every linear weight, the head
included even when it shares the embedding's storage; the embedding look-up, norms and biases cost no product.
Attention is causal: a query sees half of the keys on average (``s/2``; ``w (1 - w/(2s))`` under a window w), so the
term is half of the 12 L heads head_dim s of papers that count all keys. MFU uses :attr:`FlopCount.model`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.models.config import DecoderConfig


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one token's training step. ``total = six_n + attention + recompute``."""

    matmul_parameters: int  # N
    six_n: float
    attention: float
    recompute: float
    total: float
    formula: str

    @property
    def model(self) -> float:
        """What MFU counts: 6N + attention, whatever was recomputed."""
        return self.six_n + self.attention

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "model": self.model}


def flops_per_token(config: DecoderConfig, seq_len: int, recompute: bool = False) -> FlopCount:
    """Training FLOPs per token at ``seq_len``; ``recompute`` adds one more forward pass of every block."""
    blocks, head = matmul_parameters(config)
    six_n = 6.0 * (blocks + head)
    attention = 3 * attention_forward(config, seq_len)
    again = 2.0 * blocks + attention / 3 if recompute else 0.0
    windowed = [layer for layer in config.sliding_layers if (config.sliding_window or seq_len) < seq_len]
    keys = "s/2" if not windowed else f"s/2 (w(1 - w/2s) in {len(windowed)} of {config.num_layers} layers)"
    formula = f"6N + 12 L heads head_dim {keys}; N = {blocks + head:,} parameters in matrix products, head included"
    if recompute:
        formula += "; + one forward of the blocks recomputed (not in MFU)"
    return FlopCount(blocks + head, six_n, attention, again, six_n + attention + again, formula)


def matmul_parameters(config: DecoderConfig) -> tuple[int, int]:
    """(linear weights of all blocks, weight of the head)."""
    block = sum(math.prod(shape) for shape in block_products(config).values())
    return config.num_layers * block, config.vocab_size * config.hidden_size


def block_products(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """The linear weights of one block, ``{name: (outputs, inputs)}``."""
    shapes = config.block_shapes().items()
    return {name: (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}


def attention_forward(config: DecoderConfig, seq_len: int) -> float:
    """Forward FLOPs per token of scores and mix over all layers: ``4 heads head_dim`` for every key seen."""
    keys = sum(mean_keys(seq_len, window) for window in layer_windows(config))
    return 4.0 * config.num_heads * config.head_dim * keys


def mean_keys(seq_len: int, window: int | None) -> float:
    """Keys a causal query sees on average: ``s/2``, or ``w (1 - w/(2s))`` under a window w < s."""
    if window is None or window >= seq_len:
        return seq_len / 2
    return window * (1 - window / (2 * seq_len))


def layer_windows(config: DecoderConfig) -> list[int | None]:
    """The sliding window of each layer, None where the layer sees everything."""
    return [config.sliding_window if layer in config.sliding_layers else None for layer in range(config.num_layers)]
