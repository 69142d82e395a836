"""From a finding to its proof: profile a job, try the knob, keep it only when it is faster beyond the noise and the
losses are the same. The job may be a configuration of ours or anyone's training command, which runs unedited.

The parent process imports no torch; what runs inside the job is :mod:`ridgeline.profiling.improve.injection`.
"""

from ridgeline.profiling.improve.finding import Finding
from ridgeline.profiling.improve.knobs import BY_NAME, OWN, Knob
from ridgeline.profiling.improve.plan import Improvement, Row, improve
from ridgeline.profiling.improve.proof import Gain, compare_losses, judge
from ridgeline.profiling.improve.serving import Load, Served, parse_load
from ridgeline.profiling.improve.trial import Plan

__all__ = [
    "BY_NAME",
    "OWN",
    "Finding",
    "Gain",
    "Improvement",
    "Knob",
    "Load",
    "Plan",
    "Row",
    "Served",
    "compare_losses",
    "improve",
    "judge",
    "parse_load",
]
