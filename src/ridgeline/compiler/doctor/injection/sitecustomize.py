"""Python imports this by itself when its folder is first on ``PYTHONPATH``: the way into a program that nobody edits.

It takes its folder off the path, runs the ``sitecustomize`` it shadows, and, when the environment names a
specification, waits for ``import torch``: then :mod:`ridgeline.compiler.doctor.inside` takes over.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_SPEC_VARIABLE = "RIDGELINE_DOCTOR_SPEC"


def _run_shadowed() -> None:
    """The sitecustomize that would have been imported without this one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _wait_for_torch() -> None:
    """Ridgeline may not be installed in the program's interpreter: it is found last, beside this file."""
    source = os.path.abspath(os.path.join(_HERE, *[os.pardir] * 4))
    sys.path.append(source)
    try:
        from ridgeline.compiler.doctor.injection.after import after_import
    finally:
        sys.path.remove(source)
    after_import("torch", _start)


def _start() -> None:
    from ridgeline.compiler.doctor import inside

    inside.start(os.environ[_SPEC_VARIABLE])


sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
_run_shadowed()
if _SPEC_VARIABLE in os.environ:
    _wait_for_torch()
