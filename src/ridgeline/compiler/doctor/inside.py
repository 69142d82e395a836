"""The doctor inside the program: started when the program has imported torch, writes one file when it ends.

It needs torch and the standard library alone, and imports Dynamo only when the program does. Children made by ``fork``
write nothing; processes that import torch anew (spawned workers, ranks) each write their own file, and the session
keeps those that compiled something.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ridgeline.compiler.doctor.injection.after import after_import
from ridgeline.compiler.doctor.model import Observation
from ridgeline.compiler.internals import check_version
from ridgeline.errors import UserError

_COMPILE_WORKERS = ("torch._inductor.compile_worker", "compile_worker/__main__.py")


def start(spec_file: str) -> None:
    """Install the observer as ``spec_file`` says. A torch that is not supported is reported, and the program ends."""
    if any(word in argument for argument in sys.orig_argv for word in _COMPILE_WORKERS):
        return  # Inductor's own helpers
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    folder = Path(spec["folder"])
    threading.Thread(target=_end_at, args=(spec["deadline"],), daemon=True).start()
    try:
        check_version("the doctor")
    except UserError as error:
        _write(folder / f"refused-{os.getpid()}", str(error))
        os._exit(2)
    (folder / f"loaded-{os.getpid()}").touch()
    for name in spec["hooks"]:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(spec)
    report = _Report(folder, _compile_paths(spec))
    after_import("torch._dynamo", lambda: report.observe(spec))
    atexit.register(report.write)
    _before_exit(report)
    os.register_at_fork(after_in_child=report.forget)


def _compile_paths(spec: dict[str, Any]) -> Any:
    if not spec["compile_paths"]:
        return None
    from ridgeline.compiler.doctor.paths import CompilePaths

    paths = CompilePaths(spec["compile_paths"], spec["backend"])
    paths.install()
    return paths


class _Report:
    """Writes the observation, once, in the process that made it."""

    def __init__(self, folder: Path, paths: Any) -> None:
        self.folder, self.paths = folder, paths
        self.observer: Any = None
        self._began = time.perf_counter()
        self._done = False

    def observe(self, spec: dict[str, Any]) -> None:
        """Dynamo is loaded."""
        from ridgeline.compiler.doctor.observe import Observer

        self.observer = Observer(trace=spec["trace"], measure=spec["measure"])
        self.observer.__enter__()

    def forget(self) -> None:
        """In a forked child: its parent writes."""
        self._done = True

    def write(self) -> None:
        """``rankR-PID.json``, complete or not there at all."""
        if self._done:
            return
        self._done = True
        try:
            self._write()
        except Exception as error:  # a bug of ours: the session says so, instead of finding nothing
            _write(self.folder / f"broken-{os.getpid()}", f"{type(error).__name__}: {error}")

    def _write(self) -> None:
        observation, compiled, guards = Observation(), 0, {}
        if self.observer is not None:
            self.observer.__exit__(None, None, None)
            observation, compiled = self.observer.observation(), self.observer.entries
            guards = self.observer.guard_texts()
        observation.wall_seconds = time.perf_counter() - self._began
        observation.rank, observation.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        document = {"observation": observation.to_dict(), "compiled": compiled, "guards": guards}
        if self.paths is not None:
            document["unresolved"], document["seen_names"] = self.paths.unresolved(), self.paths.names()
        _write(self.folder / f"rank{observation.rank}-{os.getpid()}.json", json.dumps(document, default=str))


def _before_exit(report: _Report) -> None:
    """``os._exit`` skips every exit handler; programs that fork use it in the parent too."""
    original = os._exit

    def leave(status: int) -> Any:
        with contextlib.suppress(Exception):
            report.write()
        original(status)

    os._exit = leave


def _write(file: Path, text: str) -> None:
    """Beside, then renamed: a reader never sees half."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _end_at(deadline: float) -> None:
    """A program that outlives the command that started it ends itself."""
    while time.time() < deadline:
        time.sleep(min(60.0, max(deadline - time.time(), 0.1)))
    os.kill(os.getpid(), 9)
