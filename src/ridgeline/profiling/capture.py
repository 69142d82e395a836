"""Record steps of any training loop with torch.profiler, one compressed trace file per rank.

::

    with StepProfiler(ProfileSpec(), folder, rank=rank, world=world) as profiler:
        for batch in batches:
            ...                     # one step
            profiler.step()

With ``ProfileSpec(flow=True)`` torch's execution trace of the same steps lies beside it, in ``execution/``: it tells which
operator wrote and which read each tensor (:mod:`ridgeline.profiling.analyses.dataflow`).

Of the steps, the first ``wait`` run untraced (all but the very first are timed, so that the report can say what
tracing itself costs), ``warmup`` run traced and are thrown away, ``active`` are kept. The rest run untraced.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ridgeline.errors import JobError, UserError

EXECUTION = "execution"
"""Folder of the ranks' execution traces, beside their traces."""
GZIP_LEVEL = 3  # a third of the default's time for a tenth more bytes


@dataclass(frozen=True)
class ProfileSpec:
    """Which steps to record, and in what detail. ``flow`` records data flow: an execution trace, and memory events.

    Raises:
        UserError: a negative count, or no step to record.
    """

    wait: int = 4
    warmup: int = 1
    active: int = 3
    with_stack: bool = False
    record_shapes: bool = True
    flow: bool = False

    def __post_init__(self) -> None:
        for name in ("wait", "warmup"):
            if getattr(self, name) < 0:
                raise UserError(f"profile: {name} must be at least 0, got {getattr(self, name)}")
        if self.active < 1:
            raise UserError(f"profile: steps must be at least 1, got {self.active}")

    @property
    def total_steps(self) -> int:
        """Steps the loop must run for a whole capture."""
        return self.wait + self.warmup + self.active


class StepProfiler:
    """Context manager around a training loop; call :meth:`step` at the end of every step.

    Writes ``folder/rank{rank}.json.gz`` atomically when the last active step ends. A loop that ends inside the
    active steps leaves what was recorded; the reader reports the missing steps.

    Args:
        spec: which steps.
        folder: where the traces of all ranks go; made when absent.
        rank, world: this process and how many there are.
        fingerprint: of the configuration, kept in the trace.

    Raises:
        JobError: the trace cannot be written, or the loop ended before the first recorded step.
    """

    def __init__(
        self, spec: ProfileSpec, folder: str | Path, rank: int = 0, *, world: int = 1, fingerprint: str | None = None
    ) -> None:
        self.spec = spec
        self.path = Path(folder) / f"rank{rank}.json.gz"
        self.execution_path = Path(folder) / EXECUTION / self.path.name
        self.rank = rank
        self.world = world
        self.fingerprint = fingerprint
        self._profiler: Any = None
        self._observer: Any = None
        self._steps = 0
        self._begun = 0.0
        self._untraced: list[float] = []
        self._discard = False

    @property
    def done(self) -> bool:
        """Whether the trace has been written."""
        return self._steps >= self.spec.total_steps and self.path.is_file()

    def __enter__(self) -> StepProfiler:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for stale in (self.path, self.execution_path):  # must not pass for this capture
            stale.unlink(missing_ok=True)
        with without_noise():
            self._observer = _observe(self.execution_path) if self.spec.flow else None
            self._profiler = _make_profiler(self.spec, self._write, self._observer)
            self._describe()
            self._profiler.start()
        self._begun = time.perf_counter()
        return self

    def step(self) -> None:
        """Mark the end of one training step."""
        if self._profiler is None:
            return
        self._steps += 1
        spec = self.spec
        edge = self._steps in (1, spec.wait, spec.wait + spec.warmup, spec.total_steps)
        if edge:
            _synchronize()  # here only: work in flight belongs to the steps that issued it
        if 1 < self._steps <= spec.wait:
            self._untraced.append(time.perf_counter() - self._begun)
        self._describe()
        with without_noise() if edge else contextlib.nullcontext():
            self._profiler.step()
            if self._steps >= spec.total_steps:
                self._stop()
        self._begun = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorded = self._steps - self.spec.wait - self.spec.warmup
        self._discard = kind is not None or recorded < 1
        if self._profiler is not None and not self._discard:
            # What the profiler counts as one more step is only the way from the last step() to here.
            self._profiler.add_metadata_json("ridgeline_recorded", str(recorded))
        with without_noise():
            self._stop()
        if kind is None and not self.path.is_file():
            needed = self.spec.wait + self.spec.warmup + 1
            raise JobError(
                f"profile: the loop ended after {self._steps} steps and the first recorded one is number {needed}; "
                f"run at least {self.spec.total_steps}"
            )

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        try:
            profiler.stop()
        finally:
            self._keep_execution()

    def _keep_execution(self) -> None:
        """End the execution trace and keep it where the trace itself was kept."""
        observer, self._observer = self._observer, None
        if observer is None:
            return
        observer.cleanup()
        plain = Path(observer.get_output_file_path())
        try:
            if self.path.is_file():
                _pack(plain, self.execution_path)
        finally:
            plain.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's may lie there
                self.execution_path.parent.rmdir()

    def _describe(self) -> None:
        """What the reader should know; only what is set when recording starts reaches the file."""
        block = {
            "rank": self.rank,
            "world": self.world,
            "wait": self.spec.wait,
            "warmup": self.spec.warmup,
            "active": self.spec.active,
            "config_fingerprint": self.fingerprint,
            "untraced_step_seconds": [round(seconds, 9) for seconds in self._untraced],
        }
        self._profiler.preset_metadata_json("ridgeline", json.dumps(block))

    def _write(self, profiler: Any) -> None:
        if self._discard:
            return
        plain = self.path.with_name(f".{self.path.name}.{os.getpid()}.json")
        try:
            profiler.export_chrome_trace(str(plain))
            _pack(plain, self.path)
        finally:
            plain.unlink(missing_ok=True)


