"""Inductor's scheduler nodes as text, bytes and FLOPs.

Private names used (read in torch 2.11 to 2.13): the nodes' ``get_read_write_buffers_sizes``,
``get_read_write_buffer_accesses``, ``_body`` and its ``debug_str``, ``node.get_origins``, ``node.origin_node``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ridgeline.compiler.internals.fx_graphs import ancestry, short_dtype, user_frames
from ridgeline.compiler.view.records import Graph, Loops

# One floating-point operation each; what moves, converts or compares data counts as none.
_ARITHMETIC = """
    add sub mul truediv fma neg abs square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p erf erfc tanh
    sigmoid sin cos tan sinh cosh asin acos atan atan2 pow maximum minimum fmod remainder
"""
ARITHMETIC = frozenset(_ARITHMETIC.split())
REDUCTION_FLOPS = {"welford_reduce": 4, "welford_combine": 8}  # per element; every other kind of reduction is 1


def scheduler_node(node: Any, aten: Graph) -> Loops:
    members = list(node.get_nodes())
    origins = list(dict.fromkeys(name for one in members for name in _origins(one, aten)))
    flops = [_flops(one) for one in members]
    matmul = next((found for one in members if (found := _matmul(one))), None)
    lines = [line for one in members for line in _text(one)]
    if len(members) > 1:
        lines = [f"{node.get_name()}: one kernel of {len(members)}", *("  " + line for line in lines)]
    return Loops(
        name=node.get_name(),
        kind=_kind(members),
        lines=lines,
        origins=origins,
        outputs=[buffer.get_name() for one in members for buffer in one.get_outputs()],
        members=[one.get_name() for one in members],
        bytes_moved=_bytes(node, members),
        flops=None if None in flops else sum(filter(None, flops)),
        dtype=matmul or "fp32",
        matmul=matmul is not None,
    )


def _bytes(node: Any, members: Sequence[Any]) -> int:
    """Each buffer read or written once. A fused node counts whole buffers; its members know how much they touch."""
    accesses = getattr(node, "get_read_write_buffer_accesses", None)
    if accesses is None or len(members) < 2:
        return int(node.get_read_write_buffers_sizes())
    parts = [one.get_read_write_buffer_accesses(include_reads=True, include_writes=True) for one in members]
    whole = accesses(include_reads=True, include_writes=True)
    return int(sum(min(size, sum(part.get(name, 0) for part in parts)) for name, size in whole.items()))


def _fx_origins(node: Any) -> Sequence[Any]:
    """The FX nodes behind a scheduler node; of a library call the one operator that it is."""
    if node.node is None:
        return ()
    exact = getattr(node.node, "origin_node", None) if node.is_extern() else None
    return [exact] if exact is not None else list(node.node.get_origins())


def _origins(node: Any, aten: Graph) -> Iterable[str]:
    """Names in the ATen graph: a node that a pass has made leads to those it was made from."""
    for origin in _fx_origins(node):
        if origin.name in aten.nodes:
            yield origin.name
            continue
        found = [name for name in ancestry(origin) if name in aten.nodes]
        frames = user_frames(origin.meta.get("stack_trace"))
        yield from found or [name for name, one in aten.nodes.items() if frames and one.frames == frames]


def _kind(members: Sequence[Any]) -> str:
    if any(one.is_extern() for one in members):
        return "library call"
    if any(one.is_template() for one in members):
        return "template"
    if all(type(one).__name__ == "NopKernelSchedulerNode" for one in members):
        return "no kernel"
    return "reduction" if any(one.is_reduction() for one in members) else "pointwise"


def _text(node: Any) -> list[str]:
    """A loop nest with its indices written out, or the call of a library."""
    body = getattr(node, "_body", None)
    outputs = ", ".join(f"{b.get_name()}: {_layout(b)}" for b in node.get_outputs())
    if body is None:
        reads = ", ".join(sorted(dep.name for dep in node.read_writes.reads))
        call = getattr(node.node, "python_kernel_name", None) or getattr(node.node, "op_overload", None)
        return [f"{node.get_name()}: {call or type(node.node).__name__}({reads}) -> {outputs}"]
    ranges, index, code = [], {}, []
    for line in body.debug_str().splitlines():
        part = line.strip()
        if part.startswith("var_ranges = "):
            ranges.append(part.removeprefix("var_ranges = ").strip("{}"))
        elif re.match(r"index\d+ = ", part):
            name, _, expression = part.partition(" = ")
            index[name] = expression
        elif part and not part.startswith(("class ", "def body", "return ")):
            code.append(part)
    head = f"{node.get_name()}: for {', '.join(ranges) or 'one element'} -> {outputs}"
    return [head, *("    " + line for line in _inlined(code, index))]


def _inlined(code: list[str], index: dict[str, str]) -> Iterator[str]:
    """``ops.load('x', get_index_1)`` with the index itself."""
    named: dict[str, str] = {}
    for line in code:
        found = re.match(r"(\w+) = self\.get_index\('(\w+)'\)$", line)
        if found:
            named[found[1]] = index.get(found[2], found[2])
        else:
            yield re.sub(r"\bget_index(?:_\d+)?\b", lambda m: named.get(m[0], m[0]), line)


def _layout(buffer: Any) -> str:
    try:
        return f"{short_dtype(buffer.node.get_dtype())}{[int(size) for size in buffer.node.get_size()]}"
    except (AttributeError, NotImplementedError, TypeError):
        return "several" if "MultiOutput" in type(getattr(buffer.node, "layout", None)).__name__ else "?"


def _flops(node: Any) -> int | None:
    """Arithmetic of the loop body times its range; a library call's formula; None when neither is known."""
    body = getattr(node, "_body", None)
    if body is None:
        return _library_flops(node)
    elements = 1
    for size in (*node.get_ranges()[0], *node.get_ranges()[1]):
        elements *= int(size)
    return elements * sum(_body_flops(block.graph) for block in (body.root_block, *body.subblocks.values()))


