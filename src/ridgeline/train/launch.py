"""Start the processes of a job on this machine through torch's elastic agent, and turn its ending into one line.

The agent's rendezvous is standalone on 127.0.0.1 with a port of its own choice. Each process gets its share of the
cores as threads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ridgeline.errors import JobError, UserError
from ridgeline.train.interrupt import WATCH_PARENT
from ridgeline.train.worker import ERRORS

# How long workers may take to write a checkpoint after a signal before the agent kills them.
SHUTDOWN_SECONDS = 120


def launch(session_file: Path, procs: int) -> None:
    """Run ``procs`` workers on ``session_file`` to their end.

    Returns normally also when the workers were asked to stop and did so; the run's status tells.

    Raises:
        UserError: a worker refused its input.
        JobError: a worker failed or died; the others were ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    folder = session_file.parent
    shutil.rmtree(folder / ERRORS, ignore_errors=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=procs,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        with _environment(_variables(procs)):
            elastic_launch(config, sys.executable)("-m", "ridgeline.train.worker", str(session_file))
    except SignalException:
        _raise_reported(folder)
    except ChildFailedError as error:
        _raise_reported(folder, error)


def threads_per_process(procs: int) -> int:
    """Cores this process may use, divided; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = int(os.environ.get("OMP_NUM_THREADS") or cores)
    return max(1, min(wanted, cores // procs))


def _variables(procs: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads_per_process(procs)),
        # Workers that share the agent's store may read a dead attempt's addresses (torch 2.13): isolate it.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        WATCH_PARENT: "1",
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The agent and its workers read these from the environment; the caller's is put back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _raise_reported(folder: Path, error: Any = None) -> None:
    """Raise what the workers wrote down, the cause first: a refused input, a failed job, a killed rank, a crash.

    A rank that loses its peer fails too; a killed rank writes nothing. So a death by signal outranks the reports of
    the others, unless one of them says what was wrong.
    """
    reports = sorted((_read(file) for file in (folder / ERRORS).glob("rank*.json")), key=lambda r: r["time"])
    for kind, exception in (("UserError", UserError), ("JobError", JobError)):
        for report in reports:
            if report["kind"] == kind:
                raise exception(report["message"])
    if error is not None:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                raise JobError(f"rank {rank} was killed by {name}; continue with --resume {folder.name}")
    if reports:
        first = reports[0]
        raise JobError(f"rank {first['rank']} failed: {first['message']} (details in {folder / ERRORS})")
    if error is not None:
        rank, failure = error.get_first_failure()
        raise JobError(f"rank {rank} ended with exit code {failure.exitcode}")


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))
