"""The server's limits and switches, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ridgeline.errors import UserError


@dataclass(frozen=True)
class ServeSettings:
    """What one endpoint allows. Every limit is answered by a 4xx that names the field, never by a crash.

    ``max_batch`` sequences run at once and ``max_queue`` more may wait; beyond that a request is answered 429.
    ``max_tokens`` caps the completion tokens of one sequence (None: whatever the context leaves). ``prefill_chunk``
    prompt tokens are computed in one piece (None: the engine's own choice).
    """

    name: str = "model"
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 8
    max_context: int | None = None
    max_queue: int = 64
    max_tokens: int | None = None
    prefill_chunk: int | None = None
    max_body_bytes: int = 4 * 1024 * 1024
    api_key: str | None = None
    body_seconds: float = 30.0
    ping_seconds: float = 15.0
    stall_seconds: float = 120.0
    drain_seconds: float = 120.0
    retry_after_seconds: int = 1

    def __post_init__(self) -> None:
        for field, lowest in (("max_batch", 1), ("max_queue", 0), ("max_body_bytes", 1), ("port", 0)):
            if getattr(self, field) < lowest:
                raise UserError(f"{_flag(field)} is {getattr(self, field)}: at least {lowest}")
        for field in ("max_context", "max_tokens", "prefill_chunk"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{_flag(field)} is {value}: at least 1")
        for field in ("body_seconds", "ping_seconds", "stall_seconds", "drain_seconds"):
            if not 0 < getattr(self, field) < math.inf:  # also false for NaN
                raise UserError(f"{_flag(field)} is {getattr(self, field)}: a finite number above 0 is needed")
        if self.port > 65535:
            raise UserError(f"--port is {self.port}: at most 65535")
        if not self.name.strip():
            raise UserError("--name is empty: give a name, or leave the option out")
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("--api-key is empty: give a key, or leave the option out")

    @property
    def capacity(self) -> int:
        """Sequences that may be open at once: running and waiting."""
        return self.max_batch + self.max_queue


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
