"""Operations against float64 references, their byte and FLOP counts against tensors and torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ridgeline.kernels import attention, cross_entropy, gelu, layer_norm, rms_norm, rope, swiglu


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS = draw(48, seed=1), draw(48, seed=2)
ANGLES = torch.arange(7.0, dtype=torch.float64)[None], draw(8, seed=3).abs()
OPERATIONS = {
    "rms_norm": (
        lambda x: rms_norm.rms_norm(x, WEIGHT.to(x.dtype), 1e-5),
        lambda x: rms_norm.reference(x, WEIGHT, 1e-5),
        (5, 48),
    ),
    "layer_norm": (
        lambda x: layer_norm.layer_norm(x, WEIGHT.to(x.dtype), BIAS.to(x.dtype), 1e-5),
        lambda x: layer_norm.reference(x, WEIGHT, BIAS, 1e-5),
        (5, 48),
    ),
    "layer_norm-no-bias": (
        lambda x: layer_norm.layer_norm(x, WEIGHT.to(x.dtype), None, 1e-5),
        lambda x: layer_norm.reference(x, WEIGHT, None, 1e-5),
        (5, 48),
    ),
    "swiglu": (swiglu.swiglu, swiglu.reference, (5, 48)),
    "gelu": (lambda x: gelu.gelu(x, False), lambda x: gelu.reference(x, False), (5, 48)),
    "gelu-tanh": (lambda x: gelu.gelu(x, True), lambda x: gelu.reference(x, True), (5, 48)),
    "rope-half": (
        lambda x: rope.rotate(x, *rope.cos_sin(ANGLES[0], ANGLES[1].float(), 1.0, x.dtype)),
        lambda x: rope.reference(x, *ANGLES),
        (2, 7, 3, 16),
    ),
    "rope-interleaved": (
        lambda x: rope.rotate(x, *rope.cos_sin(ANGLES[0], ANGLES[1].float(), 1.0, x.dtype), interleaved=True),
        lambda x: rope.reference(x, *ANGLES, interleaved=True),
        (2, 7, 3, 16),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_and_gradient_match_float64(name):
    operation, reference, shape = OPERATIONS[name]
    exact = draw(*shape).requires_grad_()
    expected = reference(exact)
    upstream = draw(*expected.shape, seed=9)
    (expected_grad,) = torch.autograd.grad(expected, exact, upstream)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        x = exact.detach().to(dtype).requires_grad_()
        out = operation(x)
        (grad,) = torch.autograd.grad(out, x, upstream.to(dtype))
        assert out.dtype == dtype
        assert relative(out, expected) < limit and relative(grad, expected_grad) < limit


def test_partial_rotation_passes_the_rest_and_keeps_distance():
    """Only the first dims turn; a product of rotated q and k depends on the distance of their positions alone."""
    frequencies, x = ANGLES[1].float()[:4], draw(1, 2, 1, 16).float()
    products = []
    for offset in (0, 11):
        positions = torch.tensor([[3 + offset, 7 + offset]])
        turned = rope.rotate(x, *rope.cos_sin(positions, frequencies, 1.0, torch.float32))
        assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.equal(turned[..., :8], x[..., :8])
        products.append((turned[0, 0] * turned[0, 1]).sum())
    assert torch.allclose(*products, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_matches_float64(window, kv_heads):
    exact = [draw(2, 17, heads, 8, seed=heads + i) for i, heads in enumerate((4, kv_heads, kv_heads))]
    expected = attention.reference(*exact, window)
    assert relative(attention.attention(*(x.float() for x in exact), window), expected) < 1e-6
    half = [x.bfloat16() for x in exact]
    assert relative(attention.attention(*half, window), expected) < 0.01


def test_attention_flops_equal_the_pairs_the_mask_leaves():
    for seq, window in ((1, None), (9, None), (9, 4), (9, 20), (16, 1)):
        assert attention.pairs(seq, window) == int(attention.causal_mask(seq, window, torch.device("cpu")).sum())
    assert attention.flops(2, 9, 4, 8, 4) == 4 * 2 * 4 * 8 * attention.pairs(9, 4)


def test_bytes_are_those_of_the_tensors():
    x, w = torch.zeros(6, 48, dtype=torch.bfloat16), torch.zeros(48, dtype=torch.bfloat16)
    assert rms_norm.bytes_moved(6, 48) == sum(t.nbytes for t in (x, w, rms_norm.rms_norm(x, w, 1e-5)))
    assert layer_norm.bytes_moved(6, 48) == sum(t.nbytes for t in (x, w, w, layer_norm.layer_norm(x, w, w, 1e-5)))
    assert swiglu.bytes_moved(6, 24) == x.nbytes + swiglu.swiglu(x).nbytes
    assert gelu.bytes_moved(6, 48) == x.nbytes + gelu.gelu(x, True).nbytes
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 5, 2, 8)
    assert attention.bytes_moved(2, 5, 4, 2, 8, itemsize=4) == 2 * q.nbytes + 2 * k.nbytes
    cos, sin = rope.cos_sin(torch.zeros(2, 5), torch.zeros(3), 1.0, torch.float32)
    assert rope.bytes_moved(10, 4, 8, 6, itemsize=4) == q.nbytes * 2 + cos.nbytes + sin.nbytes


def cross_entropy_inputs(dtype: torch.dtype, rows: int = 300, vocab: int = 97) -> tuple[torch.Tensor, ...]:
    hidden, weight, bias = draw(rows, 32), draw(vocab, 32, seed=1) * 0.3, draw(vocab, seed=2) * 0.3
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(3))
    targets[::7] = -100
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return (*leaves, targets)


def gradients(function, dtype):
    hidden, weight, bias, targets = cross_entropy_inputs(dtype)
    loss = function(hidden, weight, targets, bias)
    return loss, torch.autograd.grad(loss * 0.37, (hidden, weight, bias))


def test_cross_entropy_gradients_within_twice_torchs_own_bf16_error(monkeypatch):
    """Several chunks and pieces, ignored rows, a bias, an upstream scale; inputs rounded to bf16 first."""
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 64)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(cross_entropy, "PIECE_ROWS", 20)
    rounded = [x.bfloat16().double().requires_grad_() for x in cross_entropy_inputs(torch.float64)[:3]]
    targets = cross_entropy_inputs(torch.float64)[3]
    exact = cross_entropy.reference(rounded[0], rounded[1], targets, rounded[2])
    exact_grads = torch.autograd.grad(exact * 0.37, rounded)
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 0.0)):
        ours, our_grads = gradients(cross_entropy.linear_cross_entropy, dtype)
        plain, plain_grads = gradients(cross_entropy.reference, dtype)
        assert ours.dtype == torch.float32
        if dtype == torch.float32:
            exact32, exact32_grads = gradients(cross_entropy.reference, torch.float64)
            assert relative(ours, exact32) < slack
            assert all(relative(a, b) < slack for a, b in zip(our_grads, exact32_grads, strict=True))
            continue
        assert relative(ours, exact) <= max(2 * relative(plain, exact), 1e-4)
        for mine, theirs, truth in zip(our_grads, plain_grads, exact_grads, strict=True):
            assert mine.dtype == dtype and relative(mine, truth) <= 2 * relative(theirs, truth)


def test_cross_entropy_where_the_model_is_sure():
    """p - 1 is not lost to rounding: the gradient of a nearly certain bf16 row keeps its leading digits."""
    hidden = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    cross_entropy.linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    expected = torch.sigmoid(torch.tensor(8.0, dtype=torch.float64)) - 1
    assert hidden.grad is not None and relative(hidden.grad[0, 0], expected) < 0.01


def test_cross_entropy_reductions_and_ignored_rows():
    hidden, weight, bias, targets = cross_entropy_inputs(torch.float32)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    mean = cross_entropy.linear_cross_entropy(hidden, weight, targets, bias, reduction="mean")
    assert torch.allclose(mean, expected, rtol=1e-5)
    shaped = hidden.reshape(3, 100, 32), weight, targets.reshape(3, 100), bias
    total = cross_entropy.linear_cross_entropy(*shaped)
    with torch.no_grad():
        assert torch.allclose(cross_entropy.linear_cross_entropy(*shaped), total, rtol=1e-6)
    other = torch.where(targets == -100, 5, targets)
    assert torch.allclose(
        cross_entropy.linear_cross_entropy(hidden, weight, other, bias, ignore_index=5),
        F.cross_entropy(F.linear(hidden, weight, bias), other, reduction="sum", ignore_index=5),
    )
    nothing = cross_entropy.linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    (grad,) = torch.autograd.grad(nothing, hidden)
    assert nothing == 0 and not grad.any()
    with pytest.raises(ValueError, match="reduction"):
        cross_entropy.linear_cross_entropy(hidden, weight, targets, reduction="none")
    first = torch.autograd.grad(total**2, hidden, create_graph=True)[0].sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.backward()


class LargestTensor(TorchDispatchMode):
    """The most elements any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_cross_entropy_never_holds_all_logits():
    rows, vocab = 2048, 16384
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, targets = torch.randn(vocab, 8), torch.randint(0, vocab, (rows,))
    with LargestTensor() as ours:
        cross_entropy.linear_cross_entropy(hidden, weight, targets).backward()
    assert ours.elements <= cross_entropy.CHUNK_ELEMENTS == rows * vocab // 4


def test_cross_entropy_flops_are_those_torch_counts():
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.randint(0, 64, (40,))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        cross_entropy.linear_cross_entropy(hidden, weight, targets)
    with FlopCounterMode(display=False) as both:
        cross_entropy.linear_cross_entropy(hidden, weight, targets).backward()
    assert forward.get_total_flops() == cross_entropy.flops(40, 16, 64, backward=False)
    assert both.get_total_flops() == cross_entropy.flops(40, 16, 64)
