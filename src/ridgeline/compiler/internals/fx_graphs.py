"""FX graphs as printed lines and nodes that know where they come from.

Private metadata used (read in torch 2.11 to 2.13): ``stack_trace``, ``from_node`` (the node of the graph above), ``desc``
(which input of the graph above a placeholder is), ``seq_nr`` (autograd's number, shared by forward and backward).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ridgeline.compiler.view.records import Frame, Graph, Node

STACK = re.compile(r'File "(.+?)", line (\d+), in (\S+)')
ASSIGNED = re.compile(r"^\s+(\w+)(?:: .+?)? = ")
FREED = re.compile(r";  (?:\w+ = )+None$")
QUOTED_TYPE = re.compile(r'^(\s+\w+): "(.+?)" = ')
TORCH = str(Path(torch.__file__).parent)


def user_frames(stack: str | None) -> list[tuple[str, int, str]]:
    """(file, line, function) of a stack trace, outermost first, without torch's own files."""
    found = [(file, int(line), name) for file, line, name in STACK.findall(stack or "")]
    return [frame for frame in found if not frame[0].startswith(TORCH)]


def dynamo_node(node: Any) -> Node:
    return Node(node.name, user_frames(node.meta.get("stack_trace")), target=_target(node))


def _target(node: Any) -> str:
    target = node.target
    if isinstance(target, str):
        return target if node.op == "placeholder" else f"Tensor.{target}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = (getattr(target, "__module__", None) or "").replace("_operator", "operator")
    name = getattr(target, "__name__", str(target))
    return f"{module}.{name}" if module and module != "torch._C._nn" else f"torch.{name}" if not module else name


def aten_graph(gm: Any, frame: Frame, places: list[str]) -> Graph:
    """An ATen graph whose nodes know the torch IR nodes they come from; backward nodes know their forward ones."""
    forward = next((part.aten for part in frame.parts if part.phase == "forward"), None)
    graph = fx_graph(gm, lambda node: _aten_node(node, frame.torch, places))
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    for node in nodes:
        if node.op != "placeholder" and "seq_nr" in node.meta:
            graph.sequence.setdefault(node.meta["seq_nr"], []).append(node.name)
    if forward is None:
        _spread(graph)
        return graph
    for node in nodes:
        ours = graph.nodes[node.name]
        if node.op == "placeholder":  # a saved tensor has the name of the forward node that made it
            ours.forward = [node.name] if node.name in forward.nodes else []
        else:
            same = forward.sequence.get(node.meta.get("seq_nr"), [])
            ours.forward = [node.name] if node.name in same else same  # computed once more, or differentiated
        if ours.forward:
            ours.parents = []  # it hangs below its forward nodes
    return graph


def _spread(graph: Graph) -> None:
    """A node that lost its origin (a transpose of autograd's) has that of the nodes with its sequence number."""
    for names in graph.sequence.values():
        known = list(dict.fromkeys(parent for name in names for parent in graph.nodes[name].parents))
        for name in names:
            node = graph.nodes[name]
            node.parents = node.parents or known


def _aten_node(node: Any, above: Graph, places: list[str]) -> Node:
    ours = Node(node.name, user_frames(node.meta.get("stack_trace")), target=_target(node))
    index = getattr(node.meta.get("desc"), "idx", None)
    if node.op == "placeholder" and isinstance(index, int) and index < len(places):
        ours.parents = [places[index]]
    else:
        ours.parents = [name for name in ancestry(node) if name in above.nodes][:1]
    return ours


def ancestry(node: Any) -> Iterator[str]:
    """Names in the chain ``from_node``, nearest first."""
    chain = list(node.meta.get("from_node") or ())
    while chain:
        yield from (source.name for source in chain)
        chain = [deeper for source in chain for deeper in source.from_node]


def fx_graph(gm: Any, describe: Callable[[Any], Node]) -> Graph:
    nodes = {node.name: describe(node) for node in gm.graph.nodes if node.op != "output"}
    return Graph(list(_lines(gm, nodes)), nodes)


def _lines(gm: Any, nodes: dict[str, Node]) -> Iterator[tuple[str, str | None]]:
    """torch's readable form: one line for each input, without comments and the bookkeeping of freed names."""
    places = [node for node in gm.graph.nodes if node.op == "placeholder"]
    yield f"def forward({len(places)} inputs):", None
    for node in places:
        yield f"    {node.name}: {_type(node)}{_where(node)}", node.name
    names = {node.target: node.name for node in places}
    for text in gm.print_readable(print_output=False).splitlines():
        if not text.strip() or text.startswith("class ") or text.lstrip().startswith("def forward("):
            continue
        if text.lstrip().startswith("# File: "):
            continue  # the nodes' frames say it
        text = QUOTED_TYPE.sub(r"\1: \2 = ", FREED.sub("", text[4:]), count=1).replace("torch.ops.aten.", "aten.")
        assigned = ASSIGNED.match(text)
        name = assigned[1] if assigned and assigned[1] in nodes else None
        if name is not None and name in names.values() and text.strip() in {f"{n} = {t}" for t, n in names.items()}:
            continue  # Dynamo's renaming of an input, shown above
        yield text, name


def _type(node: Any) -> str:
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{short_dtype(value.dtype)}{[*value.shape]}"


def _where(node: Any) -> str:
    """``self.blocks.0.weight`` behind the mangled name of a parameter."""
    target = str(node.target)
    if not target.startswith("L_self_"):
        return ""
    path = re.sub(r"(?:^|_)(?:modules|parameters|buffers)_", ".", target.removeprefix("L_self_"))
    return "  # self" + path.strip("_") if path.startswith(".") else ""


def short_dtype(dtype: torch.dtype) -> str:
    """``f32``, ``bf16``, ``i64`` as in torch's printed graphs."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "f").replace("uint", "u").replace("int", "i")
