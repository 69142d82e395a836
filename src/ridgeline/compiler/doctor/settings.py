"""Fixes that need no edit: options of the compiler, by the trouble they cure.

::

    Tensor.item()            dynamo.capture_scalar_outputs            the number stays in the graph
    x[x > 0], nonzero        dynamo.capture_dynamic_output_shape_ops  the size stays unknown in the graph
    print, warnings.warn     dynamo.reorderable_logging_functions     text appears after the graph has run
    a break in a callee      dynamo.nested_graph_breaks               only the callee is split
    a size or number varies  compiler.dynamic_sources                 one compilation for all values
    a size is 1, then n      compiler.unbacked_sources                the same, where 1 would be taken for a constant
    a counter on a module    dynamo.allow_unspec_int_on_nn_module     the counter is no constant
    too many compilations    dynamo.recompile_limit                   the function is not given up
    compiling costs too much compile.regional                         one block is compiled, for all layers

A setting is written ``{"dynamo.capture_scalar_outputs": True}``; functions in sets are written ``"builtins.print"``.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ridgeline.compiler.doctor.breaks import code_line
from ridgeline.compiler.doctor.model import Finding
from ridgeline.errors import UserError

Setting = dict[str, Any]
FUNCTION_SETS = ("dynamo.reorderable_logging_functions",)
SOURCE_LISTS = ("compiler.dynamic_sources", "compiler.unbacked_sources")
REGIONAL = "compile.regional"
MORE_COMPILATIONS = 64
LEAST_BLOCKS = 2


@dataclass(frozen=True)
class Knob:
    """A setting to try, and what one should know who keeps it."""

    setting: Setting = field(default_factory=dict)
    catch: str = ""

    @property
    def text(self) -> str:
        """``capture_scalar_outputs=True``."""
        return ", ".join(f"{name.partition('.')[2]}={value}" for name, value in self.setting.items())


SCALARS = Knob({"dynamo.capture_scalar_outputs": True}, "a branch on the value still breaks")
SHAPES = Knob(
    {"dynamo.capture_dynamic_output_shape_ops": True, "dynamo.capture_scalar_outputs": True},
    "a branch on the size still breaks",
)
NESTED = Knob({"dynamo.nested_graph_breaks": True}, "removes only the extra split in the caller")
COUNTERS = Knob({"dynamo.allow_unspec_int_on_nn_module": True}, "a layer's sizes are no constants either")
LIMIT = Knob({"dynamo.recompile_limit": MORE_COMPILATIONS}, "every value is compiled: start-up takes longer")
REGIONS = Knob({REGIONAL: True}, "what lies between the blocks runs in eager; no _orig_mod in the state dict's keys")
RNN = Knob({"dynamo.allow_rnn": True}, "RNN, GRU and LSTM under torch.compile are experimental")
AUTOGRAD = Knob({"dynamo.trace_autograd_ops": True}, "experimental")
LATER = "text appears after the graph has run"
BY_CODE = {"GB0124": [SCALARS], "GB0036": [SHAPES], "GB0014": [RNN], "GB9186": [AUTOGRAD]}
BETWEEN = "___stack"
"""How dynamo names what a graph break hands to the code after it."""
_ROOT = re.compile(r"^([LG]\['\w+'\]|\w+)")


def knobs_for(finding: Finding) -> list[Knob]:
    """Settings worth trying on a finding, the likeliest first."""
    if finding.kind in ("graph_break", "skipped_frame"):
        return _for_break(finding)
    if finding.kind == "recompile":
        return _for_recompile(finding)
    if finding.kind == "recompile_limit":
        return [*_for_recompile(finding), LIMIT]
    if finding.kind in ("not_paid_back", "slower_than_eager"):
        return [REGIONS]
    return []


def _for_break(finding: Finding) -> list[Knob]:
    found = list(BY_CODE.get(str(finding.detail.get("gb", "")), ()))
    lines = [finding.code, *(_code(one) for one in _frames_inside(finding))]
    for name in dict.fromkeys(name for line in lines for name in [_printer(line)] if name):
        found.append(Knob({"dynamo.reorderable_logging_functions": [name]}, LATER))
    if "backward()" in finding.reason:
        found.append(AUTOGRAD)
    if len(_frames_inside(finding)) > 1:
        found.append(NESTED)
    return found


def _frames_inside(finding: Finding) -> list[str]:
    """The user's frames from the compiled function down to the break."""
    stack = [str(one) for one in finding.detail.get("stack", ())]
    entered = max((at + 1 for at, one in enumerate(stack) if "/compiler/doctor/clock.py:" in one), default=0)
    return [one for one in stack[entered:] if "/site-packages/" not in one]


def _printer(line: str) -> str:
    """The function that a line prints or logs with, "" if it does neither."""
    match = re.match(r"(print|warnings\.warn|logging\.(?:debug|info|warning|error|critical))\(", line.strip())
    return "" if match is None else "builtins.print" if match[1] == "print" else match[1]


def _code(frame: str) -> str:
    """The line of a stack entry ``file:line in f``."""
    file, _, line = frame.rpartition(" in ")[0].rpartition(":")
    return code_line(file, int(line)) if line.isdigit() else ""


