"""Source text with its syntax tree: nodes know their bytes, so that an edit touches only what it means to change.

::

    source = Source(text)
    source.edited([Edit(*source.span(node), "torch.where(...)")])   # every other byte stays: comments, spacing, names
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef
SUITES = ("body", "orelse", "finalbody", "handlers")


class Refused(Exception):
    """The rewrite cannot be shown to keep the meaning; the message says why, in one line."""


@dataclass(frozen=True)
class Edit:
    """Bytes ``start`` to ``end`` of the source become ``text``."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Rewrite:
    """A changed source file. ``note`` says what differs for people, such as text that appears later; "" if nothing."""

    name: str
    source: str
    note: str = ""


class Source:
    """Text of one file, its tree, the parent of every node and the bytes of each.

    Raises:
        Refused: the text is not Python.
    """

    def __init__(self, text: str) -> None:
        self.text, self._bytes = text, text.encode("utf-8")
        try:
            self.tree = ast.parse(text)
        except SyntaxError as error:
            raise Refused(f"line {error.lineno}: {error.msg}") from None
        self._starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._parents = {id(child): node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def parent(self, node: ast.AST) -> ast.AST | None:
        """What contains the node; None for the module."""
        return self._parents.get(id(node))

    def parents(self, node: ast.AST) -> Iterator[ast.AST]:
        """What contains the node, innermost first."""
        above = self.parent(node)
        while above is not None:
            yield above
            above = self.parent(above)

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First byte and the byte after the last one; a decorated function begins at its first decorator."""
        line, column = node.lineno, node.col_offset
        decorators = getattr(node, "decorator_list", ())
        if decorators:
            line = decorators[0].lineno
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._starts[line - 1] + column, self._starts[node.end_lineno - 1] + node.end_col_offset

    def segment(self, node: ast.expr | ast.stmt) -> str:
        """The node as it is written."""
        start, end = self.span(node)
        return self._bytes[start:end].decode("utf-8")

    def operand(self, node: ast.expr) -> str:
        """The node as it is written, in parentheses unless it binds tightest anyway."""
        text = self.segment(node)
        tight = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant)
        return text if isinstance(node, tight) else f"({text})"

    def indent(self, node: ast.stmt) -> str:
        """White space before a statement, on its own line."""
        line = self._bytes[self._starts[node.lineno - 1] :].split(b"\n", 1)[0].decode("utf-8")
        return line[: len(line) - len(line.lstrip())]

    def alone(self, node: ast.stmt) -> bool:
        """Whether no other statement shares the node's lines (``a = 1; b = 2``, ``if x: y = 1``)."""
        start, end = self.span(node)
        before = self._bytes[self._starts[self._bytes.count(b"\n", 0, start)] : start]
        after = self._bytes[end:].split(b"\n", 1)[0].strip()
        return not before.strip() and (not after or after.startswith(b"#"))

    def statement_at(self, line: int) -> ast.stmt | None:
        """The innermost statement whose lines include ``line``."""
        found = None
        for node in ast.walk(self.tree):  # breadth first: what is found later lies deeper
            if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno):
                found = node
        return found

    def function_of(self, node: ast.AST) -> Function | None:
        """The function whose body holds the node."""
        return next((one for one in self.parents(node) if isinstance(one, Function)), None)

    def suite_of(self, node: ast.stmt) -> list[ast.stmt]:
        """The statements among which the node stands."""
        above = self.parent(node)
        for name in SUITES:
            suite = getattr(above, name, None)
            if isinstance(suite, list) and any(one is node for one in suite):
                return suite
        raise Refused("the statement has no suite of its own")

    def following(self, node: ast.stmt) -> list[ast.stmt]:
        """The statements after the node, in its own suite."""
        suite = self.suite_of(node)
        return suite[next(at for at, one in enumerate(suite) if one is node) + 1 :]

    def preceding(self, node: ast.stmt) -> list[ast.stmt]:
        """The statements before the node, in its own suite."""
        suite = self.suite_of(node)
        return suite[: next(at for at, one in enumerate(suite) if one is node)]

    def edited(self, edits: Iterable[Edit]) -> str:
        """The text with all edits made; they must not overlap."""
        out, end = self._bytes, len(self._bytes)
        for edit in sorted(edits, key=lambda one: -one.start):
            assert edit.start <= edit.end <= end, "edits overlap"
            out = out[: edit.start] + edit.text.encode("utf-8") + out[edit.end :]
            end = edit.start
        return out.decode("utf-8")

    def torch_name(self) -> str:
        """What the file calls torch.

        Raises:
            Refused: it does not import torch at its top.
        """
        for node in self.tree.body:
            if isinstance(node, ast.Import):
                for one in node.names:
                    if one.name == "torch":
                        return one.asname or "torch"
                    if one.name.startswith("torch.") and one.asname is None:
                        return "torch"
        raise Refused("the file does not import torch at its top")


def names_read(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that any of the nodes loads."""
    return {
        one.id
        for node in nodes
        for one in ast.walk(node)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)
    }


def names_bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that any of the nodes assigns, imports, defines or deletes."""
    out: set[str] = set()
    for node in nodes:
        for one in ast.walk(node):
            if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load):
                out.add(one.id)
            elif isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                out.add(one.name)
            elif isinstance(one, ast.alias):
                out.add((one.asname or one.name).split(".")[0])
            elif isinstance(one, ast.ExceptHandler) and one.name:
                out.add(one.name)
    return out


def argument_names(function: Function) -> list[str]:
    """Names of all parameters, ``*args`` and ``**kwargs`` included."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one.arg for one in every if one is not None]


def fresh_name(wanted: str, taken: set[str]) -> str:
    """``wanted``, or with a number where that is taken; the answer is added to ``taken``."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    taken.add(name)
    return name


def unified_diff(before: str, after: str, path: str) -> str:
    """A unified diff that ``patch -p1`` takes; "" when nothing differs."""
    lines = difflib.unified_diff(_lines(before), _lines(after), f"a/{path}", f"b/{path}", n=2)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _lines(text: str) -> list[str]:
    """Lines as ``patch`` sees them: ended by a newline and nothing else."""
    return [line for line in re.split(r"(?<=\n)", text) if line]
