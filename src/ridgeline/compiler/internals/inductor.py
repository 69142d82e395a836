"""Every level of one compilation, as plain data: Dynamo's graphs, AOTAutograd's, Inductor's loops and its code.

The idea: stand between Dynamo and Inductor as a backend. Dynamo hands over its graph; ``inner_compile`` sees each ATen
graph on its way into Inductor; two scheduler passes see the loops before and after fusion; the compiled object carries
the generated source. Nothing is patched, and what leaves this file holds no torch object.

Private names used (read in torch 2.11 to 2.13): ``compile_fx(inner_compile=)``, ``compile_fx_inner``,
``config._pre_fusion_custom_pass``, ``config._post_fusion_custom_pass``, ``config.trace.provenance_tracking_level``,
``CompiledFxGraph.source_code``. The graphs are read in ``fx_graphs.py``, the loops in ``loops.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ridgeline.compiler.internals import check_version
from ridgeline.compiler.internals.fx_graphs import aten_graph, dynamo_node, fx_graph
from ridgeline.compiler.internals.loops import scheduler_node
from ridgeline.compiler.view.records import Frame, Part


def record(run: Callable[[Callable[..., Any]], None]) -> list[Frame]:
    """Compile with Inductor, caches of graphs off, and keep every level.

    ``run(backend)`` must compile with that backend and call the result (and its backward, to see that). The
    compiled C++ comes from the disk cache where it can.

    Raises:
        UserError: a torch that this file was not written for.
    """
    check_version("`compile view`")
    import torch._functorch.config as functorch_config
    from torch._inductor import config

    recorder = _Recorder()
    passes = {"_pre_fusion_custom_pass": recorder.before_fusion, "_post_fusion_custom_pass": recorder.after_fusion}
    options = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "trace.provenance_tracking_level": 1, **passes}
    torch.compiler.reset()
    with config.patch(options), functorch_config.patch({"enable_autograd_cache": False}):
        run(recorder.backend)
    torch.compiler.reset()
    return recorder.frames


class _Recorder:
    """The backend, and what it has seen."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self._part: Part | None = None

    def backend(self, gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        frame = Frame(fx_graph(gm, dynamo_node))
        self.frames.append(frame)
        places = [node.name for node in gm.graph.nodes if node.op == "placeholder"]

        def inner(aten: Any, example_inputs: Sequence[Any], **options: Any) -> Any:
            phase = "backward" if options.get("is_backward") else "forward"
            part = Part("inference" if options.get("is_inference") else phase, aten_graph(aten, frame, places))
            frame.parts.append(part)
            self._part = part
            compiled = compile_fx_inner(aten, example_inputs, **options)
            part.code = getattr(compiled, "source_code", "") or ""
            return compiled

        compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner)
        return compiled  # type: ignore[no-any-return]

    def before_fusion(self, nodes: list[Any]) -> list[Any]:
        assert self._part is not None
        self._part.before += [scheduler_node(node, self._part.aten) for node in nodes]
        return nodes

    def after_fusion(self, nodes: list[Any]) -> list[Any]:
        assert self._part is not None
        self._part.after += [scheduler_node(node, self._part.aten) for node in nodes]
        return nodes
