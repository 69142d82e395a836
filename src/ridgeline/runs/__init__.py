"""Runs: the folder every command leaves, its metrics, and the comparison of two. Knows nothing of torch."""

from ridgeline.runs.run import Run, environment, list_runs, runs_root, write_atomic

__all__ = ["Run", "environment", "list_runs", "runs_root", "write_atomic"]
