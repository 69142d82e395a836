"""The measuring process: GEMM rates by dtype and size, copy and read bandwidth. ``python -m ridgeline.hardware.measure``.

Every figure is the best of several repeats after a warm-up. Lines on stdout: ``FRACTION<tab>TEXT`` while
working, one JSON document at the end.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ridgeline.hardware.inventory import largest_cache_bytes, usable_memory_bytes
from ridgeline.hardware.limits import ROOT, busy_and_total_seconds, read_text

GIB = 1 << 30


@dataclass(frozen=True)
class Effort:
    """How long to try. Sizes are edge lengths of square GEMMs; a size that would take too long is left out."""

    sizes: tuple[int, ...]
    repeats: int
    seconds_per_size: float
    buffer_bytes: int  # at least; more when the caches are larger
    loads_compiler: bool = False


EFFORTS = {
    ("cpu", "full"): Effort((1024, 2048, 4096), 5, 0.5, 2 * GIB, True),
    ("cpu", "quick"): Effort((1024, 2048), 3, 0.25, GIB // 2),
    ("cuda", "full"): Effort((1024, 2048, 4096, 8192, 16384), 10, 1.0, 8 * GIB, True),
    ("cuda", "quick"): Effort((2048, 4096, 8192), 5, 0.3, 2 * GIB),
}
PROBE = 256  # a first GEMM that tells whether the real sizes are affordable; reported only when none is
ELEMENTWISE = {"cpu": 1 << 16, "cuda": 1 << 26}  # elements, per thread on a CPU (512 KiB in and out)
BUFFER_OVER_CACHE = 8  # the buffer is at least this many times all of the largest cache


def main(arguments: list[str]) -> None:
    """``KIND THREADS quick|full``."""
    kind, threads, effort = arguments[0], int(arguments[1]), EFFORTS[arguments[0], arguments[2]]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(json.dumps(measure(kind, effort)), flush=True)


def measure(kind: str, effort: Effort) -> dict[str, Any]:
    """All single-device ceilings of ``kind``."""
    notes: list[str] = []
    process_bytes, before = training_process_bytes(effort), load()
    dtypes = ["fp32", "bf16", "int8"] if kind == "cpu" else ["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
    gemm: dict[str, dict[str, float]] = {}
    for index, dtype in enumerate(dtypes):
        tell(index / (len(dtypes) + 2), f"GEMM {dtype}")
        try:
            gemm[dtype] = gemm_rates(dtype, kind, effort)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            notes.append(f"GEMM {dtype} not measured: {str(error).splitlines()[0][:120]}")
    tell(len(dtypes) / (len(dtypes) + 2), "memory bandwidth")
    elementwise = exponentials_per_second(kind, effort.repeats)
    size = buffer_bytes(kind, effort)
    bandwidth = bandwidths(kind, size, effort.repeats) if size else {"copy": None, "read": None}
    if not size:
        notes.append("bandwidth not measured: an eighth of the free memory is not larger than the caches")
    return {
        "gemm_by_size": gemm,
        "copy_bytes_per_second": bandwidth["copy"],
        "read_bytes_per_second": bandwidth["read"],
        "elementwise_per_second": elementwise,
        "buffer_bytes": size,
        "process_bytes": process_bytes,
        "others_share": others_share(before, load()) if kind == "cpu" else None,
        "notes": notes,
    }


def gemm_rates(dtype: str, kind: str, effort: Effort) -> dict[str, float]:
    """FLOP/s (2 n^3 over the time) of ``[n, n] @ [n, n]`` by n; sizes predicted to take too long are skipped."""
    rates: dict[str, float] = {}
    for n in (PROBE, *effort.sizes):
        work = 2.0 * n**3
        if rates and work / max(rates.values()) > effort.seconds_per_size:
            break
        multiply, undo = gemm(dtype, n, kind)
        try:
            rates[str(n)] = work / best_seconds(multiply, kind, effort.repeats, effort.seconds_per_size)
        finally:
            undo()
    if len(rates) > 1:
        del rates[str(PROBE)]
    return rates


def gemm(dtype: str, n: int, kind: str) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A closure that multiplies two fresh ``[n, n]`` matrices, and one that undoes any setting it needed.

    The second operand is the transpose of a row-major matrix, as in a linear layer.
    """

    def nothing() -> None:
        return None

    if dtype == "int8":
        a, b = (torch.randint(-127, 127, (n, n), dtype=torch.int8, device=kind) for _ in range(2))
        return lambda: torch._int_mm(a, b.t()), nothing
    a, b = (torch.randn(n, n, device=kind) for _ in range(2))
    if dtype == "fp8":
        low_a, low_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=kind)
        return lambda: torch._scaled_mm(low_a, low_b.t(), one, one, out_dtype=torch.bfloat16), nothing
    if dtype in ("fp32", "tf32"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if dtype == "fp32" else "high")
        return lambda: torch.mm(a, b.t()), lambda: torch.set_float32_matmul_precision(before)
    target = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    half_a, half_b = a.to(target), b.to(target)
    return lambda: torch.mm(half_a, half_b.t()), nothing


