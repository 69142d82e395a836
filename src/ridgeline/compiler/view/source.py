"""The Python side of a view: the functions that a compiled graph comes from, as lines of their files."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

AROUND = 2  # lines shown around a line that is in no function


@dataclass(frozen=True)
class Function:
    """Lines ``first .. last`` (from 1, both included) of ``file``; ``title`` is ``file.py: Class.name``."""

    file: str
    title: str
    first: int
    last: int

    def lines(self) -> list[str]:
        """The text, without the common indentation."""
        found = [linecache.getline(self.file, number).rstrip("\n") for number in range(self.first, self.last + 1)]
        indent = min((len(one) - len(one.lstrip()) for one in found if one.strip()), default=0)
        return [one[indent:] for one in found]


def functions(places: Iterable[tuple[str, int]]) -> list[Function]:
    """The functions around these (file, line), each once, in order of first appearance."""
    found: dict[Function, None] = {}
    known: dict[str, list[Function]] = {}
    for file, line in places:
        if file not in known:
            known[file] = _of_file(file)
        around = [one for one in known[file] if one.first <= line <= one.last]
        best = min(around, key=lambda one: one.last - one.first, default=None)
        found.setdefault(best or Function(file, Path(file).name, max(1, line - AROUND), line + AROUND))
    return list(found)


def code_of(file: str, line: int) -> str:
    """One line of a file, stripped; empty when it cannot be read."""
    return linecache.getline(file, line).strip()


def _of_file(file: str) -> list[Function]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return []
    found: list[Function] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                found.append(
                    Function(file, f"{Path(file).name}: {prefix}{child.name}", first, child.end_lineno or first)
                )
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            walk(child, f"{prefix}{child.name}." if named else prefix)  # type: ignore[attr-defined]

    walk(tree, "")
    return found
