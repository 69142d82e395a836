"""Our decoders against transformers: the same folder, the same logits, in both directions."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ridgeline.errors import UserError
from ridgeline.models import Decoder, from_hf_state_dict, hf_state_dict, load, load_config, save
from ridgeline.models.hf_config import from_hf_config, to_hf_config

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "vocab_size": 101,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES = {
    "llama": ("Llama", LLAMA),
    "llama-biases-untied": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-tied-head_dim": ("Llama", LLAMA | {"head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-linear": ("Llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e5}}),
    "llama-llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", LLAMA | {"head_dim": 32, "rope_parameters": YARN}),
    "llama-yarn-options": (
        "Llama",
        LLAMA
        | {
            "head_dim": 32,
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.8, "truncate": False},
        },
    ),
    "mistral-window": ("Mistral", LLAMA | {"sliding_window": 7}),
    "mistral-full": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2-window": ("Qwen2", LLAMA | QWEN_WINDOW | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "qwen3-bias-window": ("Qwen3", LLAMA | QWEN_WINDOW | {"head_dim": 8, "attention_bias": True}),
    "qwen3-layer_types": (
        "Qwen3",
        LLAMA
        | QWEN_WINDOW
        | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2", GPT),
    "gpt2-untied-wide": ("GPT2", GPT | {"tie_word_embeddings": False, "n_inner": 72, "activation_function": "gelu"}),
    "gptj-partial": ("GPTJ", GPT | {"rotary_dim": 4}),
    "gptj-full": ("GPTJ", GPT | {"rotary_dim": 12, "n_inner": 72}),
    "gptj-tied": ("GPTJ", GPT | {"rotary_dim": 8, "tie_word_embeddings": True}),
}


def make_theirs(case: str, attention: str = "eager") -> transformers.PreTrainedModel:
    """A transformers model with random weights, none of them at a special value."""
    name, fields = CASES[case]
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.1))
    return model


def tokens(vocab: int = 101, batch: int = 2, seq: int = 48) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(1))


def logits(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(ids))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_both_ways(case, tmp_path):
    theirs = make_theirs(case)
    theirs.save_pretrained(tmp_path / "hf")
    ids = tokens()
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.3, "the case would prove nothing"
    ours = load(tmp_path / "hf")
    assert difference(logits(ours, ids), expected) < 1e-4
    save(ours, ours.config, tmp_path / "ours")
    other = "eager" if case.startswith("gptj") else "sdpa"  # GPT-J has no SDPA form there
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation=other).eval()
    with torch.no_grad():
        assert difference(again(ids).logits, expected) < 1e-4
    assert load_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("case", ["llama-llama3", "qwen2-window", "gptj-partial", "gpt2"])
def test_positions_and_hook(case, tmp_path):
    """Tokens fed one by one through ``attend`` with explicit positions give the logits of the whole row."""
    make_theirs(case).save_pretrained(tmp_path)
    ours, ids = load(tmp_path), tokens(batch=1, seq=20)
    cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(layer, q, k, v):
        if layer in cache:
            k, v = torch.cat((cache[layer][0], k), 1), torch.cat((cache[layer][1], v), 1)
        cache[layer] = (k, v)
        window = ours.config.window(layer)
        k, v = (k, v) if window is None else (k[:, -window:], v[:, -window:])
        group = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)

    with torch.no_grad():
        steps = [ours(ids[:, i : i + 1], torch.tensor([[i]]), attend) for i in range(20)]
        assert difference(torch.cat(steps, 1), ours(ids)) < 1e-4


def test_older_spelling_of_rotary_settings(tmp_path):
    """``rope_theta`` and ``rope_scaling`` at the top (transformers 4) mean the same as ``rope_parameters``."""
    new = LLAMA | {"model_type": "llama", "rope_parameters": LLAMA3}
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = LLAMA | {"model_type": "llama", "rope_theta": 1000.0, "rope_scaling": scaling}
    older = LLAMA | {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config(older).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert from_hf_config(older).rope_theta == 500.0


REFUSED = [
    ("llama", {"hidden_act": "relu"}, "hidden_act"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ("llama", {"logit_scale": 2.0}, "logit_scale"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"model_type": "llamma"}, "did you mean 'llama'"),
    ("llama", {"vocab_size": "many"}, "vocab_size"),
    ("llama", {"num_key_value_heads": 4}, "num_kv_heads"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    ("gptj", {"rotary_dim": None}, "rotary_dim"),
]


@pytest.mark.parametrize(("family", "change", "named"), REFUSED, ids=[f"{f}-{n}" for f, _, n in REFUSED])
def test_unsupported_field_is_named(family, change, named):
    base = {"model_type": family} | (
        GPT | {"rotary_dim": 4} if family == "gptj" else GPT if family == "gpt2" else LLAMA
    )
    from_hf_config({name: value for name, value in base.items() if family == "gptj" or name != "rotary_dim"})
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        from_hf_config(base | change)


def test_every_config_field_of_transformers_is_understood_or_refused():
    """Fresh configurations of each family, written in full by transformers, are accepted."""
    for case in ("llama", "mistral-window", "qwen2", "qwen3", "gpt2", "gptj-partial"):
        name, fields = CASES[case]
        written = json.loads(getattr(transformers, f"{name}Config")(**fields).to_json_string(use_diff=False))
        config = from_hf_config(written)
        assert from_hf_config(to_hf_config(config, "float32")) == config


def test_state_dict_names_round_trip_bitwise(tmp_path):
    for case in ("qwen2", "gpt2", "gptj-tied"):
        make_theirs(case).save_pretrained(tmp_path / case)
        stored = load_file(tmp_path / case / "model.safetensors")
        config = load_config(tmp_path / case)
        back = hf_state_dict(from_hf_state_dict(stored, config), config)
        assert back.keys() == stored.keys()
        assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_openai_names_without_prefix(tmp_path):
    """The first GPT-2 files have no ``transformer.`` prefix and carry the causal mask as ``attn.bias``."""
    theirs = make_theirs("gpt2")
    theirs.save_pretrained(tmp_path)
    config = load_config(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    expected = from_hf_state_dict(stored, config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in from_hf_state_dict(bare, config).items())


WRONG = [True, 0, -1, 10**30, 0.5, float("nan"), "x", [], [1], {}, {"a": 1}, {"rope_type": "yarn"}]


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen3-bias-window", "gpt2", "gptj-partial"])
def test_a_wrong_value_is_refused_in_one_line_or_written_back(case):
    """Each field of a config.json replaced by values of the wrong type or size, one at a time."""
    name, fields = CASES[case]
    whole = json.loads(getattr(transformers, f"{name}Config")(**fields).to_json_string(use_diff=False))
    refused = 0
    for field in whole:
        for value in WRONG:
            try:
                config = from_hf_config(whole | {field: value})
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
            else:
                assert from_hf_config(json.loads(json.dumps(to_hf_config(config, "float32")))) == config
    assert refused > 100
