"""Prints, log lines and a final ``.item()`` moved out of a compiled function, into a wrapper of the same name.

::

    @torch.compile                       @torch.compile
    def step(x):                         def _step_graph(x):
        y = f(x)                             y = f(x)
        print("mean", y.mean())   -->        shown = y.mean()
        return y                             return y, shown


                                         def step(x):
                                             result, shown = _step_graph(x)
                                             print("mean", shown)
                                             return result

What is printed is computed where it was; the text appears after the function instead of within it.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

from ridgeline.compiler.doctor.rewrites.facts import attribute_root, called, check_not_mutated, check_pure
from ridgeline.compiler.doctor.rewrites.text import (
    Edit,
    Refused,
    Rewrite,
    Source,
    argument_names,
    fresh_name,
    names_bound,
    names_read,
)

LOG_METHODS = frozenset(("debug", "info", "warning", "error", "critical", "exception"))
LOG_ROOTS = frozenset(("logging", "logger", "log", "LOG", "LOGGER", "_logger", "_log", "warnings"))
LATER = "the text appears after the function has returned, and not at all if it raises"


def is_printing(node: ast.stmt) -> bool:
    """``print(...)``, ``logger.info(...)``, ``warnings.warn(...)`` as a statement."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    call = node.value
    if isinstance(call.func, ast.Name):
        return call.func.id == "print"
    known = called(call) in LOG_METHODS | {"warn"}
    return known and isinstance(call.func, ast.Attribute) and attribute_root(call.func) in LOG_ROOTS


@dataclass(frozen=True)
class Entry:
    """A compiled function: a decorated one, or one that a later ``name = torch.compile(function)`` compiles."""

    function: ast.FunctionDef
    assignment: ast.Assign | None
    name: str


def rewrite_printing(source: Source, statement: ast.stmt) -> Rewrite:
    """Every print and log line of the compiled function that holds ``statement``, moved to a wrapper.

    Raises:
        Refused: the function is not the compiled one itself, or the lines do not stand plainly in it.
    """
    function = source.function_of(statement)
    if not isinstance(function, ast.FunctionDef):
        raise Refused("not in a plain function")
    entry = _entry(source, function)
    lines = [one for one in function.body if is_printing(one)]
    if not any(one is statement for one in lines):
        raise Refused("the line stands in a branch or a loop: when it runs is decided inside")
    if sum(is_printing(one) for one in ast.walk(function) if isinstance(one, ast.stmt)) != len(lines):
        raise Refused("another line that prints stands in a branch or a loop: their order would change")
    return _outlined(source, entry, lines, "prints moved out of the compiled function", LATER)


def rewrite_returned_item(source: Source, statement: ast.Return) -> Rewrite:
    """``return t.item()`` of a compiled function: the tensor is returned, the wrapper takes the number.

    Raises:
        Refused: as :func:`rewrite_printing`.
    """
    function = source.function_of(statement)
    if not isinstance(function, ast.FunctionDef):
        raise Refused("not in a plain function")
    if any(is_printing(one) for one in ast.walk(function) if isinstance(one, ast.stmt)):
        raise Refused("the function prints too: those lines come first")
    return _outlined(source, _entry(source, function), [], ".item() moved out of the compiled function", "")


def _entry(source: Source, function: ast.FunctionDef) -> Entry:
    """How the function is compiled.

    Raises:
        Refused: it is a method, has other decorators, or is called under its own name inside or uncompiled.
    """
    if isinstance(source.parent(function), ast.ClassDef):
        raise Refused("the compiled region is the whole module: its forward cannot print outside of itself")
    if source.parent(function) is not source.tree:
        raise Refused(f"{function.name} does not stand at the top of the file")
    if function.name in names_read(function.body):
        raise Refused(f"{function.name} uses its own name")
    if len(function.decorator_list) == 1 and _is_compile(function.decorator_list[0]):
        return Entry(function, None, function.name)
    if function.decorator_list:
        raise Refused(f"{function.name} has other decorators than torch.compile")
    reads = [one for one in ast.walk(source.tree) if isinstance(one, ast.Name) and one.id == function.name]
    loads = [one for one in reads if isinstance(one.ctx, ast.Load)]
    above = [source.parent(one) for one in loads]
    call = above[0] if len(above) == 1 else None
    made = source.parent(call) if isinstance(call, ast.Call) and _is_compile(call) else None
    if not isinstance(made, ast.Assign) or len(made.targets) != 1 or not isinstance(made.targets[0], ast.Name):
        raise Refused(f"{function.name} is not compiled by itself: it runs inside a compiled region or also in eager")
    if source.parent(made) is not source.tree:
        raise Refused(f"{function.name} is compiled in another place than it is written in")
    return Entry(function, made, made.targets[0].id)


