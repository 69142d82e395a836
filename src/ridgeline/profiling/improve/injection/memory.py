"""Hooks for activations: ``torch.utils.checkpoint`` seen, taken out or put in; a forward over parts of the batch.

``spec["knobs"]["checkpoint"]`` is ``off`` (the job's own checkpointing keeps its activations) or ``blocks`` (every repeated
block of its models is checkpointed); ``spec["knobs"]["parts"]`` is how many parts a forward takes its batch in.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import torch
import torch.utils.checkpoint

from .observe import place
from .recorder import Recorder

OPTIONS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
"""Arguments of ``checkpoint`` that are not the function's."""
CHECKPOINT = torch.utils.checkpoint.checkpoint
"""The real one, before any hook."""


def hook_checkpoint(mode: str | None, recorder: Recorder) -> None:
    """See who checkpoints and what computing again costs; with ``off``, call the function instead."""

    @functools.wraps(CHECKPOINT)
    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not recorder.facts["checkpoint"]:
            recorder.facts["checkpoint"] = {"where": place(sys._getframe(1))}
        if mode == "off":
            recorder.applied.add("checkpoint")
            return function(*args, **{key: value for key, value in kwargs.items() if key not in OPTIONS})
        if torch.compiler.is_compiling():
            return CHECKPOINT(function, *args, **kwargs)
        return CHECKPOINT(_timed(function, recorder), *args, **kwargs)

    torch.utils.checkpoint.checkpoint = checkpoint


def _timed(function: Any, recorder: Recorder) -> Any:
    """``function``, whose calls during a backward are computed again and are counted as such."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not recorder.in_backward:
            return function(*args, **kwargs)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            recorder.data("recompute", time.perf_counter() - began)

    return call


def checkpoint_blocks(modules: list[torch.nn.Module], recorder: Recorder) -> None:
    """Checkpoint every repeated block below ``modules``: the children of the outermost lists of two or more of a kind."""
    if recorder.facts["checkpoint"]:
        raise RuntimeError("the job checkpoints its activations itself")
    for block in (block for module in modules for block in repeated(module)):
        block.forward = _checkpointed(block)
        recorder.applied.add("checkpoint")


def repeated(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks: children of one class, two or more, that hold parameters, found from the outside in."""
    children = [one for one in module.children() if any(True for _ in one.parameters())]
    listed = isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
    if listed and len(children) > 1 and len({type(one) for one in children}) == 1:
        return children
    return [block for child in children for block in repeated(child)]


def _checkpointed(block: torch.nn.Module) -> Any:
    forward = block.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and block.training:
            return CHECKPOINT(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return run


def split_forward(module: torch.nn.Module, parts: int, recorder: Recorder) -> None:
    """Take the batch in ``parts``, one after the other; what comes out is put together again. Where that would not be the
    same computation (statistics over the batch, outputs without a batch), the job ends with the reason."""
    inner = module.module if isinstance(module, torch.nn.parallel.DistributedDataParallel) else module
    if any(isinstance(one, torch.nn.modules.batchnorm._BatchNorm) for one in inner.modules()):
        raise RuntimeError("micro-batches: the model normalises over its batch, so that parts of it are another model")
    forward = inner.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        pieces = split((args, kwargs), parts)
        recorder.applied.add("parts")
        return join([forward(*a, **k) for a, k in pieces], pieces)

    inner.forward = run


def split(inputs: Any, parts: int) -> list[Any]:
    """``inputs`` once per part: tensors cut along dim 0, which must be the same for all, the rest as it is."""
    leaves, shape = torch.utils._pytree.tree_flatten(inputs)
    sizes = {one.shape[0] if one.dim() else 0 for one in leaves if isinstance(one, torch.Tensor)}
    if len(sizes) != 1 or min(sizes) < parts:
        raise RuntimeError(f"micro-batches: inputs of sizes {sorted(sizes)} have no batch to take in {parts} parts")
    cut = [one.chunk(parts) if isinstance(one, torch.Tensor) else None for one in leaves]
    count = next(len(one) for one in cut if one is not None)
    return [
        torch.utils._pytree.tree_unflatten([a if b is None else b[i] for a, b in zip(leaves, cut, strict=True)], shape)
        for i in range(count)
    ]


def join(outputs: list[Any], inputs: list[Any]) -> Any:
    """The outputs of all parts as one: tensors with a batch one after the other, anything else must be no tensor."""
    sizes = [next(x.shape[0] for x in torch.utils._pytree.tree_leaves(one) if torch.is_tensor(x)) for one in inputs]
    flat = [torch.utils._pytree.tree_flatten(one) for one in outputs]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return torch.utils._pytree.tree_unflatten([_joined(column, sizes) for column in columns], flat[0][1])


def _joined(column: tuple[Any, ...], sizes: list[int]) -> Any:
    if not torch.is_tensor(column[0]):
        return column[0]
    if [one.shape[0] if one.dim() else 0 for one in column] != sizes:
        raise RuntimeError("micro-batches: the model returns a tensor without the batch (a loss?), which has no parts")
    return torch.cat(column)
