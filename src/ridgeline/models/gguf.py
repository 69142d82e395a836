"""GGUF files (llama.cpp's format) turned into Hugging Face-layout folders: weights, tokenizer, chat template.

Weights are dequantised block by block with the ``gguf`` package. llama.cpp stores the rows of Llama's query and key
projections interleaved for its rotary kernel; they are put back in halves here, per head.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from ridgeline.errors import UserError, nearest
from ridgeline.models.config import FAMILIES, DecoderConfig
from ridgeline.models.folder import parse_dtype, write_folder, write_json
from ridgeline.models.gguf_tokenizer import tokenizer_documents
from ridgeline.models.names import Rule, rules
from ridgeline.models.rotary import inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
INNER: dict[str, tuple[str, ...]] = {
    "attn_norm": ("attn_norm",),
    "attn.qkv": ("attn_q", "attn_k", "attn_v"),
    "attn.out": ("attn_output",),
    "attn.q_norm": ("attn_q_norm",),
    "attn.k_norm": ("attn_k_norm",),
    "mlp_norm": ("ffn_norm",),
    "mlp.gate_up": ("ffn_gate", "ffn_up"),
    "mlp.up": ("ffn_up",),
    "mlp.down": ("ffn_down",),
}
OUTER = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
UNDERSTOOD = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.layer_norm_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
    ]
)
NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
}
LLAMA3_FACTORS = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True)
class Import:
    """What `import_gguf` did."""

    path: Path
    config: DecoderConfig
    parameters: int
    source_bytes: int
    quantizations: dict[str, int]  # GGUF type -> tensors
    dtype: str
    seconds: float


def resolve(reference: str | Path) -> Path:
    """A GGUF file by path, or ``package:NAME/GLOB`` for one that ships inside an installed package."""
    text = str(reference)
    if not text.startswith("package:"):
        if not Path(text).is_file():
            raise UserError(f"no GGUF file at {text}")
        return Path(text)
    name, _, pattern = text.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{text}: package '{name}' is not installed")
    found = [file for root in spec.submodule_search_locations for file in sorted(Path(root).glob(pattern or "*.gguf"))]
    if len(found) != 1:
        raise UserError(f"{text}: matches {len(found)} files, expected one" + "".join(f" {f.name}" for f in found[:5]))
    return found[0]


def import_gguf(
    source: str | Path,
    target: str | Path,
    dtype: str | torch.dtype = "bf16",
    progress: Callable[[int, int], None] | None = None,
) -> Import:
    """Write ``target`` (a folder `load` and transformers read) from one GGUF file.

    ``progress(done, total)`` is called per tensor. Raises `UserError` naming a key, tensor or type that is not
    supported, and for a file that is damaged; `JobError` when the disk refuses. Nothing is then left behind.
    """
    started = time.perf_counter()
    file = resolve(source)
    gguf = GGUF(file)
    config = gguf.config()
    documents = tokenizer_documents(gguf.values, config)
    kind = parse_dtype(dtype) or torch.bfloat16
    tensors = gguf.tensors(config, kind, progress)

    def finish(folder: Path) -> None:
        for name, document in documents.items():
            if isinstance(document, str):
                (folder / name).write_text(document, "utf-8")
            else:
                write_json(folder / name, document)

    path = write_folder(tensors, config, target, finish)
    stored = [tensor.tensor_type.name for tensor in gguf.stored.values()]
    return Import(
        path=path,
        config=config,
        parameters=config.num_parameters,
        source_bytes=file.stat().st_size,
        quantizations={name: stored.count(name) for name in sorted(set(stored))},
        dtype=str(kind).removeprefix("torch."),
        seconds=time.perf_counter() - started,
    )


class GGUF:
    """An open file: ``values`` (metadata) and ``stored`` (tensors by name, not yet dequantised)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            reader = GGUFReader(file)
            self.values = {name: field.contents() for name, field in reader.fields.items()}
            self.stored: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
            # what the reader raises on a wrong magic, a cut file, or lengths that point outside it
            raise UserError(f"{file}: not a whole GGUF file: {str(error).splitlines()[0]}") from None
        self.arch = str(self.values.get("general.architecture"))
        if self.arch not in ARCHITECTURES:
            raise UserError(f"{file}: architecture '{self.arch}' is not supported{nearest(self.arch, ARCHITECTURES)}")
        self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        if self.values.get("general.type", "model") != "model":
            raise UserError(f"{self.file}: holds a '{self.values['general.type']}', not a model")
        if self.values.get("split.count", 1) > 1:
            raise UserError(
                f"{self.file}: is one of {self.values['split.count']} parts; join them with llama-gguf-split"
            )
        for name, value in self.values.items():
            key = name.removeprefix(f"{self.arch}.")
            if key == name or key in UNDERSTOOD or (key in NEUTRAL and NEUTRAL[key] == value):
                continue
            raise UserError(f"{self.file}: key '{name}' = {str(value)[:60]} is not supported")

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(f"{self.arch}.{key}", default)
        if value is None:
            raise UserError(f"{self.file}: key '{self.arch}.{key}' is missing")
        if isinstance(value, list):
            raise UserError(f"{self.file}: key '{self.arch}.{key}' differs by layer, which is not supported")
        return value

    def config(self) -> DecoderConfig:
        """The decoder this file holds. A missing ``output.weight``, or a copy of the embedding, means tied."""
        hidden, heads = self._get("embedding_length"), self._get("attention.head_count")
        head_dim = self._get("attention.key_length", hidden // max(heads, 1))
        if self._get("attention.value_length", head_dim) != head_dim:
            raise UserError(f"{self.file}: attention.value_length differs from attention.key_length")
        rotary = FAMILIES[self.arch]["positions"] == "rotary"
        rope_dim = self._get("rope.dimension_count", head_dim) if rotary else 0
        theta = _shortest(self._get("rope.freq_base", 10_000.0))
        eps = "attention.layer_norm_rms_epsilon" if rotary else "attention.layer_norm_epsilon"
        token = self.values.get
        ends = [token(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        biases = {name: f"blk.0.{stored}.bias" in self.stored for name, stored in _BIASES.items()}
        settings = {
            "vocab_size": self._get("vocab_size", len(token("tokenizer.ggml.tokens", ()))),
            "hidden_size": hidden,
            "num_layers": self._get("block_count"),
            "num_heads": heads,
            "num_kv_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._get("feed_forward_length"),
            "context_length": self._get("context_length"),
            "rope_theta": theta if rotary else 10_000.0,
            "rope_dim": rope_dim,
            "rope_scaling": self._scaling(theta, rope_dim),
            "norm_eps": _shortest(self._get(eps)),
            "activation": "silu" if FAMILIES[self.arch]["gated_mlp"] else "gelu_tanh",
            "tie_embeddings": self._tied(),
            "bos_token_id": token("tokenizer.ggml.bos_token_id"),
            "eos_token_ids": tuple(dict.fromkeys(end for end in ends if end is not None)),
            "pad_token_id": token("tokenizer.ggml.padding_token_id"),
        }
        return DecoderConfig(family=self.arch, **(settings | biases | FAMILIES[self.arch]))

    def _tied(self) -> bool:
        output, embed = self.stored.get("output.weight"), self.stored.get("token_embd.weight")
        if output is None or embed is None:
            return True
        return output.tensor_type == embed.tensor_type and np.array_equal(output.data, embed.data)

    def _scaling(self, theta: float, rope_dim: int) -> dict[str, Any] | None:
        if "rope_freqs.weight" in self.stored:
            return self._llama3(theta, rope_dim)
        kind = self._get("rope.scaling.type", "none")
        if kind == "none":
            return None
        scaling = {"rope_type": kind, "factor": _shortest(self._get("rope.scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._get("rope.scaling.original_context_length")
        return scaling

    def _llama3(self, theta: float, rope_dim: int) -> dict[str, Any]:
        """llama.cpp stores Llama 3.1's scaling as one divisor per pair; recognise the settings that made them."""
        stored = self._dequantized("rope_freqs.weight")
        plain = np.array(inverse_frequencies(theta, rope_dim, None))
        for original in (8192, self._get("rope.scaling.original_context_length", 8192)):
            scaling = LLAMA3_FACTORS | {
                "factor": _shortest(stored.max()),
                "original_max_position_embeddings": original,
            }
            expected = plain / np.array(inverse_frequencies(theta, rope_dim, scaling))
            if stored.shape == expected.shape and np.allclose(stored, expected, rtol=1e-4):
                return scaling
        raise UserError(f"{self.file}: tensor 'rope_freqs.weight' is not a known scaling of rotary frequencies")

    def tensors(
        self, config: DecoderConfig, dtype: torch.dtype, progress: Callable[[int, int], None] | None
    ) -> dict[str, Tensor]:
        """Every tensor under its Hugging Face name, dequantised to ``dtype``."""
        left = set(self.stored) - {"rope_freqs.weight"} - ({"output.weight"} if config.tie_embeddings else set())
        made: dict[str, Tensor] = {}
        total = len(left)
        for rule in rules(config):
            for source, stored, shape in _stored_names(rule, self.arch):
                if stored not in self.stored:
                    raise UserError(f"{self.file}: tensor '{stored}' is missing")
                left.discard(stored)
                made[source] = self._tensor(stored, shape, rule, config, dtype)
                if progress is not None:
                    progress(len(made), total)
        if left:
            raise UserError(f"{self.file}: tensor '{sorted(left)[0]}' is not part of {self.arch}")
        return made

    def _tensor(
        self, name: str, shape: tuple[int, ...], rule: Rule, config: DecoderConfig, dtype: torch.dtype
    ) -> Tensor:
        values = self._dequantized(name)
        if values.shape != shape:
            raise UserError(f"{self.file}: tensor '{name}' has shape {list(values.shape)}, expected {list(shape)}")
        if self.arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            values = unpermute(values, config.head_dim)
        tensor = torch.from_numpy(np.array(values)).to(dtype)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.file}: tensor '{name}' holds values that are not finite in {dtype}")
        return tensor.T.contiguous() if rule.transposed else tensor

    def _dequantized(self, name: str) -> np.ndarray:
        tensor = self.stored[name]
        try:
            return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            kind = GGMLQuantizationType(tensor.tensor_type).name
            raise UserError(f"{self.file}: tensor '{name}' has type {kind}, which is not supported") from None


_BIASES = {"qkv_bias": "attn_q", "out_bias": "attn_output", "mlp_bias": "ffn_down"}


def _stored_names(rule: Rule, arch: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(Hugging Face name, GGUF name, shape in the file) of each part of one parameter."""
    module, _, kind = rule.name.rpartition(".")
    if not module.startswith("blocks."):
        return [(rule.sources[0], f"{OUTER[module]}.{kind}", rule.shape)]
    _, layer, inside = module.split(".", 2)
    stored = ("attn_qkv",) if arch == "gpt2" and inside == "attn.qkv" else INNER[inside]
    return [
        (source, f"blk.{layer}.{name}.{kind}", (rows, *rule.shape[1:]))
        for source, name, rows in zip(rule.sources, stored, rule.rows, strict=True)
    ]


def unpermute(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k: pairs ``(2i, 2i + 1)`` of each head go back to ``(i, i + head_dim / 2)``."""
    return values.reshape(-1, head_dim // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
