"""Global gradient norm and clipping over plain tensors and DTensors together, empty shards included.

``torch.nn.utils.clip_grad_norm_`` fails on a mix of plain and DTensor parameters and on parameters of two meshes.
Here each gradient adds its local squares, divided by the number of ranks that hold the same values, and the sums are
reduced once per mesh axis set.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from ridgeline.errors import JobError
from ridgeline.parallel.collectives import Collectives


def gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The gradients that exist, in order."""
    return [p.grad for p in parameters if p.grad is not None]


def global_norm(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients of the job: float32 scalar, the same on every rank.

    Raises:
        JobError: a gradient is still a partial sum (its reduction has not run).
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    weights: dict[DeviceMesh | None, list[float]] = {}
    for grad in grads:
        mesh, local, copies = _local(grad)
        by_mesh.setdefault(mesh, []).append(local)
        weights.setdefault(mesh, []).append(1.0 / copies)
    total = torch.zeros((), dtype=torch.float32)
    for mesh, locals_ in by_mesh.items():
        squares = _sum_of_squares(locals_, weights[mesh])
        total = total.to(squares.device) + (squares if mesh is None else _reduce(squares, mesh))
    return total.sqrt()


def scale_(grads: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
    """Multiply every gradient's local part by ``factor`` in place."""
    locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    if locals_:
        torch._foreach_mul_(locals_, factor)


def clip_factor(norm: float, limit: float) -> float:
    """What gradients are multiplied by so that their norm is at most ``limit`` (0 = no limit)."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def _local(grad: torch.Tensor) -> tuple[DeviceMesh | None, torch.Tensor, int]:
    """The mesh, this rank's part, and how many ranks hold the same part."""
    if not isinstance(grad, DTensor):
        return None, grad, 1
    copies = 1
    for axis, placement in enumerate(grad.placements):
        if isinstance(placement, Partial):
            raise JobError(f"gradient norm asked before mesh axis {axis} was reduced")
        if not isinstance(placement, Shard):
            copies *= grad.device_mesh.size(axis)
    return grad.device_mesh, grad.to_local(), copies


def _sum_of_squares(tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    norms = torch.stack([n.float() for n in torch._foreach_norm(tensors)])
    return (norms.square() * torch.tensor(weights, device=norms.device)).sum()


def _reduce(squares: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            squares = Collectives(mesh.get_group(axis)).all_reduce(squares.contiguous())
    return squares
