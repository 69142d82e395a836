"""Bytes of one rank by category, and at which moment of a step they peak.

What is assumed of the trainer stands in :data:`ASSUMPTIONS` and goes with every plan.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.plan import activations

if TYPE_CHECKING:
    from ridgeline.models.config import DecoderConfig

FP32 = 4
ITEMSIZE = {"bf16": 2, "fp32": 4}
ASSUMPTIONS = (
    "masters, gradients and both AdamW moments are fp32, sharded over dp on dim 0, uneven rows rounded up",
    "FSDP2 gathers compute copies group by group; the root (embedding, final norm, head) and, with resharding, two "
    "blocks are held: the one that runs and the one gathered ahead; all blocks without, or while micro-steps accumulate",
    "the group in flight has its gradient in the compute dtype and in fp32; accumulating micro-steps keep the whole "
    "model's fp32 gradient unsharded",
    "activations are the tensors autograd keeps; the chunked loss never holds all logits",
    "process is the measured resident memory of a process that has loaded torch's training modules (CPU only)",
    "not counted: memory that the C library's allocator keeps after it was freed (150 MB of a 1,200 MB peak in one check), "
    "communication buffers, what the compiler needs while it compiles",
)
BLOCKS_GATHERED = 2  # the block that runs and the one gathered ahead
CHUNK_ELEMENTS, MIN_CHUNK_ROWS = 8 * 2**20, 256  # of the chunked cross-entropy (kernels.cross_entropy)


@dataclass(frozen=True)
class MemoryPlan:
    """``peak_bytes == sum(bytes_by_category)``: the categories at the moment of the peak, on one rank."""

    peak_bytes: int
    peak_moment: str
    bytes_by_category: dict[str, int]
    moments: dict[str, dict[str, int]]
    largest_tensors: dict[str, int]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class MemorySetup:
    """What memory depends on beside the model."""

    seq_len: int
    micro_batch_size: int
    micro_steps: int = 1
    dp: int = 1
    dtype: str = "bf16"
    compiled: bool = True
    recompute: bool = False
    reshard_after_forward: bool = True
    kind: str = "cpu"
    process_bytes: int = 0


def memory_plan(config: DecoderConfig, setup: MemorySetup) -> MemoryPlan:
    """Bytes by category at each moment of a step; the largest moment is the peak."""
    item = ITEMSIZE[setup.dtype]
    block, root = group_sizes(config)
    whole = config.num_layers * block + root
    sharded = sharded_elements(config, setup.dp) * FP32
    accumulating = setup.micro_steps > 1
    keeps_all = accumulating or not setup.reshard_after_forward
    blocks_held = config.num_layers if keeps_all else min(config.num_layers, BLOCKS_GATHERED)
    kept = activations.kept(config, setup)
    head = config.vocab_size * config.hidden_size
    static = {"process": setup.process_bytes, "parameters": sharded, "optimizer_state": 2 * sharded}
    static = {name: size for name, size in static.items() if size}
    copies = {"compute_copies": (root + blocks_held * block) * item}
    accumulated = {"accumulated_gradients": whole * FP32} if accumulating else {}
    rows = setup.micro_batch_size * setup.seq_len
    moments = {
        "loss": static | copies | accumulated | {"activations": kept, "loss": _loss_bytes(config, setup, rows, item)},
        "backward": static
        | copies
        | accumulated
        | {
            "activations": kept + (activations.block(config, setup) if setup.recompute else 0),
            # The head's gradient, as the loss saved it and once more scaled; then the last block's.
            "gradient_buffers": 2 * head * item + block * (item + FP32),
        },
        "reduction": static
        | {"compute_copies": root * item}
        | accumulated
        | {"gradients": sharded, "gradient_buffers": root * (item + FP32)},
        "optimizer": static | {"gradients": sharded},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan(
        peak_bytes=sum(moments[moment].values()),
        peak_moment=moment,
        bytes_by_category=moments[moment],
        moments=moments,
        largest_tensors={
            "activations of one block": activations.block(config, setup),
            "logits of the whole micro-batch (never held)": rows * config.vocab_size * item,
            "gathered copy of the root": root * item,
        },
        assumptions=ASSUMPTIONS,
    )


def group_sizes(config: DecoderConfig) -> tuple[int, int]:
    """Parameters of one block, and of the root group (all that is in no block)."""
    block = sum(math.prod(shape) for shape in config.block_shapes().values())
    total = sum(math.prod(shape) for shape in config.parameter_shapes().values())
    return block, total - config.num_layers * block


def sharded_elements(config: DecoderConfig, dp: int) -> int:
    """Elements of the largest rank's shard: every parameter split on dim 0, rows rounded up."""
    shapes = config.parameter_shapes().values()
    return sum(-(-shape[0] // dp) * math.prod(shape[1:]) for shape in shapes)


def chunk_rows(rows: int, vocab: int) -> int:
    """Rows of logits that exist at a time."""
    return max(1, min(rows, max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocab)))


def _loss_bytes(config: DecoderConfig, setup: MemorySetup, rows: int, item: int) -> int:
    """In the chunked loss: a chunk of logits, the hidden states' gradient twice (chunks, joined), the head's gradient
    in fp32 and in the compute dtype. A CPU works on the chunk in place; a GPU holds fp32 copies of it (two) too."""
    chunk = chunk_rows(rows, config.vocab_size) * config.vocab_size
    logits = chunk * (item if setup.kind == "cpu" else item + 2 * FP32)
    hidden = 2 * rows * config.hidden_size * item
    head = config.vocab_size * config.hidden_size * (FP32 + item)
    return logits + hidden + head
