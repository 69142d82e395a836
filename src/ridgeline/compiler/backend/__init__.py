"""``torch.compile(model, backend="ridgeline")``: rewrite the graph before autograd, then Inductor.

1. Dynamo hands over a graph; it is brought into normal form (`internals/graphs.py`).
2. Patterns are replaced where that pays on the device (`patterns.py`, `match.py`, `terms.py`).
3. Without gradients, linears with frozen bf16 weights are packed and merged (`linears.py`).
4. Autograd, decomposition and code generation are Inductor's. A graph in which nothing was replaced goes there as it came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ridgeline.compiler.backend.linears import freeze
from ridgeline.compiler.backend.match import Applied, rewrite
from ridgeline.compiler.backend.partition import compile_with, find_engine
from ridgeline.compiler.backend.patterns import PATTERNS
from ridgeline.compiler.internals import graphs
from ridgeline.compiler.internals.settings import aot_eager
from ridgeline.errors import UserError, nearest

_watchers: ContextVar[tuple[list[list[Applied]], ...]] = ContextVar("ridgeline_backend_watchers", default=())
OWN = {
    "patterns": "'pays' (default), 'all', 'none'",
    "freeze": "True (default) or False",
    "inner": "'inductor' (default), 'aot_eager', 'eager'",
    "engine": "None (default), 'openvino' or an object like `partition.Engine`",
    "precision": "of the engine: 'exact' (default) or 'bf16'",
}


def backend(
    graph: GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend. ``options`` are ours (``patterns``, ``freeze``, ``inner``) and any of Inductor's settings.

    Raises:
        UserError: an option or a mode that does not exist.
    """
    own, settings = validate(options, mode)
    applied: list[Applied] = []
    reason = graphs.traceable(graph)
    if reason is None and (own["patterns"] != "none" or own["freeze"]):
        graph, applied = _rewritten(graph, examples, own)
    elif reason is not None:
        applied = [Applied("normal form", "", f"{reason}: the graph is left as it is")]
    for seen in _watchers.get():
        seen.append(applied)
    if own["engine"] is not None:
        return compile_with(graph, examples, own["engine"])
    compiled: Callable[..., Any] = _INNER[own["inner"]](graph, examples, settings)
    return compiled


def validate(options: Mapping[str, Any] | None, mode: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our options with defaults, Inductor's settings)."""
    modes = graphs.inductor_modes()
    if mode is not None and mode not in modes:
        raise UserError(f"backend 'ridgeline': no mode '{mode}'{nearest(mode, modes)}")
    own: dict[str, Any] = {
        "patterns": "pays",
        "freeze": True,
        "inner": "inductor",
        "engine": None,
        "precision": "exact",
    }
    settings = {"post_grad_custom_pre_pass": _tag(), **modes[mode or "default"]}
    for name, value in (options or {}).items():
        name = name.replace("-", "_")
        if name in own:
            own[name] = value
        elif name in graphs.inductor_settings():
            settings[name] = value
        else:
            raise UserError(
                f"backend 'ridgeline': no option '{name}'{nearest(name, [*own, *graphs.inductor_settings()])}"
            )
    valid = {"patterns": ("pays", "all", "none"), "freeze": (True, False), "inner": tuple(_INNER)}
    for name, values in valid.items():
        if own[name] not in values:
            raise UserError(f"backend 'ridgeline': option '{name}' is {OWN[name]}, got {own[name]!r}")
    if own["engine"] is not None:  # which knows ATen, and none of our operators
        own |= {"engine": find_engine(own["engine"], precision=own["precision"]), "freeze": False}
    return own, settings


@contextlib.contextmanager
def watch() -> Iterator[list[list[Applied]]]:
    """What was replaced, and what was refused and why, in each graph compiled inside the ``with`` block."""
    seen: list[list[Applied]] = []
    token = _watchers.set((*_watchers.get(), seen))
    try:
        yield seen
    finally:
        _watchers.reset(token)


def _rewritten(
    graph: GraphModule, examples: Sequence[Any], own: Mapping[str, Any]
) -> tuple[GraphModule, list[Applied]]:
    normal = graphs.normal_form(graph, examples)
    device = next((e.device.type for e in examples if isinstance(e, Tensor)), "cpu")
    applied = [] if own["patterns"] == "none" else rewrite(normal, list(PATTERNS), device, own["patterns"] == "all")
    if own["freeze"] and not torch.is_grad_enabled():
        applied += freeze(normal, examples)
    return (normal if any(one.refused is None for one in applied) else graph), applied


@cache
def _tag() -> graphs.SourceTag:
    return graphs.SourceTag(Path(__file__).parent)


def _aot_eager(graph: GraphModule, examples: Sequence[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = aot_eager(graph, list(examples))
    return compiled


_INNER: dict[str, Callable[..., Any]] = {
    "inductor": graphs.inductor,
    "aot_eager": _aot_eager,
    "eager": lambda graph, examples, settings: graph.forward,
}
