"""Do something as soon as a module has been imported, by whoever imports it. Standard library alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def after_import(name: str, action: Callable[[], None]) -> Callable[[], None]:
    """Call ``action`` once, when the module ``name`` is loaded; at once if it is. What is returned calls it off."""
    if name in sys.modules:
        action()
        return lambda: None
    finder = _After(name, action)
    sys.meta_path.insert(0, finder)
    return lambda: sys.meta_path.remove(finder) if finder in sys.meta_path else None


class _After:
    """A finder that lets one module load as always, and then acts."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The real specification of the module, whose loader acts when it is done; None for all others."""
        if name != self.name:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        found = find_spec(name)
        if found is None or found.loader is None:
            return found
        loader: Any = found.loader
        original = loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module
            original(module)
            self.action()

        loader.exec_module = exec_module
        return found
