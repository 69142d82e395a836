"""Runs the decoder against the KV cache: decode steps over the first n slots, and prefill of prompt chunks.

Decode is compiled block by block: all layers share two compiled graphs (one row, several rows; the number of rows and
of cache positions are dynamic in them), so that compiling takes seconds and nothing is compiled while requests run.
Prefill is eager: at a hundred rows a step the time is in the matrix products either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from ridgeline.inference.cache import KVCache
from ridgeline.kernels.rope import cos_sin
from ridgeline.models.decoder import Block, Decoder
from ridgeline.optimize.prepack import MIN_ROWS

Rotation = tuple[Tensor, Tensor]
RowAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MAX_UNROLLED = 8  # query heads per key head; beyond it the accumulators leave the registers


@dataclass(frozen=True)
class Decoded:
    """``logits`` ``[rows, vocab]``; the likeliest token of each row and its logit (not finite: the row is broken)."""

    logits: Tensor
    best: list[int]
    peak: list[float]


@dataclass(frozen=True)
class Segment:
    """Tokens of one prompt to add to ``slot`` from position ``start``; ``last`` when logits are wanted after them."""

    slot: int
    start: int
    tokens: Sequence[int]
    last: bool


class ModelRunner:
    """``head`` maps hidden states to logits. `warm_up` compiles, when ``compile`` is set, all that will be used."""

    def __init__(self, decoder: Decoder, head: Callable[[Tensor], Tensor], cache: KVCache, compile: bool) -> None:
        self.decoder, self.cache, self.compiled = decoder, cache, compile
        self.device = decoder.embed.weight.device
        group = decoder.config.num_heads // decoder.config.num_kv_heads
        fused = compile and self.device.type == "cpu" and group <= MAX_UNROLLED
        self._step = DecodeStep(decoder, head, cache, unrolled_attention if fused else grouped_attention)
        if compile:
            self._step.compile_parts()
        self._head = head

    @property
    def graphs(self) -> int:
        """Graphs the compiler has made in this process so far; constant while nothing is compiled."""
        return int(counters["stats"]["unique_graphs"])

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], positions: Sequence[int], reach: int) -> Decoded:
        """One token for each of the slots ``0 .. len(tokens) - 1``, written at its position.

        ``reach`` is the highest position of a row whose result is wanted; rows further on read only that far.
        """
        window = torch.arange(self.cache.window(reach + 1), device=self.device)
        where = torch.tensor([tokens, positions], device=self.device)[..., None]
        logits, peak, best = self._step(where[0], where[1], window, False)
        return Decoded(logits, best.tolist(), peak.tolist())

    @torch.inference_mode()
    def prefill(self, segments: Sequence[Segment]) -> Tensor | None:
        """Compute prompt chunks together; logits ``[wanted segments, vocab]`` of each wanted segment's last token."""
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [p for s in segments for p in range(s.start, s.start + len(s.tokens))]
        where = torch.tensor([tokens, positions], device=self.device)[:, None]
        attend = PrefillAttend(self.decoder, self.cache, segments)
        hidden = self.decoder(where[0], where[1], attend)
        ends, offset = [], 0
        for segment in segments:
            offset += len(segment.tokens)
            if segment.last:
                ends.append(offset - 1)
        if not ends:
            return None
        return self._head(hidden[0, torch.tensor(ends, device=self.device)])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every graph once on an empty cache: one row, and several."""
        # The compiler's limit is per function in the process; here it would count the engines made in it.
        with torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6):
            for rows in sorted({1, min(2, self.cache.slots)}):
                window = torch.arange(self.cache.window(1), device=self.device)
                where = torch.zeros(2, rows, 1, dtype=torch.int64, device=self.device)
                self._step(where[0], where[1], window, self.compiled)


class DecodeStep(nn.Module):
    """One decode step: ``tokens``, ``positions`` ``[rows, 1]``, ``window`` = 0 .. n-1, the cache positions to read."""

    def __init__(
        self, decoder: Decoder, head: Callable[[Tensor], Tensor], cache: KVCache, attention: RowAttention
    ) -> None:
        super().__init__()
        config = decoder.config
        blocks: list[Any] = list(decoder.blocks)
        windows = [config.window(layer) or 0 for layer in range(config.num_layers)]
        self.front = Front(decoder, sorted(set(windows)))
        self.kinds = [self.front.windows.index(window) for window in windows]  # which bias each layer takes
        self.layers = nn.ModuleList(map(DecodeLayer, blocks, cache.keys, cache.values, repeat(attention)))
        self.tail = Tail(decoder, head)

    def compile_parts(self) -> None:
        """torch.compile for the front, each layer (one code for all) and the tail."""
        for part in (self.front, *self.layers, self.tail):
            part.compile(fullgraph=True)

    def forward(self, tokens: Tensor, positions: Tensor, window: Tensor, mark: bool) -> tuple[Tensor, Tensor, Tensor]:
        """-> logits ``[rows, vocab]``, highest logit ``[rows]``, its token ``[rows]``.

        ``mark`` tells the compiler which dims will vary; needed once, before the first call of each graph.
        """
        if mark:
            _dynamic(0, tokens, positions, window)
        x, rotation, rows, biases = self.front(tokens, positions, window)
        if x.shape[0] > positions.shape[0]:
            positions = positions.expand(x.shape[0], 1)
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            if mark:
                _dynamic(0, x, rows, *(rotation or ()), *biases)
                _dynamic(3, *biases)
            x = layer(x, rotation, rows, positions, biases[kind])
        if mark:
            _dynamic(0, x, rows)
        out: tuple[Tensor, Tensor, Tensor] = self.tail(x, rows)
        return out


class Front(nn.Module):
    """Embedding, rotary tables and attention biases, once per step."""

    def __init__(self, decoder: Decoder, windows: list[int]) -> None:
        super().__init__()
        self.embed, self.positions, self.windows = decoder.embed, decoder.positions, windows
        self.inv_freq = decoder.inv_freq
        self.factor = decoder.rope_factor

    def forward(
        self, tokens: Tensor, positions: Tensor, window: Tensor
    ) -> tuple[Tensor, Rotation | None, Tensor, list[Tensor]]:
        """-> x, rotation, row numbers ``[rows, 1]``, a bias ``[rows, 1, 1, n]`` per window.

        One row is computed as `MIN_ROWS` equal ones, of which the first counts: prepacked linears are then as fast, and
        give the same bits as in a batch.
        """
        count = tokens.shape[0]
        if count == 1:
            tokens, positions = tokens.expand(MIN_ROWS, 1), positions.expand(MIN_ROWS, 1)
        x = self.embed(tokens)
        rotation = None
        if self.positions is not None:
            x = x + self.positions(positions)
        else:
            rotation = cos_sin(positions, self.inv_freq, self.factor, x.dtype)
        distance = positions[:count] - window
        biases = []
        for width in self.windows:
            seen = (distance >= 0) & (distance < width) if width else distance >= 0
            bias = torch.zeros_like(distance, dtype=x.dtype).masked_fill(~seen, float("-inf"))
            biases.append(bias[:, None, None])
        return x, rotation, torch.arange(count, device=x.device)[:, None], biases


class DecodeLayer(nn.Module):
    """A block with its part of the cache."""

    keys: Tensor
    values: Tensor
    heads: Tensor

    def __init__(self, block: Block, keys: Tensor, values: Tensor, attention: RowAttention) -> None:
        super().__init__()
        self.block, self.attention = block, attention
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("heads", torch.arange(keys.shape[1], device=keys.device)[None], persistent=False)

    def forward(self, x: Tensor, rotation: Rotation | None, rows: Tensor, positions: Tensor, bias: Tensor) -> Tensor:
        """``x`` ``[rows, 1, hidden]`` -> same. Writes the new key and value at ``positions`` and reads the window."""
        keys, values = self.keys, self.values

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            count, window = bias.shape[0], bias.shape[3]
            place = (rows, self.heads, positions[:count])
            keys.index_put_(place, k[:count, 0])
            values.index_put_(place, v[:count, 0])
            mixed = self.attention(q[:count], keys[:count, :, :window], values[:count, :, :window], bias)
            return mixed if count > 1 else mixed.expand(q.shape)

        out: Tensor = self.block(x, rotation, attend)
        return out


class Tail(nn.Module):
    """Final norm, head and the greedy choice."""

    def __init__(self, decoder: Decoder, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.head = decoder.norm, head

    def forward(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[rows, 1, hidden]`` -> logits, highest logit, its token."""
        logits = self.head(self.norm(x)[:, 0])[: rows.shape[0]]
        peak, best = logits.max(-1)
        return logits, peak.float(), best


