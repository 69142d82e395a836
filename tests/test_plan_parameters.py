"""Parameters, FLOPs and hand estimates: the workshops' worked numbers, transformers, torch's own FLOP counter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ridgeline.cli.plan import app
from ridgeline.errors import UserError
from ridgeline.kernels import attention as attention_kernel
from ridgeline.models import Decoder, DecoderConfig
from ridgeline.models.config import FAMILIES
from ridgeline.plan import (
    flops_per_token,
    megatron_flops,
    padded_vocab,
    parameter_report,
    speculation,
    training_seconds,
    utilisation_warning,
)
from ridgeline.plan.flops import mean_keys
from ridgeline.plan.parameters import megatron_parameters


def cli(*arguments: str) -> str:
    """Standard output with line breaks of narrow consoles undone."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """A random decoder of any family."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    traits = FAMILIES[family]
    kv_heads, group, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 32))
    old = family in ("gpt2", "gptj")
    biases = {name: draw(st.booleans()) for name in ("qkv_bias", "out_bias", "mlp_bias") if name not in traits}
    if family in ("llama", "qwen3"):
        biases["out_bias"] = biases["qkv_bias"]  # one setting in their config.json
    return DecoderConfig(
        family=family,
        vocab_size=draw(st.integers(2, 70_000)),
        hidden_size=kv_heads * head_dim if old else draw(st.integers(8, 512)),
        num_layers=draw(st.integers(1, 8)),
        num_heads=kv_heads * (1 if old else group),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=draw(st.integers(8, 2048)),
        context_length=draw(st.integers(8, 4096)),
        rope_dim=0 if traits["positions"] == "learned" else head_dim,
        activation="silu" if traits["gated_mlp"] else "gelu_tanh",
        tie_embeddings=draw(st.booleans()),
        **{**traits, **biases},
    )


