"""What the training tests share: a tiny corpus, a tiny job, and starting ``ridgeline train`` as a real process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ridgeline.config import JobConfig, parse_config
from ridgeline.data import build
from ridgeline.hardware.measured import Ceilings, cache_key, digest
from ridgeline.runs import Run

SEQ = 16


def corpus(folder: Path) -> dict[str, Any]:
    """Sixty made-up documents, built into a dataset; returns the ``[data]`` table."""
    chooser = random.Random(1)
    words = [
        "".join(chooser.choice("bcdfglmnprst") + chooser.choice("aeiou") for _ in range(chooser.randint(1, 3)))
        for _ in range(120)
    ]
    for number in range(60):
        text = " ".join(chooser.choice(words) for _ in range(200))
        (folder / f"doc{number:02}.txt").write_text(f"the {text}. and of that have with be.")
    table = {
        "name": "tiny",
        "sources": [str(folder / "*.txt")],
        "path": str(folder / "dataset"),
        "tokenizer": {"vocab_size": 320},
        "filters": {"enabled": False},
        "split": [0.8, 0.2, 0.0],
        "workers": 1,
    }
    build(parse_config({"data": table}).data)
    return table


def pretend_ceilings(folder: Path) -> None:
    """A cache of ceilings for this machine, so that a test neither measures nor depends on what was measured."""
    key = cache_key()
    rates = dict.fromkeys(("copy_bytes_per_second", "read_bytes_per_second"), 1e10)
    rates |= dict.fromkeys(("all_reduce_bytes_per_second", "all_gather_bytes_per_second"), 1e9)
    record = {
        "device": key["device"],
        "kind": key["kind"],
        "gemm_flops_per_second": {"fp32": 1e11, "bf16": 2e11},
        **rates,
        "backend": "gloo",
        "measured_at": "2026-01-01T00:00:00+00:00",
        "versions": key["versions"],
        "datasheet": None,
    }
    document = {"key": key, "ceilings": Ceilings.from_dict(record).to_dict()}
    (folder / f"ceilings-{digest(key)}.json").write_text(json.dumps(document))


def tiny(data: dict[str, Any], **changes: Any) -> JobConfig:
    """A job that takes milliseconds per step; ``changes`` are dotted names with ``__`` for the dot."""
    raw: dict[str, Any] = {
        "data": data,
        "model": {"layers": 2, "hidden": 32, "heads": 2, "intermediate": 48, "context_length": SEQ},
        "train": {
            "steps": 6,
            "seq_len": SEQ,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "dtype": "fp32",
            "compile": False,
            "eval_every": 0,
            "eval_batches": 2,
            "checkpoint_every": 0,
        },
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        raw.setdefault(section, {})[key] = value
    return parse_config(raw)


def toml(job: JobConfig, target: Path) -> Path:
    """Write a job as TOML (JSON's scalars, lists and strings are TOML's)."""
    lines: list[str] = []
    for section, table in job.model_dump(mode="json", exclude_none=True).items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            lines += _lines(key, value)
    target.write_text("\n".join(lines) + "\n")
    return target


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [line for inner, item in value.items() for line in _lines(f"{key}.{inner}", item)]
    return [f"{key} = {json.dumps(value)}"]


def start(arguments: Sequence[str | Path], runs: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """``ridgeline train ARGUMENTS --runs RUNS`` in the background."""
    command = [sys.executable, *(launcher or ["-m", "ridgeline"]), "train", *map(str, arguments), "--runs", str(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Poll until ``condition``; fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def only_run(runs: Path) -> Run:
    """The one run below ``runs``."""
    (folder,) = [file.parent for file in runs.glob("*/run.json")]
    return Run.open(folder)


def steps_done(runs: Path) -> int:
    """Complete step lines so far of the one run below ``runs``."""
    files = list(runs.glob("*/metrics.jsonl"))
    return files[0].read_text().count('"loss"') if files else 0


def losses(run: Run) -> dict[int, float]:
    """Step to training loss; fails when a step was recorded twice."""
    rows = [row for row in run.metrics() if "loss" in row]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows), "a step appears twice"
    return found


def weights(run: Run) -> bytes:
    """The exported model's file."""
    return (run.path / "artifacts/model/model.safetensors").read_bytes()
