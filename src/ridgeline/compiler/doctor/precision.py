"""Does a backend compute in the precision it was asked for? One extra run of each graph, in eager and in float64.

A backend's own rounding is no finding: it must be twenty times as far from float64 as eager, and further than 1e-4 of
the result's norm, which no fp32 kernel is and every bf16 or fp16 one is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

EXACT = frozenset(("inductor", "eager", "eager_noexcept", "eager_debug", "aot_eager", "cudagraphs", "ridgeline"))
EXACT_PREFIXES = ("aot_eager", "pre_dispatch")
FARTHER, LEAST = 20.0, 1e-4
MOST_BYTES = 1 << 30
"""Inputs beyond this are not copied for the check."""


def worth_checking(backend: str) -> bool:
    """Torch's own backends keep the dtype; all others are checked."""
    return backend not in EXACT and not backend.startswith(EXACT_PREFIXES)


def copy_graph(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy that a backend's rewriting does not touch; parameters are shared."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return torch.fx.GraphModule(module, graph)


def lowered(error: float, error_eager: float) -> bool:
    """The rule of this file."""
    return error > LEAST and error > FARTHER * error_eager


def check_first_call(
    module: torch.fx.GraphModule,
    compiled: Callable[..., Any],
    tell: Callable[[float, float], None],
) -> Callable[..., Any]:
    """``compiled``; at its first call the same inputs go through ``module`` in eager and in float64, and ``tell`` gets
    both distances from float64, the compiled graph's first."""
    pending: list[torch.fx.GraphModule] = [module]

    def call(*args: Any) -> Any:
        if not pending:
            return compiled(*args)
        graph = pending.pop()
        inputs = _copies(args)
        outputs = compiled(*args)
        if inputs is not None:
            try:
                errors = _errors(graph, inputs, _tensors(outputs))
            except Exception:  # a graph that cannot run in float64 (its own casts, quantised operators) says nothing
                errors = None
            if errors is not None:
                tell(*errors)
        return outputs

    return call


def _errors(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], outputs: list[torch.Tensor]
) -> tuple[float, float] | None:
    """Distances of compiled and of eager from float64; None for a graph that does not repeat itself (dropout)."""
    device = [one.device for one in inputs if isinstance(one, torch.Tensor) and one.device.type != "cpu"]
    with torch.no_grad(), torch.random.fork_rng(devices=device[:1]):
        eager = _tensors(graph(*_cast(inputs, None)))
        if any(not torch.equal(a, b) for a, b in zip(eager, _tensors(graph(*_cast(inputs, None))), strict=True)):
            return None
        exact = _tensors(graph(*_cast(inputs, torch.float64)))
    kept = [i for i, one in enumerate(outputs) if one.is_floating_point() and one.numel()]
    if not kept or len(exact) != len(outputs):
        return None
    return (
        max(_distance(outputs[i], exact[i]) for i in kept),
        max(_distance(eager[i], exact[i]) for i in kept),
    )


def _distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the norm of the exact result; 0 where that is 0 or not finite."""
    norm = float(exact.norm())
    if not 0.0 < norm < float("inf"):
        return 0.0
    return float((value.detach().to(torch.float64) - exact).norm()) / norm


def _copies(args: Sequence[Any]) -> list[Any] | None:
    tensors = [one for one in args if isinstance(one, torch.Tensor)]
    if sum(one.nbytes for one in tensors) > MOST_BYTES:
        return None
    return [one.detach().clone() if isinstance(one, torch.Tensor) else one for one in args]


def _cast(inputs: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    return [
        one.to(dtype or one.dtype, copy=True)
        if isinstance(one, torch.Tensor) and one.is_floating_point()
        else one.clone()
        if isinstance(one, torch.Tensor)
        else one
        for one in inputs
    ]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]
