"""``config.json`` of Hugging Face folders, in and out.

Every field is in one of three tables: *understood* (the family's reader uses it), *harmless* (it cannot change the
logits), *neutral* (accepted at one value only). Any other field is refused by name, unless it is null, which
transformers treats as absent. Both spellings of rotary settings are read: ``rope_theta`` and ``rope_scaling`` at the
top (before transformers 5) and ``rope_parameters``. The older is written: both generations read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ridgeline.errors import UserError, nearest
from ridgeline.models.config import FAMILIES, INIT_STD, MOST_LAYERS, DecoderConfig

Fields = dict[str, Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
}
# Names, training settings (dropout is not applied by this project) and what only heads or generation use.
HARMLESS = _words("""
    _name_or_path transformers_version torch_dtype dtype use_cache initializer_range return_dict return_dict_in_generate
    output_hidden_states output_attentions output_scores attention_dropout resid_pdrop embd_pdrop attn_pdrop
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout id2label label2id
    num_labels problem_type task_specific_params finetuning_task prefix tokenizer_class gradient_checkpointing
    pretraining_tp reorder_and_upcast_attn is_decoder torchscript use_bfloat16 transformers.js_config
    tie_last_hidden_states keys_to_ignore_at_inference _attn_implementation_autoset attn_implementation
    sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty remove_invalid_values""")
NEUTRAL: Fields = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "partial_rotary_factor": 1.0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "rotary": True,
    "is_llama_config": True,
    "rope_interleaved": False,
}
COMMON = _words("model_type architectures vocab_size tie_word_embeddings bos_token_id eos_token_id pad_token_id")
LLAMA_FIELDS = COMMON | _words("""
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters original_max_position_embeddings""")
QWEN_FIELDS = LLAMA_FIELDS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
GPT_FIELDS = COMMON | _words("n_positions n_ctx n_embd n_layer n_head n_inner activation_function layer_norm_epsilon")
UNDERSTOOD = {
    "llama": LLAMA_FIELDS | {"attention_bias", "mlp_bias"},
    "mistral": LLAMA_FIELDS | {"sliding_window"},
    "qwen2": QWEN_FIELDS,
    "qwen3": QWEN_FIELDS | {"attention_bias"},
    "gpt2": GPT_FIELDS,
    "gptj": GPT_FIELDS | {"rotary_dim"},
}
GATE_NAMES = {"silu": "silu", "swish": "silu"}
GELU_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def load_config(path: str | Path) -> DecoderConfig:
    """Read ``config.json`` of a folder (or the file itself). Raises `UserError` naming what is not supported."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file}: no such file; a model folder holds config.json and *.safetensors")
    try:
        fields = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    try:
        return from_hf_config(fields)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def from_hf_config(fields: Fields) -> DecoderConfig:
    """The configuration that ``config.json`` describes."""
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"model_type '{family}' is not supported{nearest(str(family), FAMILIES)}")
    present = {name: value for name, value in fields.items() if value is not None}
    _refuse_unknown(family, present)
    reader: Callable[[str, Fields], Fields] = _read_gpt if family in ("gpt2", "gptj") else _read_llama
    return DecoderConfig(
        family=family,
        vocab_size=_integer(present, "vocab_size"),
        bos_token_id=_token(present, "bos_token_id"),
        eos_token_ids=_tokens(present, "eos_token_id"),
        pad_token_id=_token(present, "pad_token_id"),
        **({"qkv_bias": False, "out_bias": False, "mlp_bias": False} | FAMILIES[family] | reader(family, present)),
    )


def _refuse_unknown(family: str, present: Fields) -> None:
    for name, value in present.items():
        if name in UNDERSTOOD[family] or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise UserError(f"config field '{name}' = {value!r} is not supported for {family}")
        if value != NEUTRAL[name]:
            raise UserError(f"config field '{name}' = {value!r} is not supported; only {NEUTRAL[name]!r} is")
    wanted = ARCHITECTURES[family]
    named = present.get("architectures")
    if named and (not isinstance(named, list) or wanted not in named):
        raise UserError(f"config field 'architectures' = {named!r} is not supported; only {wanted} is")


def _integer(fields: Fields, name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"config field '{name}' must be an integer, got {value!r}")
    return value


def _number(fields: Fields, name: str, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"config field '{name}' must be a number, got {value!r}")
    return float(value)


def _flag(fields: Fields, name: str, default: bool = False) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise UserError(f"config field '{name}' must be true or false, got {value!r}")
    return value


def _token(fields: Fields, name: str) -> int | None:
    return _integer(fields, name) if name in fields else None


def _tokens(fields: Fields, name: str) -> tuple[int, ...]:
    value = fields.get(name, [])
    return tuple(_integer({name: one}, name) for one in (value if isinstance(value, list) else [value]))


def _activation(fields: Fields, name: str, default: str, names: dict[str, str]) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in names:
        raise UserError(f"config field '{name}' = {value!r} is not supported{nearest(str(value), names)}")
    return names[value]


