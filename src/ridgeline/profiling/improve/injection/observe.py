"""What a baseline run looks at besides the clock: lines of the user's code by time, torch calls by line, a trace."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
import sysconfig
import threading
import time
from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
_ORIGIN: dict[str, int] = {}
SAMPLE_SECONDS = 0.004


def _origin(file: str) -> int:
    """2 for the user's own file, 1 for an installed package, 0 for torch, the standard library and this package."""
    known = _ORIGIN.get(file)
    if known is None:
        installed = "site-packages" in file or "dist-packages" in file
        hidden = file.startswith(("<", _TORCH, _HERE)) or (file.startswith(_LIBRARY) and not installed)
        known = _ORIGIN[file] = 0 if hidden else 1 if installed else 2
    return known


def place(frame: Any) -> str:
    """``file:line`` of the innermost frame of the user's own files; of an installed package when there is none."""
    fallback = ""
    while frame is not None:
        origin = _origin(frame.f_code.co_filename)
        if origin == 2:
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if origin == 1 and not fallback:
            fallback = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return fallback


class Sampler:
    """Where the stepping thread is, every few milliseconds: shares of time per line without tracing anything."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._thread = threading.get_ident()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin to sample the calling thread."""
        self._sampler.start()

    def stop(self) -> None:
        """End, and wait for it: no sample is taken while the interpreter shuts down."""
        self._stop.set()
        if self._sampler.is_alive():
            self._sampler.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        # A function of its own, so that no frame outlives the sample. The last one to hold a frame frees its locals: here
        # that would be the job's tensors, whose destructors abort the process when this thread is ended inside one.
        frame = sys._current_frames().get(self._thread)
        if frame is not None:
            self.counts[place(frame)] += 1

    def table(self, limit: int = 40) -> list[list[Any]]:
        """``[file:line, share of the samples]`` by share."""
        total = max(sum(self.counts.values()), 1)
        return [[where, count / total] for where, count in self.counts.most_common(limit)]


class CallSites(TorchFunctionMode):
    """Counts calls of torch functions by the line that makes them, for one step."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in ("__get__", "__set__"):
            caller = sys._getframe(1)
            if _origin(caller.f_code.co_filename) < 2:  # a library's own code, which the user does not edit
                name = f"library:{name}"
            self.counts[place(caller), name] += 1
        return func(*args, **(kwargs or {}))

    def table(self, limit: int = 200) -> list[list[Any]]:
        """``[file:line, function, calls]`` by calls."""
        return [[where, name, count] for (where, name), count in self.counts.most_common(limit)]


class Capture:
    """A trace of ``active`` steps after one that is thrown away, written as ``folder/rankR.json.gz``."""

    def __init__(self, folder: str, rank: int, world: int, untraced: list[float], active: int = 3) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        self.path = os.path.join(folder, f"rank{rank}.json.gz")
        self.left = active + 1
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=active, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        block: dict[str, Any] = {"rank": rank, "world": world, "wait": 0, "warmup": 1, "active": active}
        block["untraced_step_seconds"] = [round(one, 9) for one in untraced]
        self._profiler.preset_metadata_json("ridgeline", json.dumps(block))
        self._profiler.start()

    def step(self) -> bool:
        """Mark the end of a step; true after the last one, when the trace is on disk."""
        if torch.cuda.is_available() and self.left <= 2:
            torch.cuda.synchronize()
        self._profiler.step()
        self.left -= 1
        if self.left == 0:
            self._profiler.stop()
        return self.left == 0

    def _write(self, profiler: Any) -> None:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        plain = f"{self.path}.{os.getpid()}.json"
        profiler.export_chrome_trace(plain)
        with open(plain, "rb") as source, gzip.open(f"{self.path}.tmp", "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        os.replace(f"{self.path}.tmp", self.path)
        with contextlib.suppress(OSError):
            os.unlink(plain)


def wait_for(folder: str, world: int, seconds: float) -> None:
    """Until ``world`` ranks have written their results: one that left earlier could end a collective of another."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if sum(name.startswith("rank") and name.endswith(".json") for name in os.listdir(folder)) >= world:
            return
        time.sleep(0.02)
