"""Linears with frozen weights: packed once in oneDNN's layout, and those that read the same input merged into one.

``F.linear`` on a plain weight re-blocks it at every call, which for the few rows of a decode step costs more than the
product. Packed, the same products are summed in a layout that is read once and in order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ridgeline.compiler.backend import operators  # noqa: F401  (registers frozen_linear)
from ridgeline.compiler.backend.match import SOURCE, Applied, line_of

aten = torch.ops.aten
Linear = tuple[Node, Node, Node | None, bool]  # input, weight, bias, weight is [in, out]


def freeze(graph: GraphModule, examples: Sequence[Any]) -> list[Applied]:
    """Pack the linears of a normal form whose weights are parameters. Only valid without gradients."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    frozen = {place for place, example in zip(places, examples, strict=True) if _packable(example)}
    groups: dict[Any, list[tuple[Node, Linear]]] = defaultdict(list)
    epoch = 0
    for node in graph.graph.nodes:
        found = _linear(node, frozen)
        if found is not None:
            x, _, bias, transposed = found
            groups[x, transposed, bias is None, epoch].append((node, found))
        elif node.op == "call_function" and _mutates(node):
            epoch += 1
    merged = [(members, _merge(graph, members)) for members in groups.values()]
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return [
        Applied(f"{len(members)} linears merged" if len(members) > 1 else "packed linear", line_of(node))
        for members, node in merged
    ]


def _packable(example: Any) -> bool:
    if not isinstance(example, nn.Parameter) or example.is_inference() or type(example.data) is not Tensor:
        return False
    supported = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if example.dtype == torch.bfloat16:
        supported = supported and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported and example.device.type == "cpu" and example.dtype in (torch.bfloat16, torch.float32))


def _mutates(node: Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable


def _linear(node: Node, frozen: set[Node]) -> Linear | None:
    given: tuple[Any, ...] = node.args
    if node.target is aten.linear.default:
        x, weight, bias, transposed = given[0], given[1], given[2] if len(given) > 2 else None, False
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight, transposed = *given, True
    else:
        return None
    return (x, weight, bias, transposed) if weight in frozen and (bias is None or bias in frozen) else None


def _merge(graph: GraphModule, members: list[tuple[Node, Linear]]) -> Node:
    """One frozen linear at the place of the first member, of which the members are slices."""
    first, (_, _, bias, transposed) = members[0]
    x = first.args[1 if transposed else 0]  # read again: it may have been replaced meanwhile
    weights, biases = [m[1][1] for m in members], [m[1][2] for m in members if bias is not None]
    with graph.graph.inserting_before(first):
        whole = graph.graph.call_function(torch.ops.ridgeline.frozen_linear.default, (x, weights, biases, transposed))
        whole.meta = {key: value for key, value in first.meta.items() if key in SOURCE}
        start = 0
        for node, _ in members:
            stop, part = start + node.meta["val"].shape[-1], whole
            if len(members) > 1:
                part = graph.graph.call_function(aten.slice.Tensor, (whole, -1, start, stop))
                part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            start = stop
    for node, _ in members:
        graph.graph.erase_node(node)
    return whole
