"""bf16 linears with weights in oneDNN's own blocked layout: the same numbers, read once and in order.

`F.linear` on a plain bf16 weight re-blocks it at every call, which for the few rows of a decode step costs more than
the product itself. `torch.ops.mkldnn._reorder_linear_weight` does it once. This is a format, not a quantisation: every
product is the same, and the error to float64 is that of `F.linear`.

It also makes answers independent of the batch: with two rows or more, a row's bits do not depend on how many rows are
computed with it (a single row takes another kernel, which splits the sum differently for wide inputs). So one row is
computed as four, which costs the same: the weights are what takes the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ridgeline.models.decoder import Decoder

MIN_ROWS = 4
MIN_GAIN = 1.0  # of the times summed over DECODE_ROWS; a tie goes to plain
DECODE_ROWS = (1, 8)
SAMPLE_BYTES = 64 * 2**20  # weights used by the measurement: more than most caches, little time

_library = torch.library.Library("ridgeline", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "packed_linear(Tensor x, Tensor packed, Tensor? bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if rows >= 2:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
        return out
    padded = x.reshape(1, -1).expand(MIN_ROWS, -1).contiguous()
    out = torch.ops.mkldnn._linear_pointwise.default(padded, packed, bias, "none", [], "")
    return out[:1].clone().view(*x.shape[:-1], -1)


def _packed_linear_shape(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


# The weight is an opaque oneDNN tensor, so that is where a call is dispatched to.
for _key, _kernel in (("CPU", _packed_linear), ("MkldnnCPU", _packed_linear), ("Meta", _packed_linear_shape)):
    _library.impl("packed_linear", _kernel, _key)  # type: ignore[no-untyped-call]


class PackedLinear(nn.Module):
    """A linear with its weight in oneDNN's layout. ``x`` ``[..., in]`` bf16 -> ``[..., out]``. Inference only."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bytes = weight.numel() * weight.element_size()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        out: Tensor = torch.ops.ridgeline.packed_linear(x, self.packed, self.bias)
        return out


@dataclass(frozen=True)
class PackDecision:
    """Whether packing pays here, and the measurement that says so (seconds for the sampled linears, per rows)."""

    packed: bool
    reason: str
    plain_seconds: dict[int, float] = field(default_factory=dict)
    packed_seconds: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def available(weight: Tensor) -> str | None:
    """None when `PackedLinear` can hold ``weight`` on this machine, else the reason why not."""
    if weight.device.type != "cpu":
        return f"weights on {weight.device.type}"
    if weight.dtype != torch.bfloat16:
        return f"weights in {str(weight.dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # type: ignore[no-untyped-call]
        return "no oneDNN bf16 on this CPU"
    return None


def linears(decoder: Decoder) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, attribute name, linear) of every linear inside the blocks."""
    for block in decoder.blocks:
        for module in block.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    yield module, name, child


def decide(decoder: Decoder, rows: tuple[int, ...] = DECODE_ROWS) -> PackDecision:
    """Time plain against packed on some of the decoder's own linears, interleaved, for decode-sized inputs.

    Takes some tenths of a second; leaves the decoder as it is.
    """
    missing = available(decoder.embed.weight)
    if missing:
        return PackDecision(False, missing)
    weights = _sampled(decoder)
    packs = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in weights]
    plain: dict[int, float] = {}
    packed: dict[int, float] = {}
    with torch.inference_mode():
        for count in rows:
            inputs = [torch.ones(count, weight.shape[1], dtype=weight.dtype) for weight in weights]
            plain[count], packed[count] = _interleaved(
                partial(_each, F.linear, inputs, weights), partial(_each, _packed, inputs, packs)
            )
    gains = {count: plain[count] / packed[count] for count in rows}
    better = sum(plain.values()) > MIN_GAIN * sum(packed.values())
    text = ", ".join(f"{gain:.2f}x at {count} rows" for count, gain in gains.items())
    return PackDecision(better, f"packed against plain: {text}", plain, packed)


def pack_decoder(decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """Replace every linear of the blocks, one at a time, and return the packed head (hidden -> logits).

    A tied embedding is needed in both layouts: as a table for the lookup and packed for the head. The decoder's own
    ``logits`` of an untied head is gone with its plain weight.
    """
    for parent, name, linear in list(linears(decoder)):
        setattr(parent, name, PackedLinear(linear.weight, linear.bias))
    head = PackedLinear(decoder.head_weight, decoder.head_bias)
    if decoder.head is not None:
        decoder.head = head  # type: ignore[assignment]
    return head


def _sampled(decoder: Decoder) -> list[Tensor]:
    """The linears of the first blocks, up to `SAMPLE_BYTES`."""
    chosen: list[Tensor] = []
    for _, _, linear in linears(decoder):
        if sum(w.numel() * 2 for w in chosen) + linear.weight.numel() * 2 > SAMPLE_BYTES and chosen:
            break
        chosen.append(linear.weight.detach())
    return chosen


def _packed(x: Tensor, packed: Tensor) -> Tensor:
    return _packed_linear(x, packed, None)


def _each(linear: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], weights: list[Tensor]) -> None:
    for x, weight in zip(inputs, weights, strict=True):
        linear(x, weight)


def _interleaved(a: Callable[[], Any], b: Callable[[], Any], rounds: int = 7) -> tuple[float, float]:
    """Best seconds of each, in alternating order, after one run of both: a neighbour's load only ever adds."""
    samples: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for index in (0, 1) if round_ % 2 else (1, 0):
            started = time.perf_counter()
            (a, b)[index]()
            if round_:
                samples[index].append(time.perf_counter() - started)
    return min(samples[0]), min(samples[1])
