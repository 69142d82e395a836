"""Parameters, FLOPs, memory and time of a job before it runs; and the comparison with what was measured afterwards.

Pure functions of a configuration and of the device's ceilings. Nothing here imports torch.
"""

from ridgeline.plan.calibration import Calibration, History
from ridgeline.plan.comparison import compare
from ridgeline.plan.estimates import Speculation, megatron_flops, speculation, training_seconds, utilisation_warning
from ridgeline.plan.flops import FlopCount, flops_per_token
from ridgeline.plan.job import Plan, plan_job
from ridgeline.plan.memory import MemoryPlan, memory_plan
from ridgeline.plan.parameters import ParameterReport, padded_vocab, parameter_report
from ridgeline.plan.step_time import TimePlan, time_plan

__all__ = [
    "Calibration",
    "FlopCount",
    "History",
    "MemoryPlan",
    "ParameterReport",
    "Plan",
    "Speculation",
    "TimePlan",
    "compare",
    "flops_per_token",
    "megatron_flops",
    "memory_plan",
    "padded_vocab",
    "parameter_report",
    "plan_job",
    "speculation",
    "time_plan",
    "training_seconds",
    "utilisation_warning",
]