def _body_flops(graph: Any) -> int:
    """Operations of one pass; the same value written twice counts once, as the code generator shares it."""
    value: dict[Any, Any] = {}
    seen: set[str] = set()
    total = 0
    for node in graph.nodes:
        key = repr((node.op, node.target, torch.fx.map_arg((node.args, node.kwargs), lambda one: value[one])))
        value[node] = key if node.op != "placeholder" else node.name
        if key not in seen:
            seen.add(key)
            total += _operation(node)
    return total


def _operation(node: Any) -> int:
    if node.op != "call_method":
        return 0
    if node.target == "reduction":
        return REDUCTION_FLOPS.get(node.args[3] if len(node.args) > 3 else "", 1)
    return int(node.target in ARITHMETIC)


def _library_flops(node: Any) -> int | None:
    from torch.utils import flop_counter

    if not node.is_extern() or type(node.node).__name__ == "MultiOutput":
        return 0
    fx = next(iter(_fx_origins(node)), None)
    if fx is None:
        return None
    values, keywords = torch.fx.map_arg((fx.args, fx.kwargs), lambda one: one.meta.get("val"))
    target = fx.target
    packet = getattr(target, "overloadpacket", target)
    if str(packet) == "aten._scaled_dot_product_flash_attention_for_cpu":
        count: Any = flop_counter.sdpa_flop_count
        return int(count(*(one.shape for one in values[:3])))
    if str(packet) == "aten._scaled_dot_product_flash_attention_for_cpu_backward":
        count = flop_counter.sdpa_backward_flop_count
        return int(count(*(one.shape for one in values[:4])))
    formula = flop_counter.flop_registry.get(packet)
    if formula is None:
        return 0 if _moves_only(target) else None
    return int(formula(*values, **keywords, out_val=fx.meta.get("val")))


def _moves_only(target: Any) -> bool:
    name = str(target).removeprefix("aten.").partition(".")[0]
    return name in {"copy", "copy_", "embedding", "index", "clone", "cat", "constant_pad_nd", "index_put", "_to_copy"}


def _matmul(node: Any) -> str | None:
    """The dtype of a matrix product's operands, as the tables of ceilings name it; None when it is none."""
    if not (node.is_extern() or node.is_template()) or not _library_flops(node):
        return None
    value = next(iter(_fx_origins(node))).meta.get("val")
    value = value[0] if isinstance(value, (tuple, list)) else value
    names: dict[Any, str] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}
    return names.get(getattr(value, "dtype", None), "fp32")
