"""Every pattern: three spellings, random and power-of-two inputs, gradients, changing batch sizes, five near misses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ridgeline.compiler.backend import PATTERNS, watch
from ridgeline.compiler.backend.match import rewrite
from ridgeline.compiler.internals.graphs import trace

EVERYWHERE = {"patterns": "all", "freeze": False, "inner": "aot_eager"}
Function = Callable[..., Any]


@dataclass
class Family:
    """Shapes of the inputs (a batch of 4 first, where there is one), ways to write it, and what only looks like it."""

    shapes: tuple[tuple[int, ...], ...]
    spellings: tuple[Function, ...]
    misses: tuple[Function, ...]
    integers: tuple[int, ...] = ()  # inputs that are indices below their value
    batched: tuple[int, ...] = (0,)  # inputs whose first dim is the batch


def rms_chain(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def rms_nested(x, w):
    return torch.mul(w, torch.div(x, torch.sqrt(torch.add(torch.mean(torch.square(x), dim=2, keepdim=True), 1e-5))))


def rms_summed(x, w):
    high = x.float()
    return w * (high * ((high * high).sum(-1, keepdim=True) / 16 + 1e-6) ** -0.5).type_as(x)


def layer_var(x, w, b):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * w + b


def layer_centred(x, w, b):
    c = x - x.mean(dim=-1, keepdim=True)
    return b + w * (c * torch.rsqrt((c * c).mean(-1, keepdim=True) + 1e-5))


def layer_functions(x, w, b):
    c = torch.sub(x, torch.mean(x, 2, True))
    return torch.add(torch.mul(torch.mul(c, torch.pow(torch.pow(c, 2).mean(-1, True) + 1e-6, -0.5)), w), b)


def rope_halves(x, c, s):
    half = x.shape[-1] // 2
    return x * c + torch.cat((-x[..., half:], x[..., :half]), -1) * s


def rope_chunks(x, c, s):
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((torch.neg(second), first), dim=-1) * s + c * x


def rope_split(x, c, s):
    first, second = x.split(8, 3)
    return torch.add(torch.mul(torch.cat([-1 * second, first], 3), s), torch.mul(x, c))


def narrow_halves(x, c, s):
    first, second = x[..., :8], x[..., 8:]
    return torch.cat((first * c - second * s, second * c + first * s), -1)


def narrow_chunks(x, c, s):
    first, second = x.chunk(2, -1)
    return torch.cat([c * first - s * second, first * s + second * c], dim=3)


def narrow_functions(x, c, s):
    first, second = torch.split(x, 8, -1)
    turned = torch.sub(torch.mul(first, c), torch.mul(second, s)), torch.add(torch.mul(second, c), torch.mul(first, s))
    return torch.concat(turned, -1)


def heads(q, k, v):
    return F.softmax(q @ k.transpose(2, 3) / 4, dim=-1) @ v


def heads_masked(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(2)
    scores = torch.einsum("bhqd,bhkd->bhqk", q * 16**-0.5, k).masked_fill(hidden, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("xyij,xyjz->xyiz", weights / weights.sum(-1, keepdim=True), v)


def heads_grouped(q, k, v):
    batch, groups, length, width = k[:, :2].shape
    k, v = (t[:, :2, None].expand(batch, groups, 2, length, width).reshape(batch, 4, length, width) for t in (k, v))
    bias = torch.ones(q.shape[2], length).triu(1) * -3.0
    scores = torch.matmul(q, k.mT) * 0.3 + bias
    return torch.matmul(F.dropout(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), 0.0), v)


def int8_after(x, w, s):
    return F.linear(x, w.to(x.dtype)) * s


def int8_rows(x, w, s):
    return F.linear(x, w.type_as(x) * s[:, None])


def int8_matmul(x, w, s):
    return s * torch.matmul(x, w.to(torch.float32).t())


def silu(x):
    return x * torch.sigmoid(x)


def nll(x, t):
    return F.nll_loss(F.log_softmax(x, -1), t)


def nll_gather(x, t):
    return -torch.log(torch.softmax(x, 1)).gather(1, t.unsqueeze(1)).squeeze(1).mean()


def nll_logsumexp(x, t):
    return (x.logsumexp(-1) - x.gather(-1, t[:, None])[:, 0]).mean()


GATED = ((4, 3, 16), (4, 3, 16))
FAMILIES = {
    "rms_norm": Family(
        ((4, 3, 16), (16,)),
        (rms_chain, rms_nested, rms_summed),
        (
            lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w,
            lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w,
            lambda x, w: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6) * w,
            lambda x, w: (x * (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * w, r),
            lambda x, w: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        ),
    ),
    "layer_norm": Family(
        ((4, 3, 16), (16,), (16,)),
        (layer_var, layer_centred, layer_functions),
        (
            lambda x, w, b: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * w + b,
            lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5) * w + b,
            lambda x, w, b: (
                (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1) * w + b
            ),
            lambda x, w, b: (
                (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1) * w - b
            ),
            lambda x, w, b: (
                (x - x.amax(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1) * w + b
            ),
        ),
    ),
    "rope": Family(
        ((4, 2, 3, 16), (3, 16), (3, 16)),
        (rope_halves, rope_chunks, rope_split),
        (
            lambda x, c, s: x * c + torch.cat((x[..., 8:], x[..., :8]), -1) * s,
            lambda x, c, s: x * c + torch.cat((-x[..., 4:], x[..., :4]), -1) * s,
            lambda x, c, s: x * c - torch.cat((-x[..., 8:], x[..., :8]), -1) * s,
            lambda x, c, s: x * c + torch.cat((-x[..., :8], x[..., 8:]), -1) * s,
            lambda x, c, s: x * c + torch.cat((-c[..., 8:], c[..., :8]), -1) * s,
        ),
    ),
    "rope_half": Family(
        ((4, 2, 3, 16), (3, 8), (3, 8)),
        (narrow_halves, narrow_chunks, narrow_functions),
        (
            lambda x, c, s: torch.cat((x[..., :8] * c + x[..., 8:] * s, x[..., 8:] * c + x[..., :8] * s), -1),
            lambda x, c, s: torch.cat((x[..., ::2] * c - x[..., 1::2] * s, x[..., 1::2] * c + x[..., ::2] * s), -1),
            lambda x, c, s: torch.cat((x[..., 8:] * c + x[..., :8] * s, x[..., :8] * c - x[..., 8:] * s), -1),
            lambda x, c, s: torch.cat((x[..., :8] * c - x[..., 8:] * c, x[..., 8:] * c + x[..., :8] * s), -1),
            lambda x, c, s: torch.stack((x[..., :8] * c - x[..., 8:] * s, x[..., 8:] * c + x[..., :8] * s), -1),
        ),
    ),
    "swiglu": Family(
        GATED,
        (lambda g, u: F.silu(g) * u, lambda g, u: u * silu(g), lambda g, u: u * (g / (1 + torch.exp(-g)))),
        (
            lambda g, u: g * torch.sigmoid(1.5 * g) * u,
            lambda g, u: g * torch.sigmoid(u),
            lambda g, u: torch.relu(g) * u,
            lambda g, u: g / (2 + torch.exp(-g)) * u,
            lambda g, u: F.silu(g) + u,
        ),
        batched=(0, 1),
    ),
    "geglu": Family(
        GATED,
        (
            lambda g, u: F.gelu(g) * u,
            lambda g, u: 0.5 * g * (1 + torch.erf(g / 2**0.5)) * u,
            lambda g, u: u * (g * (0.5 * (1.0 + torch.erf(g * 0.7071067811865476)))),
        ),
        (
            lambda g, u: 0.5 * g * (1 + torch.erf(g / 2)) * u,
            lambda g, u: 0.5 * g * (1 + torch.erf(u / 2**0.5)) * u.exp(),
            lambda g, u: F.gelu(g) + u,
            lambda g, u: 0.5 * g * (1 + torch.tanh(g / 2**0.5)) * u,
            lambda g, u: F.gelu(g) * u[:, :1],
        ),
        batched=(0, 1),
    ),
    "geglu_tanh": Family(
        GATED,
        (
            lambda g, u: F.gelu(g, approximate="tanh") * u,
            lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u,
            lambda g, u: u * (g * 0.5 * (torch.tanh(0.7978845608028654 * (g + 0.044715 * (g * (g * g)))) + 1)),
        ),
        (
            lambda g, u: 0.5 * g * (1 + torch.tanh(0.8 * (g + 0.044715 * g**3))) * u,
            lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.04 * g**3))) * u,
            lambda g, u: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**2))) * u,
            lambda g, u: 0.5 * g * (1 - torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u,
            lambda g, u: F.gelu(g, approximate="tanh") + u,
        ),
        batched=(0, 1),
    ),
    "cross_entropy": Family(
        ((4, 11), (4,)),
        (nll, nll_gather, nll_logsumexp),
        (
            lambda x, t: -x.log_softmax(0).gather(1, t[:, None]).squeeze(1).mean(),
            lambda x, t: -x.log_softmax(1).gather(1, t[:, None]).squeeze(1).sum() / 7,
            lambda x, t: -x.softmax(1).gather(1, t[:, None]).squeeze(1).mean(),
            lambda x, t: (x.logsumexp(0) - x.gather(1, t[:, None])[:, 0].sum()).mean(),
            lambda x, t: -(2 * x).log_softmax(1)[:, 0].mean(),
        ),
        integers=(1,),
        batched=(0, 1),
    ),
    "linear_cross_entropy": Family(
        ((4, 8), (11, 8), (4,)),
        (
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
            lambda x, w, t: nll((x @ w.t()).float(), t),
            lambda x, w, t: F.cross_entropy(
                torch.matmul(x.view(2, -1, 8), w.T).reshape(-1, 11), t.view(2, -1).flatten()
            ),
        ),
        (
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t, label_smoothing=0.1),
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t, ignore_index=3),
            lambda x, w, t: F.cross_entropy(F.linear(x, w).tanh(), t),
            lambda x, w, t: F.cross_entropy(F.linear(x, w), t, weight=torch.ones(11)),
            lambda x, w, t: (F.cross_entropy(y := F.linear(x, w), t), y),
        ),
        integers=(2,),
        batched=(0, 2),
    ),
    "attention": Family(
        ((4, 4, 5, 16), (4, 4, 7, 16), (4, 4, 7, 16)),
        (heads, heads_masked, heads_grouped),
        (
            lambda q, k, v: F.softmax(q @ k.transpose(2, 3) / 4, dim=-2) @ v,
            lambda q, k, v: torch.sigmoid(q @ k.transpose(2, 3) / 4) @ v,
            lambda q, k, v: (p := F.softmax(q @ k.transpose(2, 3) / 4, dim=-1)) @ v + p.sum(),
            lambda q, k, v: F.softmax((q @ k.transpose(2, 3) / 4).masked_fill(q[..., :1] > 0, -5.0), -1) @ v,
            lambda q, k, v: F.dropout(F.softmax(q @ k.transpose(2, 3) / 4, dim=-1), 0.5) @ v,
        ),
        batched=(0, 1, 2),
    ),
}


def draw(family: Family, batch: int = 4, dtype: torch.dtype = torch.float32, powers: bool = False) -> list[Tensor]:
    """Inputs of a family; ``powers``: magnitudes that are powers of two, where products are exact."""
    made = []
    for index, shape in enumerate(family.shapes):
        shape = (batch, *shape[1:]) if index in family.batched else shape
        if index in family.integers:
            made.append(torch.randint(0, 11, shape))
            continue
        values = torch.randn(shape)
        values = values.sign() * 2.0 ** torch.randint(-2, 1, shape) if powers else values
        made.append(values.to(dtype).requires_grad_())
    return made


def varying(inputs: list[Tensor], batched: tuple[int, ...]) -> list[Tensor]:
    """Tell Dynamo that the batch varies."""
    for index in batched:
        torch._dynamo.mark_dynamic(inputs[index], 0)
    return inputs


def results(
    function: Function, inputs: list[Tensor], dtype: torch.dtype | None = None, batched: tuple[int, ...] = ()
) -> list[Tensor]:
    """Output and gradients of ``function`` with the inputs in ``dtype``."""
    inputs = [x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype) for x in inputs]
    inputs = varying([x.requires_grad_(x.is_floating_point()) for x in inputs], batched)
    out = function(*inputs)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x for x in inputs if x.requires_grad])]


def assert_as_exact(compiled: Function, eager: Function, inputs: list[Tensor], batched: tuple[int, ...] = ()) -> None:
    """The float64 rule: at most twice as far from float64 as eager, in norm, up to one rounding of the result."""
    exact = results(eager, inputs, torch.float64)
    for got, plain, true in zip(results(compiled, inputs, None, batched), results(eager, inputs), exact, strict=True):
        assert got.dtype == plain.dtype
        rounding = torch.finfo(got.dtype).eps * true.norm()
        assert (got.double() - true).norm() <= 2 * (plain.double() - true).norm() + rounding


def found(function: Function, inputs: list[Tensor], pattern: str) -> list[str | None]:
    """Refusals of the matches of ``pattern`` in ``function``, None for one that was replaced; no Dynamo."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        graph = trace(function, fakes)
    chosen = [p for p in PATTERNS if p.name == pattern]
    return [one.refused for one in rewrite(graph, chosen, "cpu", everywhere=True)]