class PrefillAttend:
    """The decoder's hook for prompt chunks: each segment attends to its own slot, up to itself."""

    def __init__(self, decoder: Decoder, cache: KVCache, segments: Sequence[Segment]) -> None:
        self.config, self.cache, self.segments = decoder.config, cache, segments
        weight = decoder.embed.weight
        self._bias = {
            (window, index): self._make_bias(window, segment, weight)
            for window in {self.config.window(layer) for layer in range(self.config.num_layers)}
            for index, segment in enumerate(segments)
        }

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` ``[1, tokens, heads, head_dim]`` -> same; ``tokens`` are the segments' one after another."""
        out, offset = [], 0
        for index, segment in enumerate(self.segments):
            part = slice(offset, offset + len(segment.tokens))
            end = segment.start + len(segment.tokens)
            keys, values = self.cache.keys[layer][segment.slot], self.cache.values[layer][segment.slot]
            keys[:, segment.start : end] = k[0, part].transpose(0, 1)
            values[:, segment.start : end] = v[0, part].transpose(0, 1)
            bias = self._bias[self.config.window(layer), index]
            out.append(chunk_attention(q[:, part], keys[None, :, :end], values[None, :, :end], bias))
            offset = part.stop
        return torch.cat(out, 1)

    def _make_bias(self, window: int | None, segment: Segment, like: Tensor) -> Tensor:
        """``[1, 1, group * tokens, end]``: 0 where a query sees a key, -inf elsewhere."""
        count, end = len(segment.tokens), segment.start + len(segment.tokens)
        distance = torch.arange(segment.start, end, device=like.device)[:, None] - torch.arange(end, device=like.device)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        bias = torch.zeros(count, end, dtype=like.dtype, device=like.device).masked_fill(~seen, float("-inf"))
        return bias.repeat(self.config.num_heads // self.config.num_kv_heads, 1)[None, None]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """One query token per row. ``q`` ``[rows, 1, heads, head_dim]``, ``k``/``v`` ``[rows, kv_heads, n, head_dim]``.

    The query heads that share a key head become query *positions* of it: the CPU kernel then reads each key once
    instead of once per head (several times faster than ``enable_gqa``). A lone query is doubled, because the kernel
    for one row is half as fast as that for two.
    """
    rows, _, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    folded = q.view(rows, kv_heads, group, dim)
    if group == 1:
        folded = folded.expand(rows, kv_heads, 2, dim)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias.expand(rows, 1, folded.shape[2], k.shape[2]))
    return out[:, :, :group].reshape(rows, 1, heads, dim)


def unrolled_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`grouped_attention` written out for the compiler: one loop over the keys, one over the values.

    Each query head of a group is an expression of its own; the compiler fuses them, so that a key is loaded and
    widened once for all of them. The GEMMs in the library's kernel are made for more rows than a group has: this takes
    half its time. Everything in fp32.
    """
    rows, _, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.view(rows, kv_heads, heads // kv_heads, dim).unbind(2)
    scores = [(one[:, :, None].float() * k.float()).sum(-1) * dim**-0.5 + bias[:, 0] for one in grouped]
    weights = [(one - one.amax(-1, keepdim=True)).exp() for one in scores]
    out = [(one[..., None] * v.float()).sum(2) / one.sum(-1, keepdim=True) for one in weights]
    return torch.stack(out, 2).to(q.dtype).reshape(rows, 1, heads, dim)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``q`` ``[1, s, heads, head_dim]``, ``k``/``v`` ``[1, kv_heads, n, head_dim]``, ``bias`` ``[1, 1, group * s, n]``."""
    _, count, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    folded = q.view(count, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * count, dim)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias)
    return out.view(kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(1, count, heads, dim)


def _dynamic(dim: int, *tensors: Tensor) -> None:
    """Tell the compiler that ``dim`` varies (a size of 1 stays a graph of its own)."""
    for tensor in tensors:
        if tensor.shape[dim] != 1:
            torch._dynamo.mark_dynamic(tensor, dim)
