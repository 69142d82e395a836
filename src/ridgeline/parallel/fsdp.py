"""How a decoder is spread over the mesh, beside and not inside the model.

Fixed order: activation checkpointing, compile, FSDP2 (blocks first, root last). Parameters are fp32 masters sharded on
dim 0; each block's compute copy is gathered in ``dtype`` just before it runs and gradients are reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ridgeline.models.decoder import Decoder
from ridgeline.parallel.mesh import Layout

_WRAPPER_PREFIX = "_checkpoint_wrapped_module."


def parallelize(
    decoder: Decoder,
    layout: Layout,
    *,
    dtype: torch.dtype,
    reshard_after_forward: bool = True,
    activation_checkpointing: bool = False,
    compile_blocks: Callable[[Decoder], object] | None = None,
) -> Decoder:
    """Shard ``decoder`` (which has ``blocks``) in place over ``layout.mesh`` and return it.

    Afterwards parameters are DTensors; :func:`collectives_per_step` says what a step then sends.
    """
    if activation_checkpointing:
        for index, block in enumerate(decoder.blocks):
            # Nothing in a block draws random numbers, so there is no generator state to restore in the recomputation.
            decoder.blocks[index] = checkpoint_wrapper(block, preserve_rng_state=False)
    if compile_blocks is not None:
        compile_blocks(decoder)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in decoder.blocks:
        fully_shard(block, mesh=layout.mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The root's weights are needed first in backward: freeing them after forward would only gather them again.
    fully_shard(decoder, mesh=layout.mesh, mp_policy=policy, reshard_after_forward=False)
    return decoder


def accumulate(decoder: nn.Module, last: bool) -> None:
    """Set what the coming backward does: reduce gradients (``last`` micro-step) or only add them up locally.

    Between micro-steps the gathered parameters are kept, which saves their all-gathers.
    """
    if isinstance(decoder, FSDPModule):
        decoder.set_requires_gradient_sync(last)
        decoder.set_reshard_after_backward(last)


def sum_gradients(decoder: nn.Module) -> None:
    """Switch FSDP2's own division by the world size off: the loss is divided by the global token count instead.

    The setting does not reach the groups below a module, so every group gets it.
    """
    for module in decoder.modules():
        if isinstance(module, FSDPModule) and _world(module) > 1:  # alone, FSDP2 does not divide
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _world(module: FSDPModule) -> int:
    parameter = next(module.parameters())  # type: ignore[attr-defined]
    return parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1


def release(decoder: nn.Module) -> None:
    """Free what a forward without a backward has left gathered.

    Until then ``decoder.parameters()`` are the compute copies, in the compute precision, and not the masters.
    """
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def collectives_per_step(groups: int, micro_steps: int, reshard_after_forward: bool) -> tuple[int, int]:
    """``(all-gathers, reduce-scatters)`` of one optimiser step; ``groups`` = blocks + 1.

    Every group is gathered for the first forward. With resharding the blocks are gathered again in each backward,
    but between micro-steps backward leaves them whole, so only the first forward of a step gathers.
    """
    again = (groups - 1) * micro_steps if reshard_after_forward else 0
    return groups + again, groups


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers add."""
    return name.replace(_WRAPPER_PREFIX, "").replace("_orig_mod.", "")


def named_parameters(decoder: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by clean name, each once."""
    for name, parameter in decoder.named_parameters():
        yield clean_name(name), parameter


def local_rows(parameter: torch.Tensor) -> tuple[int, torch.Tensor]:
    """``(first global row, local tensor)`` of a dim-0 sharded or plain parameter; the local part may be empty."""
    if not isinstance(parameter, DTensor):
        return 0, parameter
    local = parameter.to_local()
    if parameter.device_mesh.size() == 1:
        return 0, local
    # Uneven dim-0 sharding gives every rank but the last ones ceil(rows / world) rows.
    chunk = -(-parameter.shape[0] // parameter.device_mesh.size())
    return min(parameter.device_mesh.get_local_rank() * chunk, parameter.shape[0]), local


def full_state(decoder: nn.Module) -> dict[str, torch.Tensor]:
    """Whole parameters by clean name. A collective: every rank must call it."""
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in named_parameters(decoder)}


@torch.no_grad()
def fill_local(parameter: torch.Tensor, draw: Callable[[int, int], np.ndarray]) -> None:
    """Overwrite this rank's rows with ``draw(first_row, rows)`` (float32 ``[rows, ...]``)."""
    first, local = local_rows(parameter)
    if local.numel():
        local.copy_(torch.from_numpy(draw(first, local.shape[0])))
