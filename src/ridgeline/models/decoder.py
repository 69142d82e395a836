"""The decoder as torch modules, for one device. Its pieces are fused where that saves a GEMM (q/k/v, gate/up)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.kernels.attention import attention, blocked_pays
from ridgeline.kernels.cross_entropy import linear_cross_entropy
from ridgeline.kernels.gelu import gelu
from ridgeline.kernels.layer_norm import layer_norm
from ridgeline.kernels.rms_norm import rms_norm
from ridgeline.kernels.rope import cos_sin, rotate
from ridgeline.kernels.swiglu import swiglu
from ridgeline.models.config import DecoderConfig
from ridgeline.models.rotary import attention_factor, inverse_frequencies

# (layer, q [b, s, heads, head_dim], k [b, s, kv_heads, head_dim], v as k) -> [b, s, heads, head_dim]; q and k are
# already rotated. The one hook of the decoder: inference puts its cache here.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
LayerAttend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last dim."""

    def __init__(self, dim: int, kind: str, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Self-attention. ``qkv`` holds the rows of all query heads, then key heads, then value heads."""

    def __init__(self, config: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window = window
        self.blocked = blocked_pays()  # asked here because a traced forward cannot look at the machine
        self.interleaved = config.rope_interleaved
        width = self.heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, width + 2 * self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(width, config.hidden_size, bias=config.out_bias)
        self.q_norm = Norm(self.head_dim, "rms", config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(self.head_dim, "rms", config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation | None, attend: LayerAttend | None) -> Tensor:
        """``x`` ``[batch, seq, hidden]`` -> same shape."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation, self.interleaved), rotate(k, *rotation, self.interleaved)
        mixed = attention(q, k, v, self.window, self.blocked) if attend is None else attend(q, k, v)
        out: Tensor = self.out(mixed.flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU over one fused ``gate_up`` (gate rows first), or GELU over ``up``; then ``down``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, wide, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gated, self.tanh = config.gated_mlp, config.activation == "gelu_tanh"
        if self.gated:
            self.gate_up = nn.Linear(hidden, 2 * wide, bias=bias)
        else:
            self.up = nn.Linear(hidden, wide, bias=bias)
        self.down = nn.Linear(wide, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[batch, seq, hidden]`` -> same shape."""
        out: Tensor = self.down(swiglu(self.gate_up(x)) if self.gated else gelu(self.up(x), self.tanh))
        return out


class Block(nn.Module):
    """One layer. It does not know its number, so that one compiled form serves every layer."""

    def __init__(self, config: DecoderConfig, window: int | None) -> None:
        super().__init__()
        self.attn_norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        self.attn = Attention(config, window)
        # With a parallel residual (GPT-J) the attention's norm feeds the MLP too.
        self.mlp_norm = None if config.parallel_residual else Norm(config.hidden_size, config.norm, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Rotation | None, attend: LayerAttend | None = None) -> Tensor:
        """``x`` ``[batch, seq, hidden]`` -> same shape."""
        normed = self.attn_norm(x)
        x = x + self.attn(normed, rotation, attend)
        out: Tensor = x + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """A causal language model. Parameters are as torch makes them; `init_std` and `init_value` say how to draw them."""

    inv_freq: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context_length, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(Block(config, config.window(layer)) for layer in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.norm, config.norm_eps)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.tied_bias = nn.Parameter(torch.zeros(config.vocab_size)) if tied and config.head_bias else None
        self.rope_factor = attention_factor(config.rope_scaling)
        self.register_buffer("inv_freq", None, persistent=False)
        self.init_buffers()

    def init_buffers(self, device: torch.device | str | None = None) -> None:
        """(Re-)create the buffers that are not saved, in fp32: after ``to_empty`` of a model built on meta."""
        if self.config.positions == "rotary":
            values = inverse_frequencies(self.config.rope_theta, self.config.rope_dim, self.config.rope_scaling)
            self.inv_freq = torch.tensor(values, dtype=torch.float32, device=device or self.embed.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """As every module's, but a cast to bf16 must not reach the frequencies: far positions would blur."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq is not None and self.inv_freq.dtype != torch.float32:
            self.init_buffers(self.inv_freq.device)
        return self

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Hidden states after the final norm.

        ``tokens`` ``[batch, seq]`` int64; ``positions`` ``[batch, seq]`` int64, default ``0 .. seq - 1``;
        -> ``[batch, seq, hidden]``. Without ``attend`` each token sees itself and those before it in the row.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden = self.embed(tokens)
        rotation = None
        if self.positions is not None:
            hidden = hidden + self.positions(positions)
        else:
            rotation = cos_sin(positions, self.inv_freq, self.rope_factor, hidden.dtype)
        for layer, block in enumerate(self.blocks):
            hidden = block(hidden, rotation, None if attend is None else partial(attend, layer))
        normed: Tensor = self.norm(hidden)
        return normed

    @property
    def head_weight(self) -> Tensor:
        """``[vocab, hidden]``: the head's own weight, or the embedding's when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        """``[vocab]`` or None."""
        return self.tied_bias if self.head is None else self.head.bias

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden]`` -> ``[..., vocab]``."""
        return F.linear(hidden, self.head_weight, self.head_bias)

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str = "sum", ignore_index: int = -100) -> Tensor:
        """Cross-entropy of ``targets`` ``[batch, seq]`` given ``tokens`` ``[batch, seq]``: a scalar in fp32."""
        return linear_cross_entropy(self(tokens), self.head_weight, targets, self.head_bias, reduction, ignore_index)

    def init_std(self, name: str) -> float | None:
        """See `DecoderConfig.init_std`."""
        return self.config.init_std(name)

    def init_value(self, name: str) -> float:
        """See `DecoderConfig.init_value`."""
        return self.config.init_value(name)
