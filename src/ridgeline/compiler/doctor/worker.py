"""One trial: a user's program run again in a process of its own, with settings or changed sources, never edited.

::

    python -m ridgeline.compiler.doctor.worker     reads the path of a specification per line, forks for each, answers
      fork: settings, sources in the place of files, observer --> the program --> proof of captured calls --> result.json

A fork of a process that has torch loaded starts in milliseconds. With CUDA each trial is a new process instead.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01
TIMED_OUT = 124
PRELOADED = (
    "torch._dynamo.backends.debugging",
    "torch._functorch._aot_autograd.autograd_cache",
    "torch._inductor.compile_fx",
    "torch._inductor.lowering",
    "networkx",
)
"""What the first compilation of a process imports, whatever its backend: most of a second, and none of the program's."""


class _Loader(SourceFileLoader):
    """Loads a module from another text than its file holds; nothing is cached on disk."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str) -> Any:
        """Compiled anew, under the file's own name."""
        return compile(self._text, self.path, "exec", dont_inherit=True)


class Substitute:
    """A finder that gives changed sources to imports. Line numbers and stacks then speak of the changed text."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = {os.path.realpath(path): text for path, text in sources.items()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The usual specification with our loader where the file is one of ours."""
        found = PathFinder.find_spec(name, path, target)
        text = self.sources.get(os.path.realpath(found.origin)) if found is not None and found.origin else None
        if found is None or text is None or found.origin is None:
            return None
        found.loader = _Loader(name, found.origin, text)
        return found

    def install(self) -> None:
        """For this process, from now on."""
        import linecache

        sys.meta_path.insert(0, self)
        for path, text in self.sources.items():  # tracebacks, inspect and the observer read lines from here
            linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)


def run_program(spec: dict[str, Any], substitute: Substitute) -> None:
    """The user's script as ``__main__``, or their ``module:function``; what it raises is the caller's."""
    os.chdir(spec["folder"])
    if spec["callable"]:
        sys.path[0] = spec["folder"]
        module, _, name = spec["callable"].partition(":")
        sys.argv = [module, *spec["arguments"]]
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
        value(*spec["arguments"])
        return
    script = os.path.abspath(os.path.join(spec["folder"], spec["script"]))
    sys.argv = [spec["script"], *spec["arguments"]]
    sys.path[0] = os.path.dirname(os.path.realpath(script))
    text = substitute.sources.get(os.path.realpath(script))
    if text is None:
        runpy.run_path(script, run_name="__main__")
        return
    main = type(sys)("__main__")
    main.__file__, main.__builtins__ = script, __builtins__  # type: ignore[attr-defined]
    sys.modules["__main__"] = main
    exec(compile(text, script, "exec", dont_inherit=True), vars(main))


def run_trial(spec: dict[str, Any]) -> dict[str, Any]:
    """Everything of one trial, in this process: the observation, seconds, and what the proof found."""
    import torch

    from ridgeline.compiler.doctor.capture import Capture
    from ridgeline.compiler.doctor.settings import applied

    substitute = Substitute(spec["sources"])
    substitute.install()
    torch.manual_seed(0)
    random.seed(0)
    capture = Capture(spec["capture"], trace=spec["trace"])
    with applied(spec["settings"], on_region=capture.on_region):
        with capture, _compile_paths(spec):
            failure = _ended(run_program, spec, substitute)
        seconds = time.perf_counter() - capture.first_call if capture.first_call else 0.0
        observation = capture.observation()
        result = {"observation": observation.to_dict(), "seconds": seconds, "failure": failure}
        if spec["capture"] is not None and not failure:
            result["proof"] = capture.prove(spec["reference"], spec["save"])
    return result


@contextlib.contextmanager
def _compile_paths(spec: dict[str, Any]) -> Iterator[None]:
    if spec["compile_paths"]:
        from ridgeline.compiler.doctor.paths import CompilePaths

        CompilePaths(list(spec["compile_paths"]), spec["backend"]).install()
    yield


def _ended(run: Callable[..., None], *given: Any) -> str:
    """How the program and its threads ended: "" when well, else one line."""
    try:
        run(*given)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            return f"exit code {leaving.code}"
    except BaseException as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0][:200]}"
    return ""


def _child(path: str) -> int:
    """A trial in this process, its output in the log beside the specification; the exit code."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    folder, owner = Path(path).parent, os.getpid()
    with open(folder / "log.txt", "wb", buffering=0) as log, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        result = run_trial(spec)
    except Exception as error:
        traceback.print_exc()
        result = {"failure": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
    if os.getpid() != owner:  # the program has forked, and this is its child
        os._exit(0)
    temporary = folder / ".result.json"
    temporary.write_text(json.dumps(result, default=str), encoding="utf-8")
    os.replace(temporary, folder / "result.json")
    return 0


def _forked(path: str, seconds: float) -> int:
    """The child's exit code; it and all it started are ended when it takes longer than ``seconds``."""
    parent = os.getppid()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = 1
        try:
            code = _child(path)
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code)

    def leave(number: int, frame: Any) -> None:
        _end(child)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline or os.getppid() != parent:  # late, or nobody waits any more
            _end(child)
            os.waitpid(child, 0)
            return TIMED_OUT
        time.sleep(POLL_SECONDS)
    _end(child)  # what it left running
    return os.waitstatus_to_exitcode(status)


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _spawned(path: str, seconds: float) -> int:
    command = [sys.executable, "-m", "ridgeline.compiler.doctor.worker", path]
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process.pid)
        process.wait()
        return TIMED_OUT


def main() -> None:
    """One trial when a path is given; else a trial for each line of standard input, until it ends."""
    if len(sys.argv) > 1:
        raise SystemExit(_child(sys.argv[1]))
    import torch

    run = _spawned if torch.version.cuda is not None else _forked
    preload = [name for name in os.environ.pop("RIDGELINE_DOCTOR_PRELOAD", "").split(",") if name]
    for name in ("ridgeline.compiler.doctor.capture", "ridgeline.compiler.doctor.settings", *PRELOADED, *preload):
        with contextlib.suppress(ImportError):  # only time is lost
            if run is _forked:
                importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        code = run(request["spec"], request["seconds"])
        print(json.dumps({"code": code}), flush=True)


if __name__ == "__main__":
    main()