def _is_compile(node: ast.expr) -> bool:
    target = node.func if isinstance(node, ast.Call) else node
    return isinstance(target, ast.Attribute) and target.attr == "compile" and attribute_root(target) == "torch"


def _outlined(source: Source, entry: Entry, lines: list[ast.stmt], name: str, note: str) -> Rewrite:
    function = entry.function
    end = function.body[-1]
    returns = [one for one in ast.walk(function) if isinstance(one, ast.Return)]
    nested = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.Yield, ast.YieldFrom)
    if returns != [end] or not isinstance(end, ast.Return) or end.value is None:
        raise Refused("the function does not end in its only return")
    if any(isinstance(one, nested) for one in ast.walk(function) if one is not function):
        raise Refused("the function has a function inside or yields")
    taken = names_read([source.tree]) | names_bound([source.tree]) | set(argument_names(function))
    graph, result = fresh_name(f"_{entry.name}_graph", taken), fresh_name("result", taken)
    moved = _Moved(source, taken, set(argument_names(function)) - names_bound(function.body))
    edits = [moved.line(one) for one in lines]
    for one in lines:
        check_not_mutated(function, names_read([one]), one.lineno)
    returned, answer = moved.returned(end.value, result)
    shown = "".join(f", {one}" for one in moved.shown)
    # A tuple of its own would be flattened by the wrapper's unpacking: it stays one element.
    inner = (
        f"({returned})"
        if isinstance(end.value, ast.Tuple) and moved.shown and not returned.startswith("(")
        else returned
    )
    edits.append(Edit(*source.span(end.value), f"{inner}{shown}"))
    start = source.span(function)[0]
    edits.append(_renamed(source, entry, graph))
    if entry.assignment is not None:
        edits.append(Edit(*source.span(entry.assignment.targets[0]), graph))
    indent = source.indent(function)
    after = source.span(entry.assignment or function)[1]
    gap = "\n\n\n" if not indent else "\n\n"
    edits.append(Edit(after, after, gap + _wrapper(source, entry, graph, f"{result}{shown}", moved, answer, indent)))
    assert start < after
    return Rewrite(name, source.edited(edits), note)


def _renamed(source: Source, entry: Entry, graph: str) -> Edit:
    """The function gets the graph's name; one that an assignment compiles keeps its own."""
    function = entry.function
    body = source.segment(function)
    at = body.index(f"def {function.name}", 0) + len("def ")
    start = source.span(function)[0] + len(body[:at].encode("utf-8"))
    name = function.name if entry.assignment is not None else graph
    return Edit(start, start + len(function.name.encode("utf-8")), name)


