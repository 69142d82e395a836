"""The plan of a job: everything that can be said before it runs, as one record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ridgeline.plan.calibration import Calibration, History
from ridgeline.plan.estimates import utilisation_warning
from ridgeline.plan.flops import FlopCount, flops_per_token
from ridgeline.plan.memory import MemoryPlan, MemorySetup, memory_plan
from ridgeline.plan.parameters import ParameterReport, parameter_report
from ridgeline.plan.step_time import TimePlan, TimeSetup, time_plan

if TYPE_CHECKING:
    from ridgeline.config import JobConfig
    from ridgeline.hardware import Ceilings
    from ridgeline.models.config import DecoderConfig


@dataclass(frozen=True)
class Plan:
    """A job's prediction. Per-rank bytes, whole-job FLOPs, seconds per optimiser step."""

    parameters: ParameterReport
    flops: FlopCount
    memory: MemoryPlan
    time: TimePlan
    calibration: Calibration | None
    tokens_per_step: int
    peak_flops_per_second: float  # of all devices together: the MFU's denominator
    devices: int
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """What the calibration multiplies every part of the step by; 1 without one."""
        return self.calibration.factor if self.calibration else 1.0

    @property
    def step_seconds(self) -> float:
        """Predicted seconds per optimiser step, calibration included."""
        return self.time.step_seconds * self.factor

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second over the measured GEMM ceiling of the devices in use."""
        return self.flops.model * self.tokens_per_second / self.peak_flops_per_second

    @property
    def mfu_formula(self) -> str:
        """The MFU's numerator and denominator in words."""
        return f"({self.flops.formula.split('; +')[0]}) x tokens/s / measured {self.dtype} GEMM of {self.devices} device(s)"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: ``prediction.json`` of a run."""
        parts = {name: seconds * self.factor for name, seconds in self.time.step_seconds_by_part.items()}
        return {
            "parameters": self.parameters.exact,
            "parameter_report": self.parameters.to_dict(),
            "flops": {
                "per_token": self.flops.model,
                "per_step": self.flops.total * self.tokens_per_step,
                "formula": self.flops.formula,
                **self.flops.to_dict(),
            },
            "tokens_per_step": self.tokens_per_step,
            "peak_bytes": self.memory.peak_bytes,
            "bytes_by_category": self.memory.bytes_by_category,
            "memory": self.memory.to_dict(),
            "step_seconds": self.step_seconds,
            "step_seconds_uncalibrated": self.time.step_seconds,
            "step_seconds_by_part": parts,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "time": self.time.to_dict(),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "mfu_formula": self.mfu_formula,
            "peak_flops_per_second": self.peak_flops_per_second,
            "devices": self.devices,
            "dtype": self.dtype,
            "notes": list(self.notes),
        }


def plan_job(job: JobConfig, config: DecoderConfig, ceilings: Ceilings, calibration: History | None = None) -> Plan:
    """Plan ``job`` with the model ``config`` on the device of ``ceilings``.

    The runs in ``calibration`` (:func:`ridgeline.plan.calibration.for_job`) that were about as large scale the predicted
    time; the factor and the runs are stored in the plan.

    Raises:
        UserError: a ceiling the prediction needs was not measured.
    """
    train, parallel = job.train, job.parallel
    recompute = parallel.activation_checkpointing == "full"
    setup = TimeSetup(
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        procs=parallel.procs,
        dtype=train.dtype,
        compiled=train.compile,
        recompute=recompute,
        reshard_after_forward=parallel.reshard_after_forward,
        clip=job.optimizer.clip_norm > 0,
    )
    time = time_plan(config, setup, ceilings)
    memory = memory_plan(config, _memory_setup(setup, ceilings))
    parameters = parameter_report(config)
    devices = 1 if ceilings.kind == "cpu" else parallel.procs
    plan = Plan(
        parameters=parameters,
        flops=flops_per_token(config, train.seq_len, recompute),
        memory=memory,
        time=time,
        calibration=calibration.near(time.step_seconds) if calibration else None,
        tokens_per_step=train.global_batch_size * train.seq_len,
        peak_flops_per_second=ceilings.gemm_flops_per_second[train.dtype] * devices,
        devices=devices,
        dtype=train.dtype,
        notes=(*parameters.warnings, *_about(ceilings)),
    )
    warning = utilisation_warning(plan.mfu)
    return plan if warning is None else replace(plan, notes=(*plan.notes, warning))


def _about(ceilings: Ceilings) -> list[str]:
    if not ceilings.disturbed:
        return []
    return ["the ceilings were measured on a busy machine and are too low: times are too long, MFU too high"]


def _memory_setup(setup: TimeSetup, ceilings: Ceilings) -> MemorySetup:
    return MemorySetup(
        seq_len=setup.seq_len,
        micro_batch_size=setup.micro_batch_size,
        micro_steps=setup.micro_steps,
        dp=setup.procs,
        dtype=setup.dtype,
        compiled=setup.compiled,
        recompute=setup.recompute,
        reshard_after_forward=setup.reshard_after_forward,
        kind=ceilings.kind,
        process_bytes=(ceilings.process_bytes or 0) if ceilings.kind == "cpu" else 0,
    )
