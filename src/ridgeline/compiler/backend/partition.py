"""Cut a graph into parts for an external engine and parts for Inductor.

Each node gets a level: that of its inputs, plus one where an edge crosses between engine and Inductor. Nodes of one side
and one level are a part. Edges never lead to a lower level, and only to a higher one when they cross, so parts cannot
wait for each other in a circle. An engine's part with too few operators goes to Inductor, and says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from ridgeline.compiler.internals import graphs
from ridgeline.errors import JobError, UserError, nearest

MOVES = frozenset({"permute", "transpose", "t", "view", "unsqueeze", "expand", "alias"})  # compute nothing
MIN_OPERATORS = 3  # a smaller part of an engine costs more to enter than it saves
INDUCTOR = "inductor"


class Engine(Protocol):
    """What runs parts of a graph. ``compile`` returns a function of the part's inputs that gives a tuple of tensors."""

    name: str

    def refuses(self, node: Node) -> str | None:
        """Why the engine cannot run an ATen call, or None."""

    def compile(self, part: GraphModule, examples: Sequence[Any]) -> Callable[..., Sequence[Tensor]]:
        """A part, with a fake example of each input."""


@dataclass
class Part:
    """A partition: where it runs, its operators, and the bytes of tensors that enter and leave it."""

    side: str
    operators: dict[str, int]
    bytes_in: int
    bytes_out: int


@dataclass
class Report:
    """What `dry_run` found, graph by graph: the parts in order, and operators the engine refused with the reasons."""

    engine: str
    graphs: list[list[Part]] = field(default_factory=list)
    refused: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for number, parts in enumerate(self.graphs):
            lines.append(f"graph {number}: {len(parts)} parts")
            for part in parts:
                names = ", ".join(f"{name} x{count}" for name, count in part.operators.items())
                lines.append(f"  {part.side:<9} {part.bytes_in:>12,} B in {part.bytes_out:>12,} B out  {names}")
        lines += [f"refused by {self.engine}: {reason}" for reason in ([] if self.refused else ["nothing"])]
        for reason, counts in self.refused.items():
            lines.append(f"refused by {self.engine}: {', '.join(f'{n} x{c}' for n, c in counts.items())}: {reason}")
        return "\n".join(lines)


