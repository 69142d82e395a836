"""What the figures are held against: the device's measured ceiling, the FLOPs of a token, the planner's prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ridgeline.config import JobConfig
from ridgeline.hardware import Ceilings
from ridgeline.models import DecoderConfig
from ridgeline.plan import flops_per_token, plan_job
from ridgeline.plan.calibration import for_job


@dataclass(frozen=True)
class Limits:
    """MFU = tokens/s x FLOPs per token / measured GEMM rate of the compute dtype over all devices of the job."""

    flops_per_token: float
    formula: str
    peak_flops_per_second: float | None
    denominator: str

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation, or None when the ceiling of this dtype is not known (it is never guessed)."""
        if self.peak_flops_per_second is None:
            return None
        return tokens_per_second * self.flops_per_token / self.peak_flops_per_second


def limits(job: JobConfig, config: DecoderConfig, ceilings: Ceilings, world_size: int, nodes: int) -> Limits:
    """Limits of a job on ``world_size`` processes. Processes of one machine share its CPU ceiling; each has a GPU."""
    # Recomputation is work the model does not need: MFU leaves it out, by definition.
    count = flops_per_token(config, job.train.seq_len)
    rate = ceilings.gemm_flops_per_second.get(job.train.dtype)
    devices = world_size if ceilings.kind == "cuda" else nodes
    if rate is None:
        return Limits(
            count.model, count.formula, None, f"no measured {job.train.dtype} GEMM ceiling of {ceilings.device}"
        )
    times = f"{devices} x " if devices > 1 else ""
    denominator = f"{times}{rate / 1e12:.3f} TFLOP/s, measured {job.train.dtype} GEMM of {ceilings.device}"
    return Limits(count.model, count.formula, rate * devices, denominator)


def prediction(job: JobConfig, config: DecoderConfig, ceilings: Ceilings) -> dict[str, Any]:
    """The planner's document for ``prediction.json``."""
    calibration = for_job(ceilings, job.train.dtype, job.parallel.procs, job.train.compile)
    return plan_job(job, config, ceilings, calibration).to_dict()
