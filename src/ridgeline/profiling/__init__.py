"""Profiling: capture steps of any training loop, split their time from the trace, and say what to try.

Importing the package imports neither torch nor numpy; each name loads its file at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.profiling.breakdown import analyze, break_down, combine
    from ridgeline.profiling.capture import ProfileSpec, StepProfiler
    from ridgeline.profiling.load import find_traces, load_table
    from ridgeline.profiling.results import PARTS, RankBreakdown, StepBreakdown, StepParts
    from ridgeline.profiling.session import is_trace, profile_target
    from ridgeline.profiling.verdict import Finding, Verdict, verdict

_HOMES = {
    "breakdown": ("analyze", "break_down", "combine"),
    "capture": ("ProfileSpec", "StepProfiler"),
    "load": ("find_traces", "load_table"),
    "results": ("PARTS", "RankBreakdown", "StepBreakdown", "StepParts"),
    "session": ("is_trace", "profile_target"),
    "verdict": ("Finding", "Verdict", "verdict"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PARTS",
    "Finding",
    "ProfileSpec",
    "RankBreakdown",
    "StepBreakdown",
    "StepParts",
    "StepProfiler",
    "Verdict",
    "analyze",
    "break_down",
    "combine",
    "find_traces",
    "is_trace",
    "load_table",
    "profile_target",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