class _Moved:
    """Lines on their way out. ``known`` are arguments that still hold what the wrapper was given; all else that a line
    reads is computed in the graph and handed out under a name of ``shown``."""

    def __init__(self, source: Source, taken: set[str], known: set[str]) -> None:
        self.source, self.taken, self.known = source, taken, known
        self.shown: list[str] = []
        self.text: list[str] = []

    def line(self, statement: ast.stmt) -> Edit:
        """The edit that leaves only what the line computes; the line itself goes to ``text``.

        Raises:
            Refused: computing it has side effects.
        """
        assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
        if not self.source.alone(statement):
            raise Refused("the line is shared with another statement")
        formatted = any(isinstance(one, ast.JoinedStr) for one in ast.walk(statement))
        start = self.source.span(statement)[0]
        edits, computed, names = [], [], {}
        for value in _values(statement.value):
            check_pure([value])
            if isinstance(value, ast.Name) and value.id in self.known:
                continue
            name = fresh_name("shown", self.taken)
            self.shown.append(name)
            # Places within f-strings are wrong before Python 3.12, so that those lines are written anew.
            computed.append(f"{name} = {ast.unparse(value) if formatted else self.source.segment(value)}")
            names[id(value)] = name
            if not formatted:
                one, end = self.source.span(value)
                edits.append((one - start, end - start, name))
        text = _Renamed(names).text(statement) if formatted else _replaced(self.source.segment(statement), edits)
        self.text.append(text)
        indent = self.source.indent(statement)
        return Edit(*self.source.span(statement), f"\n{indent}".join(computed) or "pass")

    def returned(self, value: ast.expr, result: str) -> tuple[str, str]:
        """The graph's return value and the wrapper's, in which final ``.item()`` calls are taken from ``result``."""
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        items = [called(one) == "item" and isinstance(one, ast.Call) and not one.args for one in parts]
        texts = [
            self.source.segment(one.func.value) if item else self.source.segment(one)  # type: ignore[attr-defined]
            for one, item in zip(parts, items, strict=True)
        ]
        if not any(items):
            return self.source.segment(value), result
        if not isinstance(value, ast.Tuple):
            return texts[0], f"{result}.item()"
        taken = [f"{result}[{at}].item()" if item else f"{result}[{at}]" for at, item in enumerate(items)]
        return f"({', '.join(texts)})", ", ".join(taken)


def _values(call: ast.Call) -> list[ast.expr]:
    """What a line shows, without literals: arguments and the holes of f-strings; of ``t.item()`` the tensor."""
    out: list[ast.expr] = []
    for one in [*call.args, *(word.value for word in call.keywords)]:
        if isinstance(one, ast.Starred):
            raise Refused("the line spreads an argument with *")
        holes = [part.value for part in ast.walk(one) if isinstance(part, ast.FormattedValue)]
        if isinstance(one, ast.JoinedStr) or not holes:
            out += holes if isinstance(one, ast.JoinedStr) else [one]
        else:
            raise Refused("the line computes with an f-string")
    bare = [
        one.func.value
        if called(one) == "item" and isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)
        else one
        for one in out
    ]
    return [one for one in bare if not isinstance(one, ast.Constant)]


class _Renamed(ast.NodeTransformer):
    """A statement as text with some of its expressions replaced by names; the statement itself stays as it is."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    def text(self, statement: ast.stmt) -> str:
        memo: dict[int, object] = {}
        copied = copy.deepcopy(statement, memo)
        self._names = {id(memo[one]): name for one, name in self._names.items() if one in memo}
        return ast.unparse(self.visit(copied))

    def visit(self, node: ast.AST) -> ast.AST:
        name = self._names.get(id(node))
        return ast.Name(name, ast.Load()) if name is not None else super().visit(node)


def _replaced(text: str, edits: list[tuple[int, int, str]]) -> str:
    raw = text.encode("utf-8")
    for start, end, name in sorted(edits, reverse=True):
        raw = raw[:start] + name.encode("utf-8") + raw[end:]
    return raw.decode("utf-8")


def _wrapper(source: Source, entry: Entry, graph: str, unpacked: str, moved: _Moved, answer: str, indent: str) -> str:
    given = entry.function.args
    call = [one.arg for one in [*given.posonlyargs, *given.args]]
    call += [f"*{given.vararg.arg}"] if given.vararg else []
    call += [f"{one.arg}={one.arg}" for one in given.kwonlyargs]
    call += [f"**{given.kwarg.arg}"] if given.kwarg else []
    lines = [f"def {entry.name}({ast.unparse(given)}):", f"    {unpacked} = {graph}({', '.join(call)})"]
    for text in moved.text:
        lines += [f"    {one}" if at == 0 else one for at, one in enumerate(text.splitlines())]
    return "\n".join(f"{indent}{line}" for line in [*lines, f"    return {answer}"])
