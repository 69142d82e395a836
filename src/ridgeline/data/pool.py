"""An ordered map over a pool of processes, safe to spawn, with bounded memory, that leaves no orphans."""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from ridgeline.errors import JobError

T = TypeVar("T")
R = TypeVar("R")
BYTES_PER_WORKER = 2_000_000


def worker_count(asked: int, source_bytes: int) -> int:
    """``asked`` processes; 0 means one per available core, but no more than the corpus can keep busy."""
    if asked:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, source_bytes // BYTES_PER_WORKER))


class Workers:
    """``count`` processes, started at the first use; one means this very process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """``function`` of every task, in order. At most three tasks per worker wait, so ``tasks`` may be endless.

        Raises:
            JobError: a worker was killed.
        """
        if self.count == 1:
            yield from map(function, tasks)
            return
        waiting: collections.deque[Future[R]] = collections.deque()
        try:
            for task in tasks:
                waiting.append(self._started().submit(function, task))
                if len(waiting) >= 3 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise JobError(
                "a worker process died: killed, out of memory, or a script that builds without "
                "`if __name__ == '__main__':`; finished shards are kept"
            ) from None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_start_worker)
        return self._pool


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C and ends the pool
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: Any) -> None:
    """A worker holds both ends of its queue, so it would never notice that its parent was killed."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
