"""Blocked attention against float64, and where the dispatcher uses it."""

from __future__ import annotations

import pytest
import torch

from ridgeline.kernels import attention as room
from ridgeline.kernels.attention import attention, reference
from ridgeline.kernels.blocked_attention import BLOCK_ROWS, blocked_attention


def errors(function, inputs, grad, exact, window):
    """Relative errors of the output and the three gradients against float64."""
    out = function(*inputs, window)
    made = (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(made, exact, strict=True)]


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, None)])
@pytest.mark.parametrize(
    "batch, seq, heads, kv_heads, dim, window",
    [
        (2, 300, 4, 2, 32, None),
        (1, 300, 4, 1, 24, 70),
        (2, 1, 2, 2, 16, None),
        (1, 128, 3, 3, 80, None),
        (1, 257, 2, 2, 64, 1),
    ],
)
def test_output_and_gradients_are_as_near_to_float64_as_torchs_own(
    batch, seq, heads, kv_heads, dim, window, dtype, limit
):
    torch.manual_seed(seq)
    exact_inputs = [
        torch.randn(batch, seq, h, dim, dtype=torch.float64).to(dtype).double() for h in (heads, kv_heads, kv_heads)
    ]
    for tensor in exact_inputs:
        tensor.requires_grad_()
    grad = torch.randn(batch, seq, heads, dim, dtype=torch.float64)
    out = reference(*exact_inputs, window)
    exact = (out, *torch.autograd.grad(out, exact_inputs, grad))
    if any(tensor.norm() == 0 for tensor in exact):
        exact = tuple(tensor + 1e-30 for tensor in exact)
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in exact_inputs]
    ours = errors(blocked_attention, inputs, grad, exact, window)
    if seq == 1 or window == 1:  # q and k have no effect: their gradient is zero and only its size can be judged
        ours = [ours[0], ours[3]]
        assert max(ours) < (limit or 0.01)
        return
    torchs = errors(attention, inputs, grad, exact, window)
    for mine, theirs in zip(ours, torchs, strict=True):
        assert mine < (limit or 2 * theirs)


def test_no_row_sees_the_future():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2 * BLOCK_ROWS + 5, 2, 16) for _ in range(3))
    before = blocked_attention(q, k, v)
    cut = BLOCK_ROWS + 3
    k[:, cut:], v[:, cut:] = 9.0, -9.0
    after = blocked_attention(q, k, v)
    assert torch.equal(before[:, :cut], after[:, :cut]) and not torch.equal(before[:, cut:], after[:, cut:])


@pytest.mark.parametrize(
    "allowed, seq, blocked", [(True, 512, True), (False, 512, False), (True, 64, False), (True, 1025, False)]
)
def test_the_dispatcher_blocks_compiled_long_sequences_where_allowed(allowed, seq, blocked):
    seen = []

    def backend(graph, _):
        seen.append(str(graph.graph))
        return graph.forward

    q = torch.randn(1, seq, 2, 16)
    torch.compile(attention, backend=backend, fullgraph=True)(q, q, q, None, allowed)
    assert ("scaled_dot_product_attention" not in seen[0]) == blocked


def test_it_pays_where_there_are_no_matrix_units(monkeypatch):
    for features, pays in (({"amx_tile": True}, False), ({"amx_tile": False}, True), ({}, True), (None, True)):
        monkeypatch.setattr(room, "cpu_inventory", lambda features=features: {"features": features})
        assert room.blocked_pays.__wrapped__() == pays


def test_compiled_it_keeps_no_scores_for_the_backward_pass():
    seq, kept = 4 * BLOCK_ROWS, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, v = (torch.randn(2, seq, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.compile(blocked_attention)(q, k, v)
    # q, k, v, the output (a copy may come of a change of layout) and the fp32 log-sum-exp of every row.
    assert sum(kept.values()) <= 7 * q.nbytes + 4 * 2 * 2 * seq