@pytest.mark.parametrize(("name", "index"), [(name, i) for name in FAMILIES for i in range(3)])
def test_every_spelling_is_replaced_in_training_and_is_as_exact_as_eager(name, index):
    torch.manual_seed(0)
    torch._dynamo.reset()
    family = FAMILIES[name]
    function = family.spellings[index]
    compiled = torch.compile(function, backend="ridgeline", fullgraph=True, options=EVERYWHERE)
    with watch() as graphs:
        assert_as_exact(compiled, function, draw(family))
    assert next(one.pattern for one in graphs[0] if one.refused is None) == name
    assert_as_exact(compiled, function, draw(family, powers=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "swiglu", "rope", "attention"])
def test_bf16_is_as_exact_as_eager(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    family = FAMILIES[name]
    function = {"rms_norm": rms_summed, "attention": heads_grouped_bf16}.get(name, family.spellings[0])
    compiled = torch.compile(function, backend="ridgeline", fullgraph=True, options=EVERYWHERE)
    with watch() as graphs:
        assert_as_exact(compiled, function, draw(family, dtype=torch.bfloat16))
    assert [one.pattern for one in graphs[0] if one.refused is None] == [name]


def heads_grouped_bf16(q, k, v):
    k, v = (t[:, :2].repeat_interleave(2, dim=1) for t in (k, v))
    return F.softmax(q @ k.transpose(-2, -1) * 0.25, -1, dtype=torch.float32).to(q.dtype) @ v


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "linear_cross_entropy"])
def test_one_graph_serves_changing_batch_sizes(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    family = FAMILIES[name]
    compiled = torch.compile(family.spellings[0], backend="ridgeline", fullgraph=True, options=EVERYWHERE)
    with watch() as graphs:
        for batch in (4, 5, 7):
            assert_as_exact(compiled, family.spellings[0], draw(family, batch), family.batched)
    assert len(graphs) == 1
    assert next(one.pattern for one in graphs[0] if one.refused is None) == name


@pytest.mark.parametrize("name", FAMILIES)
def test_near_misses_are_left_alone(name):
    family = FAMILIES[name]
    assert len(family.misses) == 5
    inputs = draw(family)
    assert None in found(family.spellings[0], inputs, name)
    for number, miss in enumerate(family.misses):
        assert None not in found(miss, inputs, name), f"near miss {number}"


@pytest.mark.parametrize("spelling", [int8_after, int8_rows, int8_matmul])
def test_int8_linear_in_inference(spelling):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, s = torch.randn(3, 32), torch.rand(16)
    w = torch.randint(-127, 128, (16, 32), dtype=torch.int8)
    compiled = torch.compile(spelling, backend="ridgeline", fullgraph=True, options=EVERYWHERE)
    with torch.no_grad(), watch() as graphs:
        got = compiled(x, w, s)
    assert [one.pattern for one in graphs[0] if one.refused is None] == ["int8_linear"]
    exact = F.linear(x.double(), w.double() * s.double()[:, None])
    assert (got.double() - exact).norm() <= 2 * (spelling(x, w, s).double() - exact).norm()
    with watch() as graphs:
        torch.compile(spelling, backend="ridgeline", options=EVERYWHERE)(x.requires_grad_(), w, s)
    assert "training" in graphs[0][0].refused


@pytest.mark.parametrize(
    ("dtype", "rows", "applied"), [("bfloat16", 8, True), ("bfloat16", 9, False), ("float32", 1, False)]
)
def test_int8_is_applied_on_a_cpu_only_where_it_pays(dtype, rows, applied):
    torch._dynamo.reset()
    kind = getattr(torch, dtype)
    inputs = torch.randn(rows, 32).to(kind), torch.ones(16, 32, dtype=torch.int8), torch.rand(16).to(kind)
    with torch.no_grad(), watch() as graphs:
        torch.compile(int8_after, backend="ridgeline", options={"inner": "aot_eager"})(*inputs)
    assert (None in [one.refused for one in graphs[0]]) == applied


INT8_MISSES = (
    lambda x, w, s: F.linear(x, w.to(x.dtype)) + s,
    lambda x, w, s: F.linear(x, w.to(x.dtype).abs()) * s,
    lambda x, w, s: F.linear(x, w.to(torch.int16).to(x.dtype)) * s[:1],
    lambda x, w, s: F.linear(x, w.to(x.dtype) * x[:1]) * s.sum(),
    lambda x, w, s: (F.linear(x, w.to(x.dtype)) * s.double()).float(),
)


@pytest.mark.parametrize("miss", INT8_MISSES)
def test_int8_near_misses(miss):
    with torch.no_grad():
        inputs = [torch.randn(3, 32), torch.ones(16, 32, dtype=torch.int8), torch.rand(16)]
        assert None in found(int8_after, inputs, "int8_linear")
        assert None not in found(miss, inputs, "int8_linear")


DECODES = (
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b, enable_gqa=True, scale=0.3),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b > -1, enable_gqa=True),
)
DECODE_MISSES = (
    lambda q, k, v, b: F.scaled_dot_product_attention(q.expand(-1, -1, 2, -1), k, v, enable_gqa=True),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, enable_gqa=True),
    lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b.expand(-1, 4, -1, -1), enable_gqa=True),
    lambda q, k, v, b: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", range(3))
