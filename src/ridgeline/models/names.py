"""Parameter names: ours (fused) and Hugging Face's (split), both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ridgeline.errors import UserError
from ridgeline.models.config import DecoderConfig

# Buffers that older versions of transformers saved beside the weights; they are computed, not learned.
BUFFERS = re.compile(r"(\.attn\.(bias|masked_bias|embed_positions)|\.rotary_emb\.inv_freq)$")

LLAMA_OUTER = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LLAMA_INNER: dict[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm",),
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out": ("self_attn.o_proj",),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
GPT_OUTER = {"embed": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
GPT2_INNER: dict[str, tuple[str, ...]] = {
    "attn_norm": ("ln_1",),
    "attn.qkv": ("attn.c_attn",),
    "attn.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
GPTJ_INNER: dict[str, tuple[str, ...]] = {
    "attn_norm": ("ln_1",),
    "attn.qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "attn.out": ("attn.out_proj",),
    "mlp.up": ("mlp.fc_in",),
    "mlp.down": ("mlp.fc_out",),
}
INNER: dict[str, dict[str, tuple[str, ...]]] = {"gpt2": GPT2_INNER, "gptj": GPTJ_INNER}


@dataclass(frozen=True)
class Rule:
    """One parameter of ours: the Hugging Face tensors it is made of, stacked by rows."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    transposed: bool  # GPT-2 stores its matrices as [inputs, outputs]


def rules(config: DecoderConfig) -> list[Rule]:
    """A rule for every parameter of `DecoderConfig.parameter_shapes`, in its order."""
    made = []
    for name, shape in config.parameter_shapes().items():
        sources = _sources(config, name)
        rows = _rows(config, name) if len(sources) > 1 else (shape[0],)
        transposed = config.family == "gpt2" and len(shape) == 2 and name.startswith("blocks.")
        made.append(Rule(name, shape, sources, rows, transposed))
    return made


def _sources(config: DecoderConfig, name: str) -> tuple[str, ...]:
    outer = GPT_OUTER if config.family in ("gpt2", "gptj") else LLAMA_OUTER
    if name == "tied_bias":
        return ("lm_head.bias",)
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return (f"{outer[module]}.{kind}",)
    _, layer, inside = module.split(".", 2)
    inner = INNER.get(config.family, LLAMA_INNER)
    prefix = "transformer.h" if outer is GPT_OUTER else "model.layers"
    return tuple(f"{prefix}.{layer}.{source}.{kind}" for source in inner[inside])


def _rows(config: DecoderConfig, name: str) -> tuple[int, ...]:
    if ".qkv." in name:
        kv = config.num_kv_heads * config.head_dim
        return config.num_heads * config.head_dim, kv, kv
    return config.intermediate_size, config.intermediate_size


def hf_state_dict(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Our state split and named as transformers does; each tensor contiguous. A tied head is not repeated."""
    named: dict[str, Tensor] = {}
    for rule in rules(config):
        if rule.name not in state:
            raise UserError(f"tensor '{rule.name}' is missing from the state to export")
        _check(rule.name, state[rule.name], rule.shape)
        parts = torch.split(state[rule.name].detach(), list(rule.rows))
        for source, part in zip(rule.sources, parts, strict=True):
            # clone: a slice would drag its whole storage into the file, and shared storage is refused by safetensors
            named[source] = (part.T if rule.transposed else part).clone(memory_format=torch.contiguous_format)
    return named


def from_hf_state_dict(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Hugging Face tensors fused and named as ours. Raises `UserError` naming a missing, extra or misshaped tensor."""
    return gather(state.keys(), state.__getitem__, config)


def gather(
    names: Iterable[str], read: Callable[[str], Tensor], config: DecoderConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """As `from_hf_state_dict`, reading one tensor at a time by name; each is cast to ``dtype`` when given."""
    stored = _canonical(names, config)
    made: dict[str, Tensor] = {}
    for rule in rules(config):
        parts = []
        for source, rows in zip(rule.sources, rule.rows, strict=True):
            if source not in stored:
                raise UserError(f"tensor '{source}' is missing{_where(config)}")
            part = read(stored.pop(source))
            shape = (rows, *rule.shape[1:])
            _check(source, part, shape[::-1] if rule.transposed else shape)
            part = part.to(dtype)
            parts.append(part.T.contiguous() if rule.transposed else part)
        made[rule.name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    _refuse_extra(stored, read, made, config)
    return made


def _canonical(names: Iterable[str], config: DecoderConfig) -> dict[str, str]:
    """Canonical name -> stored name. OpenAI's GPT-2 files lack the ``transformer.`` prefix."""
    kept = [name for name in names if not BUFFERS.search(name)]
    if config.family == "gpt2" and not any(name.startswith("transformer.") for name in kept):
        return {name if name.startswith("lm_head.") else f"transformer.{name}": name for name in kept}
    return {name: name for name in kept}


def _refuse_extra(
    left: dict[str, str], read: Callable[[str], Tensor], made: Mapping[str, Tensor], config: DecoderConfig
) -> None:
    copy = left.pop("lm_head.weight", None) if config.tie_embeddings else None
    if copy is not None and not torch.equal(read(copy).to(made["embed.weight"].dtype), made["embed.weight"]):
        raise UserError("tensor 'lm_head.weight' differs from the embedding, yet config.json says they are tied")
    if left:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(f"tensor '{next(iter(left.values()))}'{more} is not part of {config.family}{_where(config)}")


def _where(config: DecoderConfig) -> str:
    return f" for {config.family} with {config.num_layers} layers"


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"tensor '{name}' has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise UserError(f"tensor '{name}' is {str(tensor.dtype).removeprefix('torch.')}, expected bf16, fp16 or fp32")
