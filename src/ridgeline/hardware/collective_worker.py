"""One of the two processes that time collectives. ``python -m ridgeline.hardware.collective_worker``.

Arguments: ``BACKEND quick|full STORE_FILE RANK``. A collective's time is that of the slowest rank.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ridgeline.hardware import collectives

GROUP_TIMEOUT = datetime.timedelta(seconds=60)


def main(arguments: list[str]) -> None:
    """Join the group, time both collectives, let rank 0 print the best rates."""
    backend, effort, store, rank = arguments[0], arguments[1], arguments[2], int(arguments[3])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    ranks = collectives.RANKS
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=GROUP_TIMEOUT)
    try:
        sizes = (collectives.BUFFER_BYTES_GPU if backend == "nccl" else collectives.BUFFER_BYTES)[effort]
        result = rates(sizes, ranks, device)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(result), flush=True)


def rates(sizes: tuple[int, ...], ranks: int, device: torch.device) -> dict[str, float]:
    """Best bus bandwidth in bytes per second over ``sizes`` (bytes of the whole buffer)."""
    reduce_rate = gather_rate = 0.0
    for size in sizes:
        whole = torch.zeros(size // 4, device=device)  # zeros: repeated sums stay finite
        part = torch.zeros(size // 4 // ranks, device=device)
        seconds = best_seconds(lambda: dist.all_reduce(whole), device)  # noqa: B023 - called in this round only
        reduce_rate = max(reduce_rate, collectives.all_reduce_bus_bytes(size, ranks) / seconds)
        seconds = best_seconds(lambda: gather(whole, part), device)  # noqa: B023
        gather_rate = max(gather_rate, collectives.all_gather_bus_bytes(size, ranks) / seconds)
    return {"all_reduce_bytes_per_second": reduce_rate, "all_gather_bytes_per_second": gather_rate}


def gather(whole: torch.Tensor, part: torch.Tensor) -> Any:
    """All-gather into one tensor, by the name this torch gives it (renamed in 2.13)."""
    operation = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return operation(whole, part)


def best_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 6) -> float:
    """Best over repeats, after two warm-ups, of the slowest rank's seconds."""
    best = float("inf")
    for index in range(repeats + 2):
        dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        slowest = torch.tensor([time.perf_counter() - began], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if index >= 2:
            best = min(best, float(slowest.item()))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1:])
