"""Steps of the job as its optimiser makes them: their time, their losses, and the end after the last one.

::

    step     1 .. warmup | timed ................ | (baseline only) trace 1+3 | call sites | results, SystemExit(0)
                         ^ clock starts, synced   ^ clock stops, synced

A step ends when the first optimiser that ever stepped has stepped again. Losses are the scalars that ``backward`` is
called on, kept on their device and read only at the end.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import resource
import threading
import time
import zlib
from typing import Any

import torch

from . import observe

GRACE_SECONDS = 10.0
"""How long a script may take to end after SystemExit before the process is ended."""
ORDER_KEPT = 64


class Recorder:
    """One process's record. ``facts`` is what the hooks saw, ``applied`` the knobs that found something to act on."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.pid = os.getpid()
        self.steps = 0
        self.facts: dict[str, Any] = {"loaders": [], "optimizers": [], "ddp": None, "modules": [], "compiled": False}
        self.facts["checkpoint"] = None
        self.in_backward = False
        self.applied: set[str] = set()
        self.at_first_step: list[Any] = []
        self._marker: Any = None
        self._seen: set[int] = set()
        self._losses: list[list[torch.Tensor]] = []
        self._micro: list[torch.Tensor] = []
        self._passes: list[int] = []
        self._passes_now = 0
        self._stamps: list[float] = []
        self._data = dict.fromkeys(("wait", "cpu", "start", "recompute"), 0.0)
        self._switches = 0
        self._orders: dict[int, list[int]] = {}
        self._sampler: observe.Sampler | None = None
        self._capture: observe.Capture | None = None
        self._sites: Any = None
        self._done = False
        atexit.register(self._at_exit)

    @property
    def tracing(self) -> bool:
        """Whether the profiler is on."""
        return self._capture is not None and self._sites is None

    def loss(self, tensors: Any) -> None:
        """``backward`` is called on this."""
        self._passes_now += 1
        for one in tensors if isinstance(tensors, (tuple, list)) else (tensors,):
            if isinstance(one, torch.Tensor) and one.numel() == 1:
                self._micro.append(one.detach().clone())

    def data(self, kind: str, seconds: float) -> None:
        """Time spent waiting for a loader (``wait``), processor time of it (``cpu``), starting one (``start``), or computing
        checkpointed activations again (``recompute``)."""
        self._data[kind] += seconds

    def order(self, iterator: int, indices: Any) -> None:
        """A batch's indices, as drawn from the sampler."""
        kept = self._orders.setdefault(iterator, [])
        if len(kept) < ORDER_KEPT:
            kept.append(zlib.crc32(repr(indices).encode()))

    def step(self, optimizer: Any) -> None:
        """An optimiser has stepped."""
        if self._marker is None:
            self._marker = optimizer
        if id(optimizer) not in self._seen and self.steps == 0:
            self._seen.add(id(optimizer))
            self.facts["optimizers"].append(describe(optimizer))
        if optimizer is not self._marker or os.getpid() != self.pid:
            return
        if self._done:  # the script swallowed SystemExit and goes on
            os._exit(0)
        self.steps += 1
        self._losses.append(self._micro)
        self._passes.append(self._passes_now)
        self._micro, self._passes_now = [], 0
        if self.steps == 1:
            for action in self.at_first_step:
                action(optimizer)
        self._advance()

    def _advance(self) -> None:
        warmup, last = self.spec["warmup"], self.spec["warmup"] + self.spec["timed"]
        if self.steps in (warmup, last):
            synchronize()
        if warmup <= self.steps <= last:
            self._stamps.append(time.perf_counter())
        if self.steps in (warmup, last):
            self._switches = pushed_off() - self._switches
        if self.steps == warmup:
            self._data = dict.fromkeys(self._data, 0.0)
            if self.spec["profile"]:
                self._sampler = observe.Sampler()
                self._sampler.start()
        elif self.steps == last:
            self._data = dict(self._data)
            self._measured = dict(self._data)
            if not self.spec["profile"]:
                self._finish()
            self._observe_first()
        elif self.steps > last:
            self._observe()

    def _observe_first(self) -> None:
        assert self._sampler is not None
        self._sampler.stop()
        folder = os.path.join(self.spec["folder"], "traces")
        untraced = [b - a for a, b in itertools.pairwise(self._stamps)]
        self._capture = observe.Capture(folder, rank(), world(), untraced)

    def _observe(self) -> None:
        if self._sites is not None:
            self._sites.__exit__(None, None, None)
            self._finish()
        assert self._capture is not None
        if self._capture.step():
            # Entering a function mode would make torch.compile's code compile again: a compiled job goes without.
            if self.facts["compiled"]:
                self._finish()
            self._sites = observe.CallSites()
            self._sites.__enter__()

    def _finish(self) -> None:
        """Write this rank's results, give the others time to do so, and end the job."""
        self._done = True
        self._write(complete=True)
        observe.wait_for(self.spec["folder"], world(), GRACE_SECONDS)
        threading.Thread(target=_end_after, args=(GRACE_SECONDS,), daemon=True).start()
        raise SystemExit(0)

    def _at_exit(self) -> None:
        if self._sampler is not None and os.getpid() == self.pid:
            self._sampler.stop()
        if self.steps and not self._done and os.getpid() == self.pid:
            self._write(complete=False)

    def _write(self, complete: bool) -> None:
        self.facts |= {
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "local_world": int(os.environ.get("LOCAL_WORLD_SIZE", world())),
            "load_average": os.getloadavg()[0],
            "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
            "cuda": torch.cuda.is_available(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "free_bytes": free_bytes(),
            "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0) if torch.cuda.is_available() else 0,
            "torch": torch.__version__,
        }
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        document = {
            "rank": rank(),
            "world": world(),
            "complete": complete,
            "steps": self.steps,
            "stamps": self._stamps,
            "losses": [[float(one.double()) for one in step] for step in self._losses],
            "passes": self._passes,
            "data": getattr(self, "_measured", self._data),
            "switches": self._switches,
            "orders": list(self._orders.values()),
            "samples": self._sampler.table() if self._sampler else [],
            "sites": self._sites.table() if self._sites else [],
            "applied": sorted(self.applied),
            "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "facts": self.facts,
        }
        target = os.path.join(self.spec["folder"], f"rank{rank()}.json")
        temporary = f"{target}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(document, file)
        os.replace(temporary, target)


def describe(optimizer: Any) -> dict[str, Any]:
    """What a finding about an optimiser needs."""
    group = optimizer.param_groups[0]
    tensors = [p for one in optimizer.param_groups for p in one["params"]]
    return {
        "name": type(optimizer).__name__,
        "fused": bool(group.get("fused")),
        "foreach": bool(group.get("foreach")),
        "fusable": "fused" in group and not optimizer.defaults.get("differentiable", False),
        "tensors": len(tensors),
        "bytes": sum(p.numel() * p.element_size() for p in tensors),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in tensors}),
        "device": tensors[0].device.type if tensors else "cpu",
        "where": getattr(optimizer, "_ridgeline_where", ""),
    }


def rank() -> int:
    """This process's rank, of torch.distributed or of the launcher's environment."""
    group: Any = torch.distributed
    if group.is_available() and group.is_initialized():
        return int(group.get_rank())
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train."""
    group: Any = torch.distributed
    if group.is_available() and group.is_initialized():
        return int(group.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1"))


def pushed_off() -> int:
    """How often this process had to leave its core though it could have gone on."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def free_bytes() -> int | None:
    """Memory that is free now: of the GPU, else of the machine by the kernel's own estimate; None where it tells none."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def synchronize() -> None:
    """Work in flight belongs to the steps that issued it."""
    cuda: Any = torch.cuda
    if cuda.is_available() and cuda.is_initialized():
        torch.cuda.synchronize()


def _end_after(seconds: float) -> None:
    """The script swallowed SystemExit and makes no further step, or hangs while it ends."""
    time.sleep(seconds)
    os._exit(0)
