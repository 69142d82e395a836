"""Predicted seconds of one training step, part by part, from the device's measured ceilings.

No factor is without a name. GEMMs: FLOPs at the measured ceiling plus their operands' bytes at the copy bandwidth, not
overlapped. Attention: a stated share of the GEMM ceiling (:data:`ATTENTION_SHARE`). Element-wise work: the slower of its
bytes at copy bandwidth (no reuse in cache between operations) and the elements it writes at the measured rate of
exponentials.
What is left out (launches, Python, the input pipeline) is listed as such. A calibration factor from finished runs
(:mod:`ridgeline.plan.calibration`) may scale the sum and is then named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ridgeline.errors import UserError
from ridgeline.plan.flops import attention_forward, block_products, matmul_parameters
from ridgeline.plan.memory import FP32, ITEMSIZE, group_sizes, sharded_elements

if TYPE_CHECKING:
    from ridgeline.hardware import Ceilings
    from ridgeline.models.config import DecoderConfig

# Share of the GEMM ceiling that attention reaches, counted over the causal half of the scores: it spends its time in
# exponentials and small products. CPU figures: 512 positions on two AVX512-BF16 cores, compiled and eager; CUDA: a
# starting point. They are stored with every plan, and finished runs correct the sum.
ATTENTION_SHARE = {"cpu": {"compiled": 0.33, "eager": 0.17}, "cuda": {"compiled": 0.5, "eager": 0.5}}
ATTENTION_BACKWARD = 2.5  # flash attention's backward over its forward: the scores are computed again
ADAMW_BYTES = 7 * FP32  # read parameter, gradient, two moments; write parameter and moments
CLIP_BYTES = 3 * FP32  # read for the norm; read and write to scale
LOSS_PASSES = {"cpu": 5, "cuda": 3}  # over a chunk of logits in fp32: one by one on a CPU, partly fused on a GPU


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
    item = ITEMSIZE[setup.dtype]
    written, moved = elementwise_elements(config, setup)
    rows = tokens * passes * config.num_layers
    operands = item * config.num_layers * sum(tokens * (o + i) + o * i for o, i in block_products(config).values())
    head_operands = item * (tokens * (config.vocab_size + config.hidden_size) + head)
    parts = {
        "block GEMMs": 2.0 * blocks * passes * tokens / rates["gemm"] + passes * operands / rates["copy"],
        "head GEMMs": 6.0 * head * tokens / rates["gemm"] + 3 * head_operands / rates["copy"],
        "attention": attention * tokens / rates["attention"],
        "elementwise": rows * max(item * moved / rates["copy"], written / rates["elementwise"]),
        "loss": LOSS_PASSES[ceilings.kind] * tokens * config.vocab_size / rates["elementwise"],
        "optimizer": (ADAMW_BYTES + (CLIP_BYTES if setup.clip else 0)) * local / rates["copy"],
        "parameter copies": parameter_copy_bytes(config, setup) * sharing / rates["copy"],
        "collectives": collective_seconds(config, setup, ceilings),
        "data": 0.0,
    }
    inputs = {
        "device": ceilings.device,
        "kind": ceilings.kind,
        "measured_at": ceilings.measured_at,
        "disturbed": ceilings.disturbed,
        "rates_per_second": rates,
        "attention_share": _attention_share(setup, ceilings.kind),
        "tokens_per_device": tokens,
        "ranks_per_device": sharing,
        "micro_steps": setup.micro_steps,
        **asdict(setup),
    }
    return TimePlan(sum(parts.values()), parts, _formulas(setup, ceilings.kind), inputs)


def elementwise_elements(config: DecoderConfig, setup: TimeSetup) -> tuple[int, int]:
    """(elements written, elements read and written) per token by one block's forward; a backward moves twice that.

    Norms read and write h; each residual sum reads two rows and writes one; rotary reads and writes q and k; the
    activation reads its input and writes f; attention lays out q, k, v and its output anew. Not compiled, an RMSNorm
    is six operations instead of one and a gated activation two.
    """
    h, f = config.hidden_size, config.intermediate_size
    a, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norms = 1 if config.parallel_residual else 2
    norm_steps = 6 if config.norm == "rms" and not setup.compiled else 1
    rotated = (a + k) * ((config.positions == "rotary") + config.qk_norm)
    gate_steps = 2 if config.gated_mlp and not setup.compiled else 1
    written = norms * h * norm_steps + 2 * h + rotated + gate_steps * f + 2 * a + 2 * k
    read = norms * h * norm_steps + 4 * h + rotated + gate_steps * (2 if config.gated_mlp else 1) * f + 2 * a + 2 * k
    return written, written + read


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
    # A record without a rate of exponentials leaves element-wise work to the bandwidth alone.
    elementwise = ceilings.elementwise_per_second or ceilings.copy_bytes_per_second / FP32
    return {
        "gemm": gemm,
        "attention": gemm * _attention_share(setup, ceilings.kind),
        "copy": ceilings.copy_bytes_per_second,
        "elementwise": elementwise,
    }


def _attention_share(setup: TimeSetup, kind: str) -> float:
    return ATTENTION_SHARE[kind]["compiled" if setup.compiled else "eager"]


def _formulas(setup: TimeSetup, kind: str) -> dict[str, str]:
    gemm, again = f"measured {setup.dtype} GEMM", " + 1 recomputed" if setup.recompute else ""
    clip = f" + {CLIP_BYTES} B clipping" if setup.clip else ""
    return {
        "block GEMMs": f"{8 if setup.recompute else 6} N_blocks tokens / {gemm} + operands / copy bandwidth",
        "head GEMMs": f"6 V h tokens / {gemm} + operands / copy bandwidth",
        "attention": f"4 heads head_dim s/2 L (1 + {ATTENTION_BACKWARD:g} backward{again}) tokens / "
        f"({_attention_share(setup, kind):g} x {gemm})",
        "elementwise": "norms, residuals, rotary, activation, attention's in and out: the slower of their bytes / copy "
        "bandwidth and elements written / exponentials",
        "loss": f"{LOSS_PASSES[kind]} passes over the logits / exponentials",
        "optimizer": f"{ADAMW_BYTES} B AdamW{clip} per parameter of the shard / copy bandwidth",
        "parameter copies": "casts and copies of gathered weights and reduced gradients / copy bandwidth",
        "collectives": "gathered bytes (n-1)/n / all-gather + gradient bytes / all-reduce bus bandwidth, none hidden",
        "data": "0: prefetched, assumed hidden",
    }
