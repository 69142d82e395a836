"""Predicted seconds of one training step, part by part, from the device's measured ceilings.

No part has a factor without a name: GEMMs and attention run at a stated share of the measured GEMM ceiling
(:data:`EFFICIENCY`), everything else at the measured copy bandwidth or bus bandwidth, each operation's bytes counted
without reuse in cache between operations. What is left out (launches, Python, the input pipeline) is listed as such;
a calibration factor from finished runs (:mod:`ridgeline.plan.calibration`) may scale the sum and is then named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.errors import UserError
from ridgeline.plan.flops import attention_forward, matmul_parameters
from ridgeline.plan.memory import FP32, ITEMSIZE, group_sizes, sharded_elements

if TYPE_CHECKING:
    from ridgeline.hardware import Ceilings
    from ridgeline.models.config import DecoderConfig

# Shares of the best square GEMM that the operations of a training step reach. A training step's GEMMs are narrow on one
# side and their transposes strided; attention spends its time in exponentials too. Starting points, not results: they
# are stored with every plan, and finished runs correct them.
EFFICIENCY = {
    "cpu": {"gemm": 0.75, "attention": 0.25},
    "cuda": {"gemm": 0.75, "attention": 0.5},
}
ATTENTION_BACKWARD = 2.5  # flash attention's backward over its forward: the scores are computed again
ADAMW_BYTES = 7 * FP32  # read parameter, gradient, two moments; write parameter and moments
CLIP_BYTES = 3 * FP32  # read for the norm; read and write to scale
LOSS_PASSES = 4  # over the logits, in the compute dtype: written, read for the softmax, gradient written, read


@dataclass(frozen=True)
class TimePlan:
    """``step_seconds == sum(step_seconds_by_part)``."""

    step_seconds: float
    step_seconds_by_part: dict[str, float]
    formulas: dict[str, str]
    inputs: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TimeSetup:
    """What a step's time depends on beside the model and the device."""

    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    procs: int = 1
    dtype: str = "bf16"
    compiled: bool = True
    recompute: bool = False
    reshard_after_forward: bool = True
    clip: bool = True

    @property
    def micro_steps(self) -> int:
        """Forward passes per optimiser step and rank."""
        return self.global_batch_size // (self.micro_batch_size * self.procs)


def time_plan(config: DecoderConfig, setup: TimeSetup, ceilings: Ceilings) -> TimePlan:
    """Predict one optimiser step.

    Processes on a CPU share it, so the work of all ranks is set against the one device's ceilings; with GPUs each
    rank has its own.

    Raises:
        UserError: a ceiling the prediction needs was not measured.
    """
    rates = _rates(setup, ceilings)
    sharing = setup.procs if ceilings.kind == "cpu" else 1  # ranks behind one device
    tokens = setup.global_batch_size * setup.seq_len * sharing / setup.procs
    blocks, head = matmul_parameters(config)
    passes = 4 if setup.recompute else 3  # forward, backward (twice a forward), and the forward again
    attention = attention_forward(config, setup.seq_len) * (1 + ATTENTION_BACKWARD + (passes - 3))
    local = sharded_elements(config, setup.procs) * sharing
    moved = elementwise_bytes(config, setup) * (passes * config.num_layers)
    parts = {
        "block GEMMs": 2.0 * blocks * passes * tokens / rates["gemm"],
        "head GEMMs": 6.0 * head * tokens / rates["gemm"],
        "attention": attention * tokens / rates["attention"],
        "elementwise": moved * tokens / rates["copy"],
        "loss": LOSS_PASSES * ITEMSIZE[setup.dtype] * config.vocab_size * tokens / rates["copy"],
        "optimizer": (ADAMW_BYTES + (CLIP_BYTES if setup.clip else 0)) * local / rates["copy"],
        "parameter copies": parameter_copy_bytes(config, setup) * sharing / rates["copy"],
        "collectives": collective_seconds(config, setup, ceilings),
        "data": 0.0,
    }
    inputs = {
        "device": ceilings.device,
        "kind": ceilings.kind,
        "measured_at": ceilings.measured_at,
        "rates_per_second": rates,
        "efficiency": EFFICIENCY[ceilings.kind],
        "tokens_per_device": tokens,
        "ranks_per_device": sharing,
        "micro_steps": setup.micro_steps,
        **asdict(setup),
    }
    return TimePlan(sum(parts.values()), parts, _formulas(setup, ceilings.kind), inputs)


