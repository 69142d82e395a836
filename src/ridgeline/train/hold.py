"""A run is trained by one process at a time: two would take the same steps and prune each other's checkpoints."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ridgeline.errors import JobError

LOCK = ".lock"


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Hold the run folder until the block ends, or the process does, however it ends.

    Raises:
        JobError: another process trains it now.
    """
    with open(run / LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JobError(f"run {run.name}: another process is training it now") from None
        yield