def _read_llama(family: str, fields: Fields) -> Fields:
    hidden, heads = _integer(fields, "hidden_size"), _integer(fields, "num_attention_heads")
    head_dim = _integer(fields, "head_dim", 128 if family == "qwen3" else hidden // max(heads, 1))
    context = _integer(fields, "max_position_embeddings")
    theta, scaling = _read_rope(fields, context)
    layers = _integer(fields, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UserError(f"config field 'num_hidden_layers' = {layers}: at most {MOST_LAYERS} are supported")
    window, sliding = _read_sliding(family, fields, layers)
    read = {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": _integer(fields, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "intermediate_size": _integer(fields, "intermediate_size"),
        "context_length": context,
        "rope_theta": theta,
        "rope_dim": head_dim,
        "rope_scaling": scaling,
        "norm_eps": _number(fields, "rms_norm_eps", 1e-6),
        "activation": _activation(fields, "hidden_act", "silu", GATE_NAMES),
        "tie_embeddings": _flag(fields, "tie_word_embeddings"),
        "sliding_window": window,
        "sliding_layers": sliding,
    }
    if family in ("llama", "qwen3"):
        read["qkv_bias"] = read["out_bias"] = _flag(fields, "attention_bias")
    if family == "llama":
        read["mlp_bias"] = _flag(fields, "mlp_bias")
    return read


def _read_sliding(family: str, fields: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """(window, layers that slide): every layer for Mistral; Qwen by ``layer_types`` or ``max_window_layers``."""
    if family == "llama":
        return None, ()
    if family == "mistral":
        window = _token(fields, "sliding_window")
        return window, tuple(range(layers)) if window else ()
    window = _integer(fields, "sliding_window", 4096) if _flag(fields, "use_sliding_window") else None
    first = _integer(fields, "max_window_layers", 28)
    default = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    kinds = fields.get("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"config field 'layer_types' must name {layers} layers, got {str(kinds)[:60]}")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(f"config field 'layer_types' holds '{kind}', which is not supported")
    sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    return window if sliding else None, sliding


def _read_rope(fields: Fields, context: int) -> tuple[float, Fields | None]:
    """(theta, scaling or None) from either spelling."""
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    if old and new and old != new:
        raise UserError("config fields 'rope_scaling' and 'rope_parameters' contradict one another")
    given = old or new or {}
    if not isinstance(given, dict):
        raise UserError(f"config field 'rope_scaling' must be an object, got {given!r}")
    found = dict(given)
    for name, value in found.items():
        if isinstance(value, dict):
            raise UserError(f"config field 'rope_parameters.{name}' (rotary settings by layer type) is not supported")
    theta = _number(found if found.get("rope_theta") is not None else fields, "rope_theta", 10_000.0)
    found.pop("rope_theta", None)
    kind = found.pop("type", None)
    kind = str(found.pop("rope_type", kind) or "default")
    if found.get("partial_rotary_factor") in (1, None):
        found.pop("partial_rotary_factor", None)
    scaling = {name: value for name, value in found.items() if value is not None}
    if kind == "default":
        if scaling:
            raise UserError(f"config field 'rope_parameters.{next(iter(scaling))}' is not supported for type 'default'")
        return theta, None
    if kind in ("llama3", "yarn"):
        original = fields.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = original or scaling.get(
            "original_max_position_embeddings", context
        )
    return theta, {"rope_type": kind} | scaling


def _read_gpt(family: str, fields: Fields) -> Fields:
    hidden, heads = _integer(fields, "n_embd"), _integer(fields, "n_head")
    context = _integer(fields, "n_positions", 2048 if family == "gptj" else 1024)
    if fields.get("n_ctx", context) != context:
        raise UserError(f"config field 'n_ctx' = {fields['n_ctx']} differs from n_positions = {context}")
    return {
        "hidden_size": hidden,
        "num_layers": _integer(fields, "n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // max(heads, 1),
        "intermediate_size": _integer(fields, "n_inner", 4 * hidden),
        "context_length": context,
        "rope_dim": _integer(fields, "rotary_dim") if family == "gptj" else 0,
        "norm_eps": _number(fields, "layer_norm_epsilon", 1e-5),
        "activation": _activation(fields, "activation_function", "gelu_new", GELU_NAMES),
        "tie_embeddings": _flag(fields, "tie_word_embeddings", family == "gpt2"),
    }


def to_hf_config(config: DecoderConfig, dtype: str) -> Fields:
    """``config.json`` for a folder whose tensors are ``dtype`` (``"bfloat16"``)."""
    eos = config.eos_token_ids
    fields: Fields = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "initializer_range": INIT_STD,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    return fields | (_write_gpt(config) if config.family in ("gpt2", "gptj") else _write_llama(config))


def _write_gpt(config: DecoderConfig) -> Fields:
    fields: Fields = {
        "n_positions": config.context_length,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return fields | {"rotary_dim": config.rope_dim} if config.family == "gptj" else fields


def _write_llama(config: DecoderConfig) -> Fields:
    fields: Fields = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "attention_dropout": 0.0,
    }
    if config.family in ("llama", "qwen3"):
        fields["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        fields["sliding_window"] = config.sliding_window
    if config.family in ("qwen2", "qwen3"):
        fields |= _write_sliding(config)
    return fields


def _write_sliding(config: DecoderConfig) -> Fields:
    kinds = ("full_attention", "sliding_attention")
    return {
        "use_sliding_window": bool(config.sliding_layers),
        "sliding_window": config.sliding_window,
        "max_window_layers": min(config.sliding_layers, default=config.num_layers),
        "layer_types": [kinds[layer in config.sliding_layers] for layer in range(config.num_layers)],
    }
