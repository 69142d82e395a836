"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard events, medians of steady steps."""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ridgeline.runs import Run, write_atomic

TIMED = ("tokens_per_second", "step_seconds", "data_seconds", "compute_seconds", "optimizer_seconds")
"""What is told of every step and summed up as a median."""


class TensorBoard:
    """Scalars to a TensorBoard event file. A resumed run opens another file; TensorBoard joins them by step."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the finite or infinite numbers among ``values`` at ``step``."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items() if value is not None]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=rows)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Recorder:
    """Rank 0's writer. One line per step and one per validation, in the run and in TensorBoard."""

    def __init__(self, run: Run, resumed_at: int = 0) -> None:
        self.run = run
        drop_after(run.path / "metrics.jsonl", resumed_at)
        self._board = TensorBoard(run.path / "tensorboard")
        self._steady: dict[str, list[float]] = {}
        self._earlier = [line for line in run.metrics() if "step_seconds" in line] if resumed_at else []
        self.peak_memory_bytes = max((int(line.get("memory_bytes", 0)) for line in self._earlier), default=0)

    def step(self, values: dict[str, Any], steady: bool) -> None:
        """One optimiser step; ``steady`` ones (no compile, no warm-up) enter the medians."""
        self.peak_memory_bytes = max(self.peak_memory_bytes, int(values["memory_bytes"]), peak_rss_bytes())
        self.run.log(**values, steady=steady)
        scalars = {f"train/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self._board.scalars(values["step"], scalars)
        if steady:
            for name in TIMED:
                self._steady.setdefault(name, []).append(values[name])

    def validation(self, step: int, loss: float, seconds: float) -> None:
        """One validation."""
        self.run.log(step=step, validation_loss=loss, validation_seconds=seconds)
        self._board.scalars(step, {"validation/loss": loss})

    def medians(self) -> dict[str, float]:
        """Medians over the steady steps of this session, or when it had none of those before it; empty without any."""
        if self._steady:
            return {name: statistics.median(values) for name, values in self._steady.items()}
        before = [line for line in self._earlier if line.get("steady")]
        return {name: statistics.median(line[name] for line in before) for name in TIMED} if before else {}

    @property
    def steady_steps(self) -> int:
        """How many steps the medians stand on."""
        return len(self._steady.get("step_seconds", []))

    def close(self) -> None:
        """Flush."""
        self._board.close()


def drop_after(file: Path, step: int) -> int:
    """Remove the lines of ``metrics.jsonl`` that a resume from ``step`` takes again; returns how many.

    Each step then appears once, with the values of the weights that live on.
    """
    if not file.is_file():
        return 0
    whole = [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line).get("step", 0) <= step]
    write_atomic(file, "".join(kept))
    return len(whole) - len(kept)


def memory_bytes(device: torch.device) -> int:
    """Memory this process holds now: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").is_file() else 0
    return pages * resource.getpagesize() if pages else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
