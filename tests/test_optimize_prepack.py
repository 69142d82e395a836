"""Prepacked linears: exact against float64, the same bits for any number of rows, and the measured decision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ridgeline.models import Decoder, DecoderConfig
from ridgeline.optimize.prepack import PackedLinear, available, decide, linears, pack_decoder

bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no oneDNN bf16 on this CPU")
CONFIG = DecoderConfig("qwen2", 300, 64, 2, 4, 2, 16, 256, 128, rope_dim=16, qkv_bias=True, tie_embeddings=False)


def make(out: int, inner: int, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + inner)
    weight = (torch.randn(out, inner, generator=generator) * 0.05).bfloat16()
    x = torch.randn(200, inner, generator=generator).bfloat16()
    return weight, (torch.randn(out, generator=generator).bfloat16() if bias else None), x


@bf16
@pytest.mark.parametrize(("out", "inner"), [(960, 576), (576, 1536), (1000, 2048), (40, 24), (3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_error_to_float64_is_within_twice_that_of_linear(out, inner, bias):
    weight, shift, x = make(out, inner, bias)
    reference = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    plain = (F.linear(x, weight, shift).double() - reference).abs().max()
    packed = PackedLinear(weight, shift)
    with torch.inference_mode():
        ours = packed(x)
        assert ours.shape == (200, out) and packed(x[None, :7]).shape == (1, 7, out)
    assert (ours.double() - reference).abs().max() <= 2 * plain


@bf16
@pytest.mark.parametrize(("out", "inner"), [(960, 576), (576, 1536), (768, 4096)])
def test_a_rows_bits_do_not_depend_on_the_batch(out, inner):
    """One row (which is padded), a few, and a prompt's worth. `F.linear` fails this for wide inputs."""
    weight, _, x = make(out, inner)
    packed = PackedLinear(weight)
    with torch.inference_mode():
        whole = packed(x)
        for rows in (1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 128):
            assert torch.equal(packed(x[:rows]), whole[:rows]), rows
        assert torch.equal(packed(x[77:78]), whole[77:78])


@bf16
def test_a_packed_decoder_is_the_same_model():
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).bfloat16().eval()
    tokens = torch.randint(0, 300, (2, 9))
    with torch.inference_mode():
        exact = Decoder(CONFIG).double()
        exact.load_state_dict(decoder.state_dict())
        reference = exact.logits(exact(tokens))
        before = decoder.logits(decoder(tokens)).double()
        count = len(list(linears(decoder)))
        head = pack_decoder(decoder)
        after = head(decoder(tokens)).double()
    assert count == 2 * 4 and not list(linears(decoder))
    assert (after - reference).abs().max() <= 2 * (before - reference).abs().max()


@bf16
def test_the_decision_is_the_measurement():
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).bfloat16().eval()
    decision = decide(decoder)
    assert decision.packed == (sum(decision.plain_seconds.values()) > sum(decision.packed_seconds.values()))
    assert all(seconds > 0 for seconds in [*decision.plain_seconds.values(), *decision.packed_seconds.values()])
    assert "x at 1 rows" in decision.reason and len(list(linears(decoder))) == 8, "the decoder is left as it was"


def test_other_formats_are_left_alone_and_say_why():
    assert available(torch.zeros(1)) == "weights in float32"
    assert available(torch.zeros(1, device="meta")) == "weights on meta"
    assert not decide(Decoder(CONFIG)).packed and decide(Decoder(CONFIG)).reason == "weights in float32"


@bf16
def test_compiles_without_a_graph_break():
    weight, bias, x = make(64, 32, True)
    packed = PackedLinear(weight, bias)
    compiled = torch.compile(lambda value: packed(value * 2) + 1, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), packed(x * 2) + 1)
