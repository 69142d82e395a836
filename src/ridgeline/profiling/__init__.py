"""Profiling: capture steps of any training loop, split their time from the trace, and say what to try.

Torch is imported only while capturing; reading and judging traces needs numpy and msgspec.
"""

from ridgeline.profiling.breakdown import analyze, break_down, combine
from ridgeline.profiling.capture import ProfileSpec, StepProfiler
from ridgeline.profiling.load import find_traces, load_table
from ridgeline.profiling.results import PARTS, RankBreakdown, StepBreakdown, StepParts
from ridgeline.profiling.session import Profiled, is_trace, profile_target, record
from ridgeline.profiling.trace import Trace
from ridgeline.profiling.verdict import Finding, Verdict, verdict

__all__ = [
    "PARTS",
    "Finding",
    "ProfileSpec",
    "Profiled",
    "RankBreakdown",
    "StepBreakdown",
    "StepParts",
    "StepProfiler",
    "Trace",
    "Verdict",
    "analyze",
    "break_down",
    "combine",
    "find_traces",
    "is_trace",
    "load_table",
    "profile_target",
    "record",
    "verdict",
]
