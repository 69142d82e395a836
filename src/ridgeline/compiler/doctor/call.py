"""``python -m ridgeline.compiler.doctor.call module:function ARGUMENTS...``: what ``ridgeline doctor module:function`` runs.

The function is called once with the arguments as texts; what it returns is ignored.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ridgeline.errors import nearest


def main() -> None:
    """Import, call. A name that is not there ends the process with one line and code 2."""
    name, *arguments = sys.argv[1:]
    module_name, _, attribute = name.partition(":")
    sys.argv = [module_name, *arguments]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    value: Any = None
    try:
        value = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        _refuse(f"no module named '{error.name}' (looked in {os.getcwd()} and the installed packages)")
    for part in attribute.split("."):
        if not hasattr(value, part):
            _refuse(f"{module_name} has no '{part}'{nearest(part, [one for one in vars(value) if one[0] != '_'])}")
        value = getattr(value, part)
    if not callable(value):
        _refuse(f"{name} is a {type(value).__name__}, not a function")
    value(*arguments)


def _refuse(message: str) -> None:
    print(f"ridgeline-doctor-refused: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