def test_decode_attention_in_inference(index, dtype):
    torch.manual_seed(0)
    torch._dynamo.reset()
    shapes = ((3, 4, 1, 16), (3, 2, 9, 16), (3, 2, 9, 16), (3, 1, 1, 9))
    compiled = torch.compile(DECODES[index], backend="ridgeline", fullgraph=True, options=EVERYWHERE)
    with torch.no_grad(), watch() as graphs:
        for batch in (3, 4, 6):
            inputs = varying([torch.randn(batch, *shape[1:]).to(dtype) for shape in shapes], (0, 1, 2, 3))
            exact = DECODES[index](*(x.double() for x in inputs))
            eager = DECODES[index](*inputs).double()
            assert (compiled(*inputs).double() - exact).norm() <= 2 * (eager - exact).norm()
    assert [one.pattern for one in graphs[0] if one.refused is None] == ["decode_attention"]
    assert len(graphs) == 1


def test_decode_near_misses():
    inputs = [torch.randn(3, 4, 1, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 1, 1, 9)]
    with torch.no_grad():
        assert None in found(DECODES[0], inputs, "decode_attention")
        for number, miss in enumerate(DECODE_MISSES):
            assert None not in found(miss, inputs, "decode_attention"), f"near miss {number}"


def test_an_in_place_operation_between_the_nodes_is_refused():
    def mutated(x, w):
        square = x.pow(2)
        x.mul_(2.0)
        return x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6) * w

    def before(x, w):
        x.mul_(2.0)
        return rms_chain(x, w)

    inputs = [torch.randn(4, 3, 16), torch.randn(16)]
    assert None not in found(mutated, inputs, "rms_norm")
    assert None in found(before, inputs, "rms_norm")
    torch._dynamo.reset()
    for function in (mutated, before):
        compiled = torch.compile(function, backend="ridgeline", fullgraph=True, options=EVERYWHERE)
        ours, theirs = inputs[0].clone(), inputs[0].clone()
        assert torch.allclose(compiled(ours, inputs[1]), function(theirs, inputs[1]), rtol=1e-5)
        assert torch.equal(ours, theirs)


