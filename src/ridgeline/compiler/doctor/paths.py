"""``--compile model.layers.*``: compile what a program does not compile itself, without editing it.

The first name is looked up where the program uses it: in the locals and globals of the frames that call a module, at
every outermost call until all paths are found. ``*`` stands for every child. A module is compiled in place
(``nn.Module.compile``), so that names of parameters and all references stay; the call during which it is found still
runs in eager. A function is replaced by its compiled one where the name is global.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType, FunctionType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_TORCH = torch.__path__[0]
MOST_NAMES = 200


class CompilePaths:
    """Looks for ``paths`` while the program runs, and compiles what it finds with ``backend``."""

    def __init__(self, paths: list[str], backend: str) -> None:
        self._left = list(paths)
        self._backend = backend
        self._depth = 0
        self._names: set[str] = set()
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Begin to look."""
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def unresolved(self) -> list[str]:
        """Paths that were never found."""
        return list(self._left)

    def names(self) -> list[str]:
        """Names of modules and functions that were in reach, for the message."""
        return sorted(self._names)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth == 1 and self._left:
            for path in list(self._left):
                if self._compile(path):
                    self._left.remove(path)
        if not self._left:
            self._remove()

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _compile(self, path: str) -> bool:
        root, *rest = path.split(".")
        for names, is_global in self._frames():
            if root in names:
                found = list(_descend(names[root], rest))
                if isinstance(names[root], FunctionType) and not rest and is_global:
                    names[root] = torch.compile(names[root], backend=self._backend)
                    return True
                for module in found:
                    module.compile(backend=self._backend)
                return bool(found)
        return False

    def _frames(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Names in reach of the caller, innermost first."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if not frame.f_code.co_filename.startswith(_TORCH) and frame.f_globals.get("__name__") != __name__:
                for names, is_global in ((frame.f_locals, False), (frame.f_globals, True)):
                    self._note(names)
                    yield names, is_global
            frame = frame.f_back

    def _note(self, names: dict[str, Any]) -> None:
        for name, value in list(names.items()):
            if isinstance(value, (torch.nn.Module, FunctionType)) and len(self._names) < MOST_NAMES:
                self._names.add(name)


def _descend(value: Any, rest: list[str]) -> Iterator[torch.nn.Module]:
    """Modules below ``value`` that the rest of a path names."""
    if not rest:
        if isinstance(value, torch.nn.Module):
            yield value
        return
    head, *tail = rest
    if head == "*" and isinstance(value, torch.nn.Module):
        for child in value.children():
            yield from _descend(child, tail)
        return
    below = getattr(value, head, None)
    if below is not None:
        yield from _descend(below, tail)
