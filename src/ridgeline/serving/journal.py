"""The run of kind "serve": a row per finished request, and the figures over all of them."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from typing import Any

from ridgeline.runs import Run
from ridgeline.serving.engine_thread import EngineThread
from ridgeline.serving.load.server_side import account
from ridgeline.serving.load.stats import percentiles
from ridgeline.serving.records import Record

logger = logging.getLogger("ridgeline.serving")

MOST_ROWS = 1_000_000  # a server may run for months; its counters live in /metrics


class Journal:
    """Writes records into ``run``. A full disk costs the rows, never the requests."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._began = time.monotonic()
        self._rows = 0
        self._totals: Counter[str] = Counter()
        self._ttft: deque[float] = deque(maxlen=100_000)
        self._total: deque[float] = deque(maxlen=100_000)
        self._broken = False

    def record(self, record: Record) -> None:
        """Take one finished request."""
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += record.prompt_tokens
        self._totals["completion_tokens"] += record.completion_tokens
        self._totals[f"status_{record.status}"] += 1
        if record.status == 200:
            if record.ttft_seconds is not None:
                self._ttft.append(record.ttft_seconds)
            if record.total_seconds is not None:
                self._total.append(record.total_seconds)
        if self._rows < MOST_ROWS and not self._broken:
            self._rows += 1
            self._guard(lambda: self._run.log(**record.row()))

    def finish(self, status: str, error: str | None, thread: EngineThread) -> None:
        """Write the summary, with the engine's own account of its decode steps, and close the run."""
        engine = account(thread.first_stats, {**thread.stats, "ceiling": thread.read_ceiling})
        self._guard(lambda: self._run.summarize(**self.summary(), **engine))
        # Rows a full disk did not take make the first close fail; the second finds the file closed.
        for _ in range(2):
            if self._run.info["status"] == "running":
                self._guard(lambda: self._run.finish(status, error))

    def summary(self) -> dict[str, Any]:
        """Counts by status and percentiles over the answered requests, seconds."""
        names = ("requests", "prompt_tokens", "completion_tokens")
        figures: dict[str, Any] = {"model": self._run.info["name"], **{name: self._totals[name] for name in names}}
        figures["statuses"] = {k[7:]: v for k, v in sorted(self._totals.items()) if k.startswith("status_")}
        figures["seconds"] = round(time.monotonic() - self._began, 3)
        figures.update(percentiles(self._ttft, "ttft"))
        figures.update(percentiles(self._total, "e2e"))
        return figures

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            if not self._broken:
                logger.warning("the run cannot be written any more (%s); serving goes on", error)
            self._broken = True
