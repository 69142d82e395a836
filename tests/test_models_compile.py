"""The decoder under torch.compile: one graph, the same numbers, one compiled form for all layers."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ridgeline.config import ModelSection
from ridgeline.models import Decoder, config_from_section


def make(family: str, **fields) -> Decoder:
    torch.manual_seed(0)
    fields = {"layers": 3} | fields
    section = ModelSection(family=family, hidden=32, heads=4, context_length=64, vocab_size=67, **fields)
    return Decoder(config_from_section(section))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(0, 67, (2, 24), generator=draw) for _ in range(2))
    targets[0, :5] = -100
    return tokens, targets


@pytest.mark.slow
def test_whole_loss_compiles_to_one_graph_with_equal_gradients():
    """Inductor, fullgraph: forward, chunked cross-entropy and backward of a GQA model in fp32."""
    model = make("llama", kv_heads=2, layers=1)
    eager = model.loss(*batch())
    expected = torch.autograd.grad(eager, list(model.parameters()))
    compiled = torch.compile(model.loss, fullgraph=True)(*batch())
    got = torch.autograd.grad(compiled, list(model.parameters()))
    assert torch.allclose(eager, compiled, rtol=1e-5)
    for a, b in zip(expected, got, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gptj"])
def test_no_graph_breaks_and_one_form_for_all_layers(family):
    whole, blocks, model = CompileCounter(), CompileCounter(), make(family)
    expected = model.loss(*batch())
    assert torch.allclose(torch.compile(model.loss, backend=whole, fullgraph=True)(*batch()), expected, rtol=1e-5)
    assert whole.frame_count == 1
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=blocks, fullgraph=True)
    assert torch.allclose(model.loss(*batch()), expected, rtol=1e-5)
    assert blocks.frame_count == 1


def test_the_hook_is_traced_too():
    model, seen = make("llama"), CompileCounter()

    def attend(layer, q, k, v):
        return v * (layer + 1)

    compiled = torch.compile(model, backend=seen, fullgraph=True)
    assert torch.allclose(compiled(batch()[0], None, attend), model(batch()[0], None, attend), rtol=1e-5, atol=1e-5)


def test_a_model_made_on_meta_gets_its_buffers_back():
    model = make("llama")
    with torch.device("meta"):
        other = Decoder(model.config)
    assert other.inv_freq.is_meta
    other = other.to_empty(device="cpu")
    other.init_buffers()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batch()[0]), model(batch()[0]))
    assert "inv_freq" not in model.state_dict()


def test_bf16_weights_keep_rotary_frequencies_in_fp32():
    """Casting a model must not cast its frequencies: positions of a few thousand would lose their last digits."""
    model = make("llama")
    exact = model.inv_freq.clone()
    half = make("llama").bfloat16()
    assert half.embed.weight.dtype == torch.bfloat16
    assert half.inv_freq.dtype == torch.float32 and torch.equal(half.inv_freq, exact)
