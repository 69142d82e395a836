"""How good the predictions of ``ridgeline trace whatif`` are: predict from a trace, change the job, measure it.

Two small training jobs, one process and two with DistributedDataParallel over gloo, have a slow loader, Python
preprocessing, a block of matrix products for nothing, and a rank that sleeps. Each case predicts the step from the
traces of the unchanged job; then the job really runs without that part. Unchanged and changed runs alternate, each a
process group of its own; a figure is the median over rounds, and the A/A floor is how far two unchanged runs differ.

    python benchmarks/whatif.py --rounds 3 --out whatif.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from options import leave, parser
from ridgeline.profiling.trace import Trace

STEPS = 10
ALONE = {"procs": 1, "data_ms": 15.0, "rows": 200_000, "products": 6, "width": 384, "batch": 128}
PAIR = {"procs": 2, "data_ms": 10.0, "straggle_ms": 20.0, "synchronise": True, "width": 512, "batch": 16}
HEAVY = PAIR | {"width": 1024}
"""Its ranks compete for the memory when both compute: what a replay of one trace cannot know."""
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "no data wait": (ALONE, "no-data-wait", {"data_ms": 0.0}),
    "preprocessing twice as fast": (ALONE, "operator:^mine::preprocess$=0.5", {"rows": 100_000}),
    "without six matrix products": (ALONE, "operator:^mine::products$=0", {"products": 0}),
    "no data wait, two ranks": (PAIR, "no-data-wait", {"data_ms": 0.0}),
    "the late rank is not late": (PAIR, "operator:^mine::straggle$=0", {"straggle_ms": 0.0}),
    "the late rank is not late, heavy": (HEAVY, "operator:^mine::straggle$=0", {"straggle_ms": 0.0}),
    "free communication": (PAIR | {"straggle_ms": 0.0}, "free-communication", {"synchronise": False}),
    "free communication, heavy": (HEAVY | {"straggle_ms": 0.0}, "free-communication", {"synchronise": False}),
}
"""Name -> (the job, the change to predict, what it then really is)."""


def main() -> None:
    """Predict, measure, print the table, keep the JSON."""
    asked = parser(__doc__, rounds=3)
    asked.add_argument("--only", help="cases whose name holds this")
    asked.add_argument("--rank", nargs=4, metavar=("JOB", "RANK", "FOLDER", "STORE"), help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.rank:
        job, rank, folder, store = options.rank
        train(json.loads(job), int(rank), Path(folder), store)
        return
    rows = [row for name in CASES if not options.only or options.only in name for row in [case(name, options.rounds)]]
    table = Table(title="What-if: predicted and measured ms per step", title_justify="left")
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(stderr=True).print(table)
    leave({"rounds": options.rounds, "steps": STEPS, "cases": rows}, options.out)


def case(name: str, rounds: int) -> dict[str, Any]:
    """One case: medians over the rounds, in ms per step, and the error of the prediction."""
    job, change, then = CASES[name]
    found = [one_round(job, change, job | then, at % 2 == 1) for at in range(rounds)]
    before, again, predicted, after = (statistics.median(values) for values in zip(*found, strict=True))
    gain = before - after
    return {
        "case": name,
        "before": before,
        "A/A %": 100 * abs(again / before - 1),
        "predicted": predicted,
        "measured": after,
        "error of the step %": 100 * (predicted / after - 1),
        "error of the gain %": 100 * ((before - predicted) / gain - 1),
    }


def one_round(job: dict[str, Any], change: str, then: dict[str, Any], reverse: bool) -> tuple[float, ...]:
    """(unchanged, unchanged again, predicted, changed) ms per step: A A B, or B A A in every other round."""
    order = [("after", then), ("again", job), ("before", job)]
    with tempfile.TemporaryDirectory() as place:
        for name, one in order if reverse else order[::-1]:
            run(one, Path(place) / name)
        traces = {name: Trace.load(Path(place) / name) for name, _ in order}
        before, again, after = (step_ms(traces[name], "measured_ns") for name in ("before", "again", "after"))
        return before, again, step_ms(traces["before"], "predicted_ns", change), after


def step_ms(trace: Trace, what: str, change: str = "no-launch-gap") -> float:
    """The step of a trace as measured, or as predicted with a change. ms"""
    if len(trace.tables) > 1:
        return float(trace.what_if_across(change)[what][0]) / STEPS / 1e6
    return float(trace.what_if(change)[what][0]) / STEPS / 1e6


def run(job: dict[str, Any], folder: Path) -> None:
    """Record the job's steps, every rank a process."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", json.dumps(job)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder), str(folder.with_suffix(".store"))], env=environment)
        for rank in range(job["procs"])
    ]
    if max(one.wait() for one in ranks):
        raise SystemExit(f"the job {job} failed")


def train(job: dict[str, Any], rank: int, folder: Path, store: str) -> None:
    """One rank of the job: its loop, recorded."""
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
    from torch.profiler import record_function

    from ridgeline.profiling import ProfileSpec, StepProfiler

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(job["width"], job["width"]) for _ in range(4)))
    if job["procs"] > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=job["procs"])
        model = torch.nn.parallel.DistributedDataParallel(model)
        if not job["synchronise"]:  # the buckets are filled and emptied as ever, and nothing is sent
            model.register_comm_hook(None, noop_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, square = torch.randn(job["batch"], job["width"]), torch.randn(512, 512)
    spec = ProfileSpec(wait=2, warmup=2, active=STEPS)
    with StepProfiler(spec, folder, rank=rank, world=job["procs"]) as profiler:
        for _ in range(spec.total_steps):
            with record_function("ridgeline.data"):
                time.sleep(job["data_ms"] / 1e3)
            if job.get("rows"):
                with record_function("mine::preprocess"):
                    sum(at * at % 7 for at in range(job["rows"]))
            if job.get("products"):
                with record_function("mine::products"), torch.no_grad():
                    for _ in range(job["products"]):
                        square @ square
            if rank == 1 and job.get("straggle_ms"):
                with record_function("mine::straggle"):
                    time.sleep(job["straggle_ms"] / 1e3)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    if job["procs"] > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
