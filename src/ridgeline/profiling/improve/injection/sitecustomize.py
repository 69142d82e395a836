"""Python imports this by itself when its folder is first on ``PYTHONPATH``: the way into a job that nobody edits.

It runs the ``sitecustomize`` it shadows, takes its folder off the path again, and starts the injection only when
the environment names a specification.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _run_shadowed() -> None:
    """The sitecustomize that would have been imported without this one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _start() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    file = os.path.join(_HERE, "__init__.py")
    spec = spec_from_file_location("ridgeline_injection", file, submodule_search_locations=[_HERE])
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {file}")
    module = module_from_spec(spec)
    sys.modules["ridgeline_injection"] = module
    spec.loader.exec_module(module)
    module.start()


sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
_run_shadowed()
if "RIDGELINE_IMPROVE_SPEC" in os.environ:
    _start()
