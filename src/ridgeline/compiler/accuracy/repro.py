"""A script that shows a fault by itself: the smallest graph found, its inputs, and the comparison with float64."""

from __future__ import annotations

import base64
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ridgeline.compiler.accuracy.prefix import Captured
from ridgeline.runs import write_atomic

TEMPLATE = '''\
"""@@TITLE@@

Made by `ridgeline compile accuracy`; needs nothing but torch. Prints the errors of eager and compiled against float64
and exits 1 if compiled is more than twice as far away as eager (and more than half an epsilon), else 0.
"""
import base64
import importlib
import sys
import zlib

import torch
from torch import device, inf, nan  # names that captured code may use
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

torch.manual_seed(0)
LOW = (torch.float32, torch.bfloat16, torch.float16)


def stored(text, dtype, shape):
    data = bytearray(zlib.decompress(base64.b85decode(text)))
    return torch.frombuffer(data, dtype=dtype).reshape(shape).clone()


class Part(torch.nn.Module):
@@FORWARD@@

class InFloat64(TorchDispatchMode):
    """Every operation in double precision, whatever casts the program asks for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not func._schema.is_mutable:
            args, kwargs = tree_map(widen, (args, kwargs))
        if kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.float64
        return func(*[torch.float64 if one in LOW else one for one in args], **kwargs)


def widen(one):
    return one.double() if isinstance(one, torch.Tensor) and one.dtype in LOW else one


def answer(run, inputs):
    """Outputs, and gradients of the inputs for cotangents that are the same in every precision."""
    outputs = [one for one in tree_leaves(run(*inputs)) if isinstance(one, torch.Tensor) and one.is_floating_point()]
    draw = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(one.shape, generator=draw).bfloat16().to(one.dtype) for one in outputs]
    pairs = [(one, c) for one, c in zip(outputs, cotangents) if one.requires_grad]
    wanted = [one for one in inputs if isinstance(one, torch.Tensor) and one.requires_grad]
    found = []
    if pairs and wanted:
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [c for _, c in pairs], allow_unused=True)
    return [one.detach() for one in outputs] + [one for one in found if one is not None]


def distance(value, truth):
    difference = torch.where(value.double() == truth, 0.0, value.double() - truth)
    return float(difference.norm() / (truth.norm() or 1.0))


def backend():
    name = @@BACKEND@@
    if ":" not in name:
        return name
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        import importlib.util

        spec = importlib.util.spec_from_file_location("its_backend", place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, attribute)


inputs = [
@@INPUTS@@
]
inputs = [one.requires_grad_(needs) if isinstance(one, torch.Tensor) else one for one, needs in inputs]
part = Part()
wide = [widen(one.detach()).requires_grad_(one.requires_grad) if isinstance(one, torch.Tensor) else one for one in inputs]
with InFloat64():
    truth = answer(part, wide)
eager = answer(part, inputs)
compiled = answer(torch.compile(part, backend=backend(), dynamic=False), inputs)
worse = False
for at, (exact, one, other) in enumerate(zip(truth, eager, compiled)):
    ours, theirs = distance(one, exact), distance(other, exact)
    bad = not theirs <= 2 * max(ours, torch.finfo(one.dtype).eps / 2)
    worse |= bad
    print(f"tensor {at}: eager {ours:.3g}, compiled {theirs:.3g} from float64" + ("  <- worse" if bad else ""))
sys.exit(1 if worse else 0)
'''


def write_script(
    captured: Captured, backend: str, title: str, file: Path, bad: Callable[[Captured], bool]
) -> tuple[Path, str]:
    """Write the script; returns it and how its inputs are made.

    Inputs are drawn with the shape, type, mean and spread of the real ones if the fault shows with those as well
    (``bad`` says so); otherwise the real values stand in the script. ``backend`` is a registered name,
    ``module:name`` or ``file.py:name``.
    """
    drawn = [_drawn(one, at) for at, one in enumerate(captured.inputs)]
    if bad(Captured(captured.graph, [value for value, _ in drawn])):
        lines, how = [text for _, text in drawn], "drawn at random"
    else:
        lines, how = [_stored(one) for one in captured.inputs], "the values of the program"
    needs = [isinstance(one, Tensor) and one.requires_grad for one in captured.inputs]
    listed = "\n".join(f"    ({text}, {need})," for text, need in zip(lines, needs, strict=True))
    fields = {"TITLE": title, "FORWARD": _forward(captured.graph), "INPUTS": listed, "BACKEND": repr(backend)}
    script = TEMPLATE
    for name, value in fields.items():
        script = script.replace(f"@@{name}@@", value, 1)
    write_atomic(file, script)
    return file, how


def confirm(file: Path, timeout: float = 300.0) -> bool:
    """Whether the script, run in a process of its own, finds compiled worse."""
    try:
        done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 1 and "<- worse" in done.stdout


def _forward(graph: GraphModule) -> str:
    """The code of ``forward``, with constants that the graph holds as attributes of the class."""
    body = graph.code.strip().splitlines()
    constants = [
        f"    {name.replace('.', '_')} = {_stored(_attribute(graph, name))}"
        for name in dict.fromkeys(str(n.target) for n in graph.graph.nodes if n.op == "get_attr")
    ]
    return "\n".join([*constants, *("    " + line for line in body if not line.startswith("import"))]) + "\n"


def _attribute(graph: GraphModule, name: str) -> Any:
    value: Any = graph
    for one in name.split("."):
        value = getattr(value, one)
    return value


def _drawn(value: Any, seed: int) -> tuple[Any, str]:
    """A random value like this one, and the expression that makes it."""
    if not isinstance(value, Tensor):
        return value, repr(value)
    shape = [*value.shape]
    draw = f"generator=torch.Generator().manual_seed({seed})"
    if value.is_floating_point():
        mean, spread = _moments(value)
        text = f"(torch.randn({shape}, {draw}) * {spread!r} + {mean!r}).to({value.dtype})"
    elif value.dtype == torch.bool:
        text = f"torch.rand({shape}, {draw}) < {float(value.float().mean())!r}"
    else:
        low, high = (int(value.min()), int(value.max()) + 1) if value.numel() else (0, 1)
        text = f"torch.randint({low}, {high}, {shape}, {draw}).to({value.dtype})"
    made: Tensor = eval(text, {"torch": torch})
    return made.requires_grad_(value.requires_grad), text


def _moments(value: Tensor) -> tuple[float, float]:
    finite = value.detach().double()
    finite = finite[finite.isfinite()]
    spread = float(finite.std()) if finite.numel() > 1 else 1.0
    return (float(finite.mean()) if finite.numel() else 0.0), spread


def _stored(value: Any) -> str:
    """The value itself as an expression: a literal, or its packed bytes."""
    if not isinstance(value, Tensor):
        return repr(value)
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"stored({base64.b85encode(zlib.compress(raw, 9)).decode()!r}, {value.dtype}, {[*value.shape]})"