def assign(
    graph: GraphModule, engine: Engine, minimum: int = MIN_OPERATORS
) -> tuple[dict[Node, tuple[int, str]], dict[Node, str]]:
    """((level, side) of every computing node, why the engine does not get a node)."""
    refusals: dict[Node, str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and not _follows(node):
            reason = engine.refuses(node)
            if reason is not None:
                refusals[node] = reason
    places = _levels(graph, engine.name, refusals)
    while True:
        sizes = Counter(place for node, place in places.items() if _computes(node))
        small = [
            n for n, place in places.items() if place[1] == engine.name and sizes[place] < minimum and not _follows(n)
        ]
        if not small:
            return places, refusals
        refusals |= dict.fromkeys(small, f"alone in a part of fewer than {minimum} operators")
        places = _levels(graph, engine.name, refusals)


def _follows(node: Node) -> bool:
    """Whether a node must stay with the one it reads: an element of several results."""
    return "getitem" in str(node.target)


def _computes(node: Node) -> bool:
    name = node.target.overloadpacket.__name__ if isinstance(node.target, torch._ops.OpOverload) else ""
    return not _follows(node) and name not in MOVES


def _levels(graph: GraphModule, engine: str, refusals: dict[Node, str]) -> dict[Node, tuple[int, str]]:
    places: dict[Node, tuple[int, str]] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        sources = [places[source] for source in node.all_input_nodes if source in places]
        if _follows(node) and sources:
            places[node] = sources[0]
            continue
        side = INDUCTOR if node in refusals else engine
        places[node] = (max((level + (other != side) for level, other in sources), default=0), side)
    for node in reversed(list(places)):  # a view of an input is taken where it is first used
        users = [places[user] for user in node.users if user in places]
        if not _computes(node) and not any(source in places for source in node.all_input_nodes) and users:
            first = min(users)
            places[node] = first if first[1] == INDUCTOR or node not in refusals else places[node]
    return places


def describe(graph: GraphModule, places: dict[Node, tuple[int, str]]) -> list[Part]:
    """The parts in the order they run."""
    parts = []
    for place in sorted(set(places.values())):
        inside = [node for node, own in places.items() if own == place]
        entering = {source for node in inside for source in node.all_input_nodes if places.get(source) != place}
        leaving = [node for node in inside if any(places.get(user) != place for user in node.users)]
        names = Counter(str(node.target) for node in inside if not _follows(node))
        parts.append(Part(place[1], dict(names), sum(map(_bytes, entering)), sum(map(_bytes, leaving))))
    return parts


def _bytes(node: Node) -> int:
    """Bytes of a node's tensor; a size that varies counts as one."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    numbers = [size if isinstance(size, int) else 1 for size in value.shape]
    return int(torch.Size(numbers).numel()) * value.element_size()


def compile_parts(graph: GraphModule, engine: Engine) -> Callable[..., Any]:
    """A functional ATen graph with its parts compiled, each by its own side.

    Raises:
        JobError: the engine failed on a part; never a fallback.
    """
    places, _ = assign(graph, engine)
    if not places:
        return graph.forward
    order = {place: number for number, place in enumerate(sorted(set(places.values())))}
    # Parts are called in the order of what they need; the first node of one may stand before all of another it needs.
    split = split_module(graph, graph, lambda node: order[places[node]])
    sides = {f"submod_{number}": place[1] for place, number in order.items()}
    for node in list(split.graph.nodes):
        if node.op == "call_module":
            part = getattr(split, node.target)
            examples = [place.meta.get("val") for place in part.graph.nodes if place.op == "placeholder"]
            setattr(split, node.target, _Compiled(part, examples, engine if sides[node.target] != INDUCTOR else None))
    return split.forward


class _Compiled(nn.Module):
    """A part as a module that calls what it was compiled to."""

    def __init__(self, part: GraphModule, examples: Sequence[Any], engine: Engine | None) -> None:
        super().__init__()
        (out,) = (node for node in part.graph.nodes if node.op == "output")
        self.single = not isinstance(out.args[0], (tuple, list))
        self.engine = engine
        if self.single:
            out.args = ((out.args[0],),)
            part.recompile()
        self.call = graphs.standalone(part, examples) if engine is None else self._engine(engine, part, examples)

    @staticmethod
    def _engine(engine: Engine, part: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        try:
            return engine.compile(part, examples)
        except Exception as error:
            raise JobError(f"engine '{engine.name}' cannot compile a part: {_in_a_line(error)}") from error

    def forward(self, *inputs: Any) -> Any:
        """The part's result."""
        try:
            out = self.call(*inputs)
        except Exception as error:
            if self.engine is None:
                raise
            raise JobError(f"engine '{self.engine.name}' failed: {_in_a_line(error)}") from error
        return out[0] if self.single else tuple(out)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def compile_with(graph: GraphModule, examples: Sequence[Any], engine: Engine) -> Callable[..., Any]:
    """Autograd, then parts: forward and backward are cut each on its own."""
    return graphs.after_autograd(graph, examples, lambda made: compile_parts(made, engine))


def dry_run(
    model: Callable[..., Any], *inputs: Any, engine: str | Engine = "openvino", training: bool = False
) -> Report:
    """What would run where, without compiling anything: ``model(*inputs)`` runs once, eagerly.

    Raises:
        UserError: there is no such engine, or it is not installed.
    """
    chosen = find_engine(engine)
    report = Report(chosen.name)

    def look(graph: GraphModule) -> Callable[..., Any]:
        places, refusals = assign(graph, chosen)
        report.graphs.append(describe(graph, places))
        for node, reason in refusals.items():
            names = report.refused.setdefault(reason, {})
            names[str(node.target)] = names.get(str(node.target), 0) + 1
        return graph.forward

    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        out = torch.compile(model, backend=lambda g, ex: graphs.after_autograd(g, ex, look))(*inputs)
        if training:
            torch.autograd.backward(graphs.first_tensor(out).float().sum())
    return report


def find_engine(engine: str | Engine, **options: Any) -> Engine:
    """An engine by name, or the object itself."""
    if not isinstance(engine, str):
        return engine
    if engine != "openvino":
        raise UserError(f"no engine '{engine}'{nearest(engine, ['openvino'])}")
    from ridgeline.compiler.backend.openvino import OpenVINO

    return OpenVINO(**options)
