"""The run folder: what every command leaves behind.

::

    runs/20261121-091502-train-demo-3fa9/
      run.json          id, kind, name, status, command, times, parents, error
      config.json       the resolved configuration
      environment.json  python, platform, package versions, cores
      ceilings.json     the device's limits the figures are held against
      prediction.json   what the planner said before
      metrics.jsonl     one line per step
      summary.json      headline figures
      artifacts/...     traces, plots, exported models, reports

Every file but ``metrics.jsonl`` is replaced atomically; ``metrics.jsonl`` is flushed line by line, and a
line cut off by a kill is ignored by the reader. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ridgeline.errors import SHOWN, UserError, closest, os_reason
from ridgeline.runs.owner import process_is_gone, this_command, this_process
from ridgeline.runs.reading import lines, parse, read_info

VERSIONED = ("ridgeline", "torch", "numpy", "tokenizers", "safetensors", "pyarrow", "transformers", "triton")


def runs_root(root: str | Path | None = None) -> Path:
    """The folder that holds runs: the argument, else ``$RIDGELINE_RUNS``, else ``runs``."""
    return Path(root or os.environ.get("RIDGELINE_RUNS") or "runs")


class Run:
    """One run folder. Make one with :meth:`create`, read one with :meth:`open`."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info
        self._metrics: IO[str] | None = None

    @classmethod
    def create(
        cls,
        kind: str,
        name: str = "",
        *,
        config: Mapping[str, Any] | None = None,
        parents: Sequence[str] = (),
        root: str | Path | None = None,
    ) -> Run:
        """Make a new run of ``kind`` (the verb). ``parents`` are the ids of the runs it builds on.

        Raises:
            UserError: the folder for runs is a file.
            OSError: the folder cannot be written; nothing is left behind.
        """
        now = datetime.datetime.now(datetime.UTC)
        middle = f"{kind}-{_slug(name)}" if name else kind
        run_id = f"{now:%Y%m%d-%H%M%S}-{middle}-{secrets.token_hex(2)}"
        path = _no_file(runs_root(root)) / run_id
        path.mkdir(parents=True)
        info = {
            "id": run_id,
            "kind": kind,
            "name": name,
            "status": "running",
            "command": this_command(),
            "created": now.isoformat(timespec="milliseconds"),
            "finished": None,
            "seconds": None,
            "parents": list(parents),
            "error": None,
            **this_process(),
        }
        run = cls(path, info)
        try:
            run._write_info()
            run.save_json("environment.json", environment())
            if config is not None:
                run.save_json("config.json", config)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)  # half a run would be listed for ever
            raise
        return run

    @classmethod
    def open(cls, reference: str | Path, root: str | Path | None = None) -> Run:
        """Open a run by folder, by id, by unique id prefix, or ``latest`` / ``latest:KIND``.

        Raises:
            UserError: no such run, the prefix fits several, or its run.json is damaged.
        """
        folder = Path(reference)
        if not (folder / "run.json").is_file():
            folder = _find(str(reference), runs_root(root))
        return cls(folder, read_info(folder / "run.json"))

    @property
    def id(self) -> str:
        """The folder's name."""
        return str(self.info["id"])

    @property
    def kind(self) -> str:
        """The verb that made the run."""
        return str(self.info["kind"])

    @property
    def status(self) -> str:
        """``running``, ``done``, ``failed``, ``interrupted``; ``killed`` when it says running and its process is gone."""
        status = str(self.info["status"])
        return "killed" if status == "running" and process_is_gone(self.info) else status

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``; non-finite numbers become null with a ``KEY_nonfinite`` note."""
        file = self.path / "metrics.jsonl"
        with _naming(file):
            if self._metrics is None:
                self._metrics = _open_after_whole_line(file)
            self._metrics.write(json.dumps(_finite(values)) + "\n")
            self._metrics.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of ``metrics.jsonl``, in order.

        Raises:
            UserError: a line is damaged; the message names it. (The last one, cut off by a kill, is left out.)
        """
        return list(lines(self.path / "metrics.jsonl"))

    def save_json(self, name: str, value: Any) -> Path:
        """Write ``name`` below the run atomically."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, json.dumps(value, indent=1, default=str) + "\n")
        return target

    def load_json(self, name: str) -> Any | None:
        """The content of ``name``, or None when the run has no such file.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / name
        return parse(file.read_bytes(), str(file)) if file.is_file() else None

    def summarize(self, **figures: Any) -> None:
        """Merge headline figures into ``summary.json``."""
        self.save_json("summary.json", _finite({**self.summary, **figures}))

    @property
    def summary(self) -> dict[str, Any]:
        """Headline figures."""
        return self._load_object("summary.json")

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, empty for a run without one."""
        return self._load_object("config.json")

    def artifact(self, name: str) -> Path:
        """A path below ``artifacts/`` to write to; its folder exists."""
        path = self.path / "artifacts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, status: str = "done", error: str | None = None) -> None:
        """Close the run as ``done``, ``failed`` or ``interrupted``."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # every line was flushed, so what is left here has failed before
                self._metrics.close()
            self._metrics = None
        now = datetime.datetime.now(datetime.UTC)
        created = datetime.datetime.fromisoformat(self.info["created"])
        self.info.update(
            status=status,
            error=error,
            finished=now.isoformat(timespec="milliseconds"),
            seconds=round((now - created).total_seconds(), 1),
        )
        self._write_info()

    def reopen(self) -> None:
        """Mark a finished or killed run as running again (resume)."""
        resumes = [*self.info.get("resumes", []), this_command()]
        self.info.update(status="running", error=None, finished=None, resumes=resumes, **this_process())
        self._write_info()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.info["status"] != "running":
            return
        if kind is None:
            self.finish()
            return
        with contextlib.suppress(OSError):  # a disk too full to close the run must not hide what went wrong
            if issubclass(kind, KeyboardInterrupt):
                self.finish("interrupted")
            else:
                self.finish("failed", f"{kind.__name__}: {error}".splitlines()[0][:500])

    def _load_object(self, name: str) -> dict[str, Any]:
        value = self.load_json(name)
        if not isinstance(value, dict | None):
            raise UserError(f"{self.path / name}: damaged (not an object)")
        return value or {}

    def _write_info(self) -> None:
        self.save_json("run.json", self.info)