def llama(**changes: Any) -> DecoderConfig:
    base: dict[str, Any] = {"family": "llama", "vocab_size": 1000, "hidden_size": 64, "num_layers": 3, "num_heads": 4}
    base |= {"num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96, "context_length": 64, "rope_dim": 16}
    return DecoderConfig(**{**base, **changes})


def test_the_courses_gpt_by_hand_and_instantiated() -> None:
    """Acceptance row 6: 124,438,272, 124,439,808, and 1,536 of the final LayerNorm between them."""
    text = cli("params", "--layers", "12", "--hidden", "768", "--seq", "1024", "--vocab", "50257", "--tp", "2")
    for number in ("124,438,272", "124,439,808", "+1,536", "50,432", "124,572,672", "50,304", "124,474,368"):
        assert number in text
    assert "final LayerNorm, 2h" in text
    assert megatron_parameters(40, 6144, 50257, 2048) / 1e9 == pytest.approx(18.44, abs=0.01)
    arguments = ["params", "--layers", "12", "--hidden", "768", "--seq", "1024", "--vocab", "50257", "--json"]
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert [row["vocab"] for row in document["rows"]] == [50257, 50304]
    assert document["rows"][1]["report"]["exact"] == 124_475_904


@given(configs())
@settings(max_examples=150, deadline=None)
def test_closed_form_and_named_differences_make_the_exact_count(config: DecoderConfig) -> None:
    report = parameter_report(config)
    assert report.exact == config.num_parameters
    assert report.exact == report.closed + sum(item.parameters for item in report.differences)
    assert all(item.parameters for item in report.differences), "only real differences are listed"
    assert len({item.name for item in report.differences}) == len(report.differences)


FAMILY_FLAGS = {
    "gpt2": [],
    "gptj": ["--untied"],
    "llama": [],
    "mistral": ["--untied"],
    "qwen2": [],
    "qwen3": ["--untied"],
}


@pytest.mark.parametrize("family", sorted(FAMILY_FLAGS))
def test_exact_counts_equal_transformers(family: str) -> None:
    """The same shape, instantiated by transformers on the meta device."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 777}
    tied = "--untied" not in FAMILY_FLAGS[family]
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=192, n_layer=3, n_head=4, vocab_size=777, n_positions=128)
    elif family == "gptj":
        config = transformers.GPTJConfig(n_embd=192, n_layer=3, n_head=4, vocab_size=777, rotary_dim=16)
        config.tie_word_embeddings = False
    else:
        kinds = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
        extra = {"num_key_value_heads": 2, "intermediate_size": 512, "tie_word_embeddings": tied, "head_dim": 48}
        config = getattr(transformers, kinds[family])(**shape, **extra)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    arguments = ["params", "--layers", "3", "--hidden", "192", "--seq", "128", "--vocab", "777", "--heads", "4"]
    arguments += ["--family", family, "--json", *FAMILY_FLAGS[family]]
    if family not in ("gpt2", "gptj"):
        arguments += ["--kv-heads", "2", "--intermediate", "512"]
    document = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert document["rows"][0]["report"]["exact"] == sum(p.numel() for p in model.parameters())


def test_padding_and_warnings() -> None:
    assert [padded_vocab(50257, tp) for tp in (1, 2, 8)] == [50304, 50432, 51200]
    assert padded_vocab(128) == 128
    with pytest.raises(UserError, match="tp 0"):
        padded_vocab(100, 0)
    odd = parameter_report(llama(head_dim=24, rope_dim=24))
    assert "head_dim 24 is not a power of two" in odd.warnings[0] and "32" in odd.warnings[0]
    assert parameter_report(llama()).warnings == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_six_n_is_what_torchs_flop_counter_counts(family: str) -> None:
    """Forward and backward of the real model: matrix products outside attention are exactly 6N per token."""
    from torch.utils.flop_counter import FlopCounterMode

    config = llama()
    if family == "gpt2":
        config = llama(
            family="gpt2", num_kv_heads=4, positions="learned", rope_dim=0, norm="layer", gated_mlp=False,
            activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
        )  # fmt: skip
    decoder, tokens = Decoder(config), torch.randint(0, 1000, (2, 32))
    with FlopCounterMode(display=False) as counter:
        decoder.loss(tokens, tokens).backward()
    totals = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in totals.items() if "attention" not in str(op))
    count = flops_per_token(config, 32)
    assert products == count.six_n * tokens.numel()
    assert count.matmul_parameters == (config.num_parameters - _not_in_products(config))


def _not_in_products(config: DecoderConfig) -> int:
    """Norms, biases, the position table; the tied embedding stays in because the head uses it."""
    shapes = config.parameter_shapes()
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 1 or name.startswith("positions"))


@given(configs(), st.integers(1, 512))
@settings(max_examples=60, deadline=None)
def test_flops_add_up(config: DecoderConfig, seq_len: int) -> None:
    plain, again = flops_per_token(config, seq_len), flops_per_token(config, seq_len, recompute=True)
    assert plain.total == plain.six_n + plain.attention == plain.model and plain.recompute == 0
    assert again.total == again.six_n + again.attention + again.recompute and again.model == plain.model
    assert plain.attention == 6 * config.num_layers * config.num_heads * config.head_dim * seq_len
    assert 0 < again.recompute < again.model / 3 + 1e-6, "blocks only: the head is never recomputed"


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_mean_keys_agree_with_counting_pairs(seq_len: int, window: int) -> None:
    """Against the kernel's exact pair count: the same but for the half key of the diagonal."""
    exact = attention_kernel.pairs(seq_len, window) / seq_len
    assert mean_keys(seq_len, window) == pytest.approx(exact, abs=0.5)
    assert mean_keys(seq_len, None) == seq_len / 2


def test_a_window_shortens_attention() -> None:
    config = llama(family="qwen3", qk_norm=True, sliding_window=16, sliding_layers=(0, 2))
    full, windowed = flops_per_token(llama(), 64), flops_per_token(config, 64)
    assert windowed.attention < full.attention and "2 of 3 layers" in windowed.formula
    assert windowed.six_n == full.six_n


def test_megatrons_rates() -> None:
    """Acceptance row 7 and section 4.2, every figure."""
    arguments = "flops --layers 40 --hidden 6144 --batch 512 --vocab 50257 --gpus 16 --seconds 32.09"
    text = cli(*arguments.split(), "--seq", "1048", "--device", "NVIDIA A100-SXM4-80GB")
    for figure in ("157.73 TFLOP/s", "50.55%", "118.78 TFLOP/s", "38.07%", "312 TFLOP/s"):
        assert figure in text
    assert "154.02 TFLOP/s" in cli(*arguments.split(), "--seq", "1024", "--peak", "312")
    # The 2023 lab's fp32 run: 96.9 % of the fp32 peak is not credible, TF32 had run.
    lab = "flops --layers 12 --hidden 768 --seq 1024 --batch 2 --vocab 50257 --gpus 1 --seconds 0.0926 --no-recompute"
    text = cli(*lab.split(), "--device", "NVIDIA A100-SXM4-80GB", "--dtype", "fp32")
    assert "wrong peak dtype?" in text and "96.9" in text
    assert "wrong peak dtype" not in cli(*lab.split(), "--device", "NVIDIA A100-SXM4-80GB", "--dtype", "tf32")
    assert utilisation_warning(0.89) is None


def test_the_vocabulary_is_never_recomputed() -> None:
    """96 - 72 = one more forward of the blocks: 24 B s l h^2 (1 + s/(6h)), no vocabulary in it."""
    with_, without = (megatron_flops(4, 128, 3, 64, 999, recompute) for recompute in (True, False))
    assert with_ - without == pytest.approx(24 * 4 * 128 * 3 * 64**2 * (1 + 128 / (6 * 64)))


def test_training_time() -> None:
    """Acceptance row 8: 202.5 (151.9) and 33.9 (25.4) days, and the coefficient is named."""
    small = cli("time", "--params", "18.4B", "--tokens", "300B", "--gpus", "16", "--rate", "157.73")
    assert "202.5 days coefficient 8" in small and "coefficient 6: 151.9 days" in small
    large = cli("time", "--params", "175e9", "--tokens", "0.3T", "--gpus", "1024", "--rate", "140", "--no-recompute")
    assert "25.4 days coefficient 6" in large and "coefficient 8: 33.9 days" in large
    with pytest.raises(UserError, match="must be positive"):
        training_seconds(1e9, 1e9, 1, 0.0, recompute=True)


def test_speculation() -> None:
    """Section 4.5: gains, the break-even acceptance, and the best k."""
    for accept, gain in ((0.5, 0.40), (0.7, 0.60), (0.8, 0.75), (0.9, 0.95)):
        result = speculation(accept, 104.37 / 133.07, 5)
        assert result.speedup == pytest.approx(gain, abs=0.006) and result.verdict == "loss"
        assert result.break_even_accept == pytest.approx(0.92, abs=0.005)
        assert result.ceiling == pytest.approx(1.22, abs=0.005)
    for cost, gains in ((0.1, (1.64, 2.27, 2.46, 2.40)), (0.2, (1.50, 1.84, 1.84, 1.66))):
        assert [speculation(0.8, cost, k).speedup for k in (1, 3, 5, 8)] == pytest.approx(gains, abs=0.006)
    assert speculation(0.8, 0.1, 5).best_k == 6
    assert speculation(1.0, 0.2, 4).speedup == speculation(1.0, 0.2, 4).ceiling == pytest.approx(5 / 1.8)
    assert speculation(0.5, 1.0, 3).break_even_accept is None
    assert "0.95x loss" in cli("spec", "--accept", "0.9", "--cost-ratio", "0.784")


@given(st.floats(0, 1), st.floats(0, 2), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_speculation_is_bounded(accept: float, cost: float, k: int) -> None:
    result = speculation(accept, cost, k)
    assert 1 / (k * cost + 1) - 1e-9 <= result.speedup <= result.ceiling + 1e-9
    assert result.best_speedup >= result.speedup - 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("params --layers 2 --hidden 64 --seq 64 --vocab 99 --family lama", "model.family"),
        ("params --layers 2 --hidden 64 --seq 64 --vocab 99 --heads 4 --kv-heads 3", "not a multiple"),
        ("flops --layers 2 --hidden 64 --seq 64 --vocab 99 --batch 1 --gpus 4", "--gpus and --seconds together"),
        ("flops --layers 2 --hidden 64 --seq 64 --vocab 99 --batch 1 --device A100", "not in the peak table"),
        ("time --params 18x --tokens 300B --gpus 1 --rate 1", "--params '18x'"),
        ("spec --accept 1.5 --cost-ratio 1", "between 0 and 1"),
        ("spec --accept 0.5 --cost-ratio 1 --k 0", "k 0"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: str, message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ridgeline", "plan", *arguments.split()], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, ridgeline.plan, ridgeline.hardware, ridgeline.cli.plan, ridgeline.cli.env, ridgeline.plan.resolve;"
        "from ridgeline.hardware.measured import cache_key; cache_key('cpu');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
