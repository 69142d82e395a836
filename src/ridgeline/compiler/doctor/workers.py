"""The trials' processes seen from outside: one server that has torch loaded and forks a process for each trial."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ridgeline.compiler.doctor.model import Observation, Target
from ridgeline.compiler.doctor.worker import TIMED_OUT
from ridgeline.errors import JobError

SOURCE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Outcome:
    """How one trial ended. ``seconds`` reach from the first call of a compiled function to the program's end."""

    observation: Observation = field(default_factory=Observation)
    seconds: float = 0.0
    failure: str = ""
    proof: Mapping[str, Any] = field(default_factory=dict)


class Workers:
    """A context in which trials of one target can be run, one after the other, each in a process of its own.

    Args:
        target: a script or ``module:function``.
        folder: for specifications, logs and results.
        timeout: seconds that one trial may take.
        preload: modules to load before forking, such as transformers: seconds saved in every trial that uses them.
        backend: of what ``--compile`` names.
    """

    def __init__(
        self, target: Target, folder: Path, *, timeout: float, preload: Sequence[str] = (), backend: str = "inductor"
    ) -> None:
        self.target, self.folder, self.timeout, self.backend = target, folder, timeout, backend
        self._preload = ",".join(preload)
        self._count = 0
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Workers:
        path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, "-m", "ridgeline.compiler.doctor.worker"],
            env={**os.environ, "PYTHONPATH": path, "RIDGELINE_DOCTOR_PRELOAD": self._preload},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        server = self._server
        assert server is not None and server.stdin is not None
        if kind is not None:
            server.terminate()  # it ends the trial that runs
        with contextlib.suppress(BrokenPipeError):
            server.stdin.close()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if server.stdout is not None:
            server.stdout.close()

    def run(
        self,
        settings: Mapping[str, Any] | None = None,
        sources: Mapping[str, str] | None = None,
        *,
        prove: bool = False,
        timed: bool = False,
    ) -> Outcome:
        """One trial. ``prove`` repeats captured calls: the first such trial must be the unchanged program's, whose
        eager and float64 results the others are held against. ``timed`` runs leave the structured trace out.

        Raises:
            JobError: the server itself has ended.
        """
        folder = self.folder / f"trial{self._count:03}"
        self._count += 1
        folder.mkdir(parents=True)
        reference = self.folder / "reference.pt"
        known = reference.exists()
        arguments = list(self.target.command[2:] if self.target.script else self.target.command[4:])
        spec = {
            "folder": str(self.target.folder),
            "script": self.target.command[1] if self.target.script else "",
            "callable": self.target.callable,
            "arguments": arguments,
            "compile_paths": list(self.target.compile_paths),
            "backend": self.backend,
            "settings": dict(settings or {}),
            "sources": dict(sources or {}),
            "trace": not timed,
            "capture": {} if prove else None,
            "reference": str(reference) if prove and known else None,
            "save": str(reference) if prove and not known else None,
        }
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        code = self._ask(folder / "spec.json")
        return _outcome(folder, code, self.timeout)

    def _ask(self, spec: Path) -> int:
        server = self._server
        assert server is not None and server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(json.dumps({"spec": str(spec), "seconds": self.timeout}) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise JobError("the process that runs trials has ended: is there memory for a second copy of torch?")
        return int(json.loads(answer)["code"])


def _outcome(folder: Path, code: int, timeout: float) -> Outcome:
    file = folder / "result.json"
    if code == TIMED_OUT:
        return Outcome(failure=f"still running after {timeout:g} s")
    if not file.exists():
        return Outcome(
            failure=f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} before its end"
        )
    document = json.loads(file.read_text(encoding="utf-8"))
    observation = Observation.from_dict(document.get("observation", {}))
    return Outcome(observation, document.get("seconds", 0.0), document.get("failure", ""), document.get("proof", {}))


def supported(target: Target) -> str:
    """Why fixes cannot be tried on a target, "" when they can."""
    if target.distributed or not (target.script or target.callable):
        return "fixes are tried on a script or module:function, not under a launcher"
    if target.script and (len(target.command) < 2 or not target.command[1].endswith(".py")):
        return "fixes are tried on SCRIPT.py itself, not on a command that starts it"
    return ""


def python_files(target: Target, names: Sequence[str]) -> list[Path]:
    """Which of ``names`` are the user's own files: they exist, and no installed package holds them."""
    inside = [Path(sys.prefix).resolve(), Path(os.__file__).resolve().parent]
    out = []
    for name in names:
        path = Path(name).resolve()
        own = path.is_file() and path.suffix == ".py" and "site-packages" not in path.parts
        if own and not any(path.is_relative_to(one) for one in inside):
            out.append(path)
    return out
