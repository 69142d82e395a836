"""Compile a target with Inductor and return the linked view of all its levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ridgeline.compiler.failures import compiling
from ridgeline.compiler.internals.inductor import record
from ridgeline.compiler.target import Target
from ridgeline.compiler.view.levels import View, build
from ridgeline.compiler.view.roofline import Device
from ridgeline.errors import JobError


def collect(target: Target, device: Device, backward: bool = False) -> View:
    """Compile ``target`` (static shapes; ``backward``: forward with gradients, then backward) and link its levels.

    Raises:
        UserError: nothing in the target can have a gradient; this torch is not supported.
        JobError: the compiler failed or captured nothing.
    """
    if backward:
        target.require_grad()

    def run(backend: Callable[..., Any]) -> None:
        compiled = torch.compile(target.call, backend=backend, dynamic=False)
        with torch.set_grad_enabled(backward):
            outputs = compiled(*target.args, **target.kwargs)
            if backward:
                torch.autograd.backward(scalar_of(outputs, target.name))

    with compiling(target.name):
        frames = record(run)
    if not frames:
        raise JobError(f"{target.name}: Dynamo captured no graph (no tensor operation, or a break on every line)")
    return build(target.name, frames, device, compiled_for=_device_type(target))


def scalar_of(outputs: Any, name: str) -> Tensor:
    """The sum of all outputs that have a gradient.

    Raises:
        JobError: none has one.
    """
    found = [one for one in tree_leaves(outputs) if isinstance(one, Tensor) and one.requires_grad]
    if not found:
        raise JobError(f"{name}: no output has a gradient; leave out --backward")
    return torch.stack([one.float().sum() for one in found]).sum()


def _device_type(target: Target) -> str:
    tensors = [one for one in tree_leaves((target.args, target.kwargs)) if isinstance(one, Tensor)]
    return tensors[0].device.type if tensors else "cpu"
