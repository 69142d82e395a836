"""Operations the backend puts into graphs, opaque to the compiler: frozen linears and the loss without logits."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ridgeline.kernels import cross_entropy as kernel

_library = torch.library.Library("ridgeline", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "frozen_linear(Tensor x, Tensor[] weights, Tensor[] biases, bool transposed) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


class PackedWeights:
    """Weights in oneDNN's blocked layout, kept as long as the weights live, made anew when one of them changed.

    A change is seen by the tensor's version, which every in-place operation raises (optimisers, ``load_state_dict``).
    Writes through ``.data`` do not raise it.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[int, ...], tuple[tuple[int, ...], Tensor, Tensor | None]] = {}

    def get(self, weights: list[Tensor], biases: list[Tensor], transposed: bool) -> tuple[Tensor, Tensor | None]:
        """(all weights below each other as one packed matrix, their biases as one vector)."""
        sources = [*weights, *biases]
        key, versions = tuple(map(id, sources)), tuple([t._version for t in sources])
        found = self._packed.get(key)
        if found is None or found[0] != versions:
            found = self._packed[key] = (versions, *self._pack(weights, biases, transposed))
            for one in sources:
                weakref.finalize(one, self._packed.pop, key, None)
        return found[1], found[2]

    @staticmethod
    def _pack(weights: list[Tensor], biases: list[Tensor], transposed: bool) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode(False), torch.no_grad():
            rows = [w.detach().t() if transposed else w.detach() for w in weights]
            packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(rows) if len(rows) > 1 else rows[0].contiguous())
            return packed, torch.cat([b.detach() for b in biases]) if biases else None


_packs = PackedWeights()


def _frozen_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor], transposed: bool) -> Tensor:
    packed, bias = _packs.get(weights, biases, transposed)
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return out


def _frozen_linear_shape(x: Tensor, weights: list[Tensor], biases: list[Tensor], transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[1 if transposed else 0] for w in weights))


_library.impl("frozen_linear", _frozen_linear, "CPU")  # type: ignore[no-untyped-call]
_library.impl("frozen_linear", _frozen_linear_shape, "Meta")  # type: ignore[no-untyped-call]


@torch.library.custom_op("ridgeline::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss of ``x`` ``[rows, dim]`` against ``target`` ``[rows]``, and its gradients (empty unless ``with_grad``)."""
    ignored = -100
    chunk, counted = kernel.chunk_rows(x.shape[0], weight.shape[0]), (target != ignored).sum()
    if not with_grad:
        loss = kernel.loss_only(x, weight, bias, target, ignored, chunk) / counted
        return loss, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    loss, d_x, d_weight, d_bias = kernel.loss_and_gradients(x, weight, bias, target, ignored, chunk)
    return loss / counted, d_x / counted, d_weight / counted, x.new_empty(0) if d_bias is None else d_bias / counted


@linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, with_grad: bool) -> Any:
    grads = [torch.empty_like(t) if with_grad and t is not None else x.new_empty(0) for t in (x, weight, bias)]
    return x.new_empty((), dtype=torch.float32), *grads


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.has_bias = inputs[3] is not None


def _scale(ctx: Any, d_loss: Tensor, *_: Any) -> Any:
    d_x, d_weight, d_bias = (kept * d_loss.to(kept.dtype) for kept in ctx.saved_tensors)
    return d_x, d_weight, None, d_bias if ctx.has_bias else None, None


linear_cross_entropy.register_autograd(_scale, setup_context=_keep)
