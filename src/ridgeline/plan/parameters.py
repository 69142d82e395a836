"""Parameters: the exact count, the closed formula people quote, and every difference between the two by name.

Closed forms (l layers, h hidden, V vocabulary, s positions, a = heads x head_dim, k = kv_heads x head_dim, f MLP width):

* Megatron's GPT form (Narayanan et al. 2021, arXiv:2104.04473, eq. 2): ``12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h))``.
  It leaves the final LayerNorm (2h) out.
* Llama form: ``l (2 h a + 2 h k + 3 h f + 2 h) + V h + h``, tied embeddings.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.errors import UserError

if TYPE_CHECKING:
    from ridgeline.models.config import DecoderConfig

MEGATRON = "12 l h^2 (1 + 13/(12 h) + (V + s)/(12 l h))"
LLAMA = "l (2 h a + 2 h k + 3 h f + 2 h) + V h + h"
VOCAB_MULTIPLE = 128  # Megatron pads the vocabulary to a multiple of this times tp


@dataclass(frozen=True)
class Difference:
    """One thing a configuration has (positive) or lacks (negative) against what a closed form assumes."""

    name: str
    parameters: int


@dataclass(frozen=True)
class ParameterReport:
    """``exact == closed + sum(differences)``."""

    exact: int
    closed: int
    formula: str
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def parameter_report(config: DecoderConfig) -> ParameterReport:
    """Count ``config`` exactly (from its shapes) and by the closed form of its kind, and name what separates them."""
    exact = sum(math.prod(shape) for shape in config.parameter_shapes().values())
    if config.norm == "layer":
        closed = megatron_parameters(config.num_layers, config.hidden_size, config.vocab_size, config.context_length)
        return ParameterReport(exact, closed, MEGATRON, _named(_megatron_differences(config)), _warnings(config))
    return ParameterReport(
        exact, llama_parameters(config), LLAMA, _named(_llama_differences(config)), _warnings(config)
    )


def megatron_parameters(layers: int, hidden: int, vocab: int, positions: int) -> int:
    """``12 l h^2 + 13 l h + (V + s) h``, the formula multiplied out."""
    return 12 * layers * hidden**2 + 13 * layers * hidden + (vocab + positions) * hidden


def llama_parameters(config: DecoderConfig) -> int:
    """``l (2 h a + 2 h k + 3 h f + 2 h) + V h + h``."""
    h, a, k = config.hidden_size, *_widths(config)
    per_layer = 2 * h * a + 2 * h * k + 3 * h * config.intermediate_size + 2 * h
    return config.num_layers * per_layer + config.vocab_size * h + h


def padded_vocab(vocab: int, tp: int = 1) -> int:
    """The vocabulary rounded up to a multiple of 128 x ``tp``.

    Raises:
        UserError: ``tp`` is not positive.
    """
    if tp < 1:
        raise UserError(f"tp {tp}: must be at least 1")
    multiple = VOCAB_MULTIPLE * tp
    return -(-vocab // multiple) * multiple


def _widths(config: DecoderConfig) -> tuple[int, int]:
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def _megatron_differences(config: DecoderConfig) -> list[tuple[str, int]]:
    """The form assumes two LayerNorms, biases everywhere, MLP of 4h, a = k = h, learned positions, a tied head."""
    h, layers, f = config.hidden_size, config.num_layers, config.intermediate_size
    a, k = _widths(config)
    return [
        ("final LayerNorm, 2h", 2 * h),
        ("MLP width other than 4h", layers * 2 * h * (f - 4 * h)),
        ("MLP bias of a width other than 4h", layers * (f - 4 * h) if config.mlp_bias else 0),
        ("no MLP biases", 0 if config.mlp_bias else -layers * 5 * h),
        ("attention width other than h", layers * h * (2 * a + 2 * k - 4 * h)),
        ("q/k/v bias of a width other than h", layers * (a + 2 * k - 3 * h) if config.qkv_bias else 0),
        ("no q/k/v biases", 0 if config.qkv_bias else -layers * 3 * h),
        ("no attention output bias", 0 if config.out_bias else -layers * h),
        ("one LayerNorm per layer (parallel residual)", -layers * 2 * h if config.parallel_residual else 0),
        ("q and k norms", layers * 2 * config.head_dim if config.qk_norm else 0),
        ("rotary positions: no table", 0 if config.positions == "learned" else -config.context_length * h),
        *_head_differences(config),
    ]


def _llama_differences(config: DecoderConfig) -> list[tuple[str, int]]:
    """The form assumes RMSNorms, a gated MLP, no biases, rotary positions, a tied head."""
    h, layers, f = config.hidden_size, config.num_layers, config.intermediate_size
    a, k = _widths(config)
    return [
        ("MLP without a gate", 0 if config.gated_mlp else -layers * h * f),
        ("q/k/v biases", layers * (a + 2 * k) if config.qkv_bias else 0),
        ("attention output bias", layers * h if config.out_bias else 0),
        ("MLP biases", layers * ((2 if config.gated_mlp else 1) * f + h) if config.mlp_bias else 0),
        ("q and k norms", layers * 2 * config.head_dim if config.qk_norm else 0),
        ("one RMSNorm per layer (parallel residual)", -layers * h if config.parallel_residual else 0),
        ("learned positions", config.context_length * h if config.positions == "learned" else 0),
        *_head_differences(config),
    ]


def _head_differences(config: DecoderConfig) -> list[tuple[str, int]]:
    return [
        (
            "head of its own (embeddings not tied), V h",
            0 if config.tie_embeddings else config.vocab_size * config.hidden_size,
        ),
        ("head bias, V", config.vocab_size if config.head_bias else 0),
    ]


def _named(differences: list[tuple[str, int]]) -> tuple[Difference, ...]:
    return tuple(Difference(name, count) for name, count in differences if count)


def _warnings(config: DecoderConfig) -> tuple[str, ...]:
    head_dim = config.head_dim
    if head_dim & (head_dim - 1):
        return (f"head_dim {head_dim} is not a power of two: attention kernels pad it to {1 << head_dim.bit_length()}",)
    return ()
