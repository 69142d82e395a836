"""The hooks, each small: what is seen is noted in the recorder, what a knob asks for is changed.

``spec["knobs"]`` holds one table per hook: ``loader``, ``optimizer``, ``ddp``, ``compile``, ``autocast``, ``threads``,
``pin``, ``backends``, ``checkpoint``, ``parts``. An empty one changes nothing, so that the unchanged job runs under the same hooks.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import random
import sys
import time
from typing import Any

import torch
import torch.utils.data

from . import memory
from .observe import place
from .recorder import Recorder


def install(spec: dict[str, Any], recorder: Recorder) -> None:
    """All hooks, before the job's own code runs."""
    knobs = spec["knobs"]
    _seed(spec.get("seed_offset", 0))
    _threads(knobs, recorder)
    _backends(knobs.get("backends", {}), recorder)
    _loaders(knobs.get("loader", {}), recorder)
    _iterators(recorder)
    _optimizers(knobs.get("optimizer", {}), recorder)
    _ddp(knobs.get("ddp", {}), recorder)
    _models(knobs, recorder)
    memory.hook_checkpoint(knobs.get("checkpoint"), recorder)
    _backward(recorder)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda optimizer, args, kwargs: recorder.step(optimizer))


def _seed(offset: int) -> None:
    """A script without seeds gets fixed ones, or no two runs of it could be compared; its own seeds come after and win.
    ``offset`` shifts all that it gives torch: the noise between two seeds, for precision knobs."""
    original = torch.manual_seed
    if offset:
        torch.manual_seed = torch.random.manual_seed = lambda seed: original(int(seed) + offset)
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def _threads(knobs: dict[str, Any], recorder: Recorder) -> None:
    if knobs.get("pin") and hasattr(os, "sched_setaffinity"):
        cores, local = sorted(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_RANK", "0"))
        share = max(1, len(cores) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        os.sched_setaffinity(0, cores[local * share : (local + 1) * share] or cores)
        recorder.applied.add("pin")
    if knobs.get("threads"):
        torch.set_num_threads(knobs["threads"])
        torch.set_num_threads = lambda nthreads: None  # the script's own choice gives way to the trial's
        recorder.applied.add("threads")


def _backends(change: dict[str, Any], recorder: Recorder) -> None:
    if change.get("tf32"):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if change.get("cudnn_benchmark"):
        torch.backends.cudnn.benchmark = True
    if change:
        recorder.applied.add("backends")


def _loaders(change: dict[str, Any], recorder: Recorder) -> None:
    """Workers and prefetch of map-style datasets; more workers would repeat an iterable one's samples."""
    loader = torch.utils.data.DataLoader
    original = loader.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = bound.arguments
        iterable = isinstance(given["dataset"], torch.utils.data.IterableDataset)
        if change and change_loader(given, change, iterable):
            recorder.applied.add("loader")
        original(*bound.args, **bound.kwargs)
        recorder.facts["loaders"].append(_describe_loader(self, iterable, sys._getframe(1)))

    loader.__init__ = __init__  # type: ignore[method-assign]
    begin = loader.__iter__

    @functools.wraps(begin)
    def __iter__(self: Any) -> Any:
        began = time.perf_counter()
        try:
            return begin(self)
        finally:
            recorder.data("start", time.perf_counter() - began)

    loader.__iter__ = __iter__  # type: ignore[method-assign]


def change_loader(given: dict[str, Any], change: dict[str, Any], iterable: bool) -> bool:
    """Set a loader's arguments as the knob says; whether anything was changed."""
    before = dict(given)
    if "num_workers" in change and not iterable:
        given["num_workers"] = max(given.get("num_workers", 0), change["num_workers"])
    if "pin_memory" in change:
        given["pin_memory"] = change["pin_memory"]
    if given.get("num_workers", 0) > 0:
        given.update({key: change[key] for key in ("prefetch_factor", "persistent_workers") if key in change})
    return any(given.get(key) != before.get(key) for key in given if key in change)


def _describe_loader(loader: Any, iterable: bool, frame: Any) -> dict[str, Any]:
    kind = type(loader.dataset)
    code = getattr(getattr(kind, "__iter__" if iterable else "__getitem__", None), "__code__", None)
    return {
        "workers": loader.num_workers,
        "prefetch": loader.prefetch_factor,
        "persistent": loader.persistent_workers,
        "pin_memory": loader.pin_memory,
        "iterable": iterable,
        "dataset": kind.__qualname__,
        "item": f"{code.co_filename}:{code.co_firstlineno}" if code else "",
        "item_end": max((line or 0 for *_, line in code.co_lines()), default=0) if code else 0,
        "where": place(frame),
    }


def _iterators(recorder: Recorder) -> None:
    """Time the step waits for its batch, processor time of the wait, and the order of the samples."""
    iterator: Any = torch.utils.data.dataloader._BaseDataLoaderIter
    advance, draw, numbers = iterator.__next__, iterator._next_index, itertools.count()

    @functools.wraps(advance)
    def __next__(self: Any) -> Any:
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            return advance(self)
        finally:
            recorder.data("wait", time.perf_counter() - began)
            recorder.data("cpu", time.thread_time() - cpu)

    @functools.wraps(draw)
    def _next_index(self: Any) -> Any:
        indices = draw(self)
        if not hasattr(self, "_ridgeline_number"):
            self._ridgeline_number = next(numbers)
        recorder.order(self._ridgeline_number, indices)
        return indices

    iterator.__next__ = __next__
    iterator._next_index = _next_index


def _optimizers(change: dict[str, Any], recorder: Recorder) -> None:
    base = torch.optim.Optimizer.__init__

    @functools.wraps(base)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        base(self, *args, **kwargs)
        self._ridgeline_where = place(sys._getframe(1))

    torch.optim.Optimizer.__init__ = noted  # type: ignore[method-assign]
    if not change:
        return
    kinds: list[Any] = list(vars(torch.optim).values())
    for kind in kinds:
        made = vars(kind).get("__init__") if isinstance(kind, type) else None
        if made is not None and set(change) <= set(inspect.signature(made).parameters):
            kind.__init__ = _changed_optimizer(made, change, recorder)


def _changed_optimizer(original: Any, change: dict[str, Any], recorder: Recorder) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        recorder.applied.add("optimizer")
        original(self, *args, **{**kwargs, "foreach": None, **change})

    return __init__


def _ddp(change: dict[str, Any], recorder: Recorder) -> None:
    ddp = torch.nn.parallel.DistributedDataParallel
    original = ddp.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if change:
            recorder.applied.add("ddp")
        kwargs.update(change)
        original(self, *args, **kwargs)
        bucket = kwargs.get("bucket_cap_mb")
        view = bool(kwargs.get("gradient_as_bucket_view"))
        recorder.facts["ddp"] = {"bucket_cap_mb": bucket or 25, "view": view, "where": place(sys._getframe(1))}

    ddp.__init__ = __init__  # type: ignore[method-assign]


def _models(knobs: dict[str, Any], recorder: Recorder) -> None:
    """During the first step, find the outermost modules that are called with gradients; then compile or autocast them."""
    found: dict[int, torch.nn.Module] = {}
    depth = 0

    def enter(module: torch.nn.Module, args: Any) -> None:
        nonlocal depth
        if depth == 0 and torch.is_grad_enabled():
            found[id(module)] = module
        depth += 1

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1

    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]

    def act(optimizer: Any) -> None:
        for hook in hooks:
            hook.remove()
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        modules = [m for m in found.values() if any(id(p) in trained for p in m.parameters())]
        found.clear()
        recorder.facts["modules"] = [type(m).__name__ for m in modules]
        recorder.facts["compiled"] = any(_is_compiled(m) for m in modules)
        change_modules(modules, knobs, recorder)
        if recorder.spec["profile"] and not recorder.facts["compiled"]:
            for module in modules:
                _name_forward(module, recorder)

    recorder.at_first_step.append(act)


def _name_forward(module: torch.nn.Module, recorder: Recorder) -> None:
    """Name the model's forward in the trace, as our own trainer does: the reader tells phases by it."""
    open_ranges: list[Any] = []

    def enter(module: torch.nn.Module, args: Any) -> None:
        if recorder.tracing:
            open_ranges.append(torch.profiler.record_function("ridgeline.forward"))
            open_ranges[-1].__enter__()

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        if open_ranges:
            open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _is_compiled(module: torch.nn.Module) -> bool:
    return any(
        type(one).__name__ == "OptimizedModule" or getattr(one, "_compiled_call_impl", None) is not None
        for one in module.modules()
    )


def change_modules(modules: list[torch.nn.Module], knobs: dict[str, Any], recorder: Recorder) -> None:
    """Change models in place: names of parameters and the objects the script holds stay what they are."""
    if knobs.get("checkpoint") == "blocks" or "parts" in knobs:
        if recorder.facts["compiled"]:
            raise RuntimeError("the job compiles its model itself")
        if "parts" in knobs:
            for module in modules:
                memory.split_forward(module, knobs["parts"], recorder)
        else:
            memory.checkpoint_blocks(modules, recorder)
    if "autocast" in knobs:
        for module in modules:
            module.forward = _in_autocast(module, getattr(torch, knobs["autocast"]))
            recorder.applied.add("autocast")
    if "compile" in knobs:
        if recorder.facts["compiled"]:
            raise RuntimeError("the job compiles its model itself")
        for module in modules:
            module.compile(**knobs["compile"])
            recorder.applied.add("compile")
        recorder.facts["compiled"] = bool(modules)


def _in_autocast(module: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The module's forward in ``dtype``; what it returns is fp32 again, so that the loss is computed in full precision."""
    forward = module.forward
    device = next((p.device.type for p in module.parameters()), "cpu")

    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == dtype else value

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=dtype):
            output = forward(*args, **kwargs)
        return torch.utils._pytree.tree_map(cast, output)

    return run


def _backward(recorder: Recorder) -> None:
    """``Tensor.backward`` calls ``torch.autograd.backward`` by that name, so this one hook sees both. A backward within a
    backward is no pass of its own: reentrant checkpointing makes one for each function."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if recorder.in_backward:
            return original(tensors, *args, **kwargs)
        recorder.loss(tensors)
        recorder.in_backward = True
        try:
            if not recorder.tracing:
                return original(tensors, *args, **kwargs)
            with torch.profiler.record_function("ridgeline.backward"):
                return original(tensors, *args, **kwargs)
        finally:
            recorder.in_backward = False

    torch.autograd.backward = backward
