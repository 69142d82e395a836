"""What is kept of a finished request: one log line, one row of the serve run's metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Record:
    """Times are `time.monotonic` seconds; None where the request did not get that far."""

    id: str
    route: str
    stream: bool
    arrived: float = field(default_factory=time.monotonic)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    finish: str = ""
    status: int = 200
    user: str = ""

    @property
    def queue_seconds(self) -> float | None:
        """Arrival to the first step the request was part of."""
        return _span(self.arrived, self.scheduled)

    @property
    def ttft_seconds(self) -> float | None:
        """Arrival to first token."""
        return _span(self.arrived, self.first_token)

    @property
    def total_seconds(self) -> float | None:
        """Arrival to the end of the answer."""
        return _span(self.arrived, self.ended)

    @property
    def prefill_seconds(self) -> float | None:
        """First step to first token."""
        return None if self.scheduled is None else _span(self.scheduled, self.first_token)

    @property
    def decode_seconds(self) -> float | None:
        """First token to last."""
        return None if self.first_token is None else _span(self.first_token, self.last_token)

    @property
    def per_token_seconds(self) -> float | None:
        """TPOT: (end - first token) / (completion tokens - 1), over all choices together."""
        if self.decode_seconds is None or self.completion_tokens < 2:
            return None
        return self.decode_seconds / (self.completion_tokens - 1)

    def row(self) -> dict[str, Any]:
        """For ``metrics.jsonl``."""
        return {
            "id": self.id,
            "route": self.route,
            "stream": self.stream,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_seconds": self.queue_seconds,
            "ttft_seconds": self.ttft_seconds,
            "total_seconds": self.total_seconds,
            "finish_reason": self.finish,
            "status": self.status,
        }

    def line(self) -> str:
        """The log line."""
        user = f" user={self.user!r}" if self.user else ""
        return (
            f"request id={self.id} prompt_tokens={self.prompt_tokens} completion_tokens={self.completion_tokens} "
            f"queue_ms={_ms(self.queue_seconds)} ttft_ms={_ms(self.ttft_seconds)} total_ms={_ms(self.total_seconds)} "
            f"finish={self.finish} status={self.status}{user}"
        )


def _span(begin: float, end: float | None) -> float | None:
    return None if end is None else max(0.0, end - begin)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"