def list_runs(root: str | Path | None = None, kind: str | None = None) -> list[Run]:
    """All readable runs below ``root``, oldest first."""
    return scan_runs(root, kind)[0]


def scan_runs(root: str | Path | None = None, kind: str | None = None) -> tuple[list[Run], list[str]]:
    """All readable runs below ``root``, oldest first, and a line for each that is damaged.

    Raises:
        UserError: ``root`` is a file.
    """
    runs, damaged = [], []
    for file in sorted(_no_file(runs_root(root)).glob("*/run.json")):
        try:
            run = Run.open(file.parent)
        except (UserError, OSError) as error:  # a folder being written or damaged does not hide the others
            damaged.append(os_reason(error) if isinstance(error, OSError) else str(error))
            continue
        if kind is None or run.kind == kind:
            runs.append(run)
    return sorted(runs, key=lambda run: (run.info["created"], run.id)), damaged


def environment() -> dict[str, Any]:
    """What a figure may depend on, readable without importing any of it."""
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": versions,
        "threads": {key: os.environ[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ},
    }


def write_atomic(target: Path, text: str) -> None:
    """Write beside ``target`` and rename, so that a reader or a crash never sees half a file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _naming(target):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong above is what the reader must learn
                temporary.unlink()
            raise


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """An OSError of the block names ``file``: a failed write has no name, and a temporary one helps nobody."""
    try:
        yield
    except OSError as error:
        error.filename = str(file)
        raise


def _no_file(root: Path) -> Path:
    """``root``, which must not be, or be below, a file."""
    for folder in (root, *root.parents):
        if folder.exists():
            if not folder.is_dir():
                raise UserError(f"folder for runs {root}: {folder} is a file, not a folder")
            break
    return root


def _open_after_whole_line(file: Path) -> IO[str]:
    """Open for append; a last line that a kill cut off is removed first."""
    if file.is_file():
        with open(file, "rb+") as stream:
            data = stream.read()
            if data and not data.endswith(b"\n"):
                stream.truncate(data.rfind(b"\n") + 1)
    return open(file, "a", encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN: replace by null and leave a note beside it."""
    if isinstance(value, Mapping):
        out: dict[str, Any] = {}
        for key, item in value.items():
            if isinstance(item, float) and not math.isfinite(item):
                out[key], out[f"{key}_nonfinite"] = None, str(item)
            else:
                out[key] = _finite(item)
        return out
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_." else "-" for c in name)[:40]


def _find(reference: str, root: Path) -> Path:
    if reference == "latest" or reference.startswith("latest:"):
        runs = list_runs(root, reference.partition(":")[2] or None)
        if not runs:
            raise UserError(f"run '{reference}': {root} holds no such run")
        return runs[-1].path
    ids = sorted(file.parent.name for file in _no_file(root).glob("*/run.json"))
    matches = [run_id for run_id in ids if run_id == reference] or [i for i in ids if i.startswith(reference)]
    if len(matches) > 1:
        raise UserError(f"run '{reference}' is ambiguous: {', '.join(matches[:4])}")
    if not matches:
        raise UserError(f"run '{reference}': not found in {root}{_suggestion(reference, ids)}")
    return root / matches[0]


def _suggestion(reference: str, ids: Sequence[str]) -> str:
    """The id that was probably meant, or the newest few: ids begin with their time."""
    match = closest(reference, ids)
    if match is not None:
        return f" (did you mean '{match}'?)"
    newest = ", ".join(reversed(ids[-SHOWN:]))
    rest = "; `ridgeline runs list` shows all" if len(ids) > SHOWN else ""
    return f" (newest: {newest}{rest})" if ids else ""
