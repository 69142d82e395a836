"""The state one app shares between its routes: settings, engine thread, metrics, and whether it is draining."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ridgeline.serving.engine_thread import EngineThread
from ridgeline.serving.metrics import Metrics
from ridgeline.serving.problems import ApiError
from ridgeline.serving.records import Record
from ridgeline.serving.settings import ServeSettings

logger = logging.getLogger("ridgeline.serving")


class Endpoint:
    """One served model. ``on_record`` gets every finished request (the serve run writes it down)."""

    def __init__(
        self, thread: EngineThread, settings: ServeSettings, on_record: Callable[[Record], None] | None = None
    ) -> None:
        self.thread = thread
        self.settings = settings
        self.on_record = on_record
        self.draining = False
        self.created = int(time.time())
        self.metrics = Metrics(settings.name, thread, lambda: self.draining)
        thread.on_step = self.metrics.step.observe

    @property
    def engine(self) -> Any:
        """The engine; None while it loads."""
        return self.thread.engine

    @property
    def context(self) -> int:
        """Tokens one sequence may hold, prompt and completion."""
        return int(self.engine.max_context)

    @property
    def ready(self) -> bool:
        """Whether a new request would be taken."""
        return self.thread.state == "running" and not self.draining

    def require_ready(self) -> None:
        """Refuse with 503 while loading, draining, or after the engine failed."""
        if self.ready:
            return
        health = self.thread.health()
        if self.draining:
            code, message = "draining", "the server is shutting down and takes no new requests"
        elif health["state"] == "loading":
            code, message = "loading", "the model is being loaded"
        else:
            code, message = "engine_failed", f"the engine cannot answer: {health['reason'] or health['state']}"
        headers = {"retry-after": str(self.settings.retry_after_seconds), "connection": "close"}
        raise ApiError(503, message, code=code, headers=headers)

    def finished(self, record: Record, accepted: bool) -> None:
        """Account for a request that has ended: one log line, the run, and metrics when the engine had taken it."""
        record.ended = time.monotonic()
        logger.info("%s", record.line())
        if accepted:
            self._observe(record)
        if self.on_record is not None:
            self.on_record(record)

    def _observe(self, record: Record) -> None:
        metrics = self.metrics
        metrics.prompt_tokens.inc(record.prompt_tokens)
        for histogram, seconds in (
            (metrics.total, record.total_seconds),
            (metrics.queue, record.queue_seconds),
            (metrics.prefill, record.prefill_seconds),
            (metrics.decode, record.decode_seconds),
            (metrics.per_token, record.per_token_seconds),
        ):
            if seconds is not None:
                histogram.observe(seconds)