def elementwise_bytes(config: DecoderConfig, setup: TimeSetup) -> int:
    """Bytes per token that one block's element-wise operations move in forward; a backward moves twice as many.

    Norms read and write h; each residual sum reads two rows and writes one; rotary reads and writes q and k; the
    activation reads its input and writes f; attention reads q, k, v and writes its output. Not compiled, the bf16
    RMSNorm goes through fp32 (its row is read and written three more times at 4 bytes).
    """
    item, h, f = ITEMSIZE[setup.dtype], config.hidden_size, config.intermediate_size
    a, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 1 if config.parallel_residual else 2
    rows = norms * 2 * h + 2 * 3 * h + (2 * a + 2 * k)
    rows += 3 * f if config.gated_mlp else 2 * f
    rows += 2 * (a + k) if config.positions == "rotary" else 0
    rows += 2 * (a + k) if config.qk_norm else 0
    eager = 0 if setup.compiled or config.norm == "layer" else norms * 6 * h * FP32
    return rows * item + eager


def parameter_copy_bytes(config: DecoderConfig, setup: TimeSetup) -> float:
    """Bytes one rank moves in its own memory for FSDP2's copies, per step.

    Every gather casts the local shard (read fp32, write the compute dtype) and copies the whole group out (read and
    write); the reduction writes the gradient in fp32 and reads it back into the shard.
    """
    item = ITEMSIZE[setup.dtype]
    gathered = gathered_elements(config, setup)
    whole = _whole(config)
    return gathered * ((FP32 + item) / setup.procs + 2 * item) + whole * (item + 2 * FP32 + FP32 / setup.procs)


def gathered_elements(config: DecoderConfig, setup: TimeSetup) -> int:
    """Elements gathered per step: the root once; a block once, or with resharding once more per micro-step.

    Between micro-steps gathered weights are kept, so A micro-steps cost A + 1 gathers of a block and not 2A.
    """
    block, root = group_sizes(config)
    gathers = setup.micro_steps + 1 if setup.reshard_after_forward else 1
    return root + config.num_layers * block * gathers


def collective_seconds(config: DecoderConfig, setup: TimeSetup, ceilings: Ceilings) -> float:
    """All-gathers in the compute dtype and one fp32 reduction of every gradient, at bus bandwidth; none hidden.

    gloo has no reduce-scatter of its own and all-reduces instead: twice the bytes.
    """
    n = setup.procs
    if n == 1:
        return 0.0
    gather_rate, reduce_rate = ceilings.all_gather_bytes_per_second, ceilings.all_reduce_bytes_per_second
    if gather_rate is None or reduce_rate is None:
        raise UserError("ceilings: collectives were not measured on this device; run `ridgeline env --refresh`")
    share = (n - 1) / n
    gather = share * gathered_elements(config, setup) * ITEMSIZE[setup.dtype] / gather_rate
    reduction = (2 if ceilings.backend == "gloo" else 1) * share * _whole(config) * FP32 / reduce_rate
    return gather + reduction


def _whole(config: DecoderConfig) -> int:
    block, root = group_sizes(config)
    return root + config.num_layers * block


def _rates(setup: TimeSetup, ceilings: Ceilings) -> dict[str, float]:
    gemm = ceilings.gemm_flops_per_second.get(setup.dtype)
    if gemm is None or ceilings.copy_bytes_per_second is None:
        what = f"the {setup.dtype} GEMM" if gemm is None else "copy bandwidth"
        raise UserError(f"ceilings: {what} was not measured on this device; run `ridgeline env --refresh`")
    share = EFFICIENCY[ceilings.kind]
    return {
        "gemm": gemm * share["gemm"],
        "attention": gemm * share["attention"],
        "copy": ceilings.copy_bytes_per_second,
    }


def _formulas(setup: TimeSetup, kind: str) -> dict[str, str]:
    passes = "8" if setup.recompute else "6"
    share = EFFICIENCY[kind]
    return {
        "block GEMMs": f"{passes} N_blocks tokens / ({share['gemm']:g} x measured {setup.dtype} GEMM)",
        "head GEMMs": f"6 V h tokens / ({share['gemm']:g} x measured {setup.dtype} GEMM)",
        "attention": f"4 heads head_dim s/2 L x (1 forward + {ATTENTION_BACKWARD:g} backward"
        f"{' + 1 recomputed' if setup.recompute else ''}) tokens / ({share['attention']:g} x measured {setup.dtype} GEMM)",
        "elementwise": "bytes of norms, residuals, rotary, activation, attention in and out / copy bandwidth",
        "loss": f"{LOSS_PASSES} passes over the logits / copy bandwidth",
        "optimizer": f"{ADAMW_BYTES} B AdamW{f' + {CLIP_BYTES} B clipping' if setup.clip else ''} per parameter of the shard / copy bandwidth",
        "parameter copies": "casts and copies of gathered weights and reduced gradients / copy bandwidth",
        "collectives": "gathered bytes (n-1)/n / all-gather + gradient bytes / all-reduce bus bandwidth, none hidden",
        "data": "0: prefetched, assumed hidden",
    }
