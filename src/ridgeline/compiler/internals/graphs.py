"""What the backend needs of torch's private side: the normal form of a graph, Inductor as a function, cache tags.

The normal form is the graph before autograd and before decomposition, as ATen calls: made by running Dynamo's graph
once on fake tensors. A method, an operator and a function of torch become the same node there, and composite
operations (linear, matmul, softmax) stay whole. Every node keeps its line of the user's source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.traceback import preserve_node_meta

from ridgeline.compiler.internals import check_version

check_version("the backend 'ridgeline'")


def trace(function: Callable[..., Any], examples: Sequence[Any]) -> GraphModule:
    """``function`` as pre-dispatch ATen, run once on ``examples`` (fake or real)."""
    with torch.enable_grad(), preserve_node_meta():
        made = make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*examples)
    made.graph.eliminate_dead_code()
    return made


def normal_form(graph: GraphModule, examples: Sequence[Any]) -> GraphModule:
    """The graph Dynamo hands to a backend as pre-dispatch ATen, with the same inputs in the same order.

    ``examples`` are the real inputs; their symbolic sizes are those Dynamo gave them, so nothing is specialised.
    """
    context = TracingContext.try_get()
    mode = (context and context.fake_mode) or detect_fake_mode(examples) or FakeTensorMode()
    fakes = [_fake(example, mode, context) for example in examples]
    with mode:
        made = trace(lambda *values: Interpreter(graph).run(*values), fakes)
    places = [node for node in made.graph.nodes if node.op == "placeholder"]
    originals = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for place, original in zip(places, originals, strict=True):
        place.meta = {**original.meta, **place.meta}
        if hasattr(original, "_dynamo_source"):
            place._dynamo_source = original._dynamo_source
    made.meta.update(graph.meta)
    return made


def traceable(graph: GraphModule) -> str | None:
    """None when `normal_form` can represent ``graph``, else what it holds that must be left as it is."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{node.target._name} is a graph within the graph"
        if node.op == "call_module":
            return f"a call of the module {node.target}"
    return None


def _fake(example: Any, mode: FakeTensorMode, context: TracingContext | None) -> Any:
    if not isinstance(example, Tensor) or isinstance(example, FakeTensor):
        return example
    contexts: Any = context.tensor_to_context if context else {}
    symbolic = contexts.get(example)
    source = getattr(symbolic, "tensor_source", None)
    return mode.from_tensor(example, symbolic_context=symbolic, source=source, static_shapes=symbolic is None or None)


def in_fake_mode(values: Sequence[Any]) -> FakeTensorMode:
    """The mode ``values`` live in."""
    mode = detect_fake_mode(values)
    assert mode is not None
    return mode


def known(condition: Any) -> bool:
    """Whether a comparison of sizes holds for every size the graph was compiled for; adds no guard."""
    return bool(statically_known_true(condition))


def same_shape(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have one shape for every size the graph was compiled for."""
    return x.dim() == y.dim() and all(known(a == b) for a, b in zip(x.shape, y.shape, strict=True))


class SourceTag(CustomGraphPass):
    """Does nothing to a graph, but puts the hash of our source into the key of Inductor's cache, which spans restarts."""

    def __init__(self, folder: Path) -> None:
        files = [Path(__file__), *sorted(folder.rglob("*.py"))]
        self._uuid = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Leave ``graph`` as it is."""

    def uuid(self) -> str:
        """The hash of every Python file below the folder, and of this one."""
        return self._uuid


def inductor(graph: GraphModule, examples: Sequence[Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """Autograd, decomposition and Inductor, as ``torch.compile`` would run them on ``graph``."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, list(examples), config_patches=settings)  # type: ignore[return-value]


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Settings of every mode of ``torch.compile``."""
    from torch._inductor import list_mode_options

    return {"default": {}, **list_mode_options()}


def inductor_settings() -> list[str]:
    """Names of every setting of Inductor."""
    from torch._inductor import config

    return list(config.get_config_copy())


def standalone(graph: GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """A part of a graph by Inductor alone: inference, ``examples`` fake. Returns what the part returns, a tuple."""
    from torch._inductor import standalone_compile

    shapes: Any = "from_tracing_context" if TracingContext.try_get() else "from_example_inputs"
    return standalone_compile(graph, list(examples), dynamic_shapes=shapes, options={})


def after_autograd(
    graph: GraphModule, examples: Sequence[Any], compile_graph: Callable[[GraphModule], Callable[..., Any]]
) -> Callable[..., Any]:
    """``graph`` through AOTAutograd with core ATen decompositions; forward and backward go to ``compile_graph``."""
    from torch._decomp import core_aten_decompositions
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    def compiler(made: GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(compile_graph(made))

    return aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        inference_compiler=compiler,
        decompositions=core_aten_decompositions(),
    )(graph, list(examples))


def first_tensor(value: Any) -> Tensor:
    """The first tensor of a model's output, of any structure."""
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
