"""Runs: the folder every command leaves, its metrics, and the comparison of two. Knows nothing of torch."""

from ridgeline.runs.compare import RunComparison, compare_runs
from ridgeline.runs.run import Run, environment, list_runs, runs_root, write_atomic
from ridgeline.runs.stats import Comparison, aa_floor, compare_samples

__all__ = [
    "Comparison",
    "Run",
    "RunComparison",
    "aa_floor",
    "compare_runs",
    "compare_samples",
    "environment",
    "list_runs",
    "runs_root",
    "write_atomic",
]
