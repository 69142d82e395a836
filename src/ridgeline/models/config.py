"""What a decoder is: one frozen record that covers GPT-2, GPT-J, Llama, Mistral, Qwen2 and Qwen3. No torch here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ridgeline.errors import UserError, nearest
from ridgeline.models.rotary import check_scaling

if TYPE_CHECKING:  # a decoder needs no configuration file, and no pydantic
    from ridgeline.config import ModelSection

Shapes = dict[str, tuple[int, ...]]

ROTARY_LLAMA: dict[str, Any] = {
    "positions": "rotary",
    "rope_interleaved": False,
    "norm": "rms",
    "parallel_residual": False,
    "gated_mlp": True,
    "head_bias": False,
    "qk_norm": False,
}
# What a family fixes. A configuration that contradicts it could not be written as a folder of that family.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ROTARY_LLAMA,
    "mistral": ROTARY_LLAMA | {"qkv_bias": False, "out_bias": False, "mlp_bias": False},
    "qwen2": ROTARY_LLAMA | {"qkv_bias": True, "out_bias": False, "mlp_bias": False},
    "qwen3": ROTARY_LLAMA | {"qk_norm": True, "mlp_bias": False},
    "gpt2": {
        "positions": "learned",
        "norm": "layer",
        "parallel_residual": False,
        "gated_mlp": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "head_bias": False,
        "qk_norm": False,
    },
    "gptj": {
        "positions": "rotary",
        "rope_interleaved": True,
        "norm": "layer",
        "parallel_residual": True,
        "gated_mlp": False,
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": True,
        "head_bias": True,
        "qk_norm": False,
    },
}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
INIT_STD = 0.02
MOST_LAYERS = 10_000  # a damaged file must not make us enumerate billions of names


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder. Raises `UserError` when fields contradict one another or the family."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_length: int
    positions: str = "rotary"  # or "learned"
    rope_theta: float = 10_000.0
    rope_dim: int = 0  # rotated dims of a head; 0 when positions are learned
    rope_interleaved: bool = False
    rope_scaling: dict[str, Any] | None = field(default=None, hash=False)
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    parallel_residual: bool = False  # attention and MLP read one norm and are added together (GPT-J)
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = True
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"model family '{self.family}' is not supported{nearest(self.family, FAMILIES)}")
        for name, value in FAMILIES[self.family].items():
            if getattr(self, name) != value:
                raise UserError(f"{name} = {getattr(self, name)!r}: family {self.family} always has {value!r}")
        self._check_shapes()
        self._check_writable()
        check_scaling(self.rope_scaling)

    def _check_shapes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("intermediate_size", "context_length", "sliding_window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not 1 < self.rope_theta < math.inf or not 0 < self.norm_eps < 1:
            raise UserError(f"rope_theta {self.rope_theta} must be above 1 and norm_eps {self.norm_eps} within 0 and 1")
        if self.num_layers > MOST_LAYERS:
            raise UserError(f"num_layers = {self.num_layers}: at most {MOST_LAYERS} are supported")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation '{self.activation}' is not supported{nearest(self.activation, ACTIVATIONS)}")
        if self.gated_mlp != (self.activation == "silu"):
            raise UserError(f"activation '{self.activation}' with gated_mlp = {self.gated_mlp} is not supported")
        if self.positions == "rotary" and (self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim):
            raise UserError(f"rope_dim {self.rope_dim} must be even and within head_dim {self.head_dim}")
        if self.family in ("gpt2", "gptj") and self.num_kv_heads * self.head_dim != self.hidden_size:
            raise UserError(f"family {self.family} needs kv_heads = heads and head_dim = hidden / heads")
        if self.sliding_layers and not self.sliding_window:
            raise UserError("sliding_layers are given without a sliding_window")
        if any(not 0 <= layer < self.num_layers for layer in self.sliding_layers):
            raise UserError(f"sliding_layers {self.sliding_layers} name layers beyond num_layers {self.num_layers}")

    def _check_writable(self) -> None:
        """What this record can say and the family's ``config.json`` cannot."""
        family, every = self.family, tuple(range(self.num_layers))
        if family in ("llama", "qwen3") and self.qkv_bias != self.out_bias:
            raise UserError(f"family {family} has one setting for qkv_bias and out_bias")
        if self.positions == "rotary" and family != "gptj" and self.rope_dim != self.head_dim:
            raise UserError(f"family {family} rotates whole heads: rope_dim must be head_dim = {self.head_dim}")
        if family == "gptj" and (self.rope_theta != 10_000.0 or self.rope_scaling):
            raise UserError("family gptj has rope_theta 10000 and no rope_scaling")
        if self.sliding_layers and family not in ("mistral", "qwen2", "qwen3"):
            raise UserError(f"family {family} has no sliding window")
        if self.sliding_layers and family == "mistral" and self.sliding_layers != every:
            raise UserError("family mistral slides in every layer or in none")

    def replace(self, **changes: Any) -> DecoderConfig:
        """A copy with fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None when it sees everything."""
        return self.sliding_window if layer in self.sliding_layers else None

    def parameter_shapes(self) -> Shapes:
        """Every parameter's name and shape, in the order of `Decoder.named_parameters`, without allocating."""
        hidden = self.hidden_size
        shapes: Shapes = {"embed.weight": (self.vocab_size, hidden)}
        if self.positions == "learned":
            shapes["positions.weight"] = (self.context_length, hidden)
        for layer in range(self.num_layers):
            shapes |= {f"blocks.{layer}.{name}": shape for name, shape in self.block_shapes().items()}
        shapes |= self._norm_shapes("norm", hidden)
        if not self.tie_embeddings:
            shapes |= _linear_shapes("head", hidden, self.vocab_size, self.head_bias)
        elif self.head_bias:
            shapes = {"tied_bias": (self.vocab_size,)} | shapes
        return shapes

    def block_shapes(self) -> Shapes:
        """Parameters of one block, by the name inside it."""
        hidden, wide = self.hidden_size, self.intermediate_size
        heads = self.num_heads * self.head_dim
        shapes = self._norm_shapes("attn_norm", hidden)
        shapes |= _linear_shapes("attn.qkv", hidden, heads + 2 * self.num_kv_heads * self.head_dim, self.qkv_bias)
        shapes |= _linear_shapes("attn.out", heads, hidden, self.out_bias)
        if self.qk_norm:
            shapes |= {"attn.q_norm.weight": (self.head_dim,), "attn.k_norm.weight": (self.head_dim,)}
        if not self.parallel_residual:
            shapes |= self._norm_shapes("mlp_norm", hidden)
        first, rows = ("mlp.gate_up", 2 * wide) if self.gated_mlp else ("mlp.up", wide)
        shapes |= _linear_shapes(first, hidden, rows, self.mlp_bias)
        return shapes | _linear_shapes("mlp.down", wide, hidden, self.mlp_bias)

    def _norm_shapes(self, name: str, dim: int) -> Shapes:
        weight: Shapes = {f"{name}.weight": (dim,)}
        return weight | {f"{name}.bias": (dim,)} if self.norm == "layer" else weight

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's normal initialisation; None = constant, see `init_value`.

        0.02, and 0.02 / sqrt(2 layers) for the two projections that write to the residual (GPT-2's rule).
        """
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2].endswith("norm"):
            return None
        return INIT_STD / math.sqrt(2 * self.num_layers) if module.endswith(("attn.out", "mlp.down")) else INIT_STD

    def init_value(self, name: str) -> float:
        """Mean of a parameter's initialisation: 1 for norm weights, 0 for everything else."""
        return 1.0 if name.endswith("norm.weight") else 0.0


def _linear_shapes(name: str, inputs: int, outputs: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def config_from_section(section: ModelSection, vocab_size: int | None = None) -> DecoderConfig:
    """The configuration of a model to pretrain. ``section.vocab_size`` wins over the dataset's ``vocab_size``."""
    vocab = section.vocab_size or vocab_size
    if vocab is None:
        raise UserError("model.vocab_size is not set and no dataset gives one")
    traits = {"qkv_bias": False, "out_bias": False, "mlp_bias": False} | FAMILIES[section.family]
    head_dim = section.head_dim or section.hidden // section.heads
    if not traits["gated_mlp"]:
        default_width = 4 * section.hidden
    else:
        default_width = -(-8 * section.hidden // (3 * 64)) * 64
    if section.family in ("gpt2", "gptj") and section.rope_theta != 10_000.0:
        raise UserError(f"model.rope_theta = {section.rope_theta:g}: family {section.family} has no such setting")
    rope_dim = 0 if traits["positions"] == "learned" else head_dim
    return DecoderConfig(
        family=section.family,
        vocab_size=vocab,
        hidden_size=section.hidden,
        num_layers=section.layers,
        num_heads=section.heads,
        num_kv_heads=section.kv_heads or section.heads,
        head_dim=head_dim,
        intermediate_size=section.intermediate or default_width,
        context_length=section.context_length,
        rope_theta=section.rope_theta,
        rope_dim=min(64, rope_dim) if section.family == "gptj" else rope_dim,
        norm_eps=section.norm_eps,
        activation="silu" if traits["gated_mlp"] else "gelu_tanh",
        tie_embeddings=section.tie_embeddings,
        **traits,
    )
