"""OpenVINO as an engine: parts of a graph on its CPU runtime, in the precision of the graph unless asked otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ridgeline.errors import JobError, UserError, nearest

PRECISIONS = {"exact": "f32", "bf16": "bf16"}
DTYPES = (torch.float32, torch.int64, torch.int32, torch.bool)


class OpenVINO:
    """Static shapes, fp32. OpenVINO computes in bf16 by itself where the CPU can; here only with ``precision="bf16"``.

    Raises:
        UserError: OpenVINO is not installed, or ``precision`` is neither "exact" nor "bf16".
    """

    name = "openvino"

    def __init__(self, precision: str = "exact") -> None:
        if precision not in PRECISIONS:
            raise UserError(f"engine 'openvino': no precision '{precision}'{nearest(precision, PRECISIONS)}")
        try:
            import openvino
            from openvino.frontend.pytorch.torchdynamo.op_support import OperatorSupport
        except ImportError as error:
            raise UserError("engine 'openvino' is not installed: pip install 'ridgeline[openvino]'") from error
        self.hint = PRECISIONS[precision]
        self._core = openvino.Core()
        self._supported = {name.removeprefix("torch.ops.") for name in OperatorSupport({})._support_dict}

    def refuses(self, node: Node) -> str | None:
        """Unknown operators, dtypes other than fp32 and integers, sizes that vary."""
        if str(node.target) not in self._supported:
            return "no such operator in OpenVINO's PyTorch frontend"
        values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
        tensors = [t for value in values for t in (value if isinstance(value, (tuple, list)) else [value])]
        found = [t for t in tensors if isinstance(t, Tensor)]
        if len(found) < len(tensors):
            return "an input or result is no tensor"
        if any(t.dtype not in DTYPES for t in found):
            return f"{next(t.dtype for t in found if t.dtype not in DTYPES)} is not among the engine's dtypes"
        return "a size varies" if any(not isinstance(s, int) for t in found for s in t.shape) else None

    def compile(self, part: GraphModule, examples: Sequence[Any]) -> Callable[..., Sequence[Tensor]]:
        """Convert by OpenVINO's frontend and compile.

        Raises:
            JobError: the runtime chose a lower precision than asked for.
        """
        from openvino import PartialShape
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder(part)  # the frontend does not keep it alive
        model = frontend.convert(frontend.load(decoder))
        for place, example in zip(model.inputs, examples, strict=True):
            place.get_node().set_partial_shape(PartialShape(list(example.shape)))
        model.validate_nodes_and_infer_types()
        compiled = self._core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": self.hint})
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if chosen != self.hint:
            raise JobError(f"OpenVINO computes in {chosen}, {self.hint} was asked for")

        def run(*inputs: Tensor) -> list[Tensor]:
            arrays = [tensor.detach().contiguous().numpy() for tensor in inputs]
            return [torch.from_numpy(array.copy()) for array in compiled(arrays).values()]

        return run
