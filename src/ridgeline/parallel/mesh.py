"""Who is in the job: rank, world size, device, and the mesh that sharding runs over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ridgeline.errors import JobError, UserError

# A lost peer that closes its socket is noticed at once; this limit is for one that hangs. It must exceed the longest
# time one rank may legitimately be ahead of another: a cold compile.
COLLECTIVE_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Layout:
    """This process's place. ``mesh`` has the one axis ``dp_shard`` (fully sharded data parallel).

    ``nodes`` is the number of machines: processes of one machine share its ceilings.
    """

    rank: int
    world_size: int
    local_rank: int
    nodes: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes metrics and prints."""
        return self.rank == 0

    def rows(self, global_batch: int) -> range:
        """The contiguous rows of a global batch that belong to this rank."""
        if global_batch % self.world_size:
            raise UserError(f"global batch of {global_batch} does not divide over {self.world_size} processes")
        share = global_batch // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)


class PeerLost(JobError):
    """Another rank is gone or hangs; the cause is to be found there."""


def outer_world() -> tuple[int, int] | None:
    """``(rank, world_size)`` that a launcher outside (torchrun, Slurm with torchrun) has set, or None."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def joined(device_type: str = "cpu", timeout_seconds: float = COLLECTIVE_TIMEOUT_SECONDS) -> Iterator[Layout]:
    """Join the job's process group (or a group of one) for the length of the ``with`` block.

    A group that exists already, made by the caller, is used and left as it is.

    Raises:
        JobError: the environment announces more than one process and the group cannot be formed. Training on without
            it would silently train one diverging model per process.
    """
    ours = not dist.is_initialized()
    if ours:
        _join(device_type, timedelta(seconds=timeout_seconds))
    try:
        yield _layout(device_type)
    except RuntimeError as error:
        if not _lost_peer(error):
            raise
        raise PeerLost(f"rank {dist.get_rank()} lost another rank: {str(error).splitlines()[0][:200]}") from None
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def _join(device_type: str, timeout: timedelta) -> None:
    backend = "nccl" if device_type == "cuda" else "gloo"
    world = outer_world()
    if world is None or world[1] == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        # env:// reuses the store that the agent hosts; a tcp:// address of our own would wait for nobody (pytorch#192113).
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise JobError(f"rank {world[0]}: no process group of {world[1]} processes: {message}") from None


def _lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _layout(device_type: str) -> Layout:
    world, rank = dist.get_world_size(), dist.get_rank()
    announced = outer_world()
    if announced is not None and announced[1] != world:
        raise JobError(f"the environment announces {announced[1]} processes, the process group has {world}")
    local_rank = int(os.environ.get("LOCAL_RANK", rank)) if announced else rank
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if announced else world
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device_type, (world,), mesh_dim_names=("dp_shard",))
    return Layout(rank, world, local_rank, max(1, world // local_world), device, mesh)