def _pack(plain: Path, path: Path) -> None:
    """``plain`` compressed as ``path``, under a temporary name first.

    Raises:
        JobError: the disk refused.
    """
    packed = path.with_name(f".{path.name}.{os.getpid()}.gz")
    try:
        _compress(plain, packed)
        os.replace(packed, path)
    except OSError as error:
        raise JobError(f"profile: cannot write {path}: {error.strerror or error}") from None
    finally:
        packed.unlink(missing_ok=True)


def _observe(path: Path) -> Any:
    """torch's observer of the execution, writing beside ``path`` under a hidden name.

    Raises:
        JobError: the process has one already; torch allows one.
    """
    from torch.profiler import ExecutionTraceObserver

    path.parent.mkdir(exist_ok=True)
    plain = path.with_name(f".{path.name}.{os.getpid()}.json")
    observer = ExecutionTraceObserver().register_callback(str(plain))
    if not plain.is_file():  # torch says it took ours also when it kept the other
        observer._registered = False  # or it would end the other one when it is collected
        raise JobError("profile: another ExecutionTraceObserver is registered in this process, and torch allows one")
    return observer


def _make_profiler(spec: ProfileSpec, on_trace_ready: Any, observer: Any = None) -> Any:
    import torch
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # Since torch 2.13: leave out the Python event objects, which nobody here reads and which make stopping slow.
    config = (
        _ExperimentalConfig(trace_only=True) if "trace_only" in (_ExperimentalConfig.__init__.__doc__ or "") else None
    )
    return profile(
        activities=activities,
        schedule=schedule(wait=spec.wait, warmup=spec.warmup, active=spec.active, repeat=1),
        on_trace_ready=on_trace_ready,
        record_shapes=spec.record_shapes,
        with_stack=spec.with_stack,
        profile_memory=spec.flow,
        execution_trace_observer=observer,
        experimental_config=config,
    )


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _compress(plain: Path, packed: Path) -> None:
    """gzip ``plain`` to ``packed`` and flush it to the disk; a trace the profiler cut short is refused."""
    with open(plain, "rb") as source:
        source.seek(max(plain.stat().st_size - 16, 0))
        if not source.read().rstrip().endswith(b"}"):
            raise OSError("the profiler wrote a truncated trace (is the disk full?)")
        source.seek(0)
        with open(packed, "wb") as sink:
            with gzip.GzipFile(filename="", mode="wb", fileobj=sink, compresslevel=GZIP_LEVEL) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())


NOISE = re.compile(rb"USDT:|.*(kineto_shim|execution_trace_observer)\.cpp")


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """Keep what the profiler's C++ prints, past Python, off both streams; what is not its noise goes to stderr after.

    stdout belongs to the caller's result (``--json``), so nothing printed meanwhile may reach it.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with tempfile.TemporaryFile() as sink, contextlib.ExitStack() as undo:
        for descriptor in (1, 2):
            try:
                saved = os.dup(descriptor)
            except OSError:  # closed
                continue
            undo.callback(os.close, saved)
            undo.callback(os.dup2, saved, descriptor)
            os.dup2(sink.fileno(), descriptor)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            undo.close()
            sink.seek(0)
            for line in sink.read().splitlines(keepends=True):
                if not NOISE.match(line):
                    os.write(2, line)
