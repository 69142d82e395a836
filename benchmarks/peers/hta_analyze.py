"""Holistic Trace Analysis, timed: load one trace and run the single-rank analyses. Prints JSON.

Imports nothing of Ridgeline: it runs in an environment of its own (``benchmarks/peers/make hta``), HTA 0.5.0 from PyPI
with pandas 2. Each analysis is called as its documentation shows, without plots; what raises is reported by name.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version

from hta.trace_analysis import TraceAnalysis

ANALYSES: dict[str, Callable[[TraceAnalysis], object]] = {
    "temporal": lambda a: a.get_temporal_breakdown(visualize=False),
    "kernels": lambda a: a.get_gpu_kernel_breakdown(visualize=False),
    "overlap": lambda a: a.get_comm_comp_overlap(visualize=False),
    "idle": lambda a: a.get_idle_time_breakdown(ranks=[0], visualize=False),
    "launches": lambda a: a.get_cuda_kernel_launch_stats(ranks=[0], visualize=False),
    "queue": lambda a: a.get_queue_length_summary(ranks=[0]),
    "bandwidth": lambda a: a.get_memory_bw_summary(ranks=[0]),
}


def main() -> None:
    """Load, analyse, print seconds of each, what failed, and the peak memory above the imports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    before = rss_bytes()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        figures, failures = measure(options.trace)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = {name: version(name) for name in ("HolisticTraceAnalysis", "pandas", "numpy")}
    print(json.dumps({**figures, "peak_bytes": peak - before, "failures": failures, "versions": versions}))


def measure(path: str) -> tuple[dict[str, float], dict[str, str]]:
    """(seconds by name, the error of each analysis that raised)."""
    figures: dict[str, float] = {}
    failures: dict[str, str] = {}
    begun = time.perf_counter()
    try:
        analysis = TraceAnalysis(trace_files={0: os.path.abspath(path)}, trace_dir="/")
    except Exception as error:
        return figures, {"load": f"{type(error).__name__}: {error}"[:200]}
    figures["load"] = time.perf_counter() - begun
    for name, run in ANALYSES.items():
        begun = time.perf_counter()
        try:
            run(analysis)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            figures[name] = time.perf_counter() - begun
    return figures, failures


def rss_bytes() -> int:
    """Resident memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
