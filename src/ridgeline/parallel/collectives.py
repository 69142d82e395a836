"""Collectives that count calls and bytes, and refuse what gloo gets wrong in silence.

gloo's broadcast, reduce and all_reduce return wrong values on non-contiguous tensors without an error
(pytorch#192920), fp8 sums are not implemented, and a list of unequal sizes leaves one rank waiting for its timeout.
All three are refused here before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ridgeline.errors import JobError

REDUCIBLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)

# torch 2.13 renamed these two; the old names warn there and are the only ones before.
_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Calls and payload bytes of one kind of collective on this rank."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Collectives:
    """The collectives of one process group, counted. ``counts[kind]`` holds calls and payload bytes.

    Payload is what one rank hands in (all_reduce, broadcast, reduce_scatter) or receives (all_gather).

    Raises:
        JobError: (all methods) the tensor is not contiguous, has a dtype the backend cannot reduce, or the sizes do
            not fit the group.
    """

    group: dist.ProcessGroup | None = None
    counts: dict[str, Traffic] = field(default_factory=dict)

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce ``tensor`` in place over the group; ``op`` is sum, max, min or avg."""
        self._check("all_reduce", tensor, reduces=True)
        dist.all_reduce(tensor, _operation(op), group=self.group)
        return self._count("all_reduce", tensor)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Overwrite ``tensor`` with that of global rank ``source``."""
        self._check("broadcast", tensor)
        dist.broadcast(tensor, source, group=self.group)
        return self._count("broadcast", tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """``[n, ...]`` on each rank to ``[world * n, ...]`` on all. Every rank must hand in the same shape."""
        self._check("all_gather", tensor)
        world = dist.get_world_size(self.group)
        out = tensor.new_empty((world * tensor.shape[0], *tensor.shape[1:]))
        _gather(out, tensor, group=self.group)
        return self._count("all_gather", out)

    def reduce_scatter(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """``[world * n, ...]`` on each rank to the reduced ``[n, ...]`` of this rank."""
        self._check("reduce_scatter", tensor, reduces=True)
        world = dist.get_world_size(self.group)
        if tensor.shape[0] % world:
            raise JobError(f"reduce_scatter: {tensor.shape[0]} rows do not divide over {world} ranks")
        out = tensor.new_empty((tensor.shape[0] // world, *tensor.shape[1:]))
        _scatter(out, tensor, _operation(op), group=self.group)
        return self._count("reduce_scatter", tensor, out)

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Send ``send[r]`` rows to rank r and receive ``receive[r]`` from it; counts may differ and may be 0."""
        self._check("all_to_all", tensor)
        world = dist.get_world_size(self.group)
        if len(send) != world or len(receive) != world or sum(send) != tensor.shape[0]:
            raise JobError(f"all_to_all: splits {send} / {receive} do not fit {tensor.shape[0]} rows on {world} ranks")
        out = tensor.new_empty((sum(receive), *tensor.shape[1:]))
        dist.all_to_all_single(out, tensor, receive, send, group=self.group)
        return self._count("all_to_all", tensor, out)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.group)
        self._add("barrier", 0)

    def _check(self, kind: str, tensor: torch.Tensor, reduces: bool = False) -> None:
        if not tensor.is_contiguous():
            raise JobError(
                f"{kind}: tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous"
            )
        if reduces and tensor.dtype not in REDUCIBLE:
            raise JobError(f"{kind}: dtype {str(tensor.dtype).removeprefix('torch.')} cannot be reduced")

    def _count(self, kind: str, payload: torch.Tensor, result: torch.Tensor | None = None) -> torch.Tensor:
        self._add(kind, payload.numel() * payload.element_size())
        return payload if result is None else result

    def _add(self, kind: str, payload_bytes: int) -> None:
        traffic = self.counts.setdefault(kind, Traffic())
        traffic.calls += 1
        traffic.bytes += payload_bytes


def _operation(op: str) -> dist.ReduceOp.RedOpType:
    operations = {
        "sum": dist.ReduceOp.SUM,
        "max": dist.ReduceOp.MAX,
        "min": dist.ReduceOp.MIN,
        "avg": dist.ReduceOp.AVG,
    }
    return operations[op]