def test_a_view_mutated_after_the_match_changes_nothing_in_it():
    def function(x, w):
        out = rms_chain(x, w)
        x.view(-1).zero_()
        return out + x

    torch._dynamo.reset()
    x, w = torch.randn(4, 3, 16), torch.randn(16)
    expected = function(x.clone(), w)
    with watch() as graphs:
        got = torch.compile(function, backend="ridgeline", fullgraph=True, options=EVERYWHERE)(x.clone(), w)
    assert graphs[0][0].refused is None
    assert torch.allclose(got, expected, rtol=1e-5)


def test_a_residual_sum_feeds_norm_and_stream():
    def function(x, r, w):
        h = x + r
        return rms_chain(h, w), h

    inputs = [torch.randn(4, 3, 16), torch.randn(4, 3, 16), torch.randn(16)]
    assert found(function, inputs, "rms_norm") == [None]


def test_replacements_keep_the_source_line():
    def function(x, w):
        return rms_chain(x, w).sum()

    torch._dynamo.reset()
    with watch() as graphs:
        torch.compile(function, backend="ridgeline", options=EVERYWHERE)(torch.randn(2, 3, 16), torch.randn(16))
    assert graphs[0][0].where.startswith(f'File "{__file__}"')
    assert "rms_chain" in graphs[0][0].where