def _for_recompile(finding: Finding) -> list[Knob]:
    what, source = str(finding.detail.get("what", "")), str(finding.detail.get("source", ""))
    root = _ROOT.match(source)
    if (
        root is None
        or BETWEEN in source
        or what in ("stride", "dtype", "type", "identity", "global state", "backend", "length")
    ):
        return []
    name = _named(source)
    values = {str(one) for pair in finding.detail.get("values", ()) for one in pair}
    values |= {str(finding.detail.get("old")), str(finding.detail.get("new"))}
    if what == "value" and "." in source and "[" not in source:
        return [COUNTERS, Knob({"compiler.dynamic_sources": name})]
    found = [Knob({"compiler.dynamic_sources": name}, "one graph for all values is slower than one for each")]
    if values & {"0", "1"} and what == "size":
        catch = "an if on the size becomes an error, or a break: GuardOnDataDependentSymNode"
        found.insert(0, Knob({"compiler.unbacked_sources": name}, catch))
    return found


def _named(source: str) -> str:
    """A failed guard's source as the compiler names it: ``L['x']`` of ``x.size()[0]``, ``L['n']`` of ``n``."""
    base = re.split(r"\.(?:size|stride)\(\)", source)[0]
    if re.match(r"^[LG]\[", base):
        return base
    head, rest = re.match(r"^(\w+)(.*)$", base).groups()  # type: ignore[union-attr]
    return f"L['{head}']{rest}, G['{head}']{rest}"


def merged(settings: Iterable[Mapping[str, Any]]) -> Setting:
    """All settings as one: sets and lists of sources are joined, the larger limit wins."""
    out: Setting = {}
    for name, value in (pair for one in settings for pair in one.items()):
        if name in FUNCTION_SETS:
            out[name] = list(dict.fromkeys([*out.get(name, ()), *value]))
        elif name in SOURCE_LISTS and name in out:
            out[name] = ", ".join(dict.fromkeys([*out[name].split(", "), *value.split(", ")]))
        else:
            out[name] = max(out[name], value) if name in out else value
    return out


def check(setting: Mapping[str, Any]) -> None:
    """Every name exists in this torch and holds a value of its type.

    Raises:
        UserError: one does not; the message names it and the nearest valid name.
    """
    with applied(setting):
        pass


@contextlib.contextmanager
def applied(
    setting: Mapping[str, Any], on_region: Callable[[Any, dict[str, Any]], None] | None = None
) -> Iterator[None]:
    """Within the block the settings hold, in this process; ``on_region`` as in :func:`regional`.

    Raises:
        UserError: as :func:`check`.
    """
    from ridgeline.compiler.internals.options import options

    values: dict[tuple[str, str], Any] = {}
    for name, value in setting.items():
        home, _, option = name.partition(".")
        if home not in ("dynamo", "compiler", "compile") or not option:
            raise UserError(f"setting {name}: not dynamo.NAME, compiler.NAME or {REGIONAL}")
        if home == "compile":
            if name != REGIONAL or not isinstance(value, bool):
                raise UserError(f"setting {name} = {value!r}: the one setting of [compile] is regional = true")
            continue
        values[home, option] = {_function(one) for one in value} if name in FUNCTION_SETS else value
    with options(values), regional(on_region) if setting.get(REGIONAL) else contextlib.nullcontext():
        yield


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "builtins"), attribute)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"'{name}' is no function: write module.function, such as builtins.print") from None
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def regional(on_region: Callable[[Any, dict[str, Any]], None] | None = None) -> Iterator[None]:
    """Within the block ``torch.compile(model)`` and ``model.compile()`` compile the repeated blocks, each by itself.

    A model without repeated blocks is compiled as always. ``on_region`` is told of each other one, with the options.
    """
    import torch

    whole, in_place = torch.compile, torch.nn.Module.compile

    def blocks_of(model: Any, given: dict[str, Any]) -> list[Any]:
        blocks = repeated_blocks(model) if isinstance(model, torch.nn.Module) else []
        for block in blocks:
            in_place(block, **given)
        if blocks and on_region is not None:
            on_region(model, given)
        return blocks

    def compile_model(model: Any = None, **given: Any) -> Any:
        if model is None:
            return lambda one: compile_model(one, **given)
        return model if blocks_of(model, given) else whole(model, **given)

    def compile_in_place(self: Any, *args: Any, **given: Any) -> None:
        if not blocks_of(self, given):
            in_place(self, *args, **given)

    torch.compile = compile_model
    torch.nn.Module.compile = compile_in_place  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.compile, torch.nn.Module.compile = whole, in_place  # type: ignore[method-assign]


def repeated_blocks(model: Any) -> list[Any]:
    """The children of the container in which one class is repeated with the most parameters; [] if there is none."""
    import torch

    best: list[Any] = []
    most = 0
    for container in model.modules():
        if not isinstance(container, (torch.nn.ModuleList, torch.nn.Sequential)):
            continue
        kinds = Counter(type(child) for child in container.children()).most_common(1)
        kind, count = kinds[0] if kinds else (None, 0)
        blocks = [child for child in container.children() if type(child) is kind]
        size = sum(parameter.numel() for block in blocks for parameter in block.parameters())
        if count >= LEAST_BLOCKS and size > most:
            best, most = blocks, size
    return best
