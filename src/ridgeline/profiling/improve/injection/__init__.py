"""The one injection module: what ``ridgeline improve`` puts into the processes of a user's job, and nothing else does.

::

    improve --starts--> python train.py       PYTHONPATH = this folder first, RIDGELINE_IMPROVE_SPEC = spec.json
                          sitecustomize       loads this package by path (it needs no ridgeline in that interpreter)
                          import torch        when the job does so, the hooks are installed
                          optimiser steps     timed, losses kept; after the last one results are written, SystemExit(0)

This package needs the standard library and torch alone, and does nothing until a job imports torch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

SPEC_VARIABLE = "RIDGELINE_IMPROVE_SPEC"


def start() -> None:
    """Wait for ``import torch``; called by ``sitecustomize`` in every interpreter of the job."""
    with open(os.environ[SPEC_VARIABLE], encoding="utf-8") as file:
        spec = json.load(file)
    sys.meta_path.insert(0, _AfterTorch(spec))


class _AfterTorch:
    """A finder that lets torch load as always and then installs the hooks."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The real specification of torch, whose loader calls :func:`install` when it is done; None for all else."""
        if name != "torch":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        found = find_spec("torch")
        if found is None or found.loader is None:
            return found
        loader: Any = found.loader
        original = loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module
            original(module)
            install(self.spec)

        loader.exec_module = exec_module
        return found


def install(spec: dict[str, Any]) -> None:
    """Put the hooks in place; torch is loaded. A failure ends the job: its last line tells why."""
    from . import hooks, recorder

    with open(os.path.join(spec["folder"], f"loaded-{os.getpid()}"), "w"):
        pass
    threading.Thread(target=_end_at, args=(spec["deadline"],), daemon=True).start()
    hooks.install(spec, recorder.Recorder(spec))


def _end_at(deadline: float) -> None:
    """A process that outlives its trial (the command that started it was killed) ends itself."""
    while time.time() < deadline:
        time.sleep(min(60.0, max(deadline - time.time(), 0.1)))
    os._exit(124)
