"""Load a trace and analyse it: Ridgeline against Holistic Trace Analysis from PyPI, on the same files.

Every contender of every round and file is a process of its own, in alternating order. Imports are not counted, for
either (``numpy.ma`` is one of them: pandas loads it with itself, Polars with its first column): seconds are wall time
from the path to the last frame, memory is the peak above the imports. An analysis counts for a file only if HTA
completes it there (a first run, not timed, finds out); ours then runs its own of the same question:

=========== ================================ ==========================================
analysis    HTA                              Ridgeline
=========== ================================ ==========================================
temporal    get_temporal_breakdown           temporal_breakdown
kernels     get_gpu_kernel_breakdown         kernel_breakdown
overlap     get_comm_comp_overlap            communication_overlap
idle        get_idle_time_breakdown          idle_by_cause
launches    get_cuda_kernel_launch_stats     launch_calls
queue       get_queue_length_summary         queue_summary
bandwidth   get_memory_bw_summary            memory_bandwidth
=========== ================================ ==========================================

HTA's frequent sequences and critical path, its slowest, are not in the sums: they write files or want an annotation.

    benchmarks/peers/make hta && python benchmarks/traces.py --rounds 3 --out traces.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ridgeline.bench import Session, interleave
from ridgeline.runs import environment

HERE = Path(__file__).parent
PEER, PYTHON = HERE / "peers/hta_analyze.py", HERE / "peers/hta/.venv/bin/python"
TRACES = HERE.parents[1] / "shared/traces"
OURS, THEIRS = "ridgeline", "HTA"
FIGURES = ("seconds", "load", "peak_bytes")
ANALYSES = {
    "temporal": "temporal.temporal_breakdown",
    "kernels": "kernels.kernel_breakdown",
    "overlap": "collectives.communication_overlap",
    "idle": "idle.idle_by_cause",
    "launches": "launches.launch_calls",
    "queue": "counters.queue_summary",
    "bandwidth": "counters.memory_bandwidth",
}


def main() -> None:
    """Measure, print, keep the JSON."""
    options = _arguments()
    if options.worker:
        print(json.dumps(work(options.worker, options.analyses.split(","))))
        return
    if not PYTHON.exists():
        raise SystemExit("no HTA here: run benchmarks/peers/make hta")
    files = options.files or _files(options.folder, options.least_bytes)
    measured = {str(path): measure(path, options.rounds) for path in files}
    document = summarise(measured, options)
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="traces, instead of the folder's")
    parser.add_argument("--folder", type=Path, default=TRACES)
    parser.add_argument("--least-bytes", type=int, default=300_000, help="leave out smaller files of the folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", metavar="TRACE", help=argparse.SUPPRESS)
    parser.add_argument("--analyses", default=",".join(ANALYSES), help=argparse.SUPPRESS)
    return parser.parse_args()


def _files(folder: Path, least: int) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json.gz") if path.stat().st_size >= least)


def measure(path: Path, rounds: int) -> dict[str, Any]:
    """The samples of both contenders on one file, and what HTA could not do there."""
    probe = _process([str(PYTHON), str(PEER), str(path)])
    done = [name for name in ANALYSES if name in probe]
    ours = [sys.executable, __file__, "--worker", str(path), "--analyses", ",".join(done or ANALYSES)]
    contenders = {OURS: partial(_timed, ours, done)}
    if "load" in probe:
        contenders[THEIRS] = partial(_timed, [str(PYTHON), str(PEER), str(path)], done)
    session = interleave(contenders, rounds, partial(report, path))
    return {
        "session": session,
        "analyses": done,
        "hta_failures": probe["failures"],
        "versions": probe.get("versions", {}),
    }


def _timed(command: list[str], analyses: list[str]) -> dict[str, float]:
    found = _process(command)
    seconds = {name: found[name] for name in ("load", *analyses)}
    extra = {name: found[name] for name in ("peak_bytes", "raw_bytes", "rows") if name in found}
    return {**seconds, **extra, "seconds": sum(seconds.values())}


def _process(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no output")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def work(path: str, analyses: list[str]) -> dict[str, float]:
    """Our side, in its own process: seconds of each part and the peak memory above the imports."""
    from ridgeline.profiling.load import load_tables

    importlib.import_module("numpy.ma")
    run = {name: _function(ANALYSES[name]) for name in analyses}
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    begun = time.perf_counter()
    (table,) = load_tables(path)
    figures: dict[str, float] = {"load": time.perf_counter() - begun}
    for name, analysis in run.items():
        begun = time.perf_counter()
        analysis(table)
        figures[name] = time.perf_counter() - begun
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {**figures, "raw_bytes": table.meta.raw_bytes, "rows": len(table)}


def _function(name: str) -> Any:
    module, function = name.split(".")
    return getattr(importlib.import_module(f"ridgeline.profiling.analyses.{module}"), function)


def summarise(measured: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Per file the medians, the ratios and HTA's failures; in total over the files that HTA loads."""
    rows = {_short(name, options.folder): _row(one) for name, one in measured.items()}
    both = [row for row in rows.values() if THEIRS in row]
    total = {
        name: {figure: sum(row[name][figure] for row in both) for figure in FIGURES} for name in (OURS, THEIRS) if both
    }
    return {
        "rows": rows,
        "total": total,
        "times_faster": total[THEIRS]["seconds"] / total[OURS]["seconds"] if both else None,
        "memory_ratio": total[OURS]["peak_bytes"] / total[THEIRS]["peak_bytes"] if both else None,
        "slowest_times_faster": min((row["times_faster"] for row in both), default=None),
        "worst_memory_ratio": max((row["memory_ratio"] for row in both), default=None),
        "aa_floor": median(row["aa_floor"] for row in both) if both and options.rounds > 1 else None,
        "versions": next((one["versions"] for one in measured.values() if one["versions"]), {}),
        "samples": {_short(name, options.folder): one["session"].samples for name, one in measured.items()},
        "settings": {"rounds": options.rounds, "cores": len(os.sched_getaffinity(0))},
        "environment": environment(),
    }


def _row(one: dict[str, Any]) -> dict[str, Any]:
    session: Session = one["session"]
    row: dict[str, Any] = {"analyses": one["analyses"], "hta_failures": one["hta_failures"], **session.failures}
    for name, figures in session.samples.items():
        row[name] = {figure: session.median(name, figure) for figure in figures}
    if OURS in row and THEIRS in row:
        row["times_faster"] = row[THEIRS]["seconds"] / row[OURS]["seconds"]
        row["memory_ratio"] = row[OURS]["peak_bytes"] / row[THEIRS]["peak_bytes"]
        row["aa_floor"] = max(session.floor(name, "seconds") for name in (OURS, THEIRS))
    return row


def _short(name: str, folder: Path) -> str:
    path = Path(name)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def report(path: Path, round_: int, name: str, figures: Any) -> None:
    """One line per process on stderr."""
    what = (
        figures
        if isinstance(figures, str)
        else f"{figures['seconds']:6.2f} s, load {figures['load']:5.2f} s, {figures['peak_bytes'] / 1e6:6.1f} MB"
    )
    print(f"round {round_ + 1}  {path.name[:44]:<46} {name:<10} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
