"""Parts of a captured graph as modules of their own: its first n operators, one operator, or a few of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node


@dataclass
class Captured:
    """A graph as Dynamo hands it to a backend, with the inputs of its first call."""

    graph: GraphModule
    inputs: list[Any]

    @property
    def operators(self) -> list[Node]:
        """Its operations in order, without inputs, attributes and the picking of one result out of several."""
        return [one for one in self.graph.graph.nodes if one.op.startswith("call_") and not _picks(one)]


def _picks(node: Node) -> bool:
    """Whether a node takes one of several results of another; it goes where that one goes."""
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return False
    return isinstance(node.args[0].meta.get("example_value"), (tuple, list))


def _inside(nodes: Iterable[Node]) -> set[Node]:
    chosen = set(nodes)
    return chosen | {user for one in chosen for user in one.users if _picks(user) and user.args[0] is one}


def capture(compile_and_run: Callable[[Callable[..., Any]], None]) -> list[Captured]:
    """Every graph of a program, run eagerly. ``compile_and_run(backend)`` compiles with the backend and calls it."""
    found: list[Captured] = []

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kept = Captured(graph, [])
        found.append(kept)

        def run(*values: Any) -> Any:
            if not kept.inputs:
                kept.inputs = [_kept(one) for one in values]
            return graph.forward(*values)

        return run

    torch.compiler.reset()
    compile_and_run(backend)
    torch.compiler.reset()
    return [one for one in found if one.inputs]


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad and value.is_floating_point())


def first(captured: Captured, count: int) -> Captured:
    """The graph up to its ``count``-th operator; its outputs are all values that something later still needs."""
    inside = _inside(captured.operators[:count])
    return Captured(part(captured.graph, inside, inputs_first=True), captured.inputs)


def only(captured: Captured, chosen: Sequence[Node]) -> Captured:
    """Some operators alone, on the values that eager gives them."""
    values: dict[Node, Any] = {}

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            values[n] = super().run_node(n)
            return values[n]

    Watch(captured.graph).run(*captured.inputs)
    inside = _inside(chosen)
    module = part(captured.graph, inside)
    outside = [one for one in captured.graph.graph.nodes if one not in inside and any(u in inside for u in one.users)]
    given = [_kept(values[one]) for one in outside if one.op != "get_attr"]
    # The part is differentiated with respect to all it is given, as it was inside the whole.
    wanted = any(isinstance(one, Tensor) and one.requires_grad for one in captured.inputs)
    for one in given:
        if wanted and isinstance(one, Tensor) and one.is_floating_point():
            one.requires_grad_(True)
    return Captured(module, given)


def part(whole: GraphModule, inside: set[Node], inputs_first: bool = False) -> GraphModule:
    """A module of the operators ``inside``: other values they need are its inputs, what leaves them its outputs."""
    graph, copies = Graph(), dict[Node, Node]()
    for one in whole.graph.nodes:
        if one.op == "placeholder" and inputs_first:
            copies[one] = graph.placeholder(one.name)
        elif one in inside or one.op == "get_attr":
            continue
        elif any(user in inside for user in one.users) and not inputs_first:
            copies[one] = graph.placeholder(one.name)
    for one in whole.graph.nodes:
        if one in inside or (one.op == "get_attr" and any(user in inside for user in one.users)):
            copies[one] = graph.node_copy(one, lambda old: copies[old])
    leaving = [one for one in whole.graph.nodes if one in inside and any(user not in inside for user in one.users)]
    leaving = leaving or [one for one in whole.graph.nodes if one in inside][-1:]
    graph.output(tuple(copies[one] for one in leaving))
    module = GraphModule(whole, graph, "Part")
    module.recompile()
    return module


def spelled(node: Node) -> str:
    """``torch.nn.functional.gelu`` or ``Tensor.sum``: the operator as one would write it."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_module":
        return str(node.target)
    name = getattr(node.target, "__name__", str(node.target))
    module = (getattr(node.target, "__module__", "") or "").lstrip("_")
    return f"{module}.{name}" if module else f"torch.{name}"