def buffer_bytes(kind: str, effort: Effort) -> int:
    """Far larger than any cache, at most an eighth of the free memory; 0 when both cannot be had."""
    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", None) or 0
    else:
        free, cache = usable_memory_bytes() or 0, largest_cache_bytes() or 0
    wanted = max(effort.buffer_bytes, BUFFER_OVER_CACHE * cache)
    size = min(wanted, free // 8 if free else effort.buffer_bytes) // 4096 * 4096
    return size if size >= 4 * cache and size > 0 else 0


def bandwidths(kind: str, size: int, repeats: int) -> dict[str, float]:
    """Copy: half of the buffer onto the other half, bytes read plus written. Read: best of two reductions over all."""
    buffer = torch.ones(size // 4, device=kind)
    source, target = buffer[: size // 8], buffer[size // 8 : 2 * (size // 8)]
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), kind, repeats, 2.0)
    reductions: list[Callable[[], Any]] = [buffer.sum, lambda: torch.dot(buffer, buffer)]
    if buffer.numel() >= 2**31:
        reductions.pop()  # BLAS counts in 32 bits
    read = max(buffer.nbytes / best_seconds(reduce, kind, repeats, 2.0) for reduce in reductions)
    return {"copy": copy, "read": read}


def exponentials_per_second(kind: str, repeats: int) -> float:
    """fp32 elements per second of ``exp``: what softmax, SiLU and GELU are made of. On a CPU the data stay in cache."""
    elements = ELEMENTWISE["cuda"] if kind == "cuda" else ELEMENTWISE["cpu"] * torch.get_num_threads()
    x, out = torch.randn(elements, device=kind), torch.empty(elements, device=kind)
    return elements / best_seconds(lambda: torch.exp(x, out=out), kind, 10 * repeats, 0.2)


def best_seconds(work: Callable[[], Any], kind: str, repeats: int, budget: float) -> float:
    """Best of at least two and at most ``10 * repeats`` timings after one warm-up, within ``budget`` seconds."""
    timer = cuda_seconds if kind == "cuda" else cpu_seconds
    timer(work)
    began = time.perf_counter()
    best, count = float("inf"), 0
    while count < 2 or (count < 10 * repeats and time.perf_counter() - began < budget):
        best = min(best, timer(work))
        count += 1
    return best


def training_process_bytes(effort: Effort) -> int | None:
    """Resident memory with what every training process loads; a quick measurement leaves the compiler out."""
    importlib.import_module("torch.distributed.fsdp")
    if effort.loads_compiler:
        importlib.import_module("torch._inductor.compile_fx")
    return resident_bytes()


def resident_bytes(root: Path = ROOT) -> int | None:
    """Resident memory of this process now; None where the kernel does not tell."""
    match = re.search(r"VmRSS:\s+(\d+) kB", read_text(root / "proc/self/status") or "")
    return int(match[1]) * 1024 if match else None


def load() -> tuple[float, float, float] | None:
    """Busy and total seconds of the allowed CPUs, and this process's own."""
    counts, own = busy_and_total_seconds(), os.times()
    return (*counts, own.user + own.system) if counts else None


def others_share(before: tuple[float, ...] | None, after: tuple[float, ...] | None) -> float | None:
    """The part of the CPUs' time between two :func:`load` that went to other processes; None when unknown."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    busy, total, own = (late - early for late, early in zip(after, before, strict=True))
    return max(0.0, (busy - own) / total)


def cpu_seconds(work: Callable[[], Any]) -> float:
    """One call, by the wall clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cuda_seconds(work: Callable[[], Any], calls: int = 4) -> float:
    """Mean over a few calls between two events on the stream, so that a launch does not count as work."""
    event: Any = torch.cuda.Event  # not typed by torch
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / calls


def tell(fraction: float, text: str) -> None:
    """One line of progress for the parent."""
    print(f"{fraction:.3f}\t{text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
