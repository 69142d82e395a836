"""Bus bandwidth of all-reduce and all-gather between two local processes: the launcher, torch-free."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ridgeline.hardware.child import environment, last_line, stop

RANKS = 2
TIMEOUT_SECONDS = 90
MIB = 1 << 20
BUFFER_BYTES = {"full": (4 * MIB, 16 * MIB, 64 * MIB), "quick": (4 * MIB, 16 * MIB)}
BUFFER_BYTES_GPU = {"full": (64 * MIB, 256 * MIB, 1024 * MIB), "quick": (64 * MIB, 256 * MIB)}


def all_reduce_bus_bytes(size: int, ranks: int) -> float:
    """Bytes that cross each rank's link in a ring all-reduce of ``size`` bytes: ``2 (n-1)/n`` times the size."""
    return 2 * (ranks - 1) / ranks * size


def all_gather_bus_bytes(size: int, ranks: int) -> float:
    """Bytes that cross each rank's link to gather ``size`` bytes in all: ``(n-1)/n`` times the size."""
    return (ranks - 1) / ranks * size


def measure(kind: str, devices: int, threads: int, quick: bool) -> dict[str, Any]:
    """Best bus bandwidth over several sizes; None with a note when the processes fail. Seconds taken included.

    NCCL needs a GPU per process: with fewer than two GPUs the processes talk through gloo over the loopback.
    """
    began = time.perf_counter()
    backend = "nccl" if kind == "cuda" and devices >= RANKS else "gloo"
    notes = (
        [] if backend == "nccl" or kind == "cpu" else ["one GPU: collectives measured with gloo between host buffers"]
    )
    found: dict[str, Any] = {"all_reduce_bytes_per_second": None, "all_gather_bytes_per_second": None}
    try:
        found = _launch(backend, max(1, threads // RANKS), "quick" if quick else "full")
    except (RuntimeError, OSError, subprocess.TimeoutExpired, ValueError) as error:
        notes.append(f"collectives not measured: {last_line(str(error))}")
    return {**found, "backend": backend, "notes": notes, "seconds": time.perf_counter() - began}


def _launch(backend: str, threads: int, effort: str) -> dict[str, Any]:
    """Two workers that meet through a file; rank 0 prints the result."""
    env = environment(threads)
    if backend == "gloo" and (Path("/sys/class/net/lo")).exists():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
    with tempfile.TemporaryDirectory(prefix="ridgeline-") as folder:
        module = [sys.executable, "-m", "ridgeline.hardware.collective_worker", backend, effort, f"{folder}/store"]
        errors = [open(f"{folder}/stderr{rank}", "w+", encoding="utf-8") for rank in range(RANKS)]  # noqa: SIM115
        workers = [
            subprocess.Popen([*module, str(rank)], env=env, stdout=subprocess.PIPE, stderr=errors[rank], text=True)
            for rank in range(RANKS)
        ]
        try:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            outputs = [worker.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for worker in workers]
            for worker, stream in zip(workers, errors, strict=True):
                if worker.returncode:
                    stream.seek(0)
                    raise RuntimeError(last_line(stream.read()) or f"exit {worker.returncode}")
        finally:
            for worker, stream in zip(workers, errors, strict=True):
                stop(worker)
                stream.close()
        return dict(json.loads(outputs[0].strip().splitlines()[-1]))
